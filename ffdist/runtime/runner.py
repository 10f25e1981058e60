"""The runner over Ray actors."""

import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
import torch
from ray.exceptions import (
    ActorUnavailableError,
    ObjectStoreFullError,
    OutOfDiskError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
)
from ray.util.placement_group import PlacementGroup
from torch import Tensor

from ffdist.checkpoint.checkpoints import CheckpointError
from ffdist.config.sections import Pipeline
from ffdist.errors import ActorLost, ClusterStopped, RunFailed
from ffdist.ff.negatives import NegativesError
from ffdist.pipeline.blueprint import Blueprint
from ffdist.pipeline.hardware import hardware_of_actors
from ffdist.pipeline.runner import Runner
from ffdist.runtime.actors import ActorFactory, send_tensors_as_arrays
from ffdist.runtime.cluster import cluster_probe
from ffdist.storage.folder import Folder

START_TIMEOUT_S = 300.0
"""Time limit for starting an actor, which imports torch, possibly from a slow disk."""
LOW_MEMORY = "node running low on memory"
"""Part of the error of an actor that Ray killed to free memory. Its type depends on when the actor was called."""
NODE_MEMORY = re.compile(r"Memory on the node .*? limit")
ACTOR_MEMORY = re.compile(r"Actor\((\w+)\).*?actual memory used=([\d.]+GB)")
"""Id and memory of each actor that Ray killed."""
MEMORY_FIX = "set pipeline.chunk_size or pipeline.max_in_flight lower"
MAX_QUOTE_CHARS = 400
"""Maximum length of a quoted error of Ray."""


@contextmanager
def ray_runner(
    blueprint: Blueprint,
    group: PlacementGroup,
    pipeline: Pipeline,
    samples: dict[str, Tensor],
    labels: Tensor,
    checkpoints: Folder,
) -> Iterator[Runner]:
    """Starts the actors of a run, and kills them at the end of the `with` block.

    Args:
        blueprint: Describes the actors.
        group: Placement group with the resources of each actor, as `Placement.bundles` lists them.
        pipeline: Threads per stage and timeouts.
        samples: Samples of each split `[N, D]`, which are put into the object store once.
        labels: Labels of the training set `[N]`.
        checkpoints: Folder of the run's checkpoints.

    Raises:
        ActorLost: An actor died or stalled, at the start or in a later call of the runner.
        RunFailed: An actor raised an exception.
    """
    send_tensors_as_arrays()
    factory = ActorFactory(group, pipeline.threads_per_stage)
    try:
        actors = blueprint.assemble(factory, _put(samples), _put(labels), None)
        learners = [*actors.stages, *([actors.readout] if actors.readout else [])]
        calls = [actor.read_hardware.remote(blueprint.device) for actor in learners]
        calls += [actor.read_hardware.remote("cpu") for actor in actors.negatives]
        is_alive = cluster_probe()
        reports = Collector(factory.names, START_TIMEOUT_S, "the start timeout", is_alive=is_alive)(calls) or []
        hardware = hardware_of_actors(
            blueprint.stage_layers,
            reports[: len(actors.stages)],
            reports[len(actors.stages)] if actors.readout else None,
            reports[len(learners) :],
        )
        writer = factory.make_writer(checkpoints)  # last, without waiting: it is needed for the first checkpoint only
        starting = [writer.__ray_ready__.remote()]
        collect = Collector(factory.names, pipeline.stall_timeout_s, "pipeline.stall_timeout_s", starting, is_alive)
        yield Runner(blueprint, actors._replace(writer=writer), call=_call_remotely, collect=collect, hardware=hardware)
    finally:
        if not isinstance(sys.exception(), ClusterStopped):  # the call would wait for a stopped cluster
            for actor in factory.actors:
                ray.kill(actor)
        ray.util.deregister_serializer(torch.Tensor)


def _put(data: Any) -> Any:
    try:
        return ray.put(data)
    except (ObjectStoreFullError, OutOfDiskError) as error:
        raise RunFailed(f"Ray's object store is too small for the dataset ({_quote(error)})") from error


def _call_remotely(actor: Any, method: str, *args: Any, returns: int = 1) -> Any:
    try:
        return getattr(actor, method).options(num_returns=returns).remote(*args)
    except (ObjectStoreFullError, OutOfDiskError) as error:  # from storing large arguments
        raise _storage_failure(error, "the driver") from error


class Collector:
    """Fetches the results of calls, and names the actor that died, failed or stalled.

    Args:
        names: Names of the actors, by actor id.
        timeout_s: Longest time without a new result.
        timeout_name: Name of the timeout in errors.
        starting: References that are ready when actors have started. The timeout applies from then on, and at the
            latest after `START_TIMEOUT_S`.
        is_alive: Returns whether the cluster still accepts connections.
    """

    def __init__(
        self,
        names: dict[str, str],
        timeout_s: float,
        timeout_name: str,
        starting: Sequence[Any] = (),
        is_alive: Callable[[], bool] = lambda: True,
    ) -> None:
        self._names, self._timeout_s, self._timeout_name, self._is_alive = names, timeout_s, timeout_name, is_alive
        self._starting, self._start_deadline = list(starting), time.monotonic() + START_TIMEOUT_S

    def __call__(self, returned: list[Any], wait: bool = True, upstream: Sequence[Any] = ()) -> list[Any] | None:
        """Returns the results of calls; None if `wait` is false and one of them has not arrived.

        Args:
            returned: References to the results, in the order of the pipeline.
            wait: Whether to wait for the results.
            upstream: References to results that `returned` may depend on, first actor first. If nothing arrives, the
                first missing one names the stalled actor, because the others wait for it.

        Raises:
            ActorLost: An actor died, or no result arrived within the timeout.
            ClusterStopped: The cluster was stopped.
            RunFailed: An actor raised an exception, or memory, the object store or the disk is full.
        """
        pending = returned
        while pending:
            count, is_starting = len(pending), self._is_any_starting()
            # One at a time, so that the timeout restarts with each result.
            _, pending = ray.wait(pending, num_returns=1 if wait else count, timeout=self._timeout_s if wait else 0)
            if pending and not wait:
                return None
            if len(pending) == count and not is_starting:
                missing = ray.wait(list(upstream), num_returns=len(upstream), timeout=0)[1] if upstream else []
                name = self._name_of((missing or pending)[0].task_id().actor_id().hex())
                raise self._loss(f"{name} did nothing for {self._timeout_s:g} s ({self._timeout_name})")
        try:
            values: list[Any] = ray.get(returned)
        except RayError as error:
            raise self._classify(error) from error
        return values

    def _is_any_starting(self) -> bool:
        if self._starting:
            _, self._starting = ray.wait(self._starting, num_returns=len(self._starting), timeout=0)
        return bool(self._starting) and time.monotonic() < self._start_deadline

    def _name_of(self, actor_id: str | None) -> str:
        return self._names.get(actor_id or "", "an actor")

    def _classify(self, error: RayError) -> Exception:
        """Returns the exception to raise for an error of Ray: `ActorLost` only if a restart of the actors may help."""
        cause: BaseException = error
        while isinstance(cause, RayTaskError) and isinstance(cause.cause, Exception):
            cause = cause.cause
        if isinstance(cause, NegativesError | CheckpointError):
            return cause
        if isinstance(cause, RayActorError) and cause.actor_init_failed:
            *_, last = str(cause).strip().splitlines()
            return RunFailed(f"{self._name_of(cause.actor_id)} could not be started: {last.strip()}\n{cause}")
        name = self._name_of(getattr(cause, "actor_id", None))
        if isinstance(cause, OutOfMemoryError) or (isinstance(cause, RayActorError) and LOW_MEMORY in str(cause)):
            return self._memory_failure(str(cause), name)
        if isinstance(cause, ObjectStoreFullError | OutOfDiskError):
            return _storage_failure(cause, name)
        if not isinstance(cause, RayError) or isinstance(cause, RayTaskError):
            return RunFailed(f"an actor failed: {cause!r}\n{error}")
        problem = "cannot be reached" if isinstance(cause, ActorUnavailableError) else "is gone"
        return self._loss(f"{name} {problem} ({_quote(cause)})")

    def _memory_failure(self, text: str, name: str) -> RunFailed:
        """Names the node that ran out of memory and the memory of the killed actors. A restart would fail again."""
        sizes = {self._name_of(actor_id): size for actor_id, size in ACTOR_MEMORY.findall(text)}
        node = NODE_MEMORY.search(text)
        quote = node[0] if node else _quote(text)
        details = "; ".join([quote, *(f"{actor} held {size}" for actor, size in sizes.items())])
        return RunFailed(
            f"{' and '.join(sizes) or name} was killed because its node ran out of memory ({details}); use a node with "
            f"more memory or more nodes, or {MEMORY_FIX}"
        )

    def _loss(self, text: str) -> RunFailed:
        return ActorLost(text) if self._is_alive() else ClusterStopped("the Ray cluster was stopped")


def _storage_failure(error: RayError, name: str) -> RunFailed:
    """Names the storage that is full. A restart of the same pipeline would fill it again."""
    if isinstance(error, OutOfDiskError):
        problem, fix = "the disk that Ray's object store spills to is full", "free some of it"
    else:
        problem, fix = "Ray's object store is full", "start Ray with a larger --object-store-memory"
    return RunFailed(f"{name} failed because {problem} ({_quote(error)}); {fix}, or {MEMORY_FIX}")


def _quote(error: BaseException | str) -> str:
    """Returns the start of an error's text, which names the cause; advice on Ray's settings follows it."""
    text = " ".join(str(error).split())
    return text if len(text) <= MAX_QUOTE_CHARS else f"{text[:MAX_QUOTE_CHARS].rsplit(' ', 1)[0]} ..."
