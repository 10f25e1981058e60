"""Pictures of a run, made with matplotlib; each can be read in grey."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, cast

import numpy as np
import torch
from matplotlib import colormaps, rc_context, rcdefaults, rcParams
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import EngFormatter
from torch import Tensor

from ffdist.evaluation import Evaluation
from ffdist.ff.local import Fields
from ffdist.ff.network import Network
from ffdist.files import file_in
from ffdist.tracking.timeline import Span

History = dict[str, list[tuple[int, float]]]
"""Samples seen and value, by metric."""
STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "font.size": 9,
    "savefig.dpi": 110,
}
_ONE_AT_A_TIME = Lock()
UNITS, BINS, CHUNKS, FIRST, LONGEST = 64, 60, 14, 4, 20
"""Receptive fields, bins of a histogram, chunks of a timeline and the first of them, and letters of a name: drawn."""
LOOKS = {"compute": ("#2a6f97", "#89c2d9"), "wait": ("#eeeeee",), "wait for negatives": ("#333333",)}
"""Of the timeline's spans; one chunk after the other."""


@contextmanager
def _styled(*, grid: bool = True) -> Iterator[None]:
    """Gives what is drawn in a `with` block its style; matplotlib has one for all threads."""
    with _ONE_AT_A_TIME, rc_context():
        rcdefaults()  # whatever a file named matplotlibrc in the working directory says
        rcParams.update({**STYLE, "axes.grid": grid})
        yield


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(file_in(path.parent, path.name), format=path.suffix[1:] or None)
    return path


def _shade(index: int, count: int) -> tuple[float, ...]:
    """Returns a colour that is lighter the higher the layer."""
    return colormaps["viridis"](0.85 * index / max(1, count - 1))


def _name(label: int, names: Sequence[str], longest: int) -> str:
    """Returns the name of a class, or its number where it has no name or matplotlib's font lacks a character of it."""
    name = names[label][:longest] if names else ""
    known = get_font(findfont(FontProperties())).get_charmap()
    return name if name.isprintable() and name and all(ord(letter) in known for letter in name) else str(label)


def _bins(values: Tensor) -> np.ndarray[Any, Any]:
    """Returns the edges of a histogram's bins: float64, and some width apart even where all values are equal."""
    low, high = (values.min().item(), values.max().item()) if len(values) else (0.0, 1.0)
    margin = max(0.0, 1e-6 * max(abs(low), abs(high), 1e-6) - (high - low))
    return np.linspace(low - margin, high + margin, BINS + 1)


@_styled()
def plot_layers(history: History, thresholds: Sequence[float | None], path: Path) -> Path:
    """Draws loss and goodness of every layer over the samples seen, and returns the picture's path.

    Args:
        history: All metrics of a run.
        thresholds: Of each layer; None where the loss has none.
        path: Where to draw.
    """
    layers = sorted(
        {name.split("/")[0] for name in history if name.startswith("layer_")}, key=lambda name: int(name[6:])
    )
    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    for index, layer in enumerate(layers):
        color = _shade(index, len(layers))
        marker = "o" if len(history[f"{layer}/loss"]) == 1 else None  # no line has one end
        losses = zip(*history[f"{layer}/loss"], strict=True)
        panels[0].plot(*losses, color=color, marker=marker, label=layer.replace("_", " "))
        for name, style in (("positive", "-"), ("negative", "--")):
            values = zip(*history[f"{layer}/goodness_{name}"], strict=True)
            panels[1].plot(*values, color=color, linestyle=style, marker=marker)
    for panel in panels:
        panel.xaxis.set_major_formatter(EngFormatter())
    panels[0].set(xlabel="samples seen", ylabel="loss, nats", yscale="log", title="loss")
    dotted = {threshold for threshold in thresholds if threshold is not None}
    for threshold in dotted:
        panels[1].axhline(threshold, color="black", linestyle=":")
    looks = "goodness: positive solid, negative dashed" + ", threshold dotted" * bool(dotted)
    panels[1].set(xlabel="samples seen", ylabel="goodness", title=looks)
    figure.legend(loc="outside lower center", ncols=8)
    return _save(figure, path)


@_styled()
def plot_goodness(goodness: dict[str, Tensor], thresholds: Sequence[float | None], path: Path) -> Path:
    """Draws how the goodness of positive and of negative data is distributed in each layer, and returns the path.

    A layer that learns has them on different sides of its threshold.

    Args:
        goodness: Of positive, then of negative data `[L, any number]`, by what each is.
        thresholds: Of each layer; None where the loss has none.
        path: Where to draw.
    """
    figure = Figure(figsize=(min(16, 3.2 * len(thresholds) + 1), 3.2), layout="constrained")
    panels = figure.subplots(1, len(thresholds), squeeze=False)[0]
    looks = {"color": "#2a6f97", "alpha": 0.85}, {"color": "black", "histtype": "step", "linewidth": 1.2}
    layers = zip(panels, zip(*goodness.values(), strict=True), thresholds, strict=True)
    for number, (panel, layer, threshold) in enumerate(layers, 1):
        finite = [values[values.isfinite()].double() for values in layer]
        bins = _bins(torch.cat(finite))
        for name, values, look in zip(goodness, finite, looks, strict=True):
            panel.hist(values.numpy(), bins, density=bool(len(values)), label=name, **look)
        if threshold is not None:
            panel.axvline(threshold, color="black", linestyle=":", label="threshold")
        panel.set(xlabel="goodness", yticks=[], title=f"layer {number}")
    panels[0].set_ylabel("density")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return _save(figure, path)


@_styled()
def plot_errors(evaluation: Evaluation, path: Path) -> Path:
    """Draws the test error by the goodness of each layer alone, and of all by either way; returns the path."""
    layers = evaluation.layer_errors or []
    bars = {f"layer {number} alone": error for number, error in enumerate(layers, 1)}
    if evaluation.goodness_error is not None:
        bars["goodness"] = evaluation.goodness_error
    bars["readout"] = evaluation.readout_error
    figure = Figure(figsize=(6, 0.45 * len(bars) + 1.2), layout="constrained")
    panel = figure.subplots()
    colors = [_shade(index, len(layers)) for index in range(len(layers))] + ["#555555"] * (len(bars) - len(layers))
    drawn = panel.barh(list(bars), [100 * error for error in bars.values()], color=colors)
    panel.bar_label(drawn, [f" {error:.2%}" for error in bars.values()])
    panel.margins(x=0.15)
    panel.invert_yaxis()
    panel.set(xlabel="test error, %", title="goodness of each layer, of all that predict, and readout")
    return _save(figure, path)


@_styled(grid=False)
def plot_fields(network: Network, path: Path) -> Path:
    """Draws what units of the first layer look for, those of the longest weights first; returns the picture's path.

    Mid-grey is no weight; each unit has a scale of its own, which its few largest weights pass.
    """
    channels, height, width = network.architecture.shape
    first, weight = network.architecture.layers[0], cast(Tensor, network.layers[0].weight)
    if isinstance(first, Fields):
        pixels = weight[..., : first.field**2 * channels].reshape(-1, first.field, first.field, channels)
    else:
        pixels = weight[:, : network.architecture.pixels].view(-1, channels, height, width).permute(0, 2, 3, 1)
    longest = pixels.flatten(1).norm(dim=1).argsort(descending=True)[:UNITS]
    # numpy's, because torch's quantile takes 16 million values at most
    scale = torch.from_numpy(np.quantile(pixels[longest].abs().flatten(1).numpy(), 0.98, axis=1)).clamp(min=1e-12)
    shown = (pixels[longest] / scale.view(-1, 1, 1, 1) / 2 + 0.5).clamp(0, 1)
    framed = torch.nn.functional.pad(shown, (0, 0, 1, 1, 1, 1), value=1.0)
    across = min(16, len(framed))
    blank = framed.new_ones((-len(framed) % across, *framed.shape[1:]))
    rows = [torch.cat(list(row), 1) for row in torch.split(torch.cat((framed, blank)), across)]
    mosaic = torch.cat(rows)
    figure = Figure(figsize=(9, 9 * len(mosaic) / mosaic.shape[1] + 0.5), layout="constrained")
    panel = figure.subplots()
    panel.imshow(mosaic.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
    panel.set(xticks=[], yticks=[], title=f"weights of {len(longest)} units of layer 1; mid-grey is zero")
    return _save(figure, path)


@_styled(grid=False)
def plot_confusion(confusion: Tensor, predicted_by: str, names: Sequence[str], path: Path) -> Path:
    """Draws a confusion matrix `[C, C]`, true labels down, predicted ones across, and returns the picture's path.

    Args:
        confusion: Counts.
        predicted_by: What predicted.
        names: Of the classes, where they have some.
        path: Where to draw.
    """
    classes = len(confusion)
    figure = Figure(figsize=(6, 5.5), layout="constrained")
    panel = figure.subplots()
    share = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    panel.imshow(share.numpy(), cmap="Blues", norm=PowerNorm(0.3, 0, 1))  # so that rare errors are seen
    if classes <= 30:
        ticks = [_name(label, names, LONGEST) for label in range(classes)]
        panel.set_xticks(range(classes), ticks, rotation=90 if names else 0, parse_math=False)
        panel.set_yticks(range(classes), ticks, parse_math=False)
        for row, column in confusion.nonzero().tolist():
            color = "white" if share[row, column] > 0.1 else "black"
            count = str(int(confusion[row, column]))
            panel.text(column, row, count, ha="center", va="center", color=color, fontsize=8)
    panel.set(xlabel=f"predicted by {predicted_by}", ylabel="true label", title="test samples")
    return _save(figure, path)


@_styled(grid=False)
def plot_negatives(
    images: Tensor,
    labels: Tensor,
    negatives: Tensor,
    shape: tuple[int, int, int],
    names: Sequence[str],
    path: Path,
) -> Path:
    """Draws samples above their negatives, and returns the picture's path.

    Args:
        images: uint8 `[n, D]`.
        labels: True labels `[n]`.
        negatives: Labels `[n]` or `[n, M]`, or images `[n, D]`, as a kind of negatives returns them.
        shape: Channels, height and width of an image.
        names: Of the classes, where they have some.
        path: Where to draw.
    """
    figure = Figure(figsize=(1.1 * len(images) + 1, 3), layout="constrained")
    panels = figure.subplots(2, len(images), squeeze=False)
    shown = negatives if negatives.dtype == torch.uint8 else images
    for row, (name, pictures) in enumerate((("positive", images), ("negative", shown))):
        for column, picture in enumerate(pictures):
            title = _name(int(labels[column]), names, LONGEST // 2)
            if row:
                wrong = [] if negatives.dtype == torch.uint8 else negatives[column].flatten().tolist()
                one = len(wrong) == 1
                title = f"as {_name(wrong[0], names, LONGEST // 2)}" if one else "as all others" if wrong else ""
            panel = panels[row, column]
            panel.imshow(picture.view(shape).permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=255)
            panel.set(xticks=[], yticks=[])
            panel.set_title(title, parse_math=False)
        panels[row, 0].set_ylabel(name)
    return _save(figure, path)


@_styled()
def plot_timeline(spans: Sequence[Span], path: Path) -> Path:
    """Draws who computed and who waited when, for some of the first chunks; returns the picture's path."""
    first = max(0, min(FIRST, spans[-1].chunk + 1 - CHUNKS))
    shown = [span for span in spans if first <= span.chunk < first + CHUNKS]
    parts = list(dict.fromkeys(span.part for span in shown))
    figure = Figure(figsize=(11, 0.5 * len(parts) + 1.6), layout="constrained")
    panel = figure.subplots()
    for row, part in enumerate(parts):
        for what, shades in LOOKS.items():
            own = [span for span in shown if (span.part, span.what) == (part, what)]
            colors = [shades[span.chunk % len(shades)] for span in own]
            spots = [(span.begun_s, span.took_s) for span in own]
            panel.broken_barh(spots, (row - 0.4, 0.8), facecolors=colors, label=what if not row else None)
    length = max(span.begun_s + span.took_s for span in shown) - min(span.begun_s for span in shown)
    for span in shown:
        if span.what == "compute" and span.took_s > length / 70:
            color, middle = ("white", "black")[span.chunk % 2], span.begun_s + span.took_s / 2
            panel.text(middle, parts.index(span.part), str(span.chunk), color=color, ha="center", va="center")
    panel.set_yticks(range(len(parts)), parts)
    panel.invert_yaxis()
    panel.grid(axis="y", visible=False)
    panel.set(
        xlabel="seconds",
        title="chunks by number where a part computes; light where it waits for work, black for negatives",
    )
    return _save(figure, path)
