"""The runner whose parts are actors."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
import torch
from ray.exceptions import ActorUnavailableError, ObjectStoreFullError, OutOfDiskError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup
from torch import Tensor

from ffdist.checkpoint import CommitError
from ffdist.config import RunFailed
from ffdist.data.folder import Folder
from ffdist.failures import PartLost
from ffdist.ff.negatives import NegativesError
from ffdist.pipeline.blueprint import Blueprint
from ffdist.pipeline.runner import Runner
from ffdist.runtime.actors import ActorMaker, send_tensors_as_arrays
from ffdist.sections import Pipeline

START_TIMEOUT_S = 300.0
"""Longest that an actor may take to start; it imports torch, from whatever disk."""


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
        parts = blueprint.assemble(make, ray.put(images), ray.put(labels), None)
        needed = [actor.__ray_ready__.remote() for actor in make.made]
        Collector(make.names, START_TIMEOUT_S, "the time to start")(needed)
        writer = make.make_writer(commits)  # last, and not waited for: it has time
        collect = Collector(
            make.names, pipeline.stall_timeout_s, "pipeline.stall_timeout_s", [writer.__ray_ready__.remote()]
        )
        yield Runner(blueprint, parts._replace(writer=writer), call=_call_remotely, collect=collect)
    except (ObjectStoreFullError, OutOfDiskError) as error:
        raise RunFailed(
            f"the object store has no room for the dataset ({' '.join(str(error).split())[:300]})"
        ) from error
    finally:
        for actor in make.made:
            ray.kill(actor)
        ray.util.deregister_serializer(torch.Tensor)


def _call_remotely(part: Any, method: str, *args: Any, returns: int = 1) -> Any:
    return getattr(part, method).options(num_returns=returns).remote(*args)


class Collector:
    """Fetches what calls returned, and tells who is to blame where that fails.

    Args:
        names: Of the actors, by id.
        patience_s: Longest that nothing of what is waited for may come.
        limit: What that is called.
        starting: What tells that actors have started; patience begins then, or after the time to start.
    """

    def __init__(self, names: dict[str, str], patience_s: float, limit: str, starting: Sequence[Any] = ()) -> None:
        self._names, self._patience_s, self._limit = names, patience_s, limit
        self._starting, self._started_by = list(starting), time.monotonic() + START_TIMEOUT_S

    def __call__(self, returned: list[Any], wait: bool = True) -> list[Any] | None:
        """Returns what references stand for; without waiting, None where not all of it is there yet.

        Raises:
            PartLost: An actor is gone, or nothing came for longer than patience lasts.
            RunFailed: An actor raised something.
        """
        left = returned
        while left:
            waited_for, starting = len(left), self._is_any_starting()
            # One at a time, so that patience begins anew with each that comes.
            _, left = ray.wait(left, num_returns=1 if wait else waited_for, timeout=self._patience_s if wait else 0)
            if left and not wait:
                return None
            if len(left) == waited_for and not starting:
                name = self._names.get(left[0].task_id().actor_id().hex(), "an actor")
                raise PartLost(f"{name} did nothing for {self._patience_s:g} s ({self._limit})")
        try:
            values: list[Any] = ray.get(returned)
        except RayError as error:
            raise self._told(error) from error
        return values

    def _is_any_starting(self) -> bool:
        if self._starting:
            _, self._starting = ray.wait(self._starting, num_returns=len(self._starting), timeout=0)
        return bool(self._starting) and time.monotonic() < self._started_by

    def _told(self, error: RayError) -> Exception:
        cause: BaseException = error
        while isinstance(cause, RayTaskError) and isinstance(cause.cause, Exception):
            cause = cause.cause
        if isinstance(cause, NegativesError | CommitError):
            return cause
        if not isinstance(cause, RayError) or isinstance(cause, RayTaskError):
            return RunFailed(f"an actor failed: {cause!r}\n{error}")
        name = self._names.get(getattr(cause, "actor_id", None) or "", "a part of the pipeline")
        what = "cannot be reached" if isinstance(cause, ActorUnavailableError) else "is gone"
        return PartLost(f"{name} {what} ({' '.join(str(cause).split())[-300:]})")
