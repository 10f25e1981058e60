"""Preparation of a run: loads and checks everything that its configuration names, before anything starts."""

from math import prod
from typing import Any, NamedTuple

import torch

from ffdist import host_memory
from ffdist.config.architecture import build_architecture
from ffdist.config.schema import Config
from ffdist.data.datasets import Dataset, load_dataset
from ffdist.data.negatives_store import Store
from ffdist.data.order import SampleOrder
from ffdist.errors import ConfigError
from ffdist.ff import kernels
from ffdist.ff.architecture import Architecture
from ffdist.ff.keyed import generator
from ffdist.ff.negatives import NegativesError, TrainingSet, find_kind, make_checked, source_sha256
from ffdist.ff.specs import Conv, Dense, Local
from ffdist.pipeline import memory
from ffdist.pipeline.source import NegativePlan


class Prepared(NamedTuple):
    """Inputs of a run: everything that its configuration names, loaded and checked."""

    dataset: Dataset
    order: SampleOrder
    architecture: Architecture
    negatives: NegativePlan


def prepare(config: Config, data: Any = None) -> Prepared:
    """Loads and checks the inputs of a run.

    Args:
        config: The configuration, which the user trusts: a function that it names is imported.
        data: Samples that are given in Python, as `train` takes them.

    Raises:
        ConfigError: A setting or an input is invalid.
    """
    validation_samples, stop = config.training.validation_samples, config.training.stop
    dataset = load_dataset(
        config.data, seed=config.seed, validation_samples=validation_samples, data=data, may_import=True
    )
    if stop.is_active and not len(dataset.labels["validation"]):
        raise ConfigError(
            f"training.stop needs a validation, but no samples are held out (training.validation_samples: "
            f"{validation_samples}, training samples: {len(dataset.labels['train']):,}); set validation_samples"
        )
    if config.chooses_layers and not len(dataset.labels["validation"]):
        raise ConfigError(
            f"model.predict_from=auto chooses layers on validation samples, but none are held out "
            f"(training.validation_samples: {validation_samples}, training samples: "
            f"{len(dataset.labels['train']):,}); set validation_samples, or predict_from to a layer"
        )
    order = SampleOrder(config.seed, len(dataset.labels["train"]), config.training.batch_size)
    if not order.num_minibatches:
        raise ConfigError(
            f"training.batch_size must be at most the number of training samples "
            f"(batch_size: {order.batch_size}, training samples: {order.num_samples})"
        )
    architecture = build_architecture(config, dataset.encoder, dataset.untrained, may_import=True)
    has_kernels = config.pipeline.device != "cuda" and any(
        isinstance(layer, Dense | Local | Conv) for layer in architecture.layers
    )
    if config.pipeline.executor == "fused" and has_kernels and not kernels.are_compiled():
        raise ConfigError(
            "pipeline.executor=fused needs kernels that are compiled when ffdist is installed; install a C compiler "
            "and then ffdist, or set executor to eager"
        )
    for number, (layer, form) in enumerate(zip(architecture.layers, architecture.activation_forms, strict=True), 1):
        if isinstance(layer, Conv) and layer.norm == "batch" and order.batch_size * prod(form.shape[1:]) == 1:
            raise ConfigError(
                f"layer {number} has a batch norm, which needs at least two values of a channel in a minibatch "
                f"(training.batch_size: 1, map: 1 x 1); raise batch_size, or set norm to group or none"
            )
    host_memory.check(
        memory.driver_bytes(architecture), "the copy of the network in the driver, for resuming and for results,"
    )
    return Prepared(dataset, order, architecture, plan_negatives(config, dataset, order))


def plan_negatives(config: Config, dataset: Dataset, order: SampleOrder) -> NegativePlan:
    """Returns how a run gets its negatives, after making and checking some of them, and checking the store.

    Raises:
        ConfigError: The kind does not exist, its negatives are invalid, the store contains other negatives, or a chunk
            is longer than the delay of hard labels.
    """
    negatives, labels = config.negatives, dataset.labels["train"]
    if negatives.kind == "none":
        return NegativePlan.none()
    data = TrainingSet(dataset.samples["train"], labels, dataset.classes, dataset.shape, config.seed)
    indices, source = order.shard(0, 0)[: order.batch_size], generator(config.seed, "trial")
    try:
        kind = find_kind(negatives.kind, negatives.options)
        trial = make_checked(kind, data, indices, source, labels_shown=config.data.label != "none")
    except NegativesError as error:
        raise ConfigError(f"negatives.kind={negatives.kind}: {error}") from error
    chunk_size, delay = config.pipeline.chunk_size, negatives.prediction_delay
    chunk = 1 if chunk_size == "auto" else min(chunk_size, order.num_minibatches)
    if negatives.kind == "hard_label" and chunk > delay:
        raise ConfigError(
            f"negatives.kind=hard_label needs chunks no longer than the delay of its labels "
            f"(pipeline.chunk_size: {chunk}, negatives.prediction_delay: {delay})"
        )
    store = None
    if negatives.store is not None:
        facts = {
            "kind": negatives.kind,
            "source_sha256": source_sha256(kind),
            "options": {key: repr(value) for key, value in sorted(kind.keywords.items())},
            "seed": config.seed,
            "dataset_sha256": dataset.sha256("train"),
            **({"untrained": list(dataset.untrained)} if dataset.untrained else {}),  # affects the labels drawn
        }
        public_config = config.model_dump(mode="json", exclude={"tracking": True, "negatives": {"store"}})
        store = Store(negatives.store, facts, public_config)
        try:
            numbers = order.shards(0, order.num_minibatches)
            store.check((epoch, number) for epoch in range(config.num_epochs) for number in numbers)
        except NegativesError as error:
            raise ConfigError(str(error)) from error
    return NegativePlan(
        kind=negatives.kind,
        options=negatives.options,
        per_sample=trial.shape[1] if trial.dtype == torch.int64 and trial.dim() == 2 else 1,
        sample_bytes=trial[0].nbytes,
        num_actors=negatives.actors,
        prefetch_chunks=negatives.prefetch_chunks,
        prediction_delay=delay if negatives.kind == "hard_label" else None,
        store=store,
    )
