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

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # what is tested here is decided alike on every machine
os.environ.pop("MLFLOW_TRACKING_URI", None)
os.environ.pop("RAY_ADDRESS", None)
for number in STOP_SIGNALS:  # which nohup has every process ignore
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
RAY_FOLDER = TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)  # no cluster of others is found there
os.environ["RAY_TMPDIR"] = RAY_FOLDER.name
torch.set_num_threads(1)  # as a stage does; two that share a busy processor wait for each other over tiny tensors


LONG = ("test_chaos", "test_launching", "test_transparency", "test_recovery", "test_bench")
"""Files with tests of minutes: they come first, so that no worker is left alone with one at the end."""


@pytest.hookimpl(trylast=True)  # after plugins that change the order
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    first = {item.path: number for number, item in reversed(list(enumerate(items)))}  # of each file

    def key(item: pytest.Item) -> tuple[bool, int, bool]:
        """Keeps files together. Within one, tests that share its Ray are last: others may need that there is none."""
        return item.path.stem not in LONG, first[item.path], "ray_start_4_cpus" in getattr(item, "fixturenames", ())

    items.sort(key=key)


@pytest.fixture(scope="session", autouse=True)
def tracking_database_template(tmp_path_factory):
    """MLflow's 68 migrations take seconds: they run once per session, and every further database is a copy."""
    template, create = tmp_path_factory.mktemp("template") / "mlflow.db", server.create_database

    def copy(path: Path) -> None:
        if path.is_file() and path.stat().st_size:
            return
        create(template)  # does nothing once it is there
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
