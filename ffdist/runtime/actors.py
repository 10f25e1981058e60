"""Ray actors of the pipeline's classes, and the serialization of tensors between them."""

import os
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from ffdist.checkpoint.checkpoints import CheckpointWriter
from ffdist.pipeline.hardware import Hardware, read_hardware
from ffdist.pipeline.runner import configure_torch, keep_memory
from ffdist.pipeline.source import NegativeSource
from ffdist.pipeline.stage import ReadoutStage, Stage
from ffdist.runtime.imports import import_settings, prepare_imports
from ffdist.storage.folder import Folder


def send_tensors_as_arrays() -> None:
    """Makes this process serialize tensors as numpy arrays. Received tensors are not copied: never write to them."""
    ray.util.register_serializer(torch.Tensor, serializer=_to_array, deserializer=_from_array)


def _to_array(tensor: torch.Tensor) -> tuple[np.ndarray[Any, Any], torch.dtype]:
    is_bfloat16 = tensor.dtype == torch.bfloat16  # not supported by numpy
    return (tensor.view(torch.int16) if is_bfloat16 else tensor).numpy(), tensor.dtype


def _from_array(message: tuple[np.ndarray[Any, Any], torch.dtype]) -> torch.Tensor:
    array, dtype = message
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the read-only array
        return torch.from_numpy(array).view(dtype)


class _Actor:
    """Mixin that prepares the actor's process before the actor is constructed."""

    def __init__(self, num_threads: int, import_path: list[str], working_folder: Path, *args: Any) -> None:
        prepare_imports(import_path, working_folder)
        configure_torch(num_threads)  # Ray's launcher sets one thread, regardless of the request
        with suppress(OSError):  # a sandbox may forbid it
            # Longer time slices on a shared CPU, because each switch finds the caches filled by other processes.
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        keep_memory()
        send_tensors_as_arrays()
        super().__init__(*args)

    def read_hardware(self, device: str) -> Hardware:
        """Returns the hardware and software that determine the last bits of this process's results."""
        return read_hardware(device)


class StageActor(_Actor, Stage):
    """A stage in its own process."""


class ReadoutActor(_Actor, ReadoutStage):
    """The readout in its own process."""


class NegativeActor(_Actor, NegativeSource):
    """A source of negatives in its own process."""


class WriterActor(_Actor, CheckpointWriter):
    """The checkpoint writer in its own process."""


ACTOR_CLASSES = {Stage: StageActor, ReadoutStage: ReadoutActor, NegativeSource: NegativeActor}

ACTOR_NAMES = {Stage: "stage", ReadoutStage: "the readout", NegativeSource: "negative actor"}


class ActorFactory:
    """Creates actors in the bundles of a placement group, in order.

    The actors are synchronous and execute the driver's calls in order. Ray never restarts an actor or retries a call,
    because a silent retry would repeat an update or start from fresh weights.

    Args:
        group: Placement group with one bundle per actor, in order of creation.
        num_threads: Number of torch threads per actor, as in the serial runner: it affects the order of sums.
    """

    def __init__(self, group: PlacementGroup, num_threads: int) -> None:
        self._group, self._num_threads = group, num_threads
        self.actors: list[Any] = []
        self.names: dict[str, str] = {}
        """Name of each actor in errors, by actor id."""

    def __call__(self, cls: type, *args: Any) -> Any:
        """Creates an actor of a pipeline class; arguments may be object references."""
        bundle, name = self._group.bundle_specs[len(self.actors)], ACTOR_NAMES[cls]
        number = 1 + sum(each.startswith(name) for each in self.names.values())
        return self._create(
            ACTOR_CLASSES[cls],
            name if cls is ReadoutStage else f"{name} {number}",
            *args,
            num_cpus=bundle.get("CPU", 0),
            num_gpus=bundle.get("GPU", 0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, len(self.actors)),
        )

    def make_writer(self, checkpoints: Folder) -> Any:
        """Creates the checkpoint writer on the driver's node, so that all files of a checkpoint are in one folder."""
        node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        return self._create(WriterActor, "the checkpoint writer", checkpoints, num_cpus=0, scheduling_strategy=node)

    def _create(self, cls: type, name: str, *args: Any, **options: Any) -> Any:
        actor: Any = ray.remote(cls).options(**options, max_restarts=0, max_task_retries=0)
        handle: Any = actor.remote(self._num_threads, *import_settings(), *args)
        self.actors.append(handle)
        self.names[handle._actor_id.hex()] = name
        return handle
