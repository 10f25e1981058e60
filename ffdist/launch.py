"""Starting a pipeline: on which machine, with how many stages, on which runner."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Literal, NamedTuple

from ffdist.checkpoint import CommitWriter
from ffdist.config import Config
from ffdist.data.folder import Folder
from ffdist.pipeline.backpropagation import Backpropagation
from ffdist.pipeline.partition import partition
from ffdist.pipeline.runner import Blueprint, Runner, serial_runner, torch_threads
from ffdist.prepare import Prepared
from ffdist.runtime.cluster import Resources, check_object_store, connect, machine_resources
from ffdist.runtime.placement import decide, describe, reserve

RunnerName = Literal["ray", "serial", "backpropagation"]
Pipeline = Runner | Backpropagation


class Placed(NamedTuple):
    """A pipeline that has its place and can be started."""

    blueprint: Blueprint
    in_words: str
    start: Callable[[Folder], AbstractContextManager[Pipeline]]
    """Starts the parts, for the length of a `with` block, given the folder of the run's commits."""


@contextmanager
def machine(runner: RunnerName, address: str | None) -> Iterator[Callable[[], Resources]]:
    """Joins a cluster where the runner needs one, for the length of a `with` block, beside what follows.

    Yields:
        What waits until that is done, and returns what tells the resources.

    Raises:
        ConfigError: It cannot be reached.
    """
    if runner == "ray":
        with connect(address) as joined:
            yield joined
    else:
        yield lambda: machine_resources


@contextmanager
def place(runner: RunnerName, prepared: Prepared, config: Config, resources: Resources) -> Iterator[Placed]:
    """Decides on stages and holds what they need, for the length of a `with` block.

    Raises:
        ConfigError: The cluster lacks it.
    """
    dataset, order, architecture, plan = prepared
    pipeline = config.pipeline
    placement = decide(pipeline, layers=len(architecture.layers), negative_actors=plan.num_parts, resources=resources())
    blueprint = Blueprint(
        architecture,
        order,
        negatives=plan,
        jitter=config.data.jitter,
        stage_layers=partition(architecture.weights, placement.stages),
        measure_every=config.tracking.every_minibatches,
        device=placement.device,
    )
    images, labels = dataset.images, dataset.labels["train"]
    in_words = describe(runner, placement, blueprint)
    if runner == "ray":
        in_flight = blueprint.bytes_in_flight(pipeline.chunk_size, pipeline.max_in_flight)
        check_object_store(images=sum(split.nbytes for split in images.values()), in_flight=in_flight)
        with reserve(placement.bundles(plan.num_parts)) as group:
            from ffdist.runtime.runner import ray_runner

            start = partial(ray_runner, blueprint, group, pipeline, images, labels)
            yield Placed(blueprint, in_words, start)
        return

    @contextmanager
    def here(commits: Folder) -> Iterator[Pipeline]:
        make = serial_runner if runner == "serial" else Backpropagation
        with torch_threads(pipeline.threads_per_stage):
            yield make(blueprint, images, labels, CommitWriter(commits))

    yield Placed(blueprint, in_words, here)
