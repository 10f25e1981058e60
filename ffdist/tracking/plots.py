"""Pictures of a run, made with matplotlib."""

from pathlib import Path

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


def plot_confusion(confusion: Tensor, path: Path) -> Path:
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
    panel.set(xlabel="predicted by goodness", ylabel="true label", title="test samples")
    figure.savefig(path, dpi=120)
    return path
