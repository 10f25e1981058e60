"""The start of the pipeline: samples get their negatives, and become input rows.

negative actors -- prefetched shards -----> first stage: Source --> rows
readout ---------- labels drawn `prediction_delay` minibatches ago ----^   (hard labels)
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ffdist.data.negatives_store import Store
from ffdist.data.order import SHARD_SAMPLES, SampleOrder
from ffdist.ff.architecture import Architecture
from ffdist.ff.keyed import generator
from ffdist.ff.labels import Rows, join, neutral, one_hot
from ffdist.ff.negatives import TrainingSet, find_kind, make_checked
from ffdist.pipeline.schedule import Evaluate, Train


@dataclass(frozen=True)
class NegativePlan:
    """How a run gets its negatives."""

    kind: str
    """A key of `KINDS`, a user's `package.module:function`, or `none`."""
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

    @classmethod
    def none(cls) -> "NegativePlan":
        """Returns the plan of a run without negatives."""
        return cls("none", per_sample=0, sample_bytes=0, num_actors=0, prefetch_chunks=0)


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
        samples: Samples of each split `[N, D]`.
        labels: True labels of the training set `[N]`, int64.
        architecture: Of the network.
        order: SampleOrder of the training set.
    """

    def __init__(
        self,
        plan: NegativePlan,
        samples: dict[str, Tensor],
        labels: Tensor,
        architecture: Architecture,
        order: SampleOrder,
    ) -> None:
        self._data = TrainingSet(samples["train"], labels, architecture.classes, architecture.encoder.shape, order.seed)
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
            indices = self._order.shard(epoch, number)
            source = generator(self._order.seed, "negatives", epoch, number)
            negatives = make_checked(self._kind, self._data, indices, source, labels_shown=self._labels_shown)
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
    """Turns samples and labels into the input rows of the first layer; part of the first stage.

    Samples and labels are gathered for a whole chunk, but rows are made for each minibatch: on a GPU, the shape of a
    tensor determines the order in which it is summed.

    Shapes: `K` minibatches of a chunk, `B` samples of a minibatch, `M` negatives per sample, `D` values of a sample.

    Args:
        architecture: Of the network.
        order: SampleOrder of the training set.
        device: Device on which rows are made, as torch names it.
        plan: How the run gets its negatives.
        samples: Samples of each split `[N, D]`.
        labels: True labels of the training set `[N]`, int64.
    """

    def __init__(
        self,
        architecture: Architecture,
        order: SampleOrder,
        device: str,
        plan: NegativePlan,
        samples: dict[str, Tensor],
        labels: Tensor,
    ) -> None:
        self._architecture, self._encoder, self._order = architecture, architecture.encoder, order
        self._device, self._samples, self._labels = device, samples, labels
        self._has_negatives = plan.num_actors > 0
        self.hard_labels = HardLabels(order, plan.prediction_delay) if plan.prediction_delay else None

    def train(self, chunk: Train, *arrived: Shard | Drawn) -> list[Tensor]:
        """Gathers the samples and labels of a chunk.

        Args:
            chunk: The chunk.
            *arrived: The shards that contain its negatives, and newly drawn labels.

        Returns:
            The samples `[K, B, D]`; negatives that are samples `[K, B, D]`; and, if labels are shown, the labels of the
            positive and the M negative passes `[K, 1 + M, B]`, int64. Without negatives, only the samples.
        """
        indices = self._order.indices(chunk.epoch, chunk.first, chunk.num_minibatches)
        samples, labels = self._samples["train"][indices].to(self._device), self._labels[indices].to(self._device)
        if not self._has_negatives:
            return [
                self._encoder.augment(samples, self._draw_augmentation(chunk)) if self._encoder.augments else samples
            ]
        negatives = self._negatives(chunk, indices, arrived).to(self._device)
        parts = [samples]
        if negatives.dtype == samples.dtype:
            parts, negatives = [samples, negatives], labels
        if self._encoder.augments:
            drawn = self._draw_augmentation(chunk)
            parts = [self._encoder.augment(part, drawn) for part in parts]
        if self._architecture.labels_shown:
            wrong = negatives.unsqueeze(-1) if negatives.dim() == 2 else negatives  # [K, B, M]
            parts.append(torch.cat((labels.unsqueeze(1), wrong.transpose(1, 2)), 1))
        return parts

    def _negatives(self, chunk: Train, indices: Tensor, arrived: Sequence[Shard | Drawn]) -> Tensor:
        """Returns the negatives of a chunk `[K, B, ...]`, as their kind returns them."""
        shards = [part for part in arrived if isinstance(part, Shard)]
        first = chunk.first * self._order.batch_size
        slices = [
            shard.negatives[max(0, first - start) : first + indices.numel() - start]
            for shard, start in ((shard, shard.number * SHARD_SAMPLES) for shard in shards)
        ]
        negatives = torch.cat(slices)
        negatives = negatives.view(*indices.shape, *negatives.shape[1:])
        if not self.hard_labels:
            return negatives
        for part in arrived:
            if isinstance(part, Drawn):
                self.hard_labels.take(part)
        return self.hard_labels.replace(chunk, indices, negatives)

    def rows(self, parts: Sequence[Tensor]) -> Rows:
        """Makes the rows of a minibatch from the output of `train`.

        Returns:
            The positive pass, the M negative passes and, if labels are shown and there is a readout, the neutral pass
            `[P, B, D']`. If no labels are shown, the readout uses the positive pass.
        """
        architecture, (samples, *rest) = self._architecture, parts
        if not architecture.labels_shown:
            return architecture.unlabeled_rows(torch.stack([samples, *rest]))
        *others, labels = rest
        claims = one_hot(labels, architecture.classes)
        if architecture.has_neutral:
            claims = torch.cat((claims, neutral(samples, architecture.classes).unsqueeze(0)))
        passes = [samples]  # of all passes, if they differ only in the label
        if others:
            passes += others * (len(labels) - 1) + [samples] * architecture.has_neutral
        return architecture.labeled_rows(torch.stack(passes), claims)

    def read(self, chunk: Train) -> Tensor:
        """Returns only the rows of the readout pass of a chunk `[K, B, D']`."""
        indices = self._order.indices(chunk.epoch, chunk.first, chunk.num_minibatches)
        samples = self._samples["train"][indices].to(self._device)
        if self._encoder.augments:
            samples = self._encoder.augment(samples, self._draw_augmentation(chunk))
        return join(self._architecture.neutral_rows(samples), self._architecture.compute_dtype)

    def evaluate(self, block: Evaluate) -> Rows:
        """Returns the rows of a block: with every label that is tried, and for the readout `[n, T + 1, D']`."""
        architecture = self._architecture
        samples = self._samples[block.split][block.first : block.first + block.num_samples].to(self._device)
        if not architecture.labels_shown:
            return architecture.unlabeled_rows(samples.unsqueeze(1))
        return architecture.claiming_rows(samples, with_neutral=True)

    def _draw_augmentation(self, chunk: Train) -> Tensor:
        """Draws the random numbers for the augmentation of a chunk's samples `[K, ..., B]`."""
        seed, batch = self._order.seed, self._order.batch_size
        steps = range(chunk.step, chunk.step + chunk.num_minibatches)
        drawn = [self._encoder.draw_augmentation(batch, generator(seed, "jitter", step)) for step in steps]
        return torch.stack(drawn).to(self._device)
