"""Input that lies: whatever is broken, every command that reads it says so in one paragraph and changes nothing."""

import hashlib
import json
import os
import pickle
import re
import shutil
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from ffdist.checkpoint import digest
from ffdist.cli import main

SHORT = ["training.epochs=1", "model.layers=[20,10]"]
STORE = ["data.label=none", "negatives.kind=hybrid", "negatives.store=store"]
SERIAL = ["--runner", "serial"]


class Code:
    """What pickle and YAML would run."""

    def __reduce__(self):
        return (Path("code-ran").touch, ())


def ffdist(*words: str):
    return CliRunner().invoke(main, list(words), catch_exceptions=True)


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A finished run, one that stopped, a store of negatives, Parquet files and an image folder, all of them good."""
    folder = tmp_path_factory.mktemp("good")
    before = Path.cwd()
    os.chdir(folder)
    try:
        for name, more in (("digits", []), ("digits", STORE)):
            result = ffdist("train", name, *SHORT, *more, *SERIAL)
            assert result.exit_code == 0, result.output
        finished, stopped = sorted(folder.glob("runs/digits-*"))
        finished.rename("finished")
        stopped.rename("stopped")
        Path("stopped/summary.json").unlink()
    finally:
        os.chdir(before)
    (folder / "birds").mkdir()
    images = [png(shade) for shade in range(20)]
    for split in ("train", "test"):
        table = {"image": images, "label": [shade % 2 for shade in range(20)]}
        pq.write_table(pa.table(table), folder / "birds" / f"{split}.parquet")
        for shade, image in enumerate(images):
            path = folder / "folders" / split / f"class_{shade % 2}" / f"{shade}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image)
    return folder


def png(shade: int, size=(4, 3)) -> bytes:
    buffer = BytesIO()
    Image.new("L", size, shade).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def place(good, tmp_path, monkeypatch) -> Path:
    """A copy that may be broken."""
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: str, content: bytes | str):
    return lambda: Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())


def cut(pattern: str):
    def damage() -> None:
        (path, *_) = sorted(Path().glob(pattern))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return damage


def planted(pattern: str):
    """Puts pickled code in the place of a file, and tells the manifest."""

    def damage() -> None:
        (path, *_) = sorted(Path().glob(pattern))
        path.write_bytes(pickle.dumps(Code()))
        manifest = json.loads((path.parent / "manifest.json").read_text())
        facts = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "num_bytes": path.stat().st_size}
        manifest["files"][path.name] = facts
        del manifest["sha256"]
        manifest["sha256"] = digest(manifest)
        (path.parent / "manifest.json").write_text(json.dumps(manifest))

    return damage


def nothing() -> None:
    pass


def config(text: str):
    return write("bad.yaml", text)


def parquet(**columns):
    return lambda: pq.write_table(pa.table(columns), "birds/train.parquet")


TRAIN = [["train", "bad.yaml", *SERIAL], ["baseline", "bad.yaml"], ["negatives", "make", "bad.yaml"]]
RESUME = [["train", "digits", *SHORT, *STORE, *SERIAL, "--resume", "stopped"]]
FROM = [
    ["train", "digits", *SHORT, *SERIAL, "--from", "finished"],
    ["baseline", "digits", *SHORT, "--from", "finished"],
]
READOUT = [
    ["readout", "finished"],
    ["evaluate", "finished"],
    ["predict", "finished", "--input", "birds/test.parquet"],
    ["plot", "finished"],
    ["export", "finished", "--to", "out"],
]
SHOW = [["negatives", "show", "store"], ["train", "digits", *SHORT, *STORE, *SERIAL]]
BIRDS = ["data.label=append", "model.layers=[5,5]", "training.batch_size=5"]
PARQUET = [["train", "digits", "data.name=parquet", "data.path=birds", *BIRDS, *SERIAL]]
FOLDERS = [["train", "digits", "data.name=image_folder", "data.path=folders", *BIRDS, *SERIAL]]

CASES = {
    "config: empty": (config(""), TRAIN, "must hold sections"),
    "config: a list": (config("- 1"), TRAIN, "must hold sections"),
    "config: no YAML": (config("a: [1"), TRAIN, "cannot be read as YAML"),
    "config: bytes": (config("\x00\x01"), TRAIN, "cannot be read as YAML"),
    "config: code": (config('data: !!python/object/apply:os.mkdir ["code-ran"]'), TRAIN, "cannot be read as YAML"),
    "config: unknown section": (config("date: {name: digits}"), TRAIN, "did you mean data"),
    "config: a section that is a value": (config("data: 3\nmodel: {layers: [3]}"), TRAIN, "data"),
    "config: layers of the wrong type": (config("data: {name: digits}\nmodel: {layers: [a]}"), TRAIN, "model.layers"),
    "config: a negative number": (config("data: {name: digits}\nmodel: {layers: [-3]}"), TRAIN, "model.layers"),
    "config: not a number": (
        config("data: {name: digits}\nmodel: {layers: [3]}\ntraining: {learning_rate: .nan}"),
        TRAIN,
        "training.learning_rate",
    ),
    "config: a folder": (lambda: Path("bad.yaml").mkdir(), TRAIN, "a configuration is a YAML file"),
    "config: nothing there": (nothing, TRAIN, "a configuration is a YAML file"),
    "run: nothing there": (lambda: shutil.rmtree("finished"), [*FROM, *READOUT], "a run is its folder"),
    "run: no configuration": (lambda: Path("stopped/config.yaml").unlink(), RESUME, "a run is its folder"),
    "run: a damaged configuration": (write("finished/config.yaml", "data: ["), READOUT, "cannot be read as YAML"),
    "run: damaged figures": (cut("finished/summary.json"), READOUT, "summary.json is missing or damaged"),
    "run: finished already": (nothing, [["train", "digits", *SHORT, *SERIAL, "--resume", "finished"]], "is finished"),
    "run: damaged metrics": (write("stopped/metrics.db", "no database" * 999), RESUME, "metrics.db is damaged"),
    "run: no tracking database": (lambda: Path("runs/mlflow.db").unlink(), RESUME, "cannot go on with run"),
    "run: another one": (nothing, [[*RESUME[0], "training.alpha=3"]], "training.alpha: 1.0 then, 3.0 now"),
    "commit: none": (lambda: shutil.rmtree("stopped/commits"), RESUME, "holds no whole commit"),
    "commit: no manifest": (
        lambda: [path.unlink() for path in Path().glob("finished/commits/*/manifest.json")],
        [*FROM, *READOUT],
        "holds no whole commit",
    ),
    "commit: a cut manifest": (cut("stopped/commits/*/manifest.json"), RESUME, "manifest.json is damaged"),
    "commit: a cut manifest of a finished run": (
        cut("finished/commits/*/manifest.json"),
        [*FROM, *READOUT],
        "manifest.json is damaged",
    ),
    "commit: a cut layer": (cut("stopped/commits/*/layer_1.safetensors"), RESUME, "layer_1.safetensors is cut"),
    "commit: a cut layer of a finished run": (
        cut("finished/commits/*/layer_2.safetensors"),
        [*FROM, *READOUT],
        "layer_2.safetensors is cut",
    ),
    "commit: code": (planted("stopped/commits/*/readout.safetensors"), RESUME, "is no file of tensors"),
    "commit: code in a finished run": (
        planted("finished/commits/*/readout.safetensors"),
        [*FROM, *READOUT],
        "is no file of tensors",
    ),
    "store: nothing there": (lambda: shutil.rmtree("store"), SHOW[:1], "holds no negatives"),
    "store: a damaged manifest": (cut("store/manifest.json"), SHOW, "manifest.json is damaged"),
    "store: a damaged entry": (cut("store/epoch_0000/*.json"), SHOW, "is damaged"),
    "store: a cut shard": (cut("store/epoch_0000/*.arrow"), SHOW, "is cut or grown"),
    "store: for another seed": (nothing, [[*SHOW[1], "seed=3"]], "holds other negatives than this run needs"),
    "parquet: ends early": (cut("birds/train.parquet"), PARQUET, "train.parquet"),
    "parquet: empty split": (lambda: Path("birds/test.parquet").unlink(), PARQUET, "test"),
    "parquet: no images": (parquet(image=[b"no image"] * 9, label=[0, 1, 0] * 3), PARQUET, "train.parquet.*row 0"),
    "parquet: a label too low": (parquet(image=[png(3)] * 9, label=[0, 1, -1] * 3), PARQUET, "train.parquet.*row 2"),
    "parquet: other sizes": (
        lambda: pq.write_table(pa.table({"image": [png(3, (9, 3))] * 4, "label": [0, 1, 0, 1]}), "birds/test.parquet"),
        PARQUET,
        "test.parquet.*row 0",
    ),
    "images: no image": (write("folders/train/class_0/0.png", "no image"), FOLDERS, "0.png"),
    "images: a cut one": (cut("folders/train/class_1/*.png"), FOLDERS, "class_1"),
    "images: an unknown class": (
        lambda: Path("folders/test/class_1").rename("folders/test/class_7"),
        FOLDERS,
        "class_7",
    ),
}


TRACKING = ("mlflow.db", "mlflow.db-wal", "mlflow.db-shm", ".mlflow.lock")


def tree() -> dict[str, str]:
    """Every file but those of the tracking database, which a command may open."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path().rglob("*"))
        if path.is_file() and path.name not in (".lock", "metrics.db-wal", "metrics.db-shm", *TRACKING)
    }


@pytest.mark.parametrize(("damage", "commands", "told"), CASES.values(), ids=CASES)
def test_what_is_broken_is_told_and_nothing_is_written_over(place, damage, commands, told):
    damage()
    before = tree()
    for command in commands:
        result = ffdist(*command)
        stopped = "the run stopped" in result.output
        assert result.exit_code == (1 if stopped else 2), (command, result.output, result.exception)
        error = result.output[result.output.index("Error: ") :]
        assert "Traceback" not in result.output
        assert len(error.strip().splitlines()) == 1, "one paragraph"
        assert re.search(told, error), error
        now = tree()
        assert {path: now.get(path) for path in before} == before
        assert stopped or len(now) == len(before), "a run that is refused leaves no trace"
        before = now
    assert not Path("code-ran").exists()


def test_there_are_many_of_them():
    assert len(CASES) >= 30
