"""The pictures of a run: made at its end, and again whenever they are asked for."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ffdist.config import Config
from ffdist.data.datasets import Dataset
from ffdist.evaluation import Evaluation
from ffdist.failures import as_warning
from ffdist.ff.keyed import generator
from ffdist.ff.labels import one_hot
from ffdist.ff.layers import counted_threshold
from ffdist.ff.negatives import TrainingSet, draw_wrong_labels, find_kind, make_checked
from ffdist.ff.network import Architecture, Network
from ffdist.files import path_in
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
    warn: Callable[[str], None],
    *,
    with_negatives: bool = True,
) -> Iterator[Path]:
    """Draws the plots of a run, each by itself: one that fails is a warning, and the others are drawn.

    Args:
        folder: Where to draw.
        config: What was trained.
        dataset: What it was trained on.
        network: What it came to.
        test: Its evaluation on the test set.
        history: All of its metrics.
        spans: Who computed when; may be empty.
        warn: Gets the file and the cause of each failure.
        with_negatives: Whether plots that need negatives are drawn, which imports a function that the configuration
            names.

    Yields:
        The path of each plot.
    """
    by, thresholds = "readout" if test.goodness_error is None else "goodness", _thresholds(network.architecture)
    draw: dict[str, Callable[[Path], Path]] = {}
    if f"{layer_name(0)}/loss" in history:  # backpropagation has no such thing
        draw["layers.png"] = lambda path: plots.plot_layers(history, thresholds, path)
    if "layers.png" in draw and with_negatives:
        draw["negatives.png"] = lambda path: _draw_negatives(config, dataset, network, path)
    if "layers.png" in draw and (with_negatives or network.architecture.labels_shown):
        draw["goodness.png"] = lambda path: plots.plot_goodness(
            _by_label(test.goodness, dataset.labels["test"])
            if network.architecture.labels_shown
            else _of_training_data(config, dataset, network),
            thresholds,
            path,
        )
    draw["errors.png"] = lambda path: plots.plot_errors(test, path)
    draw["fields.png"] = lambda path: plots.plot_fields(network, path)
    draw["confusion.png"] = lambda path: plots.plot_confusion(test.confusion, by, dataset.names, path)
    if spans:
        draw["timeline.png"] = lambda path: plots.plot_timeline(spans, path)
    for name, plot in draw.items():
        with as_warning(warn, f"{name} could not be drawn"):
            yield plot(folder / name)


def draw_goodness(
    folder: Path,
    architecture: Architecture,
    found: Evaluation,
    labels: Tensor,
    name: str,
) -> Path:
    """Draws the goodness of an evaluation and returns the path of the plot.

    Args:
        folder: Of the run, which gets a folder `goodness`.
        architecture: Of what is trained.
        found: The evaluation, with labels tried.
        labels: The true ones `[N]`.
        name: Of the plot.
    """
    path = path_in(folder, "goodness") / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    return plots.plot_goodness(_by_label(found.goodness, labels), _thresholds(architecture), path)


def _draw_negatives(config: Config, dataset: Dataset, network: Network, path: Path) -> Path:
    samples = _some_samples(config, dataset, SHOWN)
    images, labels = dataset.images["train"][samples], dataset.labels["train"][samples]
    negatives = _some_negatives(config, dataset, network, samples)
    return plots.plot_negatives(images, labels, negatives, dataset.shape, dataset.names, path)


def _of_training_data(config: Config, dataset: Dataset, network: Network) -> dict[str, Tensor]:
    """Returns each layer's goodness for some training samples and for negatives `[L, N]`, where no label is shown."""
    samples = _some_samples(config, dataset, COUNTED)
    shown = {
        "training data": dataset.images["train"][samples],
        "negatives": _some_negatives(config, dataset, network, samples),
    }
    return {what: network.goodness(network.architecture.neutral_rows(images)) for what, images in shown.items()}


def _some_samples(config: Config, dataset: Dataset, count: int) -> Tensor:
    """Draws samples from the whole training set, which may be sorted by class."""
    samples = len(dataset.labels["train"])
    return torch.randperm(samples, generator=generator(config.seed, "plotted samples"))[:count]


def _by_label(goodness: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Parts the goodness of every label that was tried, of `[L, N, C]`, into that of the true labels and the others."""
    is_true, tried = one_hot(labels, goodness.shape[-1]).bool(), goodness[0] != -torch.inf
    return {"true label": goodness[:, is_true & tried], "wrong labels": goodness[:, ~is_true & tried]}


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
        return draw_wrong_labels(network(images[samples]), labels[samples], draw, dataset.untrained)
    data = TrainingSet(images, labels, dataset.classes, dataset.shape, config.seed)
    kind = find_kind(negatives.kind, negatives.options)
    return make_checked(kind, data, samples, draw, labels_shown=config.data.label != "none")
