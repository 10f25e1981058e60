"""Commits: one safetensors file per layer and for the rest of what a run keeps, and a manifest that makes them one.

    COMMITS/0003-000120/layer_1.safetensors ... readout.safetensors      what they learned; loading can run no code
                        negatives.safetensors                            labels drawn and still to be used
                        position.safetensors                             where the run stands
                        manifest.json

A commit is whole or invisible: one writer puts the states there beside the training, and the driver renames the
manifest into place when all that led to them was found good.
"""

import hashlib
import json
import re
from collections.abc import Collection
from importlib.metadata import version
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from ffdist.config import RunFailed
from ffdist.data.folder import DamagedFile, Folder
from ffdist.pipeline.schedule import Position, Snapshot
from ffdist.pipeline.source import Drawn
from ffdist.pipeline.stage import State

MANIFEST = "manifest.json"
SCHEMA = 2
POSITION = "position"
PARAMETERS = ("weight", "bias")
"""What a network predicts with; the rest is for training."""
WHOLE, BEGUN = re.compile(rf"(\d+)-(\d+)/{re.escape(MANIFEST)}$"), re.compile(r"(\d+)-(\d+)/")

CommitName = Annotated[str, StringConstraints(pattern=r"^\d+-\d+$")]
FileName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]+\.safetensors$")]  # and so never out of its folder


class CommitError(RunFailed):
    """A commit that cannot be written or read; the text says which, and why."""


class DamagedCommit(CommitError):
    """One that is not as it was written."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class FileFacts(_Strict):
    """What a file must be."""

    sha256: str
    num_bytes: int


class Manifest(_Strict):
    """What is known of a commit."""

    schema_version: int
    ffdist_version: str
    epoch: int
    minibatch: int
    """Of that epoch, the first that is still to be learned from; past its end while it is not evaluated."""
    step: int
    """Minibatches done."""
    validation_error: float | None
    """Of these very weights, in [0, 1]; None where they were not evaluated."""
    best_commit: CommitName | None
    """The commit that did best on validation so far."""
    best_error: float | None
    train_s: float
    """Time that it took so far."""
    mlflow_run_id: str
    dataset_sha256: str
    """Of the training samples."""
    test_dataset_sha256: str | None = None
    """Of the test samples; checkpoints of earlier versions lack it."""
    config: dict[str, Any]
    """The resolved configuration."""
    made_with: dict[str, str | int | dict[str, str | int]]
    """`algorithm`, and the hardware of each layer, the readout and each negative actor, on which the last bits depend;
    earlier versions recorded that of the driver, as single values."""
    files: dict[FileName, FileFacts]


def commit_name(position: Position) -> str:
    """Names a commit by where it was taken."""
    return f"{position.epoch:04d}-{position.minibatch:06d}"


class Written(NamedTuple):
    """What a writer did."""

    files: dict[str, FileFacts]
    not_finite: str | None
    """A tensor that holds infinities or NaNs, if there is one."""
    error: str = ""
    """Why the files could not be written; empty if they were."""


class CommitWriter:
    """Writes states as they come; the only part of a run that writes much.

    Args:
        folder: Of the run's commits.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder

    def write(self, snapshot: Snapshot, *parts: State | Drawn) -> Written:
        """Writes all files of a commit but its position and manifest.

        An error is part of the result: the driver decides whether the run goes on without this checkpoint.

        Args:
            snapshot: Where the states were taken.
            *parts: States of parts, and drawn labels that are still to be delivered.
        """
        name, state = commit_name(snapshot.position), dict[str, dict[str, Tensor]]()
        for part in parts:
            if isinstance(part, Drawn):
                state["negatives"] = part.added_to(state["negatives"])
            else:
                state |= part
        files, failure = dict[str, FileFacts](), ""
        try:
            files = {f"{key}.safetensors": self.put(name, key, tensors) for key, tensors in state.items()}
        except CommitError as error:
            failure = str(error)
        not_finite = next(
            (
                f"{key}/{tensor_name}"
                for key, tensors in state.items()
                for tensor_name, tensor in tensors.items()
                if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all()
            ),
            None,
        )
        return Written(files, not_finite, failure)

    def put(self, name: str, key: str, tensors: dict[str, Tensor]) -> FileFacts:
        """Writes one file of a commit, `KEY.safetensors`."""
        with self._folder.writing(f"{name}/{key}.safetensors") as path:
            try:
                save_file({tensor_name: tensor.contiguous() for tensor_name, tensor in tensors.items()}, path)
            except SafetensorError as error:  # its word for what the disk said
                raise OSError(str(error)) from error
            with path.open("rb") as file:  # of which the system still has all in memory
                return FileFacts(sha256=hashlib.file_digest(file, "sha256").hexdigest(), num_bytes=file.tell())


class Commits:
    """The commits of a run.

    Args:
        folder: Where they are.
    """

    def __init__(self, folder: Folder) -> None:
        self.folder = folder

    def names(self) -> list[str]:
        """Returns the names of all whole commits, oldest first."""
        return _sorted(WHOLE, self.folder.names())

    def path(self, name: str) -> str:
        """Returns where a commit lies."""
        return self.folder.path(name)

    def finish(self, name: str, written: Written, position: dict[str, Tensor], **facts: Any) -> Manifest:
        """Makes a commit of what was written.

        Args:
            name: As `commit_name` returns it.
            written: By the writer.
            position: Where the run stands.
            **facts: What the manifest tells beside.

        Raises:
            CommitError: It cannot be written.
        """
        facts_of_position = CommitWriter(self.folder).put(name, POSITION, position)
        manifest = Manifest(
            schema_version=SCHEMA,
            ffdist_version=version("ffdist"),
            files={**written.files, f"{POSITION}.safetensors": facts_of_position},
            **facts,
        )
        # Last: without its manifest a commit does not exist, whatever lies in its folder.
        found = manifest.model_dump(mode="json")
        self.folder.put(f"{name}/{MANIFEST}", json.dumps(found | {"sha256": digest(found)}, indent=2).encode())
        return manifest

    def read(self, name: str, only: Collection[str] | None = None) -> tuple[Manifest, State]:
        """Returns a commit, every file of it checked.

        Args:
            name: As `commit_name` returns it.
            only: Names of the tensors to keep in memory, such as PARAMETERS; all by default.

        Raises:
            CommitError: It is damaged, or of another version.
        """
        manifest = self.read_manifest(name)
        state = State()
        for file in manifest.files:
            tensors = self._read(name, file, manifest)
            kept = {key: tensor for key, tensor in tensors.items() if only is None or key in only}
            state[file.removesuffix(".safetensors")] = kept
        return manifest, state

    def read_manifest(self, name: str) -> Manifest:
        """Returns what is known of a commit.

        Raises:
            CommitError: It is damaged, or of another version.
        """
        path = self.folder.path(f"{name}/{MANIFEST}")
        try:
            found = json.loads(self.folder.get(f"{name}/{MANIFEST}") or b"")
            schema = found.get("schema_version", 1)
            if schema != SCHEMA:
                raise CommitError(
                    f"{path} has schema {schema}, and this ffdist reads {SCHEMA}; use the one that wrote it"
                )
            written = found.pop("sha256", "")
            manifest = Manifest.model_validate(found)
            if written != digest(found) or name != commit_name(Position(manifest.epoch, manifest.minibatch)):
                raise DamagedCommit(f"{path} is not what was written there (its SHA-256 differs)")
            return manifest
        except (ValueError, AttributeError, RecursionError, ValidationError) as error:
            raise DamagedCommit(f"{path} is damaged ({' '.join(str(error).split())[:200]})") from error

    def prune(self, newest: str, *, keep: int, spare: str | None) -> None:
        """Removes what is older than a commit that was just made, but the `keep` newest whole ones and `spare`.

        What lies beyond it stays: the run has not come there yet, or a damaged commit was passed over.
        """
        folder = self.folder.without_retries()  # the next checkpoint prunes again
        found = folder.names()
        whole, begun = _sorted(WHOLE, found), _sorted(BEGUN, found)
        if newest not in whole:
            raise CommitError(f"{self.path(newest)} is gone")
        kept = whole[: whole.index(newest) + 1][-keep:]
        for name in begun[: begun.index(newest)]:
            if name not in (*kept, spare):
                if name in whole:
                    folder.remove(f"{name}/{MANIFEST}")
                folder.remove(name)

    def _read(self, name: str, file: str, manifest: Manifest) -> dict[str, Tensor]:
        try:
            content = self.folder.get_checked(f"{name}/{file}", **manifest.files[file].model_dump())
            tensors: dict[str, Tensor] = load(content)
        except DamagedFile as error:
            raise DamagedCommit(str(error)) from error
        except (SafetensorError, ValueError, KeyError) as error:
            raise DamagedCommit(f"{self.folder.path(f'{name}/{file}')} is no file of tensors ({error})") from error
        return tensors


def _sorted(pattern: re.Pattern[str], files: list[str]) -> list[str]:
    """Returns the names of the commits whose files a pattern matches, oldest first."""
    found = {Position(*map(int, match.groups())) for name in files if (match := pattern.match(name))}
    return [commit_name(place) for place in sorted(found)]


def digest(found: dict[str, Any]) -> str:
    """Digests what a manifest holds beside its digest."""
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def weights_sha256(state: State) -> str:
    """Digests what a network computes with: weights and biases, not the smoothed gradients nor the running means.

    The bytes are, for `layer_1`, `layer_2`, ... and `readout`, for `bias` and then `weight`: the line
    `layer_1/bias float32 [1000]` with a line feed, then the values, little-endian float32, in row order.
    """
    found = hashlib.sha256()
    parts = [name for name in state if name.startswith("layer_") or name == "readout"]
    for part in sorted(parts, key=lambda name: (name == "readout", len(name), name)):
        for name in sorted(PARAMETERS):
            tensor = state[part][name].to("cpu", torch.float32).contiguous()
            found.update(f"{part}/{name} float32 {list(tensor.shape)}\n".encode())
            found.update(tensor.numpy().astype("<f4", copy=False).ravel().data)
    return found.hexdigest()
