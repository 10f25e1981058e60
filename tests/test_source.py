"""Tests of the source: the negatives of the samples, and the content of the rows."""

import pytest
import torch
from helpers import image_architecture

from ffdist.data.negatives_store import Store
from ffdist.data.order import SHARD_SAMPLES, SampleOrder
from ffdist.ff.keyed import generator
from ffdist.ff.labels import join
from ffdist.pipeline.schedule import Train
from ffdist.pipeline.source import Drawn, HardLabels, NegativePlan, NegativeSource, Shard, Source

SHAPE, CLASSES = (1, 4, 4), 5
ORDER = SampleOrder(seed=2, num_samples=43, batch_size=4)
LABELS = torch.arange(43) % CLASSES
IMAGES = {"train": torch.randint(1, 256, (43, 16), dtype=torch.uint8, generator=generator(0, "images"))}


def make_chunks(epochs: int, chunk_size: int):
    for epoch in range(epochs):
        for first in range(0, ORDER.num_minibatches, chunk_size):
            count = min(chunk_size, ORDER.num_minibatches - first)
            yield Train(epoch, first, count, epoch * ORDER.num_minibatches + first, 1.0)


def draw_labels(step: int) -> torch.Tensor:
    return torch.randint(CLASSES, (4,), generator=generator(3, "drawn", step))


@pytest.mark.parametrize("delay", [1, 3, 7, 10, 25])
@pytest.mark.parametrize("chunk_size", [1, 3, 10])
def test_hard_label_is_the_newest_of_at_least_delay_minibatches_ago(delay, chunk_size):
    """Compares with a slow reference: in minibatch q, the newest label of a minibatch p with q - p >= delay."""
    if chunk_size > delay:
        return
    hard_labels, history, pending = HardLabels(ORDER, delay), {}, []
    for chunk in make_chunks(4, chunk_size):
        last = chunk.step + chunk.num_minibatches - 1
        while pending and pending[0].chunk.step <= last - delay:  # as in the driver
            hard_labels.take(pending.pop(0))
        samples = ORDER.indices(chunk.epoch, chunk.first, chunk.num_minibatches)
        result = hard_labels.replace(chunk, samples, torch.full(samples.shape, -7))
        for step, (batch, new_labels) in enumerate(zip(samples, result, strict=True), chunk.step):
            for sample, label in zip(batch.tolist(), new_labels.tolist(), strict=True):
                candidates = [value for past_step, value in history.get(sample, []) if step - past_step >= delay]
                assert label == (candidates[-1] if candidates else -7)
        steps = range(chunk.step, last + 1)
        pending.append(Drawn(chunk, torch.stack([draw_labels(step) for step in steps])))
        for step, batch in zip(steps, samples, strict=True):
            for sample, value in zip(batch.tolist(), draw_labels(step).tolist(), strict=True):
                history.setdefault(sample, []).append((step, value))
    assert any(len(values) > 2 for values in history.values())


def make_sources(plan: NegativePlan, jitter=0, **settings) -> tuple[Source, NegativeSource]:
    architecture = image_architecture(SHAPE, CLASSES, (8, 8), jitter=jitter, **settings)
    return Source(architecture, ORDER, "cpu", plan, IMAGES, LABELS), NegativeSource(
        plan, IMAGES, LABELS, architecture, ORDER
    )


def make_rows(source: Source, chunk: Train, *arrived: Shard | Drawn) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the rows of a chunk that the readout does not read, and those that it reads."""
    parts = source.train(chunk, *arrived)
    rows = torch.stack([join(source.rows(minibatch)) for minibatch in zip(*parts, strict=True)])
    if source._architecture.labels_shown:
        return rows[:, :-1].flatten(1, 2), rows[:, -1]
    return rows[:, 1:].flatten(1, 2), rows[:, 0]


def test_all_wrong_shows_every_label_once():
    source, negatives = make_sources(NegativePlan("all_wrong"), label="append")
    chunk = Train(0, 2, 3, 2, 1.0)
    rows, readout_rows = make_rows(source, chunk, negatives.make(0, 0))
    assert rows.shape == (3, 4 * CLASSES, 16 + CLASSES)
    labels = rows[..., 16:].argmax(-1).view(3, CLASSES, 4)
    assert torch.equal(labels[:, 0], LABELS[ORDER.indices(0, 2, 3)])
    assert torch.equal(labels.sort(1).values, torch.arange(CLASSES).view(1, -1, 1).expand(3, -1, 4))
    pixels = rows[..., :16] / rows[..., :16].norm(dim=-1, keepdim=True)
    torch.testing.assert_close(pixels.view(3, CLASSES, 4, 16), pixels[:, :4].unsqueeze(1).expand(-1, CLASSES, -1, -1))
    assert readout_rows.shape == (3, 4, 16 + CLASSES)


def test_negative_image_has_the_label_of_its_sample():
    source, negatives = make_sources(NegativePlan("noise"), label="append")
    chunk = Train(1, 0, 2, 10, 1.0)
    rows, _ = make_rows(source, chunk, negatives.make(1, 0))
    labels = LABELS[ORDER.indices(1, 0, 2)]
    assert torch.equal(rows[..., 16:].argmax(-1), torch.cat((labels, labels), 1))
    assert not torch.allclose(rows[:, :4, :16], rows[:, 4:, :16])


def test_without_labels_the_readout_reads_the_positive_rows():
    source, negatives = make_sources(NegativePlan("noise"), label="none")
    rows, readout_rows = make_rows(source, Train(0, 0, 2, 0, 1.0), negatives.make(0, 0))
    assert rows.shape == readout_rows.shape == (2, 4, 16)
    raw = IMAGES["train"][ORDER.indices(0, 0, 2)].float()
    torch.testing.assert_close(readout_rows, raw / raw.square().mean(-1, keepdim=True).sqrt())


def test_label_scale_multiplies_the_label_value():
    source, negatives = make_sources(NegativePlan("wrong_label"), label="append")
    scaled_source, _ = make_sources(NegativePlan("wrong_label"), label="append", label_scale=3.0)
    chunk, shard = Train(0, 0, 1, 0, 1.0), negatives.make(0, 0)
    (rows, neutral), (scaled_rows, scaled_neutral) = (
        make_rows(source, chunk, shard),
        make_rows(scaled_source, chunk, shard),
    )
    for original, scaled in ((rows, scaled_rows), (neutral, scaled_neutral)):
        ratio = (scaled[..., 16:].amax(-1) / scaled[..., 0]) / (original[..., 16:].amax(-1) / original[..., 0])
        torch.testing.assert_close(ratio, torch.full_like(ratio, 3.0))


def test_jitter_is_equal_in_all_rows_of_a_sample_and_differs_between_epochs():
    source, negatives = make_sources(NegativePlan("wrong_label"), jitter=1, label="append")
    shifts = []
    for epoch in range(2):
        chunk = Train(epoch, 0, 10, 10 * epoch, 1.0)
        rows, readout_rows = make_rows(source, chunk, negatives.make(epoch, 0))
        for minibatch, samples in enumerate(ORDER.indices(epoch, 0, 10)):
            for position, sample in enumerate(samples):
                padded = torch.nn.functional.pad(IMAGES["train"][sample].view(4, 4).float(), (1, 1, 1, 1))
                sample_rows = [
                    rows[minibatch, position],
                    rows[minibatch, 4 + position],
                    readout_rows[minibatch, position],
                ]
                patterns = [row[:16] / row[:16].norm() for row in sample_rows]
                matches = [
                    (down, right)
                    for down in range(3)
                    for right in range(3)
                    for window in [padded[down : down + 4, right : right + 4].flatten()]
                    if all(torch.allclose(pattern, window / window.norm(), atol=1e-5) for pattern in patterns)
                ]
                assert len(matches) == 1
                shifts.append((epoch, int(sample), *matches[0]))
    assert len({shift[2:] for shift in shifts}) == 9
    by_sample = {epoch: {shift[1]: shift[2:] for shift in shifts if shift[0] == epoch} for epoch in (0, 1)}
    assert any(by_sample[0][sample] != by_sample[1][sample] for sample in by_sample[0].keys() & by_sample[1].keys())


def test_chunk_across_shards_gets_the_negatives_of_its_samples():
    order = SampleOrder(0, 2 * SHARD_SAMPLES + 100, 1000)
    labels = torch.arange(order.num_samples) % 7
    images = {"train": torch.zeros(order.num_samples, 1, dtype=torch.uint8)}
    architecture = image_architecture((1, 1, 1), 7, (3,), label="append", predict_from=1)
    plan = NegativePlan("fixed")
    source = Source(architecture, order, "cpu", plan, images, labels)
    negatives = NegativeSource(plan, images, labels, architecture, order)
    assert [list(order.shards(first, 4)) for first in (0, 3, 4, 6)] == [[0], [0, 1], [0, 1], [1]]
    rows, _ = make_rows(source, Train(3, 3, 4, 33, 1.0), negatives.make(3, 0), negatives.make(3, 1))
    expected = torch.empty_like(labels)
    for number in range(3):
        expected[order.shard(0, number)] = negatives.make(0, number).negatives
    assert torch.equal(rows[:, 1000:, 1:].argmax(-1), expected[order.indices(3, 3, 4)])


def test_stored_negatives_equal_newly_drawn_ones(tmp_path):
    _, without_store = make_sources(NegativePlan("hybrid"))
    _, with_store = make_sources(NegativePlan("hybrid", store=Store(str(tmp_path), {"seed": 2})))
    for _ in range(2):  # written to the store, then read from it
        assert torch.equal(with_store.make(4, 0).negatives, without_store.make(4, 0).negatives)
    assert [entry.epoch for entry in Store(str(tmp_path)).entries()] == [4]
