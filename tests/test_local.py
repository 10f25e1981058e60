import pytest
import torch

from ffdist.ff.keyed import generator
from ffdist.ff.layers import Dense, Rule
from ffdist.ff.local import Fields, Local, Map
from ffdist.ff.optimizers import Update

B = 5
UPDATE = Update(0.05, 0.01, momentum=0.5)
CASES = {
    "the paper's first layer": (Map(28, 28, 1, channels_first=True), Fields(4, 6, 10, 3), 0),
    "colour images": (Map(9, 9, 3, channels_first=True), Fields(3, 2, 4, 2), 0),
    "on a local layer": (Map(4, 4, 6), Fields(3, 1, 2, 40), 0),
    "a label in every field": (Map(6, 7, 1, channels_first=True), Fields(2, 2, 3, 33), 10),
    "few units and a label in every field": (Map(6, 7, 1, channels_first=True), Fields(2, 2, 3, 4), 10),
    "few units on a local layer": (Map(4, 5, 6), Fields(3, 1, 2, 5), 0),
    "many units, clipped at the border": (Map(5, 5, 3), Fields(5, 1, 3, 32), 2),
    "fields within the border": (Map(9, 8, 2, channels_first=True), Fields(2, 3, 3, 4), 0),
    "clipped at the border": (Map(5, 5, 3, channels_first=True), Fields(5, 1, 3, 3), 2),
}


def a_layer(below, fields, shared) -> Local:
    layer = Local(below, fields, shared=shared, rule=Rule(update=UPDATE), generator=generator(0, "layer")).double()
    layer.compute_dtype = torch.float64
    layer.refresh()
    return layer


def reads(below: Map, fields: Fields, shared: int):
    """What a row's value is for each unit, the slow way: (unit, place of the weight, value of the row)."""
    for down in range(fields.grid):
        for right in range(fields.grid):
            for y in range(fields.field):
                for x in range(fields.field):
                    row = (below.height - (fields.grid - 1) * fields.stride - fields.field) // 2
                    column = (below.width - (fields.grid - 1) * fields.stride - fields.field) // 2
                    row, column = row + down * fields.stride + y, column + right * fields.stride + x
                    if not (0 <= row < below.height and 0 <= column < below.width):
                        continue
                    for depth in range(below.depth):
                        value = (
                            (depth * below.height + row) * below.width + column
                            if below.channels_first
                            else (row * below.width + column) * below.depth + depth
                        )
                        yield down * fields.grid + right, (y * fields.field + x) * below.depth + depth, value
            for extra in range(shared):
                yield down * fields.grid + right, fields.field**2 * below.depth + extra, below.values + extra


def masked(layer: Local, below, fields, shared) -> tuple[Dense, torch.Tensor]:
    """A dense layer with the same weights and zeros where a unit does not look; and where it does."""
    dense = Dense(below.values + shared, fields.grid**2 * fields.units, rule=Rule(update=UPDATE)).double()
    dense.compute_dtype, mask = torch.float64, torch.zeros_like(dense.weight)
    by_place, mask_by_place = (
        dense.weight.view(fields.grid**2, fields.units, -1),
        mask.view(fields.grid**2, fields.units, -1),
    )
    for place, source, value in reads(below, fields, shared):
        by_place[place, :, value] = layer.weight[place, :, source]
        mask_by_place[place, :, value] = 1
    dense.refresh()
    return dense, mask


@pytest.mark.parametrize(("below", "fields", "shared"), CASES.values(), ids=CASES)
def test_local_layer_equals_a_masked_dense_layer(below, fields, shared):
    layer = a_layer(below, fields, shared)
    dense, mask = masked(layer, below, fields, shared)
    for step in range(3):
        rows = torch.randn(4 * B, below.values + shared, generator=generator(1, "rows", step), dtype=torch.float64)
        expected, metrics = dense.train_minibatch(rows, batch=B, negatives=2)
        dense.weight *= mask
        dense.weight_gradient *= mask
        dense.refresh()
        passed, local_metrics = layer.train_minibatch(rows, batch=B, negatives=2)
        torch.testing.assert_close(passed.activity, expected.activity)
        torch.testing.assert_close(passed.goodness, expected.goodness)
        torch.testing.assert_close(local_metrics, metrics, equal_nan=True)
    again, _ = masked(layer, below, fields, shared)
    torch.testing.assert_close(again.weight, dense.weight)


def test_weights_beyond_the_border_stay_zero():
    below, fields, shared = CASES["clipped at the border"]
    layer = a_layer(below, fields, shared)
    seen = torch.zeros(layer.weight.shape, dtype=torch.bool)
    for place, source, _ in reads(below, fields, shared):
        seen[place, :, source] = True
    for step in range(3):
        layer.train_minibatch(torch.randn(3 * B, 77, generator=generator(2, "rows", step)).double(), batch=B)
    assert not layer.weight[~seen].any()
    assert layer.weight[seen].all()


def test_the_papers_layers_have_the_papers_sizes():
    first, second, third = Fields(4, 6, 10, 128), Fields(3, 1, 2, 220), Fields(2, 1, 2, 512)
    assert first.starts(28) == [0, 6, 12, 18]
    assert (second.starts(4), third.starts(3)) == ([0, 1, 2], [0, 1])
    assert [fields.above().values for fields in (first, second, third)] == [2048, 1980, 2048]
    cifar = Fields(32, 1, 11, 3)
    assert (cifar.starts(32)[0], cifar.starts(32)[-1]) == (-5, 26)
    assert cifar.above().values == 3072


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; set CUDA_VISIBLE_DEVICES=0")
@pytest.mark.parametrize("name", ["the paper's first layer", "on a local layer"])
def test_a_layer_that_moves_trains_where_it_is(name):
    below, fields, shared = CASES[name]
    layer = Local(below, fields, shared=shared, generator=generator(0, "layer")).to("cuda")
    passed, _ = layer.train_minibatch(torch.rand(3 * B, below.values + shared, device="cuda"), batch=B)
    assert passed.activity.isfinite().all()
