"""From a configuration to what a run is made of, all of it checked before anything starts."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ffdist import host_memory
from ffdist.config import Config, ConfigError
from ffdist.data.datasets import Dataset, load_dataset
from ffdist.data.order import SampleOrder
from ffdist.data.store import Store
from ffdist.ff.keyed import generator
from ffdist.ff.layers import Rule
from ffdist.ff.local import Fields
from ffdist.ff.negatives import NegativesError, TrainingSet, find_kind, make_checked, source_sha256
from ffdist.ff.network import Architecture
from ffdist.ff.update import Update
from ffdist.pipeline.source import NegativePlan


class Prepared(NamedTuple):
    """What a configuration asks for, read and checked."""

    dataset: Dataset
    order: SampleOrder
    architecture: Architecture
    negatives: NegativePlan


def prepare(config: Config) -> Prepared:
    """Reads and checks what a configuration asks for.

    Raises:
        ConfigError: Something of it cannot be.
    """
    dataset = load_dataset(config.data, seed=config.seed, validation_samples=config.training.validation_samples)
    order = SampleOrder(config.seed, len(dataset.labels["train"]), config.training.batch_size)
    if not order.minibatches:
        raise ConfigError(
            f"training.batch_size must be at most the number of training samples "
            f"(batch_size: {order.batch_size}, training samples: {order.samples})"
        )
    architecture = build_architecture(config, dataset.shape, dataset.classes, dataset.untrained)
    host_memory.check(
        host_memory.driver_bytes(architecture), "a network, as the driver holds it to resume a run and at its end,"
    )
    return Prepared(dataset, order, architecture, plan_negatives(config, dataset, order))


def build_architecture(
    config: Config, shape: tuple[int, int, int], classes: int, untrained: Sequence[int] = ()
) -> Architecture:
    """Returns the network that a configuration describes, for images of a shape and a number of classes.

    Args:
        config: The configuration.
        shape: Channels, height and width.
        classes: Number of classes.
        untrained: Those without training samples.

    Raises:
        ConfigError: The layers do not fit together, or the label cannot be shown to them.
    """
    model, training = config.model, config.training
    try:
        return Architecture(
            shape=shape,
            classes=classes,
            layers=tuple(
                layer if isinstance(layer, int) else Fields(layer.grid, layer.stride, layer.field, layer.units)
                for layer in model.layers
            ),
            label=config.data.label,
            label_scale=config.data.label_scale,
            center=shape[0] > 1 if config.data.center == "auto" else config.data.center,
            predict_from=config.predict_from,
            seed=config.seed,
            rule=Rule(
                goodness=model.goodness,
                normalization=model.normalization,
                loss=training.loss,
                alpha=training.alpha,
                alternating=training.updates == "alternating",
                repeats=training.repeats,
                peer_strength=training.peer_normalization,
                update=Update(training.learning_rate, training.weight_decay, training.smoothing, training.optimizer),
            ),
            thresholds=config.thresholds,
            readout_update=Update(training.readout_learning_rate, training.readout_weight_decay, training.smoothing),
            precision="float32" if training.precision == "auto" else training.precision,  # until it is resolved
            untrained=tuple(untrained),
        )
    except ValueError as error:
        raise ConfigError(f"model.layers and data.label must fit together: {error}") from error


def plan_negatives(config: Config, dataset: Dataset, order: SampleOrder) -> NegativePlan:
    """Returns how a run gets its negatives, once a few of them have been made and found good, and the store checked.

    Raises:
        ConfigError: There is no such kind, what it makes is of no use, the store is for others, or a chunk is longer
            than the delay of hard labels.
    """
    negatives, labels = config.negatives, dataset.labels["train"]
    data = TrainingSet(dataset.images["train"], labels, dataset.classes, dataset.shape, config.seed)
    some, draw = order.shard(0, 0)[: order.batch_size], generator(config.seed, "trial")
    try:
        kind = find_kind(negatives.kind, negatives.options)
        made = make_checked(kind, data, some, draw, labels_shown=config.data.label != "none")
    except NegativesError as error:
        raise ConfigError(f"negatives.kind={negatives.kind}: {error}") from error
    asked, delay = config.pipeline.chunk_size, negatives.prediction_delay
    chunk = 1 if asked == "auto" else min(asked, order.minibatches)
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
            **({"untrained": list(dataset.untrained)} if dataset.untrained else {}),  # changes labels that are drawn
        }
        told = config.model_dump(mode="json", exclude={"tracking": True, "negatives": {"store"}})
        store = Store(negatives.store, facts, told)
        try:
            numbers = order.shards(0, order.minibatches)
            store.check((epoch, number) for epoch in range(config.passes) for number in numbers)
        except NegativesError as error:
            raise ConfigError(str(error)) from error
    return NegativePlan(
        kind=negatives.kind,
        options=negatives.options,
        per_sample=made.shape[1] if made.dtype == torch.int64 and made.dim() == 2 else 1,
        sample_bytes=made[0].nbytes,
        num_parts=negatives.actors,
        ahead=negatives.ahead,
        prediction_delay=delay if negatives.kind == "hard_label" else None,
        store=store,
    )
