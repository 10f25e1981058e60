"""ffdist trains Forward-Forward networks as a pipeline of Ray actors.

from ffdist import train

run = train("digits", runner="serial")
print(run.summary["test_goodness_error"], run.folder, run.network)
"""

import time
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ffdist.config.loading import load_config
    from ffdist.config.schema import Config
    from ffdist.errors import ConfigError
    from ffdist.export.network import load_network
    from ffdist.ff.architecture import Architecture
    from ffdist.ff.encoders import ImageEncoder
    from ffdist.ff.network import Network
    from ffdist.runs.run import Run
    from ffdist.training.callbacks import Callback
    from ffdist.training.trainer import resume, train

IMPORTED_AT = time.monotonic()
"""Time of the import on the monotonic clock; benchmarks measure from here."""

_MODULES = {
    "Architecture": "ffdist.ff.architecture",
    "Callback": "ffdist.training.callbacks",
    "Config": "ffdist.config.schema",
    "ConfigError": "ffdist.errors",
    "ImageEncoder": "ffdist.ff.encoders",
    "Network": "ffdist.ff.network",
    "Run": "ffdist.runs.run",
    "load_config": "ffdist.config.loading",
    "load_network": "ffdist.export.network",
    "resume": "ffdist.training.trainer",
    "train": "ffdist.training.trainer",
}

__all__ = [
    "Architecture",
    "Callback",
    "Config",
    "ConfigError",
    "ImageEncoder",
    "Network",
    "Run",
    "load_config",
    "load_network",
    "resume",
    "train",
]


def __getattr__(name: str) -> Any:
    """Imports a public name on first access, so that importing the package stays fast."""
    if name not in _MODULES:
        raise AttributeError(f"module 'ffdist' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
