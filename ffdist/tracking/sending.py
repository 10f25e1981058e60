"""What goes from outboxes to the tracking server."""

import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from ffdist.exported import read_network
from ffdist.tracking.model import create_model, log_model, register_model
from ffdist.tracking.outbox import OUTBOX, Outbox
from ffdist.tracking.server import brief, check_server, log_dataset

BATCH = 1000
"""Most metrics that MLflow takes in one request."""
TRIES, RETRY_EVERY_S = 3, 0.5
"""Of what is not a metric, such as an artifact: a store that refuses one must not hold up what follows."""
LOCK = ".lock"
"""In the folder of a run, held by the process that trains it, or for a moment by one that sends what it left."""
MODEL, NETWORK = "model", "network"
"""The fact that tells which of MLflow's models the run's network is, and the folder that holds it until it is one."""


def send_points(client: Any, outbox: Outbox, run_id: str) -> None:
    """Sends all points that wait, in order; raises whatever MLflow or the network raises."""
    from mlflow.entities import Metric

    while points := outbox.waiting(BATCH):
        client.log_batch(run_id, metrics=[Metric(*point) for point in points])
        outbox.mark_sent(points)


def send_end(client: Any, outbox: Outbox, run_id: str) -> None:
    """Tells how the run ended, where that was not told yet; raises as `send_points` does."""
    if status := outbox.fact("left"):
        client.set_terminated(run_id, status)
        outbox.note(left="")


def send_calls(client: Any, outbox: Outbox, run_id: str, uri: str) -> str:
    """Tells what else waits, in order, and leaves out what the server refuses.

    Returns:
        Why it refused something, if it did.

    Raises:
        ConfigError: The server is away.
    """
    refused = ""
    while call := outbox.next_call():
        refused = attempt(partial(CALLS[call.what], client, run_id, outbox, call.content), uri) or refused
        outbox.drop(call)
    return refused


def attempt(call: Callable[[], Any], uri: str) -> str:
    """Makes a call, some times if need be.

    Returns:
        Why the server refuses it, if it does.

    Raises:
        ConfigError: The server is away.
    """
    for _ in range(TRIES - 1):
        with suppress(Exception):  # whatever it is, it may be over soon
            call()
            return ""
        time.sleep(RETRY_EVERY_S)
    try:
        call()
    except Exception as error:
        check_server(uri)
        return brief(error)
    return ""


def send_leftovers(client: Any, uri: str, runs: Path) -> None:
    """Sends what earlier runs of the folder `runs` could not, as far as the server takes it now."""
    for path in sorted(runs.glob(f"*/{OUTBOX}")):
        # Whatever it is, such as a run that was deleted since, it must not keep this run from being tracked.
        with suppress(Exception), FileLock(path.parent / LOCK).acquire(timeout=0):
            outbox = Outbox(path, 0)  # nothing is added
            run_id = outbox.fact("run_id")
            if run_id and outbox.fact("uri") == uri:
                send_points(client, outbox, run_id)
                send_end(client, outbox, run_id)
                send_calls(client, outbox, run_id, uri)
            outbox.close()


def _parameters(client: Any, run_id: str, outbox: Outbox, parameters: dict[str, str]) -> None:
    from mlflow.entities import Param

    client.log_batch(run_id, params=[Param(*parameter) for parameter in parameters.items()])


def _tags(client: Any, run_id: str, outbox: Outbox, tags: dict[str, str]) -> None:
    for name, value in tags.items():
        client.set_tag(run_id, name, value)


def _artifact(client: Any, run_id: str, outbox: Outbox, name: str) -> None:
    client.log_artifact(run_id, str(outbox.folder / name))


def _dataset(client: Any, run_id: str, outbox: Outbox, dataset: dict[str, Any]) -> None:
    log_dataset(client, run_id, **dataset)


def _model(client: Any, run_id: str, outbox: Outbox, facts: dict[str, Any]) -> None:
    model_id = outbox.fact(MODEL)
    if not model_id:  # of an earlier try
        model_id = create_model(client, run_id)
        outbox.note(**{MODEL: model_id})
    network, image = read_network(outbox.folder / NETWORK), torch.tensor(facts["image"], dtype=torch.uint8)
    log_model(client, run_id, model_id, network, facts["names"], image)
    shutil.rmtree(outbox.folder / NETWORK)


def _register(client: Any, run_id: str, outbox: Outbox, name: str) -> None:
    register_model(client, run_id, str(outbox.fact(MODEL)), name)


CALLS: dict[str, Callable[[Any, str, Outbox, Any], None]] = {
    "parameters": _parameters,
    "tags": _tags,
    "artifact": _artifact,
    "dataset": _dataset,
    "model": _model,
    "register": _register,
}
"""What can be told beside points."""
