"""Real faults of every kind are injected into runs, whose results must equal those of an undisturbed run."""

import json
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from ffdist.chaos.campaign import PHASES, FaultResult, Report, RunResult
from ffdist.chaos.faults import KINDS, TRANSIENT_KINDS, impossible_kinds
from ffdist.chaos.network import ADDRESSES, Link, Network

# The other kinds have cheaper tests: actors, drivers and writers that die at any point (test_simulation), stalls
# (test_recovery), a lost node (test_precision), damaged checkpoints and a full disk (test_checkpoint, test_folder),
# signals (test_cli, test_resume), a tracking server that is unavailable or fails (test_tracker, test_sync).
QUICK = ["stage", "driver", "packet loss"]
CONFIG = [  # labels that the readout predicted are always in flight
    "digits",
    "training.epochs=40",
    "pipeline.stages=1",
    "negatives.kind=hard_label",
    "training.validation_samples=200",
    "training.validate_every_epochs=20",
]
JOIN = "import ray, sys; ray.init(address=sys.argv[1], logging_level='ERROR'); print(len(ray.nodes()), 'nodes')"


def start_campaign(folder, *options):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-m", "ffdist.cli", "chaos", *CONFIG, *options, "--json", folder / "table.json"]
    with (folder / "output.txt").open("w") as output:
        return psutil.Popen(command, stdout=output, stderr=output, cwd=folder, env=environment | {"HOME": str(folder)})


def check_campaign(campaign, folder, kinds):
    code, output = campaign.wait(), (folder / "output.txt").read_text()
    assert code == 0, output
    rows, skipped = json.loads((folder / "table.json").read_text())["rows"], impossible_kinds()
    assert [row["fault"] for row in rows] == kinds
    for row in rows:
        assert f"| {row['fault']} " in output
        assert row["skipped"] == skipped.get(row["fault"], "")
        expected_count = 0 if row["skipped"] else 1
        assert row["injected"] == row["survived"] == row["weights equal"] == row["metrics whole"] == expected_count
        if row["fault"] not in TRANSIENT_KINDS and expected_count:
            assert row["seconds"] == pytest.approx(sum(row[phase] for phase in PHASES))
    commands = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    assert not [command for command in commands if "ffdist-chaos-" in command]


def wait_for_driver(campaign):
    """Waits for a driver of the campaign; returns its process and the address of the cluster."""
    while campaign.poll() is None:
        for process in campaign.children(recursive=True):
            with suppress(psutil.Error):
                command = process.cmdline()
                if "train" in command and "--address" in command:
                    return process, command[command.index("--address") + 1]
        time.sleep(0.1)
    raise AssertionError("the campaign ended")


def join(host, address, environment):
    """Joins a cluster from a host, which is given by an open file of its network namespace."""
    is_own_namespace = os.fstat(host.fileno()).st_ino == Path("/proc/self/ns/net").stat().st_ino
    enter = [] if is_own_namespace else ["nsenter", f"--net=/proc/{os.getpid()}/fd/{host.fileno()}"]
    command = [sys.executable, "-c", JOIN, address]
    return subprocess.run(enter + command, env=environment, capture_output=True, text=True, timeout=200)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_faults_do_not_change_results_and_the_cluster_requires_its_token(tmp_path):
    kinds = [option for kind in QUICK for option in ("--kind", kind)]
    campaign = start_campaign(tmp_path, *kinds, "--faults", str(len(QUICK)), "--seed", "2")
    try:
        driver, address = wait_for_driver(campaign)
        with_token, without_token = driver.environ(), {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
        assert stat.S_IMODE(Path(with_token["RAY_AUTH_TOKEN_PATH"]).stat().st_mode) == 0o600
        with Path(f"/proc/{driver.pid}/ns/net").open() as host:  # keeps the namespace when the driver exits
            assert "2 nodes" in join(host, address, with_token).stdout
            for environment in (without_token, without_token | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}):
                result = join(host, address, environment)
                assert result.returncode
                assert "auth" in result.stderr.lower(), result.stderr
        check_campaign(campaign, tmp_path, [kind for kind in KINDS if kind in QUICK])
    finally:
        if campaign.poll() is None:
            campaign.terminate()
            campaign.wait()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_kind_of_fault_is_survived_and_leaves_no_trace(tmp_path):
    """Runs the command of ffdist/chaos/README.md with one fault of each kind."""
    check_campaign(start_campaign(tmp_path, "--faults", str(len(KINDS)), "--seed", "2"), tmp_path, list(KINDS))


def test_report_lists_each_failure_with_its_cause():
    reference = RunResult("0123", {"loss": [(1, 0.5)]}, [])
    faults = [
        FaultResult("stage", 1, True, "", 1, {}),
        FaultResult("driver", 2, False, "timed out after 600 s waiting for the recovery", 1, {}),
        FaultResult("lost node", 5, True, "", 1, {}),
        FaultResult("readout", 3, True, "", 1, {}),
        FaultResult("checkpoint writer", 4, True, "", 1, {}),
    ]
    results = {
        1: reference,
        2: "exit code 1",
        3: reference._replace(weights_sha256="4567"),
        4: RunResult("0123", {}, []),
        5: "no checkpoint",
    }
    report = Report(list(KINDS), {}, faults, results, reference, 60.0)
    assert report.failures() == [
        "driver (run 2): timed out after 600 s waiting for the recovery",
        "run 3, with readout: its final weights differ from the undisturbed run's",
        "run 4, with checkpoint writer: metrics that differ from the undisturbed run's: loss",
        "run 5, with lost node: no checkpoint",
    ]
    assert report._replace(faults=faults[:1], runs={1: reference}).failures() == []
    assert report._replace(faults=[], runs={}).failures() == ["no fault was injected; give more --minutes"]


def test_unknown_kind_of_fault_is_refused(ffdist):
    assert "--kind must be one of stage, " in ffdist("chaos", "digits", "--kind", "meteor", code=2)


ECHO = """
import socket
server = socket.create_server(("10.211.0.2", 5000))
while True:
    connection, _ = server.accept()
    while block := connection.recv(1 << 16):
        connection.sendall(block)
"""


@pytest.fixture
def echo():
    """Yields a network, and a function that returns the round-trip time of a number of bytes to the second host."""
    if "packet loss" in impossible_kinds():
        pytest.skip(impossible_kinds()["packet loss"])

    def measure(size):
        start = time.monotonic()
        connection.sendall(bytes(size))
        while size:
            size -= len(connection.recv(1 << 16))
        return time.monotonic() - start

    original_namespace = Path("/proc/self/ns/net").readlink()
    with Network() as network:
        assert Path("/proc/thread-self/ns/net").readlink() != original_namespace
        with network.second_host():
            server = subprocess.Popen([sys.executable, "-c", ECHO])
        for _ in range(100):
            try:
                connection = socket.create_connection((ADDRESSES[1], 5000), timeout=30)
                break
            except OSError:
                time.sleep(0.1)
        measure(1)
        yield network, measure
        connection.close()
        server.kill()
        server.wait()
    assert Path("/proc/self/ns/net").readlink() == original_namespace


def test_link_can_delay_limit_and_drop_packets_and_recovers(echo):
    network, measure = echo
    assert network.set_link(Link(delay_s=0.1))[0] > 0
    assert measure(1) >= 0.2
    network.set_link(Link(bytes_per_s=200_000))
    assert measure(100_000) >= 0.5
    network.set_link(Link(loss=0.2))
    measure(100_000)
    assert network.set_link(Link(loss=1))[1] > 0
    recovery = threading.Timer(1, lambda: network.set_link(Link()))
    recovery.start()
    assert measure(1) >= 0.9
