"""Dense layers."""

from typing import Any

import torch
from torch import Tensor

from ffdist.ff.relu import ReluLayer


class DenseLayer(ReluLayer):
    """A layer whose units read the whole row.

    Args:
        inputs: Width of a row D.
        units: Number of units H.
        **settings: See `ReluLayer`.
    """

    def __init__(self, inputs: int, units: int, **settings: Any) -> None:
        super().__init__((units, inputs), **settings)

    def _product(self, inputs: Tensor) -> Tensor:
        return torch.mm(inputs, self._compute_weight.t())

    def _weight_gradient(self, direction: Tensor, inputs: Tensor) -> Tensor:
        return torch.mm(direction.t(), inputs)
