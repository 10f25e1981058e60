"""Which Ray a command starts or joins, and who else can reach it."""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from ffdist import load_config, train
from ffdist.errors import ConfigError
from ffdist.runtime.access import find_cluster, private_ray
from ffdist.runtime.cluster import connect
from ffdist.runtime.placement import reserve

ROOT = Path(__file__).parent.parent
NO_ARTIFACTS = "tracking.artifacts=[]"


def test_a_cluster_of_this_machine_is_one_by_ray_start(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert find_cluster(None) == "local"
    with pytest.raises(ConfigError, match=r"no cluster was started on this machine by `ray start`"):
        find_cluster("auto")
    file = tmp_path / "ray" / "ray_current_cluster"
    file.parent.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        file.write_text(address)
        assert find_cluster(None) == find_cluster("auto") == address
        monkeypatch.setenv("RAY_ADDRESS", "local")
        assert find_cluster(None) == "local"
        monkeypatch.delenv("RAY_ADDRESS")
    with pytest.raises(ConfigError, match=f"no Ray cluster answers at {address}.*by `ray start`, or set --address"):
        find_cluster(None)


def test_a_private_ray_has_a_short_folder_and_a_token_of_its_own(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_TMPDIR")
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("x" * 50)))
    monkeypatch.setenv("HOME", "/proc")  # where nobody can write
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of another cluster")
    with private_ray() as folder:
        token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
        assert (token.stat().st_mode & 0o777, folder.stat().st_mode & 0o777) == (0o600, 0o700)
        assert len(token.read_text()) == 64
        assert (os.environ["RAY_AUTH_MODE"], "RAY_AUTH_TOKEN" in os.environ) == ("token", False)
    assert not folder.exists()
    assert os.environ["RAY_AUTH_TOKEN"] == "of another cluster"
    assert "RAY_AUTH_MODE" not in os.environ
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("x" * 50)))
    with pytest.raises(ConfigError, match=r"at most 24 bytes \(tried: .*x\); set RAY_TMPDIR"), private_ray():
        pass


@pytest.fixture
def neighbour():
    """Another machine, as far as the network is concerned: the command that enters it, and our address there."""
    ours, name, stack = "10.231.77.1", f"ff{os.getpid()}"[:12], ExitStack()
    try:
        holder = stack.enter_context(subprocess.Popen(["unshare", "--net", "sleep", "1000"]))
        stack.callback(holder.kill)
        namespace = Path(f"/proc/{holder.pid}/ns/net")
        while holder.poll() is None and namespace.readlink() == Path("/proc/self/ns/net").readlink():
            time.sleep(0.01)
        enter = ["nsenter", f"--net={namespace}"]
        stack.callback(subprocess.run, ["ip", "link", "delete", name], check=False, capture_output=True)
        for words in (
            f"ip link add {name} type veth peer name {name}b netns {holder.pid}",
            f"ip address add {ours}/24 dev {name}",
            f"ip link set {name} up",
            f"{shlex.join(enter)} ip address add 10.231.77.2/24 dev {name}b",
            f"{shlex.join(enter)} ip link set {name}b up",
        ):
            subprocess.run(shlex.split(words), check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        stack.close()
        pytest.skip(f"network namespaces are not permitted: {getattr(error, 'stderr', error)}")
    with stack:
        yield enter, ours


CALL = """
import socket, sys
for port in sys.argv[2:]:
    try:
        socket.create_connection((sys.argv[1], int(port)), 5).close()
        print(port)
    except ConnectionRefusedError:
        pass
"""


def test_a_local_ray_is_refused_to_other_machines_and_commands(neighbour, tmp_path, monkeypatch):
    """Threads share it, it ends with its last user, and what it set in this process is as before."""
    enter, ours = neighbour
    before = dict(os.environ)

    def listening() -> set[int]:
        own = {os.getpid(), *(process.pid for process in psutil.Process().children(recursive=True))}
        ports = psutil.net_connections("tcp")
        return {port.laddr.port for port in ports if port.status == psutil.CONN_LISTEN and port.pid in own}

    others = listening()
    with connect("local") as joined:
        joined()
        import ray

        @ray.remote
        def folders() -> list[str]:
            return sys.path

        assert str(Path.cwd()) not in set(ray.get(folders.remote())) - set(sys.path)
        ports = sorted(listening() - others)
        assert len(ports) >= 5
        address = ray.get_runtime_context().gcs_address
        call = [*enter, sys.executable, "-c", CALL]
        with socket.create_server((ours, 0)) as server:
            open_port = server.getsockname()[1]
            answered = subprocess.run([*call, ours, *map(str, [*ports, open_port])], capture_output=True, text=True)
        assert answered.stdout.split() == [str(open_port)], answered.stderr
        no_token = {name: value for name, value in before.items() if not name.startswith("RAY_")}
        join = [sys.executable, "-c", f"from ffdist import *; train('digits', address='{address}', runs='{tmp_path}')"]
        refused = subprocess.run(join, env=no_token | {"HOME": str(tmp_path)}, capture_output=True, text=True)
        assert "needs a token, and this process has none or another (RAY_AUTH_MODE: not set); copy" in refused.stderr
        monkeypatch.setenv("RAY_TMPDIR", before["RAY_TMPDIR"])
        with pytest.raises(ConfigError, match="`ray start`"):
            find_cluster("auto")
        monkeypatch.undo()
        with ThreadPoolExecutor(1) as thread:
            with reserve([{"CPU": 1}]):
                monkeypatch.setattr("ffdist.runtime.placement.PLACEMENT_TIMEOUT_S", 2.0)
                waiting = thread.submit(reserve_all_cpus)
                with pytest.raises(TimeoutError):
                    waiting.result(4)
            waiting.result(60)
        assert ray.is_initialized()
        with pytest.raises(ConfigError, match="one Ray cluster at a time"), connect(address):
            pass
    assert not ray.is_initialized()
    names = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_TMPDIR", "RAY_USAGE_STATS_ENABLED"
    assert [os.environ.get(name) for name in names] == [before.get(name) for name in names]


def test_an_error_in_the_settings_is_raised_before_ray_starts(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr("ray.init", lambda *address, **options: started.append(address))
    with pytest.raises(ConfigError, match="batch_size must be at most"):
        train(load_config("digits", ["training.batch_size=5000"]), runs=tmp_path)
    assert not started


def reserve_all_cpus() -> None:
    import ray

    with connect("local") as joined:
        joined()
        with reserve([{"CPU": 1}] * int(ray.cluster_resources()["CPU"])):
            pass


FOREIGN = ("torch", "numpy", "queue", "pickle", "ray", "mlflow", "click")
KIND = "from ffdist.ff.negatives import wrong_label as kind\n"


def test_runs_side_by_side_import_nothing_from_their_folder_but_the_users_negatives(tmp_path):
    """Nor do they need a home, an entry in passwd or a short TMPDIR, and each ends as it does alone."""
    for name in FOREIGN:
        (tmp_path / f"{name}.py").write_text(f"open('imported', 'a').write('{name} ')\n")
    (tmp_path / "ffdist").mkdir()
    (tmp_path / "ffdist" / "pipeline.py").write_text("open('imported', 'a').write('ffdist ')\n")
    (tmp_path / "own.py").write_text(KIND)
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\n")
    temporary = tmp_path / ("x" * 100)
    temporary.mkdir()
    words = ["model.layers=[9]", "training.epochs=1", "training.precision=float32", "negatives.kind=own:kind"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": "/proc", "TMPDIR": str(temporary)}  # neither can be used
    anybody = shlex.split("setpriv --reuid=12345 --inh-caps=+dac_override --ambient-caps=+dac_override env -u HOME")
    if os.geteuid() or not shutil.which("setpriv"):
        anybody = []
    scripts = (
        [*anybody, str(Path(sys.executable).parent / "ffdist"), "train", NO_ARTIFACTS, "pipeline.balance=estimated"],
        [sys.executable, str(ROOT / "ffdist" / "run.py"), "--runner", "serial"],
    )
    started = [
        subprocess.Popen(
            [*script, "digits", *words, "--summary", f"{number}.json"],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number, script in enumerate(scripts)
    ]
    said = [process.communicate(timeout=200)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert not (tmp_path / "imported").exists(), (tmp_path / "imported").read_text()
    assert len(list(tmp_path.glob("runs/*/goodness.png"))) == 1, said
    digests = {json.loads((tmp_path / f"{number}.json").read_text())["weights_sha256"] for number in range(2)}
    words = [*words[:3], "negatives.kind=wrong_label", NO_ARTIFACTS]
    alone = train(load_config("digits", words), runner="serial", runs=tmp_path)
    assert digests == {alone.summary["weights_sha256"]}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_commands_at_once_in_one_folder_end_as_they_do_alone(tmp_path, free_port):
    (tmp_path / "small.yaml").write_text("{data: {name: digits}, model: {layers: [9]}, training: {epochs: 1}}")
    words = ["small.yaml", NO_ARTIFACTS]
    alone = train(load_config(str(tmp_path / "small.yaml"), [NO_ARTIFACTS]), runner="serial", runs=tmp_path / "runs")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    ffdist = str(Path(sys.executable).parent / "ffdist")
    commands = {
        "train": [ffdist, "train", *words, "--summary", "train.json"],
        "run.py": [sys.executable, str(ROOT / "ffdist" / "run.py"), *words, "--summary", "run.py.json"],
        "reproduce": [ffdist, "reproduce", "small.yaml", "--seeds", "2"],
        "bench": [ffdist, "bench", "pipeline", *words, "--seconds", "1"],
        "chaos": [ffdist, "chaos", *words, "training.epochs=200", "--faults", "1", "--kind", "stage"],
    }
    options = {
        "cwd": tmp_path,
        "env": environment,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
    }
    ui = subprocess.Popen([ffdist, "ui", "--port", str(free_port)], **options, start_new_session=True)
    try:
        started = {name: subprocess.Popen(command, **options) for name, command in commands.items()}
        said = {name: process.communicate(timeout=600)[0] for name, process in started.items()}
        assert {name: process.returncode for name, process in started.items()} == dict.fromkeys(commands, 0), said
        with socket.create_connection(("127.0.0.1", free_port), 10):
            assert ui.poll() is None
    finally:
        os.killpg(ui.pid, signal.SIGTERM)
        ui.communicate()
    for name in ("train", "run.py"):
        assert json.loads((tmp_path / f"{name}.json").read_text())["weights_sha256"] == alone.summary["weights_sha256"]
