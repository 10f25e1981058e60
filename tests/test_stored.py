"""Models in MLflow: linked to metrics and datasets, and as RUN of commands."""

import shutil

import pytest
import torch
from mlflow import MlflowClient

from ffdist import ConfigError, Run, load_config, train
from ffdist.runs.export import export_network
from ffdist.runs.folder import find_run
from ffdist.runs.inference import evaluate_on
from ffdist.runs.readout import fit_readout

OVERRIDES = [
    *("training.epochs=4", "model.layers=[60,40]", "training.validation_samples=300"),
    *("training.validate_every_epochs=1", "tracking.register=digits", "tracking.artifacts=[model, checkpoints]"),
    "tracking.flush_timeout_s=250",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(load_config("digits", OVERRIDES), runner="serial", runs=tmp_path_factory.mktemp("made") / "runs")


@pytest.fixture
def client(run):
    return MlflowClient(run.summary["mlflow_tracking_uri"])


@pytest.fixture(scope="module")
def elsewhere(run, tmp_path_factory):
    """Another runs folder, whose tracking store has the run; the run's folder is on another machine."""
    runs = tmp_path_factory.mktemp("elsewhere") / "runs"
    shutil.copytree(
        run.folder.parent, runs, ignore=lambda _, names: [each for each in names if each == run.folder.name]
    )
    return runs


def models_of(client, run) -> dict[str, object]:
    outputs = client.get_run(run.summary["mlflow_run_id"]).outputs.model_outputs
    return {model.name: model for model in (client.get_logged_model(output.model_id) for output in outputs)}


def test_datasets_of_all_splits_are_logged(run, client):
    inputs = client.get_run(run.summary["mlflow_run_id"]).inputs.dataset_inputs
    contexts = {each.tags[0].value: each.dataset.digest for each in inputs}
    splits = {"training": "train", "validation": "validation", "testing": "test"}
    assert contexts == {context: run.dataset.sha256(split)[:36] for context, split in splits.items()}


def test_models_are_linked_to_the_metrics_of_their_weights(run, client):
    """The best checkpoint was validated before the end; the test at the end is of its weights."""
    model = models_of(client, run)["model"]
    metrics = {metric.key: metric for metric in model.metrics}
    dataset = run.dataset
    assert metrics["test/goodness_error"].value == run.summary["test_goodness_error"]
    assert metrics["test/goodness_error"].dataset_digest == dataset.sha256("test")[:36]
    assert metrics["validation/goodness_error"].dataset_digest == dataset.sha256("validation")[:36]
    assert metrics["validation/goodness_error"].value == run.checkpoint.manifest.validation_error
    assert model.tags["checkpoint"] == run.summary["checkpoint"]
    history = client.get_metric_history(run.summary["mlflow_run_id"], "test/goodness_error")
    assert len(history) == 1  # linking it added no point


def test_every_new_best_checkpoint_is_a_model_in_order_of_its_error(run, client):
    models = models_of(client, run)
    errors = dict(run.metrics["validation/goodness_error"])
    best, expected = 1.0, []
    for samples, error in sorted(errors.items()):
        if error < best:
            best = error
            expected.append(samples)
    outputs = client.get_run(run.summary["mlflow_run_id"]).outputs.model_outputs
    steps = {output.model_id: output.step for output in outputs}
    logged = {name: steps[model.model_id] for name, model in models.items() if name != "model"}
    assert sorted(logged.values()) == expected
    assert steps[models["model"].model_id] == expected[-1]
    found = client.search_logged_models(
        [models["model"].experiment_id],
        filter_string="name != 'model'",
        order_by=[{"field_name": "metrics.validation/goodness_error", "ascending": True}],
    )
    assert [steps[model.model_id] for model in found] == expected[::-1]


@pytest.mark.parametrize(
    "uri", ["runs:/{run}", "runs:/{run}/model", "models:/digits/1", "models:/digits@good", "models:/{model}"]
)
def test_uri_names_the_run_that_made_the_model(run, client, uri):
    client.set_registered_model_alias("digits", "good", "1")
    model_id = models_of(client, run)["model"].model_id
    uri = uri.format(run=run.summary["mlflow_run_id"], model=model_id)
    found = Run.find(uri, run.folder.parent)
    assert found.folder == run.folder
    assert found.summary == run.summary


@pytest.mark.parametrize("uri", ["runs:/{run}", "models:/digits/1"])
def test_model_of_a_run_on_another_machine_predicts_and_is_exported(run, elsewhere, uri, tmp_path, ffdist_in):
    uri = uri.format(run=run.summary["mlflow_run_id"])
    found, samples = Run.find(uri, elsewhere), run.dataset.samples["test"]
    assert elsewhere in found.folder.parents
    for actual, expected in zip(found.predict(samples), run.predict(samples), strict=True):
        assert torch.equal(actual, expected)
    expected = run.evaluate(samples, run.dataset.labels["test"]).describe()
    assert found.evaluate(samples, run.dataset.labels["test"]).describe() == expected
    assert (tmp_path / "out" / "classifier.onnx") in export_network(found, tmp_path / "out")
    assert "classifier.pt2" in ffdist_in(tmp_path, "export", uri, "--runs", elsewhere, "--output", tmp_path / "again")


def test_model_of_an_older_checkpoint_is_not_taken_for_the_result(run, client):
    model = min((each for name, each in models_of(client, run).items() if name != "model"), key=lambda each: each.name)
    if model.tags["checkpoint"] == run.summary["checkpoint"]:
        pytest.skip("the first validation was the best")
    found = Run.find(f"models:/{model.model_id}", run.folder.parent)
    assert found.folder != run.folder
    samples, labels = run.dataset.samples["validation"], run.dataset.labels["validation"]
    (error,) = [metric.value for metric in model.metrics if metric.key == "validation/goodness_error"]
    assert found.evaluate(samples, labels).goodness_error == pytest.approx(error, abs=1.5 / len(labels))


def test_commands_that_need_the_run_say_what_is_missing(run, elsewhere):
    found = Run.find("models:/digits/1", elsewhere)
    for use, part in (
        (lambda: evaluate_on(found, None), "dataset"),
        (found.plot, "metrics"),
        (lambda: found.metrics, "metrics"),
        (lambda: fit_readout(found, runs=elsewhere), "dataset"),
    ):
        with pytest.raises(ConfigError, match=f"is only a model, without the {part} of its run"):
            use()
    with pytest.raises(ConfigError, match="one checkpoint only"):
        Run.find("models:/digits/1", elsewhere, checkpoint="last")
    config = load_config("digits", OVERRIDES)
    with pytest.raises(ConfigError, match=r"only a model, without the checkpoints.*--init-from"):
        train(config, runner="serial", runs=elsewhere, resume=find_run("models:/digits/1", elsewhere))


def test_warm_start_from_a_model_equals_one_from_its_run(run, elsewhere, tmp_path):
    config = load_config("digits", ["training.epochs=1", "model.layers=[60,40]", "tracking.uri=none"])
    folder = find_run("models:/digits/1", elsewhere)
    by_model = train(config, runner="serial", runs=tmp_path / "a", init_from=folder)
    by_run = train(config, runner="serial", runs=tmp_path / "b", init_from=run.folder)
    errors = [each.summary["test_readout_error"] for each in (by_model, by_run)]
    assert errors[0] == pytest.approx(errors[1], abs=0.05)  # the run also has the units' mean activity
    assert by_model.metrics["layer_1/loss"][0][1] == pytest.approx(by_run.metrics["layer_1/loss"][0][1], rel=0.1)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("models:/nothing/1", "failed.*nothing"),
        ("models:/digits", "must be models:/NAME/VERSION"),
        ("models:/m-0", "failed.*m-0"),
        ("runs:/" + "0" * 32, "failed.*0000"),
    ],
)
def test_unknown_models_and_runs_are_refused(run, uri, message):
    with pytest.raises(ConfigError, match=message):
        find_run(uri, run.folder.parent)


def test_model_of_another_program_is_refused(run, client):
    experiment_id = client.create_experiment("others")
    model = client.create_logged_model(experiment_id, "model", client.create_run(experiment_id).info.run_id)
    with pytest.raises(ConfigError, match="cannot be downloaded"):
        find_run(f"models:/{model.model_id}", run.folder.parent)
