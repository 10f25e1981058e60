"""Files of folders that somebody else may have written: runs, stores, checkpoints and exported networks.

Whoever writes such a folder chooses the names and links in it, so every reader finds its files through this module.
"""

import errno
import json
import stat
from pathlib import Path
from typing import Any

MAX_TEXT_BYTES = 64 * 2**20
"""Largest JSON file that is read; the largest that ffdist writes has about 10 MB."""


class UnsafeFile(ValueError):
    """A file that must not be used; the text says which, and why."""


def path_in(folder: Path | str, name: str) -> Path:
    """Returns the path of a file or folder inside a folder, links resolved; it need not exist.

    Raises:
        UnsafeFile: The name or a link leads out of the folder.
    """
    try:
        root = Path(folder).resolve()
        path = (root / name).resolve()
        if path != root and path.is_relative_to(root):
            return path
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a null byte, a name that is too long
        raise UnsafeFile(f"{str(Path(folder, name))[:200]!r} is no valid path ({error})") from error
    raise UnsafeFile(f"{str(Path(folder, name))[:200]} leads out of {folder}; nothing outside of it is used")


def file_in(folder: Path | str, name: str, *, max_bytes: int | None = None) -> Path:
    """Returns the path of a file inside a folder, links resolved; it need not exist.

    Args:
        folder: That must hold it.
        name: Relative to the folder.
        max_bytes: Largest size that the caller reads.

    Raises:
        UnsafeFile: It leads out of the folder, is a folder, device, pipe or socket, or is too large.
        OSError: It cannot be looked at.
    """
    path = path_in(folder, name)
    try:
        status = path.stat()
    except FileNotFoundError:
        return path
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
            raise UnsafeFile(f"{str(Path(folder, name))[:200]!r} is no valid path ({error.strerror})") from error
        raise
    if not stat.S_ISREG(status.st_mode):
        raise UnsafeFile(f"{Path(folder, name)} is not a regular file")
    if max_bytes is not None and status.st_size > max_bytes:
        raise UnsafeFile(f"{Path(folder, name)} is too large (bytes: {status.st_size:,}, at most: {max_bytes:,})")
    return path


def read_json(folder: Path | str, name: str) -> Any:
    """Returns what a JSON file inside a folder holds.

    Raises:
        OSError: It is missing or cannot be read.
        ValueError: It must not be used, or is not JSON.
    """
    try:
        return json.loads(file_in(folder, name, max_bytes=MAX_TEXT_BYTES).read_bytes())
    except RecursionError as error:
        raise UnsafeFile(f"{Path(folder, name)} is nested too deeply") from error
