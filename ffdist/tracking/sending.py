"""What goes from outboxes to the tracking server."""

import shlex
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout

from ffdist.exported import read_network
from ffdist.files import file_in, path_in
from ffdist.paths import in_each_folder
from ffdist.tracking.model import create_model, log_model, register_model
from ffdist.tracking.outbox import OUTBOX, Call, Outbox, Point
from ffdist.tracking.server import (
    a_client,
    brief,
    check_server,
    database_has_run,
    default_uri,
    follow_folder,
    log_dataset,
)

BATCH = 1000
"""Most metrics that MLflow takes in one request."""
FINAL = ("INVALID_PARAMETER_VALUE", "MALFORMED_REQUEST", "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST")
"""MLflow's codes of errors that a retry cannot resolve. All others, and errors of an artifact store, may pass."""
LOCK = ".lock"
"""In the folder of a run, held by the process that trains it, or for a moment by one that sends what it left."""
MODEL, NETWORK = "model", "network"
"""The fact that tells which of MLflow's models the run's network is, and the folder that holds it until it is one."""


class Rejected(Exception):
    """An upload that can never succeed; the text says why."""


class Sent(NamedTuple):
    """What became of the pending uploads of a run."""

    folder: Path
    points: int
    """Points that still wait."""
    calls: int
    """Other uploads that still wait."""
    problem: str
    """Why they wait; empty where nothing does."""
    rejected: list[str]
    """What was dropped, and why."""


def send_points(client: Any, outbox: Outbox, run_id: str) -> None:
    """Sends all points that wait, in order; raises whatever MLflow or the network raises, unless it is final."""
    before = None
    while points := outbox.waiting(BATCH):
        if points == before:
            raise ValueError(f"{outbox.folder / OUTBOX} is damaged")
        before = points
        _send_batch(client, outbox, run_id, points)


def _send_batch(client: Any, outbox: Outbox, run_id: str, points: list[Point]) -> None:
    """Sends some points; of those that are rejected, finds the ones to blame by halves."""
    from mlflow.entities import Metric

    try:
        client.log_batch(run_id, metrics=[Metric(*point) for point in points])
        outbox.mark_sent(points)
    except Exception as error:
        reason = final_reason(error, client, run_id)
        if not reason:
            raise
        half = len(points) // 2
        if not half or getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST":
            outbox.reject_points(points, reason)
        else:
            _send_batch(client, outbox, run_id, points[:half])
            _send_batch(client, outbox, run_id, points[half:])


def send_end(client: Any, outbox: Outbox, run_id: str) -> None:
    """Tells how the run ended, where that was not told yet; raises as `send_points` does."""
    if status := outbox.fact("left"):
        try:
            client.set_terminated(run_id, status)
        except Exception as error:
            if not final_reason(error, client, run_id):
                raise
        outbox.note(left="")


def send_calls(client: Any, outbox: Outbox, run_id: str, uri: str, *, uploads: bool = True) -> None:
    """Sends what else waits, in order.

    What fails for now stays. It holds up others of its group only: tags keep their order, a registration follows its
    model, and a file goes behind the other files, so that each of them is tried.

    Args:
        client: MLflow's.
        outbox: Of the run.
        run_id: The run's.
        uri: Of the tracking server, which is asked after a failure.
        uploads: Whether the artifact store is tried.

    Raises:
        ConfigError: The tracking server is away.
        Exception: The first failure that may pass.
    """
    failure: Exception | None = None
    held_up = set[str]() if uploads else set(UPLOADS.values())
    for call in outbox.calls():
        group = UPLOADS.get(call.what, call.what)
        if group in held_up:
            continue
        try:
            _send_call(client, run_id, outbox, call)
            outbox.drop(call)
        except Exception as error:  # whatever MLflow, an artifact store or the network raises
            if reason := final_reason(error, client, run_id):
                outbox.reject(call, reason)
                continue
            check_server(uri)
            failure = failure or error
            held_up.add(group)
            if call.what == "artifact":
                outbox.postpone(call)
    if failure:
        raise failure


def final_reason(error: Exception, client: Any, run_id: str) -> str:
    """Returns why an upload can never succeed; nothing where it may later."""
    if isinstance(error, Rejected):
        return str(error)
    if getattr(error, "error_code", None) not in FINAL:
        return ""
    try:
        if client.get_run(run_id).info.lifecycle_stage == "deleted":
            return ""  # until somebody restores it
    except Exception as gone:
        return brief(gone) if getattr(gone, "error_code", None) in FINAL else ""
    return brief(error)


def send_leftovers(client: Any, uri: str, runs: Path, is_over: Callable[[], bool]) -> None:
    """Sends what earlier runs of the folder `runs` could not, as far as the server takes it now.

    Args:
        client: MLflow's.
        uri: Where it is from; runs that are tracked elsewhere are left alone.
        runs: Runs folder.
        is_over: Says when to stop.
    """
    for folder in _pending(runs):
        if is_over():
            return
        # Whatever it is, such as a run that was deleted since, it must not keep this run from being tracked.
        with suppress(Exception):
            if _is_tracked_at(folder, uri, runs):
                send_run(client, folder, uri)


def send_run(client: Any, folder: Path, uri: str) -> Sent:
    """Sends what waits in the folder of a run that no process trains.

    Raises:
        Timeout: A process trains it, or sends what it left.
        OSError: The folder cannot be written.
        ValueError: One of its files must not be used.
        sqlite3.Error: Its database is damaged.
    """
    with (
        FileLock(file_in(folder, LOCK)).acquire(timeout=0),
        closing(Outbox(folder / OUTBOX, 0)) as outbox,  # nothing is added
    ):
        run_id, problem = str(outbox.fact("run_id") or ""), ""
        steps: tuple[Callable[[], None], ...] = (
            lambda: send_points(client, outbox, run_id),
            lambda: send_end(client, outbox, run_id),
            lambda: send_calls(client, outbox, run_id, uri),
        )
        for step in steps:
            try:
                step()
            except Exception as error:  # the next step may need another store
                problem = problem or brief(error)
        return Sent(folder, outbox.num_waiting, outbox.num_calls, problem, outbox.rejected())


def sync(folders: list[Path], uri: str, runs: Path) -> Iterator[tuple[str, bool]]:
    """Uploads what is pending in the folders of runs.

    Args:
        folders: Of the runs.
        uri: Where to upload; runs that are tracked elsewhere are only reported.
        runs: Runs folder.

    Yields:
        A line for each run, and whether something is left in it.

    Raises:
        ConfigError: The server is away.
    """
    if folders and uri == default_uri(runs):
        follow_folder(runs)
    for folder in folders:
        if not _is_tracked_at(folder, uri, runs):
            noted = Outbox.fact_of(folder / OUTBOX, "uri") or "nowhere"
            yield f"{folder}: tracked at {noted}; set MLFLOW_TRACKING_URI={shlex.quote(noted)} to upload", True
            continue
        try:
            with a_client(uri) as client:
                sent = send_run(client, folder, uri)
        except Timeout:
            yield f"{folder}: in use by another process, which uploads by itself", True
            continue
        except (OSError, ValueError, sqlite3.Error) as error:
            yield f"{folder}: {brief(error)}", True
            continue
        rejected = "".join(f"; rejected: {each}" for each in sent.rejected)
        left = bool(sent.points or sent.calls or sent.problem)
        waits = f"{sent.points} points and {sent.calls} other uploads wait ({sent.problem})"
        yield f"{folder}: {waits if left else 'everything is uploaded'}{rejected}", left


def pending_runs(runs: Path) -> list[Path]:
    """Returns the folders of all runs in which something is still to be sent, found without writing to them."""
    return list(_pending(runs))


def _pending(runs: Path) -> Iterator[Path]:
    for path in in_each_folder(runs, OUTBOX):
        if Outbox.is_pending(path) and Outbox.fact_of(path, "run_id"):
            yield path.parent


def _is_tracked_at(folder: Path, uri: str, runs: Path) -> bool:
    """Says whether a run is tracked at `uri`; the database of a runs folder may have been moved with it."""
    noted, run_id = (Outbox.fact_of(folder / OUTBOX, key) or "" for key in ("uri", "run_id"))
    return noted == uri or (uri == default_uri(runs) and database_has_run(uri, run_id))


def _send_call(client: Any, run_id: str, outbox: Outbox, call: Call) -> None:
    kind, send = CALLS.get(call.what, (type(None), None))
    if send is None or not isinstance(call.content, kind):
        raise Rejected(f"{OUTBOX} is damaged")
    send(client, run_id, outbox, call.content)


def _parameters(client: Any, run_id: str, outbox: Outbox, parameters: dict[str, str]) -> None:
    from mlflow.entities import Param

    client.log_batch(run_id, params=[Param(*parameter) for parameter in parameters.items()])


def _tags(client: Any, run_id: str, outbox: Outbox, tags: dict[str, str]) -> None:
    rejected = []
    for name, value in tags.items():
        try:
            client.set_tag(run_id, name, value)
        except Exception as error:
            if not (reason := final_reason(error, client, run_id)):
                raise
            rejected.append(reason)
    if rejected:
        raise Rejected("; ".join(rejected))


def _artifact(client: Any, run_id: str, outbox: Outbox, name: str) -> None:
    try:
        path = file_in(outbox.folder, name)
    except ValueError as error:
        raise Rejected(str(error)) from error
    if not path.is_file():
        raise Rejected(f"the file is missing ({outbox.folder / name})")
    folder = path.parent.relative_to(outbox.folder.resolve()).as_posix()
    client.log_artifact(run_id, str(path), None if folder == "." else folder)


def _dataset(client: Any, run_id: str, outbox: Outbox, dataset: dict[str, Any]) -> None:
    if dataset.keys() != {"name", "digest", "source", "profile"}:
        raise Rejected(f"{OUTBOX} is damaged")
    log_dataset(client, run_id, **dataset)


def _model(client: Any, run_id: str, outbox: Outbox, facts: dict[str, Any]) -> None:
    try:
        folder = path_in(outbox.folder, NETWORK)
        network, image = read_network(folder), torch.tensor(facts["image"], dtype=torch.uint8)
        names = [str(name) for name in facts["names"]]
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise Rejected(f"the network cannot be read ({brief(error)})") from error
    model_id = outbox.fact(MODEL)
    if not model_id:  # of an earlier try
        model_id = create_model(client, run_id)
        outbox.note(**{MODEL: model_id})
    log_model(client, run_id, model_id, network, names, image)
    shutil.rmtree(folder)


def _register(client: Any, run_id: str, outbox: Outbox, name: str) -> None:
    if (outbox.folder / NETWORK).exists() or not outbox.fact(MODEL):
        raise Rejected("its model was rejected")
    register_model(client, run_id, str(outbox.fact(MODEL)), name)


CALLS: dict[str, tuple[type, Callable[[Any, str, Outbox, Any], None]]] = {
    "parameters": (dict, _parameters),
    "tags": (dict, _tags),
    "artifact": (str, _artifact),
    "dataset": (dict, _dataset),
    "model": (dict, _model),
    "register": (str, _register),
}
"""What can be told beside points: the type of its content, and what sends it."""
UPLOADS = {"artifact": "artifact", "model": "model", "register": "model"}
"""The calls that need the artifact store, by group."""
