"""Persistent store of precomputed negatives, as Arrow IPC files.

    STORE/manifest.json                          settings that determine the negatives
    STORE/epoch_0003/shard_000007.arrow          negatives of one shard
    STORE/epoch_0003/shard_000007.json           entry of the shard: samples, size, SHA-256, digest of the settings

The entry is written after its shard. A shard without an entry counts as missing.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ffdist.data.order import SHARD_SAMPLES
from ffdist.ff.negatives import NegativesError
from ffdist.storage.folder import DamagedFile, Folder

SCHEMA = 1
MANIFEST = "manifest.json"


class Entry(NamedTuple):
    """Metadata of a shard."""

    epoch: int
    number: int
    first: int
    """Position of its first sample in the epoch's order."""
    num_samples: int
    num_bytes: int
    sha256: str
    store_sha256: str
    """Digest of the settings that determine the store's negatives."""


@dataclass(frozen=True)
class Store:
    """A folder of negatives.

    Args:
        uri: Local path, or URI of `pyarrow.fs`.
        facts: Settings that determine all negatives in the store, as JSON data.
        config: Configuration of the run that created the store, without secrets. It identifies the dataset.
    """

    uri: str
    facts: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def find(cls, uri: str) -> "Store":
        """Opens an existing store with the settings in its manifest.

        Raises:
            NegativesError: The store does not exist, or its manifest is damaged.
        """
        manifest = cls(uri)._read_manifest()
        if manifest is None:
            raise NegativesError(f"{uri} holds no negatives; create them with `ffdist negatives make`")
        return cls(uri, manifest["facts"], manifest["config"])

    def check(self, shards: Iterable[tuple[int, int]] | None = None) -> None:
        """Checks that the store has the settings of this run, and that missing shards can be added.

        Args:
            shards: All shards that will be read, as (epoch, number). If the store has them, it may be read-only.

        Raises:
            NegativesError: The store cannot be read or written, or has other settings.
        """
        manifest, expected = self._read_manifest(), self._settings
        stored = manifest["facts"] if manifest else expected
        different = [key for key in expected if stored.get(key) != expected[key]]
        if different:
            changes = "; ".join(f"{key}: store {stored.get(key)!r}, run {expected[key]!r}" for key in different)
            raise NegativesError(f"{self.uri} holds other negatives than this run needs ({changes}); set another store")
        names = set(self._folder.names())
        if shards is None or not all(f"{_shard_name(*shard)}.json" in names for shard in shards):
            self._folder.check_writable()
            self._folder.remove_stale_parts()

    def entries(self) -> Iterator[Entry]:
        """Yields the entries of all complete shards, in order.

        Raises:
            NegativesError: An entry is damaged.
        """
        for name in self._folder.names():
            if name.endswith(".json") and name != MANIFEST and (entry := self._read_entry(name)):
                yield entry

    def read(self, epoch: int, number: int) -> Tensor | None:
        """Returns the verified negatives of a shard, or None if the store does not have it.

        Raises:
            NegativesError: The file of the shard is missing, truncated, modified or of another store.
        """
        name = _shard_name(epoch, number)
        entry = self._read_entry(f"{name}.json")
        if entry is None:
            return None
        path = self._folder.path(f"{name}.arrow")
        hint = f"remove {self._folder.path(name)}.json to regenerate it"
        try:
            content = self._folder.get_checked(f"{name}.arrow", num_bytes=entry.num_bytes, sha256=entry.sha256)
            if (entry.epoch, entry.number, entry.store_sha256) != (epoch, number, self._settings_sha256):
                raise DamagedFile(f"{path} belongs to another shard or store according to its entry")
            return _decode(content)
        except DamagedFile as error:
            raise NegativesError(f"{error}; {hint}") from error
        except (ValueError, KeyError, TypeError) as error:  # pyarrow's errors are subclasses
            raise NegativesError(f"{path} holds no negatives in a known format; {hint}") from error

    def write(self, epoch: int, number: int, negatives: Tensor) -> None:
        """Writes the negatives of a shard: labels `[n]` as one byte each, images `[n, D]` unchanged.

        Raises:
            NegativesError: The shard cannot be written.
        """
        if self._folder.get(MANIFEST) is None:
            manifest = {"facts": self._settings, "config": self.config}
            self._folder.put(MANIFEST, json.dumps(manifest, indent=2).encode())
        content = _encode(negatives)
        digest = hashlib.sha256(content).hexdigest()
        first = number * SHARD_SAMPLES
        entry = Entry(epoch, number, first, len(negatives), len(content), digest, self._settings_sha256)
        name = _shard_name(epoch, number)
        self._folder.put(f"{name}.arrow", content)
        self._folder.put(f"{name}.json", json.dumps(entry._asdict()).encode())  # last: makes the shard visible

    @property
    def _settings(self) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads(json.dumps({"schema": SCHEMA, "shard_samples": SHARD_SAMPLES, **self.facts}))
        return facts

    @cached_property
    def _folder(self) -> Folder:
        return Folder(self.uri, NegativesError)

    @cached_property
    def _settings_sha256(self) -> str:
        return hashlib.sha256(json.dumps(self._settings, sort_keys=True).encode()).hexdigest()

    def _read_manifest(self) -> dict[str, Any] | None:
        content = self._folder.get(MANIFEST)
        if content is None:
            return None
        manifest = _parse_json(content)
        if not (isinstance(manifest, dict) and all(isinstance(manifest.get(key), dict) for key in ("facts", "config"))):
            raise NegativesError(f"{self._folder.path(MANIFEST)} is damaged; remove the store and create it again")
        return manifest

    def _read_entry(self, name: str) -> Entry | None:
        content = self._folder.get(name)
        if content is None:
            return None
        entry = _parse_json(content)
        types = Entry.__annotations__
        if not (
            isinstance(entry, dict)
            and entry.keys() == types.keys()
            and all(isinstance(entry[key], type_) for key, type_ in types.items())
        ):
            raise NegativesError(f"{self._folder.path(name)} is damaged; remove it to regenerate the shard")
        return Entry(**entry)


def _encode(negatives: Tensor) -> bytes:
    import pyarrow as pa

    kind = "labels" if negatives.dtype == torch.int64 else "samples"
    values = (negatives.to(torch.uint8) if kind == "labels" else negatives).contiguous()
    column = pa.FixedSizeListArray.from_arrays(pa.array(values.view(-1).numpy()), values[0].numel())
    metadata = {"holds": kind, "shape": json.dumps(list(values.shape[1:]))}
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
    return values.long() if metadata[b"holds"] == b"labels" else values


def _shard_name(epoch: int, number: int) -> str:
    return f"epoch_{epoch:04d}/shard_{number:06d}"


def _parse_json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None
