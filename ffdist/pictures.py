"""The pictures of a run: made at its end, and again whenever they are asked for."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ffdist.config import Config
from ffdist.data.datasets import Dataset
from ffdist.evaluation import Evaluation
from ffdist.ff.keyed import generator
from ffdist.ff.labels import one_hot
from ffdist.ff.layers import counted_threshold
from ffdist.ff.negatives import TrainingSet, draw_wrong_labels, find_kind, make_checked
from ffdist.ff.network import Architecture, Network
from ffdist.pipeline.stage import layer_name
from ffdist.tracking import plots
from ffdist.tracking.timeline import Span

SHOWN, COUNTED = 10, 1000
"""Samples that are drawn, and, where no label is shown, those whose goodness is."""


def draw_pictures(
    folder: Path,
    config: Config,
    dataset: Dataset,
    network: Network,
    test: Evaluation,
    history: plots.History,
    spans: Sequence[Span],
) -> Iterator[Path]:
    """Draws a run.

    Args:
        folder: Where to draw.
        config: What was trained.
        dataset: What it was trained on.
        network: What it came to.
        test: Its evaluation on the test set.
        history: All of its metrics.
        spans: Who computed when; may be empty.

    Yields:
        The path of each picture.
    """
    by, thresholds = "readout" if test.goodness_error is None else "goodness", _thresholds(network.architecture)
    if f"{layer_name(0)}/loss" in history:  # backpropagation has no such thing
        yield plots.plot_layers(history, thresholds, folder / "layers.png")
        samples = torch.arange(min(SHOWN, len(dataset.labels["train"])))
        images, labels = dataset.images["train"][samples], dataset.labels["train"][samples]
        negatives = _some_negatives(config, dataset, network, samples)
        yield plots.plot_negatives(images, labels, negatives, dataset.shape, dataset.names, folder / "negatives.png")
        if network.architecture.labels_shown:
            goodness = _by_label(test.goodness, dataset.labels["test"])
        else:
            samples = torch.arange(min(COUNTED, len(dataset.labels["train"])))
            negatives = _some_negatives(config, dataset, network, samples)
            shown = {"training data": dataset.images["train"][samples], "negatives": negatives}
            rows = network.architecture.neutral_rows
            goodness = {what: network.goodness(rows(images)) for what, images in shown.items()}
        yield plots.plot_goodness(goodness, thresholds, folder / "goodness.png")
    yield plots.plot_errors(test, folder / "errors.png")
    yield plots.plot_fields(network, folder / "fields.png")
    yield plots.plot_confusion(test.confusion, by, dataset.names, folder / "confusion.png")
    if spans:
        yield plots.plot_timeline(spans, folder / "timeline.png")


def log_goodness(
    client: Any,
    run_id: str,
    architecture: Architecture,
    found: Evaluation,
    labels: Tensor,
    name: str,
) -> None:
    """Keeps the picture of an evaluation's goodness with a run of MLflow, in the folder `goodness`.

    Args:
        client: MLflow's.
        run_id: The run's.
        architecture: Of what is trained.
        found: The evaluation, with labels tried.
        labels: The true ones `[N]`.
        name: Of the picture.
    """
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.png"
        plots.plot_goodness(_by_label(found.goodness, labels), _thresholds(architecture), path)
        client.log_artifact(run_id, str(path), "goodness")


def _by_label(goodness: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Parts the goodness of every label tried `[L, N, C]` into that of the true labels `[N]` and of the others."""
    is_true = one_hot(labels, goodness.shape[-1]).bool()
    return {"true label": goodness[:, is_true], "wrong labels": goodness[:, ~is_true]}


def _thresholds(architecture: Architecture) -> list[float | None]:
    """Returns each layer's threshold as its goodness is counted; None where the loss has none."""
    if architecture.rule.loss == "symmetric":
        return [None for _ in architecture.layers]
    given = zip(architecture.thresholds, architecture.widths[1:], strict=True)
    return [counted_threshold(architecture.rule, threshold, units) for threshold, units in given]


def _some_negatives(config: Config, dataset: Dataset, network: Network, samples: Tensor) -> Tensor:
    """Returns negatives of some training samples; hard labels are those that the network, as it is, would give."""
    negatives, images, labels = config.negatives, dataset.images["train"], dataset.labels["train"]
    draw = generator(config.seed, "picture")
    if negatives.kind == "hard_label":
        return draw_wrong_labels(network(images[samples]), labels[samples], draw)
    data = TrainingSet(images, labels, dataset.classes, dataset.shape, config.seed)
    kind = find_kind(negatives.kind, negatives.options)
    return make_checked(kind, data, samples, draw, labels_shown=config.data.label != "none")
