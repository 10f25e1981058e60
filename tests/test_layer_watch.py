import pytest
from mlflow import MlflowClient

from ffdist import load_config, train
from ffdist.data.order import SampleOrder
from ffdist.tracking.server import default_uri
from ffdist.training.layer_watch import LayerWatch

EPOCH = 3000
"""Samples in an epoch of the tests."""


def make_watch(*changes, epoch=EPOCH):
    """Returns the method that checks a point, and the list of warnings."""
    warnings = []
    config = load_config("digits", ["model.layers=[9,8]", "training.epochs=3", *changes])
    watch = LayerWatch(config, SampleOrder(0, epoch, 10), lambda text, **tags: warnings.append((text, tags)))
    return watch.check, warnings


def make_point(active=0.5, error=0.1, layer=1):
    return {f"layer_{layer}/active_fraction": active, f"layer_{layer}/pairwise_error": error}


def test_layer_without_active_units_is_reported_once_with_a_fix():
    check, warnings = make_watch()
    for samples in (10, 20, 30):
        check(make_point(active=0.009), samples)
    ((text, tags),) = warnings
    assert text.startswith("warning: layer 1 has stopped learning: 0.90% of its activations are not zero; in a new run")
    assert tags == {"layer_1_warning": text.removeprefix("warning: layer 1 ")}


def test_layer_at_chance_is_reported_after_two_points_in_a_row():
    check, warnings = make_watch()
    for number, error in enumerate((0.5, 0.3, 0.5), 1):
        check(make_point(error=error), EPOCH + number)
    assert not warnings
    check(make_point(error=0.49), EPOCH + 4)
    assert "layer 1 does not learn: the goodness of negatives is not lower" in warnings[0][0]
    assert "increase data.label_scale (1)" in warnings[0][0]


def test_first_epoch_and_repeated_points_do_not_count():
    check, warnings = make_watch()
    for samples in (EPOCH - 10, EPOCH, EPOCH + 10, EPOCH + 10):  # a recovery logs a point again
        check(make_point(error=0.5), samples)
    assert not warnings
    check(make_point(error=0.5), EPOCH + 20)
    assert len(warnings) == 1


def test_first_200_minibatches_do_not_count():
    check, warnings = make_watch(epoch=100)
    for samples in range(100, 2020, 10):
        check(make_point(error=0.5), samples)
    assert not warnings
    check(make_point(error=0.5), 2020)
    assert len(warnings) == 1


def test_layers_are_reported_separately_and_missing_metrics_are_not():
    check, warnings = make_watch()
    check(make_point(active=0.001) | make_point(active=0.002, layer=2), 10)
    assert [list(tags) for _, tags in warnings] == [["layer_1_warning"], ["layer_2_warning"]]
    check, warnings = make_watch("data.label=none", "negatives.kind=hybrid")
    for number in range(3):
        check({}, EPOCH + 10 * number)
    assert not warnings


def test_chance_is_unknown_if_negatives_are_noise():
    check, warnings = make_watch("data.label=none", "negatives.kind=noise")
    for number in range(3):
        check(make_point(error=0.7), EPOCH + 10 * number)
    assert not warnings


def test_greedy_schedule_checks_a_layer_from_its_own_start():
    check, warnings = make_watch("training.schedule=greedy")  # layer 2 is trained from epoch 3 on
    for samples in range(100, 3 * EPOCH + 1, 100):
        check(make_point(active=0.0, error=0.5, layer=2), samples)
    for samples in range(3 * EPOCH + 100, 4 * EPOCH + 101, 100):
        check(make_point(error=0.5, layer=2), samples)
    assert not warnings, "its first epoch does not count"
    check(make_point(error=0.5, layer=2), 4 * EPOCH + 200)
    assert len(warnings) == 1


@pytest.mark.parametrize(
    ("learning_rate", "message"), [(0, "layer 1 does not learn: "), (3, "layer 1 has stopped learning: ")]
)
def test_real_layers_that_do_not_learn_are_reported(learning_rate, message, tmp_path, capsys):
    settings = ["model.layers=[40,30]", "training.epochs=9", "tracking.log_every_minibatches=10"]
    config = load_config("digits", [*settings, f"training.learning_rate={learning_rate}", "tracking.artifacts=[]"])
    run = train(config, runner="serial", runs=tmp_path)
    assert capsys.readouterr().out.count(f"warning: {message}") == 1
    tags = MlflowClient(default_uri(tmp_path)).get_run(run.summary["mlflow_run_id"]).data.tags
    assert message.endswith(tags["layer_1_warning"].partition(": ")[0] + ": ")
