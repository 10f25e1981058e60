"""What goes from outboxes to the tracking server."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from ffdist.tracking.outbox import OUTBOX, Outbox

BATCH = 1000
"""Most metrics that MLflow takes in one request."""
LOCK = ".lock"
"""In the folder of a run, held by the process that trains it, or for a moment by one that sends what it left."""


def send_points(client: Any, outbox: Outbox, run_id: str) -> None:
    """Sends all points that wait, in order; raises whatever MLflow or the network raises."""
    from mlflow.entities import Metric

    while points := outbox.waiting(BATCH):
        client.log_batch(run_id, metrics=[Metric(*point) for point in points])
        outbox.mark_sent(points)


def send_leftovers(client: Any, uri: str, runs: Path, limit_bytes: int) -> None:
    """Sends what earlier runs of the folder `runs` could not, as far as the server takes it now."""
    for path in sorted(runs.glob(f"*/{OUTBOX}")):
        # Whatever it is, such as a run that was deleted since, it must not keep this run from being tracked.
        with suppress(Exception), FileLock(path.parent / LOCK).acquire(timeout=0):
            outbox = Outbox(path, limit_bytes)
            run_id, status = outbox.fact("run_id"), outbox.fact("left")
            if run_id and outbox.fact("uri") == uri and (status or outbox.num_waiting):
                send_points(client, outbox, run_id)
                if status:
                    client.set_terminated(run_id, status)
                outbox.note(left="")
            outbox.close()
