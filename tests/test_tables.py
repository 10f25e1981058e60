"""Tables of numbers, from files to exported networks; and CSV files with names of images."""

import json
import math
import shutil
from dataclasses import replace

import joblib
import mlflow
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from mlflow.exceptions import MlflowException
from PIL import Image
from sklearn.datasets import load_breast_cancer

from ffdist import ConfigError, Run, load_config, load_network, train
from ffdist.config.sections import Data
from ffdist.data.datasets import load_dataset
from ffdist.data.inputs import read_table_inputs
from ffdist.ff.encoders import TableEncoder, encoder_entry, parse_encoder
from ffdist.runs.export import export_network
from ffdist.runs.inference import evaluate_on
from ffdist.training.prepare import prepare

SHORT = ["model.layers=[20, 16]", "training.epochs=4", "training.precision=float32", "tracking.artifacts=[]"]
TRAIN = "height,width,kind\n1.5,2,a\n2.5,4,b\n3.5,9,a\n4.5,1,b\n"


def load(path, validation_samples="auto", **settings):
    config = Data(**{"name": "csv", "path": path} | settings)
    return load_dataset(config, seed=0, validation_samples=validation_samples)


def write_csv(path, *, train=TRAIN, test=TRAIN):
    (path / "train.csv").write_text(train)
    (path / "test.csv").write_text(test)


def make_encoder(samples, **settings):
    return TableEncoder((samples.shape[1],), 2, **TableEncoder.fit(samples, samples.shape[1:], {}), **settings)


def test_columns_of_the_training_set_have_mean_0_and_deviation_1():
    samples = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    samples = samples * torch.tensor([1e-6, 1.0, 1e8]) + torch.tensor([0.0, 7.0, 7e8])
    values = make_encoder(samples).values(samples).double()
    torch.testing.assert_close(values.mean(0), torch.zeros(3).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(values.std(0, correction=0), torch.ones(3).double(), rtol=0, atol=1e-5)


def test_statistics_do_not_depend_on_the_number_of_threads():
    samples = torch.rand(20_000, 7, generator=torch.Generator().manual_seed(0))
    settings = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        settings.append(TableEncoder.fit(samples, samples.shape[1:], {}))
    torch.set_num_threads(1)
    assert settings[0] == settings[1]


def test_constant_columns_become_0_and_no_value_is_infinite():
    huge = torch.finfo(torch.float32).max
    samples = torch.tensor([[0.1, -huge, 1e-45], [0.1, huge, 0.0], [0.1, 0.0, 1e-45]])
    encoder = make_encoder(samples)
    assert encoder.deviation[0] == 0
    assert encoder.values(samples)[:, 0].tolist() == [0, 0, 0]
    for other in (samples, torch.full((1, 3), huge), torch.full((1, 3), -huge)):
        assert encoder.values(other).isfinite().all()
        assert encoder.values(other).square().sum(1).isfinite().all()
    assert encoder.values(torch.tensor([[huge, 0.0, 0.0]]))[0, 0] == 0
    assert encoder.values(samples)[:, 1].tolist() == pytest.approx([-(1.5**0.5), 1.5**0.5, 0])


def test_encoders_of_tables_survive_a_file():
    encoder = make_encoder(torch.rand(9, 4), label_scale=2.0)
    assert parse_encoder(json.loads(json.dumps(encoder_entry(encoder)))) == encoder
    entry = encoder_entry(encoder)
    for changes, message in (
        ({"mean": [0.0] * 3}, "mean must be a number for each of the 4 columns"),
        ({"mean": [math.nan] * 4}, "must be finite"),
        ({"deviation": [-1.0] * 4}, "no deviation negative"),
        ({"deviation": ["1"] * 4}, "deviation must be a number"),
        ({"deviation": "1111"}, "deviation must be of type tuple"),
        ({"mean": [10**400] * 4}, "settings of an encoder are invalid"),
        ({"shape": [2, 2]}, "must be the number of columns"),
        ({"label": "overwrite"}, r"for images, whose border is empty; set data\.label to append"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_encoder(entry | changes)


def test_csv_tables_are_read_by_the_names_of_their_columns(tmp_path):
    write_csv(tmp_path, test="kind,width,height\nb,8,0.5\n")
    dataset = load(tmp_path)
    assert dataset.samples["train"].tolist() == [[1.5, 2], [2.5, 4], [3.5, 9], [4.5, 1]]
    assert (dataset.samples["test"].tolist(), dataset.labels["test"].tolist()) == ([[0.5, 8]], [1])
    assert (dataset.names, dataset.facts["features"]) == (("a", "b"), ["height", "width"])
    assert "csv; files: 1 train, 1 test; labels in column kind; samples: 4 train, 0 val" in dataset.describe()
    assert dataset.encoder.mean == (3.0, 4.0)


def test_parquet_tables_of_numbers_are_read_alike(tmp_path):
    columns = {"height": [1.5, 2.5], "big": [True, False], "width": pa.array([2, 4], pa.int16()), "label": [1, 0]}
    table = pa.table(columns | {"__index_level_0__": [5, 6]})
    for split in ("train-0", "train-1", "test"):
        pq.write_table(table, tmp_path / f"{split}.parquet")
    dataset = load(tmp_path, name="parquet")
    assert dataset.samples["train"].tolist() == [[1.5, 1, 2], [2.5, 0, 4]] * 2
    assert (dataset.labels["train"].tolist(), dataset.facts["features"]) == ([1, 0] * 2, ["height", "big", "width"])
    assert load(tmp_path, name="parquet", label_column="width", classes=9).labels["test"].tolist() == [2, 4]


@pytest.mark.parametrize(
    ("files", "settings", "message"),
    [
        (
            {"train": "a,kind\n1,x\n,y\n"},
            {},
            r"train\.csv, row 1: the column a must hold .* \(value: missing\); fill it",
        ),
        ({"train": "a,kind\n1,x\nNA,y\n"}, {}, r"row 1: the column a must hold .* \(value: missing\)"),
        ({"train": "a,kind\n1,x\ninf,y\n"}, {}, r"row 1: .* \(value: inf\)"),
        ({"train": "a,kind\n1,x\n1e39,y\n"}, {}, r"row 1: .* \(value: 1e\+39\)"),
        ({"train": "a,kind\n,x\n,y\n"}, {}, r"row 0: the column a"),
        ({"train": "a,kind\n1,x\n2,\n"}, {}, r"train\.csv, row 1: a label must be one of the classes .*label: ''"),
        ({"train": "a,b,kind\n1,red,x\n2,blue,y\n"}, {}, r"label_column must name .*candidates: \['b', 'kind'\]"),
        (
            {"train": "a,b,kind\n1,red,x\n2,blue,y\n"},
            {"label_column": "kind"},
            r"must be numbers \(others: b: string\)",
        ),
        ({"train": "kind\nx\ny\n"}, {}, r"must have a column beside the label \(columns: kind\)"),
        ({"train": "a,a,kind\n1,2,x\n"}, {}, r"unique names \(a: 2 columns\)"),
        ({"train": "1,2\n3,4\n"}, {}, "first line must hold names of columns"),
        ({"train": "a,kind\n1,x,3\n"}, {}, r"train\.csv cannot be read as CSV: .*; write it again"),
        ({"train": ""}, {}, r"train\.csv cannot be read as CSV"),
        ({"train": "a,kind\n"}, {}, "the train split is empty"),
        ({"test": "height,width,kind\n"}, {}, "the test split is empty"),
        ({"test": "height,kind\n1,a\n"}, {}, r"must have the same columns \(only in one: \['width'\]\)"),
        ({"test": "height,width,kind\n1,2,c\n"}, {}, r"test\.csv, row 0: a label must be one of .*label: 'c'"),
        ({}, {"image_size": (2, 2)}, r"data\.image_size is for images .*leave it out"),
        ({}, {"jitter": 1}, r"data\.jitter is for images"),
        ({}, {"subtract_mean": True}, r"data\.subtract_mean is for images"),
        ({}, {"label": "overwrite"}, "for images, whose border is empty"),
    ],
)
def test_errors_of_tables_state_rule_value_and_fix(files, settings, message, tmp_path):
    write_csv(tmp_path, **{"test": files.get("train", TRAIN)} | files)
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, **settings)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("negatives.kind=hybrid", r"negatives\.kind=hybrid: needs images \(samples: float32 of shape \[30\]\)"),
        ("negatives.kind=noise", "needs images"),
        ("data.label=everywhere", "shows the label to each local field"),
        ("model.layers=[{kind: local, grid: 2, field: 2, units: 4}]", "layer"),
        ("data.jitter=1", r"data\.jitter is for images"),
    ],
)
def test_settings_for_images_are_rejected(override, message):
    with pytest.raises(ConfigError, match=message):
        prepare(load_config("breast_cancer", [override]))


def test_tables_can_have_thousands_of_columns(tmp_path):
    values = np.random.default_rng(0).normal(size=(6, 3000)).astype(np.float32)
    names = [f"column {number}" for number in range(3000)]
    for split in ("train", "test"):
        table = pa.table(dict(zip(names, values.T, strict=True)) | {"label": [0, 1] * 3})
        pq.write_table(table, tmp_path / f"{split}.parquet")
    assert np.array_equal(load(tmp_path, name="parquet").samples["train"].numpy(), values)


def test_csv_files_name_images(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(4):
        Image.new("L", (5, 4), number).save(tmp_path / "images" / f"{number}.png")
    lines = [f"images/{number}.png,{'cat' if number % 2 else 'ant'},{number}" for number in range(4)]
    write_csv(
        tmp_path,
        train="\n".join(["file_name,label,weight", *lines]),
        test=f"file_name,label,weight\n{tmp_path}/images/3.png,ant,1\n",
    )
    dataset = load(tmp_path)
    assert (dataset.shape, dataset.names) == ((1, 4, 5), ("ant", "cat"))
    assert dataset.samples["train"][:, 0].tolist() == [0, 1, 2, 3]
    assert (dataset.samples["test"][0, 0], dataset.labels["test"].tolist()) == (3, [0])
    assert "images in column file_name, labels in column label" in dataset.describe()
    assert "skipped" not in dataset.describe()
    (tmp_path / "images" / "2.png").unlink()
    with pytest.raises(
        ConfigError, match=r"train\.csv, row 2 \(images/2\.png\): the image cannot be decoded .*No such"
    ):
        load(tmp_path)
    write_csv(tmp_path, train="picture,label\nimages/0.png,a\nimages/1.png,b\n", test="picture,label\nimages/3.png,a\n")
    with pytest.raises(
        ConfigError, match=r"must be numbers \(others: picture: string\).* for images, set data\.image_"
    ):
        load(tmp_path)
    assert load(tmp_path, image_column="picture").samples["train"][:, 0].tolist() == [0, 1]


def test_inputs_are_found_by_the_names_of_the_columns(tmp_path):
    write_csv(tmp_path)
    (tmp_path / "rows.csv").write_text("note,width,height\nx,8,0.5\ny,7,0.25\n")
    config, features = Data(name="csv", path=tmp_path), ["height", "width"]
    inputs = read_table_inputs([tmp_path / "rows.csv"], config, features, 2, ["a", "b"])
    assert (inputs.samples.tolist(), inputs.labels) == ([[0.5, 8], [0.25, 7]], None)
    assert inputs.locations == [f"{tmp_path}/rows.csv, row {row}" for row in (0, 1)]
    (tmp_path / "rows.csv").write_text("label,width,height\nb,8,0.5\na,7,0.25\n")
    assert read_table_inputs([tmp_path / "rows.csv"], config, features, 2, ["a", "b"]).labels.tolist() == [1, 0]
    (tmp_path / "rows.csv").write_text("label,width\nb,8\n")
    with pytest.raises(ConfigError, match=r"columns that the network was trained on \(missing: height; columns: label"):
        read_table_inputs([tmp_path / "rows.csv"], config, features, 2, ["a", "b"])
    (tmp_path / "rows.csv").write_text("height,width\n1,\n")
    with pytest.raises(ConfigError, match=r"row 0: the column width must hold a finite"):
        read_table_inputs([tmp_path / "rows.csv"], config, features, 2)
    for name, message in (
        ("x.png", "must be a Parquet file, a CSV file"),
        ("empty", "there must be a row to classify"),
    ):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(ConfigError, match=message):
            read_table_inputs([tmp_path / name], config, features, 2)


def test_breast_cancer_is_a_table_with_a_fixed_test_set():
    dataset = load_dataset(Data(name="breast_cancer"), seed=0, validation_samples=55)
    assert {split: len(labels) for split, labels in dataset.labels.items()} == {
        "train": 400,
        "validation": 55,
        "test": 114,
    }
    assert (dataset.names, dataset.facts["features"][0]) == (("malignant", "benign"), "mean radius")
    assert torch.bincount(dataset.labels["test"]).tolist() == [42, 72]
    other = load_dataset(Data(name="breast_cancer"), seed=1, validation_samples="auto")
    assert dataset.sha256("test") == other.sha256("test")
    assert dataset.encoder.mean != other.encoder.mean  # the validation samples are not part of it


def test_covertype_is_read_from_the_files_of_scikit_learn(tmp_path):
    """The files are as `fetch_covtype` writes them, with fewer rows; the download cannot be tested."""
    (tmp_path / "covertype").mkdir()
    values = np.arange(16_000 * 54, dtype=np.float64).reshape(16_000, 54)
    joblib.dump(values, tmp_path / "covertype" / "samples_py3")
    joblib.dump(np.arange(16_000) % 7 + 1, tmp_path / "covertype" / "targets_py3")
    for suffix in ("samples", "targets"):
        (tmp_path / "covertype" / suffix).write_bytes((tmp_path / "covertype" / f"{suffix}_py3").read_bytes())
    config = Data(name="covertype", root=tmp_path)
    dataset = load_dataset(config, seed=0, validation_samples="auto", may_import=True)
    assert [len(labels) for labels in dataset.labels.values()] == [11_340, 3_780, 880]
    assert dataset.samples["test"][0].tolist() == values[15_120].tolist()
    assert (dataset.names[6], dataset.labels["train"][6].item()) == ("Krummholz", 6)
    with pytest.raises(ConfigError, match=r"own validation split .*training\.validation_samples: 9.*leave it out"):
        load_dataset(config, seed=0, validation_samples=9, may_import=True)
    with pytest.raises(ConfigError, match="loading of pickles"):
        load_dataset(config, seed=0, validation_samples="auto")


def test_error_of_a_failed_download_of_covertype_names_the_fix(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("sklearn.datasets._base.urlretrieve", fail)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # of its retries
    with pytest.raises(ConfigError, match=r"could not be downloaded.*set data\.root or FFDIST_DATA.*network"):
        load_dataset(Data(name="covertype", root=tmp_path), seed=0, validation_samples="auto", may_import=True)


@pytest.mark.parametrize(
    "settings", [(), pytest.param(("data.label=none", "negatives.kind=permuted"), marks=pytest.mark.slow)]
)
def test_serial_and_pipelined_runs_on_a_table_are_equal(ray_start_4_cpus, settings, tmp_path):
    config = load_config("breast_cancer", [*SHORT, *settings])
    runs = [train(config, runner=runner, address=None, runs=tmp_path) for runner in ("serial", "ray")]
    assert len({run.summary["weights_sha256"] for run in runs}) == 1


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = load_config("breast_cancer", [*SHORT, "tracking.artifacts=[plots, model]", "training.epochs=20"])
    return train(config, runner="serial", runs=tmp_path_factory.mktemp("runs"))


def write_rows(path, count=5):
    """Writes rows of the dataset with their labels, the columns in reverse order."""
    bunch = load_breast_cancer()
    columns = {str(name): bunch.data[:count, index] for index, name in enumerate(bunch.feature_names)}
    columns = dict(reversed(columns.items())) | {"label": [str(bunch.target_names[n]) for n in bunch.target[:count]]}
    pq.write_table(pa.table(columns), path / "rows.parquet")
    text = [",".join(columns), *(",".join(map(str, row)) for row in zip(*columns.values(), strict=True))]
    (path / "rows.csv").write_text("\n".join(text))
    return bunch.data[:count], bunch.target[:count]


def test_a_network_for_a_table_learns_and_has_all_plots_but_those_of_images(run):
    assert run.summary["test_goodness_error"] < 0.15
    assert run.summary["encoder"]["label"] == "append"
    plots = {path.name for path in run.folder.glob("*.png")}
    assert {"layers.png", "goodness.png", "errors.png", "confusion.png"} <= plots
    assert not plots & {"negatives.png", "fields.png"}
    assert Run.find(run.folder).dataset.sha256("test") == run.dataset.sha256("test")


def test_files_with_the_columns_of_training_are_evaluated_and_predicted(run, tmp_path, ffdist):
    values, labels = write_rows(tmp_path)
    expected = run.predict(torch.from_numpy(values)).label.tolist()
    for name in ("rows.csv", "rows.parquet"):
        output = ffdist("predict", run.folder, name, "--output", "predicted.parquet")
        assert pq.read_table("predicted.parquet")["label"].to_pylist() == expected
        assert f"{name}, row 4" in output
        error = sum(a != b for a, b in zip(expected, labels, strict=True)) / 5
        assert f"test error {error:.2%} by goodness" in ffdist("evaluate", run.folder, "--data", name)
        assert "of 5 samples" in evaluate_on(run, tmp_path / name, label_column="label")
    with pytest.raises(ConfigError, match=r"must have the column nothing \(labels are in: column label, class names"):
        evaluate_on(Run.find(run.folder), tmp_path / "rows.csv", label_column="nothing")


def test_numbers_of_any_type_are_predicted_unless_they_are_not_finite(run):
    samples = run.dataset.samples["test"][:4]
    expected = run.predict(samples).label
    assert torch.equal(run.predict(samples.double().numpy()).label, expected)
    assert run.predict(samples.long()).label.shape == (4,)
    for value in (math.nan, math.inf, 1e39):
        with pytest.raises(ConfigError, match="samples must be finite numbers"):
            run.predict(torch.full((2, 30), value, dtype=torch.float64))
    frame = load_breast_cancer(as_frame=True)
    values = run.predict(frame.data.to_numpy()).label
    assert torch.equal(run.predict(frame.data[frame.data.columns[::-1]]).label, values)
    with pytest.raises(ConfigError, match=r"columns that the network was trained on \(missing: mean radius\)"):
        run.predict(frame.data.drop(columns="mean radius"))
    with pytest.raises(ConfigError, match=r"shape \[N, 30\] with N > 0"):
        run.predict(torch.zeros(2, 29))


def test_labels_may_be_names_of_classes(run):
    samples, labels = run.dataset.samples["test"], run.dataset.labels["test"]
    names = [run.class_names[label] for label in labels]
    assert run.evaluate(samples, names).describe() == run.evaluate(samples, labels).describe()
    with pytest.raises(ConfigError, match=r"names of classes \(given: 'owl', classes: malignant, benign\)"):
        run.evaluate(samples[:1], ["owl"])


def test_exported_and_served_networks_standardize_their_inputs(run, tmp_path):
    values = torch.from_numpy(write_rows(tmp_path)[0])
    samples, expected = values.float(), run.predict(values)
    export_network(run, tmp_path / "exported")
    network = load_network(tmp_path / "exported")
    assert network.architecture.encoder == run.network.architecture.encoder
    assert torch.equal(network.predict(samples).goodness, expected.goodness)
    label, probability, _ = torch.export.load(tmp_path / "exported" / "classifier.pt2").module()(samples)
    assert torch.equal(label, expected.label)
    torch.testing.assert_close(probability, expected.probabilities)
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(tmp_path / "exported" / "classifier.onnx")
    _, probability, _ = session.run(None, {session.get_inputs()[0].name: samples.numpy()})
    torch.testing.assert_close(torch.from_numpy(probability), expected.probabilities, rtol=1e-3, atol=1e-4)
    served = mlflow.pyfunc.load_model(str(next((tmp_path / "exported").glob("*/MLmodel")).parent))
    names = [run.class_names[label] for label in expected.label]
    assert served.predict(np.array(values.tolist()))["name"].tolist() == names
    frame = pd.DataFrame(values.numpy(), columns=run.features).assign(other="text")
    for samples in (frame[frame.columns[::-1]], {name: frame[name].to_numpy() for name in reversed(frame.columns)}):
        assert served.predict(samples)["name"].tolist() == names
    whole = pd.DataFrame({"sample": [np.array(row) for row in values.tolist()]})
    for samples in (pd.DataFrame(values.numpy()), frame[run.features].set_axis(map(str, range(30)), axis=1), whole):
        assert served.predict(samples)["name"].tolist() == names  # without names of columns, by position
    with pytest.raises(MlflowException, match=r"columns that the network was trained on \(missing: mean radius\)"):
        served.predict(frame.drop(columns="mean radius"))


def test_a_model_without_its_run_knows_the_names_of_the_columns(run, tmp_path, ffdist_in):
    runs = tmp_path / "runs"
    shutil.copytree(run.folder.parent, runs, ignore=shutil.ignore_patterns(run.folder.name))
    values, _ = write_rows(tmp_path)
    model = Run.find(f"runs:/{run.summary['mlflow_run_id']}/model", runs)
    assert (model.features, model.class_names) == (run.features, run.class_names)
    expected = run.predict(values).label.tolist()
    frame = pd.DataFrame(values, columns=run.features)
    assert model.predict(frame[frame.columns[::-1]]).label.tolist() == expected
    uri = f"runs:/{run.summary['mlflow_run_id']}"
    ffdist_in(tmp_path, "predict", uri, "rows.csv", "--output", "out.json", "--runs", runs)
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [row["label"] for row in rows] == expected
    assert "of 5 samples" in ffdist_in(tmp_path, "evaluate", uri, "--data", "rows.parquet", "--runs", runs)


def test_networks_for_arrays_without_names_read_no_files(tmp_path):
    values, labels = write_rows(tmp_path, 200)
    config = {
        "model": {"layers": [9]},
        "training": {"epochs": 1, "batch_size": 20},
        "tracking": {"artifacts": []},
    }
    run = train(config, data=(values, labels), runner="serial", runs=tmp_path)
    with pytest.raises(ConfigError, match=r"tables with the names of their columns.*30 columns without names"):
        evaluate_on(run, tmp_path / "rows.csv")


def test_the_label_of_an_earlier_default_counts_as_the_same_setting():
    """Runs of earlier versions recorded `overwrite`; their resumption and their rows of results compare it."""
    config = load_config("mnist", [])
    assert config.data.label == "auto"
    assert config.flat()["data.label"] == load_config("mnist", ["data.label=overwrite"]).flat()["data.label"]
    assert load_config("mnist", ["data.label=append"]).flat() != config.flat()


def test_an_encoder_is_replaced_and_pickled_with_its_statistics():
    encoder = make_encoder(torch.rand(9, 4))
    other = replace(encoder, label="none")
    samples = torch.rand(3, 4)
    assert torch.equal(other.values(samples), encoder.values(samples))
