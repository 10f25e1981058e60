"""The script of GPU checks, on a CPU."""

import subprocess
import sys
from pathlib import Path

import gpu
import pytest
import torch

from ffdist.ff.keyed import generator
from ffdist.ff.specs import Conv


@pytest.fixture(scope="module")
def data():
    source, sizes = generator(0, "images"), {"train": 640, "test": 100}
    arrays = {
        name: torch.randint(256, (n, 3 * 32 * 32), generator=source, dtype=torch.uint8) for name, n in sizes.items()
    }
    arrays |= {f"{name}_labels": torch.randint(10, (n,), generator=source) for name, n in sizes.items()}
    return arrays | {"shape": torch.tensor([3, 32, 32])}


def test_digests_are_printed_for_several_distributions(data, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "SMALL", {name: gpu.SMALL[name] for name in ("augmented", "goodness")})
    gpu.check_digests(data, "cpu")
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 12
    assert len({tuple(row[1:3]) for row in rows}) == len({row[5] for row in rows}) == 4


def test_wide_network_is_trained_within_the_budget(data, capsys):
    layers = Conv(4, pool="max"), Conv(4, pool="max"), Conv(8, pool="max"), Conv(8)
    gpu.train_wide(data, "cpu", 1.0, layers=layers, num_samples=256)
    assert "by goodness" in capsys.readouterr().out.splitlines()[-1]


def test_script_needs_only_torch_and_numpy():
    missing = ("ray", "mlflow", "pydantic", "yaml", "pyarrow", "torchvision", "PIL", "rich", "matplotlib", "psutil")
    program = f"import sys; sys.modules |= dict.fromkeys({missing}); sys.path.insert(0, sys.argv[1]); import gpu"
    command = [sys.executable, "-c", f"{program}; print(len(gpu.SMALL))", str(Path(__file__).parent)]
    output = subprocess.run(command, capture_output=True, text=True)
    assert output.stdout == f"{len(gpu.SMALL)}\n", output.stderr
