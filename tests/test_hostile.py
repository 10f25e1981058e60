"""Input that lies: whatever is broken, every command that reads it says so in one paragraph and changes nothing."""

import hashlib
import json
import os
import pickle
import re
import shutil
import sqlite3
from contextlib import closing
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from mlflow import MlflowClient
from PIL import Image

from ffdist import Run, read_network
from ffdist.checkpoint.checkpoints import digest
from ffdist.cli import main
from ffdist.export.network import save_network
from ffdist.tracking.server import default_uri

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
    ["train", "digits", *SHORT, *SERIAL, "--init-from", "finished"],
    ["baseline", "digits", *SHORT, "--init-from", "finished"],
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

LONG = "x" * 300
ELSEWHERE = [
    ["predict", "finished", "--input", LONG],
    ["evaluate", "finished", "--data", LONG],
    *(
        [*words, "--runs", LONG]
        for words in (["evaluate", "zz"], ["results"], ["sync"], ["ui"], ["reproduce", "digits"])
    ),
    ["train", "digits", "data.name=image_folder", f"data.path={LONG}", *SERIAL],
]

CASES = {
    "a path that is too long": (nothing, ELSEWHERE, "cannot be read .File name too long.; give another path"),
    "run: figures under a name that is too long": (
        lambda: [Path("finished/summary.json").unlink(), Path("finished/summary.json").symlink_to(LONG)],
        READOUT[1:2],
        "summary.json cannot be read .File name too long",
    ),
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
    "config: a folder": (lambda: Path("bad.yaml").mkdir(), TRAIN, "CONFIG must be a YAML file"),
    "config: nothing there": (nothing, TRAIN, "CONFIG must be a YAML file"),
    "run: nothing there": (lambda: shutil.rmtree("finished"), [*FROM, *READOUT], "RUN must be the folder of a run"),
    "run: no configuration": (lambda: Path("stopped/config.yaml").unlink(), RESUME, "RUN must be the folder of a run"),
    "run: a damaged configuration": (write("finished/config.yaml", "data: ["), READOUT, "cannot be read as YAML"),
    "run: damaged figures": (cut("finished/summary.json"), READOUT, "summary.json is missing or damaged"),
    "run: finished already": (nothing, [["train", "digits", *SHORT, *SERIAL, "--resume", "finished"]], "is finished"),
    "run: damaged metrics": (write("stopped/metrics.db", "no database" * 999), RESUME, "metrics.db is damaged"),
    "run: no tracking database": (lambda: Path("runs/mlflow.db").unlink(), RESUME, "cannot resume run"),
    "run: another one": (nothing, [[*RESUME[0], "training.alpha=3"]], "training.alpha: 1.0 then, 3.0 now"),
    "checkpoint: none": (lambda: shutil.rmtree("stopped/checkpoints"), RESUME, "contains no complete checkpoint"),
    "checkpoint: no manifest": (
        lambda: [path.unlink() for path in Path().glob("finished/checkpoints/*/manifest.json")],
        [*FROM, *READOUT],
        "contains no complete checkpoint",
    ),
    "checkpoint: a cut manifest": (cut("stopped/checkpoints/*/manifest.json"), RESUME, "manifest.json is damaged"),
    "checkpoint: a cut manifest of a finished run": (
        cut("finished/checkpoints/*/manifest.json"),
        [*FROM, *READOUT],
        "manifest.json is damaged",
    ),
    "checkpoint: a cut layer": (cut("stopped/checkpoints/*/layer_1.safetensors"), RESUME, "layer_1.* the wrong size"),
    "checkpoint: a cut layer of a finished run": (
        cut("finished/checkpoints/*/layer_2.safetensors"),
        [*FROM, *READOUT],
        "layer_2.safetensors has the wrong size",
    ),
    "checkpoint: code": (planted("stopped/checkpoints/*/readout.safetensors"), RESUME, "is not a safetensors file"),
    "checkpoint: code in a finished run": (
        planted("finished/checkpoints/*/readout.safetensors"),
        [*FROM, *READOUT],
        "is not a safetensors file",
    ),
    "store: nothing there": (lambda: shutil.rmtree("store"), SHOW[:1], "holds no negatives"),
    "store: a damaged manifest": (cut("store/manifest.json"), SHOW, "manifest.json is damaged"),
    "store: a damaged entry": (cut("store/epoch_0000/*.json"), SHOW, "is damaged"),
    "store: a cut shard": (cut("store/epoch_0000/*.arrow"), SHOW, "has the wrong size"),
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
    "images: a link to a name that is too long": (
        lambda: Path("folders/train/class_0/a.png").symlink_to(LONG),
        FOLDERS,
        "a.png cannot be read .File name too long",
    ),
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
        if os.path.isfile(path)  # noqa: PTH113, of a link it may be too long
        and path.stat().st_size < 2**30
        and path.name not in (".lock", "metrics.db-wal", "metrics.db-shm", *TRACKING)
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


def link(target: str):
    return lambda path: path.symlink_to(target)


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**41)


ENTRIES = {
    "a link to a file elsewhere": link("../" * 40 + "etc/hostname"),
    "an absolute link": link("/etc/hostname"),
    "a link to a device": link("/dev/zero"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "2 TB": sparse,
    "nothing at all": Path.touch,
}
"""What may stand in the place of a file."""
EVALUATE, PLOT = READOUT[1], READOUT[3]
READ = {
    "finished/config.yaml": EVALUATE,
    "finished/summary.json": EVALUATE,
    "finished/timeline.json": PLOT,
    "finished/metrics.db": PLOT,
    "finished/checkpoints/*/manifest.json": EVALUATE,
    "finished/checkpoints/*/layer_1.safetensors": EVALUATE,
    "finished/checkpoints": EVALUATE,
    "stopped/metrics.db": RESUME[0],
    "stopped/.lock": RESUME[0],
    "stopped/checkpoints/*/position.safetensors": RESUME[0],
    "store/manifest.json": SHOW[0],
    "store/epoch_0000/shard_000000.json": SHOW[0],
    "store/epoch_0000/shard_000000.arrow": SHOW[0],
    "network/network.json": None,
    "network/network.safetensors": None,
}
HARMLESS = {  # read as what it is, or made anew
    ("stopped/.lock", "2 TB"),
    ("stopped/.lock", "nothing at all"),
    ("stopped/metrics.db", "nothing at all"),
}


def export() -> None:
    Path("network").mkdir(exist_ok=True)
    save_network(Run.find("finished").network, Path("network"))  # the files that `read_network` reads


def refuse(command: list[str] | None, about: str) -> None:
    """Has a command, or where there is none `read_network`, refuse its input in one paragraph and change nothing."""
    before = tree()
    if command is None:
        with pytest.raises((ValueError, OSError)):
            read_network("network")
        return
    result = ffdist(*command)
    assert result.exit_code == 2, (about, result.output, result.exception)
    error = result.output[result.output.index("Error: ") :]
    assert len(error.strip().splitlines()) == 1, (about, error)
    assert tree() == before, about


@pytest.mark.parametrize("pattern", READ)
def test_no_entry_of_a_folder_leads_out_of_it_or_blocks(place, pattern):
    export()
    (path, *_) = sorted(Path().glob(pattern))
    path.rename("kept")
    for name, make in ENTRIES.items():
        if (pattern, name) in HARMLESS:
            continue
        make(path)
        refuse(READ[pattern], name)
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


NESTED = "[" * 100_000
FIGURES = ["runner", "mlflow_run_id", "mlflow_tracking_uri", "test_readout_error", "shape", "classes", "class_names"]
EVENT = {"ph": "X", "tid": 1, "cat": "compute", "ts": 1, "dur": 1, "args": {"chunk": 1}}
EVENTS = [{"ph": "M", "tid": 1, "args": {"name": "stage 1"}}, EVENT]
CONTENT = ["[]", "{}", "null", '"text"', "3", "{", NESTED, "\x00", '{"a": ' * 9000]
JSON = {
    "finished/summary.json": (
        EVALUATE,
        CONTENT,
        [{name: {}} for name in FIGURES]
        + [{"shape": [10**9] * 3}, {"classes": 0}, {"classes": 10**11}, {"classes": -(10**11)}]
        + [{"untrained_classes": value} for value in (7, None, [[1]], [10**11], list(range(10)))]
        + [{"data": 3}, {"data": {"columns": {"label": 3}}}],
    ),
    "finished/timeline.json": (
        PLOT,
        CONTENT,
        [{"traceEvents": 3}, {"traceEvents": [3]}, {"traceEvents": EVENTS[1:]}]
        + [{"traceEvents": [EVENTS[0], EVENT | {key: value}]} for key in ("ts", "dur") for value in ("a", [], 1e400)],
    ),
    "network/network.json": (
        None,
        CONTENT,
        [{"layers": value} for value in (3, [[]], ["a"], [10**9, 10**9], [{"grid": 3}], [])]
        + [{key: value} for key in ("shape", "classes", "rule", "thresholds") for value in (None, "a", [[]])]
        + [
            {key: value}
            for key in ("label_scale", "subtract_mean", "seed", "precision", "untrained")
            for value in (None, "a")
        ]
        + [{"classes": value} for value in (0, 10**11, -(10**11))]
        + [{"untrained": value} for value in ([[1]], [10**11], list(range(10)))]
        + [{"layers": [{"grid": 10**11, "stride": 1, "field": 10**11, "units": 1}]}],
    ),
    "finished/checkpoints/*/manifest.json": (EVALUATE, CONTENT, [{"files": 3}, {"epoch": "a"}]),
    "store/epoch_0000/shard_000000.json": (SHOW[0], CONTENT, [{"epoch": "a"}, {"num_bytes": -1}, {"num_bytes": 2**60}]),
    "store/manifest.json": (SHOW[0], CONTENT, [{"facts": []}, {"config": []}, {"config": {"data": []}}]),
}


@pytest.mark.parametrize("name", JSON)
def test_json_of_another_type_is_refused(place, name):
    export()
    command, whole, changes = JSON[name]
    path = next(Path().glob(name))
    good = json.loads(path.read_text())
    for text in [*whole, *(json.dumps(good | change) for change in changes)]:
        path.write_text(text)
        refuse(command, text[:80])


FORGED = {
    "a metric that is a text": ("update points set value = 'a'", PLOT),
    "a step that is a text": ("update points set step = 'a' || step", PLOT),
    "no points": ("drop table points", PLOT),
    "other points": ("drop table points; create table points (a)", PLOT),
    "a view of points": ("drop table points; create view points as select 1 as name", RESUME[0]),
    "losses that are no list": ("insert or replace into facts values ('recoveries', '{}')", RESUME[0]),
    "losses that are no JSON": ("insert or replace into facts values ('recoveries', '[')", RESUME[0]),
}


@pytest.mark.parametrize(("statement", "command"), FORGED.values(), ids=FORGED)
def test_a_forged_database_is_refused(place, statement, command):
    with closing(sqlite3.connect("finished/metrics.db" if command is PLOT else "stopped/metrics.db")) as database:
        database.executescript(statement)
    refuse(command, statement)


STOLEN = [
    "/etc/hostname",
    "../secret",
    "x/../../secret",
    "link",
    "pipe",
    "checkpoints",
    "",
    ".",
    "\0",
    "a" * 300,
    "none",
]
CALLS = [
    *(("artifact", json.dumps(name)) for name in STOLEN),
    *(("artifact", text) for text in ("3", "[]", "{", NESTED, "null")),
    *(("model", text) for text in ("3", "{}", '{"example": [1], "names": []}', '{"example": "a", "names": 3}')),
    *(("register", '"name"'), ("tags", "[]"), ("parameters", "3"), ("dataset", '{"a": 1}'), ("eval", '"code"')),
]


def test_no_upload_leaves_the_folder_of_a_run(place):
    """Whoever puts a run into the runs folder must not have the next command upload another file of the user."""
    Path("secret").write_text("secret")
    run = Path(shutil.copytree("finished", "runs/evil"))
    (run / "link").symlink_to("../../secret")
    os.mkfifo(run / "pipe")
    Path("network").mkdir()
    (run / "network").symlink_to("../../network")
    with closing(sqlite3.connect(run / "metrics.db")) as database, database:
        database.executemany("insert into calls (what, content) values (?, ?)", CALLS)
        (run_id,) = database.execute("select value from facts where key = 'run_id'").fetchone()
    uri = default_uri(Path("runs"))
    before = [file.path for file in MlflowClient(uri).list_artifacts(run_id)]
    result = ffdist("sync", "runs/evil")
    assert result.exit_code == 0, (result.output, result.exception)
    assert result.output.count("rejected: ") == len(CALLS)
    assert [file.path for file in MlflowClient(uri).list_artifacts(run_id)] == before
    assert Path("secret").read_text() == "secret"


def test_a_run_that_names_code_or_a_server_gets_neither_run_nor_asked(place):
    Path("evil.py").write_text("import pathlib; pathlib.Path('code-ran').touch()")
    path = Path("finished/config.yaml")
    path.write_text(re.sub(r"kind: [a-z_]+", "kind: evil:function", path.read_text()))
    before = Path("finished/negatives.png").stat().st_mtime_ns
    for command in (EVALUATE, PLOT):
        result = ffdist(*command)
        assert result.exit_code == 0, (command, result.output, result.exception)
    assert not Path("code-ran").exists()
    assert Path("finished/negatives.png").stat().st_mtime_ns == before
    summary = json.loads(Path("finished/summary.json").read_text())
    for uri in ("http://127.0.0.1:9", "sqlite:////tmp/other.db"):
        Path("finished/summary.json").write_text(
            json.dumps(summary | {"mlflow_tracking_uri": uri, "mlflow_run_id": "a"})
        )
        refuse(READOUT[0], uri)


def test_plots_are_not_drawn_through_a_link(place):
    Path("finished/errors.png").unlink()
    Path("finished/errors.png").symlink_to("../secret")
    assert ffdist(*PLOT).exit_code == 2
    assert not Path("secret").exists()


def test_there_are_many_of_them():
    forged = sum(len(whole) + len(changes) for _, whole, changes in JSON.values()) + len(FORGED) + len(CALLS)
    assert len(CASES) + len(READ) * len(ENTRIES) - len(HARMLESS) + forged >= 250
