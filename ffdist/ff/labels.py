"""Labels as a part of the input (Hinton 2022, section 3.3).

Shapes: `D` values of a sample, `C` classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """Returns label values `[...] -> [..., C]`: 1 for the label, 0 for the other classes."""
    return F.one_hot(labels, classes).to(torch.float32)


def neutral(samples: Tensor, classes: int) -> Tensor:
    """Returns label values `[..., C]` for samples `[..., D]` that favor no class: `1 / C` each."""
    return torch.full((*samples.shape[:-1], classes), 1 / classes, device=samples.device)


def overwrite(samples: Tensor, values: Tensor) -> Tensor:
    """Returns samples whose first C values are replaced by label values: `[..., D], [..., C] -> [..., D]`."""
    samples = samples.expand(*values.shape[:-1], samples.shape[-1]).clone()
    samples[..., : values.shape[-1]] = values
    return samples


def append(samples: Tensor, values: Tensor) -> Tensor:
    """Returns samples followed by label values: `[..., D], [..., C] -> [..., D + C]`."""
    return torch.cat((samples.expand(*values.shape[:-1], samples.shape[-1]), values), -1)


LABELS = {"overwrite": overwrite, "append": append, "everywhere": append}
"""Ways of showing a label, by the name in `data.label`; `none` shows no label.

`everywhere` is `append` for a first layer of local fields, each of which reads the appended values.
"""
