"""Pictures of a run, made with matplotlib."""

from pathlib import Path

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor

History = dict[str, list[tuple[int, float]]]
"""Samples seen and value, by metric."""


def plot_layers(history: History, path: Path) -> Path:
    """Draws loss and goodness of every layer over the samples seen, and returns the picture's path."""
    layers = sorted(
        {name.split("/")[0] for name in history if name.startswith("layer_")}, key=lambda name: int(name[6:])
    )
    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    for index, layer in enumerate(layers):
        color = colormaps["viridis"](index / max(1, len(layers)))
        panels[0].plot(*zip(*history[f"{layer}/loss"], strict=True), color=color, label=layer.replace("_", " "))
        for name, style in (("positive", "-"), ("negative", "--")):
            panels[1].plot(*zip(*history[f"{layer}/goodness_{name}"], strict=True), color=color, linestyle=style)
    panels[0].set(xlabel="samples seen", ylabel="loss, nats", yscale="log", title="loss")
    panels[1].set(xlabel="samples seen", ylabel="goodness", title="goodness: positive solid, negative dashed")
    for panel in panels:
        panel.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=8)
    figure.savefig(path, dpi=120)
    return path


def plot_confusion(confusion: Tensor, predicted_by: str, path: Path) -> Path:
    """Draws a confusion matrix `[C, C]`, true labels down, predicted ones across, and returns the picture's path."""
    classes = len(confusion)
    figure = Figure(figsize=(6, 5.5), layout="constrained")
    panel = figure.subplots()
    share = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    panel.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=1)
    if classes <= 30:
        panel.set_xticks(range(classes))
        panel.set_yticks(range(classes))
        for row, column in confusion.nonzero().tolist():
            color = "white" if share[row, column] > 0.5 else "black"
            count = str(int(confusion[row, column]))
            panel.text(column, row, count, ha="center", va="center", color=color, fontsize=8)
    panel.set(xlabel=f"predicted by {predicted_by}", ylabel="true label", title="test samples")
    figure.savefig(path, dpi=120)
    return path


def plot_negatives(images: Tensor, labels: Tensor, negatives: Tensor, shape: tuple[int, int, int], path: Path) -> Path:
    """Draws samples above their negatives, and returns the picture's path.

    Args:
        images: uint8 `[n, D]`.
        labels: True labels `[n]`.
        negatives: Labels `[n]` or `[n, M]`, or images `[n, D]`, as a kind of negatives returns them.
        shape: Channels, height and width of an image.
        path: Where to draw.
    """
    figure = Figure(figsize=(1.1 * len(images) + 1, 3), layout="constrained")
    panels = figure.subplots(2, len(images), squeeze=False)
    shown = negatives if negatives.dtype == torch.uint8 else images
    for row, (name, pictures) in enumerate((("positive", images), ("negative", shown))):
        for column, picture in enumerate(pictures):
            title = str(labels[column].item())
            if row:
                wrong = [] if negatives.dtype == torch.uint8 else negatives[column].flatten().tolist()
                title = f"as {wrong[0]}" if len(wrong) == 1 else "as all others" if wrong else ""
            panel = panels[row, column]
            panel.imshow(picture.view(shape).permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=255)
            panel.set(xticks=[], yticks=[], title=title)
        panels[row, 0].set_ylabel(name)
    figure.savefig(path, dpi=120)
    return path
