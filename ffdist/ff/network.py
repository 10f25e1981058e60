"""The whole network, and how it predicts.

Shapes: `N` samples, `B` samples of a minibatch, `D` values of a sample, `L` layers, `T` labels that are tried,
`C` classes, `H` units.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ffdist.ff.architecture import Architecture
from ffdist.ff.classify import total_goodness
from ffdist.ff.labels import Rows
from ffdist.ff.layers import Layer, Output
from ffdist.ff.optimizers import is_for_inference
from ffdist.ff.readout import LayerReadouts, Readout


class Prediction(NamedTuple):
    """The predictions of a network for samples."""

    probabilities: Tensor
    """Probabilities of the readout, from one pass with the neutral label, or without one `[B, C]`. Without a readout,
    the softmax of the summed goodness or class scores."""
    goodness: Tensor
    """Goodness or class scores of each layer for every label `[L, B, C]`, -inf for labels that are not tried;
    `[L, B, 0]` if the layers do not predict."""
    label: Tensor
    """Label with the greatest goodness, summed over the predicting layers; otherwise that of the readout `[B]`."""


class Network(nn.Module):
    """Layers and readout in one module, for use after training.

    Args:
        architecture: Determines the network.
        trainable: Whether it has initial weights and optimizer state. Otherwise its weights must be loaded.
    """

    def __init__(self, architecture: Architecture, *, trainable: bool = True) -> None:
        super().__init__()
        self.architecture, indices = architecture, range(len(architecture.layers))
        self.layers = nn.ModuleList(architecture.layer(index, trainable=trainable) for index in indices)
        with torch.device("cpu" if trainable else "meta"):
            self.readout = self._build_readout()

    def _build_readout(self) -> Readout | LayerReadouts | None:
        architecture = self.architecture
        if architecture.readout_kind == "per_layer":
            return LayerReadouts({str(index): architecture.readout(index) for index in architecture.read_layers})
        return architecture.readout() if architecture.has_readout else None

    @classmethod
    def for_inference(cls, architecture: Architecture, tensors: Mapping[str, Tensor]) -> "Network":
        """Builds a network that cannot be trained, from weights that are not copied.

        It draws no initial weights and has no optimizer state, so it needs little memory in addition to the weights.

        Args:
            architecture: Determines the network.
            tensors: `layers.0.weight`, `layers.0.bias`, ..., `readout.bias`; those for training are ignored.

        Raises:
            KeyError: A tensor is missing.
            RuntimeError: A tensor has another shape.
        """
        network = cls(architecture, trainable=False)
        names = [name for name in network.state_dict() if is_for_inference(name)]
        network.load_state_dict({name: tensors[name] for name in names}, strict=False, assign=True)
        for learner in map(network.get_submodule, architecture.parts.values()):
            learner.optimizer = learner.statistics = nn.Module()
        return network.requires_grad_(False).eval()

    def read(self, rows: Rows, noise: Sequence[Tensor | None] | None = None) -> list[Tensor]:
        """Returns the readout's inputs for rows `[B, D']`: the normalized activations of each read layer `[B, H]`.

        Args:
            rows: The rows.
            noise: Result of `Layer.draw` of each layer, or None, if they are a minibatch that is trained on by
                backpropagation.
        """
        return self._read(list(self._outputs(rows, noise)))

    def _read(self, outputs: Sequence[Output]) -> list[Tensor]:
        """Returns the readout's inputs from the output of each layer."""
        return [outputs[index].activations for index in self.architecture.read_layers]

    def goodness(self, rows: Rows) -> Tensor:
        """Returns each layer's goodness for rows `[..., D']`, `[L, ...]`, or its class scores, `[L, ..., C]`."""
        return torch.stack([output.scores for output in self._outputs(rows)])

    def _outputs(self, rows: Rows, noise: Sequence[Tensor | None] | None = None) -> Iterator[Output]:
        """Yields the output of each layer; for the arguments see `read`."""
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            output = layer(rows) if noise is None else layer.forward_for_training(rows, noise[index])
            rows = output.activations
            yield output

    def forward(self, samples: Tensor) -> Tensor:
        """Returns the readout's logits `[B, C]` for samples `[B, D]`, from one pass without a claim.

        Without a readout, it returns the goodness or class scores, summed over the predicting layers.
        """
        if self.readout is None:
            return total_goodness(self._goodness_of_labels(samples), self.architecture.predicting_layers)
        return self.read_out(self.read(self.architecture.neutral_rows(samples)))

    def read_out(self, activations: list[Tensor]) -> Tensor:
        """Returns the readout's logits `[B, C]` from its inputs, as `read` returns them."""
        assert self.readout is not None, "there is no readout"
        logits: Tensor = self.readout(activations)
        return logits

    def _goodness_of_labels(self, samples: Tensor, outputs: Sequence[Output] = ()) -> Tensor:
        """Returns the goodness or class scores of each layer for every label `[L, B, C]`; `[L, B, 0]` if there is none.

        Args:
            samples: `[B, D]`.
            outputs: Output of each layer for rows without a claim, if it is known.
        """
        architecture = self.architecture
        if not architecture.goodness_predicts:
            return samples.new_empty(len(self.layers), samples.shape[0], 0, dtype=torch.float32)
        if not architecture.scores_classes:
            return architecture.by_class(self.goodness(architecture.claiming_rows(samples)))
        outputs = outputs or [*self._outputs(architecture.neutral_rows(samples))]
        return architecture.by_class(torch.stack([output.scores for output in outputs]))

    def predict(self, samples: Tensor, track: Callable[[Sequence[Tensor]], Iterable[Tensor]] = iter) -> Prediction:
        """Predicts labels in both ways: one pass for the readout, and one pass per label for goodness.

        Args:
            samples: `[B, D]`. They are processed in batches.
            track: Takes the batches and yields them, for example to show progress.
        """
        batches = torch.split(samples, self.architecture.prediction_batch)
        probabilities, goodness, label = zip(*map(self.predict_batch, track(batches)), strict=True)
        return Prediction(torch.cat(probabilities), torch.cat(goodness, 1), torch.cat(label))

    def predict_batch(self, samples: Tensor) -> Prediction:
        """Predicts the labels of samples `[B, D]` in one batch."""
        architecture = self.architecture
        outputs = [*self._outputs(architecture.neutral_rows(samples))] if architecture.has_readout else []
        by_layer = self._goodness_of_labels(samples, outputs)
        total = total_goodness(by_layer, architecture.predicting_layers)
        probabilities = (self.read_out(self._read(outputs)) if architecture.has_readout else total).softmax(-1)
        predicting = total if architecture.goodness_predicts else probabilities
        return Prediction(probabilities, by_layer, predicting.argmax(-1))
