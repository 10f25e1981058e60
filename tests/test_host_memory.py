"""What a run may take is computed before it starts, and holds."""

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

FEW = ["training.validation_samples=960", "training.batch_size=20"]
"""Settings that leave two minibatches."""
PEAK = """
import json, re, sys, threading, time
from contextlib import suppress
from pathlib import Path
import psutil
from ffdist import load_config, train

import ffdist.plotting.figures, mlflow  # whose memory is not the network's
import ffdist.training.prepare, ffdist.training.trainer

def memory():
    "Of this process, or of it, all actors and the object store, each page once."
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


@pytest.mark.parametrize(("runner", "units", "artifacts"), [("serial", 5000, "[model]"), ("ray", 2000, "[]")])
def test_a_run_takes_no_more_memory_than_it_says(runner, units, artifacts, tmp_path):
    """In this process, two layers of 100 MB of weights each, which it held up to six times at the end of a run."""
    words = [f"model.layers=[{units},{units},{units}]", "training.epochs=1", f"tracking.artifacts={artifacts}", *FEW]
    command = [sys.executable, "-c", PEAK, json.dumps(words), runner]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=tmp_path)
    before, peak = json.loads(done.stdout.splitlines()[-1])
    bound = 1e9 * float(re.findall(r"host memory: up to ([\d.]+) GB", done.stdout)[-1])
    assert 0.25 * bound < peak - before < bound


def test_memory_is_checked_at_the_start_and_not_in_a_recovery(monkeypatch):
    """By then part of it is the run's own."""
    config = load_config("digits", ["training.precision=float32"])
    prepared = prepare(config)
    with allocate("serial", prepared, config, machine_resources) as place:
        monkeypatch.setattr("ffdist.host_memory.available_bytes", lambda: 0)
        assert "host memory" not in assign_layers(place, prepared, config, None, again=True).description
        with pytest.raises(
            ConfigError, match=r"must fit into the available host memory \(needed: .* available: 0.0 GB"
        ):
            assign_layers(place, prepared, config, None)


@pytest.mark.parametrize(
    ("membership", "files", "left"),
    [
        ("0::/a/b", {"a/memory.max": "max", "a/b/memory.max": "5000", "a/b/memory.current": "1000"}, 4200),
        ("0::/a/b", {"memory.max": "5000", "memory.current": "1000"}, 4200),
        ("3:memory:/a", {"memory/memory.limit_in_bytes": "700", "memory/memory.usage_in_bytes": "100"}, 800),
        ("3:memory:/a", {"memory/memory.limit_in_bytes": "70", "memory/memory.usage_in_bytes": "1000"}, 0),
        ("0::/a", {}, None),
    ],
)
def test_a_containers_limit_counts(membership, files, left, tmp_path):
    (tmp_path / "cgroup").write_text(f"1:cpu:/\n{membership}\n")
    for name, text in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
        (path.parent / "memory.stat").write_text("anon 1\ninactive_file 200\n")
    found = available_bytes(tmp_path / "groups", tmp_path / "cgroup")
    assert found == left if left is not None else found > 10**6
