"""A local or remote folder with atomic writes.

Local files are written under a temporary name, synced and renamed. Object stores do not need this: uploads are atomic.
Operations on remote storage are retried, because it can fail temporarily.
"""

import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import copy
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from ffdist.storage.files import MAX_TEXT_BYTES, UnsafeFile, file_in, path_in

T = TypeVar("T")

PAUSES_S = (1.0, 2.0, 4.0, 8.0)
"""Delays between retries of an operation on remote storage."""
PERMANENT_ERRORS = ("ACCESS_DENIED", "INVALID_ACCESS_KEY_ID", "NO_SUCH_BUCKET", "SIGNATURE_DOES_NOT_MATCH")
"""pyarrow's names of S3 errors that are not retried."""
OBJECT_STORES = ("s3", "gcs", "abfs")
"""Type names of the file systems in `pyarrow.fs` that have no folders and replace files atomically."""
COPY_BYTES = 2**24
"""Block size for uploads to a remote file system."""
STALE_AFTER = timedelta(days=1)
"""Age from which an incomplete file is considered abandoned by a killed process."""


class DamagedFile(ValueError):
    """Raised for a file that differs from what was written. The message names the file and the difference."""


class Folder:
    """A local folder, or a URI that `pyarrow.fs` supports, such as s3://bucket/runs. It is opened on first use.

    Args:
        uri: Path or URI.
        error: Type of the exception to raise if the folder or a file cannot be opened, read or written.
        inner: Subfolder to use as the root. It is separate from the URI because a URI may end with a query.
    """

    def __init__(self, uri: str, error: type[Exception], inner: str = "") -> None:
        # Resolved now, because an actor that receives this object has another working directory.
        # Path.expanduser would raise an exception if the home folder is unknown.
        self.uri = uri if "://" in uri else str(Path(os.path.expanduser(uri)).resolve())  # noqa: PTH111
        self._error, self._inner = error, inner
        self.is_remote = "://" in uri and not uri.startswith("file:")
        """Whether the folder is on remote storage."""
        self._pauses_s = PAUSES_S if self.is_remote else ()

    def get(self, name: str, *, max_bytes: int = MAX_TEXT_BYTES) -> bytes | None:
        """Returns the content of a file, or None if it does not exist."""
        num_bytes = self._num_bytes(name)
        if num_bytes is None:
            return None

        def read() -> bytes:
            if num_bytes > max_bytes:
                raise ValueError(f"it has {num_bytes:,} bytes, at most {max_bytes:,} are expected")
            with self._filesystem.open_input_stream(self.path(name)) as stream:
                content: bytes = stream.read(num_bytes)
            return content

        try:
            return self._attempt(read)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, MemoryError) as error:
            raise self._error(f"{self.path(name)} cannot be read ({_brief(error)})") from error

    def get_checked(self, name: str, *, num_bytes: int, sha256: str) -> bytes:
        """Returns the content of a file after verifying its size and SHA-256.

        Raises:
            DamagedFile: The file is missing or differs.
        """
        size = self._num_bytes(name)  # checked first, because the file may be larger than host memory
        content = self.get(name, max_bytes=num_bytes) if size == num_bytes else None
        if size is None:
            problem = "is missing"
        elif content is None or len(content) != num_bytes:
            problem = f"has the wrong size (bytes: {size}, expected: {num_bytes})"
        elif hashlib.sha256(content).hexdigest() != sha256:
            problem = "is corrupted (its SHA-256 differs)"
        else:
            return content
        raise DamagedFile(f"{self.path(name)} {problem}")

    def put(self, name: str, content: bytes) -> None:
        """Writes a file atomically, and creates its parent folders."""
        with self.atomic_write(name) as path:
            path.write_bytes(content)

    @contextmanager
    def atomic_write(self, name: str) -> Iterator[Path]:
        """Yields a local path to write to. Moves or uploads the file to `name` at the end of the `with` block."""
        self._check_inside(name)
        path = self.path(name)
        try:
            if self._is_local:
                with self._atomic_replace(path) as part:
                    yield Path(part)
                    Path(part).chmod(Path(path).parent.stat().st_mode & 0o666)  # safetensors makes files private
            else:
                with TemporaryDirectory() as local:
                    yield Path(local, "part")
                    self._attempt(lambda: self._upload(f"{local}/part", path))
        except (OSError, ValueError) as error:  # pyarrow raises both
            raise self._error(f"{path} cannot be written ({_brief(error)})") from error

    def _upload(self, source: str, path: str) -> None:
        if self._filesystem.type_name in OBJECT_STORES:
            self._copy(source, path)
            return
        with self._atomic_replace(path) as part:
            self._copy(source, part)

    def _copy(self, source: str, path: str) -> None:
        # pyarrow's copy_files ignores errors in the last part of an upload, so that the file would silently be missing.
        with Path(source).open("rb") as file, self._filesystem.open_output_stream(path) as stream:
            shutil.copyfileobj(file, stream, COPY_BYTES)

    @contextmanager
    def _atomic_replace(self, path: str) -> Iterator[str]:
        """Yields the path of a temporary file next to `path`, and renames it to `path` at the end of the block."""
        part = f"{path}.{uuid.uuid4().hex[:8]}.part"  # unique, because another process may write the same file
        try:
            self._filesystem.create_dir(os.path.dirname(path), recursive=True)  # noqa: PTH120, may be a remote path
            yield part
            self._sync(part)
            self._filesystem.move(part, path)
            for folder in (os.path.dirname(path), self._root):  # noqa: PTH120
                self._sync(folder)
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                self._filesystem.delete_file(part)  # frees the space if the disk is full
            raise

    def names(self) -> list[str]:
        """Returns the names of all files relative to the folder, including those in subfolders, sorted."""
        from pyarrow.fs import FileSelector

        selector = FileSelector(self._root, recursive=True, allow_not_found=True)
        try:
            if self._is_local:  # does not follow links to folders
                self._check_inside("")
                return sorted(_local_names(Path(self._root)))
            infos = self._attempt(lambda: self._filesystem.get_file_info(selector))
        except OSError as error:
            raise self._error(f"{self._root} cannot be read ({_brief(error)})") from error
        return sorted(info.path[len(self._root) :].lstrip("/") for info in infos if info.is_file)

    def remove(self, name: str) -> None:
        """Removes a file, or a folder and its content."""
        self._check_inside(name)
        path = self.path(name)

        def delete() -> None:
            if self._filesystem.get_file_info(path).is_file:
                self._filesystem.delete_file(path)
            else:
                self._filesystem.delete_dir(path)

        try:
            self._attempt(delete)
        except OSError as error:
            raise self._error(f"{path} cannot be removed ({_brief(error)})") from error

    def remove_stale_parts(self) -> None:
        """Removes incomplete files that killed processes left behind."""
        for name in self.names():
            if name.endswith(".part"):
                with suppress(OSError):
                    if datetime.now(UTC) - self._filesystem.get_file_info(self.path(name)).mtime > STALE_AFTER:
                        self._filesystem.delete_file(self.path(name))

    def check_writable(self) -> None:
        """Checks that files can be added. Does not retry, so that a wrong URI is reported immediately."""
        probe, folder = f".{uuid.uuid4().hex[:8]}", self.without_retries()
        folder.put(probe, b"")
        folder.remove(probe)

    def without_retries(self) -> "Folder":
        """Returns a copy of this folder that does not retry operations."""
        folder = copy(self)
        folder._pauses_s = ()
        return folder

    def _attempt(self, operation: Callable[[], T]) -> T:
        """Performs an operation, with retries on remote storage."""
        for pause_s in self._pauses_s:
            try:
                return operation()
            except FileNotFoundError:
                raise
            except OSError as error:
                if any(name in str(error) for name in PERMANENT_ERRORS):
                    raise
            time.sleep(pause_s)
        return operation()

    def path(self, name: str = "") -> str:
        """Returns the full path of a file, or of the folder."""
        return f"{self._root}/{name}" if name else self._root

    def _num_bytes(self, name: str) -> int | None:
        """Returns the size of a file, or None if it does not exist."""
        try:
            self._check_inside(name, file_in)
            info = self._attempt(lambda: self._filesystem.get_file_info(self.path(name)))
        except OSError as error:
            raise self._error(f"{self.path(name)} cannot be read ({_brief(error)})") from error
        return int(info.size) if info.is_file else None

    def _check_inside(self, name: str, resolve: Callable[[str, str], Path] = path_in) -> None:
        """Checks that a path in a local folder does not lead outside it, for example by a link."""
        relative = f"{self._inner}/{name}".strip("/")
        if self._is_local and relative:
            try:
                resolve(self._root.removesuffix(f"/{self._inner}") if self._inner else self._root, relative)
            except UnsafeFile as error:
                raise self._error(str(error)) from error

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        from pyarrow.fs import FileSystem, LocalFileSystem

        try:
            if "://" in self.uri:
                filesystem, root = self._attempt(lambda: FileSystem.from_uri(self.uri))  # requests the region from S3
            else:
                filesystem, root = LocalFileSystem(), self.uri
        except (ValueError, OSError) as error:
            raise self._error(f"{self.uri} cannot be opened ({_brief(error)})") from error
        return filesystem, f"{root.rstrip('/')}/{self._inner}" if self._inner else root

    @property
    def _filesystem(self) -> Any:
        return self._opened[0]

    @property
    def _is_local(self) -> bool:
        return bool(self._filesystem.type_name == "local")

    @property
    def _root(self) -> str:
        return self._opened[1]

    def _sync(self, path: str) -> None:
        """Flushes a local file or folder to disk, so that it survives a power failure."""
        if self._is_local:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                # Drops the file from the page cache: it is not read soon, and the next write is faster with free pages.
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def _local_names(root: Path) -> Iterator[str]:
    def fail(error: OSError) -> None:
        # Another process may remove folders at the same time.
        if root.is_file() or not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise error

    for folder, _, files in os.walk(root, onerror=fail):
        yield from (str(Path(folder, file).relative_to(root)) for file in files)


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
