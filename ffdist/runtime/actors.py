"""The plain parts made remote, and the way in which tensors travel between them."""

import os
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from ffdist.checkpoint import CommitWriter
from ffdist.data.folder import Folder
from ffdist.pipeline.hardware import Hardware, read_hardware
from ffdist.pipeline.runner import configure_torch, keep_memory
from ffdist.pipeline.source import NegativeSource
from ffdist.pipeline.stage import ReadoutStage, Stage


def send_tensors_as_arrays() -> None:
    """Has this process send tensors as numpy arrays, which arrive without a copy, and so must never be written to."""
    ray.util.register_serializer(torch.Tensor, serializer=_to_array, deserializer=_from_array)


def _to_array(tensor: torch.Tensor) -> tuple[np.ndarray[Any, Any], torch.dtype]:
    is_bfloat16 = tensor.dtype == torch.bfloat16  # which numpy lacks
    return (tensor.view(torch.int16) if is_bfloat16 else tensor).numpy(), tensor.dtype


def _from_array(sent: tuple[np.ndarray[Any, Any], torch.dtype]) -> torch.Tensor:
    array, dtype = sent
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the array is read-only is known here
        return torch.from_numpy(array).view(dtype)


class _Actor:
    """Prepares the process before the part is made."""

    def __init__(self, threads: int, path: list[str], folder: Path, *args: Any) -> None:
        sys.path += [folder for folder in path if folder not in sys.path]  # what the driver imports
        with suppress(OSError):  # where another node has no such folder
            os.chdir(folder)  # where a user's own negatives may be
        configure_torch(threads)  # Ray's launcher leaves one, whatever was asked for
        with suppress(OSError):  # where a sandbox forbids it
            # Longer turns on a processor that is shared: each finds the caches as the others left them.
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        keep_memory()
        send_tensors_as_arrays()
        super().__init__(*args)

    def read_hardware(self, device: str) -> Hardware:
        """Returns what the last bits of this process's results depend on."""
        return read_hardware(device)


class StageActor(_Actor, Stage):
    """A stage in a process of its own."""


class ReadoutActor(_Actor, ReadoutStage):
    """The readout in a process of its own."""


class NegativeActor(_Actor, NegativeSource):
    """A source of negatives in a process of its own."""


class WriterActor(_Actor, CommitWriter):
    """The writer of commits in a process of its own."""


ACTORS = {Stage: StageActor, ReadoutStage: ReadoutActor, NegativeSource: NegativeActor}

NAMES = {Stage: "stage", ReadoutStage: "the readout", NegativeSource: "negative actor"}


def _import_folders() -> tuple[list[str], Path]:
    """Returns this process's import path and its working directory. Both may be relative in another process."""
    return [str(Path(folder).absolute()) for folder in sys.path], Path.cwd()


class ActorMaker:
    """Makes actors in the bundles of a placement group, one after the other.

    They obey one driver in the order of its calls: synchronous, never restarted, no call ever retried, because a
    silent retry would repeat an update or start from fresh weights.

    Args:
        group: Holds one bundle per actor, in the order in which they are made.
        threads: torch's threads in every actor, as in the serial runner: they are part of the order of sums.
    """

    def __init__(self, group: PlacementGroup, threads: int) -> None:
        self._group, self._threads = group, threads
        self.made: list[Any] = []
        self.names: dict[str, str] = {}
        """What errors call an actor, by its id."""

    def __call__(self, part: type, *args: Any) -> Any:
        """Makes an actor that holds an object of class `part`; arguments may be references."""
        bundle = self._group.bundle_specs[len(self.made)]
        handle = (
            ray.remote(ACTORS[part])
            .options(
                num_cpus=bundle.get("CPU", 0),
                num_gpus=bundle.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, len(self.made)),
                max_restarts=0,
                max_task_retries=0,
            )
            .remote(self._threads, *_import_folders(), *args)
        )
        number = 1 + sum(name.startswith(NAMES[part]) for name in self.names.values())
        return self._note(handle, NAMES[part] if part is ReadoutStage else f"{NAMES[part]} {number}")

    def make_writer(self, commits: Folder) -> Any:
        """Makes the writer of commits on the driver's own node: a folder on each node's own disk would be no commit."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        handle = (
            ray.remote(WriterActor)
            .options(num_cpus=0, scheduling_strategy=here, max_restarts=0, max_task_retries=0)
            .remote(self._threads, *_import_folders(), commits)
        )
        return self._note(handle, "the writer of commits")

    def _note(self, handle: Any, name: str) -> Any:
        self.made.append(handle)
        self.names[handle._actor_id.hex()] = name
        return handle
