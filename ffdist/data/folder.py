"""A folder that files are kept in, local or far: whole or not at all.

A file is written under another name, synced and renamed, so that whoever reads it finds all of it or none.
"""

import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any


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

    def get(self, name: str) -> bytes | None:
        """Returns what a file holds; None where there is none."""
        try:
            with self._filesystem.open_input_stream(self.path(name)) as stream:
                content: bytes = stream.read()
            return content
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._error(f"{self.path(name)} cannot be read ({_brief(error)})") from error

    def get_checked(self, name: str, *, num_bytes: int, sha256: str) -> bytes:
        """Returns a file of which it is known what was written.

        Raises:
            DamagedFile: It is not that.
        """
        content = self.get(name)
        if content is None:
            wrong = "is missing"
        elif len(content) != num_bytes:
            wrong = f"is cut or grown (bytes: {len(content)}, written: {num_bytes})"
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
        path = self.path(name)
        part = f"{path}.{uuid.uuid4().hex[:8]}.part"  # another process may be writing the same
        try:
            self._filesystem.create_dir(os.path.dirname(path), recursive=True)  # noqa: PTH120, not always a local path
            if self._is_local:
                yield Path(part)
                Path(part).chmod(Path(path).parent.stat().st_mode & 0o666)  # safetensors lets nobody else read it
            else:
                from pyarrow.fs import LocalFileSystem, copy_files

                with TemporaryDirectory() as near:
                    yield Path(near, "part")
                    copy_files(f"{near}/part", part, LocalFileSystem(), self._filesystem)
            self._sync(part)
            self._filesystem.move(part, path)
            for folder in (os.path.dirname(path), self._root):  # noqa: PTH120
                self._sync(folder)
        except (OSError, ValueError) as error:  # of pyarrow's
            with suppress(OSError, ValueError):
                self._filesystem.delete_file(part)  # a full disk wants it back
            raise self._error(f"{path} cannot be written ({_brief(error)})") from error

    def names(self) -> list[str]:
        """Returns the names of all files, those in folders as `folder/file`, sorted."""
        from pyarrow.fs import FileSelector

        try:
            found = self._filesystem.get_file_info(FileSelector(self._root, recursive=True, allow_not_found=True))
        except OSError as error:
            raise self._error(f"{self._root} cannot be read ({_brief(error)})") from error
        return sorted(info.path[len(self._root) :].lstrip("/") for info in found if info.is_file)

    def remove(self, name: str) -> None:
        """Removes a file, or a folder with all that is in it."""
        try:
            if self._filesystem.get_file_info(self.path(name)).is_file:
                self._filesystem.delete_file(self.path(name))
            else:
                self._filesystem.delete_dir(self.path(name))
        except OSError as error:
            raise self._error(f"{self.path(name)} cannot be removed ({_brief(error)})") from error

    def check_writable(self) -> None:
        """Makes sure that something can be added."""
        probe = f".{uuid.uuid4().hex[:8]}"
        self.put(probe, b"")
        self.remove(probe)

    def path(self, name: str = "") -> str:
        """Returns where a file, or all of them, lies, in words that a user can look for."""
        return f"{self._root}/{name}" if name else self._root

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        from pyarrow.fs import FileSystem, LocalFileSystem

        try:
            filesystem, root = FileSystem.from_uri(self.uri) if "://" in self.uri else (LocalFileSystem(), self.uri)
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


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
