"""Inspection and formatting of paths given by the user."""

import errno
import os
import stat
from pathlib import Path

from ffdist.errors import ConfigError


def printable(path: Path | str) -> str:
    """Returns a path as valid UTF-8 text. Invalid bytes are escaped, so that different paths stay different."""
    return os.fsencode(path).decode(errors="backslashreplace")


def kind_of(path: Path) -> str:
    """Returns the type of a path, with links followed: `file`, `folder`, `other`, or empty if it does not exist.

    Raises:
        ConfigError: The path cannot be accessed.
    """
    try:
        mode = path.stat().st_mode
    except ValueError:  # a null byte
        return ""
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return ""
        raise access_error(path, error) from error
    return "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "other"


def find_in_subfolders(folder: Path, name: str) -> list[Path]:
    """Returns the paths `folder/*/name` that exist, sorted.

    Raises:
        ConfigError: The folder cannot be read.
    """
    try:
        names = os.listdir(folder)  # noqa: PTH208, Path.glob ignores errors since Python 3.13
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise access_error(folder, error) from error
    paths = (folder / subfolder / name for subfolder in names)
    return sorted(path for path in paths if os.path.exists(path))  # noqa: PTH110, Path.exists raises PermissionError


def access_error(path: Path, error: OSError) -> ConfigError:
    """Returns the ConfigError for a file or folder that cannot be read."""
    return ConfigError(
        f"{printable(path)} cannot be read ({error.strerror}); give another path, or change its permissions"
    )
