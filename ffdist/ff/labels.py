"""Labels as a part of the input (Hinton 2022, section 3.3).

Shapes: `D` values of a sample, `D'` values of a row, `C` classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """Returns label values `[...] -> [..., C]`: 1 for the label, 0 for the other classes."""
    return F.one_hot(labels, classes).to(torch.float32)


def neutral(samples: Tensor, classes: int) -> Tensor:
    """Returns label values `[..., C]` for samples `[..., D]` that favor no class: `1 / C` each."""
    return torch.full((*samples.shape[:-1], classes), 1 / classes, device=samples.device)


@dataclass(frozen=True)
class LabeledRows:
    """Rows that show labels, each of which is a sample, plus a label, times a factor.

    The rows of one sample differ only in the label, so a layer can multiply the sample with its weights once for all of
    them. Leading dimensions of samples and labels are those of the rows, or 1.
    """

    samples: Tensor
    """Samples with 0 in the place of the label values `[..., D']`, float32."""
    labels: Tensor
    """Label values `[..., C]`, float32."""
    factors: Tensor
    """Factor of each row, which normalizes it `[...]`, float32."""
    place: slice
    """The place of the label values in a row."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the rows."""
        return *self.factors.shape, self.samples.shape[-1]

    def __getitem__(self, passes: slice) -> LabeledRows:
        """Returns some of the rows, by their first dimension."""
        samples, labels = (
            part if part.shape[0] == 1 < len(self.factors) else part[passes] for part in (self.samples, self.labels)
        )
        return LabeledRows(samples, labels, self.factors[passes], self.place)


Rows = Tensor | LabeledRows
"""Input rows of a layer `[..., D']`."""


def join(rows: Rows, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns rows as one tensor `[..., D']`; those that show labels are converted to a type."""
    if not isinstance(rows, LabeledRows):
        return rows
    joined = rows.samples.expand(rows.shape).clone()
    joined[..., rows.place] = rows.labels
    return (joined * rows.factors.unsqueeze(-1)).to(dtype)


def overwrite(samples: Tensor, classes: int) -> tuple[Tensor, slice]:
    """Label values replace the first C values: `[..., D] -> [..., D]`."""
    samples = samples.clone()
    samples[..., :classes] = 0
    return samples, slice(0, classes)


def append(samples: Tensor, classes: int) -> tuple[Tensor, slice]:
    """Label values follow the sample: `[..., D] -> [..., D + C]`."""
    return F.pad(samples, (0, classes)), slice(-classes, None)


LABELS = {"overwrite": overwrite, "append": append, "everywhere": append}
"""Ways of showing a label, by the name in `data.label`; `none` shows no label. From samples, they return samples with 0
in the place of the label values, and this place.

`everywhere` is `append` for a first layer of local fields, each of which reads the appended values.
"""
