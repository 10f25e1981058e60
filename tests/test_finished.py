import json
import shutil
from itertools import pairwise

import pytest
import torch
from PIL import Image

from ffdist import ConfigError, Run, load_config, train
from ffdist.tracking.plots import plot_layers, plot_negatives
from ffdist.tracking.timeline import read_timeline

TREE = {
    "data": {"name": "digits", "label": "append"},
    "model": {"layers": [40, 30]},
    "training": {"epochs": 3},
    "tracking": {"every_minibatches": 28},
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
    test = found.evaluate(found.dataset.images["test"], found.dataset.labels["test"])
    assert test.goodness_error == pytest.approx(run.summary["test_goodness_error"], abs=1.5 / 360)
    assert test.layer_errors == pytest.approx(run.summary["layer_errors"], abs=1.5 / 360)


def test_what_is_no_finished_run_is_told(run, tmp_path):
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.yaml").write_text(run.config.to_yaml())
    with pytest.raises(ConfigError, match="not finished; go on with it"):
        Run.find(tmp_path / "half")
    (tmp_path / "half" / "summary.json").write_text("{")
    with pytest.raises(ConfigError, match=r"summary.json is missing or damaged"):
        Run.find(tmp_path / "half")
    with pytest.raises(ConfigError, match="a run is its folder"):
        Run.find("nothing", tmp_path)


def test_images_of_another_shape_are_refused(run):
    with pytest.raises(ConfigError, match=r"shape \[N, 1, 8, 8\], one or more \(given: torch.uint8, \[2, 3, 8, 8\]\)"):
        run.predict(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ConfigError, match=r"torch\.float32"):
        run.predict(torch.zeros(2, 64))
    for shape in ((2, 8, 8, 1), (64,), (0, 64)):
        with pytest.raises(ConfigError, match="one or more"):
            run.predict(torch.zeros(shape, dtype=torch.uint8))
    images = run.dataset.images["test"][:3]
    expected = run.predict(images).label
    for same in (images.view(3, 1, 8, 8), images.view(3, 8, 8), images.numpy()):
        assert torch.equal(run.predict(same).label, expected)
    for labels in ([0, 1], [0, 1, 10], [0, 1, -1], [0.0, 1.0, 2.0]):
        with pytest.raises(ConfigError, match="a whole number for each image, from 0 to below 10"):
            run.evaluate(images, torch.tensor(labels))


def test_a_runner_that_is_none_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"one of ray, serial, backpropagation \(given: Serial\)"):
        train(TREE, runner="Serial", runs=str(tmp_path))


@pytest.mark.parametrize(
    ("file", "content", "use"),
    [
        ("metrics.db", None, lambda run: run.metrics),
        ("metrics.db", "damaged" * 999, lambda run: run.metrics),
        ("timeline.json", "{", lambda run: run.plot()),
        ("commits", None, lambda run: run.network),
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
    assert "--resume-from-older" not in str(told.value)


def test_pictures_are_drawn_at_the_end_and_again(run, tmp_path):
    assert {path.stem for path in run.folder.glob("*.png")} == PICTURES
    for path in run.plot(tmp_path / "again"):
        with Image.open(path) as picture, Image.open(run.folder / path.name) as before:
            assert picture.size == before.size
            assert min(picture.size) > 100
            assert len(set(picture.convert("L").tobytes())) > 10
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
    assert {span.part for span in spans} == {"stage 1", "stage 2", "readout"}
    assert {span.what for span in spans} >= {"compute", "wait"}
    assert min(span.begun_s for span in spans) == 0
    for part in ("stage 1", "stage 2", "readout"):
        own = sorted((span.begun_s, span.took_s) for span in spans if span.part == part)
        assert all(begun + took < after + 1e-3 for (begun, took), (after, _) in pairwise(own))
    trace = json.loads((run.folder / "timeline.json").read_text())["traceEvents"]
    assert {event["ph"] for event in trace} == {"M", "X"}
