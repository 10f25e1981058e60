"""Simulated parts of a pipeline, and a cluster of them in one process that does whatever a seed decides."""

import os
import random
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ffdist.checkpoint import MANIFEST, CommitError
from ffdist.data.folder import Folder
from ffdist.data.order import SampleOrder
from ffdist.failures import PartLost
from ffdist.ff.layers import METRICS
from ffdist.pipeline.schedule import Evaluate, Train
from ffdist.pipeline.source import Drawn, HardLabels
from ffdist.pipeline.stage import Report, State

BATCH, CLASSES = 2, 3
PRIME = 1_000_003
FAULT_CHANCE = 0.01
"""Of each call that a part makes and each write."""


class DriverDied(BaseException):
    """The driver is killed; only what it wrote is left."""


class WriterDied(BaseException):
    """The writer of commits is killed in the midst of a write."""


class Fate:
    """Decides, by a seed, what happens next.

    Args:
        seed: The same makes the same happen.
        faults: How many may.
    """

    def __init__(self, seed: int, faults: int) -> None:
        self.draw, self.left = random.Random(seed), faults
        self.told: list[str] = []
        self.committed = ""
        """The newest commit that was ever whole."""

    def strikes(self, what: str) -> bool:
        """Says whether a fault happens here."""
        if self.left and self.draw.random() < FAULT_CHANCE:
            self.left -= 1
            self.told.append(what)
            return True
        return False


class Part:
    """A part that folds what reaches it into one number for each of its layers."""

    def __init__(self, names: list[str], order: SampleOrder, delay: int | None = None) -> None:
        self._hash = dict.fromkeys(names, 1)
        self._order = order
        self._hard = HardLabels(order, delay) if delay else None

    def train(self, chunk: Train, *message: Any) -> list[Any]:
        """Folds a chunk, minibatch by minibatch, and passes it on."""
        rows = next((part for part in message if isinstance(part, Tensor)), torch.empty(0))
        if self._hard:
            for part in message:
                if isinstance(part, Drawn):
                    self._hard.take(part)
            samples = self._order.indices(chunk.epoch, chunk.first, chunk.num_minibatches)
            rows = self._hard.replace(chunk, samples, samples % CLASSES).double()
        shards = [part for part in message if type(part) is tuple]
        if shards or self._hard:
            needed = self._order.shards(chunk.first, chunk.num_minibatches)
            assert shards == [(chunk.epoch, number) for number in needed], "negatives are missing, or others came"
        metrics, passed = [], []
        for minibatch in range(chunk.num_minibatches):
            number = int((rows[minibatch] * torch.arange(1, len(rows[minibatch]) + 1)).sum())
            for name in self._hash:
                number = (self._hash[name] * 69_069 + number * 31 + chunk.step + minibatch) % PRIME
                self._hash[name] = number
                metrics.append([float(number)] * len(METRICS))
            passed.append([float(number)])
        shape = (chunk.num_minibatches, len(self._hash), len(METRICS))
        signal = torch.tensor(passed, dtype=torch.float64)
        return [Report(torch.tensor(metrics).view(shape), 1.0, 0.0), signal, *[signal] * len(self._hash)]

    def evaluate(self, block: Evaluate, *message: Any) -> list[Any]:
        """Answers by the numbers as they are."""
        goodness = torch.tensor([[[float(number)] * CLASSES] * block.num_samples for number in self._hash.values()])
        return [goodness, None, *[torch.zeros(block.num_samples)] * len(self._hash)]

    def state(self) -> State:
        """Returns the numbers, in the shape of weights."""
        state = {name: self._tensors(number) for name, number in self._hash.items()}
        return state | ({"negatives": self._hard.state()} if self._hard else {})

    def restore(self, state: State) -> None:
        """Takes up where a state was taken."""
        self._hash = {name: int(state[name]["weight"]) for name in self._hash}
        if self._hard and "negatives" in state:
            self._hard.restore(state["negatives"])

    @staticmethod
    def _tensors(number: int) -> dict[str, Tensor]:
        return {"weight": torch.tensor([float(number)], dtype=torch.float64), "bias": torch.zeros(1)}


class Readout(Part):
    """The same at the end of the stream; it draws the labels that go back."""

    def train(self, chunk: Train, *message: Any) -> list[Any]:
        """Folds a chunk and draws a label for each of its samples."""
        report, signal, _ = super().train(chunk, message[-1])
        labels = (signal + torch.arange(BATCH)).long() % CLASSES
        return [Report(report.metrics[:, 0, :2], 1.0, 0.0), Drawn(chunk, labels)]

    def evaluate(self, *message: Any) -> Any:
        """Answers by the number as it is."""
        return torch.full((len(message[0]),), self._hash["readout"] % CLASSES)


class Maker:
    """Stands where negatives are made; their arrival is what matters here."""

    def make(self, epoch: int, number: int) -> tuple[int, int]:
        """Returns which shard it is."""
        return epoch, number


class Promise:
    """What a call will return; a part of it, where it returns several."""

    def __init__(self) -> None:
        self.done, self.value, self.lost = False, None, ""


class Cluster:
    """Parts with queues of calls, which they obey in order, and nobody knows which of them next.

    Args:
        fate: Decides it.
    """

    def __init__(self, fate: Fate) -> None:
        self._fate = fate
        self._calls: dict[Any, deque[tuple[str, tuple[Any, ...], list[Promise]]]] = {}
        self._lost: dict[Any, str] = {}

    def call(self, part: Any, method: str, *args: Any, returns: int = 1) -> Any:
        """Submits a call, as Ray does, and returns what it promises."""
        if self._fate.strikes("the driver dies at a submission"):
            raise DriverDied
        promises = [Promise() for _ in range(returns)]
        self._calls.setdefault(part, deque()).append((method, args, promises))
        return promises if returns > 1 else promises[0]

    def collect(self, returned: list[Promise], wait: bool = True, upstream: Any = ()) -> list[Any] | None:
        """Lets parts work until all that is asked for is there."""
        while not all(promise.done for promise in returned):
            ready = [part for part, calls in self._calls.items() if calls and self._can_run(part, calls[0][1])]
            if not ready and not wait:
                return None
            if not ready:
                raise PartLost("a part did nothing for long")
            self._run(self._fate.draw.choice(ready))
            if not wait and self._fate.draw.random() < 0.5:
                return None
        lost = [promise.lost for promise in returned if promise.lost]
        if lost:
            raise PartLost(lost[0])
        return [promise.value for promise in returned]

    def _can_run(self, part: Any, args: tuple[Any, ...]) -> bool:
        if self._lost.get(part) == "stuck":
            return False
        return all(argument.done for argument in args if isinstance(argument, Promise))

    def _run(self, part: Any) -> None:
        method, args, promises = self._calls[part].popleft()
        name = type(part).__name__
        if part not in self._lost and self._fate.strikes(f"{name} dies before {method}"):
            self._lost[part] = f"{name} is gone"
        elif part not in self._lost and self._fate.strikes(f"{name} stops before {method}"):
            self._lost[part] = "stuck"
            self._calls[part].appendleft((method, args, promises))
            return
        lost = self._lost.get(part, "") or next((a.lost for a in args if isinstance(a, Promise) and a.lost), "")
        values: Any = [None] * len(promises)
        if not lost:
            given = [argument.value if isinstance(argument, Promise) else argument for argument in args]
            try:
                returned = getattr(part, method)(*given)
                values = returned if len(promises) > 1 else [returned]
            except WriterDied:
                lost = self._lost[part] = f"{name} is gone"
            if self._fate.strikes(f"{name} dies after {method}"):
                self._lost[part] = f"{name} is gone"
        for promise, value in zip(promises, values, strict=True):
            promise.done, promise.value, promise.lost = True, value, lost


class FrailFolder(Folder):
    """A folder whose writer may die at any write: before it, in the midst of it, or right after it.

    Args:
        uri: Where.
        fate: Decides it.
        death: What that raises.
    """

    def __init__(self, uri: str, fate: Fate, death: type[BaseException]) -> None:
        super().__init__(uri, CommitError)
        self._fate, self._death = fate, death

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Has a file written, or dies."""
        if self._fate.strikes(f"a death before {name}"):
            raise self._death
        with super().writing(name) as path:
            yield path
            if self._fate.strikes(f"a death in the midst of {name}"):
                os.truncate(path, path.stat().st_size // 2)
                raise self._death
        if name.endswith(MANIFEST):
            self._fate.committed = name.split("/")[0]
        if self._fate.strikes(f"a death after {name}"):
            raise self._death

    def _sync(self, path: str) -> None:
        """Leaves the disk alone: what is killed here is a process, not the machine."""
