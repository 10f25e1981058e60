"""The start of the stream: which negative a sample has, and what a row shows."""

import pytest
import torch
from helpers import image_architecture

from ffdist.data.negatives_store import Store
from ffdist.data.order import SHARD_SAMPLES, SampleOrder
from ffdist.ff.keyed import generator
from ffdist.pipeline.schedule import Train
from ffdist.pipeline.source import Drawn, HardLabels, NegativePlan, NegativeSource, Shard, Source

SHAPE, CLASSES = (1, 4, 4), 5
ORDER = SampleOrder(seed=2, num_samples=43, batch_size=4)
LABELS = torch.arange(43) % CLASSES
IMAGES = {"train": torch.randint(1, 256, (43, 16), dtype=torch.uint8, generator=generator(0, "images"))}


def chunks(epochs: int, chunk_size: int):
    for epoch in range(epochs):
        for first in range(0, ORDER.num_minibatches, chunk_size):
            count = min(chunk_size, ORDER.num_minibatches - first)
            yield Train(epoch, first, count, epoch * ORDER.num_minibatches + first, 1.0)


def drawn_at(step: int) -> torch.Tensor:
    return torch.randint(CLASSES, (4,), generator=generator(3, "drawn", step))


@pytest.mark.parametrize("delay", [1, 3, 7, 10, 25])
@pytest.mark.parametrize("chunk_size", [1, 3, 10])
def test_hard_label_is_the_newest_that_was_drawn_a_delay_ago(delay, chunk_size):
    """The rule, the slow way: of all minibatches p with q - p >= delay that had the sample, the last."""
    if chunk_size > delay:
        return
    hard, labels, waiting = HardLabels(ORDER, delay), {}, []
    for chunk in chunks(4, chunk_size):
        last = chunk.step + chunk.num_minibatches - 1
        while waiting and waiting[0].chunk.step <= last - delay:  # as the driver delivers them
            hard.take(waiting.pop(0))
        samples = ORDER.indices(chunk.epoch, chunk.first, chunk.num_minibatches)
        replaced = hard.replace(chunk, samples, torch.full(samples.shape, -7))
        for step, (seen, found) in enumerate(zip(samples, replaced, strict=True), chunk.step):
            for sample, label in zip(seen.tolist(), found.tolist(), strict=True):
                old_enough = [value for past, value in labels.get(sample, []) if step - past >= delay]
                assert label == (old_enough[-1] if old_enough else -7)
        steps = range(chunk.step, last + 1)
        waiting.append(Drawn(chunk, torch.stack([drawn_at(step) for step in steps])))
        for step, seen in zip(steps, samples, strict=True):
            for sample, value in zip(seen.tolist(), drawn_at(step).tolist(), strict=True):
                labels.setdefault(sample, []).append((step, value))
    assert any(len(drawn) > 2 for drawn in labels.values())


def a_source(plan: NegativePlan, jitter=0, **changes) -> tuple[Source, NegativeSource]:
    architecture = image_architecture(SHAPE, CLASSES, (8, 8), jitter=jitter, **changes)
    return Source(architecture, ORDER, "cpu", plan, IMAGES, LABELS), NegativeSource(
        plan, IMAGES, LABELS, architecture, ORDER
    )


def rows_of(source: Source, chunk: Train, *arrived: Shard | Drawn) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of a chunk: those that no readout reads, and those that it does."""
    parts = source.train(chunk, *arrived)
    rows = torch.stack([source.rows(minibatch) for minibatch in zip(*parts, strict=True)])
    if source._architecture.labels_shown:
        return rows[:, :-1].flatten(1, 2), rows[:, -1]
    return rows[:, 1:].flatten(1, 2), rows[:, 0]


def test_all_wrong_shows_every_label_once():
    source, negatives = a_source(NegativePlan("all_wrong"), label="append")
    chunk = Train(0, 2, 3, 2, 1.0)
    signal, read = rows_of(source, chunk, negatives.make(0, 0))
    assert signal.shape == (3, 4 * CLASSES, 16 + CLASSES)
    shown = signal[..., 16:].argmax(-1).view(3, CLASSES, 4)
    assert torch.equal(shown[:, 0], LABELS[ORDER.indices(0, 2, 3)])
    assert torch.equal(shown.sort(1).values, torch.arange(CLASSES).view(1, -1, 1).expand(3, -1, 4))
    pixels = signal[..., :16] / signal[..., :16].norm(dim=-1, keepdim=True)
    torch.testing.assert_close(pixels.view(3, CLASSES, 4, 16), pixels[:, :4].unsqueeze(1).expand(-1, CLASSES, -1, -1))
    assert read.shape == (3, 4, 16 + CLASSES)


def test_a_negative_image_stands_under_its_samples_own_label():
    source, negatives = a_source(NegativePlan("noise"), label="append")
    chunk = Train(1, 0, 2, 10, 1.0)
    signal, _ = rows_of(source, chunk, negatives.make(1, 0))
    labels = LABELS[ORDER.indices(1, 0, 2)]
    assert torch.equal(signal[..., 16:].argmax(-1), torch.cat((labels, labels), 1))
    assert not torch.allclose(signal[:, :4, :16], signal[:, 4:, :16])


def test_without_labels_the_positives_are_what_the_readout_reads():
    source, negatives = a_source(NegativePlan("noise"), label="none")
    signal, read = rows_of(source, Train(0, 0, 2, 0, 1.0), negatives.make(0, 0))
    assert signal.shape == read.shape == (2, 4, 16)
    raw = IMAGES["train"][ORDER.indices(0, 0, 2)].float()
    torch.testing.assert_close(read, raw / raw.square().mean(-1, keepdim=True).sqrt())


def test_label_scale_is_the_value_of_the_label():
    one, negatives = a_source(NegativePlan("wrong_label"), label="append")
    scaled, _ = a_source(NegativePlan("wrong_label"), label="append", label_scale=3.0)
    chunk, shard = Train(0, 0, 1, 0, 1.0), negatives.make(0, 0)
    (rows, neutral), (larger, neutral_larger) = rows_of(one, chunk, shard), rows_of(scaled, chunk, shard)
    for row, other in ((rows, larger), (neutral, neutral_larger)):
        ratio = (other[..., 16:].amax(-1) / other[..., 0]) / (row[..., 16:].amax(-1) / row[..., 0])
        torch.testing.assert_close(ratio, torch.full_like(ratio, 3.0))


def test_jitter_shifts_each_sample_alike_in_all_its_rows_and_afresh_every_epoch():
    source, negatives = a_source(NegativePlan("wrong_label"), jitter=1, label="append")
    shifts = []
    for epoch in range(2):
        chunk = Train(epoch, 0, 10, 10 * epoch, 1.0)
        signal, read = rows_of(source, chunk, negatives.make(epoch, 0))
        for minibatch, samples in enumerate(ORDER.indices(epoch, 0, 10)):
            for place, sample in enumerate(samples):
                padded = torch.nn.functional.pad(IMAGES["train"][sample].view(4, 4).float(), (1, 1, 1, 1))
                rows = [signal[minibatch, place], signal[minibatch, 4 + place], read[minibatch, place]]
                patterns = [row[:16] / row[:16].norm() for row in rows]
                found = [
                    (down, right)
                    for down in range(3)
                    for right in range(3)
                    for window in [padded[down : down + 4, right : right + 4].flatten()]
                    if all(torch.allclose(pattern, window / window.norm(), atol=1e-5) for pattern in patterns)
                ]
                assert len(found) == 1
                shifts.append((epoch, int(sample), *found[0]))
    assert len({shift[2:] for shift in shifts}) == 9
    by_sample = {epoch: {shift[1]: shift[2:] for shift in shifts if shift[0] == epoch} for epoch in (0, 1)}
    assert any(by_sample[0][sample] != by_sample[1][sample] for sample in by_sample[0].keys() & by_sample[1].keys())


def test_a_chunk_across_shards_gets_the_negatives_of_its_own_samples():
    order = SampleOrder(0, 2 * SHARD_SAMPLES + 100, 1000)
    labels = torch.arange(order.num_samples) % 7
    images = {"train": torch.zeros(order.num_samples, 1, dtype=torch.uint8)}
    architecture = image_architecture((1, 1, 1), 7, (3,), label="append", predict_from=1)
    plan = NegativePlan("fixed")
    source = Source(architecture, order, "cpu", plan, images, labels)
    negatives = NegativeSource(plan, images, labels, architecture, order)
    assert [list(order.shards(first, 4)) for first in (0, 3, 4, 6)] == [[0], [0, 1], [0, 1], [1]]
    signal, _ = rows_of(source, Train(3, 3, 4, 33, 1.0), negatives.make(3, 0), negatives.make(3, 1))
    every = torch.empty_like(labels)
    for number in range(3):
        every[order.shard(0, number)] = negatives.make(0, number).negatives
    assert torch.equal(signal[:, 1000:, 1:].argmax(-1), every[order.indices(3, 3, 4)])


def test_negatives_from_a_store_are_those_that_were_drawn(tmp_path):
    _, drawn = a_source(NegativePlan("hybrid"))
    _, stored = a_source(NegativePlan("hybrid", store=Store(str(tmp_path), {"seed": 2})))
    for _ in range(2):  # made, then read
        assert torch.equal(stored.make(4, 0).negatives, drawn.make(4, 0).negatives)
    assert [entry.epoch for entry in Store(str(tmp_path)).entries()] == [4]
