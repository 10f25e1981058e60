"""ffdist trains Forward-Forward networks as a stream over Ray actors.

from ffdist import load_config, train

run = train(load_config("digits", ["training.epochs=20"]), runner="serial")
print(run.summary["test_goodness_error"], run.folder)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ffdist.config import Config, ConfigError
    from ffdist.config_file import load_config
    from ffdist.ff.network import Architecture, Network
    from ffdist.trainer import Run, train

_HOMES = {
    "Architecture": "ffdist.ff.network",
    "Config": "ffdist.config",
    "ConfigError": "ffdist.config",
    "Network": "ffdist.ff.network",
    "Run": "ffdist.trainer",
    "load_config": "ffdist.config_file",
    "train": "ffdist.trainer",
}

__all__ = ["Architecture", "Config", "ConfigError", "Network", "Run", "load_config", "train"]


def __getattr__(name: str) -> Any:
    """Loads a public name when it is first asked for, so that importing the package stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module 'ffdist' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
