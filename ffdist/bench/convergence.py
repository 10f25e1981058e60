"""Time to a test error, from the import of ffdist to the last evaluation."""

from pathlib import Path

from ffdist.bench.stretch import process_age_s
from ffdist.config.schema import Config
from ffdist.training.trainer import train


def measure_convergence(config: Config, target_error: float, *, runs: Path, name: str) -> dict[str, float]:
    """Trains a configuration over Ray, and measures the time and whether the run reaches a test error.

    The run does not stop when it reaches the error, because the learning rate schedule depends on the number of epochs.

    Args:
        config: Configuration to train.
        target_error: Test error to reach, in [0, 1]; of goodness if the network predicts by it, else of the readout.
        runs: Runs folder.
        name: Prefix of the run's name.

    Returns:
        Seconds, epochs and errors by name; `reached` is 1 if the error was reached, else 0.
    """
    before_s = process_age_s()
    summary = train(config, runs=runs, name=name).summary
    by_goodness, by_readout = summary["test_goodness_error"], summary["test_readout_error"]
    test_error = by_readout if by_goodness is None else by_goodness
    return {
        "epochs": float(summary["epochs"]),
        "seconds": process_age_s(),
        "start_s": before_s + summary["start_s"],
        "training_s": summary["train_s"],
        "test_error": test_error,
        "asked_error": target_error,
        "reached": float(test_error <= target_error),
    }
