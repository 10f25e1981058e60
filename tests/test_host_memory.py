"""An upper bound of the memory of a run is computed before the run starts, and holds."""

import json
import re
import subprocess
import sys

import pytest

from ffdist import ConfigError, load_config
from ffdist.host_memory import available_bytes
from ffdist.runtime.cluster import machine_resources
from ffdist.training.launch import allocate, assign_layers
from ffdist.training.prepare import prepare

TWO_MINIBATCHES = ["training.validation_samples=960", "training.batch_size=20"]
"""Settings of a run with two minibatches."""
PEAK = """
import json, re, sys, threading, time
from contextlib import suppress
from pathlib import Path
import psutil
from ffdist import load_config, train

import ffdist.plotting.figures, mlflow  # imported here, so that their memory is not counted
import ffdist.training.prepare, ffdist.training.trainer

def memory():
    "Returns the memory of this process, or also of all actors and the object store, and counts each page once."
    if runner == "serial":
        return process.memory_info().rss
    total = 0
    for each in (process, *process.children(recursive=True)):
        with suppress(psutil.Error, OSError):
            if each is process or " ".join(each.cmdline()).startswith("ray::"):
                rollup = Path(f"/proc/{each.pid}/smaps_rollup").read_text()
                total += 1024 * int(re.search(r"Pss: +([0-9]+)", rollup)[1])
    return total

def watch():
    while True:
        peak[0] = max(peak[0], memory())
        time.sleep(pause_s)

process, peak, runner = psutil.Process(), [0], sys.argv[2]
pause_s = 0.002 if runner == "serial" else 0.05
config = load_config("xor", json.loads(sys.argv[1]))
train(load_config("xor", ["model.layers=[9,9]", "training.epochs=1"]), runner="serial", runs="small")
before = memory()
threading.Thread(target=watch, daemon=True).start()
run = train(config, runner=runner, address="local", runs="large")
print(json.dumps([before, peak[0]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("runner", "units", "artifacts"), [("serial", 5000, "[model]"), ("ray", 2000, "[]")])
def test_memory_of_a_run_stays_below_its_stated_bound(runner, units, artifacts, tmp_path):
    """The serial run has two layers of 100 MB of weights each; an earlier version held up to six copies of them."""
    settings = [
        f"model.layers=[{units},{units},{units}]",
        "training.epochs=1",
        f"tracking.artifacts={artifacts}",
        *TWO_MINIBATCHES,
    ]
    command = [sys.executable, "-c", PEAK, json.dumps(settings), runner]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=tmp_path)
    before, peak = json.loads(result.stdout.splitlines()[-1])
    bound = 1e9 * float(re.findall(r"host memory: up to ([\d.]+) GB", result.stdout)[-1])
    assert 0.25 * bound < peak - before < bound


def test_memory_is_checked_at_the_start_and_not_in_a_recovery(monkeypatch):
    """In a recovery, the run already uses part of the memory."""
    config = load_config("digits", ["training.precision=float32"])
    prepared = prepare(config)
    with allocate("serial", prepared, config, machine_resources) as allocation:
        monkeypatch.setattr("ffdist.host_memory.available_bytes", lambda: 0)
        assert "host memory" not in assign_layers(allocation, prepared, config, None, again=True).description
        with pytest.raises(
            ConfigError, match=r"must fit into the available host memory \(needed: .* available: 0.0 GB"
        ):
            assign_layers(allocation, prepared, config, None)


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/a/b", {"a/memory.max": "max", "a/b/memory.max": "5000", "a/b/memory.current": "1000"}, 4200),
        ("0::/a/b", {"memory.max": "5000", "memory.current": "1000"}, 4200),
        ("3:memory:/a", {"memory/memory.limit_in_bytes": "700", "memory/memory.usage_in_bytes": "100"}, 800),
        ("3:memory:/a", {"memory/memory.limit_in_bytes": "70", "memory/memory.usage_in_bytes": "1000"}, 0),
        ("0::/a", {}, None),
    ],
)
def test_memory_limit_of_a_container_is_respected(membership, files, expected, tmp_path):
    (tmp_path / "cgroup").write_text(f"1:cpu:/\n{membership}\n")
    for name, text in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
        (path.parent / "memory.stat").write_text("anon 1\ninactive_file 200\n")
    actual = available_bytes(tmp_path / "groups", tmp_path / "cgroup")
    assert actual == expected if expected is not None else actual > 10**6
