import pickle

import pytest
import torch
from helpers import image_architecture

from ffdist.ff.classify import confusion_matrix, error
from ffdist.ff.labels import join
from ffdist.ff.network import Network
from ffdist.ff.objectives import Rule
from ffdist.ff.optimizers import Update
from ffdist.ff.specs import Local


def make_network(**changes) -> Network:
    return Network(
        image_architecture(**({"shape": (1, 4, 5), "classes": 4, "layers": (30, 25, 15), "seed": 1} | changes))
    )


def random_images(count=6) -> torch.Tensor:
    return torch.randint(0, 256, (count, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_state_dict_contains_all_learned_state():
    """Layers in a plain list would be missing, and so would running means that are not buffers."""
    names = set(make_network().state_dict())
    tensors = ("weight", "bias", "optimizer.weight/gradient", "optimizer.bias/gradient")
    assert names == {
        f"layers.{layer}.{name}" for layer in range(3) for name in (*tensors, "statistics.mean_activity")
    } | {f"readout.{name}" for name in tensors}


def test_predictions_ignore_the_first_hidden_layer():
    """The first layer sees the label itself, so including it makes predictions worse."""
    network, images = make_network(), random_images()
    prediction = network.predict(images)
    assert torch.equal(prediction.label, prediction.goodness[1:].sum(0).argmax(1))
    assert network.readout.weight.shape == (4, 25 + 15)


def test_later_layers_do_not_depend_on_the_norm_of_activations():
    network, images = make_network(), random_images()
    before = network.predict(images).goodness
    network.layers[0].weight.mul_(3)
    network.layers[0].refresh()
    after = network.predict(images).goodness
    torch.testing.assert_close(after[0], 9 * before[0])
    torch.testing.assert_close(after[1:], before[1:])


def test_prediction_does_not_depend_on_other_images_of_the_batch():
    network, images = make_network(), random_images()
    torch.testing.assert_close(network.predict(images).goodness[:, 2:3], network.predict(images[2:3]).goodness)


def test_readout_probabilities_sum_to_one_and_input_is_not_modified():
    network, images = make_network(label="append", precision="bfloat16"), random_images()
    before = images.clone()
    torch.testing.assert_close(network.predict(images).probabilities.sum(1), torch.ones(6))
    assert torch.equal(images, before)


def test_subtract_mean_makes_predictions_independent_of_brightness():
    dark, bright = random_images() // 2, random_images() // 2 + 100
    network = make_network(label="append", subtract_mean=True)
    for actual, expected in zip(network.predict(dark), network.predict(bright), strict=True):
        torch.testing.assert_close(actual, expected)
    rows = join(network.architecture.labeled_rows(dark, torch.ones(6, 4)))
    torch.testing.assert_close(rows[:, :20].sum(1), torch.zeros(6), atol=1e-5, rtol=0)
    assert not torch.equal(make_network(label="append").predict(dark).goodness, network.predict(dark).goodness)


def test_initial_weights_do_not_depend_on_other_layers():
    architecture, deeper = image_architecture((1, 4, 5), 4, (30, 25)), image_architecture((1, 4, 5), 4, (30, 25, 9))
    assert torch.equal(architecture.layer(1).weight, deeper.layer(1).weight)
    assert abs(architecture.layer(0).weight.std().item() * 20**0.5 - 1) < 0.1


def test_confusion_matrix_has_true_labels_in_rows():
    labels, predicted = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 2, 1, 1])
    assert confusion_matrix(predicted, labels, 3).tolist() == [[1, 0, 1], [0, 1, 0], [0, 1, 0]]
    assert error(predicted, labels) == 0.5


def test_num_parameters_and_widths_match_the_built_layers():
    layers = (Local(grid=3, stride=1, field=2, units=7), Local(grid=2, stride=1, field=2, units=5), 11, 6)
    for label in ("everywhere", "none"):
        architecture = image_architecture((2, 4, 5), 4, layers, label=label)
        built = [architecture.layer(index) for index in range(len(layers))]
        assert architecture.num_parameters == tuple(layer.weight.numel() + layer.bias.numel() for layer in built)
        assert architecture.widths[1:] == tuple(len(layer.bias) for layer in built) == (63, 20, 11, 6)


def test_readout_predicts_if_no_label_is_shown():
    prediction = make_network(label="none").predict(random_images())
    assert prediction.goodness.shape == (3, 6, 0)
    assert torch.equal(prediction.label, prediction.probabilities.argmax(1))


@pytest.mark.parametrize(
    ("layers", "label", "message"),
    [
        (
            (30, Local(grid=2, stride=1, field=2, units=5)),
            "overwrite",
            "layer 2 has local fields and needs a map as input",
        ),
        (
            (Local(grid=9, stride=1, field=1, units=5),),
            "none",
            "layer 1 has fields that lie completely outside of its 4 x 5 input map",
        ),
        ((30,), "everywhere", "the first layer has none"),
        (
            (Local(grid=2, stride=1, field=2, units=5),),
            "append",
            "label=append shows the label to few of the local fields",
        ),
        (
            (Local(grid=2, stride=1, field=2, units=5),),
            "overwrite",
            "label=overwrite shows the label to few of the local fields",
        ),
    ],
)
def test_incompatible_layers_raise_an_error_with_the_reason(layers, label, message):
    with pytest.raises(ValueError, match=message):
        image_architecture((1, 4, 5), 4, layers, label=label)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": (20,)}, r"predict_from and predict_to must be layers, 1 to 1, in this order \(predict_from: 2,"),
        ({"label": "apend"}, "label must be one of overwrite, append, everywhere, none"),
        ({"thresholds": (1.0,)}, "all of the 3 layers have a threshold, or none"),
    ],
)
def test_invalid_architecture_raises_value_error(changes, message):
    with pytest.raises(ValueError, match=message):
        make_network(**changes)


def test_a_network_can_be_pickled():
    network, images = make_network(), random_images()
    copy = pickle.loads(pickle.dumps(network))
    copy.load_state_dict(network.state_dict())
    assert torch.equal(copy(images), network(images))


def test_network_predicts_on_the_device_of_its_images():
    """The device `meta` only computes shapes, and raises an error for tensors on other devices."""
    prediction = make_network(label="append").to("meta").predict(random_images().to("meta"))
    assert {part.device.type for part in prediction} == {"meta"}
    assert prediction.label.shape == (6,)


def test_network_without_layers_raises_value_error():
    with pytest.raises(ValueError, match=r"layers must name at least one layer \(layers: \(\)\)"):
        image_architecture((1, 4, 5), 4, ())


def test_network_for_inference_predicts_the_same_and_contains_only_weights():
    for layers, label in (
        ((30, 25, 15), "append"),
        ((Local(grid=2, stride=2, field=3, units=4), Local(grid=2, stride=1, field=1, units=33), 6), "everywhere"),
    ):
        network, images = make_network(layers=layers, label=label, precision="bfloat16"), random_images()
        tensors = network.state_dict()
        inference_network = Network.for_inference(network.architecture, tensors)
        for actual, expected in zip(inference_network.predict(images), network.predict(images), strict=True):
            assert torch.equal(actual, expected)
        assert all(name.endswith((".weight", ".bias")) for name in inference_network.state_dict())
        assert inference_network.readout.weight.data_ptr() == tensors["readout.weight"].data_ptr()
        assert not any(tensor.is_meta for tensor in (*inference_network.buffers(), *inference_network.parameters()))
    with pytest.raises(KeyError, match=r"readout\.bias"):
        Network.for_inference(network.architecture, {key: tensors[key] for key in tensors if key != "readout.bias"})


@pytest.mark.parametrize("optimizer", ["hinton", "adamw"])
@pytest.mark.parametrize(
    "layers", [(30, 20), (Local(grid=3, stride=2, field=4, units=5), Local(grid=2, stride=1, field=2, units=40), 10)]
)
def test_state_bytes_and_copy_bytes_match_the_tensors(layers, optimizer):
    label = "append" if isinstance(layers[0], int) else "everywhere"
    rule = Rule(update=Update(0.1, 0.1, optimizer=optimizer))
    network = Network(image_architecture((1, 8, 8), 3, layers, label=label, precision="bfloat16", rule=rule))
    sizes = [sum(tensor.nbytes for tensor in part.state_dict().values()) for part in (*network.layers, network.readout)]
    assert list(network.architecture.state_bytes) == sizes
    assert list(network.architecture.copy_bytes) == [layer._compute_weight.nbytes for layer in network.layers]
