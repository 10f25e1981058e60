"""Simulated actors, and a cluster that runs them in one process; a seed determines scheduling and faults."""

import os
import random
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ffdist.checkpoint.checkpoints import MANIFEST, CheckpointError
from ffdist.data.order import SampleOrder
from ffdist.errors import ActorLost
from ffdist.ff.layers import MEASURED
from ffdist.ff.objectives import GoodnessObjective
from ffdist.pipeline.schedule import Evaluate, Train
from ffdist.pipeline.source import Drawn, HardLabels
from ffdist.pipeline.stage import Report, State
from ffdist.storage.folder import Folder

BATCH_SIZE, NUM_CLASSES = 2, 3
HASH_MODULUS = 1_000_003
NUM_METRICS = len(GoodnessObjective.metrics) + len(MEASURED)
FAULT_PROBABILITY = 0.01
"""Probability of each fault at each point where it can occur, such as a call or a write."""


class DriverDied(BaseException):
    """The driver is killed; only the files that it has written remain."""


class WriterDied(BaseException):
    """The checkpoint writer is killed before, during or after a write."""


class FaultInjector:
    """Decides where faults occur. All random choices of a schedule come from its generator.

    Args:
        seed: Seed of the generator.
        max_faults: Largest number of faults.
    """

    def __init__(self, seed: int, max_faults: int) -> None:
        self.rng, self._remaining = random.Random(seed), max_faults
        self.faults: list[str] = []
        """Descriptions of the injected faults."""
        self.newest_checkpoint = ""
        """Name of the newest checkpoint that was completed."""

    def inject(self, fault: str) -> bool:
        """Decides whether a fault occurs here, and records it."""
        if self._remaining and self.rng.random() < FAULT_PROBABILITY:
            self._remaining -= 1
            self.faults.append(fault)
            return True
        return False


class SimulatedStage:
    """A stage that hashes its inputs into one number for each of its layers."""

    def __init__(self, names: list[str], order: SampleOrder, delay: int | None = None) -> None:
        self._hash = dict.fromkeys(names, 1)
        self._order = order
        self._hard = HardLabels(order, delay) if delay else None

    def train(self, chunk: Train, *message: Any) -> list[Any]:
        """Updates the hashes with each minibatch of a chunk, and passes them on."""
        rows = next((item for item in message if isinstance(item, Tensor)), torch.empty(0))
        if self._hard:
            for item in message:
                if isinstance(item, Drawn):
                    self._hard.take(item)
            samples = self._order.indices(chunk.epoch, chunk.first, chunk.num_minibatches)
            rows = self._hard.replace(chunk, samples, samples % NUM_CLASSES).double()
        shards = [item for item in message if type(item) is tuple]
        if shards or self._hard:
            needed = self._order.shards(chunk.first, chunk.num_minibatches)
            assert shards == [(chunk.epoch, number) for number in needed], "the negatives are not those of the chunk"
        metrics, outputs = [], []
        for minibatch in range(chunk.num_minibatches):
            number = int((rows[minibatch] * torch.arange(1, len(rows[minibatch]) + 1)).sum())
            for name in self._hash:
                number = (self._hash[name] * 69_069 + number * 31 + chunk.step + minibatch) % HASH_MODULUS
                self._hash[name] = number
                metrics.append([float(number)] * NUM_METRICS)
            outputs.append([float(number)])
        shape = (chunk.num_minibatches, len(self._hash), NUM_METRICS)
        signal = torch.tensor(outputs, dtype=torch.float64)
        return [Report(torch.tensor(metrics).view(shape), 1.0, 0.0), signal, *[signal] * len(self._hash)]

    def evaluate(self, block: Evaluate, *message: Any) -> list[Any]:
        """Returns goodness that depends on the hashes only, not on the samples."""
        goodness = torch.tensor([[[float(number)] * NUM_CLASSES] * block.num_samples for number in self._hash.values()])
        return [goodness, None, *[torch.zeros(block.num_samples)] * len(self._hash)]

    def state(self) -> State:
        """Returns the hashes, in the format of the state of a stage."""
        state = {name: self._tensors(number) for name, number in self._hash.items()}
        return state | ({"negatives": self._hard.state()} if self._hard else {})

    def restore(self, state: State) -> None:
        """Restores a state that `state` returned."""
        self._hash = {name: int(state[name]["weight"]) for name in self._hash}
        if self._hard and "negatives" in state:
            self._hard.restore(state["negatives"])

    @staticmethod
    def _tensors(number: int) -> dict[str, Tensor]:
        return {"weight": torch.tensor([float(number)], dtype=torch.float64), "bias": torch.zeros(1)}


class SimulatedReadout(SimulatedStage):
    """A readout that hashes its inputs, and draws labels that depend on the hash."""

    def train(self, chunk: Train, *message: Any) -> list[Any]:
        """Updates the hash with a chunk, and draws a label for each of its samples."""
        report, signal, _ = super().train(chunk, message[-1])
        labels = (signal + torch.arange(BATCH_SIZE)).long() % NUM_CLASSES
        return [Report(report.metrics[:, 0, :2], 1.0, 0.0), Drawn(chunk, labels)]

    def evaluate(self, *message: Any) -> Any:
        """Predicts labels that depend on the hash only."""
        return torch.full((len(message[0]),), self._hash["readout"] % NUM_CLASSES)


class SimulatedNegativeSource:
    """A negative source that returns keys instead of negatives, because only their order is tested."""

    def make(self, epoch: int, number: int) -> tuple[int, int]:
        """Returns the key of a shard."""
        return epoch, number


class Future:
    """A result of a call; `error` says why there is none."""

    def __init__(self) -> None:
        self.done, self.value, self.error = False, None, ""


class SimulatedCluster:
    """Actors with queues of calls. An actor runs its calls in order; which actor runs next is random.

    Args:
        injector: Chooses actors and faults.
    """

    def __init__(self, injector: FaultInjector) -> None:
        self._injector = injector
        self._calls: dict[Any, deque[tuple[str, tuple[Any, ...], list[Future]]]] = {}
        self._lost: dict[Any, str] = {}

    def call(self, actor: Any, method: str, *args: Any, returns: int = 1) -> Any:
        """Submits a call, as Ray does, and returns its futures."""
        if self._injector.inject("the driver dies when it submits a call"):
            raise DriverDied
        futures = [Future() for _ in range(returns)]
        self._calls.setdefault(actor, deque()).append((method, args, futures))
        return futures if returns > 1 else futures[0]

    def collect(self, returned: list[Future], wait: bool = True, upstream: Any = ()) -> list[Any] | None:
        """Runs calls until the futures have results; may return None if `wait` is false."""
        while not all(future.done for future in returned):
            ready = [actor for actor, calls in self._calls.items() if calls and self._can_run(actor, calls[0][1])]
            if not ready and not wait:
                return None
            if not ready:
                raise ActorLost("an actor is stuck")
            self._run(self._injector.rng.choice(ready))
            if not wait and self._injector.rng.random() < 0.5:
                return None
        errors = [future.error for future in returned if future.error]
        if errors:
            raise ActorLost(errors[0])
        return [future.value for future in returned]

    def _can_run(self, actor: Any, args: tuple[Any, ...]) -> bool:
        if self._lost.get(actor) == "stuck":
            return False
        return all(arg.done for arg in args if isinstance(arg, Future))

    def _run(self, actor: Any) -> None:
        method, args, futures = self._calls[actor].popleft()
        name = type(actor).__name__
        if actor not in self._lost and self._injector.inject(f"{name} dies before {method}"):
            self._lost[actor] = f"{name} died"
        elif actor not in self._lost and self._injector.inject(f"{name} hangs before {method}"):
            self._lost[actor] = "stuck"
            self._calls[actor].appendleft((method, args, futures))
            return
        error = self._lost.get(actor, "") or next((a.error for a in args if isinstance(a, Future) and a.error), "")
        values: Any = [None] * len(futures)
        if not error:
            try:
                returned = getattr(actor, method)(*(arg.value if isinstance(arg, Future) else arg for arg in args))
                values = returned if len(futures) > 1 else [returned]
            except WriterDied:
                error = self._lost[actor] = f"{name} died"
            if self._injector.inject(f"{name} dies after {method}"):
                self._lost[actor] = f"{name} died"
        for future, value in zip(futures, values, strict=True):
            future.done, future.value, future.error = True, value, error


class FaultyFolder(Folder):
    """A folder whose process may die before, during or after each write.

    Args:
        uri: URI of the folder.
        injector: Decides when the process dies.
        death: Exception that is raised in this case.
    """

    def __init__(self, uri: str, injector: FaultInjector, death: type[BaseException]) -> None:
        super().__init__(uri, CheckpointError)
        self._injector, self._death = injector, death

    @contextmanager
    def atomic_write(self, name: str) -> Iterator[Path]:
        """Yields a path to write to, as `Folder` does, or raises."""
        if self._injector.inject(f"death before writing {name}"):
            raise self._death
        with super().atomic_write(name) as path:
            yield path
            if self._injector.inject(f"death while writing {name}"):
                os.truncate(path, path.stat().st_size // 2)
                raise self._death
        if name.endswith(MANIFEST):
            self._injector.newest_checkpoint = name.split("/")[0]
        if self._injector.inject(f"death after writing {name}"):
            raise self._death

    def _sync(self, path: str) -> None:
        """Does nothing, because written data survive the death of a process."""
