"""The runner whose parts are actors."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup
from torch import Tensor

from ffdist.ff.negatives import NegativesError
from ffdist.pipeline.runner import Blueprint, Runner
from ffdist.runtime.actors import ActorMaker, send_tensors_as_arrays
from ffdist.sections import Pipeline


class ActorFailure(RuntimeError):
    """An actor died or raised; the text says which and why."""


@contextmanager
def ray_runner(
    blueprint: Blueprint,
    group: PlacementGroup,
    pipeline: Pipeline,
    *,
    images: dict[str, Tensor],
    labels: Tensor,
) -> Iterator[Runner]:
    """Starts the parts of a run as actors, and takes them down at the end of a `with` block.

    Args:
        blueprint: What to make.
        group: Resources of each actor, as `Placement.bundles` lists them.
        pipeline: Window, chunks and threads.
        images: uint8 images of each split `[N, D]`; they go into the object store once.
        labels: Labels of the training set `[N]`.

    Raises:
        ActorFailure: An actor cannot start.
    """
    send_tensors_as_arrays()
    make = ActorMaker(group, pipeline.threads_per_stage)
    try:
        parts = blueprint.assemble(make, ray.put(images), ray.put(labels))
        _collect([actor.__ray_ready__.remote() for actor in make.made])
        chunk_size = min(pipeline.chunk_size, blueprint.order.minibatches)
        window = blueprint.negatives.max_in_flight(chunk_size, pipeline.max_in_flight)
        yield Runner(
            blueprint,
            parts,
            call=_call_remotely,
            collect=_collect,
            max_in_flight=window,
            ahead=blueprint.negatives.ahead,
        )
    finally:
        for actor in make.made:
            ray.kill(actor)
        ray.util.deregister_serializer(torch.Tensor)


def _call_remotely(part: Any, method: str, *args: Any, returns: int = 1) -> Any:
    return getattr(part, method).options(num_returns=returns).remote(*args)


def _collect(references: list[Any]) -> list[Any]:
    try:
        values: list[Any] = ray.get(references)
    except RayTaskError as error:
        if isinstance(error.cause, NegativesError):
            raise error.cause from error
        raise ActorFailure(f"an actor failed: {error.cause!r}\n{error}") from error
    except RayError as error:
        raise ActorFailure(f"an actor is gone: {error}") from error
    return values
