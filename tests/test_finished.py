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
from ffdist.pipeline.timeline import read_timeline
from ffdist.plotting.plots import first_filters, plot_confusion, plot_fields, plot_goodness, plot_layers, plot_negatives

TREE = {
    "data": {"name": "digits", "label": "append"},
    "model": {"layers": [40, 30]},
    "training": {"epochs": 3},
    "tracking": {"log_every_minibatches": 28},
}
PICTURES = {"layers", "negatives", "goodness", "errors", "fields", "confusion", "timeline"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(TREE, runner="serial", runs=tmp_path_factory.mktemp("runs"))


def test_a_configuration_is_nested_dicts_or_a_file_or_a_name(tmp_path):
    short = {"training": {"epochs": 1}, "model": {"layers": [20]}}
    (tmp_path / "some.yaml").write_text(json.dumps(short | {"data": {"name": "digits"}}))
    given = [short | {"data": {"name": "digits"}}, tmp_path / "some.yaml", load_config(str(tmp_path / "some.yaml"))]
    found = [train(config, runner="serial", runs=tmp_path) for config in given]
    assert len({run.summary["weights_sha256"] for run in found}) == 1
    assert [run.folder.name.split("-")[0] for run in found] == ["run", "some", "run"]
    with pytest.raises(ConfigError, match="did you mean digits"):
        train("digit", runner="serial", runs=tmp_path)


def test_metrics_are_those_of_the_run(run):
    assert run.metrics["test/goodness_error"] == [(4200, run.summary["test_goodness_error"])]
    assert [samples for samples, _ in run.metrics["layer_2/loss"]] == [2800, 4200]


def test_it_is_found_again_and_evaluated_as_it_was(run):
    for name in (run.folder, run.summary["mlflow_run_id"]):
        found = Run.find(name, run.folder.parent)
        assert found.summary == run.summary
    test = found.evaluate(found.dataset.samples["test"], found.dataset.labels["test"])
    assert test.goodness_error == pytest.approx(run.summary["test_goodness_error"], abs=1.5 / 360)
    assert test.layer_errors == pytest.approx(run.summary["layer_errors"], abs=1.5 / 360)


def test_what_is_no_finished_run_is_told(run, tmp_path):
    (tmp_path / "half done").mkdir()
    (tmp_path / "half done" / "config.yaml").write_text(run.config.to_yaml())
    with pytest.raises(ConfigError, match="resume it with") as told:
        Run.find(tmp_path / "half done")
    command = str(told.value).split("`")[1]
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


def test_images_of_another_shape_are_refused(run):
    with pytest.raises(ConfigError, match=r"shape \[N, 1, 8, 8\] with N > 0 \(given: torch.uint8, \[2, 3, 8, 8\]\)"):
        run.predict(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ConfigError, match=r"torch\.float32"):
        run.predict(torch.zeros(2, 64))
    for shape in ((2, 8, 8, 1), (64,), (0, 64)):
        with pytest.raises(ConfigError, match="with N > 0"):
            run.predict(torch.zeros(shape, dtype=torch.uint8))
    images = run.dataset.samples["test"][:3]
    expected = run.predict(images).label
    for same in (images.view(3, 1, 8, 8), images.view(3, 8, 8), images.numpy()):
        assert torch.equal(run.predict(same).label, expected)
    for labels in ([0, 1], [0, 1, 10], [0, 1, -1], [0.0, 1.0, 2.0]):
        with pytest.raises(ConfigError, match=r"labels must be integers in \[0, 10\), one per sample"):
            run.evaluate(images, torch.tensor(labels))


def test_a_name_is_one_part_of_a_path(tmp_path):
    for name in ("a/b", "a\0b"):
        with pytest.raises(ConfigError, match="must hold no /"):
            train(TREE, runner="serial", runs=tmp_path, name=name)
    assert not list(tmp_path.iterdir())


def test_a_long_name_is_cut(tmp_path):
    config = load_config("xor", ["training.epochs=1", "tracking.artifacts=[]"])
    run = train(config, runner="serial", runs=tmp_path, name="\u00f6" * 240)
    assert run.folder.name.startswith("\u00f6" * 100 + "-2")
    assert Run.find(run.summary["mlflow_run_id"], tmp_path).folder == run.folder


def test_a_runner_that_is_none_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"one of ray, serial, backpropagation \(given: Serial\)"):
        train(TREE, runner="Serial", runs=str(tmp_path))


@pytest.mark.parametrize(
    ("file", "content", "use"),
    [
        ("metrics.db", None, lambda run: run.metrics),
        ("metrics.db", "damaged" * 999, lambda run: run.metrics),
        ("timeline.json", "{", lambda run: run.plot()),
        ("checkpoints", None, lambda run: run.network),
    ],
)
def test_what_is_missing_or_damaged_is_named(run, file, content, use, tmp_path):
    folder = tmp_path / "a #run?"  # a name that means something in a URI
    shutil.copytree(run.folder, folder)
    found = Run.find(folder)
    assert use(found)
    shutil.rmtree(folder / file) if (folder / file).is_dir() else (folder / file).unlink()
    if content:
        (folder / file).write_text(content)
    with pytest.raises(ConfigError, match=file) as told:
        use(Run.find(folder))
    assert "train" in str(told.value)
    assert "--skip-damaged" not in str(told.value)


def test_pictures_are_drawn_at_the_end_and_again(run, tmp_path):
    assert {path.stem for path in run.folder.glob("*.png")} == PICTURES
    for path in run.plot(tmp_path / "again"):
        with Image.open(path) as picture, Image.open(run.folder / path.name) as before:
            assert picture.size == before.size
            if path.stem in {"layers", "negatives", "fields", "timeline"}:  # others tell sums of another order
                assert picture.tobytes() == before.tobytes()
    assert {path.stem for path in (tmp_path / "again").iterdir()} == PICTURES


@pytest.mark.parametrize(
    "changes",
    [
        ["negatives.kind=hybrid", "data.label=none"],
        ["negatives.kind=hard_label"],
        ["training.loss=symmetric"],
        ["data.label=everywhere", "model.layers=[{kind: local, grid: 3, stride: 2, field: 4, units: 9}, 20]"],
    ],
    ids=str,
)
def test_every_kind_of_run_can_be_drawn(changes, tmp_path):
    run = train(
        load_config("digits", ["model.layers=[20,20]", *changes, "training.epochs=1"]), runner="serial", runs=tmp_path
    )
    assert {path.stem for path in run.folder.glob("*.png")} == PICTURES


def broken(*arguments):
    raise TypeError("set_text(): incompatible function arguments")


def test_a_plot_that_fails_is_named_and_the_others_are_drawn(run, tmp_path, monkeypatch):
    monkeypatch.setattr("ffdist.plotting.plots.plot_goodness", broken)
    with pytest.raises(ConfigError, match=r"^goodness\.png could not be drawn \(TypeError: set_text"):
        run.plot(tmp_path)
    assert {path.stem for path in tmp_path.iterdir()} == PICTURES - {"goodness"}


def test_a_run_whose_plots_all_fail_is_finished(tmp_path, monkeypatch, capsys):
    for picture in PICTURES:
        monkeypatch.setattr(f"ffdist.plotting.plots.plot_{picture}", broken)
    run = train(TREE | {"training": {"epochs": 1}}, runner="serial", runs=tmp_path)
    said = capsys.readouterr().out
    assert said.count("warning: ") == said.count(".png could not be drawn (TypeError: set_text") == len(PICTURES)
    assert Run.find(run.folder).summary == run.summary
    client = MlflowClient(run.summary["mlflow_tracking_uri"])
    tracked = client.get_run(run.summary["mlflow_run_id"])
    assert (tracked.info.status, len(tracked.outputs.model_outputs)) == ("FINISHED", 1)


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
def test_goodness_of_any_values_is_drawn(values, tmp_path):
    goodness = {"positive": torch.tensor([values]), "negative": torch.tensor([values[:1]])}
    assert plot_goodness(goodness, [None], tmp_path / "goodness.png").stat().st_size > 1000


def test_weights_of_large_images_are_drawn(tmp_path):
    network = Network(image_architecture((1, 520, 520), 3, (64,), label="append", predict_from=1))
    assert plot_fields(first_filters(network), tmp_path / "fields.png").stat().st_size > 1000


def test_a_class_whose_name_cannot_be_drawn_goes_by_its_number(tmp_path):
    """A name of bytes that are no UTF-8, one in a script that the font lacks, one of control characters, and none."""
    names = ("K\udce4uzchen", "\u6b62\u8840\u94b3", "a\x00\n", "", "M\u00f6we $1")
    drawn = plot_confusion(torch.eye(5), "goodness", names, tmp_path / "c.svg").read_text()
    assert [drawn.count(f"<!-- {text} -->") >= 2 for text in ("0", "1", "2", "3", "M\u00f6we $1")] == [True] * 5
    images, labels = torch.zeros(5, 4, dtype=torch.uint8), torch.arange(5)
    drawn = plot_negatives(images, labels, (labels + 1) % 5, (1, 2, 2), names, tmp_path / "n.svg").read_text()
    assert all(f"<!-- {text} -->" in drawn for text in ("0", "as 1", "as 2", "as 3", "as M\u00f6we $1"))


def test_plots_show_samples_of_all_classes_of_sorted_data(tmp_path, monkeypatch):
    """Image folders are sorted by class, and a plot of the first samples would show one class."""
    for split, shade in product(("train", "test"), range(4)):
        (tmp_path / split / f"class_{shade}").mkdir(parents=True)
        for number in range(12):
            Image.new("L", (4, 4), 60 * shade + number).save(tmp_path / split / f"class_{shade}" / f"{number}.png")
    shown = []
    monkeypatch.setattr(
        "ffdist.plotting.plots.plot_negatives", lambda _, labels, *more: shown.append(labels) or more[-1]
    )
    changes = ["data.name=image_folder", f"data.path={tmp_path}", "training.batch_size=8", "training.epochs=1"]
    config = load_config("digits", [*changes, "model.layers=[8]", "data.label=none", "negatives.kind=permuted"])
    run = train(config, runner="serial", runs=tmp_path / "runs")
    assert len(shown[0].unique()) > 2
    run.plot(tmp_path / "again")
    assert torch.equal(*shown)


def test_a_curve_of_one_point_is_seen(tmp_path):
    """As a short run has it."""
    history = {f"layer_1/{name}": [(100, 0.5)] for name in ("loss", "goodness_positive", "goodness_negative")}
    drawn = plot_layers(history, [None], tmp_path / "l.svg").read_text()
    assert drawn.count("#440154") > 3  # of viridis, the first


def test_pictures_call_classes_by_their_names(tmp_path):
    images, labels = torch.zeros(2, 4, dtype=torch.uint8), torch.tensor([0, 1])
    for names, expected in (((), ["0", "as 1"]), (("owl", "heron $1"), ["owl", "as heron $1"])):
        drawn = plot_negatives(images, labels, 1 - labels, (1, 2, 2), names, tmp_path / "n.svg").read_text()
        assert all(f"<!-- {text} -->" in drawn for text in expected)  # which it writes beside the outlines of letters


def test_the_timeline_tells_who_computed_and_waited_when(run):
    spans = read_timeline(run.folder)
    assert {span.actor for span in spans} == {"stage 1", "stage 2", "readout"}
    assert {span.activity for span in spans} >= {"compute", "wait"}
    assert min(span.start_s for span in spans) == 0
    for part in ("stage 1", "stage 2", "readout"):
        own = sorted((span.start_s, span.duration_s) for span in spans if span.actor == part)
        assert all(begun + took < after + 1e-3 for (begun, took), (after, _) in pairwise(own))
    trace = json.loads((run.folder / "timeline.json").read_text())["traceEvents"]
    assert {event["ph"] for event in trace} == {"M", "X"}
