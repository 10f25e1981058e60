"""The label as a part of the input (Hinton 2022, section 3.3): one-hot for a claim, even for "no claim"."""

import torch
import torch.nn.functional as F
from torch import Tensor


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """Returns label values `[...] -> [..., C]`: 1 at the label, 0 elsewhere."""
    return F.one_hot(labels, classes).to(torch.float32)


def neutral(images: Tensor, classes: int) -> Tensor:
    """Returns label values `[..., C]` for images `[..., D]` that favour no class: `1 / C` each."""
    return torch.full((*images.shape[:-1], classes), 1 / classes, device=images.device)


def overwrite(images: Tensor, values: Tensor) -> Tensor:
    """Puts the label values in place of the first C pixels, in a copy: `[..., D], [..., C] -> [..., D]`."""
    images = images.expand(*values.shape[:-1], images.shape[-1]).clone()
    images[..., : values.shape[-1]] = values
    return images


def append(images: Tensor, values: Tensor) -> Tensor:
    """Puts the label values behind the pixels: `[..., D], [..., C] -> [..., D + C]`."""
    return torch.cat((images.expand(*values.shape[:-1], images.shape[-1]), values), -1)


LABELS = {"overwrite": overwrite, "append": append, "everywhere": append}
"""Ways of showing a label to the network, by the name that `data.label` gives; `none` shows none.

`everywhere` is `append` to a first layer of local fields, each of which reads what stands behind the pixels.
"""
