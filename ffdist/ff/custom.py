"""Import of functions and classes of the user, given as `package.module:name`."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any


def import_custom(name: str) -> Any:
    """Imports an object from a module that is installed or in the working directory.

    Args:
        name: `package.module:name`.

    Raises:
        Exception: The module raised it, or it has no such object.
    """
    module, _, attribute = name.partition(":")
    folder = str(Path.cwd())
    is_added = folder not in sys.path
    if is_added:
        sys.path.append(folder)  # after installed packages, which files of the same name must not replace
    try:
        return getattr(import_module(module), attribute)
    finally:
        if is_added and folder in sys.path:
            sys.path.remove(folder)
