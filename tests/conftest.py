import os
import socket
from collections.abc import Callable
from contextlib import chdir
from functools import partial
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from ffdist.cli import main

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # what is tested here is decided alike on every machine
os.environ.pop("MLFLOW_TRACKING_URI", None)
os.environ.pop("RAY_ADDRESS", None)
torch.set_num_threads(1)  # as a stage does; two that share a busy processor wait for each other over tiny tensors


@pytest.fixture(scope="session")
def mnist_root() -> Path:
    root = Path(os.environ.get("FFDIST_DATA", Path.home() / ".cache/ffdist"))
    if not (root / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").is_file():
        pytest.skip(f"MNIST is not in {root}; set FFDIST_DATA to a folder that has MNIST/raw")
    return root


@pytest.fixture(scope="module")
def ray_start_4_cpus(tmp_path_factory):
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def ffdist_in() -> Callable[..., str]:
    """The command line in a folder, and in the test's process, which has imported everything.

    Takes the folder, the words and the exit code that is right, and returns what was said.
    """

    def run(folder: Path, *words: str | Path, code: int = 0) -> str:
        with chdir(folder):
            done = CliRunner().invoke(main, [str(word) for word in words])
        assert done.exit_code == code, (done.output, done.exception)
        return done.output

    return run


@pytest.fixture
def ffdist(ffdist_in, tmp_path, monkeypatch) -> Callable[..., str]:
    """The same in the test's folder."""
    monkeypatch.chdir(tmp_path)
    return partial(ffdist_in, tmp_path)


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]
