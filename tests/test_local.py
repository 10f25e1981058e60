import pytest
import torch
from helpers import train_rows

from ffdist.ff.dense import DenseLayer
from ffdist.ff.forms import Form
from ffdist.ff.keyed import generator
from ffdist.ff.local import LocalLayer
from ffdist.ff.objectives import Rule
from ffdist.ff.optimizers import Update
from ffdist.ff.specs import Local

B = 5
UPDATE = Update(0.05, 0.01, momentum=0.5)
CASES = {
    "first layer of the paper": (Form((1, 28, 28)), Local(grid=4, stride=6, field=10, units=3)),
    "colour images": (Form((3, 9, 9)), Local(grid=3, stride=2, field=4, units=2)),
    "input from a local layer": (Form((6, 4, 4), channels_last=True), Local(grid=3, stride=1, field=2, units=40)),
    "label in every field": (Form((1, 6, 7), shared=10), Local(grid=2, stride=2, field=3, units=33)),
    "few units, label in every field": (Form((1, 6, 7), shared=10), Local(grid=2, stride=2, field=3, units=4)),
    "few units, input from a local layer": (
        Form((6, 4, 5), channels_last=True),
        Local(grid=3, stride=1, field=2, units=5),
    ),
    "many units, clipped at the border": (
        Form((3, 5, 5), shared=2, channels_last=True),
        Local(grid=5, stride=1, field=3, units=32),
    ),
    "fields inside the image": (Form((2, 9, 8)), Local(grid=2, stride=3, field=3, units=4)),
    "clipped at the border": (Form((3, 5, 5), shared=2), Local(grid=5, stride=1, field=3, units=3)),
}


def make_layer(form, spec) -> LocalLayer:
    layer = spec.build(form, rule=Rule(update=UPDATE), generator=generator(0, "layer")).double()
    layer.compute_dtype = torch.float64
    layer.refresh()
    return layer


def connections(form: Form, spec: Local):
    """Yields the field, the index in its weights and the index in an input row, for every input of every field."""
    channels, height, width = form.shape
    for grid_row in range(spec.grid):
        for grid_column in range(spec.grid):
            for y in range(spec.field):
                for x in range(spec.field):
                    row = (height - (spec.grid - 1) * spec.stride - spec.field) // 2 + grid_row * spec.stride + y
                    column = (width - (spec.grid - 1) * spec.stride - spec.field) // 2 + grid_column * spec.stride + x
                    if not (0 <= row < height and 0 <= column < width):
                        continue
                    for channel in range(channels):
                        input_index = (channel * height + row) * width + column
                        if form.channels_last:
                            input_index = (row * width + column) * channels + channel
                        yield grid_row * spec.grid + grid_column, (y * spec.field + x) * channels + channel, input_index
            for shared_index in range(form.shared):
                yield (
                    grid_row * spec.grid + grid_column,
                    spec.field**2 * channels + shared_index,
                    form.size + shared_index,
                )


def make_masked_dense(layer: LocalLayer, form, spec) -> tuple[DenseLayer, torch.Tensor]:
    """Returns a dense layer with the same weights, which are zero where a unit has no input, and their mask."""
    units = spec.grid**2 * spec.units
    dense = DenseLayer(Form((units,)), (units, form.width), rule=Rule(update=UPDATE)).double()
    dense.compute_dtype, mask = torch.float64, torch.zeros_like(dense.weight)
    weight_by_field, mask_by_field = (each.view(spec.grid**2, spec.units, -1) for each in (dense.weight, mask))
    for field, weight_index, input_index in connections(form, spec):
        weight_by_field[field, :, input_index] = layer.weight[field, :, weight_index]
        mask_by_field[field, :, input_index] = 1
    dense.refresh()
    return dense, mask


@pytest.mark.parametrize(("form", "spec"), CASES.values(), ids=CASES)
def test_local_layer_equals_a_masked_dense_layer(form, spec):
    layer = make_layer(form, spec)
    dense, mask = make_masked_dense(layer, form, spec)
    for step in range(3):
        rows = torch.randn(4 * B, form.width, generator=generator(1, "rows", step), dtype=torch.float64)
        expected, metrics = train_rows(dense, rows, B, 2)
        dense.weight *= mask
        dense.optimizer.get_buffer("weight/gradient").mul_(mask)
        dense.refresh()
        output, local_metrics = train_rows(layer, rows, B, 2)
        torch.testing.assert_close(output.activations, expected.activations)
        torch.testing.assert_close(output.scores, expected.scores)
        torch.testing.assert_close(local_metrics, metrics, equal_nan=True)
    final, _ = make_masked_dense(layer, form, spec)
    torch.testing.assert_close(final.weight, dense.weight)


def test_weights_beyond_the_border_stay_zero():
    form, spec = CASES["clipped at the border"]
    layer = make_layer(form, spec)
    is_connected = torch.zeros(layer.weight.shape, dtype=torch.bool)
    for field, weight_index, _ in connections(form, spec):
        is_connected[field, :, weight_index] = True
    for step in range(3):
        train_rows(layer, torch.randn(3 * B, 77, generator=generator(2, "rows", step)).double(), B)
    assert not layer.weight[~is_connected].any()
    assert layer.weight[is_connected].all()


def test_layers_of_the_paper_have_the_published_sizes():
    form = Form((1, 28, 28))
    first, second, third = (
        Local(grid=4, stride=6, field=10, units=128),
        Local(grid=3, stride=1, field=2, units=220),
        Local(grid=2, stride=1, field=2, units=512),
    )
    assert first.starts(28) == [0, 6, 12, 18]
    assert (second.starts(4), third.starts(3)) == ([0, 1, 2], [0, 1])
    assert [spec.output_form(form).size for spec in (first, second, third)] == [2048, 1980, 2048]
    cifar = Local(grid=32, stride=1, field=11, units=3)
    assert (cifar.starts(32)[0], cifar.starts(32)[-1]) == (-5, 26)
    assert cifar.output_form(form).size == 3072


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; set CUDA_VISIBLE_DEVICES=0")
@pytest.mark.parametrize("name", ["first layer of the paper", "input from a local layer"])
def test_layer_moved_to_a_gpu_can_be_trained(name):
    form, spec = CASES[name]
    layer = spec.build(form, generator=generator(0, "layer")).to("cuda")
    output, _ = train_rows(layer, torch.rand(3 * B, form.width, device="cuda"), B)
    assert output.activations.isfinite().all()
