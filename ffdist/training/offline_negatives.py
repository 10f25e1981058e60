"""Filling, checking and plotting a store of negatives, outside of a run."""

from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console

from ffdist.config.loading import parse_config
from ffdist.config.schema import Config
from ffdist.console import print_rows, track
from ffdist.data.datasets import Dataset, load_dataset
from ffdist.data.negatives_store import Store
from ffdist.data.order import SampleOrder
from ffdist.errors import ConfigError
from ffdist.ff.encoders import ImageEncoder
from ffdist.ff.negatives import NegativesError
from ffdist.pipeline.runner import torch_threads
from ffdist.pipeline.source import NegativeSource
from ffdist.plotting.plots import plot_negatives
from ffdist.training.prepare import prepare

NUM_SAMPLES = 10
"""Number of samples in the plot."""


def fill_store(config: Config) -> Store:
    """Makes the negatives of all epochs of a run, and writes those that are missing to `negatives.store`.

    Raises:
        ConfigError: No store is set, or it cannot be used.
    """
    if config.negatives.store is None:
        raise ConfigError("negatives.store must be set; give negatives.store=FOLDER")
    dataset, order, architecture, plan = prepare(config)  # without negatives, there is no store
    assert plan.store, "checked above"
    source = NegativeSource(plan, dataset.samples, dataset.labels["train"], architecture, order)
    try:
        with torch_threads(config.pipeline.threads_per_stage):
            for epoch in track(range(config.num_epochs), f"making {plan.kind} negatives"):
                for number in order.shards(0, order.num_minibatches):
                    source.make(epoch, number)
    except NegativesError as error:
        raise ConfigError(f"negatives.kind={plan.kind}: {error}") from error
    return plan.store


def show_store(uri: str, plot: Path | None) -> None:
    """Checks and lists the shards of a store, and draws samples with their negatives.

    Args:
        uri: Folder or URI of the store.
        plot: Image file to write, if any.

    Raises:
        ConfigError: There is no store, it is damaged, or its dataset is not available.
    """
    notes, rows = Console(highlight=False, stderr=True), list[dict[str, Any]]()
    try:
        store = Store.find(uri)
        entries = list(store.entries())
        config = parse_config(store.config, f"{uri}/manifest.json")
        dataset, num_shards = _training_set(config, uri, store, notes), None
        if dataset:
            order = SampleOrder(config.seed, len(dataset.labels["train"]), config.training.batch_size)
            num_shards = len(order.shards(0, order.num_minibatches))
        for epoch, group in groupby(track(entries, "checking"), lambda entry: entry.epoch):
            shards = list(group)
            for shard in shards:
                store.read(shard.epoch, shard.number)
            count, size = sum(shard.num_samples for shard in shards), sum(shard.num_bytes for shard in shards)
            rows.append({"epoch": epoch, "shards": len(shards), "of": num_shards, "samples": count, "bytes": size})
        if not entries:
            raise ConfigError(f"{uri} contains no shard; fill it with `ffdist negatives make`")
        first = entries[0]
        negatives = store.read(first.epoch, first.number)
    except NegativesError as error:
        raise ConfigError(str(error)) from error
    description = ", ".join(f"{key} {store.facts.get(key)}" for key in ("kind", "options", "seed"))
    notes.print(f"{uri}: {description}; all checksums match", markup=False, soft_wrap=True)
    print_rows(rows)
    assert negatives is not None, "the store has entries"
    if not plot:
        return
    if not dataset or not isinstance(dataset.encoder, ImageEncoder):
        samples = dataset.encoder.describe() if dataset else config.data.name
        notes.print(f"no plot, because only images of datasets in files are drawn (samples: {samples})", markup=False)
        return
    indices = order.shard(first.epoch, first.number)[:NUM_SAMPLES]
    images, labels = dataset.samples["train"][indices], dataset.labels["train"][indices]
    try:
        path = plot_negatives(images, labels, negatives[:NUM_SAMPLES], dataset.shape, dataset.names, plot)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--picture must be an image file that can be written ({plot}: {error})") from error
    notes.print(f"samples with their negatives: {path}", markup=False, soft_wrap=True)


def _training_set(config: Config, uri: str, store: Store, notes: Console) -> Dataset | None:
    """Returns the dataset of a store, checked; None if only a training run can get it."""
    if not config.data.is_loadable:
        notes.print(f"the training samples are not compared (data.name: {config.data.name})", markup=False)
        return None
    dataset = load_dataset(config.data, seed=config.seed, validation_samples=config.training.validation_samples)
    if dataset.sha256("train") != store.facts.get("dataset_sha256"):
        raise ConfigError(f"{uri} was made for other training samples than those of {config.data.name} now")
    return dataset
