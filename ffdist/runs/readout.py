"""Fitting a readout to the frozen layers of a finished run."""

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from ffdist import host_memory
from ffdist.console import track
from ffdist.errors import ConfigError
from ffdist.ff.classify import error as classification_error
from ffdist.ff.network import Network
from ffdist.ff.specs import FLOAT32_BYTES
from ffdist.runs.folder import SUMMARY
from ffdist.runs.run import Run
from ffdist.storage.folder import Folder
from ffdist.tracking.server import open_client, trusted_uri

BATCH_SIZE = 1000
"""Number of samples in a forward pass."""
MAX_EVALUATIONS = 500
"""Largest number of evaluations of the loss on all training samples."""


def fit_readout(run: Run, *, runs: Path, uri: str | None = None) -> float:
    """Fits a readout to the frozen layers of a finished run until it converges; prints and returns its test error.

    It is a joint readout of all predicting layers, also if the run had another readout or none.

    If the checkpoint is the one that the run's results belong to, the error is also added to its summary and, if the
    run is tracked by MLflow, logged to it as `test/fitted_readout_error`.

    Args:
        run: The run.
        runs: Runs folder.
        uri: Tracking URI of the run; by default found from the runs folder and MLFLOW_TRACKING_URI.

    Raises:
        ConfigError: The run's data or checkpoint is not available, or the error was printed but cannot be logged.
    """
    summary, run_id = run.summary, run.summary["mlflow_run_id"]
    if run_id:  # else it is not tracked by MLflow
        uri = uri or trusted_uri(run.folder, summary["mlflow_tracking_uri"], run_id, runs)
    network, dataset = run.network, run.dataset
    readout, samples = network.architecture.readout(), len(dataset.samples["train"])
    features = readout.weight.shape[1]
    host_memory.check(FLOAT32_BYTES * samples * features, "the activations that a readout is fitted to")
    train, done = _activations(network, dataset.samples["train"], "train"), 0
    rows = torch.empty(samples, features)  # allocated once, because it dominates the memory use
    for batch in train:
        rows[done : done + len(batch[0])] = readout.rows(batch)
        done += len(batch[0])
    with closing(track(range(MAX_EVALUATIONS), "fitting the readout")) as bar:
        gradient = readout.fit(rows, dataset.labels["train"], iterations=MAX_EVALUATIONS, step=lambda: next(bar, None))
    predicted = [readout(batch).argmax(1) for batch in _activations(network, dataset.samples["test"], "test")]
    test_error = classification_error(torch.cat(predicted), dataset.labels["test"])
    trained_error = summary["test_readout_error"]
    trained = "" if trained_error is None else f"; {trained_error:.2%} by the readout trained with the layers"
    Console(highlight=False).print(
        f"test error {test_error:.2%} by a readout fitted to the layers of {run.folder} (largest gradient: "
        f"{gradient:.1e} nats)" + trained,
        markup=False,
        soft_wrap=True,
    )
    if not run.uses_reported_checkpoint:
        return test_error
    if run_id:
        _log(test_error, str(uri), run_id)
    Folder(str(run.folder), ConfigError).put(  # last, so that a run with this entry is also complete in MLflow
        SUMMARY, json.dumps(summary | {"test_fitted_readout_error": test_error}, indent=2).encode()
    )
    return test_error


def _log(test_error: float, uri: str, run_id: str) -> None:
    """Logs the error at the step and time of the other errors, so that another call adds no duplicate."""
    with open_client(uri) as client:
        names = "test/readout_error", "test/goodness_error"
        history = [point for name in names for point in client.get_metric_history(run_id, name)]
        points = [(point.step, point.timestamp) for point in history]
        step, timestamp = max(points, default=(None, None))
        client.log_metric(run_id, "test/fitted_readout_error", test_error, timestamp, step)


def _activations(network: Network, samples: Tensor, split: str) -> Iterator[list[Tensor]]:
    """Yields the readout's inputs for one batch of samples after another, in float32."""
    batch_size = min(BATCH_SIZE, network.architecture.max_rows)
    for batch in track(torch.split(samples, batch_size), f"computing activations of {split} samples"):
        yield [activations.float() for activations in network.read(network.architecture.neutral_rows(batch))]
