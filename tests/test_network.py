import pickle

import pytest
import torch
from helpers import image_architecture

from ffdist.ff.classify import confusion_matrix, error
from ffdist.ff.network import Network
from ffdist.ff.objectives import Rule
from ffdist.ff.optimizers import Update
from ffdist.ff.specs import Local


def a_network(**changes) -> Network:
    return Network(
        image_architecture(**({"shape": (1, 4, 5), "classes": 4, "layers": (30, 25, 15), "seed": 1} | changes))
    )


def some_images(count=6) -> torch.Tensor:
    return torch.randint(0, 256, (count, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_state_dict_holds_everything_that_was_learned():
    """Layers in a plain list leave an empty state_dict; running means kept outside of it are lost."""
    names = set(a_network().state_dict())
    tensors = ("weight", "bias", "optimizer.weight/gradient", "optimizer.bias/gradient")
    assert names == {
        f"layers.{layer}.{name}" for layer in range(3) for name in (*tensors, "statistics.mean_activity")
    } | {f"readout.{name}" for name in tensors}


def test_first_hidden_layer_has_no_say_in_predictions():
    """Counted in, it makes them worse: it sees the label itself."""
    network, images = a_network(), some_images()
    prediction = network.predict(images)
    assert torch.equal(prediction.label, prediction.goodness[1:].sum(0).argmax(1))
    assert network.readout.weight.shape == (4, 25 + 15)


def test_later_layers_do_not_see_how_long_a_layers_activity_is():
    network, images = a_network(), some_images()
    before = network.predict(images).goodness
    network.layers[0].weight.mul_(3)
    network.layers[0].refresh()
    after = network.predict(images).goodness
    torch.testing.assert_close(after[0], 9 * before[0])
    torch.testing.assert_close(after[1:], before[1:])


def test_an_image_is_predicted_whatever_its_neighbours():
    network, images = a_network(), some_images()
    torch.testing.assert_close(network.predict(images).goodness[:, 2:3], network.predict(images[2:3]).goodness)


def test_readout_sums_to_one_and_input_is_left_alone():
    network, images = a_network(label="append", precision="bfloat16"), some_images()
    before = images.clone()
    torch.testing.assert_close(network.predict(images).probabilities.sum(1), torch.ones(6))
    assert torch.equal(images, before)


def test_centred_images_differ_in_what_they_show_and_not_in_their_mean():
    dark, bright = some_images() // 2, some_images() // 2 + 100
    network = a_network(label="append", subtract_mean=True)
    for one, other in zip(network.predict(dark), network.predict(bright), strict=True):
        torch.testing.assert_close(one, other)
    rows = network.architecture.rows(dark, torch.ones(6, 4))
    torch.testing.assert_close(rows[:, :20].sum(1), torch.zeros(6), atol=1e-5, rtol=0)
    assert not torch.equal(a_network(label="append").predict(dark).goodness, network.predict(dark).goodness)


def test_initial_weights_do_not_depend_on_other_layers():
    one, other = image_architecture((1, 4, 5), 4, (30, 25)), image_architecture((1, 4, 5), 4, (30, 25, 9))
    assert torch.equal(one.layer(1).weight, other.layer(1).weight)
    assert abs(one.layer(0).weight.std().item() * 20**0.5 - 1) < 0.1


def test_confusion_counts_true_by_predicted():
    labels, predicted = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 2, 1, 1])
    assert confusion_matrix(predicted, labels, 3).tolist() == [[1, 0, 1], [0, 1, 0], [0, 1, 0]]
    assert error(predicted, labels) == 0.5


def test_weights_are_counted_as_they_are_built():
    layers = (Local(grid=3, stride=1, field=2, units=7), Local(grid=2, stride=1, field=2, units=5), 11, 6)
    for label in ("everywhere", "none"):
        architecture = image_architecture((2, 4, 5), 4, layers, label=label)
        built = [architecture.layer(index) for index in range(len(layers))]
        assert architecture.num_parameters == tuple(layer.weight.numel() + layer.bias.numel() for layer in built)
        assert architecture.widths[1:] == tuple(len(layer.bias) for layer in built) == (63, 20, 11, 6)


def test_without_labels_the_readout_alone_predicts():
    prediction = a_network(label="none").predict(some_images())
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
def test_layers_that_do_not_fit_say_why(layers, label, message):
    with pytest.raises(ValueError, match=message):
        image_architecture((1, 4, 5), 4, layers, label=label)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers": (20,)}, r"predict_from must be one of the layers, 1 to 1 \(predict_from: 2\)"),
        ({"label": "apend"}, "label must be one of overwrite, append, everywhere, none"),
        ({"thresholds": (1.0,)}, "all of the 3 layers have a threshold, or none"),
    ],
)
def test_what_cannot_be_is_refused_at_once(changes, words):
    with pytest.raises(ValueError, match=words):
        a_network(**changes)


def test_a_network_can_be_pickled():
    network, images = a_network(), some_images()
    again = pickle.loads(pickle.dumps(network))
    again.load_state_dict(network.state_dict())
    assert torch.equal(again(images), network(images))


def test_a_network_works_where_its_images_are():
    """On a GPU, say; the device `meta` computes shapes alone, and refuses what lies elsewhere."""
    prediction = a_network(label="append").to("meta").predict(some_images().to("meta"))
    assert {part.device.type for part in prediction} == {"meta"}
    assert prediction.label.shape == (6,)


def test_a_network_without_layers_is_refused():
    with pytest.raises(ValueError, match=r"layers must name at least one layer \(layers: \(\)\)"):
        image_architecture((1, 4, 5), 4, ())


def test_a_network_for_inference_predicts_the_same_and_holds_weights_alone():
    for layers, label in (
        ((30, 25, 15), "append"),
        ((Local(grid=2, stride=2, field=3, units=4), Local(grid=2, stride=1, field=1, units=33), 6), "everywhere"),
    ):
        whole, images = a_network(layers=layers, label=label, precision="bfloat16"), some_images()
        tensors = whole.state_dict()
        light = Network.for_inference(whole.architecture, tensors)
        for one, other in zip(light.predict(images), whole.predict(images), strict=True):
            assert torch.equal(one, other)
        assert all(name.endswith((".weight", ".bias")) for name in light.state_dict())
        assert light.readout.weight.data_ptr() == tensors["readout.weight"].data_ptr()
        assert not any(tensor.is_meta for tensor in (*light.buffers(), *light.parameters()))
    with pytest.raises(KeyError, match=r"readout\.bias"):
        Network.for_inference(whole.architecture, {key: tensors[key] for key in tensors if key != "readout.bias"})


@pytest.mark.parametrize("optimizer", ["hinton", "adamw"])
@pytest.mark.parametrize(
    "layers", [(30, 20), (Local(grid=3, stride=2, field=4, units=5), Local(grid=2, stride=1, field=2, units=40), 10)]
)
def test_sizes_are_those_of_the_tensors(layers, optimizer):
    label = "append" if isinstance(layers[0], int) else "everywhere"
    rule = Rule(update=Update(0.1, 0.1, optimizer=optimizer))
    network = Network(image_architecture((1, 8, 8), 3, layers, label=label, precision="bfloat16", rule=rule))
    sizes = [sum(tensor.nbytes for tensor in part.state_dict().values()) for part in (*network.layers, network.readout)]
    assert list(network.architecture.state_bytes) == sizes
    assert list(network.architecture.copy_bytes) == [layer._compute_weight.nbytes for layer in network.layers]
