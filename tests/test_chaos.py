"""Real faults of every kind befall real runs, which end as the undisturbed one does."""

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

# Each of the others has a twin that is cheaper: actors, drivers and writers that die anywhere (test_simulation), stalls
# (test_recovery), a lost node (test_precision), damaged checkpoints and a full disk (test_checkpoint, test_folder),
# signals (test_cli, test_resume), a tracking server that is away or fails (test_tracker, test_sync).
QUICK = ["stage", "driver", "packet loss"]
CONFIG = [  # labels are in flight at any time
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
        times = 0 if row["skipped"] else 1
        assert row["injected"] == row["survived"] == row["weights equal"] == row["metrics whole"] == times
        if row["fault"] not in TRANSIENT_KINDS and times:
            assert row["seconds"] == pytest.approx(sum(row[phase] for phase in PHASES))
    names = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    assert not [name for name in names if "ffdist-chaos-" in name]


def wait_for_driver(campaign):
    """Waits for a training over the campaign's cluster; returns its process and the cluster's address."""
    while campaign.poll() is None:
        for process in campaign.children(recursive=True):
            with suppress(psutil.Error):
                command = process.cmdline()
                if "train" in command and "--address" in command:
                    return process, command[command.index("--address") + 1]
        time.sleep(0.1)
    raise AssertionError("the campaign ended")


def join(host, address, environment):
    """Joins a cluster from one of its hosts, a file that stands for a network namespace."""
    is_ours = os.fstat(host.fileno()).st_ino == Path("/proc/self/ns/net").stat().st_ino
    enter = [] if is_ours else ["nsenter", f"--net=/proc/{os.getpid()}/fd/{host.fileno()}"]
    command = [sys.executable, "-c", JOIN, address]
    return subprocess.run(enter + command, env=environment, capture_output=True, text=True, timeout=200)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_faults_leave_no_trace_and_nobody_else_can_join_the_cluster(tmp_path):
    kinds = [option for kind in QUICK for option in ("--kind", kind)]
    campaign = start_campaign(tmp_path, *kinds, "--faults", str(len(QUICK)), "--seed", "2")
    try:
        driver, address = wait_for_driver(campaign)
        owner, stranger = driver.environ(), {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
        assert stat.S_IMODE(Path(owner["RAY_AUTH_TOKEN_PATH"]).stat().st_mode) == 0o600
        with Path(f"/proc/{driver.pid}/ns/net").open() as host:  # it outlives this driver
            assert "2 nodes" in join(host, address, owner).stdout
            for environment in (stranger, stranger | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}):
                refused = join(host, address, environment)
                assert refused.returncode
                assert "auth" in refused.stderr.lower(), refused.stderr
        check_campaign(campaign, tmp_path, [kind for kind in KINDS if kind in QUICK])
    finally:
        if campaign.poll() is None:
            campaign.terminate()
            campaign.wait()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_kind_of_fault_is_survived_and_leaves_no_trace(tmp_path):
    """The command of ffdist/chaos/README.md, with every kind once."""
    check_campaign(start_campaign(tmp_path, "--faults", str(len(KINDS)), "--seed", "2"), tmp_path, list(KINDS))


def test_each_failure_is_named_with_its_cause():
    truth = RunResult("0123", {"loss": [(1, 0.5)]}, [])
    faults = [
        FaultResult("stage", 1, True, "", 1, {}),
        FaultResult("driver", 2, False, "timed out after 600 s waiting for the recovery", 1, {}),
        FaultResult("lost node", 5, True, "", 1, {}),
        FaultResult("readout", 3, True, "", 1, {}),
        FaultResult("checkpoint writer", 4, True, "", 1, {}),
    ]
    ends = {
        1: truth,
        2: "exit code 1",
        3: truth._replace(weights_sha256="4567"),
        4: RunResult("0123", {}, []),
        5: "no checkpoint",
    }
    report = Report(list(KINDS), {}, faults, ends, truth, 60.0)
    assert report.failures() == [
        "driver (run 2): timed out after 600 s waiting for the recovery",
        "run 3, with readout: its final weights differ from the undisturbed run's",
        "run 4, with checkpoint writer: metrics that differ from the undisturbed run's: loss",
        "run 5, with lost node: no checkpoint",
    ]
    assert report._replace(faults=faults[:1], runs={1: truth}).failures() == []
    assert report._replace(faults=[], runs={}).failures() == ["no fault was injected; give more --minutes"]


def test_an_unknown_kind_is_refused(ffdist):
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
    """A function that sends bytes to the second host, gets them back, and returns the seconds that it took."""
    if "packet loss" in impossible_kinds():
        pytest.skip(impossible_kinds()["packet loss"])

    def measure(size):
        start = time.monotonic()
        connection.sendall(bytes(size))
        while size:
            size -= len(connection.recv(1 << 16))
        return time.monotonic() - start

    outside = Path("/proc/self/ns/net").readlink()
    with Network() as network:
        assert Path("/proc/thread-self/ns/net").readlink() != outside
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
    assert Path("/proc/self/ns/net").readlink() == outside


def test_the_network_delays_limits_drops_and_heals(echo):
    network, measure = echo
    assert network.set_link(Link(delay_s=0.1))[0] > 0
    assert measure(1) >= 0.2
    network.set_link(Link(bytes_per_s=200_000))
    assert measure(100_000) >= 0.5
    network.set_link(Link(loss=0.2))
    measure(100_000)
    assert network.set_link(Link(loss=1))[1] > 0
    healing = threading.Timer(1, lambda: network.set_link(Link()))
    healing.start()
    assert measure(1) >= 0.9
