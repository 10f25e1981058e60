"""Time to a test error, everything included: from the import of ffdist to the last evaluation."""

from pathlib import Path

from ffdist.bench.stretch import process_age_s
from ffdist.config import Config
from ffdist.trainer import train


def measure_convergence(config: Config, error: float, *, runs: Path, name: str) -> dict[str, float]:
    """Trains a configuration over Ray and says how long it took, and whether it came below an error.

    The falling learning rate belongs to the number of epochs: another number of them is another training.

    Args:
        config: What to train.
        error: Test error to come to, in [0, 1], by goodness where the network has it, else by readout.
        runs: Folder that gets the run's own folder.
        name: Start of the run's name.

    Returns:
        Seconds, epochs and errors by name; `reached` is 1 or 0.
    """
    before_s = process_age_s()
    summary = train(config, runs=runs, name=name).summary
    by_goodness, by_readout = summary["test_goodness_error"], summary["test_readout_error"]
    found = by_readout if by_goodness is None else by_goodness
    return {
        "epochs": float(summary["epochs"]),
        "seconds": process_age_s(),
        "start_s": before_s + summary["start_s"],
        "training_s": summary["train_s"],
        "test_error": found,
        "asked_error": error,
        "reached": float(found <= error),
    }
