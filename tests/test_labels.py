from copy import deepcopy

import pytest
import torch

from ffdist.ff.forms import Form
from ffdist.ff.labels import LABELS, LabeledRows, append, join, neutral, one_hot, overwrite
from ffdist.ff.layers import Minibatch, Passes
from ffdist.ff.objectives import Rule
from ffdist.ff.specs import Dense, Local


def test_overwrite_clears_the_first_pixels_in_a_copy():
    images = torch.rand(4, 20)
    before = images.clone()
    result, place = overwrite(images, 3)
    assert torch.equal(images, before)
    assert result[:, place].tolist() == [[0, 0, 0]] * 4
    assert torch.equal(result[:, 3:], images[:, 3:])


def test_append_keeps_every_pixel():
    images = torch.rand(4, 20)
    result, place = append(images, 5)
    assert torch.equal(result[:, :20], images)
    assert result[:, place].tolist() == [[0] * 5] * 4


def test_rows_are_samples_with_labels_times_factors():
    for place_label in LABELS.values():
        images, labels = torch.rand(4, 1, 20), torch.stack((one_hot(torch.tensor(2), 3), neutral(torch.zeros(1), 3)))
        samples, place = place_label(images, 3)
        rows = LabeledRows(samples, labels.unsqueeze(0), torch.full((4, 2), 0.5), place)
        joined = join(rows)
        assert joined.shape == rows.shape == (4, 2, samples.shape[-1])
        assert torch.equal(joined[3, :, place], labels / 2)
        assert torch.equal(joined[..., 3:20], images[..., 3:].expand(-1, 2, -1) / 2)
        assert torch.equal(join(rows[1:3]), joined[1:3])


SHAPE, CLASSES, B = (2, 6, 7), 3, 5
FIRST_LAYERS = {
    "overwrite": (Form(SHAPE), Dense(units=20)),
    "append": (Form(SHAPE, shared=CLASSES), Dense(units=20)),
    "everywhere": (Form(SHAPE, shared=CLASSES), Local(grid=3, field=3, units=8, stride=2)),
}


def make_labeled_rows(label, num_samples: int) -> LabeledRows:
    """Makes the rows of two negatives per sample; either all passes have the same samples, or each has its own."""
    generator = torch.Generator().manual_seed(0)
    samples, place = LABELS[label](torch.rand(num_samples, B, 84, generator=generator), CLASSES)
    claims = one_hot(torch.randint(0, CLASSES, (3, B), generator=generator), CLASSES)
    claims = torch.cat((claims, torch.full((1, B, CLASSES), 1 / CLASSES)))
    return LabeledRows(samples, claims, torch.rand(4, B, generator=generator) + 0.5, place)


@pytest.mark.parametrize("num_samples", [1, 4])
@pytest.mark.parametrize("rule", [Rule(), Rule(alternating=True), Rule(updates_per_minibatch=2, peer_strength=0.0)])
@pytest.mark.parametrize("label", FIRST_LAYERS)
def test_a_layer_learns_the_same_from_samples_and_labels_apart(label, rule, num_samples):
    form, spec = FIRST_LAYERS[label]
    rows = make_labeled_rows(label, num_samples)
    layer = spec.build(form, rule=rule, generator=torch.Generator().manual_seed(1))
    layer.add_optimizer_state()
    expected = deepcopy(layer)
    (output, metrics), (joined_output, joined_metrics) = (
        each.train_minibatch(Minibatch(part, Passes(num_negatives=2)))
        for each, part in ((layer, rows), (expected, join(rows)))
    )
    torch.testing.assert_close(output, joined_output)
    torch.testing.assert_close(metrics, joined_metrics, equal_nan=True)
    for name, tensor in layer.state_dict().items():
        torch.testing.assert_close(tensor, expected.state_dict()[name], atol=1e-6, rtol=1e-4)
    assert not torch.equal(layer.weight, spec.build(form, generator=torch.Generator().manual_seed(1)).weight)


@pytest.mark.parametrize("label", FIRST_LAYERS)
def test_every_label_is_tried_with_one_product_of_the_sample(label):
    form, spec = FIRST_LAYERS[label]
    layer = spec.build(form, generator=torch.Generator().manual_seed(1))
    samples, place = LABELS[label](torch.rand(B, 1, 84), CLASSES)
    rows = LabeledRows(samples, torch.eye(CLASSES).unsqueeze(0), torch.rand(B, CLASSES), place)
    products = []
    product, layer._product = layer._product, lambda inputs: products.append(len(inputs)) or product(inputs)
    torch.testing.assert_close(layer(rows), layer(join(rows)))
    assert products == [B, B * CLASSES]
