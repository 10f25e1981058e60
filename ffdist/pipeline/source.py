"""The start of the pipeline: samples get their negatives, and images become input rows.

negative actors -- prefetched shards -----> first stage: Source --> rows
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

from ffdist.data.negatives_store import Store
from ffdist.data.order import SHARD_SAMPLES, SampleOrder
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
    """Options of the kind."""
    per_sample: int = 1
    """Number of negatives per sample."""
    sample_bytes: int = 8
    """Size of a sample's negatives in a message."""
    num_actors: int = 1
    """Number of actors that make them; affects speed only."""
    prefetch_chunks: int = 4
    """Number of chunks whose negatives are requested ahead of the chunk that is trained on."""
    prediction_delay: int | None = None
    """Minibatches after which a label drawn by the readout is used; None if none are drawn."""
    store: Store | None = None
    """Where they are read from, and written to if they are missing; None for neither."""


class Shard(NamedTuple):
    """The negatives of a shard of samples."""

    number: int
    """Counted within the epoch."""
    negatives: Tensor
    """As their kind returns them `[n, ...]`."""
    made_at: float
    """When they were made, in seconds since 1970."""
    make_s: float
    """Time to make them."""


class Drawn(NamedTuple):
    """Wrong labels that the readout drew for a chunk."""

    chunk: Train
    labels: Tensor
    """`[K, B]`, int64."""

    def added_to(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns a state of `HardLabels` with these labels added."""
        steps = torch.arange(self.chunk.step, self.chunk.step + len(self.labels))
        return state | {
            "pending_steps": torch.cat((state["pending_steps"], steps)),
            "pending_labels": torch.cat((state["pending_labels"], self.labels)),
        }


class NegativeSource:
    """Makes the negatives of whole shards before they are needed.

    Args:
        plan: Which negatives, and whether they are stored.
        images: uint8 images of each split `[N, D]`.
        labels: True labels of the training set `[N]`, int64.
        architecture: Of the network.
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
        """Returns a shard of an epoch: read from the store if it is there, otherwise newly drawn.

        Raises:
            NegativesError: The store is damaged, or the kind returned something invalid.
        """
        start = time.perf_counter()
        negatives = self._store.read(epoch, number) if self._store else None
        if negatives is None:
            samples = self._order.shard(epoch, number)
            source = generator(self._order.seed, "negatives", epoch, number)
            negatives = make_checked(self._kind, self._data, samples, source, labels_shown=self._labels_shown)
            if self._store:
                self._store.write(epoch, number, negatives)
        return Shard(number, negatives, time.time(), time.perf_counter() - start)


class HardLabels:
    """Replaces wrong labels by labels that the readout drew, after a fixed delay.

    The negative of a sample in minibatch q is the newest label drawn for it in a minibatch p with `q - p >= delay`,
    where minibatches are counted from the start of training. If there is none, the original label is kept.

    Args:
        order: SampleOrder of the training set.
        delay: In minibatches.
    """

    def __init__(self, order: SampleOrder, delay: int) -> None:
        self._order, self._delay = order, delay
        self._newest = torch.full((order.num_samples,), -1)
        self._pending: deque[tuple[int, Tensor]] = deque()  # by minibatch

    def take(self, drawn: Drawn) -> None:
        """Adds the labels of a chunk. Chunks must be added in order."""
        self._pending += enumerate(drawn.labels, drawn.chunk.step)

    def replace(self, chunk: Train, samples: Tensor, others: Tensor) -> Tensor:
        """Returns the labels of a chunk's samples `[K, B]`; those of `others` for samples without a drawn label."""
        labels = []
        for step, (these, other) in enumerate(zip(samples, others, strict=True), chunk.step):
            while self._pending and self._pending[0][0] <= step - self._delay:
                drawn_at, drawn = self._pending.popleft()
                epoch, first = divmod(drawn_at, self._order.num_minibatches)
                self._newest[self._order.indices(epoch, first, 1)[0]] = drawn
            newest = self._newest[these]
            labels.append(torch.where(newest < 0, other, newest))
        return torch.stack(labels)

    def state(self) -> dict[str, Tensor]:
        """Returns a copy of all labels: the newest of each sample `[N]`, and those that are not used yet."""
        steps, labels = zip(*self._pending, strict=True) if self._pending else ((), ())
        return {
            "newest": self._newest.clone(),
            "pending_steps": torch.tensor(steps, dtype=torch.int64),
            "pending_labels": torch.cat(
                [torch.empty(0, self._order.batch_size, dtype=torch.int64), *(row.unsqueeze(0) for row in labels)]
            ),
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        """Restores a state."""
        self._newest = state["newest"].clone()
        self._pending = deque(zip(state["pending_steps"].tolist(), state["pending_labels"], strict=True))


class Source:
    """Turns uint8 images and labels into the input rows of the first layer; part of the first stage.

    Images and labels are gathered for a whole chunk, but rows are made for each minibatch: on a GPU, the shape of a
    tensor determines the order in which it is summed.

    Args:
        architecture: Of the network.
        order: SampleOrder of the training set.
        device: Device on which rows are made, as torch names it.
        plan: How the run gets its negatives.
        jitter: Largest shift of a training image in each direction, in pixels.
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
        """Gathers what the rows of a chunk are made of.

        Args:
            chunk: The chunk.
            *arrived: The shards that contain its negatives, and newly drawn labels.

        Returns:
            The images `[K, B, D]`, uint8; negatives that are images, likewise; and, if labels are shown, the labels of
            the positive and the M negative rows of each sample `[K, (1 + M) B]`, int64.
        """
        samples = self._order.indices(chunk.epoch, chunk.first, chunk.num_minibatches)
        images, labels = self._images["train"][samples].to(self._device), self._labels[samples].to(self._device)
        shards = [part for part in arrived if isinstance(part, Shard)]
        first = chunk.first * self._order.batch_size
        slices = [
            shard.negatives[max(0, first - start) : first + samples.numel() - start]
            for shard, start in ((shard, shard.number * SHARD_SAMPLES) for shard in shards)
        ]
        negatives = torch.cat(slices)
        negatives = negatives.view(*samples.shape, *negatives.shape[1:])
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
        """Makes the rows of a minibatch from the output of `train`.

        Returns:
            B positive rows, M B negative rows and, if labels are shown, B neutral rows for the readout `[R, D']`. If no
            labels are shown, the readout uses the positive rows.
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
        """Returns only the rows of the readout pass of a chunk `[K, B, D]`."""
        samples = self._order.indices(chunk.epoch, chunk.first, chunk.num_minibatches)
        images = self._images["train"][samples].to(self._device)
        return self._architecture.neutral_rows(self._shifted(images, self._shifts(chunk)) if self._jitter else images)

    def evaluate(self, block: Evaluate) -> tuple[Tensor, Tensor]:
        """Returns the rows of a block with every label that is tried `[n, T, D]`, and for the readout `[n, D]`."""
        architecture = self._architecture
        images = self._images[block.split][block.first : block.first + block.num_samples].to(self._device)
        if not architecture.labels_shown:
            rows = architecture.rows(images, None)
            return rows.unsqueeze(1)[:, :0], rows
        return architecture.claiming_rows(images), architecture.neutral_rows(images)

    def _shifts(self, chunk: Train) -> Tensor:
        """Draws the shift of each sample's image, down and right `[K, 2, B]`, in [0, 2 * jitter]."""
        shape = (2, self._order.batch_size)
        return torch.stack(
            [
                torch.randint(2 * self._jitter + 1, shape, generator=generator(self._order.seed, "jitter", step))
                for step in range(chunk.step, chunk.step + chunk.num_minibatches)
            ]
        ).to(self._device)

    def _shifted(self, images: Tensor, shift: Tensor) -> Tensor:
        """Returns shifted images `[K, B, D]`; pixels from beyond the border are 0."""
        channels, height, width = self._architecture.shape
        padded = F.pad(images.reshape(-1, channels, height, width), (self._jitter,) * 4)
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)
        down, right = shift.transpose(0, 1).flatten(1)
        return windows[torch.arange(len(padded), device=padded.device), :, down, right].view(images.shape)
