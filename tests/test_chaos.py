"""Real faults of every kind befall real runs, which end as the one that nothing befell."""

import json
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

from ffdist.chaos.campaign import STEPS
from ffdist.chaos.faults import BESIDE, KINDS
from ffdist.cli import main


@pytest.mark.timeout(1200)
def test_every_kind_of_fault_is_survived_and_leaves_no_trace(tmp_path):
    """The README's command with 16 faults, on a run that has labels under way at any time."""
    assert "\nffdist chaos digits --faults 50 --seed 0\n" in (Path(__file__).parent.parent / "README.md").read_text()
    table = tmp_path / "table.json"
    words = [
        "digits",
        "pipeline.stages=1",
        "negatives.kind=hard_label",
        "training.validation_samples=200",
        "training.evaluate_every=20",
    ]
    command = ["chaos", *words, "--faults", str(len(KINDS)), "--seed", "2", "--json", str(table)]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    rows = json.loads(table.read_text())["rows"]
    assert [row["fault"] for row in rows] == list(KINDS)
    for row in rows:
        assert row["injected"] == row["survived"] == row["weights equal"] == row["metrics whole"] == 1
        assert row["fault"] in BESIDE or row["seconds"] == pytest.approx(sum(row[step] for step in STEPS))
        assert f"| {row['fault']} " in result.output
    noticed = {row["fault"]: row["noticing"] for row in rows}
    assert noticed["stuck stage"] > noticed["stage"]
    names = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    assert not [name for name in names if "ffdist-chaos-" in name]
