"""Uploads from outboxes to the tracking store."""

import json
import shlex
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from filelock import FileLock, Timeout

from ffdist.config.loading import CONFIG
from ffdist.config.values import NO_TRACKING
from ffdist.export.ffdist_served_model import PROGRAM
from ffdist.export.network import ARCHITECTURE, WEIGHTS, load_names, load_network
from ffdist.storage.files import file_in, path_in
from ffdist.storage.paths import find_in_subfolders
from ffdist.tracking.model import CHECKPOINT, NAME, export_in_subprocess, save_model
from ffdist.tracking.outbox import OUTBOX, Call, Outbox, Point
from ffdist.tracking.server import (
    check_server,
    database_has_run,
    default_uri,
    error_text,
    open_client,
    update_artifact_paths,
)

MAX_BATCH_POINTS = 1000
"""MLflow's limit on metrics in one request."""
PERMANENT_CODES = ("INVALID_PARAMETER_VALUE", "MALFORMED_REQUEST", "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST")
"""MLflow's codes of permanent errors. All other errors, and errors of the artifact store, are retried."""
LOCK = ".lock"
"""Lock file in the folder of a run. The process that trains the run holds it; `send_run` holds it while it uploads."""
MODEL, NETWORK = "model", "network"
"""Key of the fact that holds the MLflow model id, and the folder that holds the network until it is uploaded. Those of
the models of further checkpoints begin with these names."""
DIGEST_LENGTH = 36
"""MLflow's limit on the digest of a dataset."""


class RejectedUpload(Exception):
    """An upload that can never succeed; the message is the reason."""


def send_points(client: Any, outbox: Outbox, run_id: str) -> None:
    """Sends all pending points in order; raises any temporary error of MLflow or the network."""
    previous = None
    while points := outbox.pending_points(MAX_BATCH_POINTS):
        if points == previous:
            raise ValueError(f"{outbox.folder / OUTBOX} is damaged")
        previous = points
        _send_batch(client, outbox, run_id, points)


def _send_batch(client: Any, outbox: Outbox, run_id: str, points: list[Point]) -> None:
    """Sends a batch of points; bisects it to find the points that the server rejects."""
    from mlflow.entities import Metric

    try:
        client.log_batch(run_id, metrics=[Metric(*point) for point in points])
        outbox.mark_sent(points)
    except Exception as error:
        reason = rejection_reason(error, client, run_id)
        if not reason:
            raise
        half = len(points) // 2
        if not half or getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST":
            outbox.reject_points(points, reason)
        else:
            _send_batch(client, outbox, run_id, points[:half])
            _send_batch(client, outbox, run_id, points[half:])


def send_status(client: Any, outbox: Outbox, run_id: str) -> None:
    """Sends the final status of the run if it is pending; raises any temporary error as `send_points` does."""
    if status := outbox.fact("left"):
        try:
            client.set_terminated(run_id, status)
        except Exception as error:
            if not rejection_reason(error, client, run_id):
                raise
        outbox.set_facts(left="")


def send_calls(client: Any, outbox: Outbox, run_id: str, uri: str, *, uploads: bool = True) -> None:
    """Makes all pending calls in order, those of models last, because exporting a network takes seconds.

    A call with a temporary error stays pending and blocks only later calls of its group: tags keep their order, and a
    model is registered after its upload. A failed artifact moves behind the others, so that each of them is tried.

    Args:
        client: MLflow client.
        outbox: Outbox of the run.
        run_id: MLflow run id.
        uri: Tracking URI, which is checked after an error.
        uploads: Whether to make calls that need the artifact store.

    Raises:
        ConfigError: The tracking store cannot be reached.
        Exception: The first temporary error.
    """
    failure: Exception | None = None
    blocked = set[str]() if uploads else set(UPLOAD_GROUPS.values())
    for call in sorted(outbox.calls(), key=_is_model):
        group = UPLOAD_GROUPS.get(call.kind, call.kind)
        if group in blocked:
            continue
        try:
            _send_call(client, run_id, outbox, call)
            outbox.drop(call)
        except Exception as error:  # MLflow, artifact stores and the network raise many types
            if reason := rejection_reason(error, client, run_id):
                outbox.reject(call, reason)
                continue
            check_server(uri)
            failure = failure or error
            blocked.add(group)
            if call.kind == "artifact":
                outbox.postpone(call)
    if failure:
        raise failure


def _is_model(call: Call) -> bool:
    return UPLOAD_GROUPS.get(call.kind) == "model"


def rejection_reason(error: Exception, client: Any, run_id: str) -> str:
    """Returns why an upload can never succeed; an empty text if a retry may succeed."""
    if isinstance(error, RejectedUpload):
        return str(error)
    if getattr(error, "error_code", None) not in PERMANENT_CODES:
        return ""
    try:
        if client.get_run(run_id).info.lifecycle_stage == "deleted":
            return ""  # the run may be restored
    except Exception as run_error:
        return error_text(run_error) if getattr(run_error, "error_code", None) in PERMANENT_CODES else ""
    return error_text(error)


def send_leftovers(client: Any, uri: str, runs: Path, should_stop: Callable[[], bool]) -> None:
    """Sends the pending uploads of earlier runs; errors are ignored.

    Args:
        client: MLflow client.
        uri: Tracking URI; runs with another one are skipped.
        runs: Runs folder.
        should_stop: Returns whether to stop before the next run.
    """
    for folder in pending_runs(runs):
        if should_stop():
            return
        # An error of another run, such as one that was deleted, must not affect the tracking of this run.
        with suppress(Exception):
            if _is_tracked_at(folder, uri, runs):
                send_run(client, folder, uri)


def send_run(client: Any, folder: Path, uri: str) -> tuple[str, bool]:
    """Sends the pending uploads of a run that no process is training.

    Returns:
        A message, and whether the run still has pending uploads.

    Raises:
        Timeout: Another process is training the run or sending its uploads.
        OSError: The folder cannot be written.
        ValueError: One of its files is unsafe.
        sqlite3.Error: Its outbox is damaged.
    """
    with (
        FileLock(file_in(folder, LOCK)).acquire(timeout=0),
        closing(Outbox(folder / OUTBOX, 0)) as outbox,  # no points are added
    ):
        run_id, problem = str(outbox.fact("run_id") or ""), ""
        steps: tuple[Callable[[], None], ...] = (
            lambda: send_points(client, outbox, run_id),
            lambda: send_status(client, outbox, run_id),
            lambda: send_calls(client, outbox, run_id, uri),
        )
        for step in steps:
            try:
                step()
            except Exception as error:  # the next step may need a different store
                problem = problem or error_text(error)
        points, calls = outbox.num_pending, outbox.num_calls
        rejected = "".join(f"; rejected: {each}" for each in outbox.rejected())
    is_pending = bool(points or calls or problem)
    pending = f"{points} points and {calls} other uploads wait ({problem})"
    return f"{folder}: {pending if is_pending else 'everything is uploaded'}{rejected}", is_pending


def sync(folders: list[Path], uri: str, runs: Path) -> Iterator[tuple[str, bool]]:
    """Sends the pending uploads of several runs.

    Args:
        folders: Folders of the runs.
        uri: Tracking URI; runs with another one are only reported.
        runs: Runs folder.

    Yields:
        A message for each run, and whether it still has pending uploads.

    Raises:
        ConfigError: The tracking store cannot be reached.
    """
    if folders and uri == default_uri(runs):
        update_artifact_paths(runs)
    for folder in folders:
        if not _is_tracked_at(folder, uri, runs):
            run_uri = Outbox.fact_of(folder / OUTBOX, "uri")
            if run_uri in (None, "", NO_TRACKING):
                yield f"{folder}: not tracked by MLflow", False
                continue
            yield f"{folder}: tracked at {run_uri}; set MLFLOW_TRACKING_URI={shlex.quote(run_uri)} to upload", True
            continue
        try:
            with open_client(uri) as client:
                result = send_run(client, folder, uri)
        except Timeout:
            yield f"{folder}: in use by another process, which uploads it", True
            continue
        except (OSError, ValueError, sqlite3.Error) as error:
            yield f"{folder}: {error_text(error)}", True
            continue
        yield result


def pending_runs(runs: Path) -> Iterator[Path]:
    """Yields the folders of all runs with pending uploads, without writing to them."""
    for path in find_in_subfolders(runs, OUTBOX):
        if Outbox.is_pending(path) and Outbox.fact_of(path, "run_id"):
            yield path.parent


def _is_tracked_at(folder: Path, uri: str, runs: Path) -> bool:
    """Returns whether a run is tracked at `uri`, including a default database that was moved with its runs folder."""
    run_uri, run_id = (Outbox.fact_of(folder / OUTBOX, key) or "" for key in ("uri", "run_id"))
    return run_uri == uri or (uri == default_uri(runs) and database_has_run(uri, run_id))


def _send_call(client: Any, run_id: str, outbox: Outbox, call: Call) -> None:
    content_type, send = HANDLERS.get(call.kind, (type(None), None))
    if send is None or not isinstance(call.content, content_type):
        raise RejectedUpload(f"{OUTBOX} is damaged")
    send(client, run_id, outbox, call.content)


def _send_parameters(client: Any, run_id: str, outbox: Outbox, parameters: dict[str, str]) -> None:
    from mlflow.entities import Param

    client.log_batch(run_id, params=[Param(*parameter) for parameter in parameters.items()])


def _send_tags(client: Any, run_id: str, outbox: Outbox, tags: dict[str, str]) -> None:
    rejected = []
    for name, value in tags.items():
        try:
            client.set_tag(run_id, name, value)
        except Exception as error:
            if not (reason := rejection_reason(error, client, run_id)):
                raise
            rejected.append(reason)
    if rejected:
        raise RejectedUpload("; ".join(rejected))


def _send_artifact(client: Any, run_id: str, outbox: Outbox, name: str) -> None:
    try:
        path = file_in(outbox.folder, name)
    except ValueError as error:
        raise RejectedUpload(str(error)) from error
    if not path.is_file():
        raise RejectedUpload(f"the file is missing ({outbox.folder / name})")
    folder = path.parent.relative_to(outbox.folder.resolve()).as_posix()
    client.log_artifact(run_id, str(path), None if folder == "." else folder)


def _send_dataset(client: Any, run_id: str, outbox: Outbox, dataset: dict[str, Any]) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    if dataset.keys() != {"name", "digest", "source", "profile", "context"}:
        raise RejectedUpload(f"{OUTBOX} is damaged")
    digest, profile = dataset["digest"][:DIGEST_LENGTH], json.dumps(dataset["profile"])
    entity = Dataset(dataset["name"], digest, "ffdist", dataset["source"], profile=profile)
    client.log_inputs(run_id, [DatasetInput(entity, [InputTag("mlflow.data.context", dataset["context"])])])


def _send_model(client: Any, run_id: str, outbox: Outbox, content: dict[str, Any]) -> None:
    """Logs a network as a model of the run, and links its metrics to it. Calling it again has no effect."""
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus
    from mlflow.models import Model

    try:
        folder = path_in(outbox.folder, content["folder"])
        if folder.parent != outbox.folder.resolve() or not folder.name.startswith(NETWORK):
            raise ValueError(f"not a folder of a network: {folder.name}")
        checkpoint, step = str(content["checkpoint"]), int(content["step"])
        network = load_network(folder)
        files = [path for name in (WEIGHTS, ARCHITECTURE, CONFIG) if (path := file_in(folder, name)).is_file()]
        has_names = bool(load_names(folder).class_names)
        example = torch.tensor(content["example"], dtype=network.architecture.encoder.dtype)
        example = example.view(network.architecture.encoder.size)
        metrics = [_evaluation_points(outbox, *each) for each in content["evaluations"].items()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise RejectedUpload(f"the network cannot be read ({error_text(error)})") from error
    is_final = folder.name == NETWORK
    model_id = _model_id(client, run_id, outbox, MODEL if is_final else f"{MODEL} {checkpoint}", checkpoint)
    location = client.get_logged_model(model_id).artifact_location
    with TemporaryDirectory() as temporary:
        path, program = Path(temporary) / NAME, outbox.programs.get(folder.name) or Path(temporary) / PROGRAM
        try:
            if folder.name not in outbox.programs:
                export_in_subprocess(network.architecture, folder, program)
        except ValueError as error:
            raise RejectedUpload(str(error)) from error
        mlflow_model = Model(artifact_path=location, model_uuid=model_id, run_id=run_id, model_id=model_id)
        save_model(
            network.architecture,
            [*files, program],
            example,
            path,
            has_names=has_names,
            mlflow_model=mlflow_model,
        )
        client.log_model_artifacts(model_id, str(path))
    client.log_outputs(run_id, [LoggedModelOutput(model_id, step=step)])
    client.finalize_logged_model(model_id, LoggedModelStatus.READY)
    _link_metrics(client, run_id, model_id, metrics)
    shutil.rmtree(folder)


def _model_id(client: Any, run_id: str, outbox: Outbox, fact: str, checkpoint: str) -> str:
    """Returns the id of a model, which is created unless an earlier attempt has done so."""
    model_id = outbox.fact(fact)
    if not model_id:
        experiment_id = client.get_run(run_id).info.experiment_id
        name = NAME if fact == MODEL else f"{CHECKPOINT}-{checkpoint}"
        model_id = str(client.create_logged_model(experiment_id, name, run_id, {CHECKPOINT: checkpoint}).model_id)
        outbox.set_facts(**{fact: model_id})
    return model_id


def _evaluation_points(outbox: Outbox, split: str, evaluation: dict[str, Any]) -> tuple[list[Point], str, str]:
    """Returns the points of an evaluation, and name and digest of its dataset."""
    points = outbox.points_at(int(evaluation["step"]), f"{split}/")
    return points, str(evaluation["name"]), str(evaluation["digest"])[:DIGEST_LENGTH]


def _link_metrics(client: Any, run_id: str, model_id: str, metrics: list[tuple[list[Point], str, str]]) -> None:
    """Logs points of the run again, with a model and a dataset; the run keeps one of each."""
    from mlflow.entities import Metric

    linked = [
        Metric(*point, model_id=model_id, dataset_name=name, dataset_digest=digest)
        for points, name, digest in metrics
        for point in points
    ]
    if linked:
        client.log_batch(run_id, metrics=linked)


def _register_model(client: Any, run_id: str, outbox: Outbox, name: str) -> None:
    """Registers the model of the run as a new version of a registered model, which is created if necessary."""
    from mlflow.exceptions import MlflowException

    if (outbox.folder / NETWORK).exists() or not outbox.fact(MODEL):
        raise RejectedUpload("its model was rejected")
    model_id = str(outbox.fact(MODEL))
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    if any(each.model_id == model_id for each in client.search_model_versions(f"run_id = '{run_id}'")):
        return  # registered by an earlier attempt whose response was lost
    # A database resolves models:/ URIs in the default store of the process, which may be another one.
    location = client.get_logged_model(model_id).artifact_location
    source = f"models:/{model_id}" if client.tracking_uri.startswith("http") else location
    client.create_model_version(name, source, run_id, model_id=model_id)


HANDLERS: dict[str, tuple[type, Callable[[Any, str, Outbox, Any], None]]] = {
    "parameters": (dict, _send_parameters),
    "tags": (dict, _send_tags),
    "artifact": (str, _send_artifact),
    "dataset": (dict, _send_dataset),
    "model": (dict, _send_model),
    "register": (str, _register_model),
}
"""Content type and handler of each kind of call."""
UPLOAD_GROUPS = {"artifact": "artifact", "model": "model", "register": "model"}
"""Group of each kind of call that needs the artifact store."""
