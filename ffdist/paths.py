"""Paths that a user gives: what is there, and how it is named."""

import errno
import os
import stat
from pathlib import Path

from ffdist.config import ConfigError


def printable(path: Path | str) -> str:
    """Returns a path as it can be printed and written, whatever bytes its name is of; different ones stay different."""
    return os.fsencode(path).decode(errors="backslashreplace")


def kind_of(path: Path) -> str:
    """Returns what a path leads to: a `file`, a `folder` or something `other`; nothing where that does not exist.

    Raises:
        ConfigError: It cannot be looked at.
    """
    try:
        mode = path.stat().st_mode
    except ValueError:  # a null byte
        return ""
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return ""
        raise unreachable(path, error) from error
    return "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "other"


def in_each_folder(folder: Path, name: str) -> list[Path]:
    """Returns the files of a name in the folders of a folder, such as that of all runs, sorted.

    Raises:
        ConfigError: The folder cannot be looked at.
    """
    try:
        names = os.listdir(folder)  # noqa: PTH208, Path.glob hides errors from Python 3.13 on
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise unreachable(folder, error) from error
    paths = (folder / each / name for each in names)
    return sorted(path for path in paths if os.path.exists(path))  # noqa: PTH110, Path's raises without a permission


def unreachable(path: Path, error: OSError) -> ConfigError:
    """Returns the error for a file or folder that cannot be read."""
    return ConfigError(
        f"{printable(path)} cannot be read ({error.strerror}); give another path, or change its permissions"
    )
