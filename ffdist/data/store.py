"""Negatives on disk: Arrow IPC files that outlive the run.

    STORE/manifest.json                          what the store is for
    STORE/epoch_0003/shard_000007.arrow          the negatives of one shard
    STORE/epoch_0003/shard_000007.json           its samples, size and SHA-256, and which store it belongs to

A shard is written first, its entry after it. Without its entry a shard does not exist.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ffdist.data.folder import DamagedFile, Folder
from ffdist.data.order import SHARD_SAMPLES
from ffdist.ff.negatives import NegativesError

SCHEMA = 1
MANIFEST = "manifest.json"


class Entry(NamedTuple):
    """What is known of a shard."""

    epoch: int
    number: int
    first: int
    """Its first sample, counted in the epoch's order."""
    num_samples: int
    num_bytes: int
    sha256: str
    store_sha256: str
    """Digest of what the store is for."""


@dataclass(frozen=True)
class Store:
    """A folder of negatives.

    Args:
        uri: A local path, or a URI of `pyarrow.fs`.
        facts: What decides every negative in it, as JSON.
        config: The configuration that made it, without secrets, so that the dataset can be found again.
    """

    uri: str
    facts: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def find(cls, uri: str) -> "Store":
        """Returns a store as its own manifest tells.

        Raises:
            NegativesError: There is none, or its manifest is damaged.
        """
        manifest = cls(uri)._manifest()
        if manifest is None:
            raise NegativesError(f"{uri} holds no negatives; make some by `ffdist negatives make`")
        return cls(uri, manifest["facts"], manifest["config"])

    def check(self, shards: Iterable[tuple[int, int]] | None = None) -> None:
        """Checks that the store is for the negatives that are needed, and that what is missing can be added.

        Args:
            shards: All that will be read, by epoch and number. If the store has them, it may be read-only.

        Raises:
            NegativesError: It cannot be read or written, or is for other negatives.
        """
        manifest, needed = self._manifest(), self._needed
        there = manifest["facts"] if manifest else needed
        different = [key for key in needed if there.get(key) != needed[key]]
        if different:
            told = "; ".join(f"{key}: store {there.get(key)!r}, run {needed[key]!r}" for key in different)
            raise NegativesError(f"{self.uri} holds other negatives than this run needs ({told}); set another store")
        names = set(self._folder.names())
        if shards is None or not all(f"{_name(*shard)}.json" in names for shard in shards):
            self._folder.check_writable()
            self._folder.remove_stale_parts()

    def entries(self) -> Iterator[Entry]:
        """Yields what is known of every whole shard, in order.

        Raises:
            NegativesError: One of them is damaged.
        """
        for name in self._folder.names():
            if name.endswith(".json") and name != MANIFEST and (entry := self._entry(name)):
                yield entry

    def read(self, epoch: int, number: int) -> Tensor | None:
        """Returns the negatives of a shard, checked; None where they have not been made.

        Raises:
            NegativesError: The shard is missing, truncated, altered or foreign.
        """
        name = _name(epoch, number)
        entry = self._entry(f"{name}.json")
        if entry is None:
            return None
        path = self._folder.path(f"{name}.arrow")
        way_out = f"remove {self._folder.path(name)}.json to have it made anew"
        try:
            content = self._folder.get_checked(f"{name}.arrow", num_bytes=entry.num_bytes, sha256=entry.sha256)
            if (entry.epoch, entry.number, entry.store_sha256) != (epoch, number, self._identity):
                raise DamagedFile(f"{path} belongs to another place or store, as its entry says")
            return _decode(content)
        except DamagedFile as error:
            raise NegativesError(f"{error}; {way_out}") from error
        except (ValueError, KeyError, TypeError) as error:  # pyarrow's own are among them
            raise NegativesError(f"{path} holds no negatives as they are written here; {way_out}") from error

    def write(self, epoch: int, number: int, negatives: Tensor) -> None:
        """Adds the negatives of a shard: labels as a byte each, images as they are.

        Raises:
            NegativesError: It cannot be written.
        """
        if self._folder.get(MANIFEST) is None:
            manifest = {"facts": self._needed, "config": self.config}
            self._folder.put(MANIFEST, json.dumps(manifest, indent=2).encode())
        content = _encode(negatives)
        digest = hashlib.sha256(content).hexdigest()
        first = number * SHARD_SAMPLES
        entry = Entry(epoch, number, first, len(negatives), len(content), digest, self._identity)
        name = _name(epoch, number)
        self._folder.put(f"{name}.arrow", content)
        self._folder.put(f"{name}.json", json.dumps(entry._asdict()).encode())  # last: now the shard exists

    @property
    def _needed(self) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads(json.dumps({"schema": SCHEMA, "shard_samples": SHARD_SAMPLES, **self.facts}))
        return facts

    @cached_property
    def _folder(self) -> Folder:
        return Folder(self.uri, NegativesError)

    @cached_property
    def _identity(self) -> str:
        return hashlib.sha256(json.dumps(self._needed, sort_keys=True).encode()).hexdigest()

    def _manifest(self) -> dict[str, Any] | None:
        content = self._folder.get(MANIFEST)
        if content is None:
            return None
        found = _json(content)
        if not (isinstance(found, dict) and all(isinstance(found.get(key), dict) for key in ("facts", "config"))):
            raise NegativesError(f"{self._folder.path(MANIFEST)} is damaged; remove the store and make it anew")
        return found

    def _entry(self, name: str) -> Entry | None:
        content = self._folder.get(name)
        if content is None:
            return None
        found = _json(content)
        kinds = Entry.__annotations__
        if not (
            isinstance(found, dict)
            and found.keys() == kinds.keys()
            and all(isinstance(found[key], kind) for key, kind in kinds.items())
        ):
            raise NegativesError(f"{self._folder.path(name)} is damaged; remove it to have its shard made anew")
        return Entry(**found)


def _encode(negatives: Tensor) -> bytes:
    import pyarrow as pa

    holds = "images" if negatives.dtype == torch.uint8 else "labels"
    values = negatives.to(torch.uint8).contiguous()
    column = pa.FixedSizeListArray.from_arrays(pa.array(values.view(-1).numpy()), values[0].numel())
    metadata = {"holds": holds, "shape": json.dumps(list(values.shape[1:]))}
    schema = pa.schema([pa.field("negatives", column.type)], metadata=metadata)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_batch(pa.record_batch([column], schema=schema))
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _decode(content: bytes) -> Tensor:
    import pyarrow as pa

    with pa.ipc.open_file(pa.py_buffer(content)) as file:
        table = file.read_all()
    column, metadata = table.column("negatives").combine_chunks(), table.schema.metadata
    values = torch.from_numpy(column.flatten().to_numpy().copy()).view(len(column), *json.loads(metadata[b"shape"]))
    return values if metadata[b"holds"] == b"images" else values.long()


def _name(epoch: int, number: int) -> str:
    return f"epoch_{epoch:04d}/shard_{number:06d}"


def _json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None
