"""Plots of runs, drawn with matplotlib; all are readable in grayscale."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps, rc_context, rcdefaults, rcParams
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter
from torch import Tensor

from ffdist.ff.layers import Layer
from ffdist.ff.network import Network
from ffdist.pipeline.evaluation import Evaluation
from ffdist.pipeline.timeline import Span
from ffdist.storage.files import file_in

History = dict[str, list[tuple[int, float]]]
"""Points of each metric, as samples seen and value."""
STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "font.size": 9,
    "savefig.dpi": 110,
}
_STYLE_LOCK = Lock()
MAX_UNITS, NUM_BINS = 64, 60
"""Units in the plot of receptive fields, and bins of a histogram."""
MAX_CHUNKS, FIRST_CHUNK = 14, 4
"""Chunks in the plot of the timeline, and the first of them; earlier ones fill the pipeline."""
MAX_NAME_LENGTH, MAX_LABEL_TICKS = 20, 10
GOODNESS_LINES: dict[str, Any] = {"positive": "-", "negative": "--"}
"""Line styles of the goodness of positive and negative samples."""
ERROR_TICKS = (0, 1, 2, 5, 10, 20, 50, 100)
SPAN_COLORS = {"compute": ("#2a6f97", "#89c2d9"), "wait": ("#eeeeee",), "wait for negatives": ("#333333",)}
"""Colors of the timeline's spans, by activity; successive chunks take turns."""


@contextmanager
def _style(*, grid: bool = True) -> Iterator[None]:
    """Sets matplotlib's style for a `with` block; locked, because all threads share it."""
    with _STYLE_LOCK, rc_context():
        rcdefaults()  # ignores a matplotlibrc in the working directory
        rcParams.update({**STYLE, "axes.grid": grid})
        yield


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(file_in(path.parent, path.name), format=path.suffix[1:] or None)
    return path


def _shade(index: int, count: int) -> tuple[float, ...]:
    """Returns the color of a layer; higher layers are lighter."""
    return colormaps["viridis"](0.85 * index / max(1, count - 1))


def _name(label: int, names: Sequence[str], max_length: int) -> str:
    """Returns the name of a class, or its number if it has no name or matplotlib's font lacks one of its characters."""
    name = names[label][:max_length] if names else ""
    glyphs = get_font(findfont(FontProperties())).get_charmap()
    return name if name.isprintable() and name and all(ord(letter) in glyphs for letter in name) else str(label)


def _bins(values: Tensor) -> np.ndarray[Any, Any]:
    """Returns the edges of a histogram's bins in float64; they are distinct even if all values are equal."""
    low, high = (values.min().item(), values.max().item()) if len(values) else (0.0, 1.0)
    margin = max(0.0, 1e-6 * max(abs(low), abs(high), 1e-6) - (high - low))
    return np.linspace(low - margin, high + margin, NUM_BINS + 1)


@_style()
def plot_layers(history: History, thresholds: Sequence[float | None], path: Path) -> Path:
    """Draws the loss of every layer and of the readout over the samples seen, and goodness or class errors of layers.

    Args:
        history: All metrics of a run.
        thresholds: Threshold of each layer; None if the loss has none.
        path: File to write; it is returned.
    """
    layers = sorted(
        {name.split("/")[0] for name in history if name.startswith("layer_")}, key=lambda name: int(name[6:])
    )
    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    has_classes = f"{layers[0]}/class_error" in history
    styles = (
        {"class_error": "-"} if has_classes else {f"goodness_{name}": each for name, each in GOODNESS_LINES.items()}
    )
    for index, layer in enumerate(layers):
        color = _shade(index, len(layers))
        marker = "o" if len(history[f"{layer}/loss"]) == 1 else None  # a line needs two points
        losses = zip(*history[f"{layer}/loss"], strict=True)
        panels[0].plot(*losses, color=color, marker=marker, label=layer.replace("_", " "))
        for name, style in styles.items():
            if points := history.get(f"{layer}/{name}"):  # other objectives have neither
                panels[1].plot(*zip(*points, strict=True), color=color, linestyle=style, marker=marker)
    if points := history.get("readout/loss"):
        panels[0].plot(*zip(*points, strict=True), color="#888888", linestyle="-.", label="readout")
    for panel in panels:
        panel.xaxis.set_major_formatter(EngFormatter())
    panels[0].set(xlabel="samples seen", ylabel="loss, nats", yscale="log", title="loss")
    levels = {threshold for threshold in thresholds if threshold is not None}
    for level in levels:
        panels[1].axhline(level, color="black", linestyle=":")
    if has_classes:
        panels[1].set_yscale("symlog", linthresh=1e-3)  # shows 0 as well
        panels[1].set(xlabel="samples seen", ylabel="error", title="class error on training samples")
    else:
        panels[1].set(xlabel="samples seen", ylabel="goodness", title="goodness")
        lines = GOODNESS_LINES | ({"threshold": ":"} if levels else {})
        handles = [Line2D([], [], color="black", linestyle=style, label=name) for name, style in lines.items()]
        panels[1].legend(handles=handles)
    figure.legend(loc="outside lower center", ncols=8)
    return _save(figure, path)


@_style()
def plot_goodness(
    goodness: dict[str, Tensor], thresholds: Sequence[float | None], path: Path, *, are_probabilities: bool = False
) -> Path:
    """Draws histograms of the goodness of positive and negative data in each layer, and returns the path.

    In a layer that learns, they are on different sides of its threshold.

    Args:
        goodness: Goodness of positive, then of negative data `[L, N]`, by name; N may differ.
        thresholds: Threshold of each layer; None if the loss has none.
        path: File to write.
        are_probabilities: Whether they are logarithms of class probabilities; those of true labels are close to 0.
    """
    figure = Figure(figsize=(min(16, 3.2 * len(thresholds) + 1), 3.2), layout="constrained")
    panels = figure.subplots(1, len(thresholds), squeeze=False)[0]
    styles = {"color": "#2a6f97", "alpha": 0.85}, {"color": "black", "histtype": "step", "linewidth": 1.2}
    layers = zip(panels, zip(*goodness.values(), strict=True), thresholds, strict=True)
    for number, (panel, layer, threshold) in enumerate(layers, 1):
        finite = [values[values.isfinite()].double() for values in layer]
        bins = _bins(torch.cat(finite))
        for name, values, style in zip(goodness, finite, styles, strict=True):
            panel.hist(values.numpy(), bins, density=bool(len(values)), label=name, **style)
        if threshold is not None:
            panel.axvline(threshold, color="black", linestyle=":", label="threshold")
        if are_probabilities:
            panel.set(xlabel="log probability", yscale="log", title=f"layer {number}")
        else:
            panel.set(xlabel="goodness", yticks=[], title=f"layer {number}")
    panels[0].set_ylabel("density")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return _save(figure, path)


def _scaled(scores: Tensor) -> Tensor:
    """Returns the scores of each layer `[L, C]`, from 0 for the lowest to 1 for the highest."""
    is_finite = scores.isfinite()
    low = scores.masked_fill(~is_finite, torch.inf).amin(1, keepdim=True)
    high = scores.masked_fill(~is_finite, -torch.inf).amax(1, keepdim=True)
    return (scores - low) / (high - low).clamp(min=1e-12)


@_style(grid=False)
def plot_samples(
    images: Tensor, labels: Tensor, scores: Tensor, names: Sequence[str], path: Path, *, are_probabilities: bool = False
) -> Path:
    """Draws images above the scores of each layer for every label, and returns the path.

    Args:
        images: uint8 `[n, C, Y, X]`, with one or three channels.
        labels: True labels `[n]`.
        scores: Goodness or class scores of each layer for every label `[L, n, C]`.
        names: Names of the classes; may be empty.
        path: File to write.
        are_probabilities: Whether scores are logarithms of class probabilities. Otherwise, each layer's goodness is
            scaled from 0 to 1.
    """
    num_layers, count, classes = scores.shape
    figure = Figure(figsize=(1.5 * count + 1, 1.6 + 0.2 * num_layers), layout="constrained")
    panels = figure.subplots(2, count, squeeze=False, height_ratios=(1.1, max(0.4, 0.2 * num_layers)))
    for column, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        shades = scores[:, column].exp() if are_probabilities else _scaled(scores[:, column])
        above, below = panels[:, column]
        above.imshow(image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=255)
        above.set(xticks=[], yticks=[])
        above.set_title(_name(label, names, MAX_NAME_LENGTH // 2), parse_math=False)
        mappable = below.imshow(shades.numpy(), cmap="gray_r", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        below.plot([label], [-0.75], marker="v", color="#2a6f97", clip_on=False)
        below.set(yticks=[], xlabel="label", xticks=range(classes) if classes <= MAX_LABEL_TICKS else [0, classes - 1])
        below.tick_params(labelsize=6)
    panels[1, 0].set(yticks=range(num_layers), yticklabels=range(1, num_layers + 1), ylabel="layer")
    text = "class probability" if are_probabilities else "goodness (scaled)"
    figure.colorbar(mappable, ax=panels, label=text, shrink=0.8)
    return _save(figure, path)


@_style()
def plot_errors(evaluation: Evaluation, path: Path) -> Path:
    """Draws the test error by goodness of each layer and of all predicting layers, and by readout; returns the path."""
    layers = evaluation.layer_errors or []
    bars = {f"layer {number} alone": error for number, error in enumerate(layers, 1)}
    if evaluation.goodness_error is not None:
        bars["goodness"] = evaluation.goodness_error
    if evaluation.readout_error is not None:
        bars["readout"] = evaluation.readout_error
    figure = Figure(figsize=(6, 0.45 * len(bars) + 1.2), layout="constrained")
    panel = figure.subplots()
    colors = [_shade(index, len(layers)) for index in range(len(layers))] + ["#555555"] * (len(bars) - len(layers))
    container = panel.barh(list(bars), [100 * error for error in bars.values()], color=colors)
    panel.bar_label(container, [f" {error:.2%}" for error in bars.values()])
    panel.margins(x=0.15)
    panel.invert_yaxis()
    parts = ["goodness of each layer", "of all predicting layers"] if layers else []
    panel.set(xlabel="test error, %", title=", ".join(parts + ["readout"] * ("readout" in bars)))
    return _save(figure, path)


@_style()
def plot_errors_over_time(history: History, test: Evaluation, epoch_samples: int, metric: str, path: Path) -> Path:
    """Draws the validation errors over the epochs, the best checkpoint and the test errors, and returns the path.

    Args:
        history: All metrics of a run with a validation.
        test: Evaluation on the test set.
        epoch_samples: Number of samples in an epoch.
        metric: Error that chooses the best checkpoint, as in `training.stop.metric`.
        path: File to write.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    panel = figure.subplots()
    shown = {"goodness_error": "-", "readout_error": "--"} | ({} if metric == "error" else {metric: "-."})
    curves = {name: history[f"validation/{name}"] for name in shown if f"validation/{name}" in history}
    for index, (name, points) in enumerate(curves.items()):
        color, label = _shade(index, 3), name.removesuffix("_error").replace("_", " ")
        epochs, errors = zip(*((samples / epoch_samples, 100 * error) for samples, error in points), strict=True)
        panel.plot(epochs, errors, shown[name], color=color, marker=".", label=f"validation, {label}")
        error = getattr(test, name)
        if error is not None:
            panel.axhline(100 * error, color=color, linestyle=":", label=f"test, {label}: {error:.2%}")
    chief = curves[next(iter(curves)) if metric == "error" else metric]
    samples, best = min(chief, key=lambda point: point[1])  # the first one, as for checkpoints
    label = f"best checkpoint: {best:.2%}"
    panel.plot(samples / epoch_samples, 100 * best, "ko", markersize=10, fillstyle="none", label=label)
    panel.set_yscale("symlog", linthresh=1, linscale=0.3)  # shows small errors as well, and 0
    panel.set_yticks(ERROR_TICKS, map(str, ERROR_TICKS))
    panel.set(xlabel="epochs", ylabel="error, %", title="validation errors; dotted: test errors", ylim=(0, 100))
    figure.legend(loc="outside lower center", ncols=3)
    return _save(figure, path)


def first_filters(network: Network) -> Tensor | None:
    """Returns the weights of the first layer as images `[units, channels, height, width]`; None if they are none."""
    layer, form = network.layers[0], network.architecture.encoder.form
    assert isinstance(layer, Layer)
    filters = network.architecture.layers[0].filters(layer, form)
    return filters if filters is not None and filters.shape[1] in (1, 3) else None


@_style(grid=False)
def plot_fields(filters: Tensor, path: Path) -> Path:
    """Draws the receptive fields of first-layer units, largest weight norm first, and returns the path.

    Mid-gray is zero. Each unit has its own scale, which clips its largest weights.

    Args:
        filters: Weights of each unit `[units, channels, height, width]`, as `first_filters` returns them.
        path: File to write.
    """
    pixels = filters.permute(0, 2, 3, 1)
    units = pixels.flatten(1).norm(dim=1).argsort(descending=True)[:MAX_UNITS]
    # numpy's quantile, because torch's takes at most 16 million values
    scale = torch.from_numpy(np.quantile(pixels[units].abs().flatten(1).numpy(), 0.98, axis=1)).clamp(min=1e-12)
    brightness = (pixels[units] / scale.view(-1, 1, 1, 1) / 2 + 0.5).clamp(0, 1)
    tiles = torch.nn.functional.pad(brightness, (0, 0, 1, 1, 1, 1), value=1.0)
    columns = min(16, len(tiles))
    blank = tiles.new_ones((-len(tiles) % columns, *tiles.shape[1:]))
    rows = [torch.cat(list(row), 1) for row in torch.split(torch.cat((tiles, blank)), columns)]
    mosaic = torch.cat(rows)
    figure = Figure(figsize=(9, 9 * len(mosaic) / mosaic.shape[1] + 0.5), layout="constrained")
    panel = figure.subplots()
    panel.imshow(mosaic.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
    panel.set(xticks=[], yticks=[], title=f"weights of {len(units)} units of layer 1; mid-gray is zero")
    return _save(figure, path)


@_style(grid=False)
def plot_confusion(confusion: Tensor, predictor: str, names: Sequence[str], path: Path) -> Path:
    """Draws a confusion matrix, and returns the path.

    Args:
        confusion: Counts `[C, C]`: a row per true label, a column per predicted label.
        predictor: `goodness` or `readout`.
        names: Names of the classes; may be empty.
        path: File to write.
    """
    classes = len(confusion)
    figure = Figure(figsize=(6, 5.5), layout="constrained")
    panel = figure.subplots()
    share = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    image = panel.imshow(share.numpy(), cmap="Blues", norm=PowerNorm(0.3, 0, 1))  # makes rare errors visible
    figure.colorbar(image, ticks=[0.001, 0.01, 0.1, 0.5, 1], label="fraction of the true label", shrink=0.8)
    if classes <= 30:
        ticks = [_name(label, names, MAX_NAME_LENGTH) for label in range(classes)]
        panel.set_xticks(range(classes), ticks, rotation=90 if names else 0, parse_math=False)
        panel.set_yticks(range(classes), ticks, parse_math=False)
        for row, column in confusion.nonzero().tolist():
            color = "white" if share[row, column] > 0.1 else "black"
            count = str(int(confusion[row, column]))
            panel.text(column, row, count, ha="center", va="center", color=color, fontsize=8)
    panel.set(xlabel=f"predicted by {predictor}", ylabel="true label", title="test samples")
    return _save(figure, path)


@_style(grid=False)
def plot_negatives(
    images: Tensor,
    labels: Tensor,
    negatives: Tensor,
    shape: tuple[int, ...],
    names: Sequence[str],
    path: Path,
) -> Path:
    """Draws samples above their negatives, and returns the path.

    Args:
        images: uint8 `[n, D]`.
        labels: True labels `[n]`.
        negatives: Labels `[n]` or `[n, M]`, or images `[n, D]`, as a kind of negatives returns them.
        shape: Channels, height and width of an image.
        names: Names of the classes; may be empty.
        path: File to write.
    """
    figure = Figure(figsize=(1.1 * len(images) + 1, 3), layout="constrained")
    panels = figure.subplots(2, len(images), squeeze=False)
    negative_images = negatives if negatives.dtype == torch.uint8 else images
    max_length = MAX_NAME_LENGTH // 2
    for row, (name, row_images) in enumerate((("positive", images), ("negative", negative_images))):
        for column, image in enumerate(row_images):
            title = _name(int(labels[column]), names, max_length)
            if row:
                wrong = [] if negatives.dtype == torch.uint8 else negatives[column].flatten().tolist()
                is_one = len(wrong) == 1
                title = f"as {_name(wrong[0], names, max_length)}" if is_one else "as all others" if wrong else ""
            panel = panels[row, column]
            panel.imshow(image.view(shape).permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=255)
            panel.set(xticks=[], yticks=[])
            panel.set_title(title, parse_math=False)
        panels[row, 0].set_ylabel(name)
    return _save(figure, path)


@_style()
def plot_timeline(spans: Sequence[Span], path: Path) -> Path:
    """Draws when each actor computed and waited, for some of the first chunks, and returns the path."""
    first = max(0, min(FIRST_CHUNK, spans[-1].chunk + 1 - MAX_CHUNKS))
    spans = [span for span in spans if first <= span.chunk < first + MAX_CHUNKS]
    actors = list(dict.fromkeys(span.actor for span in spans))
    figure = Figure(figsize=(11, 0.5 * len(actors) + 1.6), layout="constrained")
    panel = figure.subplots()
    for row, actor in enumerate(actors):
        for activity, colors in SPAN_COLORS.items():
            bars = [span for span in spans if (span.actor, span.activity) == (actor, activity)]
            facecolors = [colors[span.chunk % len(colors)] for span in bars]
            intervals = [(span.start_s, span.duration_s) for span in bars]
            panel.broken_barh(intervals, (row - 0.4, 0.8), facecolors=facecolors)
    length = max(span.start_s + span.duration_s for span in spans) - min(span.start_s for span in spans)
    for span in spans:
        if span.activity == "compute" and span.duration_s > length / 70:
            color, middle = ("white", "black")[span.chunk % 2], span.start_s + span.duration_s / 2
            panel.text(middle, actors.index(span.actor), str(span.chunk), color=color, ha="center", va="center")
    panel.set_yticks(range(len(actors)), actors)
    panel.invert_yaxis()
    panel.grid(axis="y", visible=False)
    left_out = f"; chunks before {first}, which fill the pipeline, are left out" * bool(first)
    panel.set(xlabel=f"seconds{left_out}", title="numbers are chunks")
    patches = [Patch(color=colors[0], label=activity) for activity, colors in SPAN_COLORS.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches))
    return _save(figure, path)
