"""A run ends exactly at a validation: the same for any division of the work, after failures, and when resumed."""

from types import SimpleNamespace

import pytest
import torch
from mlflow import MlflowClient

from ffdist import Config, ConfigError, Run, load_config, train
from ffdist.errors import ActorLost, RunFailed
from ffdist.pipeline.evaluation import Evaluation
from ffdist.pipeline.runner import Runner, call_directly, collect_directly
from ffdist.pipeline.stage import Stage
from ffdist.runs.folder import checkpoints_of
from ffdist.tracking.server import default_uri
from ffdist.training.checkpointing import Checkpointer
from ffdist.training.early_stopping import EarlyStopping
from ffdist.training.prepare import prepare
from ffdist.training.resume import Start

SHORT = [
    *("model.layers=[40,30]", "training.epochs=8", "training.validation_samples=200", "training.precision=float32"),
    *("training.validate_every_epochs=1", "tracking.log_every_minibatches=10", "tracking.artifacts=[]"),
    *("checkpoint.every_minibatches=9", "pipeline.chunk_size=5", "pipeline.balance=estimated"),
]
TARGET = ["training.stop.metric=readout_error", "training.stop.target=0.33"]  # reached in about half of the epochs
NOT_LEARNING = ["training.learning_rate=0", "training.stop.patience=2"]  # the first validation has the lowest error


def make_config(*changes: str) -> Config:
    return load_config("digits", [*SHORT, *changes])


def learned_metrics(run: Run) -> dict[str, list[tuple[int, float]]]:
    prefixes = ("layer_", "readout/", "validation/", "test/")
    return {name: points for name, points in run.metrics.items() if name.startswith(prefixes)}


def assert_same_run(run: Run, reference: Run) -> None:
    keys = ("weights_sha256", "checkpoint", "stopped", "epochs", "test_goodness_error", "test_readout_error")
    assert {key: run.summary[key] for key in keys} == {key: reference.summary[key] for key in keys}
    assert learned_metrics(run) == learned_metrics(reference)
    names = [checkpoints_of(each.config, each.folder).names()[-1] for each in (run, reference)]
    assert names[0] == names[1]


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory) -> Run:
    return train(make_config(*TARGET), runner="serial", runs=tmp_path_factory.mktemp("runs"))


@pytest.fixture
def run_ahead(monkeypatch):
    """Makes a serial run execute up to 9 commands ahead of their results, as actors do.

    Returns the first minibatch of each chunk that a stage trains on.
    """
    steps: list[int] = []

    def call(actor, method, *args, returns=1):
        if method == "train" and isinstance(actor, Stage):
            steps.append(args[0].step)
        return call_directly(actor, method, *args)

    def make_runner(blueprint, *data):
        actors = blueprint.assemble(lambda cls, *args: cls(*args), *data)
        return Runner(blueprint._replace(max_in_flight=9), actors, call=call, collect=collect_directly)

    monkeypatch.setattr("ffdist.training.launch.serial_runner", make_runner)
    return steps


def test_run_ends_at_the_first_validation_that_reaches_the_target(stopped_run):
    errors = [error for _, error in stopped_run.metrics["validation/readout_error"]]
    assert errors[-1] <= 0.33 < min(errors[:-1])
    epochs = stopped_run.summary["epochs"]
    assert epochs == len(errors) < 8
    assert stopped_run.summary["stopped"] == f"readout error {errors[-1]:.2%}, at most 33.00%, at epoch {epochs}"
    assert stopped_run.summary["checkpoint"] == f"{epochs:04}-000000"
    mlflow_run = MlflowClient(default_uri(stopped_run.folder.parent)).get_run(stopped_run.summary["mlflow_run_id"])
    assert mlflow_run.data.tags["stopped"] == stopped_run.summary["stopped"]
    assert mlflow_run.data.params["training.stop.target"] == "0.33"


def test_run_ends_after_validations_without_a_lower_error_and_uses_the_best_checkpoint(tmp_path, capsys):
    run = train(make_config(*NOT_LEARNING), runner="serial", runs=tmp_path)
    assert (run.summary["stopped"], run.summary["epochs"]) == ("no lower error in 2 validations, at epoch 3", 3)
    assert "stopped         no lower error in 2 validations, at epoch 3\n" in capsys.readouterr().out
    assert (run.summary["checkpoint"], run.checkpoint.kind) == ("0001-000000", "best")
    steps = [samples for samples, _ in run.metrics["readout/loss"]]
    assert max(steps) == run.metrics["test/readout_error"][0][0] == 3 * 24 * 50


def test_stopped_run_has_the_weights_of_a_longer_run_at_that_epoch(stopped_run, tmp_path):
    longer = train(make_config("checkpoint.keep_last=100"), runner="serial", runs=tmp_path)
    assert (longer.summary["stopped"], longer.summary["epochs"]) == (None, 8)
    name = stopped_run.summary["checkpoint"]
    states = [checkpoints_of(run.config, run.folder).read(name)[1] for run in (stopped_run, longer)]
    for part in ("layer_1", "layer_2", "readout", "position"):
        assert states[0][part].keys() == states[1][part].keys()
        for key, tensor in states[0][part].items():
            assert torch.equal(tensor.nan_to_num(), states[1][part][key].nan_to_num()), (part, key)


@pytest.mark.parametrize("pace", ["pipeline.chunk_size=1", "pipeline.chunk_size=100", "pipeline.stages=1"])
def test_chunks_and_stages_do_not_change_where_a_run_ends(pace, stopped_run, run_ahead, tmp_path):
    run = train(make_config(*TARGET, pace), runner="serial", runs=tmp_path)
    assert_same_run(run, stopped_run)
    assert max(run_ahead) >= run.checkpoint.manifest.step, "the actors had trained further"


def test_best_checkpoint_is_tested_although_the_actors_have_trained_further(run_ahead, tmp_path):
    """With a learning rate of 0 the readout still learns, so that each checkpoint has its own test error."""
    run = train(make_config(*NOT_LEARNING), runner="serial", runs=tmp_path)
    assert max(run_ahead) > 3 * 24
    test_set = run.dataset.samples["test"], run.dataset.labels["test"]
    assert run.evaluate(*test_set).readout_error == pytest.approx(run.summary["test_readout_error"], abs=1.5 / 360)


@pytest.mark.slow
def test_ray_run_ends_at_the_same_validation(ray_start_4_cpus, stopped_run, tmp_path):
    assert_same_run(train(make_config(*TARGET), runs=tmp_path), stopped_run)
    hard_label = [*NOT_LEARNING, "negatives.kind=hard_label", "negatives.prediction_delay=30"]
    serial, ray = (
        train(make_config(*hard_label), runner=runner, runs=tmp_path, name=runner) for runner in ("serial", "ray")
    )
    assert ray.summary["epochs"] == 3
    assert_same_run(ray, serial)


@pytest.mark.parametrize("position", [0.5, 0.95, 1.0, 1.05])
def test_recovery_does_not_change_where_a_run_ends(position, stopped_run, monkeypatch, run_ahead, tmp_path):
    """An actor is lost before or after the position at which the run ends; later, it has been submitted already."""
    lost_at = round(position * stopped_run.checkpoint.manifest.step)
    train_chunk, num_failures = Stage.train, iter([1])

    def train_or_fail(self, chunk, *args):
        if chunk.step >= lost_at and next(num_failures, None):
            raise ActorLost("stage 1 is gone")
        return train_chunk(self, chunk, *args)

    monkeypatch.setattr(Stage, "train", train_or_fail)
    run = train(make_config(*TARGET), runner="serial", runs=tmp_path)
    assert len(run.summary["recoveries"]) == 1
    assert_same_run(run, stopped_run)


@pytest.mark.parametrize("settings", [TARGET, NOT_LEARNING], ids=str)
def test_run_that_was_killed_after_the_decision_only_finishes(settings, monkeypatch, run_ahead, tmp_path):
    reference = train(make_config(*settings), runner="serial", runs=tmp_path / "reference")

    def die(*args, **options):
        raise RunFailed("killed")

    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "restore_reported", die)
        with pytest.raises(RunFailed, match="killed"):
            train(make_config(*settings), runner="serial", runs=tmp_path)
    (config_file,) = tmp_path.glob("run-*/config.yaml")
    run_ahead.clear()
    resumed = train(make_config(*settings), runner="serial", runs=tmp_path, resume=config_file.parent)
    assert run_ahead == [], "it must not train"
    assert_same_run(resumed, reference)


def test_early_stopping_needs_validation_samples(tmp_path):
    with pytest.raises(
        ConfigError, match=r"training\.stop needs a validation.*validation_samples: 0, training samples: 1,437"
    ):
        train(make_config(*TARGET, "training.validation_samples=0"), runner="serial", runs=tmp_path)
    small = {"data": {"name": "xor", "label": "append"}, "model": {"layers": [4]}}
    config = Config.model_validate(small | {"training": {"stop": {"patience": 1}}})
    assert len(prepare(config).dataset.labels["validation"]) == 100
    assert not list(tmp_path.iterdir())


def make_stopping(*, num_validation: int = 3, schedule: str = "simultaneous", **stop) -> EarlyStopping:
    training = {"epochs": 9, "schedule": schedule, "stop": stop}
    settings = {"data": {"name": "xor"}, "model": {"layers": [4]}, "training": training}
    prepared = SimpleNamespace(
        dataset=SimpleNamespace(labels={"validation": torch.zeros(num_validation)}),
        order=SimpleNamespace(num_minibatches=10),
    )
    stopping = EarlyStopping(Config.model_validate(settings), prepared)
    stopping.on_start(Start({}), None)
    return stopping


def reason_after(stopping: EarlyStopping, errors: list[float], first_epoch: int = 1) -> str | None:
    for epoch, error in enumerate(errors, first_epoch):
        stopping.on_evaluation("validation", Evaluation(error, 0.5, [], torch.eye(2), torch.empty(0)), 10 * epoch)
        if stopping.reason:
            return stopping.reason
    return None


def test_equal_error_is_not_a_lower_one():
    assert (
        reason_after(make_stopping(patience=2), [0.3, 0.2, 0.2, 0.2]) == "no lower error in 2 validations, at epoch 4"
    )
    assert reason_after(make_stopping(patience=2), [0.3, 0.3, 0.2, 0.3, 0.1, 0.2]) is None


def test_without_settings_no_error_ends_a_run():
    assert reason_after(make_stopping(), [0.5] * 8) is None


def test_run_that_does_all_its_epochs_was_not_stopped():
    assert reason_after(make_stopping(target=0.1), [0.5] * 8 + [0.1]) is None


def test_metric_is_the_error_that_is_compared():
    confusion = torch.tensor([[9, 0], [1, 0]])  # of the one sample of class 1, none is right
    evaluation = Evaluation(0.1, 0.3, [], confusion, torch.empty(0))
    values = {name: evaluation.value(name) for name in ("error", "readout_error", "balanced_error")}
    assert values == {"error": 0.1, "readout_error": 0.3, "balanced_error": 0.5}
    stopping = make_stopping(metric="balanced_error", target=0.5)
    stopping.on_evaluation("validation", evaluation, 10)
    assert stopping.reason == "balanced error 50.00%, at most 50.00%, at epoch 1"


def test_best_checkpoint_has_the_lowest_error_by_the_metric(tmp_path):
    """By goodness the first checkpoint is the best, because the layers do not learn; the readout improves."""
    settings = ["training.learning_rate=0", "training.epochs=4", "training.stop.metric=readout_error"]
    run = train(make_config(*settings), runner="serial", runs=tmp_path)
    errors = [error for _, error in run.metrics["validation/readout_error"]]
    assert run.summary["checkpoint"] == f"{1 + errors.index(min(errors)):04}-000000" > "0001-000000"
    assert run.checkpoint.manifest.validation_error == min(errors)


def test_request_takes_effect_at_the_next_validation_and_survives_a_restart():
    stopping = make_stopping()
    stopping.request("time is over", 15)
    stopping.request("later", 16)
    assert reason_after(stopping, [0.5]) is None, "it was requested after this validation"
    state = stopping.state(17)
    assert (state.request, state.lowest_error) == ("time is over", 0.5)
    assert stopping.state(14).request is None
    resumed = make_stopping()
    resumed.on_start(Start({}, SimpleNamespace(stop=state, step=17)), None)
    for each in (stopping, resumed):
        assert reason_after(each, [0.4], 2) == "time is over, at epoch 2"


def test_request_needs_a_validation_and_all_layers():
    with pytest.raises(ConfigError, match=r"this run has none; set training\.validation_samples"):
        make_stopping(num_validation=0).request("enough", 1)
    with pytest.raises(ConfigError, match="greedy cannot end early"):
        make_stopping(schedule="greedy").request("enough", 1)
