"""Checkpoints: a safetensors file for each layer and each other part of a run's state, and a manifest.

    CHECKPOINTS/0003-000120/layer_1.safetensors ... readout.safetensors      parameters and optimizer state
                            negatives.safetensors                            labels that are drawn, but not used yet
                            position.safetensors                             position in the schedule
                            manifest.json

Loading a checkpoint cannot run code. A checkpoint is complete or invisible: a writer saves the states in parallel with
training, and the driver renames the manifest into place once all minibatches before it have passed the finite check.
"""

import hashlib
import json
import re
from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from ffdist.errors import RunFailed
from ffdist.ff.optimizers import is_for_inference
from ffdist.pipeline.schedule import Position, Snapshot
from ffdist.pipeline.source import Drawn
from ffdist.pipeline.stage import State
from ffdist.storage.folder import DamagedFile, Folder

MANIFEST = "manifest.json"
SCHEMA = 4
POSITION = "position"
MANIFEST_PATTERN = re.compile(rf"(\d+)-(\d+)/{re.escape(MANIFEST)}$")
FILE_PATTERN = re.compile(r"(\d+)-(\d+)/")

CheckpointName = Annotated[str, StringConstraints(pattern=r"^\d+-\d+$")]
FileName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]+\.safetensors$")]  # cannot name another folder


class CheckpointError(RunFailed):
    """A checkpoint cannot be written or read; the message names it and the cause."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint differs from what was written."""


class _StrictModel(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class FileInfo(_StrictModel):
    """Digest and size of a file, which are checked when it is read."""

    sha256: str
    num_bytes: int


class StopState(_StrictModel):
    """State of early stopping."""

    lowest_error: float | None = None
    """Lowest validation error so far."""
    validations_since: int = 0
    """Number of validations since that one."""
    request: str | None = None
    """Why a callback requested that the run ends at the next validation."""
    reason: str | None = None
    """Why the run ends at this checkpoint."""


class Manifest(_StrictModel):
    """Description of a checkpoint."""

    schema_version: int
    ffdist_version: str
    epoch: int
    minibatch: int
    """First minibatch of the epoch that is not done; past the end of the epoch until the epoch is evaluated."""
    step: int
    """Number of minibatches done."""
    validation_error: float | None
    """Validation error of these weights, in [0, 1]; None if they were not evaluated."""
    best_checkpoint: CheckpointName | None
    """Best checkpoint on validation so far."""
    best_error: float | None
    stop: StopState = StopState()
    """State of early stopping; missing in checkpoints of earlier versions."""
    train_s: float
    """Training time so far."""
    mlflow_run_id: str
    dataset_sha256: str
    """Digest of the training samples."""
    test_dataset_sha256: str
    """Digest of the test samples."""
    validation_dataset_sha256: str | None = None
    """Digest of the validation samples; None if there are none, and in manifests of earlier versions."""
    config: dict[str, Any]
    """Resolved configuration."""
    provenance: dict[str, str | int | dict[str, str | int]]
    """`algorithm`, `runner`, the names of `callbacks` that were given in Python, and the hardware of each layer, the
    readout and each negative actor, which affects the last bits."""
    files: dict[FileName, FileInfo]


def checkpoint_name(position: Position) -> str:
    """Returns the name of the checkpoint at a position."""
    return f"{position.epoch:04d}-{position.minibatch:06d}"


class WriteResult(NamedTuple):
    """Result of writing the files of a checkpoint."""

    files: dict[str, FileInfo]
    not_finite: str | None
    """Name of a tensor that contains Inf or NaN, if there is one."""
    error: str = ""
    """Why the files could not be written; empty if they were."""


class CheckpointWriter:
    """Writes the files of checkpoints.

    Args:
        folder: Folder of the run's checkpoints.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder

    def write(self, snapshot: Snapshot, *states: State | Drawn) -> WriteResult:
        """Writes all files of a checkpoint except its position and manifest.

        An error is part of the result, because the driver decides whether the run continues without this checkpoint.

        Args:
            snapshot: Snapshot that the states belong to.
            *states: States of the actors, and drawn labels that are not used yet.
        """
        name, state = checkpoint_name(snapshot.position), dict[str, dict[str, Tensor]]()
        for each in states:
            if isinstance(each, Drawn):
                state["negatives"] = each.added_to(state["negatives"])
            else:
                state |= each
        files, failure = dict[str, FileInfo](), ""
        try:
            files = {f"{key}.safetensors": self.put(name, key, tensors) for key, tensors in state.items()}
        except CheckpointError as error:
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
        return WriteResult(files, not_finite, failure)

    def put(self, name: str, key: str, tensors: dict[str, Tensor]) -> FileInfo:
        """Writes one file of a checkpoint, `KEY.safetensors`."""
        with self._folder.atomic_write(f"{name}/{key}.safetensors") as path:
            try:
                save_file({tensor_name: tensor.contiguous() for tensor_name, tensor in tensors.items()}, path)
            except SafetensorError as error:  # safetensors wraps errors of the disk
                raise OSError(str(error)) from error
            with path.open("rb") as file:  # still in the page cache
                return FileInfo(sha256=hashlib.file_digest(file, "sha256").hexdigest(), num_bytes=file.tell())


class Checkpoints:
    """The checkpoints of a run.

    Args:
        folder: Folder of the checkpoints.
    """

    def __init__(self, folder: Folder) -> None:
        self.folder = folder

    def names(self) -> list[str]:
        """Returns the names of all complete checkpoints, oldest first."""
        return _checkpoint_names(MANIFEST_PATTERN, self.folder.names())

    def path(self, name: str) -> str:
        """Returns the path of a checkpoint."""
        return self.folder.path(name)

    def finish(self, name: str, written: WriteResult, position: dict[str, Tensor], **facts: Any) -> Manifest:
        """Completes a checkpoint: writes its position and then its manifest.

        Args:
            name: As `checkpoint_name` returns it.
            written: Result of the writer.
            position: Position of the run in the schedule, and metrics that are not averaged yet.
            **facts: Further fields of the manifest.

        Raises:
            CheckpointError: The checkpoint cannot be written.
        """
        position_info = CheckpointWriter(self.folder).put(name, POSITION, position)
        manifest = Manifest(
            schema_version=SCHEMA,
            ffdist_version=version("ffdist"),
            files={**written.files, f"{POSITION}.safetensors": position_info},
            **facts,
        )
        # Last, because the manifest makes the checkpoint visible.
        content = manifest.model_dump(mode="json")
        self.folder.put(f"{name}/{MANIFEST}", json.dumps(content | {"sha256": digest(content)}, indent=2).encode())
        return manifest

    def read(self, name: str, select: Callable[[str], bool] | None = None) -> tuple[Manifest, State]:
        """Reads a checkpoint, and checks all its files.

        Args:
            name: As `checkpoint_name` returns it.
            select: Selects the tensors to return by their names, such as `is_for_inference`; all by default.

        Raises:
            CheckpointError: The checkpoint is damaged, or of another version.
        """
        manifest, state = self.read_manifest(name), State()
        for file, info in manifest.files.items():
            try:
                tensors = load(self.folder.get_checked(f"{name}/{file}", **info.model_dump()))
            except DamagedFile as error:
                raise DamagedCheckpoint(str(error)) from error
            except (SafetensorError, ValueError, KeyError) as error:
                path = self.folder.path(f"{name}/{file}")
                raise DamagedCheckpoint(f"{path} is not a safetensors file ({error})") from error
            tensors = {key: tensor for key, tensor in tensors.items() if select is None or select(key)}
            state[file.removesuffix(".safetensors")] = tensors
        return manifest, state

    def read_manifest(self, name: str) -> Manifest:
        """Reads the manifest of a checkpoint.

        Raises:
            CheckpointError: The manifest is damaged, or of another version.
        """
        path = self.folder.path(f"{name}/{MANIFEST}")
        try:
            content = json.loads(self.folder.get(f"{name}/{MANIFEST}") or b"")
            schema = content.get("schema_version", 1)
            if schema != SCHEMA:
                raise CheckpointError(
                    f"{path} has schema {schema}, and this ffdist reads {SCHEMA}; use the version that wrote it"
                )
            sha256 = content.pop("sha256", "")
            manifest = Manifest.model_validate(content)
            if sha256 != digest(content) or name != checkpoint_name(Position(manifest.epoch, manifest.minibatch)):
                raise DamagedCheckpoint(f"{path} is corrupted (its SHA-256 differs)")
            return manifest
        except (ValueError, AttributeError, RecursionError, ValidationError) as error:
            raise DamagedCheckpoint(f"{path} is damaged ({' '.join(str(error).split())[:200]})") from error

    def prune(self, newest: str, *, keep: int, spare: str | None) -> None:
        """Removes checkpoints before `newest`, complete or not, except the `keep` newest complete ones and `spare`.

        Later checkpoints stay: the run has not reached them yet, or has skipped a damaged one.
        """
        folder = self.folder.without_retries()  # the next checkpoint prunes again
        files = folder.names()
        complete, names = _checkpoint_names(MANIFEST_PATTERN, files), _checkpoint_names(FILE_PATTERN, files)
        if newest not in complete:
            raise CheckpointError(f"{self.path(newest)} is gone")
        retained = {*complete[: complete.index(newest) + 1][-keep:], spare}
        for name in names[: names.index(newest)]:
            if name not in retained:
                if name in complete:
                    folder.remove(f"{name}/{MANIFEST}")
                folder.remove(name)


def _checkpoint_names(pattern: re.Pattern[str], files: list[str]) -> list[str]:
    """Returns the names of the checkpoints with a file that matches a pattern, oldest first."""
    positions = {Position(*map(int, match.groups())) for name in files if (match := pattern.match(name))}
    return [checkpoint_name(position) for position in sorted(positions)]


def digest(manifest: dict[str, Any]) -> str:
    """Returns the SHA-256 of a manifest without its digest."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def weights_sha256(state: State) -> str:
    """Returns the SHA-256 of the tensors that inference needs.

    The bytes are, for `layer_1`, `layer_2`, ... and `readout` (or `readout_2`, ..., if layers have their own), for each
    tensor in the order of the names, such as `bias` and `weight`: the line `layer_1/bias float32 [1000]` with a line
    feed, then the values, little-endian and in row-major order. Floating-point numbers are converted to float32.
    """
    hasher = hashlib.sha256()
    layers = [key for key in state if key.startswith(("layer_", "readout"))]
    for layer in sorted(layers, key=lambda key: (key.startswith("readout"), len(key), key)):
        for name in sorted(filter(is_for_inference, state[layer])):
            tensor = state[layer][name].cpu().contiguous()
            values = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
            hasher.update(f"{layer}/{name} {values.dtype} {list(tensor.shape)}\n".encode())
            hasher.update(values.astype(values.dtype.newbyteorder("<"), copy=False).ravel().data)
    return hasher.hexdigest()
