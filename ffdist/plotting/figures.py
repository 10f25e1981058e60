"""All plots of a run, drawn at its end or later."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ffdist.config.schema import Config
from ffdist.data.datasets import Dataset
from ffdist.data.order import SampleOrder
from ffdist.errors import as_warning
from ffdist.ff.architecture import Architecture, layer_name
from ffdist.ff.encoders import ImageEncoder
from ffdist.ff.keyed import generator
from ffdist.ff.labels import one_hot
from ffdist.ff.negatives import TrainingSet, draw_wrong_labels, find_kind, make_checked
from ffdist.ff.network import Network
from ffdist.ff.objectives import signed_threshold
from ffdist.pipeline.evaluation import Evaluation
from ffdist.pipeline.timeline import Span
from ffdist.plotting import plots
from ffdist.storage.files import path_in

NUM_NEGATIVES, NUM_SAMPLES, NUM_HISTOGRAM_SAMPLES = 10, 8, 1000
"""Number of samples in the plots of negatives and of test samples, and, if no label is shown, in that of goodness."""


def draw_plots(
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
    """Draws the plots of a run. A plot that fails becomes a warning, and the others are still drawn.

    Args:
        folder: Folder of the plots.
        config: Configuration of the run.
        dataset: Dataset of the run.
        network: The trained network.
        test: Evaluation of the network on the test set.
        history: All metrics of the run.
        spans: Timeline of the actors; may be empty.
        warn: Gets the file and the cause of each failure.
        with_negatives: Whether to draw plots that need negatives. This may import a function that the configuration
            names.

    Yields:
        The path of each plot.
    """
    predictor, thresholds = "readout" if test.goodness_error is None else "goodness", _thresholds(network.architecture)
    functions: dict[str, Callable[[Path], Path]] = {}
    if f"{layer_name(0)}/loss" in history:  # layers have no loss in backpropagation
        functions["layers.png"] = lambda path: plots.plot_layers(history, thresholds, path)
    with_negatives = with_negatives and config.negatives.kind != "none"
    if "layers.png" in functions and with_negatives and isinstance(dataset.encoder, ImageEncoder):
        functions["negatives.png"] = lambda path: _plot_negatives(config, dataset, network, path)
    if "layers.png" in functions and (with_negatives or network.architecture.goodness_predicts):
        functions["goodness.png"] = lambda path: plots.plot_goodness(
            _split_by_label(test.goodness, dataset.labels["test"])
            if network.architecture.goodness_predicts
            else _training_goodness(config, dataset, network),
            thresholds,
            path,
            are_probabilities=network.architecture.scores_classes,
        )
    if network.architecture.goodness_predicts and _can_be_drawn(dataset):
        functions["samples.png"] = lambda path: _plot_samples(config, dataset, network, test, path)
    functions["errors.png"] = lambda path: plots.plot_errors(test, path)
    if {"validation/readout_error", "validation/goodness_error"} & history.keys():
        order = SampleOrder(config.seed, len(dataset.labels["train"]), config.training.batch_size)
        epoch_samples = order.num_minibatches * order.batch_size
        metric = config.training.stop.metric
        functions["errors_over_time.png"] = lambda path: plots.plot_errors_over_time(
            history, test, epoch_samples, metric, path
        )
    if (filters := plots.first_filters(network)) is not None:
        functions["fields.png"] = lambda path: plots.plot_fields(filters, path)
    functions["confusion.png"] = lambda path: plots.plot_confusion(test.confusion, predictor, dataset.names, path)
    if spans:
        functions["timeline.png"] = lambda path: plots.plot_timeline(spans, path)
    for name, function in functions.items():
        with as_warning(warn, f"{name} could not be drawn"):
            yield function(folder / name)


def draw_goodness(
    folder: Path,
    architecture: Architecture,
    evaluation: Evaluation,
    labels: Tensor,
    name: str,
) -> Path:
    """Draws the goodness of an evaluation and returns the path of the plot.

    Args:
        folder: Folder of the run; the plot is put into its subfolder `goodness`.
        architecture: Architecture of the network.
        evaluation: The evaluation, with the goodness of each label.
        labels: True labels `[N]`.
        name: Name of the plot.
    """
    path = path_in(folder, "goodness") / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    goodness, are_probabilities = _split_by_label(evaluation.goodness, labels), architecture.scores_classes
    return plots.plot_goodness(goodness, _thresholds(architecture), path, are_probabilities=are_probabilities)


def _plot_negatives(config: Config, dataset: Dataset, network: Network, path: Path) -> Path:
    indices = _draw_samples(config, dataset, NUM_NEGATIVES)
    images, labels = dataset.samples["train"][indices], dataset.labels["train"][indices]
    negatives = _make_negatives(config, dataset, network, indices)
    return plots.plot_negatives(images, labels, negatives, dataset.shape, dataset.names, path)


def _can_be_drawn(dataset: Dataset) -> bool:
    """Returns whether samples can be drawn as images."""
    return isinstance(dataset.encoder, ImageEncoder) and dataset.shape[0] in (1, 3)


def _plot_samples(config: Config, dataset: Dataset, network: Network, test: Evaluation, path: Path) -> Path:
    samples, labels = dataset.samples["test"], dataset.labels["test"]
    indices = torch.randperm(len(labels), generator=generator(config.seed, "plotted samples"))[:NUM_SAMPLES]
    return plots.plot_samples(
        samples[indices].view(-1, *dataset.shape),
        labels[indices],
        test.goodness[:, indices],
        dataset.names,
        path,
        are_probabilities=network.architecture.scores_classes,
    )


def _training_goodness(config: Config, dataset: Dataset, network: Network) -> dict[str, Tensor]:
    """Returns each layer's goodness of training samples and of negatives `[L, N]`, for inputs without a label."""
    indices = _draw_samples(config, dataset, NUM_HISTOGRAM_SAMPLES)
    inputs = {
        "training data": dataset.samples["train"][indices],
        "negatives": _make_negatives(config, dataset, network, indices),
    }
    return {name: network.goodness(network.architecture.neutral_rows(samples)) for name, samples in inputs.items()}


def _draw_samples(config: Config, dataset: Dataset, count: int) -> Tensor:
    """Draws samples from the whole training set, because it may be sorted by class."""
    samples = len(dataset.labels["train"])
    return torch.randperm(samples, generator=generator(config.seed, "plotted samples"))[:count]


def _split_by_label(goodness: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Splits goodness `[L, N, C]` into that of the true labels and of wrong labels, without labels not evaluated."""
    is_true, is_evaluated = one_hot(labels, goodness.shape[-1]).bool(), goodness[0] != -torch.inf
    return {"true label": goodness[:, is_true & is_evaluated], "wrong labels": goodness[:, ~is_true & is_evaluated]}


def _thresholds(architecture: Architecture) -> list[float | None]:
    """Returns each layer's threshold, with the sign of its goodness; None if it has none."""
    if any(rule.objective != "goodness" for rule in architecture.rules) or architecture.rule.loss == "symmetric":
        return [None for _ in architecture.layers]
    pairs = zip(architecture.thresholds, architecture.activation_forms, strict=True)
    return [signed_threshold(architecture.rule, threshold, form.size) for threshold, form in pairs]


def _make_negatives(config: Config, dataset: Dataset, network: Network, indices: Tensor) -> Tensor:
    """Returns negatives of training samples; hard labels are drawn from the predictions of the given network."""
    negatives, samples, labels = config.negatives, dataset.samples["train"], dataset.labels["train"]
    source = generator(config.seed, "picture")
    if negatives.kind == "hard_label":
        return draw_wrong_labels(network(samples[indices]), labels[indices], source, dataset.untrained)
    data = TrainingSet(samples, labels, dataset.classes, dataset.shape, config.seed)
    kind = find_kind(negatives.kind, negatives.options)
    return make_checked(kind, data, indices, source, labels_shown=config.data.label != "none")
