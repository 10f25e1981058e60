"""Damaged and malicious input: commands report an error in one line and change no existing file."""

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

from ffdist import Run, load_network
from ffdist.checkpoint.checkpoints import digest
from ffdist.cli import main
from ffdist.export.network import Names, save_network
from ffdist.tracking.server import default_uri

SHORT = ["training.epochs=1", "model.layers=[20,10]"]
STORE_SETTINGS = ["data.label=none", "negatives.kind=hybrid", "negatives.store=store"]
SERIAL = ["--runner", "serial"]


class Payload:
    """Creates the file `code-ran` when it is unpickled."""

    def __reduce__(self):
        return (Path("code-ran").touch, ())


def ffdist(*args: str):
    return CliRunner().invoke(main, list(args), catch_exceptions=True)


@pytest.fixture(scope="module")
def valid_files(tmp_path_factory) -> Path:
    """Undamaged input: a finished run, an interrupted run, a store of negatives, Parquet files and an image folder."""
    folder = tmp_path_factory.mktemp("good")
    previous_folder = Path.cwd()
    os.chdir(folder)
    try:
        for name, settings in (("digits", []), ("digits", STORE_SETTINGS)):
            result = ffdist("train", name, *SHORT, *settings, *SERIAL)
            assert result.exit_code == 0, result.output
        finished, interrupted = sorted(folder.glob("runs/digits-*"))
        finished.rename("finished")
        interrupted.rename("stopped")
        Path("stopped/summary.json").unlink()
    finally:
        os.chdir(previous_folder)
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
def work_dir(valid_files, tmp_path, monkeypatch) -> Path:
    """Current folder with a copy of the valid files, which the test may damage."""
    shutil.copytree(valid_files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: str, content: bytes | str):
    return lambda: Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())


def truncate(pattern: str):
    def damage() -> None:
        (path, *_) = sorted(Path().glob(pattern))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return damage


def replace_with_pickle(pattern: str):
    """Replaces a file with pickled code, and updates the manifest."""

    def damage() -> None:
        (path, *_) = sorted(Path().glob(pattern))
        path.write_bytes(pickle.dumps(Payload()))
        manifest = json.loads((path.parent / "manifest.json").read_text())
        entry = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "num_bytes": path.stat().st_size}
        manifest["files"][path.name] = entry
        del manifest["sha256"]
        manifest["sha256"] = digest(manifest)
        (path.parent / "manifest.json").write_text(json.dumps(manifest))

    return damage


def no_damage() -> None:
    pass


def write_config(text: str):
    return write("bad.yaml", text)


def write_parquet(**columns):
    return lambda: pq.write_table(pa.table(columns), "birds/train.parquet")


CONFIG_COMMANDS = [["train", "bad.yaml", *SERIAL], ["baseline", "bad.yaml"], ["negatives", "make", "bad.yaml"]]
RESUME_COMMANDS = [["resume", "stopped", *SERIAL]]
WARM_START_COMMANDS = [
    ["train", "digits", *SHORT, *SERIAL, "--init-from", "finished"],
    ["baseline", "digits", *SHORT, "--init-from", "finished"],
]
RUN_COMMANDS = [
    ["fit-readout", "finished"],
    ["evaluate", "finished"],
    ["predict", "finished", "birds/test.parquet"],
    ["plot", "finished"],
    ["export", "finished", "--output", "out"],
]
STORE_COMMANDS = [["negatives", "show", "store"], ["train", "digits", *SHORT, *STORE_SETTINGS, *SERIAL]]
IMAGE_SETTINGS = ["data.label=append", "model.layers=[5,5]", "training.batch_size=5"]
PARQUET_COMMANDS = [["train", "digits", "data.name=parquet", "data.path=birds", *IMAGE_SETTINGS, *SERIAL]]
IMAGE_FOLDER_COMMANDS = [["train", "digits", "data.name=image_folder", "data.path=folders", *IMAGE_SETTINGS, *SERIAL]]

LONG_NAME = "x" * 300
LONG_PATH_COMMANDS = [
    ["predict", "finished", LONG_NAME],
    ["evaluate", "finished", "--data", LONG_NAME],
    *(
        [*args, "--runs", LONG_NAME]
        for args in (["evaluate", "zz"], ["results"], ["sync"], ["ui"], ["reproduce", "digits"])
    ),
    ["train", "digits", "data.name=image_folder", f"data.path={LONG_NAME}", *SERIAL],
]

CASES = {
    "path too long": (no_damage, LONG_PATH_COMMANDS, "cannot be read .File name too long.; give another path"),
    "run: summary is a link to a name that is too long": (
        lambda: [Path("finished/summary.json").unlink(), Path("finished/summary.json").symlink_to(LONG_NAME)],
        RUN_COMMANDS[1:2],
        "summary.json cannot be read .File name too long",
    ),
    "config: empty": (write_config(""), CONFIG_COMMANDS, "must hold sections"),
    "config: list": (write_config("- 1"), CONFIG_COMMANDS, "must hold sections"),
    "config: not YAML": (write_config("a: [1"), CONFIG_COMMANDS, "cannot be read as YAML"),
    "config: binary": (write_config("\x00\x01"), CONFIG_COMMANDS, "cannot be read as YAML"),
    "config: Python code": (
        write_config('data: !!python/object/apply:os.mkdir ["code-ran"]'),
        CONFIG_COMMANDS,
        "cannot be read as YAML",
    ),
    "config: unknown section": (write_config("date: {name: digits}"), CONFIG_COMMANDS, "did you mean data"),
    "config: section is a number": (write_config("data: 3\nmodel: {layers: [3]}"), CONFIG_COMMANDS, "data"),
    "config: layer of wrong type": (
        write_config("data: {name: digits}\nmodel: {layers: [a]}"),
        CONFIG_COMMANDS,
        "model.layers",
    ),
    "config: negative layer size": (
        write_config("data: {name: digits}\nmodel: {layers: [-3]}"),
        CONFIG_COMMANDS,
        "model.layers",
    ),
    "config: NaN": (
        write_config("data: {name: digits}\nmodel: {layers: [3]}\ntraining: {learning_rate: .nan}"),
        CONFIG_COMMANDS,
        "training.learning_rate",
    ),
    "config: is a folder": (lambda: Path("bad.yaml").mkdir(), CONFIG_COMMANDS, "CONFIG must be a YAML file"),
    "config: missing": (no_damage, CONFIG_COMMANDS, "CONFIG must be a YAML file"),
    "run: missing": (
        lambda: shutil.rmtree("finished"),
        [*WARM_START_COMMANDS, *RUN_COMMANDS],
        "RUN must be the folder of a run",
    ),
    "run: missing configuration": (
        lambda: Path("stopped/config.yaml").unlink(),
        RESUME_COMMANDS,
        "RUN must be the folder of a run",
    ),
    "run: damaged configuration": (write("finished/config.yaml", "data: ["), RUN_COMMANDS, "cannot be read as YAML"),
    "run: truncated summary": (truncate("finished/summary.json"), RUN_COMMANDS, "summary.json is missing or damaged"),
    "run: already finished": (no_damage, [["resume", "finished", *SERIAL]], "is finished"),
    "run: damaged metrics": (
        write("stopped/metrics.db", "no database" * 999),
        RESUME_COMMANDS,
        "metrics.db is damaged",
    ),
    "run: missing tracking database": (lambda: Path("runs/mlflow.db").unlink(), RESUME_COMMANDS, "cannot resume run"),
    "run: other configuration": (
        no_damage,
        [[*RESUME_COMMANDS[0], "training.alpha=3"]],
        "training.alpha: 1.0 then, 3.0 now",
    ),
    "checkpoint: missing": (
        lambda: shutil.rmtree("stopped/checkpoints"),
        RESUME_COMMANDS,
        "contains no complete checkpoint",
    ),
    "checkpoint: missing manifest": (
        lambda: [path.unlink() for path in Path().glob("finished/checkpoints/*/manifest.json")],
        [*WARM_START_COMMANDS, *RUN_COMMANDS],
        "contains no complete checkpoint",
    ),
    "checkpoint: truncated manifest": (
        truncate("stopped/checkpoints/*/manifest.json"),
        RESUME_COMMANDS,
        "manifest.json is damaged",
    ),
    "checkpoint: truncated manifest of a finished run": (
        truncate("finished/checkpoints/*/manifest.json"),
        [*WARM_START_COMMANDS, *RUN_COMMANDS],
        "manifest.json is damaged",
    ),
    "checkpoint: truncated layer": (
        truncate("stopped/checkpoints/*/layer_1.safetensors"),
        RESUME_COMMANDS,
        "layer_1.* the wrong size",
    ),
    "checkpoint: truncated layer of a finished run": (
        truncate("finished/checkpoints/*/layer_2.safetensors"),
        [*WARM_START_COMMANDS, *RUN_COMMANDS],
        "layer_2.safetensors has the wrong size",
    ),
    "checkpoint: pickled code": (
        replace_with_pickle("stopped/checkpoints/*/readout.safetensors"),
        RESUME_COMMANDS,
        "is not a safetensors file",
    ),
    "checkpoint: pickled code in a finished run": (
        replace_with_pickle("finished/checkpoints/*/readout.safetensors"),
        [*WARM_START_COMMANDS, *RUN_COMMANDS],
        "is not a safetensors file",
    ),
    "store: missing": (lambda: shutil.rmtree("store"), STORE_COMMANDS[:1], "holds no negatives"),
    "store: truncated manifest": (truncate("store/manifest.json"), STORE_COMMANDS, "manifest.json is damaged"),
    "store: truncated shard metadata": (truncate("store/epoch_0000/*.json"), STORE_COMMANDS, "is damaged"),
    "store: truncated shard": (truncate("store/epoch_0000/*.arrow"), STORE_COMMANDS, "has the wrong size"),
    "store: other seed": (no_damage, [[*STORE_COMMANDS[1], "seed=3"]], "holds other negatives than this run needs"),
    "parquet: truncated": (truncate("birds/train.parquet"), PARQUET_COMMANDS, "train.parquet"),
    "parquet: missing split": (lambda: Path("birds/test.parquet").unlink(), PARQUET_COMMANDS, "test"),
    "parquet: not images": (
        write_parquet(image=[b"no image"] * 9, label=[0, 1, 0] * 3),
        PARQUET_COMMANDS,
        "train.parquet.*row 0",
    ),
    "parquet: negative label": (
        write_parquet(image=[png(3)] * 9, label=[0, 1, -1] * 3),
        PARQUET_COMMANDS,
        "train.parquet.*row 2",
    ),
    "parquet: other image size": (
        lambda: pq.write_table(pa.table({"image": [png(3, (9, 3))] * 4, "label": [0, 1, 0, 1]}), "birds/test.parquet"),
        PARQUET_COMMANDS,
        "test.parquet.*row 0",
    ),
    "images: not an image": (write("folders/train/class_0/0.png", "no image"), IMAGE_FOLDER_COMMANDS, "0.png"),
    "images: link to a name that is too long": (
        lambda: Path("folders/train/class_0/a.png").symlink_to(LONG_NAME),
        IMAGE_FOLDER_COMMANDS,
        "a.png cannot be read .File name too long",
    ),
    "images: truncated image": (truncate("folders/train/class_1/*.png"), IMAGE_FOLDER_COMMANDS, "class_1"),
    "images: unknown class": (
        lambda: Path("folders/test/class_1").rename("folders/test/class_7"),
        IMAGE_FOLDER_COMMANDS,
        "class_7",
    ),
}


TRACKING_FILES = ("mlflow.db", "mlflow.db-wal", "mlflow.db-shm", ".mlflow.lock")


def file_digests() -> dict[str, str]:
    """Digests of all files, except those of the tracking database, which a command may open."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path().rglob("*"))
        if os.path.isfile(path)  # noqa: PTH113, Path.is_file fails for a link to a name that is too long
        and path.stat().st_size < 2**30
        and path.name not in (".lock", "metrics.db-wal", "metrics.db-shm", *TRACKING_FILES)
    }


@pytest.mark.parametrize(("damage", "commands", "message"), CASES.values(), ids=CASES)
def test_damaged_input_is_reported_and_existing_files_do_not_change(work_dir, damage, commands, message):
    damage()
    digests_before = file_digests()
    for command in commands:
        result = ffdist(*command)
        run_failed = "the run stopped" in result.output
        assert result.exit_code == (1 if run_failed else 2), (command, result.output, result.exception)
        error = result.output[result.output.index("Error: ") :]
        assert "Traceback" not in result.output
        assert len(error.strip().splitlines()) == 1, "one paragraph"
        assert re.search(message, error), error
        digests_after = file_digests()
        assert {path: digests_after.get(path) for path in digests_before} == digests_before
        assert run_failed or len(digests_after) == len(digests_before), "a run that is refused leaves no trace"
        digests_before = digests_after
    assert not Path("code-ran").exists()


def link_to(target: str):
    return lambda path: path.symlink_to(target)


def write_sparse_file(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**41)


REPLACEMENTS = {
    "link out of the folder": link_to("../" * 40 + "etc/hostname"),
    "absolute link": link_to("/etc/hostname"),
    "link to a device": link_to("/dev/zero"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "pipe": os.mkfifo,
    "folder": Path.mkdir,
    "2 TB file": write_sparse_file,
    "empty file": Path.touch,
}
"""Entries that replace a file or folder of the input."""
EVALUATE, PLOT = RUN_COMMANDS[1], RUN_COMMANDS[3]
READERS = {  # the command that reads each entry; None: `load_network`
    "finished/config.yaml": EVALUATE,
    "finished/summary.json": EVALUATE,
    "finished/timeline.json": PLOT,
    "finished/metrics.db": PLOT,
    "finished/checkpoints/*/manifest.json": EVALUATE,
    "finished/checkpoints/*/layer_1.safetensors": EVALUATE,
    "finished/checkpoints": EVALUATE,
    "stopped/metrics.db": RESUME_COMMANDS[0],
    "stopped/.lock": RESUME_COMMANDS[0],
    "stopped/checkpoints/*/position.safetensors": RESUME_COMMANDS[0],
    "store/manifest.json": STORE_COMMANDS[0],
    "store/epoch_0000/shard_000000.json": STORE_COMMANDS[0],
    "store/epoch_0000/shard_000000.arrow": STORE_COMMANDS[0],
    "network/network.json": None,
    "network/network.safetensors": None,
}
HARMLESS = {  # accepted, or created again
    ("stopped/.lock", "2 TB file"),
    ("stopped/.lock", "empty file"),
    ("stopped/metrics.db", "empty file"),
}


def export_network() -> None:
    Path("network").mkdir(exist_ok=True)
    save_network(Run.find("finished").network, Path("network"), Names())  # the files that `load_network` reads


def assert_refused(command: list[str] | None, case: str) -> None:
    """Asserts that a command, or `load_network` if there is none, refuses its input and changes no file."""
    digests_before = file_digests()
    if command is None:
        with pytest.raises((ValueError, OSError)):
            load_network("network")
        return
    result = ffdist(*command)
    assert result.exit_code == 2, (case, result.output, result.exception)
    error = result.output[result.output.index("Error: ") :]
    assert len(error.strip().splitlines()) == 1, (case, error)
    assert file_digests() == digests_before, case


@pytest.mark.parametrize("pattern", READERS)
def test_file_replaced_by_an_unsafe_entry_is_refused(work_dir, pattern):
    export_network()
    (path, *_) = sorted(Path().glob(pattern))
    path.rename("kept")
    for name, create in REPLACEMENTS.items():
        if (pattern, name) in HARMLESS:
            continue
        create(path)
        assert_refused(READERS[pattern], name)
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


DEEPLY_NESTED = "[" * 100_000
SUMMARY_KEYS = [
    "runner",
    "mlflow_run_id",
    "mlflow_tracking_uri",
    "test_readout_error",
    "encoder",
    "classes",
    "class_names",
]
INVALID_ENCODERS = [
    *({"shape": value} for value in (None, "a", [[]], [10**9] * 3, [1], [1, 0, 8])),
    *({"classes": value} for value in (None, "a", 0, 10**11, -(10**11))),
    *({"kind": value} for value in (None, "a", [1])),
    *({key: value} for key in ("label", "label_scale", "subtract_mean", "jitter") for value in (None, "a")),
    {"other": 1},
]
TRACE_EVENT = {"ph": "X", "tid": 1, "cat": "compute", "ts": 1, "dur": 1, "args": {"chunk": 1}}
TRACE_EVENTS = [{"ph": "M", "tid": 1, "args": {"name": "stage 1"}}, TRACE_EVENT]
INVALID_CONTENTS = ["[]", "{}", "null", '"text"', "3", "{", DEEPLY_NESTED, "\x00", '{"a": ' * 9000]
JSON_FILES = {
    "finished/summary.json": (
        EVALUATE,
        INVALID_CONTENTS,
        [{name: {}} for name in SUMMARY_KEYS]
        + [{"encoder": change} for change in INVALID_ENCODERS]
        + [{"classes": 0}, {"classes": 10**11}, {"classes": -(10**11)}]
        + [{"untrained_classes": value} for value in (7, None, [[1]], [10**11], list(range(10)))]
        + [{"data": 3}, {"data": {"columns": {"label": 3}}}, {"data": {"features": "ab"}}, {"data": {"features": [3]}}],
    ),
    "finished/timeline.json": (
        PLOT,
        INVALID_CONTENTS,
        [{"traceEvents": 3}, {"traceEvents": [3]}, {"traceEvents": TRACE_EVENTS[1:]}]
        + [
            {"traceEvents": [TRACE_EVENTS[0], TRACE_EVENT | {key: value}]}
            for key in ("ts", "dur")
            for value in ("a", [], 1e400)
        ],
    ),
    "network/network.json": (
        None,
        INVALID_CONTENTS,
        [{"layers": value} for value in (3, [[]], ["a"], [10**9, 10**9], [{"grid": 3}], [])]
        + [{"encoder": change} for change in ({}, *INVALID_ENCODERS)]
        + [{key: value} for key in ("encoder", "rule", "thresholds") for value in (None, "a", [[]])]
        + [{key: value} for key in ("seed", "precision", "untrained") for value in (None, "a")]
        + [{"untrained": value} for value in ([[1]], [10**11], list(range(10)))]
        + [{"layers": [{"grid": 10**11, "stride": 1, "field": 10**11, "units": 1}]}],
    ),
    "finished/checkpoints/*/manifest.json": (EVALUATE, INVALID_CONTENTS, [{"files": 3}, {"epoch": "a"}]),
    "store/epoch_0000/shard_000000.json": (
        STORE_COMMANDS[0],
        INVALID_CONTENTS,
        [{"epoch": "a"}, {"num_bytes": -1}, {"num_bytes": 2**60}],
    ),
    "store/manifest.json": (
        STORE_COMMANDS[0],
        INVALID_CONTENTS,
        [{"facts": []}, {"config": []}, {"config": {"data": []}}],
    ),
}


def _merge(content, change):
    """Returns content with a change, which adds to a nested encoder unless it is empty."""
    if isinstance(encoder := change.get("encoder"), dict) and encoder:
        change = {"encoder": content["encoder"] | encoder}
    return content | change


@pytest.mark.parametrize("name", JSON_FILES)
def test_json_of_wrong_type_is_refused(work_dir, name):
    export_network()
    command, contents, changes = JSON_FILES[name]
    path = next(Path().glob(name))
    valid_content = json.loads(path.read_text())
    for content in [*contents, *(json.dumps(_merge(valid_content, change)) for change in changes)]:
        path.write_text(content)
        assert_refused(command, content[:80])


DATABASE_CHANGES = {
    "value is a string": ("update points set value = 'a'", PLOT),
    "step is a string": ("update points set step = 'a' || step", PLOT),
    "missing table": ("drop table points", PLOT),
    "table with other columns": ("drop table points; create table points (a)", PLOT),
    "view instead of table": ("drop table points; create view points as select 1 as name", RESUME_COMMANDS[0]),
    "recoveries are not a list": ("insert or replace into facts values ('recoveries', '{}')", RESUME_COMMANDS[0]),
    "recoveries are not JSON": ("insert or replace into facts values ('recoveries', '[')", RESUME_COMMANDS[0]),
}


@pytest.mark.parametrize(("statement", "command"), DATABASE_CHANGES.values(), ids=DATABASE_CHANGES)
def test_a_forged_database_is_refused(work_dir, statement, command):
    with closing(sqlite3.connect("finished/metrics.db" if command is PLOT else "stopped/metrics.db")) as database:
        database.executescript(statement)
    assert_refused(command, statement)


UNSAFE_NAMES = [
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
MODEL_CALL = {"example": [1], "checkpoint": "a", "step": 10**30, "evaluations": {}}
INVALID_CALLS = [
    *(("artifact", json.dumps(name)) for name in UNSAFE_NAMES),
    *(("artifact", text) for text in ("3", "[]", "{", DEEPLY_NESTED, "null")),
    *(("model", text) for text in ("3", "{}", '{"folder": 3}')),
    *(("model", json.dumps(MODEL_CALL | {"folder": name})) for name in ("network", "checkpoints", "", "../../network")),
    *(("register", '"name"'), ("tags", "[]"), ("parameters", "3"), ("dataset", '{"a": 1}'), ("eval", '"code"')),
]


def test_sync_uploads_no_file_outside_the_run_folder(work_dir):
    """A run from another person must not make the next command upload other files of the user."""
    Path("secret").write_text("secret")
    run = Path(shutil.copytree("finished", "runs/evil"))
    (run / "link").symlink_to("../../secret")
    os.mkfifo(run / "pipe")
    Path("network").mkdir()
    (run / "network").symlink_to("../../network")
    with closing(sqlite3.connect(run / "metrics.db")) as database, database:
        database.executemany("insert into calls (what, content) values (?, ?)", INVALID_CALLS)
        (run_id,) = database.execute("select value from facts where key = 'run_id'").fetchone()
    uri = default_uri(Path("runs"))
    artifacts_before = [file.path for file in MlflowClient(uri).list_artifacts(run_id)]
    result = ffdist("sync", "runs/evil")
    assert result.exit_code == 0, (result.output, result.exception)
    assert result.output.count("rejected: ") == len(INVALID_CALLS)
    assert [file.path for file in MlflowClient(uri).list_artifacts(run_id)] == artifacts_before
    assert Path("secret").read_text() == "secret"


def test_code_named_by_a_run_is_not_executed_and_its_tracking_uri_is_refused(work_dir):
    Path("evil.py").write_text("import pathlib; pathlib.Path('code-ran').touch()")
    path = Path("finished/config.yaml")
    path.write_text(re.sub(r"kind: [a-z_]+", "kind: evil:function", path.read_text()))
    mtime_before = Path("finished/negatives.png").stat().st_mtime_ns
    for command in (EVALUATE, PLOT):
        result = ffdist(*command)
        assert result.exit_code == 0, (command, result.output, result.exception)
    assert not Path("code-ran").exists()
    assert Path("finished/negatives.png").stat().st_mtime_ns == mtime_before
    summary = json.loads(Path("finished/summary.json").read_text())
    for uri in ("http://127.0.0.1:9", "sqlite:////tmp/other.db"):
        Path("finished/summary.json").write_text(
            json.dumps(summary | {"mlflow_tracking_uri": uri, "mlflow_run_id": "a"})
        )
        assert_refused(RUN_COMMANDS[0], uri)


def test_plot_does_not_write_through_a_link(work_dir):
    Path("finished/errors.png").unlink()
    Path("finished/errors.png").symlink_to("../secret")
    assert ffdist(*PLOT).exit_code == 2
    assert not Path("secret").exists()


def test_at_least_250_inputs_are_tested():
    num_changes = (
        sum(len(contents) + len(changes) for _, contents, changes in JSON_FILES.values())
        + len(DATABASE_CHANGES)
        + len(INVALID_CALLS)
    )
    assert len(CASES) + len(READERS) * len(REPLACEMENTS) - len(HARMLESS) + num_changes >= 250
