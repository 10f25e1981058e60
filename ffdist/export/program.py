"""A network as a program that needs only torch, and predicts as `Network.predict` does: by goodness and by readout.

python -m ffdist.export.program FOLDER PATH [MODULE]...: exports the network of a folder to a file, after importing
modules that it uses. Exporting replaces functions of torch while it runs, so a process that trains leaves it to another
one.
"""

import json
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ffdist.export.ffdist_served_model import FACTS
from ffdist.export.network import Names, load_names, load_network
from ffdist.ff.classify import total_goodness
from ffdist.ff.encoders import encoder_entry
from ffdist.ff.network import Network


class Classifier(nn.Module):
    """A network as a function of samples in their own shape.

    Args:
        network: Network for inference.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs."""
        goodness_predicts = self.network.architecture.goodness_predicts
        return ("label", "probability", *["goodness"] * goodness_predicts)

    def forward(self, samples: Tensor) -> tuple[Tensor, ...]:
        """Classifies samples.

        Args:
            samples: `[B, *shape]`, of the encoder's type; of images, uint8 `[B, channels, height, width]`.

        Returns:
            Predicted labels `[B]`, int64; probabilities `[B, C]`, see `Prediction`; and, if goodness predicts, the
            goodness of each label `[B, C]`, summed over the predicting layers.
        """
        prediction, architecture = self.network.predict_batch(samples.flatten(1)), self.network.architecture
        if not architecture.goodness_predicts:
            return prediction.label, prediction.probabilities
        goodness = total_goodness(prediction.goodness, architecture.predicting_layers)
        return prediction.label, prediction.probabilities, goodness


def export_program(network: Network) -> torch.export.ExportedProgram:
    """Exports a network, for batches of any size."""
    encoder = network.architecture.encoder
    samples = torch.zeros(2, *encoder.shape, dtype=encoder.dtype)
    return torch.export.export(Classifier(network), (samples,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def program_facts(network: Network, names: Names) -> dict[str, Any]:
    """Returns what a user of the program needs to know, as JSON data."""
    architecture = network.architecture
    encoder = architecture.encoder
    return {
        "shape": list(encoder.shape),
        "dtype": str(encoder.dtype).removeprefix("torch."),
        "outputs": list(Classifier(network).outputs),
        **{key: list(value) for key, value in names._asdict().items()},
        "batch": architecture.prediction_batch,
        "encoder": encoder_entry(encoder),
    }


def save_program(network: Network, names: Names, path: Path) -> None:
    """Exports a network to a file for `torch.export.load`, which contains the result of `program_facts`."""
    facts = json.dumps(program_facts(network, names))
    torch.export.save(export_program(network), str(path), extra_files={FACTS: facts})


def main() -> None:
    """Exports the network of a folder; the exit code is `os.EX_TEMPFAIL` if only the file cannot be written."""
    folder, path = map(Path, sys.argv[1:3])
    for module in sys.argv[3:]:  # of the user, which the calling process has imported
        import_module(module)
    network, names = load_network(folder), load_names(folder)
    try:
        save_program(network, names, path)
    except (OSError, MemoryError) as error:
        print(error, file=sys.stderr)
        sys.exit(os.EX_TEMPFAIL)


if __name__ == "__main__":
    main()
