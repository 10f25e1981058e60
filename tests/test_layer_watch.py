import pytest

from ffdist import load_config, train
from ffdist.data.order import SampleOrder
from ffdist.training.layer_watch import LayerWatch


def make_watch(*changes):
    """Returns the method that checks a point, and the list of warnings. An epoch has 100 samples."""
    warnings = []
    config = load_config("digits", ["model.layers=[9,8]", "training.epochs=3", *changes])
    watch = LayerWatch(config, SampleOrder(0, 100, 10), lambda text, **tags: warnings.append((text, tags)))
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
    for samples, error in ((110, 0.5), (120, 0.3), (130, 0.5)):
        check(make_point(error=error), samples)
    assert not warnings
    check(make_point(error=0.49), 140)
    assert "layer 1 does not learn: the goodness of negatives is not lower" in warnings[0][0]
    assert "increase data.label_scale (1)" in warnings[0][0]


def test_first_epoch_and_repeated_points_do_not_count():
    check, warnings = make_watch()
    for samples in (80, 90, 100, 110, 110):  # a recovery logs a point again
        check(make_point(error=0.5), samples)
    assert not warnings
    check(make_point(error=0.5), 120)
    assert len(warnings) == 1


def test_layers_are_reported_separately_and_missing_metrics_are_not():
    check, warnings = make_watch()
    check(make_point(active=0.001) | make_point(active=0.002, layer=2), 10)
    assert [list(tags) for _, tags in warnings] == [["layer_1_warning"], ["layer_2_warning"]]
    check, warnings = make_watch("data.label=none", "negatives.kind=hybrid")
    for samples in (200, 300, 400):
        check({}, samples)
    assert not warnings


def test_greedy_schedule_checks_a_layer_from_its_own_start():
    check, warnings = make_watch("training.schedule=greedy")  # layer 2 is trained after 300 samples
    for samples in range(10, 310, 10):
        check(make_point(active=0.0, error=0.5, layer=2), samples)
    for samples in range(310, 420, 10):
        check(make_point(error=0.5, layer=2), samples)
    assert not warnings, "its first epoch does not count"
    check(make_point(error=0.5, layer=2), 420)
    assert len(warnings) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("training.learning_rate=0", "layer 2 does not learn"),
        ("model.threshold=0.001", "stopped learning"),
    ],
)
def test_real_layers_that_do_not_learn_are_reported(change, message, tmp_path, capsys):
    settings = ["model.layers=[40,30]", "training.epochs=6", "tracking.artifacts=[]"]
    train(load_config("digits", [*settings, change]), runner="serial", runs=tmp_path)
    assert message in capsys.readouterr().out
