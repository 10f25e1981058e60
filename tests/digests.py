"""Prints the digest and the test errors of a matrix of short runs, to show that a change of the code changes no bit.

python tests/digests.py > before.tsv; (change the code); python tests/digests.py > after.tsv; diff before.tsv after.tsv

Digests depend on the processor and on torch, so both must be made on one machine. `--all` adds two runs on MNIST.
"""

import sys
import tempfile
from contextlib import redirect_stdout

from ffdist import ConfigError, load_config, train

NAMES = {
    "data.subtract_mean": "data.center",
    "training.momentum": "training.smoothing",
    "training.updates_per_minibatch": "training.repeats",
    "training.validate_every_epochs": "training.evaluate_every",
}
"""Settings by their present names, with the names that earlier versions of the code had."""
LOCAL = (
    "model.layers=[{kind: local, grid: 3, stride: 2, field: 4, units: 8}, {kind: local, grid: 2, field: 2, units: 40}]"
)
SMALL = ("training.epochs=2", "model.layers=[60, 50, 40]")
MATRIX = {
    "default": (),
    **{
        f"negatives {kind}": (f"negatives.kind={kind}",)
        for kind in ("fixed", "hard_label", "all_wrong", "hybrid", "mixed", "noise", "permuted")
    },
    "negatives hard_label, delayed": ("negatives.kind=hard_label", "negatives.prediction_delay=7"),
    "negatives noise, normal": ("negatives.kind=noise", "negatives.options={distribution: normal}"),
    "label append": ("data.label=append",),
    "label none": ("data.label=none", "negatives.kind=hybrid"),
    "label scale": ("data.label_scale=3",),
    "local": (LOCAL, "data.label=everywhere"),
    "local, unsupervised": (LOCAL, "data.label=none", "negatives.kind=hybrid"),
    "local below dense": (LOCAL.replace("]", ", 30]"), "data.label=everywhere"),
    "center": ("data.subtract_mean=true",),
    "jitter": ("data.jitter=1",),
    **{
        f"goodness {kind}": (f"model.goodness={kind}", *(("model.threshold=2",) if "sum" not in kind else ()))
        for kind in ("minus_sum_of_squares", "mean_of_squares", "minus_mean_of_squares", "softmax", "minus_softmax")
    },
    **{f"normalization {kind}": (f"model.normalization={kind}",) for kind in ("l2", "none")},
    "predict from 1": ("model.predict_from=1",),
    "predict to 2": ("model.predict_to=2",),
    "predict auto": ("model.predict_from=auto", "training.validation_samples=200"),
    "readout per layer": ("model.readout=per_layer",),
    "no readout": ("model.readout=none",),
    "thresholds": ("model.threshold=[10, units, 30]",),
    "loss symmetric": ("training.loss=symmetric", "training.alpha=0.1"),
    "alpha": ("training.alpha=2",),
    "alternating": ("training.updates=alternating",),
    "repeats": ("training.updates_per_minibatch=2",),
    "greedy": ("training.schedule=greedy",),
    **{
        f"optimizer {kind}": (f"training.optimizer={kind}", "training.learning_rate=0.001")
        for kind in ("sgd", "adam", "adamw")
    },
    "no decay, no momentum": ("training.weight_decay=0", "training.momentum=0"),
    "no peer normalization": ("training.peer_normalization=0",),
    "validated": ("training.validation_samples=200", "training.validate_every_epochs=1"),
    "seed": ("seed=7",),
    "odd batch": ("training.batch_size=33",),
}
MNIST = {
    "mnist, 1 epoch": ("mnist", "training.epochs=1"),
    "mnist_local_hybrid, 1 epoch": ("mnist_local_hybrid", "training.epochs=1"),
}


def config_of(name, settings):
    try:
        return load_config(name, settings)
    except ConfigError:  # of an earlier version of the code
        return load_config(
            name, [NAMES.get(key, key) + "=" + value for key, _, value in (s.partition("=") for s in settings)]
        )


def rows():
    for precision in ("float32", "bfloat16"):
        for row, settings in MATRIX.items():
            yield f"{row}, {precision}", "digits", (*SMALL, *settings, f"training.precision={precision}"), "serial"
    for row in ("default", "negatives hard_label, delayed", "label none", "local"):
        yield f"{row}, Ray", "digits", (*SMALL, *MATRIX[row], "training.precision=float32"), "ray"
    yield "backpropagation", "digits", (*SMALL, "training.precision=float32"), "backpropagation"
    if "--all" in sys.argv:
        for row, (name, *settings) in MNIST.items():
            yield row, name, tuple(settings), "serial"


def main():
    with tempfile.TemporaryDirectory() as runs:
        print("run\tweights_sha256\tgoodness\treadout", flush=True)
        for row, name, settings, runner in rows():
            config = config_of(name, (*settings, "tracking.artifacts=[]"))
            with redirect_stdout(sys.stderr):
                summary = train(config, runner=runner, runs=runs).summary
            errors = (summary["test_goodness_error"], summary["test_readout_error"])
            print(row, summary["weights_sha256"], *errors, sep="\t", flush=True)


if __name__ == "__main__":
    main()
