"""A local or remote folder whose files are complete or absent.

A local file is written under another name, synced and renamed. An object store needs none of that: an upload is atomic.
Remote storage fails for a moment now and then, so each of its operations is tried again a few times.
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

from ffdist.files import MAX_TEXT_BYTES, UnsafeFile, file_in, path_in

T = TypeVar("T")

PAUSES_S = (1.0, 2.0, 4.0, 8.0)
"""Pauses between the attempts of an operation on remote storage."""
PERMANENT = ("ACCESS_DENIED", "INVALID_ACCESS_KEY_ID", "NO_SUCH_BUCKET", "SIGNATURE_DOES_NOT_MATCH")
"""Errors of S3, as pyarrow names them, that another attempt meets again."""
OBJECT_STORES = ("s3", "gcs", "abfs")
"""Names of the file systems of `pyarrow.fs` that have no folders and replace a file atomically."""
COPY_BYTES = 2**24
"""Bytes that are handed to a remote file system at once."""
STALE_AFTER = timedelta(days=1)
"""Age at which a file that is not complete counts as left behind by a process that was killed."""


class DamagedFile(ValueError):
    """A file that is not what was written; the text says which, and how it differs."""


class Folder:
    """A local folder, or any URI that `pyarrow.fs` knows, such as s3://bucket/runs. Nothing is opened before its use.

    Args:
        uri: Path or URI.
        error: Raised, with a text that says what and why, where it cannot be opened, read or written.
        inner: Folder in it that is meant, which a URI with a query could not say itself.
    """

    def __init__(self, uri: str, error: type[Exception], inner: str = "") -> None:
        # Now, because an actor that it is sent to works in another folder.
        self.uri = uri if "://" in uri else str(Path(os.path.expanduser(uri)).resolve())  # noqa: PTH111, which raises
        self._error, self._inner = error, inner
        self.is_remote = "://" in uri and not uri.startswith("file:")
        """Whether it is reached over a network."""
        self._pauses_s = PAUSES_S if self.is_remote else ()

    def get(self, name: str, *, max_bytes: int = MAX_TEXT_BYTES) -> bytes | None:
        """Returns what a file holds; None where there is none."""
        num_bytes = self._num_bytes(name)
        if num_bytes is None:
            return None

        def read() -> bytes:
            if num_bytes > max_bytes:
                raise ValueError(f"{num_bytes:,} bytes, at most {max_bytes:,} are expected")
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
        """Returns a file of which it is known what was written.

        Raises:
            DamagedFile: It is not that.
        """
        found = self._num_bytes(name)  # first, because a file may be larger than memory
        content = self.get(name, max_bytes=num_bytes) if found == num_bytes else None
        if found is None:
            wrong = "is missing"
        elif content is None or len(content) != num_bytes:
            wrong = f"is cut or grown (bytes: {found}, written: {num_bytes})"
        elif hashlib.sha256(content).hexdigest() != sha256:
            wrong = "is not what was written there (its SHA-256 differs)"
        else:
            return content
        raise DamagedFile(f"{self.path(name)} {wrong}")

    def put(self, name: str, content: bytes) -> None:
        """Writes a file, folders included; what was there under its name stays until all of the new one is."""
        with self.writing(name) as path:
            path.write_bytes(content)

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Yields a local path to write to; at the end of the `with` block the file is put in place, as by `put`."""
        self._check_inside(name)
        path = self.path(name)
        try:
            if self._is_local:
                with self._replacing(path) as part:
                    yield Path(part)
                    Path(part).chmod(Path(path).parent.stat().st_mode & 0o666)  # safetensors lets nobody else read it
            else:
                with TemporaryDirectory() as near:
                    yield Path(near, "part")
                    self._attempt(lambda: self._upload(f"{near}/part", path))
        except (OSError, ValueError) as error:  # of pyarrow's
            raise self._error(f"{path} cannot be written ({_brief(error)})") from error

    def _upload(self, source: str, path: str) -> None:
        if self._filesystem.type_name in OBJECT_STORES:
            self._send(source, path)
            return
        with self._replacing(path) as part:
            self._send(source, part)

    def _send(self, source: str, path: str) -> None:
        # Not by copy_files of pyarrow, which ignores errors of the last part: the file would be missing without a word.
        with Path(source).open("rb") as file, self._filesystem.open_output_stream(path) as stream:
            shutil.copyfileobj(file, stream, COPY_BYTES)

    @contextmanager
    def _replacing(self, path: str) -> Iterator[str]:
        """Yields the path of a temporary file beside `path`, and renames it to that at the end of the `with` block."""
        part = f"{path}.{uuid.uuid4().hex[:8]}.part"  # another process may be writing the same
        try:
            self._filesystem.create_dir(os.path.dirname(path), recursive=True)  # noqa: PTH120, not always a local path
            yield part
            self._sync(part)
            self._filesystem.move(part, path)
            for folder in (os.path.dirname(path), self._root):  # noqa: PTH120
                self._sync(folder)
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                self._filesystem.delete_file(part)  # a full disk wants it back
            raise

    def names(self) -> list[str]:
        """Returns the names of all files, those in folders as `folder/file`, sorted."""
        from pyarrow.fs import FileSelector

        selector = FileSelector(self._root, recursive=True, allow_not_found=True)
        try:
            if self._is_local:  # whose links to folders are not followed
                self._check_inside("")
                return sorted(_local_names(Path(self._root)))
            found = self._attempt(lambda: self._filesystem.get_file_info(selector))
        except OSError as error:
            raise self._error(f"{self._root} cannot be read ({_brief(error)})") from error
        return sorted(info.path[len(self._root) :].lstrip("/") for info in found if info.is_file)

    def remove(self, name: str) -> None:
        """Removes a file, or a folder with all that is in it."""
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
        """Removes files that were never completed, because the process that wrote them was killed."""
        for name in self.names():
            if name.endswith(".part"):
                with suppress(OSError):
                    if datetime.now(UTC) - self._filesystem.get_file_info(self.path(name)).mtime > STALE_AFTER:
                        self._filesystem.delete_file(self.path(name))

    def check_writable(self) -> None:
        """Makes sure that something can be added; a wrong URI is reported at once, without further attempts."""
        probe, folder = f".{uuid.uuid4().hex[:8]}", self.without_retries()
        folder.put(probe, b"")
        folder.remove(probe)

    def without_retries(self) -> "Folder":
        """Returns the same folder, whose operations are tried once."""
        folder = copy(self)
        folder._pauses_s = ()
        return folder

    def _attempt(self, operation: Callable[[], T]) -> T:
        """Performs an operation, on remote storage several times if need be."""
        for pause_s in self._pauses_s:
            try:
                return operation()
            except FileNotFoundError:
                raise
            except OSError as error:
                if any(name in str(error) for name in PERMANENT):
                    raise
            time.sleep(pause_s)
        return operation()

    def path(self, name: str = "") -> str:
        """Returns where a file, or all of them, lies, in words that a user can look for."""
        return f"{self._root}/{name}" if name else self._root

    def _num_bytes(self, name: str) -> int | None:
        """Returns the size of a file; None where there is none."""
        try:
            self._check_inside(name, file_in)
            info = self._attempt(lambda: self._filesystem.get_file_info(self.path(name)))
        except OSError as error:
            raise self._error(f"{self.path(name)} cannot be read ({_brief(error)})") from error
        return int(info.size) if info.is_file else None

    def _check_inside(self, name: str, find: Callable[[str, str], Path] = path_in) -> None:
        """Makes sure that no link in a local folder leads out of it."""
        relative = f"{self._inner}/{name}".strip("/")
        if self._is_local and relative:
            try:
                find(self._root.removesuffix(f"/{self._inner}") if self._inner else self._root, relative)
            except UnsafeFile as error:
                raise self._error(str(error)) from error

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        from pyarrow.fs import FileSystem, LocalFileSystem

        try:
            if "://" in self.uri:
                filesystem, root = self._attempt(lambda: FileSystem.from_uri(self.uri))  # asks S3 for the region
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
        """Has what was written outlive a loss of power, where that is ours to ask."""
        if self._is_local:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                if hasattr(os, "posix_fadvise"):  # nobody reads it soon, and warm memory makes the next write cheaper
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def _local_names(root: Path) -> Iterator[str]:
    def fail(error: OSError) -> None:
        # Another process may remove folders meanwhile.
        if root.is_file() or not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise error

    for folder, _, files in os.walk(root, onerror=fail):
        yield from (str(Path(folder, file).relative_to(root)) for file in files)


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
