"""The runner whose parts are actors."""

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

from ffdist.checkpoint import CommitError
from ffdist.config import RunFailed
from ffdist.data.folder import Folder
from ffdist.failures import ClusterStopped, PartLost
from ffdist.ff.negatives import NegativesError
from ffdist.pipeline.blueprint import Blueprint
from ffdist.pipeline.hardware import hardware_of_parts
from ffdist.pipeline.runner import Runner
from ffdist.runtime.actors import ActorMaker, send_tensors_as_arrays
from ffdist.runtime.cluster import cluster_probe
from ffdist.sections import Pipeline

START_TIMEOUT_S = 300.0
"""Longest that an actor may take to start; it imports torch, from whatever disk."""
OUT_OF_MEMORY = "node running low on memory"
"""In the error of an actor that Ray killed for that; the type of the error depends on when the actor is called."""
NODE_MEMORY = re.compile(r"Memory on the node .*? limit")
KILLED = re.compile(r"Actor\((\w+)\).*?actual memory used=([\d.]+GB)")
"""Actors that Ray killed, by id, and what they held."""
SMALLER = "set pipeline.chunk_size or pipeline.max_in_flight lower"
MAX_QUOTE = 400
"""Longest quote of an error of Ray, in characters."""


@contextmanager
def ray_runner(
    blueprint: Blueprint,
    group: PlacementGroup,
    pipeline: Pipeline,
    images: dict[str, Tensor],
    labels: Tensor,
    commits: Folder,
) -> Iterator[Runner]:
    """Starts the parts of a run as actors, and takes them down at the end of a `with` block.

    Args:
        blueprint: What to make.
        group: Resources of each actor, as `Placement.bundles` lists them.
        pipeline: Threads, and the patience with parts that do nothing.
        images: uint8 images of each split `[N, D]`; they go into the object store once.
        labels: Labels of the training set `[N]`.
        commits: Folder of the run's commits.

    Raises:
        PartLost: An actor died or does nothing any more, here or in what the runner is asked to do.
        RunFailed: An actor raised something.
    """
    send_tensors_as_arrays()
    make = ActorMaker(group, pipeline.threads_per_stage)
    try:
        parts = blueprint.assemble(make, _put(images), _put(labels), None)
        device, num_stages = blueprint.device, len(parts.stages)
        needed = [actor.read_hardware.remote(device) for actor in (*parts.stages, parts.readout)]
        needed += [actor.read_hardware.remote("cpu") for actor in parts.negatives]
        is_alive = cluster_probe()
        found = Collector(make.names, START_TIMEOUT_S, "the time to start", is_alive=is_alive)(needed) or []
        hardware = hardware_of_parts(
            blueprint.stage_layers, found[:num_stages], found[num_stages], found[num_stages + 1 :]
        )
        writer = make.make_writer(commits)  # last, and not waited for: it has time
        starting = [writer.__ray_ready__.remote()]
        collect = Collector(make.names, pipeline.stall_timeout_s, "pipeline.stall_timeout_s", starting, is_alive)
        yield Runner(blueprint, parts._replace(writer=writer), call=_call_remotely, collect=collect, hardware=hardware)
    finally:
        if not isinstance(sys.exception(), ClusterStopped):  # then the call would wait for the cluster
            for actor in make.made:
                ray.kill(actor)
        ray.util.deregister_serializer(torch.Tensor)


def _put(data: Any) -> Any:
    try:
        return ray.put(data)
    except (ObjectStoreFullError, OutOfDiskError) as error:
        raise RunFailed(f"the object store has no room for the dataset ({_start_of(error)})") from error


def _call_remotely(part: Any, method: str, *args: Any, returns: int = 1) -> Any:
    try:
        return getattr(part, method).options(num_returns=returns).remote(*args)
    except (ObjectStoreFullError, OutOfDiskError) as error:  # of large arguments
        raise _run_failure(error, "the driver") from error


class Collector:
    """Fetches what calls returned, and tells who is to blame where that fails.

    Args:
        names: Of the actors, by id.
        patience_s: Longest that nothing of what is waited for may come.
        limit: What that is called.
        starting: What tells that actors have started; patience begins then, or after the time to start.
        is_alive: Says whether the cluster still accepts connections.
    """

    def __init__(
        self,
        names: dict[str, str],
        patience_s: float,
        limit: str,
        starting: Sequence[Any] = (),
        is_alive: Callable[[], bool] = lambda: True,
    ) -> None:
        self._names, self._patience_s, self._limit, self._is_alive = names, patience_s, limit, is_alive
        self._starting, self._started_by = list(starting), time.monotonic() + START_TIMEOUT_S

    def __call__(self, returned: list[Any], wait: bool = True, upstream: Sequence[Any] = ()) -> list[Any] | None:
        """Returns what references stand for; without waiting, None where not all of it is there yet.

        Args:
            returned: References, in the order of the pipeline.
            wait: Whether to wait.
            upstream: References to results that `returned` may depend on, first actor first. If nothing arrives, the
                actor of the first that is missing counts as stuck: the others wait for it.

        Raises:
            PartLost: An actor is gone, or nothing came for longer than patience lasts.
            ClusterStopped: So is the cluster.
            RunFailed: An actor raised something, or no memory, object store or disk is left.
        """
        left = returned
        while left:
            waited_for, starting = len(left), self._is_any_starting()
            # One at a time, so that patience begins anew with each that comes.
            _, left = ray.wait(left, num_returns=1 if wait else waited_for, timeout=self._patience_s if wait else 0)
            if left and not wait:
                return None
            if len(left) == waited_for and not starting:
                missing = ray.wait(list(upstream), num_returns=len(upstream), timeout=0)[1] if upstream else []
                name = self._name_of((missing or left)[0].task_id().actor_id().hex())
                raise self._lost(f"{name} did nothing for {self._patience_s:g} s ({self._limit})")
        try:
            values: list[Any] = ray.get(returned)
        except RayError as error:
            raise self._classified(error) from error
        return values

    def _is_any_starting(self) -> bool:
        if self._starting:
            _, self._starting = ray.wait(self._starting, num_returns=len(self._starting), timeout=0)
        return bool(self._starting) and time.monotonic() < self._started_by

    def _name_of(self, actor_id: str | None) -> str:
        return self._names.get(actor_id or "", "an actor")

    def _classified(self, error: RayError) -> Exception:
        """Classifies an error of Ray: what an actor raised, what another try would meet again, or a lost actor."""
        cause: BaseException = error
        while isinstance(cause, RayTaskError) and isinstance(cause.cause, Exception):
            cause = cause.cause
        if isinstance(cause, NegativesError | CommitError):
            return cause
        if isinstance(cause, RayActorError) and cause.actor_init_failed:
            *_, last = str(cause).strip().splitlines()
            return RunFailed(f"{self._name_of(cause.actor_id)} could not be started: {last.strip()}\n{cause}")
        name = self._name_of(getattr(cause, "actor_id", None))
        if isinstance(cause, OutOfMemoryError) or (isinstance(cause, RayActorError) and OUT_OF_MEMORY in str(cause)):
            return self._out_of_memory(str(cause), name)
        if isinstance(cause, ObjectStoreFullError | OutOfDiskError):
            return _run_failure(cause, name)
        if not isinstance(cause, RayError) or isinstance(cause, RayTaskError):
            return RunFailed(f"an actor failed: {cause!r}\n{error}")
        what = "cannot be reached" if isinstance(cause, ActorUnavailableError) else "is gone"
        return self._lost(f"{name} {what} ({_start_of(cause)})")

    def _out_of_memory(self, text: str, name: str) -> RunFailed:
        """Says which node ran out of memory and what the killed actors held; there is no use in another start."""
        held = {self._name_of(actor_id): size for actor_id, size in KILLED.findall(text)}
        node = NODE_MEMORY.search(text)
        quote = node[0] if node else _start_of(text)
        details = "; ".join([quote, *(f"{actor} held {size}" for actor, size in held.items())])
        return RunFailed(
            f"{' and '.join(held) or name} was killed because its node ran out of memory ({details}); use a node with "
            f"more memory or more nodes, or {SMALLER}"
        )

    def _lost(self, text: str) -> RunFailed:
        return PartLost(text) if self._is_alive() else ClusterStopped("the Ray cluster was stopped")


def _run_failure(error: RayError, name: str) -> RunFailed:
    """Says which resource ran out, where another start of the same pipeline would meet the same limit."""
    if isinstance(error, OutOfDiskError):
        why, fix = f"{name} found the disk full that Ray's object store spills to", "free some of it"
    else:
        why, fix = f"{name} found Ray's object store full", "start Ray with a larger --object-store-memory"
    return RunFailed(f"{why} ({_start_of(error)}); {fix}, or {SMALLER}")


def _start_of(error: BaseException | str) -> str:
    """Returns the start of an error's text, which names the cause; advice on Ray's settings follows it."""
    text = " ".join(str(error).split())
    return text if len(text) <= MAX_QUOTE else f"{text[:MAX_QUOTE].rsplit(' ', 1)[0]} ..."
