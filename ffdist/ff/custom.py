"""Import of functions and classes of the user, given as `package.module:name`."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
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
    with working_directory_importable():
        return getattr(import_module(module), attribute)


def find_class(name: str, base: type, *, may_import: bool) -> type[Any]:
    """Returns a class of the user. Nothing but the import of its module runs code of the user.

    Args:
        name: `package.module:Class`.
        base: Class that it must be derived from.
        may_import: Whether the module may be imported. If not, it must be imported already: a file that names it may
            come from another person.

    Raises:
        ImportError: The module may not be imported.
        TypeError: It is no class derived from `base`.
        Exception: The module raised it, or it has no such object.
    """
    module, _, attribute = name.partition(":")
    if may_import:
        target = import_custom(name)
    elif module in sys.modules:
        target = vars(sys.modules[module])[attribute]  # `getattr` could run code of the module
    else:
        raise ImportError(
            f"{module} is not imported, and the folder of a run must not cause imports; import it first, on the "
            f"command line by --import {module}"
        )
    if not (isinstance(target, type) and issubclass(target, base)):
        raise TypeError(f"it must be a subclass of {base.__module__}.{base.__qualname__}")
    return target


@contextmanager
def working_directory_importable() -> Iterator[None]:
    """Makes modules in the working directory importable in a `with` block."""
    folder = str(Path.cwd())
    is_added = folder not in sys.path
    if is_added:
        sys.path.append(folder)  # after installed packages, which files of the same name must not replace
    try:
        yield
    finally:
        if is_added and folder in sys.path:
            sys.path.remove(folder)
