"""Which Ray cluster a command starts or joins, and who can access it."""

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


def test_find_cluster_only_uses_a_cluster_of_ray_start(tmp_path, monkeypatch):
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


def test_private_ray_has_a_short_folder_and_its_own_token(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_TMPDIR")
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("x" * 50)))
    monkeypatch.setenv("HOME", "/proc")  # not writable
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
def other_machine():
    """Simulates another machine by a network namespace; yields the command that enters it, and our address there."""
    own_address, link, stack = "10.231.77.1", f"ff{os.getpid()}"[:12], ExitStack()
    try:
        holder = stack.enter_context(subprocess.Popen(["unshare", "--net", "sleep", "1000"]))
        stack.callback(holder.kill)
        namespace = Path(f"/proc/{holder.pid}/ns/net")
        while holder.poll() is None and namespace.readlink() == Path("/proc/self/ns/net").readlink():
            time.sleep(0.01)
        enter = ["nsenter", f"--net={namespace}"]
        stack.callback(subprocess.run, ["ip", "link", "delete", link], check=False, capture_output=True)
        for command in (
            f"ip link add {link} type veth peer name {link}b netns {holder.pid}",
            f"ip address add {own_address}/24 dev {link}",
            f"ip link set {link} up",
            f"{shlex.join(enter)} ip address add 10.231.77.2/24 dev {link}b",
            f"{shlex.join(enter)} ip link set {link}b up",
        ):
            subprocess.run(shlex.split(command), check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        stack.close()
        pytest.skip(f"network namespaces are not permitted: {getattr(error, 'stderr', error)}")
    with stack:
        yield enter, own_address


CONNECT = """
import socket, sys
for port in sys.argv[2:]:
    try:
        socket.create_connection((sys.argv[1], int(port)), 5).close()
        print(port)
    except ConnectionRefusedError:
        pass
"""


def test_local_ray_is_not_accessible_to_other_machines_and_commands(other_machine, tmp_path, monkeypatch):
    """Threads share the cluster, its last user stops it, and the environment of this process is restored."""
    enter, own_address = other_machine
    before = dict(os.environ)

    def listening_ports() -> set[int]:
        pids = {os.getpid(), *(process.pid for process in psutil.Process().children(recursive=True))}
        connections = psutil.net_connections("tcp")
        return {conn.laddr.port for conn in connections if conn.status == psutil.CONN_LISTEN and conn.pid in pids}

    previous_ports = listening_ports()
    with connect("local") as wait_for_ray:
        wait_for_ray()
        import ray

        @ray.remote
        def import_path() -> list[str]:
            return sys.path

        assert str(Path.cwd()) not in set(ray.get(import_path.remote())) - set(sys.path)
        ports = sorted(listening_ports() - previous_ports)
        assert len(ports) >= 5
        address = ray.get_runtime_context().gcs_address
        command = [*enter, sys.executable, "-c", CONNECT]
        with socket.create_server((own_address, 0)) as server:
            open_port = server.getsockname()[1]
            probe = subprocess.run(
                [*command, own_address, *map(str, [*ports, open_port])], capture_output=True, text=True
            )
        assert probe.stdout.split() == [str(open_port)], probe.stderr
        environment = {name: value for name, value in before.items() if not name.startswith("RAY_")}
        join_command = [
            sys.executable,
            "-c",
            f"from ffdist import *; train('digits', address='{address}', runs='{tmp_path}')",
        ]
        result = subprocess.run(join_command, env=environment | {"HOME": str(tmp_path)}, capture_output=True, text=True)
        assert "needs a token, and this process has none or another (RAY_AUTH_MODE: not set); copy" in result.stderr
        monkeypatch.setenv("RAY_TMPDIR", before["RAY_TMPDIR"])
        with pytest.raises(ConfigError, match="`ray start`"):
            find_cluster("auto")
        monkeypatch.undo()
        with ThreadPoolExecutor(1) as pool:
            with reserve([{"CPU": 1}]):
                monkeypatch.setattr("ffdist.runtime.placement.PLACEMENT_TIMEOUT_S", 2.0)
                reservation = pool.submit(reserve_all_cpus)
                with pytest.raises(TimeoutError):
                    reservation.result(4)
            reservation.result(60)
        assert ray.is_initialized()
        with pytest.raises(ConfigError, match="one Ray cluster at a time"), connect(address):
            pass
    assert not ray.is_initialized()
    names = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_TMPDIR", "RAY_USAGE_STATS_ENABLED"
    assert [os.environ.get(name) for name in names] == [before.get(name) for name in names]


def test_invalid_settings_are_an_error_before_ray_starts(tmp_path, monkeypatch):
    init_calls = []
    monkeypatch.setattr("ray.init", lambda *address, **options: init_calls.append(address))
    with pytest.raises(ConfigError, match="batch_size must be at most"):
        train(load_config("digits", ["training.batch_size=5000"]), runs=tmp_path)
    assert not init_calls


def reserve_all_cpus() -> None:
    import ray

    with connect("local") as wait_for_ray:
        wait_for_ray()
        with reserve([{"CPU": 1}] * int(ray.cluster_resources()["CPU"])):
            pass


SHADOWED_MODULES = ("torch", "numpy", "queue", "pickle", "ray", "mlflow", "click")
NEGATIVES = "from ffdist.ff.negatives import wrong_label as kind\n"


def test_concurrent_runs_import_only_user_defined_negatives_from_their_folder(tmp_path):
    """They also need no home folder, entry in passwd or short TMPDIR, and give the same result as a run alone."""
    for name in SHADOWED_MODULES:
        (tmp_path / f"{name}.py").write_text(f"open('imported', 'a').write('{name} ')\n")
    (tmp_path / "ffdist").mkdir()
    (tmp_path / "ffdist" / "pipeline.py").write_text("open('imported', 'a').write('ffdist ')\n")
    (tmp_path / "own.py").write_text(NEGATIVES)
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\n")
    temporary_folder = tmp_path / ("x" * 100)
    temporary_folder.mkdir()
    settings = ["model.layers=[9]", "training.epochs=1", "training.precision=float32", "negatives.kind=own:kind"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": "/proc", "TMPDIR": str(temporary_folder)}  # both are unusable
    as_user = shlex.split("setpriv --reuid=12345 --inh-caps=+dac_override --ambient-caps=+dac_override env -u HOME")
    if os.geteuid() or not shutil.which("setpriv"):
        as_user = []
    commands = (
        [*as_user, str(Path(sys.executable).parent / "ffdist"), "train", NO_ARTIFACTS, "pipeline.balance=estimated"],
        [sys.executable, str(ROOT / "ffdist" / "run.py"), "--runner", "serial"],
    )
    processes = [
        subprocess.Popen(
            [*command, "digits", *settings, "--summary", f"{number}.json"],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number, command in enumerate(commands)
    ]
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert not (tmp_path / "imported").exists(), (tmp_path / "imported").read_text()
    assert len(list(tmp_path.glob("runs/*/goodness.png"))) == 1, outputs
    digests = {json.loads((tmp_path / f"{number}.json").read_text())["weights_sha256"] for number in range(2)}
    settings = [*settings[:3], "negatives.kind=wrong_label", NO_ARTIFACTS]
    reference = train(load_config("digits", settings), runner="serial", runs=tmp_path)
    assert digests == {reference.summary["weights_sha256"]}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_concurrent_commands_in_one_folder_give_the_same_results_as_alone(tmp_path, free_port):
    (tmp_path / "small.yaml").write_text("{data: {name: digits}, model: {layers: [9]}, training: {epochs: 1}}")
    arguments = ["small.yaml", NO_ARTIFACTS]
    reference = train(
        load_config(str(tmp_path / "small.yaml"), [NO_ARTIFACTS]), runner="serial", runs=tmp_path / "runs"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    ffdist = str(Path(sys.executable).parent / "ffdist")
    commands = {
        "train": [ffdist, "train", *arguments, "--summary", "train.json"],
        "run.py": [sys.executable, str(ROOT / "ffdist" / "run.py"), *arguments, "--summary", "run.py.json"],
        "reproduce": [ffdist, "reproduce", "small.yaml", "--seeds", "2"],
        "bench": [ffdist, "bench", "pipeline", *arguments, "--seconds", "1"],
        "chaos": [ffdist, "chaos", *arguments, "training.epochs=200", "--faults", "1", "--kind", "stage"],
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
        processes = {name: subprocess.Popen(command, **options) for name, command in commands.items()}
        outputs = {name: process.communicate(timeout=600)[0] for name, process in processes.items()}
        assert {name: process.returncode for name, process in processes.items()} == dict.fromkeys(commands, 0), outputs
        with socket.create_connection(("127.0.0.1", free_port), 10):
            assert ui.poll() is None
    finally:
        os.killpg(ui.pid, signal.SIGTERM)
        ui.communicate()
    for name in ("train", "run.py"):
        assert (
            json.loads((tmp_path / f"{name}.json").read_text())["weights_sha256"] == reference.summary["weights_sha256"]
        )
