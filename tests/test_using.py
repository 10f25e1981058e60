"""Prediction, evaluation, export and serving with a finished run."""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import mlflow
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers import image_architecture
from onnxruntime import InferenceSession
from PIL import Image

from ffdist import load_config, load_network, train
from ffdist.cli import main
from ffdist.export.network import Names, save_network
from ffdist.export.program import save_program
from ffdist.ff.classify import total_goodness
from ffdist.ff.network import Network
from ffdist.ff.specs import Local
from ffdist.runs.export import export_network


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    overrides = ["training.epochs=12", "model.layers=[200,200]"]
    overrides += ["tracking.register=digits-net", "tracking.flush_timeout_s=250"]
    return train(load_config("digits", overrides), runner="serial", runs=tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("layers", [(5, 4), (Local(grid=2, stride=2, field=3, units=4), 6)])
@pytest.mark.parametrize("label", ["append", "none"])
def test_saved_network_gives_the_same_predictions(layers, label, tmp_path):
    label = "everywhere" if label == "append" and not isinstance(layers[0], int) else label
    network = Network(image_architecture((1, 6, 6), 3, layers, label=label, precision="bfloat16", seed=3))
    for parameter in network.parameters():  # so that the seed alone does not determine the weights
        parameter.data += torch.randn_like(parameter)
    network.load_state_dict(network.state_dict())
    save_network(network, tmp_path, Names())
    images = torch.randint(256, (7, 36), dtype=torch.uint8)
    for expected, actual in zip(network.predict(images), load_network(tmp_path).predict(images), strict=True):
        assert torch.equal(expected, actual)
    (tmp_path / "network.json").write_text("{}")
    with pytest.raises(ValueError, match="no network that can be read"):
        load_network(tmp_path)
    save_network(network, tmp_path, Names())
    weights = tmp_path / "network.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="is too small for its architecture"):
        load_network(tmp_path)


def run_classifier(path: Path, samples: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.export.load(path).module()(samples)


def test_exported_program_needs_only_torch_and_predicts_bitwise_the_same(run, tmp_path, ffdist):
    """It takes batches of any size; results are equal in batches of the same size."""
    assert "classifier.pt2" in ffdist("export", run.folder, "--output", tmp_path / "out")
    images = run.dataset.samples["test"]
    torch.save(images[:1].view(1, 1, 8, 8), tmp_path / "images.pt")
    code = (
        "import sys, torch; images = torch.load(sys.argv[1]); network = torch.export.load(sys.argv[2]).module(); "
        "print(network(images)[0].tolist()); assert 'ffdist' not in sys.modules"
    )
    command = [sys.executable, "-c", code, tmp_path / "images.pt", tmp_path / "out" / "classifier.pt2"]
    output = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True, cwd=tmp_path).stdout
    assert json.loads(output) == run.predict(images[:1]).label.tolist()
    expected = run.predict(images)
    label, probability, goodness = run_classifier(tmp_path / "out" / "classifier.pt2", images.view(-1, 1, 8, 8))
    assert len(images) < run.network.architecture.prediction_batch
    assert torch.equal(label, expected.label)
    assert torch.equal(probability, expected.probabilities)
    assert torch.equal(goodness, total_goodness(expected.goodness, run.network.architecture.read_layers))
    assert "new or empty" in ffdist("export", run.folder, "--output", tmp_path / "out", code=2)


def test_exported_onnx_predicts_by_goodness_and_describes_itself(run, tmp_path):
    export_network(run, tmp_path)
    session, images = InferenceSession(tmp_path / "classifier.onnx"), run.dataset.samples["test"]
    expected = run.predict(images)
    (samples,) = session.get_inputs()
    assert (samples.name, samples.shape[1:], samples.type) == ("samples", [1, 8, 8], "tensor(uint8)")
    outputs = [each.name for each in session.get_outputs()]
    assert outputs == ["label", "probability", "goodness"]
    label, probability, goodness = map(
        torch.as_tensor, session.run(None, {"samples": images.view(-1, 1, 8, 8).numpy()})
    )
    assert (label == expected.label).double().mean() > 0.98  # the network may compute in bfloat16
    assert torch.allclose(probability, expected.probabilities, atol=0.02)
    assert torch.equal(label, goodness.argmax(1))
    metadata = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    assert metadata["class_names"] == []
    assert metadata["outputs"] == outputs
    assert (metadata["shape"], metadata["dtype"], metadata["encoder"]["subtract_mean"]) == ([1, 8, 8], "uint8", False)


@pytest.mark.parametrize(
    "overrides",
    [["data.label=none", "negatives.kind=hybrid"], ["data.label=append", "data.subtract_mean=true"], ["seed=7"]],
    ids=str,
)
def test_every_kind_of_network_is_served_as_it_predicts(overrides, tmp_path):
    config = load_config("digits", [*overrides, "model.layers=[20,20]", "training.epochs=1", "tracking.uri=none"])
    run = train(config, runner="serial", runs=tmp_path / "runs")
    samples, folder = run.dataset.samples["test"], tmp_path / "out"
    export_network(run, folder)
    expected, served = run.predict(samples), mlflow.pyfunc.load_model(str(folder / "model"))
    for shape in ((-1, 64), (-1, 8, 8), (-1, 1, 8, 8)):
        answer = served.predict(samples.view(shape).numpy())
        assert np.array_equal(answer["label"], expected.label.numpy())
        assert np.array_equal(answer["probability"], expected.probabilities.numpy())
        assert ("goodness" in answer) == (config.data.label != "none")


def test_classes_without_samples_are_never_predicted_by_an_exported_program(tmp_path):
    network = Network(image_architecture((1, 6, 6), 4, (9, 8), label="append", untrained=(1, 3)))
    samples = torch.randint(256, (50, 36), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    save_program(network.requires_grad_(False), Names(("a", "b", "c", "d")), tmp_path / "classifier.pt2")
    label, _, goodness = run_classifier(tmp_path / "classifier.pt2", samples.view(50, 1, 6, 6))
    assert torch.equal(label, network.predict(samples).label)
    assert set(label.tolist()) == {0, 2}
    assert goodness[:, [1, 3]].eq(-torch.inf).all()


def test_local_layers_in_bfloat16_are_exported(tmp_path):
    """The matrix products of few and of many units per field take different paths."""
    layers = (
        "{kind: local, grid: 4, stride: 2, field: 4, units: 8}, {kind: local, grid: 3, stride: 1, field: 2, units: 40}"
    )
    overrides = [
        f"model.layers=[{layers}]",
        "data.label=everywhere",
        "training.precision=bfloat16",
        "training.epochs=1",
    ]
    run = train(load_config("digits", overrides), runner="serial", runs=tmp_path / "runs")
    assert len(export_network(run, tmp_path / "out")) == 5
    images, network = run.dataset.samples["test"], run.network
    images = images.view(-1, 1, 8, 8)
    label, probability, _ = run_classifier(tmp_path / "out" / "classifier.pt2", images)
    assert torch.equal(label, network.predict(images.flatten(1)).label)
    assert torch.equal(probability, network(images.flatten(1)).softmax(1))
    outputs = InferenceSession(tmp_path / "out" / "classifier.onnx").run(None, {"samples": images.numpy()})
    assert (torch.as_tensor(outputs[1]).argmax(1) == probability.argmax(1)).double().mean() > 0.98


def test_predict_prints_a_table_and_writes_parquet(run, tmp_path, ffdist):
    images, labels = run.dataset.samples["test"][:20], run.dataset.labels["test"][:20]
    folder = tmp_path / ("long" * 40)
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image.view(8, 8).numpy()).save(folder / f"{number:02}.png")
    output = ffdist("predict", run.folder, tmp_path, "--output", tmp_path / "found.parquet")
    table = pq.read_table(tmp_path / "found.parquet").to_pydict()
    assert table["label"] == run.predict(images).label.tolist()
    assert sum(predicted == label for predicted, label in zip(table["label"], labels.tolist(), strict=True)) >= 16
    assert [len(row) for row in table["probability"] + table["goodness"]] == [10] * 40
    assert table["goodness"][0].index(max(table["goodness"][0])) == table["label"][0]
    header, *rows = [line.split("\t") for line in output.splitlines() if "\t" in line]
    assert header == ["input", "label", "probability", "goodness"]
    assert [row[0] for row in rows] == table["input"]  # not truncated, although it is long
    assert [int(row[1]) for row in rows] == table["label"]
    assert float(rows[7][2]) == table["probability"][7][table["label"][7]]
    assert float(rows[7][3]) == table["goodness"][7][table["label"][7]]
    second_output = ffdist("predict", run.folder, tmp_path, "--output", tmp_path / "found.parquet")
    skip_message = "skipped: 1 files of another format (.parquet: 1)\n"  # the output file of the first call
    assert second_output.replace(skip_message, "") == output != second_output


def test_predict_works_without_stdout(run, tmp_path, monkeypatch):
    """As after `>&-`: predictions can still be written to a file."""
    Image.new("L", (8, 8)).save(tmp_path / "x.png")
    monkeypatch.setattr("sys.stdout", None)
    arguments = ["predict", run.folder, tmp_path / "x.png", "--output", tmp_path / "found.parquet"]
    main([str(word) for word in arguments], standalone_mode=False)
    assert pq.read_table(tmp_path / "found.parquet").num_rows == 1


def test_commands_and_served_models_use_class_names(tmp_path, ffdist, monkeypatch):
    """Names may contain special characters. The predicted label is listed even if its probability is low."""
    for split in ("train", "test"):
        for shade, name in ((40, "ant"), (120, "$x^$"), (160, "cat"), (200, "[dog]")):
            (tmp_path / "pets" / split / name).mkdir(parents=True)
            for number in range(5):
                image = Image.new("L", (6, 6), shade + number)
                image.save(tmp_path / "pets" / split / name / f"photo[{number}].png")
    options = [
        "data.name=image_folder",
        f"data.path={tmp_path / 'pets'}",
        "training.batch_size=10",
        "training.epochs=1",
    ]
    ffdist("train", "digits", *options, "model.layers=[20,10]", "--runner", "serial", "--runs", tmp_path / "runs")
    (folder,) = (tmp_path / "runs").glob("digits-*")
    output = ffdist("predict", folder, tmp_path / "pets" / "test", "--output", tmp_path / "found.parquet")
    header, *rows = [line.split("\t") for line in output.splitlines() if "\t" in line]
    assert header[:3] == ["input", "name", "label"]
    assert output.count("photo[3].png") == 4
    assert "$x^$/photo[3].png" in output
    table = pq.read_table(tmp_path / "found.parquet")
    assert table.column_names[:3] == header[:3]
    assert table["name"].to_pylist() == [row[1] for row in rows]
    monkeypatch.setattr("ffdist.runs.inference.is_interactive", lambda screen: True)
    monkeypatch.setattr("ffdist.console.is_interactive", lambda screen: True)
    listing = ffdist("predict", folder, tmp_path / "pets" / "test")
    listing = [line.split(maxsplit=2) for line in listing.splitlines() if ".png" in line]
    assert all(f"{name}: " in scores for _, name, scores in listing)
    assert "of 20 samples" in ffdist("evaluate", folder, "--data", tmp_path / "pets" / "test")
    ffdist("export", folder, "--output", tmp_path / "out")
    images = [[[[shade] * 6] * 6] for shade in range(40, 240, 40)]
    (tmp_path / "asked.json").write_text(json.dumps({"inputs": images}))
    arguments = ["-m", "out/model", "-i", "asked.json", "-o", "answer.json", "--env-manager", "local"]
    subprocess.run(
        [sys.executable, "-m", "mlflow", "models", "predict", *arguments], cwd=tmp_path, check=True, timeout=200
    )
    predictions = json.loads((tmp_path / "answer.json").read_text())["predictions"]
    assert predictions["name"] == [["$x^$", "[dog]", "ant", "cat"][label] for label in predictions["label"]]
    (tmp_path / "pets" / "test" / "ant").rename(tmp_path / "pets" / "test" / "owl")
    assert "(classes: $x^$, [dog], ant, cat; " in ffdist(
        "evaluate", folder, "--data", tmp_path / "pets" / "test", code=2
    )


def test_served_model_neither_imports_nor_replaces_the_package(run, tmp_path, ffdist):
    ffdist("export", run.folder, "--output", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out" / "model" / "code").iterdir()] == ["ffdist_served_model.py"]
    code = (
        "import mlflow, numpy, sys; model = mlflow.pyfunc.load_model('out/model'); "
        "model.predict(numpy.zeros((2, 64), numpy.uint8)); assert 'ffdist' not in sys.modules; "
        "from ffdist import Run; import ffdist.cli; print(Run.find(sys.argv[1]).summary['classes'])"
    )
    command = [sys.executable, "-c", code, str(run.folder)]
    output = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True, cwd=tmp_path).stdout
    assert output.split() == ["10"]


def test_evaluate_on_the_test_set_and_on_other_images(run, tmp_path, ffdist):
    error_text = f"\ntest error {run.summary['test_goodness_error']:.2%} by goodness"
    output = ffdist("evaluate", run.folder)
    assert output.startswith(f"checkpoint: last, {run.folder}/checkpoints/0012-000000{error_text}")
    assert len(output.splitlines()) == 2  # no progress bar without a terminal
    images, labels = run.dataset.samples["test"], run.dataset.labels["test"]
    for label in range(10):
        (tmp_path / str(label)).mkdir()
        for number in (labels == label).nonzero().flatten()[:5].tolist():
            Image.fromarray(images[number].view(8, 8).numpy()).save(tmp_path / str(label) / f"{number}.png")
    assert "of 50 samples" in ffdist("evaluate", run.folder, "--data", tmp_path)


def test_the_registered_model_is_served(run, tmp_path, free_port):
    """MLflow's server loads the model from the registry and predicts the label of a known digit."""
    uri = run.summary["mlflow_tracking_uri"]
    image, label = run.dataset.samples["test"][0], run.predict(run.dataset.samples["test"][:1]).label[0].item()
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "models",
        "serve",
        "-m",
        "models:/digits-net/1",
        "--env-manager",
        "local",
    ]
    server = subprocess.Popen(
        [*command, "--port", str(free_port)],
        env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "MLFLOW_TRACKING_URI": uri, "HOME": str(tmp_path)},
        cwd=tmp_path,
        stderr=(tmp_path / "log").open("w"),
    )
    batch = image.view(1, 1, 8, 8).tolist()
    body = json.dumps({"inputs": batch}).encode()

    def answer(body: dict) -> dict:
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        return json.load(urllib.request.urlopen(request, timeout=20))["predictions"]

    def expect_error(inputs: list) -> str:
        with pytest.raises(urllib.error.HTTPError) as error_info:
            answer({"inputs": inputs})
        assert error_info.value.code == 400
        return json.load(error_info.value)["message"]

    url = f"http://127.0.0.1:{free_port}/invocations"
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
                predictions = json.load(urllib.request.urlopen(request, timeout=10))["predictions"]
                break
            except OSError:
                assert server.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline, "no answer"
                time.sleep(1)
        message = "pixels must be whole numbers from 0 to 255"
        for pixel, detail in ((0.5, "given: 0.5"), (26.7, "given: 26.7"), (350, "given: 350"), (-73, "given: -73")):
            assert expect_error([[[[pixel, *batch[0][0][0][1:]], *batch[0][0][1:]]]]) == f"{message} ({detail})"
        assert expect_error([[[[float(x > 99) for x in row] for row in batch[0][0]]]]) == f"{message}, not 0.0 to 1.0"
        assert expect_error([[[[float("nan")] * 8] * 8]]).startswith(message)
        shapes = "[N, 1, 8, 8] or [N, 8, 8] or [N, 64]"
        assert expect_error(batch[0][0]) == f"samples must have the shape {shapes} (given: [8, 8])"
        assert expect_error([]) == f"samples must have the shape {shapes} (given: [0])"
        flat = image.tolist()
        for body in (
            {"inputs": batch[0]},
            {"inputs": [flat]},
            {"instances": batch},
            {"dataframe_split": {"columns": [str(number) for number in range(64)], "data": [flat]}},
            {"dataframe_split": {"columns": ["image"], "data": [[batch[0]]]}},
            {"dataframe_records": [{"image": flat}]},
        ):
            assert answer(body) == predictions
    finally:
        server.terminate()
        server.wait(120)
    assert predictions["label"] == [label] == [run.dataset.labels["test"][0].item()]
    assert len(predictions["probability"][0]) == len(predictions["goodness"][0]) == 10


def test_failed_export_leaves_no_files(run, tmp_path, ffdist, monkeypatch):
    def fail_export(*args, **kwargs):
        raise RuntimeError("no such operator")

    monkeypatch.setattr("torch.onnx.export", fail_export)
    (tmp_path / "empty").mkdir()
    for folder in ("new", "empty"):
        with pytest.raises(RuntimeError, match="no such operator"):
            export_network(run, tmp_path / folder)
    assert not (tmp_path / "new").exists()
    assert not list((tmp_path / "empty").iterdir())


def test_unwritable_output_is_a_one_line_error(run, tmp_path, monkeypatch, capfd):
    (tmp_path / "input").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "input" / "black.png")
    export = ["export", run.folder, "--output", tmp_path / "out"]
    for command in (["evaluate", run.folder], ["predict", run.folder, tmp_path / "input"], export):
        with open("/dev/full", "w") as full_device:  # noqa: PTH123
            monkeypatch.setattr(sys, "stdout", full_device)
            with pytest.raises(SystemExit) as exit_info:
                main([str(word) for word in command])
            monkeypatch.undo()
        assert exit_info.value.code == 1
        lines = capfd.readouterr().err.splitlines()
        assert lines[-1 if command is export else 1 :] == [  # torch warns when it exports
            "Error: the output cannot be written (No space left on device); nothing else failed"
        ]
    assert (tmp_path / "out" / "model").is_dir()  # the export itself is complete


def test_predict_replaces_characters_that_the_output_encoding_lacks(run, tmp_path):
    (tmp_path / "M\u00f6we").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "M\u00f6we" / "black.png")
    command = [sys.executable, "-m", "ffdist.cli", "predict", str(run.folder), str(tmp_path)]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    process = subprocess.run(command, capture_output=True, timeout=200, check=True, env=environment)
    header, row = process.stdout.decode("ascii").splitlines()
    assert header.split("\t")[0] == "input"
    assert row.split("\t")[0] == f"{tmp_path}/M?we/black.png"
    assert b"Traceback" not in process.stderr


def write_image_folder(path: Path) -> None:
    for split in ("train", "test"):
        for shade in range(4):
            (path / split / f"class_{shade}").mkdir(parents=True)
            for number in range(12):
                image = Image.new("L", (4, 4), 60 * shade + number)
                image.save(path / split / f"class_{shade}" / f"{number}.png")


def test_commands_accept_moved_data_but_not_other_data(tmp_path, ffdist):
    write_image_folder(tmp_path / "data")
    overrides = ["data.name=image_folder", "data.path=data", "training.batch_size=8", "training.epochs=1"]
    overrides.append("tracking.artifacts=[]")
    ffdist("train", "digits", *overrides, "model.layers=[8]", "--runner", "serial")
    (folder,) = (tmp_path / "runs").glob("digits-*")
    error_line = ffdist("evaluate", folder).splitlines()[-1]
    (tmp_path / "data").rename(tmp_path / "moved")
    for command in (["evaluate"], ["plot", "--output", "plots"], ["fit-readout"]):
        ffdist(*command, folder, code=2)
        output = ffdist(*command, folder, "data.path=moved")
        assert command != ["evaluate"] or error_line in output
    assert error_line in ffdist("evaluate", folder, "--data", "moved/test")
    assert "only the location of the data can be changed" in ffdist("evaluate", folder, "data.label=append", code=2)
    for split in ("test", "train"):
        Image.new("L", (4, 4), 99).save(tmp_path / "moved" / split / "class_0" / "0.png")
        for command in (["evaluate"], ["plot", "--output", "plots"], ["fit-readout"]):
            output = ffdist(*command, folder, "data.path=moved", code=2)
            assert f"was {split}ed on other samples than {tmp_path}/moved contains now" in output
    assert "of 48 samples" in ffdist("evaluate", folder, "--data", "moved/test")
