import json
import shlex
import shutil
from itertools import pairwise, product

import pytest
import torch
from helpers import image_architecture
from mlflow import MlflowClient
from PIL import Image

from ffdist import ConfigError, Network, Run, load_config, train
from ffdist.pipeline.evaluation import Evaluation
from ffdist.pipeline.timeline import read_timeline
from ffdist.plotting.plots import (
    first_filters,
    plot_confusion,
    plot_errors_over_time,
    plot_fields,
    plot_goodness,
    plot_layers,
    plot_negatives,
    plot_samples,
)

CONFIG = {
    "data": {"name": "digits", "label": "append"},
    "model": {"layers": [40, 30]},
    "training": {"epochs": 3, "validation_samples": 0},
    "tracking": {"log_every_minibatches": 28},
}
PLOTS = {"layers", "negatives", "goodness", "samples", "errors", "fields", "confusion", "timeline"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(CONFIG, runner="serial", runs=tmp_path_factory.mktemp("runs"))


def test_train_accepts_a_dict_a_file_a_config_or_a_name(tmp_path):
    settings = {"training": {"epochs": 1}, "model": {"layers": [20]}}
    (tmp_path / "some.yaml").write_text(json.dumps(settings | {"data": {"name": "digits"}}))
    configs = [
        settings | {"data": {"name": "digits"}},
        tmp_path / "some.yaml",
        load_config(str(tmp_path / "some.yaml")),
    ]
    finished_runs = [train(config, runner="serial", runs=tmp_path) for config in configs]
    assert len({run.summary["weights_sha256"] for run in finished_runs}) == 1
    assert [run.folder.name.split("-")[0] for run in finished_runs] == ["run", "some", "run"]
    with pytest.raises(ConfigError, match="did you mean digits"):
        train("digit", runner="serial", runs=tmp_path)


def test_finished_run_has_its_metrics(run):
    assert run.metrics["test/goodness_error"] == [(4200, run.summary["test_goodness_error"])]
    assert [samples for samples, _ in run.metrics["layer_2/loss"]] == [2800, 4200]


def test_found_run_has_the_same_summary_and_errors(run):
    for name in (run.folder, run.summary["mlflow_run_id"]):
        same_run = Run.find(name, run.folder.parent)
        assert same_run.summary == run.summary
    evaluation = same_run.evaluate(same_run.dataset.samples["test"], same_run.dataset.labels["test"])
    assert evaluation.goodness_error == pytest.approx(run.summary["test_goodness_error"], abs=1.5 / 360)
    assert evaluation.layer_errors == pytest.approx(run.summary["layer_errors"], abs=1.5 / 360)


def test_find_rejects_what_is_not_a_finished_run(run, tmp_path):
    (tmp_path / "half done").mkdir()
    (tmp_path / "half done" / "config.yaml").write_text(run.config.to_yaml())
    with pytest.raises(ConfigError, match="resume it with") as error_info:
        Run.find(tmp_path / "half done")
    command = str(error_info.value).split("`")[1]
    assert shlex.split(command)[-1] == str(tmp_path / "half done")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.yaml").write_text(run.config.to_yaml())
    with pytest.raises(ConfigError, match="not finished; resume it with"):
        Run.find(tmp_path / "half")
    (tmp_path / "half" / "summary.json").write_text("{")
    with pytest.raises(ConfigError, match=r"summary.json is missing or damaged"):
        Run.find(tmp_path / "half")
    for content in ("[]", "{}", "3"):
        (tmp_path / "half" / "summary.json").write_text(content)
        with pytest.raises(ConfigError, match=r"summary.json is missing or damaged"):
            Run.find(tmp_path / "half")
    for name in ("nothing", "x" * 300, "a\0b"):
        with pytest.raises(ConfigError, match="RUN must be the folder of a run"):
            Run.find(name, tmp_path)


def test_samples_and_labels_of_the_wrong_shape_type_or_range_are_rejected(run):
    with pytest.raises(ConfigError, match=r"shape \[N, 1, 8, 8\] with N > 0 \(given: torch.uint8, \[2, 3, 8, 8\]\)"):
        run.predict(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ConfigError, match=r"torch\.float32"):
        run.predict(torch.zeros(2, 64))
    for shape in ((2, 8, 8, 1), (64,), (0, 64)):
        with pytest.raises(ConfigError, match="with N > 0"):
            run.predict(torch.zeros(shape, dtype=torch.uint8))
    images = run.dataset.samples["test"][:3]
    expected = run.predict(images).label
    for equivalent in (images.view(3, 1, 8, 8), images.view(3, 8, 8), images.numpy()):
        assert torch.equal(run.predict(equivalent).label, expected)
    for labels in ([0, 1], [0, 1, 10], [0, 1, -1], [0.0, 1.0, 2.0]):
        with pytest.raises(ConfigError, match=r"labels must be integers in \[0, 10\), one per sample"):
            run.evaluate(images, torch.tensor(labels))


def test_run_name_with_invalid_characters_is_rejected(tmp_path):
    for name in ("a/b", "a\0b"):
        with pytest.raises(ConfigError, match="must hold no /"):
            train(CONFIG, runner="serial", runs=tmp_path, name=name)
    assert not list(tmp_path.iterdir())


def test_long_run_name_is_truncated(tmp_path):
    config = load_config("xor", ["training.epochs=1", "tracking.artifacts=[]"])
    run = train(config, runner="serial", runs=tmp_path, name="\u00f6" * 240)
    assert run.folder.name.startswith("\u00f6" * 100 + "-2")
    assert Run.find(run.summary["mlflow_run_id"], tmp_path).folder == run.folder


def test_unknown_runner_is_rejected(tmp_path):
    with pytest.raises(ConfigError, match=r"one of ray, serial, backpropagation \(given: Serial\)"):
        train(CONFIG, runner="Serial", runs=str(tmp_path))


@pytest.mark.parametrize(
    ("file", "content", "use"),
    [
        ("metrics.db", None, lambda run: run.metrics),
        ("metrics.db", "damaged" * 999, lambda run: run.metrics),
        ("timeline.json", "{", lambda run: run.plot()),
        ("checkpoints", None, lambda run: run.network),
    ],
)
def test_error_names_the_missing_or_damaged_file(run, file, content, use, tmp_path):
    folder = tmp_path / "a #run?"  # contains characters that are special in a URI
    shutil.copytree(run.folder, folder)
    copy = Run.find(folder)
    assert use(copy)
    shutil.rmtree(folder / file) if (folder / file).is_dir() else (folder / file).unlink()
    if content:
        (folder / file).write_text(content)
    with pytest.raises(ConfigError, match=file) as error_info:
        use(Run.find(folder))
    assert "train" in str(error_info.value)
    assert "--skip-damaged" not in str(error_info.value)


def test_plots_of_a_finished_run_can_be_drawn_again(run, tmp_path):
    assert {path.stem for path in run.folder.glob("*.png")} == PLOTS
    for path in run.plot(tmp_path / "again"):
        with Image.open(path) as image, Image.open(run.folder / path.name) as original:
            assert image.size == original.size
            if path.stem in {"layers", "negatives", "fields", "timeline"}:  # other plots contain sums in another order
                assert image.tobytes() == original.tobytes()
    assert {path.stem for path in (tmp_path / "again").iterdir()} == PLOTS


@pytest.mark.parametrize(
    "overrides",
    [
        ["negatives.kind=hybrid", "data.label=none"],
        ["negatives.kind=hard_label"],
        ["training.loss=symmetric"],
        ["data.label=everywhere", "model.layers=[{kind: local, grid: 3, stride: 2, field: 4, units: 9}, 20]"],
    ],
    ids=str,
)
def test_all_plots_are_drawn_for_every_kind_of_run(overrides, tmp_path):
    run = train(
        load_config("digits", ["model.layers=[20,20]", *overrides, "training.epochs=1"]), runner="serial", runs=tmp_path
    )
    without_labels = {"samples"} if run.config.data.label == "none" else set()
    assert {path.stem for path in run.folder.glob("*.png")} == PLOTS - without_labels


def test_validated_run_has_a_plot_of_its_errors_over_time(tmp_path):
    settings = {"epochs": 3, "validate_every_epochs": 1}
    run = train(CONFIG | {"training": settings}, runner="serial", runs=tmp_path)
    assert {path.stem for path in run.folder.glob("*.png")} == PLOTS | {"errors_over_time"}
    assert {path.stem for path in run.plot(tmp_path / "again")} == PLOTS | {"errors_over_time"}


def test_plot_of_errors_marks_the_first_lowest_error_as_the_best_checkpoint(tmp_path):
    points = {"goodness": [0.4, 0.1, 0.1, 0.3], "readout": [0.5, 0.4, 0.3, 0.2]}
    history = {
        f"validation/{name}_error": [(100 * epoch, error) for epoch, error in enumerate(errors, 1)]
        for name, errors in points.items()
    }
    test = Evaluation(0.12, 0.25, [], torch.eye(2), torch.empty(0))
    for metric, best in (("error", "10.00%"), ("readout_error", "20.00%")):
        svg = plot_errors_over_time(history, test, 100, metric, tmp_path / "e.svg").read_text()
        for text in (f"best checkpoint: {best}", "test, goodness: 12.00%", "validation, readout"):
            assert f"<!-- {text} -->" in svg


def fail_to_plot(*args, **options):
    raise TypeError("set_text(): incompatible function arguments")


def test_failed_plot_is_reported_and_the_others_are_drawn(run, tmp_path, monkeypatch):
    monkeypatch.setattr("ffdist.plotting.plots.plot_goodness", fail_to_plot)
    with pytest.raises(ConfigError, match=r"^goodness\.png could not be drawn \(TypeError: set_text"):
        run.plot(tmp_path)
    assert {path.stem for path in tmp_path.iterdir()} == PLOTS - {"goodness"}


def test_run_finishes_if_all_plots_fail(tmp_path, monkeypatch, capsys):
    for plot in PLOTS:
        monkeypatch.setattr(f"ffdist.plotting.plots.plot_{plot}", fail_to_plot)
    settings = {"training": {"epochs": 1, "validation_samples": 0}, "tracking": {"flush_timeout_s": 250}}
    run = train(CONFIG | settings, runner="serial", runs=tmp_path)  # other tests may keep the CPU busy
    output = capsys.readouterr().out
    assert output.count("warning: ") == output.count(".png could not be drawn (TypeError: set_text") == len(PLOTS)
    assert Run.find(run.folder).summary == run.summary
    client = MlflowClient(run.summary["mlflow_tracking_uri"])
    mlflow_run = client.get_run(run.summary["mlflow_run_id"])
    assert (mlflow_run.info.status, len(mlflow_run.outputs.model_outputs)) == ("FINISHED", 1)


@pytest.mark.parametrize(
    "values",
    [
        [],
        [3.0],
        [5.0] * 9,
        [0.0] * 9,
        [65.1244, 65.12441],
        [1e20] * 5,
        [-3e38, 3e38],
        [1e-30, 2e-30],
        [float("inf"), 1],
    ],
    ids=str,
)
def test_goodness_plot_accepts_any_values(values, tmp_path):
    goodness = {"positive": torch.tensor([values]), "negative": torch.tensor([values[:1]])}
    assert plot_goodness(goodness, [None], tmp_path / "goodness.png").stat().st_size > 1000


@pytest.mark.parametrize("are_probabilities", [True, False])
def test_samples_are_drawn_with_labels_that_are_not_tried(are_probabilities, tmp_path):
    images, scores = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.full((3, 2, 12), -torch.inf)
    scores[:, :, 3:] = -torch.arange(9.0)
    scores[1, 0] = float("nan")
    path = tmp_path / "samples.png"
    plot_samples(images, torch.tensor([3, 11]), scores, (), path, are_probabilities=are_probabilities)
    assert path.stat().st_size > 1000


def test_weights_of_large_images_are_drawn(tmp_path):
    network = Network(image_architecture((1, 520, 520), 3, (64,), label="append", predict_from=1))
    assert plot_fields(first_filters(network), tmp_path / "fields.png").stat().st_size > 1000


def test_class_name_that_cannot_be_drawn_is_replaced_by_its_number(tmp_path):
    """The names: invalid UTF-8, a script that the font lacks, control characters, an empty name, and a valid one."""
    names = ("K\udce4uzchen", "\u6b62\u8840\u94b3", "a\x00\n", "", "M\u00f6we $1")
    svg = plot_confusion(torch.eye(5), "goodness", names, tmp_path / "c.svg").read_text()
    assert [svg.count(f"<!-- {text} -->") >= 2 for text in ("0", "1", "2", "3", "M\u00f6we $1")] == [True] * 5
    images, labels = torch.zeros(5, 4, dtype=torch.uint8), torch.arange(5)
    svg = plot_negatives(images, labels, (labels + 1) % 5, (1, 2, 2), names, tmp_path / "n.svg").read_text()
    assert all(f"<!-- {text} -->" in svg for text in ("0", "as 1", "as 2", "as 3", "as M\u00f6we $1"))


def test_plots_show_samples_of_all_classes_of_sorted_data(tmp_path, monkeypatch):
    """Image folders are sorted by class, so that a plot of the first samples would show only one class."""
    for split, shade in product(("train", "test"), range(4)):
        (tmp_path / split / f"class_{shade}").mkdir(parents=True)
        for number in range(12):
            Image.new("L", (4, 4), 60 * shade + number).save(tmp_path / split / f"class_{shade}" / f"{number}.png")
    plotted_labels = []
    monkeypatch.setattr(
        "ffdist.plotting.plots.plot_negatives", lambda _, labels, *rest: plotted_labels.append(labels) or rest[-1]
    )
    overrides = ["data.name=image_folder", f"data.path={tmp_path}", "training.batch_size=8", "training.epochs=1"]
    config = load_config("digits", [*overrides, "model.layers=[8]", "data.label=none", "negatives.kind=permuted"])
    run = train(config, runner="serial", runs=tmp_path / "runs")
    assert len(plotted_labels[0].unique()) > 2
    run.plot(tmp_path / "again")
    assert torch.equal(*plotted_labels)


def test_curve_of_one_point_is_visible(tmp_path):
    """A short run logs only one point."""
    history = {f"layer_1/{name}": [(100, 0.5)] for name in ("loss", "goodness_positive", "goodness_negative")}
    svg = plot_layers(history, [None], tmp_path / "l.svg").read_text()
    assert svg.count("#440154") > 3  # the first color of viridis


def test_plots_use_class_names(tmp_path):
    images, labels = torch.zeros(2, 4, dtype=torch.uint8), torch.tensor([0, 1])
    for names, expected in (((), ["0", "as 1"]), (("owl", "heron $1"), ["owl", "as heron $1"])):
        svg = plot_negatives(images, labels, 1 - labels, (1, 2, 2), names, tmp_path / "n.svg").read_text()
        assert all(f"<!-- {text} -->" in svg for text in expected)  # comments beside the outlines of the letters


def test_timeline_has_the_compute_and_wait_times_of_every_actor(run):
    spans = read_timeline(run.folder)
    assert {span.actor for span in spans} == {"stage 1", "stage 2", "readout"}
    assert {span.activity for span in spans} >= {"compute", "wait"}
    assert min(span.start_s for span in spans) == 0
    for actor in ("stage 1", "stage 2", "readout"):
        intervals = sorted((span.start_s, span.duration_s) for span in spans if span.actor == actor)
        assert all(start + duration < next_start + 1e-3 for (start, duration), (next_start, _) in pairwise(intervals))
    trace = json.loads((run.folder / "timeline.json").read_text())["traceEvents"]
    assert {event["ph"] for event in trace} == {"M", "X"}
