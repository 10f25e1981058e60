"""Where the stream starts: samples get their negatives, and images become rows.

negative actors -- shards, ahead of need --> first stage: Source --> rows
readout ---------- labels drawn `prediction_delay` minibatches ago ----^   (hard labels)
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ffdist.data.order import SHARD_SAMPLES, SampleOrder
from ffdist.data.store import Store
from ffdist.ff.keyed import generator
from ffdist.ff.labels import one_hot
from ffdist.ff.negatives import TrainingSet, find_kind, make_checked
from ffdist.ff.network import Architecture
from ffdist.pipeline.schedule import Evaluate, Train


@dataclass(frozen=True)
class NegativePlan:
    """How a run gets its negatives."""

    kind: str
    """A key of `KINDS`, or a user's `package.module:function`."""
    options: dict[str, Any] = field(default_factory=dict)
    """What the kind takes beside its contract."""
    per_sample: int = 1
    """Negatives of each sample."""
    sample_bytes: int = 8
    """What they take on their way."""
    num_parts: int = 1
    """How many sources make them; changes nothing else."""
    ahead: int = 4
    """Chunks whose negatives are asked for before the chunk is."""
    prediction_delay: int | None = None
    """Minibatches after which a label that the readout drew may be used; None where none is drawn."""
    store: Store | None = None
    """Where they are read from, and added to where they are missing."""


class Shard(NamedTuple):
    """Negatives of the samples of a shard."""

    number: int
    """Counted within the epoch."""
    negatives: Tensor
    """As the kind returns them `[n, ...]`."""
    made_at: float
    """Time of day at which they were, in seconds."""
    make_s: float
    """Time that it took."""


class Drawn(NamedTuple):
    """Wrong labels that the readout drew for a chunk."""

    chunk: Train
    labels: Tensor
    """`[K, B]`, int64."""

    def added_to(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns a state of `HardLabels` to which these labels came in last."""
        steps = torch.arange(self.chunk.step, self.chunk.step + len(self.labels))
        return state | {
            "pending_steps": torch.cat((state["pending_steps"], steps)),
            "pending_labels": torch.cat((state["pending_labels"], self.labels)),
        }


class NegativeSource:
    """Makes the negatives of whole shards, ahead of need.

    Args:
        plan: Which, and whether they are kept.
        images: uint8 images of each split `[N, D]`.
        labels: True labels of the training set `[N]`, int64.
        architecture: Says what the images are.
        order: SampleOrder of the training set.
    """

    def __init__(
        self,
        plan: NegativePlan,
        images: dict[str, Tensor],
        labels: Tensor,
        architecture: Architecture,
        order: SampleOrder,
    ) -> None:
        self._data = TrainingSet(images["train"], labels, architecture.classes, architecture.shape, order.seed)
        self._kind, self._order, self._store = find_kind(plan.kind, plan.options), order, plan.store
        self._labels_shown = architecture.labels_shown

    def make(self, epoch: int, number: int) -> Shard:
        """Returns a shard of an epoch, drawn afresh, or read where the store has it.

        Raises:
            NegativesError: The store is damaged, or the kind broke its contract.
        """
        start = time.perf_counter()
        negatives = self._store.read(epoch, number) if self._store else None
        if negatives is None:
            samples = self._order.shard(epoch, number)
            draw = generator(self._order.seed, "negatives", epoch, number)
            negatives = make_checked(self._kind, self._data, samples, draw, labels_shown=self._labels_shown)
            if self._store:
                self._store.write(epoch, number, negatives)
        return Shard(number, negatives, time.time(), time.perf_counter() - start)


class HardLabels:
    """Puts labels that the readout drew in place of others, by the rule of the delay.

    The negative of a sample in minibatch q is the newest label drawn for it in a minibatch p with
    `q - p >= delay`; minibatches are counted from the start of training. Where there is none, the other stays.

    Args:
        order: SampleOrder of the training set.
        delay: In minibatches.
    """

    def __init__(self, order: SampleOrder, delay: int) -> None:
        self._order, self._delay = order, delay
        self._newest = torch.full((order.samples,), -1)
        self._pending: deque[tuple[int, Tensor]] = deque()  # by minibatch

    def take(self, drawn: Drawn) -> None:
        """Takes the labels of a chunk in; chunks come in their order."""
        self._pending += enumerate(drawn.labels, drawn.chunk.step)

    def replace(self, chunk: Train, samples: Tensor, others: Tensor) -> Tensor:
        """Returns the labels of a chunk's samples `[K, B]`, where there are none those of `others`."""
        labels = []
        for step, (these, other) in enumerate(zip(samples, others, strict=True), chunk.step):
            while self._pending and self._pending[0][0] <= step - self._delay:
                drawn_at, drawn = self._pending.popleft()
                epoch, first = divmod(drawn_at, self._order.minibatches)
                self._newest[self._order.indices(epoch, first, 1)[0]] = drawn
            newest = self._newest[these]
            labels.append(torch.where(newest < 0, other, newest))
        return torch.stack(labels)

    def state(self) -> dict[str, Tensor]:
        """Returns a copy of all labels: each sample's newest `[N]`, and those that are still too new for use."""
        steps, labels = zip(*self._pending, strict=True) if self._pending else ((), ())
        return {
            "newest": self._newest.clone(),
            "pending_steps": torch.tensor(steps, dtype=torch.int64),
            "pending_labels": torch.cat(
                [torch.empty(0, self._order.batch_size, dtype=torch.int64), *(row.unsqueeze(0) for row in labels)]
            ),
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        """Takes up where a state was taken."""
        self._newest = state["newest"].clone()
        self._pending = deque(zip(state["pending_steps"].tolist(), state["pending_labels"], strict=True))


class Source:
    """Turns uint8 images and labels into the rows that the first layer reads; part of the first stage.

    What differs from sample to sample is put together for a whole chunk, rows are made of it for each minibatch: on a
    GPU, the shape of what is summed decides the order.

    Args:
        architecture: Says how a row shows its label.
        order: SampleOrder of the training set.
        device: Where rows are made, as torch names it. Images and labels stay where they are until they are needed.
        plan: How the negatives come.
        jitter: Most pixels that an image of the training set is shifted in either direction.
        images: uint8 images of each split `[N, D]`.
        labels: True labels of the training set `[N]`, int64.
    """

    def __init__(
        self,
        architecture: Architecture,
        order: SampleOrder,
        device: str,
        plan: NegativePlan,
        jitter: int,
        images: dict[str, Tensor],
        labels: Tensor,
    ) -> None:
        self._architecture, self._order, self._device, self._jitter = architecture, order, device, jitter
        self._images, self._labels = images, labels
        self.hard_labels = HardLabels(order, plan.prediction_delay) if plan.prediction_delay else None

    def train(self, chunk: Train, *arrived: Shard | Drawn) -> list[Tensor]:
        """Puts together what the rows of a chunk are made of.

        Args:
            chunk: Which.
            *arrived: The shards in which its negatives lie, and labels drawn since those that came before.

        Returns:
            Its images `[K, B, D]`, uint8; where negatives are images those, likewise; and where labels are shown those
            of the positive and M times the negative rows `[K, (1 + M) B]`, int64.
        """
        samples = self._order.indices(chunk.epoch, chunk.first, chunk.num_minibatches)
        images, labels = self._images["train"][samples].to(self._device), self._labels[samples].to(self._device)
        shards = [part for part in arrived if isinstance(part, Shard)]
        first = chunk.first * self._order.batch_size
        cuts = [
            shard.negatives[max(0, first - start) : first + samples.numel() - start]
            for shard, start in ((shard, shard.number * SHARD_SAMPLES) for shard in shards)
        ]
        made = torch.cat(cuts)
        negatives = made.view(*samples.shape, *made.shape[1:])
        if self.hard_labels:
            for part in arrived:
                if isinstance(part, Drawn):
                    self.hard_labels.take(part)
            negatives = self.hard_labels.replace(chunk, samples, negatives)
        negatives, parts = negatives.to(self._device), [images]
        if negatives.dtype == torch.uint8:
            parts, negatives = [images, negatives], labels
        if self._jitter:
            shift = self._shifts(chunk)
            parts = [self._shifted(part, shift) for part in parts]
        if self._architecture.labels_shown:
            wrong = negatives.unsqueeze(-1) if negatives.dim() == 2 else negatives  # [K, B, M]
            parts.append(torch.cat((labels, wrong.transpose(1, 2).flatten(1)), 1))
        return parts

    def rows(self, parts: Sequence[Tensor]) -> Tensor:
        """Makes the rows of a minibatch from what `train` put together.

        Returns:
            B positive rows, M times B negative ones and, where labels are shown, B neutral ones, which the readout
            reads; without labels it reads the positive ones `[R, D']`.
        """
        architecture, (images, *rest) = self._architecture, parts
        if not architecture.labels_shown:
            return torch.cat((architecture.neutral_rows(images), *(architecture.rows(part, None) for part in rest)))
        *others, labels = rest
        negatives = (others or [images]) * (len(labels) // len(images) - 1)
        claims = one_hot(labels, architecture.classes)
        return torch.cat(
            (architecture.rows(torch.cat((images, *negatives)), claims), architecture.neutral_rows(images))
        )

    def read(self, chunk: Train) -> Tensor:
        """Makes what the readout's pass reads of a chunk alone `[K, B, D]`."""
        samples = self._order.indices(chunk.epoch, chunk.first, chunk.num_minibatches)
        images = self._images["train"][samples].to(self._device)
        return self._architecture.neutral_rows(self._shifted(images, self._shifts(chunk)) if self._jitter else images)

    def evaluate(self, block: Evaluate) -> tuple[Tensor, Tensor]:
        """Returns a block's rows with every label tried `[n, T, D]`, and those that the readout reads `[n, D]`."""
        architecture = self._architecture
        images = self._images[block.split][block.first : block.first + block.num_samples].to(self._device)
        if not architecture.labels_shown:
            rows = architecture.rows(images, None)
            return rows.unsqueeze(1)[:, :0], rows
        return architecture.claiming_rows(images), architecture.neutral_rows(images)

    def _shifts(self, chunk: Train) -> Tensor:
        """Draws how far down and right each sample's image is shifted `[K, 2, B]`, in [0, 2 * jitter]."""
        shape = (2, self._order.batch_size)
        return torch.stack(
            [
                torch.randint(2 * self._jitter + 1, shape, generator=generator(self._order.seed, "jitter", step))
                for step in range(chunk.step, chunk.step + chunk.num_minibatches)
            ]
        ).to(self._device)

    def _shifted(self, images: Tensor, shift: Tensor) -> Tensor:
        """Returns images `[K, B, D]`, shifted; what comes in at the border is 0."""
        channels, height, width = self._architecture.shape
        padded = F.pad(images.reshape(-1, channels, height, width), (self._jitter,) * 4)
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)
        down, right = shift.transpose(0, 1).flatten(1)
        return windows[torch.arange(len(padded), device=padded.device), :, down, right].view(images.shape)
