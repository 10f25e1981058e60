"""The runs in a runs folder: listing, comparison and removal."""

import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ffdist.checkpoint.checkpoints import CheckpointError
from ffdist.config.schema import Config
from ffdist.errors import ConfigError
from ffdist.runs.folder import CONFIG, SUMMARY, checkpoints_of, config_of, find_run, is_in_use, resume_command
from ffdist.storage.files import UnsafeFile, file_in, read_json
from ffdist.storage.paths import find_in_subfolders, kind_of
from ffdist.tracking.outbox import OUTBOX, REASON, STATUS, Outbox
from ffdist.tracking.server import error_text, open_client, trusted_uri
from ffdist.tracking.sync import LOCK

RESULTS = ("test_goodness_error", "test_readout_error", "epochs", "samples_per_s", "train_s", "precision")
"""Results in a comparison."""


def list_runs(runs: Path) -> list[dict[str, Any]]:
    """Returns a row for each run in a runs folder, oldest first: its status, results, and how to resume it."""
    paths = sorted(find_in_subfolders(runs, CONFIG), key=lambda path: path.stat().st_mtime)
    return [_row(path.parent) for path in paths]


def _row(folder: Path) -> dict[str, Any]:
    status = _status(folder)
    row = {
        "run": str(folder),
        "status": status,
        "started": time.strftime("%Y-%m-%d %H:%M", time.localtime((folder / CONFIG).stat().st_mtime)),
        "epochs": "",
        "goodness error": "",
        "readout error": "",
        "note": Outbox.fact_of(folder / OUTBOX, REASON) or "" if status == "failed" else "",
        "resume with": "",
    }
    try:
        config = config_of(folder)
        if status not in ("finished", "running"):
            row["resume with"] = resume_command(folder, config)
        if status == "finished":
            summary = _summary(folder)
            row["goodness error"], row["readout error"] = summary["test_goodness_error"], summary["test_readout_error"]
        names = [] if config.checkpoint.uri else checkpoints_of(config, folder).names()  # a server may be away
    except (ConfigError, CheckpointError, OSError, ValueError, KeyError) as error:
        return row | {"status": "damaged", "note": error_text(error), "resume with": ""}
    if status == "finished":
        row["epochs"] = summary.get("epochs", "")
    elif names:
        row["epochs"] = f"{int(names[-1].partition('-')[0])} of {config.num_epochs}"
    elif not config.checkpoint.uri:
        row |= {"note": row["note"] or "no checkpoint yet", "resume with": ""}
    return row


def _status(folder: Path) -> str:
    """Returns the status of a run; one whose process died is killed."""
    if kind_of(folder / SUMMARY) == "file":
        return "finished"
    if kind_of(folder / LOCK) and is_in_use(folder):
        return "running"
    status = (Outbox.fact_of(folder / OUTBOX, STATUS) or "killed").lower()
    return "killed" if status == "finished" else status  # its process died before it wrote the summary


def _summary(folder: Path) -> dict[str, Any]:
    return dict(read_json(folder, SUMMARY)) if kind_of(folder / SUMMARY) == "file" else {}


def compare_runs(names: Sequence[str], runs: Path) -> list[dict[str, Any]]:
    """Returns a row for each setting that differs between runs, and for each result.

    Args:
        names: Folders or MLflow run ids of the runs; unfinished ones have no results.
        runs: Runs folder.

    Raises:
        ConfigError: There is no such run, or its files are damaged.
    """
    folders = [find_run(name, runs) for name in names]
    try:
        summaries = [_summary(folder) for folder in folders]
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"a {SUMMARY} is missing or damaged ({error})") from error
    columns = [str(folder) for folder in folders]
    rows = compare_configs(dict(zip(columns, map(config_of, folders), strict=True)))
    for key in RESULTS:
        values = [summary.get(key) for summary in summaries]
        rows.append({"": key} | {name: _cell(key, value) for name, value in zip(columns, values, strict=True)})
    digests = [summary.get("weights_sha256", "") for summary in summaries]
    rows.append(
        {"": "weights_sha256"} | {name: str(digest)[:12] for name, digest in zip(columns, digests, strict=True)}
    )
    return rows


def compare_configs(configs: dict[str, Config]) -> list[dict[str, Any]]:
    """Returns a row for each setting that differs between configurations, given by name."""
    flat = {name: config.flat() for name, config in configs.items()}
    keys = dict.fromkeys(key for settings in flat.values() for key in settings)
    rows = [{"": key} | {name: settings.get(key) for name, settings in flat.items()} for key in keys]
    return [row for row in rows if any(value != row[next(iter(flat))] for name, value in row.items() if name)]


def _cell(key: str, value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.2%}" if key.endswith("error") else f"{value:,.1f}"
    return value


def remove_run(folder: Path, runs: Path) -> str:
    """Removes the folder of a run, and marks its MLflow run as deleted; returns a text that says what was removed.

    Checkpoints at `checkpoint.uri` are kept.

    Raises:
        ConfigError: The folder is not that of a run, is in use, or cannot be removed.
    """
    uri, run_id = (Outbox.fact_of(folder / OUTBOX, key) or "" for key in ("uri", "run_id"))
    if not uri or folder.is_symlink() or Path.cwd().is_relative_to(folder.resolve()):
        raise ConfigError(
            f"only the folder of a run is removed, with its {OUTBOX}, and not a link or the working directory "
            f"({folder}); give another one"
        )
    if not os.access(folder, os.W_OK) or not os.access(folder.parent, os.W_OK):
        raise ConfigError(f"{folder} cannot be removed, because it is read-only; change its permissions")
    try:
        with FileLock(file_in(folder, LOCK)).acquire(timeout=0):  # until it is gone
            return _remove(folder, uri, run_id, runs)
    except Timeout as error:
        raise ConfigError(f"{folder} is in use by another process; stop it first") from error
    except (OSError, UnsafeFile) as error:
        raise ConfigError(f"{folder} cannot be removed ({error}); correct its lock, or remove it yourself") from error


def _remove(folder: Path, uri: str, run_id: str, runs: Path) -> str:
    text = f"removed {folder}"
    try:
        kept = config_of(folder).checkpoint.uri
    except ConfigError:
        kept = None
    if kept:
        text += f"; its checkpoints at {kept} are kept"
    try:
        if run_id:
            with open_client(trusted_uri(folder, uri, run_id, runs)) as client:
                tracked_folder = client.get_run(run_id).data.tags.get("folder")
                if tracked_folder != str(folder.resolve()):  # a copy, or the folder of another person
                    raise ConfigError(f"it is of the folder {tracked_folder}")
                client.delete_run(run_id)
            text += f"; `mlflow runs restore --run-id {run_id}` restores its metrics"
    except ConfigError as error:
        text += f"; its MLflow run {run_id} is kept ({error})"
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be removed ({error.strerror}); change its permissions") from error
    return text
