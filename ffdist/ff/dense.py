"""Dense layers."""

import torch
from torch import Tensor

from ffdist.ff.relu import ReluLayer


class DenseLayer(ReluLayer):
    """A layer whose units read the whole row; the shape of its weight is `(units, inputs)`."""

    has_kernels = True

    def _product(self, inputs: Tensor) -> Tensor:
        return torch.mm(inputs, self._compute_weight.t()).unsqueeze(0)

    def _weight_gradient(self, direction: Tensor, inputs: Tensor) -> Tensor:
        return torch.mm(direction[0].t(), inputs)
