"""Negatives on disk: Arrow IPC files that outlive the run.

    STORE/manifest.json                          what the store is for
    STORE/epoch_0003/shard_000007.arrow          the negatives of one shard
    STORE/epoch_0003/shard_000007.json           its samples, size and SHA-256

A shard is written under another name, synced and renamed; its entry follows in the same way. Without its entry a shard
does not exist. Folders are local, or any URI that `pyarrow.fs` knows, such as s3://bucket/negatives.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ffdist.data.order import SHARD_SAMPLES

SCHEMA = 1
MANIFEST = "manifest.json"


class StoreError(ValueError):
    """A store that cannot be used; the text names the file and says what to do."""


class Entry(NamedTuple):
    """What is known of a shard."""

    epoch: int
    number: int
    first: int
    """Its first sample, counted in the epoch's order."""
    num_samples: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Store:
    """A folder of negatives.

    Args:
        uri: A local path, or a URI of `pyarrow.fs`.
    """

    uri: str

    def open(self, facts: dict[str, Any], *, config: dict[str, Any]) -> None:
        """Makes the store where there is none, and holds one that is there to what the run needs.

        Args:
            facts: What decides every negative in it, as JSON; the manifest tells them.
            config: The configuration that makes the store, without secrets; the manifest tells it as well.

        Raises:
            StoreError: It cannot be read or written, or is for other negatives.
        """
        wanted: dict[str, Any] = json.loads(json.dumps({"schema": SCHEMA, "shard_samples": SHARD_SAMPLES, **facts}))
        there = self.manifest(missing_ok=True)
        if there is None:
            self._put(MANIFEST, json.dumps(wanted | {"config": config}, indent=2).encode())
            return
        different = [key for key, value in wanted.items() if there.get(key) != value]
        if different:
            told = "; ".join(f"{key}: store {there.get(key)!r}, run {wanted.get(key)!r}" for key in different)
            raise StoreError(f"{self.uri} holds other negatives than this run needs ({told}); set another store")

    def manifest(self, *, missing_ok: bool = False) -> dict[str, Any] | None:
        """Returns what the store is for.

        Raises:
            StoreError: There is no store, or its manifest is damaged.
        """
        content = self._get(MANIFEST)
        if content is None:
            if missing_ok:
                return None
            raise StoreError(f"{self.uri} holds no negatives; make some by `ffdist negatives make`")
        found = _json(content)
        if not isinstance(found, dict):
            raise StoreError(f"{self._path(MANIFEST)} is damaged; remove the store and make it anew")
        return found

    def entries(self) -> Iterator[Entry]:
        """Yields what is known of every whole shard, in order."""
        from pyarrow.fs import FileSelector, FileType

        files = self._filesystem.get_file_info(FileSelector(self._root, recursive=True))
        paths = sorted(info.path for info in files if info.type == FileType.File)
        for path in paths:
            name = path[len(self._root) :].lstrip("/")
            if name.endswith(".json") and name != MANIFEST:
                yield self._entry(name)

    def read(self, epoch: int, number: int) -> Tensor | None:
        """Returns the negatives of a shard, checked; None where they have not been made.

        Raises:
            StoreError: The shard is missing, truncated or altered.
        """
        import pyarrow as pa

        name = _name(epoch, number)
        if self._get(f"{name}.json") is None:
            return None
        entry, content = self._entry(f"{name}.json"), self._get(f"{name}.arrow")
        path, way_out = self._path(f"{name}.arrow"), f"remove {self._path(name)}.json to have it made anew"
        if content is None:
            raise StoreError(f"{path} is missing; {way_out}")
        if len(content) != entry.num_bytes:
            raise StoreError(f"{path} is cut or grown (bytes: {len(content)}, written: {entry.num_bytes}); {way_out}")
        if hashlib.sha256(content).hexdigest() != entry.sha256 or (entry.epoch, entry.number) != (epoch, number):
            raise StoreError(f"{path} is not what was written there (its SHA-256 differs); {way_out}")
        with pa.ipc.open_file(pa.py_buffer(content)) as file:
            table = file.read_all()
        column = table.column("negatives").combine_chunks()
        width = json.loads(table.schema.metadata[b"shape"])
        negatives = torch.from_numpy(column.flatten().to_numpy().copy()).view(len(column), *width)
        return negatives if table.schema.metadata[b"holds"] == b"images" else negatives.long()

    def write(self, epoch: int, number: int, negatives: Tensor) -> None:
        """Adds the negatives of a shard: labels as a byte each, images as they are."""
        import pyarrow as pa

        holds = "images" if negatives.dtype == torch.uint8 else "labels"
        values = negatives.to(torch.uint8).contiguous()
        flat = pa.array(values.view(-1).numpy())
        column = pa.FixedSizeListArray.from_arrays(flat, values[0].numel())
        metadata = {"holds": holds, "shape": json.dumps(list(values.shape[1:]))}
        schema = pa.schema([pa.field("negatives", column.type)], metadata=metadata)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
            writer.write_batch(pa.record_batch([column], schema=schema))
        content = sink.getvalue().to_pybytes()
        digest = hashlib.sha256(content).hexdigest()
        entry = Entry(epoch, number, number * SHARD_SAMPLES, len(values), len(content), digest)
        name = _name(epoch, number)
        self._put(f"{name}.arrow", content)
        self._put(f"{name}.json", json.dumps(entry._asdict()).encode())  # last: now the shard exists

    def _entry(self, name: str) -> Entry:
        found = _json(self._get(name) or b"")
        try:
            return Entry(**found)
        except TypeError as error:
            raise StoreError(f"{self._path(name)} is damaged; remove it to have its shard made anew") from error

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        from pyarrow import ArrowException
        from pyarrow.fs import FileSystem, LocalFileSystem

        if "://" not in self.uri:
            return LocalFileSystem(), str(Path(self.uri).expanduser().resolve())
        try:
            filesystem, root = FileSystem.from_uri(self.uri)
        except (ArrowException, OSError) as error:
            raise StoreError(f"{self.uri} cannot be opened ({' '.join(str(error).split())[:200]})") from error
        return filesystem, root

    @property
    def _filesystem(self) -> Any:
        return self._opened[0]

    @property
    def _root(self) -> str:
        return self._opened[1]

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _get(self, name: str) -> bytes | None:
        try:
            with self._filesystem.open_input_stream(self._path(name)) as stream:
                content: bytes = stream.read()
            return content
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(f"{self._path(name)} cannot be read ({' '.join(str(error).split())[:200]})") from error

    def _put(self, name: str, content: bytes) -> None:
        path = self._path(name)
        part = f"{path}.{uuid.uuid4().hex[:8]}.part"  # another process may be writing the same
        try:
            self._filesystem.create_dir(os.path.dirname(path), recursive=True)  # noqa: PTH120, not always a local path
            with self._filesystem.open_output_stream(part) as stream:
                stream.write(content)
            if self._filesystem.type_name == "local":
                with open(part, "rb") as file:  # noqa: PTH123
                    os.fsync(file.fileno())
            self._filesystem.move(part, path)
        except OSError as error:
            raise StoreError(f"{path} cannot be written ({' '.join(str(error).split())[:200]})") from error


def _name(epoch: int, number: int) -> str:
    return f"epoch_{epoch:04d}/shard_{number:06d}"


def _json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return None
