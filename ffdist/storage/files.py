"""Safe access to files in untrusted folders: runs, stores, checkpoints and exported networks.

The author of such a folder controls its file names and links, so every reader resolves paths through this module.
"""

import errno
import json
import stat
from pathlib import Path
from typing import Any

MAX_TEXT_BYTES = 64 * 2**20
"""Maximum size of a JSON file. The largest file that ffdist writes has about 10 MB."""


class UnsafeFile(ValueError):
    """Raised for a file that must not be read. The message names the file and the reason."""


def path_in(folder: Path | str, name: str) -> Path:
    """Returns the resolved path of a file or folder inside a folder. It does not need to exist.

    Raises:
        UnsafeFile: The path, with links resolved, is outside the folder or invalid.
    """
    try:
        root = Path(folder).resolve()
        path = (root / name).resolve()
        if path != root and path.is_relative_to(root):
            return path
    except (OSError, RuntimeError, ValueError) as error:  # a link loop, a null byte, a name that is too long
        raise UnsafeFile(f"{str(Path(folder, name))[:200]!r} is not a valid path ({error})") from error
    raise UnsafeFile(f"{str(Path(folder, name))[:200]} is outside {folder}; files outside it are not read")


def file_in(folder: Path | str, name: str, *, max_bytes: int | None = None) -> Path:
    """Returns the resolved path of a regular file inside a folder. It does not need to exist.

    Args:
        folder: Folder that must contain the file.
        name: Path relative to the folder.
        max_bytes: Maximum size of the file, or None for no limit.

    Raises:
        UnsafeFile: The path is outside the folder or invalid, or the file is not a regular file or is too large.
        OSError: The file status cannot be read.
    """
    path = path_in(folder, name)
    try:
        status = path.stat()
    except FileNotFoundError:
        return path
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
            raise UnsafeFile(f"{str(Path(folder, name))[:200]!r} is not a valid path ({error.strerror})") from error
        raise
    if not stat.S_ISREG(status.st_mode):
        raise UnsafeFile(f"{Path(folder, name)} is not a regular file")
    if max_bytes is not None and status.st_size > max_bytes:
        raise UnsafeFile(f"{Path(folder, name)} is too large (bytes: {status.st_size:,}, at most: {max_bytes:,})")
    return path


def read_json(folder: Path | str, name: str) -> Any:
    """Returns the content of a JSON file inside a folder.

    Raises:
        OSError: The file is missing or cannot be read.
        ValueError: The file is unsafe to read, or is not JSON.
    """
    try:
        return json.loads(file_in(folder, name, max_bytes=MAX_TEXT_BYTES).read_bytes())
    except RecursionError as error:
        raise UnsafeFile(f"{Path(folder, name)} is nested too deeply") from error
