import os
import shutil
import signal
import socket
from collections.abc import Callable
from contextlib import chdir
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from click.testing import CliRunner

from ffdist.cli import main
from ffdist.runtime.access import local_ray
from ffdist.signals import STOP_SIGNALS
from ffdist.tracking import server

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # so that tests behave the same on every machine
os.environ.pop("MLFLOW_TRACKING_URI", None)
os.environ.pop("RAY_ADDRESS", None)
for number in STOP_SIGNALS:  # nohup makes processes ignore them
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
RAY_FOLDER = TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)  # hides clusters of other users
os.environ["RAY_TMPDIR"] = RAY_FOLDER.name
torch.set_num_threads(1)  # as in a stage; on a busy CPU, threads wait for each other even for tiny tensors


LONG_FILES = ("test_chaos", "test_launching", "test_transparency", "test_recovery", "test_bench")
"""Files with tests that take minutes. They run first, so that none of them runs alone at the end."""


@pytest.hookimpl(trylast=True)  # after plugins that change the order
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    first_index = {item.path: number for number, item in reversed(list(enumerate(items)))}

    def key(item: pytest.Item) -> tuple[bool, int, bool]:
        """Keeps files together. In each, tests that share a cluster run last: others may need that none runs."""
        return (
            item.path.stem not in LONG_FILES,
            first_index[item.path],
            "ray_start_4_cpus" in getattr(item, "fixturenames", ()),
        )

    items.sort(key=key)


@pytest.fixture(scope="session", autouse=True)
def tracking_database_template(tmp_path_factory):
    """Runs the 68 migrations of MLflow, which take seconds, once per session; further databases are copies."""
    template, create = tmp_path_factory.mktemp("template") / "mlflow.db", server.create_database

    def copy(path: Path) -> None:
        if path.is_file() and path.stat().st_size:
            return
        create(template)  # does nothing if it exists
        shutil.copy(template, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "create_database", copy)
        yield


@pytest.fixture(scope="session")
def mnist_root() -> Path:
    root = Path(os.environ.get("FFDIST_DATA", Path.home() / ".cache/ffdist"))
    if not (root / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").is_file():
        pytest.skip(f"MNIST is not in {root}; set FFDIST_DATA to a folder that has MNIST/raw")
    return root


@pytest.fixture(scope="module")
def ray_start_4_cpus():
    with local_ray(num_cpus=4):
        yield


@pytest.fixture(scope="session")
def ffdist_in() -> Callable[..., str]:
    """Returns a function that runs the command line in a folder, in the process of the test.

    Its arguments are the folder, the arguments of the command and the expected exit code. It returns the output.
    """

    def run(folder: Path, *arguments: str | Path, code: int = 0) -> str:
        with chdir(folder):
            result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert result.exit_code == code, (result.output, result.exception)
        return result.output

    return run


@pytest.fixture
def ffdist(ffdist_in, tmp_path, monkeypatch) -> Callable[..., str]:
    """Returns the function of `ffdist_in` for the folder of the test."""
    monkeypatch.chdir(tmp_path)
    return partial(ffdist_in, tmp_path)


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]
