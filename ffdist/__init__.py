"""ffdist trains Forward-Forward networks as a stream over Ray actors.

from ffdist import train

run = train("digits", runner="serial")
print(run.summary["test_goodness_error"], run.folder, run.network)
"""

import time
from importlib import import_module
from pkgutil import extend_path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ffdist.config import Config, ConfigError
    from ffdist.config_file import load_config
    from ffdist.exported import read_network
    from ffdist.ff.network import Architecture, Network
    from ffdist.finished import Run
    from ffdist.trainer import train

IMPORTED_AT = time.monotonic()
"""When this process began to use ffdist; benchmarks count from here."""
__path__ = extend_path(__path__, __name__)  # a model of MLflow's brings a part of this package, and puts it first

_HOMES = {
    "Architecture": "ffdist.ff.network",
    "Config": "ffdist.config",
    "ConfigError": "ffdist.config",
    "Network": "ffdist.ff.network",
    "Run": "ffdist.finished",
    "load_config": "ffdist.config_file",
    "read_network": "ffdist.exported",
    "train": "ffdist.trainer",
}

__all__ = ["Architecture", "Config", "ConfigError", "Network", "Run", "load_config", "read_network", "train"]


def __getattr__(name: str) -> Any:
    """Loads a public name when it is first asked for, so that importing the package stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module 'ffdist' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
