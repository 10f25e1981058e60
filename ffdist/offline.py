"""What is done outside of a run: negatives made and looked at, and a readout fitted to layers that stay as they are."""

import json
from collections.abc import Iterator
from contextlib import closing
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ffdist import host_memory
from ffdist.config import Config, ConfigError
from ffdist.config_file import parse_config
from ffdist.data.datasets import load_dataset
from ffdist.data.folder import Folder
from ffdist.data.order import SampleOrder
from ffdist.data.store import Store
from ffdist.ff.classify import error as share_wrong
from ffdist.ff.negatives import NegativesError
from ffdist.ff.network import Network
from ffdist.finished import Run
from ffdist.pipeline.runner import torch_threads
from ffdist.pipeline.source import NegativeSource
from ffdist.prepare import prepare
from ffdist.screen import print_rows, track
from ffdist.start import SUMMARY
from ffdist.tracking.plots import plot_negatives
from ffdist.tracking.server import log_to_run, uri_of_finished

ROWS = 1000
"""Images that pass through the layers together."""
SHOWN = 10
FITTINGS = 500
"""Most evaluations of all training samples in a fit."""


def fill_store(config: Config) -> Store:
    """Makes the negatives of all epochs of a run and keeps them in `negatives.store`; those that are there stay.

    Raises:
        ConfigError: No store is named, or it cannot be used.
    """
    if config.negatives.store is None:
        raise ConfigError("negatives are kept in negatives.store, and none is set; give negatives.store=FOLDER")
    dataset, order, architecture, plan = prepare(config)
    assert plan.store, "named above"
    source = NegativeSource(plan, dataset.images, dataset.labels["train"], architecture, order)
    try:
        with torch_threads(config.pipeline.threads_per_stage):
            for epoch in track(range(config.passes), f"making {plan.kind} negatives"):
                for number in order.shards(0, order.minibatches):
                    source.make(epoch, number)
    except NegativesError as broken:
        raise ConfigError(f"negatives.kind={plan.kind}: {broken}") from broken
    return plan.store


def show_store(uri: str, picture: Path) -> None:
    """Prints what a store holds, each shard checked, and draws samples beside their negatives.

    Args:
        uri: The store.
        picture: Where to draw.

    Raises:
        ConfigError: There is no store, something in it is damaged, or its dataset is not at hand.
    """
    notes, rows = Console(highlight=False, stderr=True), list[dict[str, Any]]()
    try:
        store = Store.find(uri)
        entries = list(store.entries())
        config = parse_config(store.config, f"{uri}/manifest.json")
        dataset = load_dataset(config.data, seed=config.seed, validation_samples=config.training.validation_samples)
        if dataset.sha256("train") != store.facts.get("dataset_sha256"):
            raise ConfigError(f"{uri} was made for other training samples than {config.data.name} gives now")
        order = SampleOrder(config.seed, len(dataset.labels["train"]), config.training.batch_size)
        of = len(order.shards(0, order.minibatches))
        for epoch, group in groupby(track(entries, "checking"), lambda entry: entry.epoch):
            shards = list(group)
            for shard in shards:
                store.read(shard.epoch, shard.number)
            count, size = sum(shard.num_samples for shard in shards), sum(shard.num_bytes for shard in shards)
            rows.append({"epoch": epoch, "shards": len(shards), "of": of, "samples": count, "bytes": size})
        if not entries:
            raise ConfigError(f"{uri} holds no shard yet; fill it by `ffdist negatives make`")
        first = entries[0]
        negatives = store.read(first.epoch, first.number)
    except NegativesError as broken:
        raise ConfigError(str(broken)) from broken
    told = ", ".join(f"{key} {store.facts.get(key)}" for key in ("kind", "options", "seed"))
    notes.print(f"{uri}: {told}; every checksum is right", markup=False, soft_wrap=True)
    print_rows(rows)
    assert negatives is not None, "it was read above"
    samples = order.shard(first.epoch, first.number)[:SHOWN]
    images, labels = dataset.images["train"][samples], dataset.labels["train"][samples]
    try:
        path = plot_negatives(images, labels, negatives[:SHOWN], dataset.shape, dataset.names, picture)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--picture must be a picture's file that can be written ({picture}: {error})") from error
    notes.print(f"samples beside their negatives: {path}", markup=False, soft_wrap=True)


def fit_readout(finished: Run, *, runs: Path, uri: str | None = None) -> float:
    """Fits a readout to the layers of a finished run as they stand, until it is converged.

    Its test error is printed and returned. If the checkpoint is the one that the run's own figures belong to, it
    is also logged to the run as `test/fitted_readout_error` and kept in its summary.

    Args:
        finished: The run.
        runs: Runs folder.
        uri: Where it is tracked; found by its runs folder and MLFLOW_TRACKING_URI if there is none.

    Raises:
        ConfigError: Its data or checkpoint is not available; or, when the error is printed, that it cannot be logged.
    """
    summary, run_id = finished.summary, finished.summary["mlflow_run_id"]
    uri = uri or uri_of_finished(finished.folder, summary["mlflow_tracking_uri"], run_id, runs)
    network, dataset = finished.network, finished.dataset
    readout, samples = network.architecture.readout(), len(dataset.images["train"])
    features = readout.weight.shape[1]
    host_memory.check(host_memory.FLOAT32_BYTES * samples * features, "what a readout is fitted to")
    train, done = _activities(network, dataset.images["train"], "train"), 0
    rows = torch.empty(samples, features)  # once: it is what takes the memory here
    for part in train:
        torch.cat(part, 1, out=rows[done : done + len(part[0])])
        done += len(part[0])
    with closing(track(range(FITTINGS), "fitting the readout")) as bar:

        def advance() -> None:
            next(bar, None)

        slope = readout.fit(rows, dataset.labels["train"], iterations=FITTINGS, step=advance)
    predicted = [readout(part).argmax(1) for part in _activities(network, dataset.images["test"], "test")]
    wrong = share_wrong(torch.cat(predicted), dataset.labels["test"])
    Console(highlight=False).print(
        f"test error {wrong:.2%} by a readout fitted to the layers of {finished.folder} (slope left: {slope:.1e} "
        f"nats); {summary['test_readout_error']:.2%} by the one trained beside them",
        markup=False,
        soft_wrap=True,
    )
    if not finished.uses_own_checkpoint:
        return wrong
    measured = {"test/fitted_readout_error": wrong}
    log_to_run(uri, run_id, measured, beside="test/readout_error")
    Folder(str(finished.folder), ConfigError).put(  # now that the results table has it, too
        SUMMARY, json.dumps(summary | {"test_fitted_readout_error": wrong}, indent=2).encode()
    )
    return wrong


def _activities(network: Network, images: Tensor, split: str) -> Iterator[list[Tensor]]:
    """Yields what the readout reads of some images after the other, in float32."""
    for part in track(torch.split(images, ROWS), f"passing {split} samples through the layers"):
        yield [activity.float() for activity in network.read(network.architecture.neutral_rows(part))]
