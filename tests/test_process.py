"""A library call does not change the state of the calling process."""

import json
import os
import re
import subprocess
import sys
import textwrap

CODE = """
import json, locale, logging, os, random, signal, sys, threading
import matplotlib, matplotlib.pyplot, mlflow, numpy, psutil, sklearn.datasets, sqlalchemy, torch  # with side effects
import ffdist.training.offline_negatives, ffdist.training.trainer
from ffdist import Run, load_config, train

NAMES = ["", "mlflow", "alembic", "alembic.runtime.migration", "sqlalchemy", "matplotlib", "torch", "filelock"]

def freed_bytes():
    resident = psutil.Process().memory_info
    blocks = [torch.ones(2**24) for _ in range(4)]
    full = resident().rss
    del blocks
    return full - resident().rss

def state():
    return {
        "threads": torch.get_num_threads(),
        "bf16_reduction": torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        "dtype": str(torch.get_default_dtype()),
        "gradients": torch.is_grad_enabled(),
        "random": [hash(random.getstate()), torch.initial_seed(), hash(torch.get_rng_state().numpy().tobytes()),
                   hash(numpy.random.get_state()[1].tobytes())],
        "signals": [str(signal.getsignal(getattr(signal, name))) for name in
                    ("SIGINT", "SIGTERM", "SIGHUP", "SIGALRM", "SIGUSR1", "SIGUSR2", "SIGCHLD")],
        "path": list(sys.path),
        "directory": os.getcwd(),
        "environment": dict(os.environ),
        "levels": {name: logging.getLogger(name).level for name in NAMES},
        "locale": locale.setlocale(locale.LC_ALL),
        "styles": hash(str(sorted(matplotlib.rcParams.items()))),
        "tracking": mlflow.get_tracking_uri(),
        "hooks": [str(sys.excepthook), str(threading.excepthook)],
        "frees_memory": freed_bytes() > 0.9 * 2**28,
    }

signal.signal(signal.SIGTERM, signal.SIG_IGN)
before = state()
changes = ["model.layers=[9]", "training.epochs=1", "data.label=none", "negatives.kind=mine:dark"]
run = train(load_config("digits", changes), runner="serial", runs="runs")
same_run = Run.find(run.folder)
same_run.predict(same_run.dataset.samples["test"][:5])
same_run.plot()
after = state()
print(json.dumps({name: [before[name], after[name]] for name in before if before[name] != after[name]}))
"""


def test_training_and_prediction_do_not_change_the_process(tmp_path):
    (tmp_path / "mine.py").write_text("def dark(data, samples, generator):\n    return data.samples[samples] // 2\n")
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"}  # its thread sets environment variables
    process = subprocess.run(
        [sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, timeout=200, cwd=tmp_path
    )
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout.splitlines()[-1]) == {}


def test_training_without_a_home_folder_raises_config_error(tmp_path):
    """MLflow needs a home folder on import. Commands set HOME, but a function does not change the environment."""
    code = """
        import os, pwd
        def fail(number): raise KeyError(number)
        pwd.getpwuid = fail
        del os.environ["HOME"]
        from ffdist import train
        train("digits", runner="serial", runs="runs")
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert re.search(r"ConfigError: tracking at .*MLflow needs a home folder .*; set HOME", process.stderr), (
        process.stderr
    )
    assert not list(tmp_path.glob("runs/digits-*"))
