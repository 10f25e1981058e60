"""The benchmarks run, and what they print are ratios of what they measured."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from ffdist.bench.report import print_figures
from ffdist.bench.step import LOCAL_LAYERS
from ffdist.bench.stretch import process_age_s
from ffdist.cli import main


def bench(tmp_path, *arguments: str, code: int = 0) -> tuple[str, dict[str, float]]:
    done = CliRunner().invoke(main, ["bench", *arguments, "--json", str(tmp_path / "found.json")])
    assert done.exit_code == code, done.output
    return done.output, json.loads((tmp_path / "found.json").read_text())


def test_a_step_and_its_floor(tmp_path, monkeypatch):
    monkeypatch.setattr("ffdist.bench.step.COPY_VALUES", 10**6)
    monkeypatch.setattr("ffdist.bench.step.ROUND_S", 0.001)
    told, found = bench(tmp_path, "step", "--units", "60", "--batch", "10", "--batch", "20")
    names = [
        f"step_floor_fraction/{layer}/{batch}/{precision}"
        for precision in ("float32", "bfloat16")
        for layer in ("dense_60", *LOCAL_LAYERS)
        for batch in (10, 20)
    ]
    assert list(found) == names
    assert all(fraction > 0 for fraction in found.values())
    assert told.count("\n| dense_60 |") == 4 + 2, "each, and then each kind of product in a line"
    assert "\n| floor / update | precision | 10 | 20 |\n| --- | --- | --- | --- |\n| dense_60 | float32 | " in told


@pytest.mark.slow
def test_a_pipeline_against_the_machine(tmp_path):
    before_s = process_age_s()
    told, found = bench(tmp_path, "pipeline", "digits", "pipeline.stages=2", "model.layers=[30,20]", "--seconds", "0.1")
    one = {name.removeprefix("stages_1/"): value for name, value in found.items() if name.startswith("stages_1/")}
    assert "pipeline_efficiency" in one
    assert set(one) < set(found)
    assert before_s < found["start_s"] < process_age_s()
    assert 0 < found["serialization_fraction"] < 1
    assert found["stage_unique_bytes"] < found["stage_resident_bytes"]
    assert "stages_2/pipeline_efficiency" not in found
    assert "| pipeline_efficiency" in told
    assert {"checkpointing_over_not", "epoch_boundary_over_not", "predicted_over_ray"} < set(found)
    assert found["evaluation_s"] > 0
    assert 0 < found["busy_fraction"] <= 1


@pytest.mark.slow
def test_growth_by_layers_and_stages(tmp_path, monkeypatch):
    monkeypatch.setattr("ffdist.bench.growth.SIZES", ((1, 1), (2, 1)))
    monkeypatch.setattr("ffdist.bench.growth.NUM_ROUNDS", 1)
    told, found = bench(tmp_path, "growth", "digits", "--units", "30", "--seconds", "0.1")
    one, two = (
        {
            name.partition("/")[2]: value
            for name, value in found.items()
            if name.startswith(f"{layers}_layers_1_stages/")
        }
        for layers in (1, 2)
    )
    assert set(one) == {"ray_samples_per_s", "parameters", "stages_unique_bytes"}
    assert set(two) == {*one, "ps_per_added_parameter", "bytes_per_added_parameter"}
    assert two["parameters"] == one["parameters"] + 30 * 31
    assert "| ps_per_added_parameter" in told


@pytest.mark.slow
@pytest.mark.parametrize(("asked", "code", "reached"), [("1", 0, 1), ("0", 1, 0)])
def test_the_time_to_an_error(asked, code, reached, tmp_path):
    short = ["training.epochs=1", "model.layers=[30,20]", "--runs", str(tmp_path / "runs")]
    told, found = bench(tmp_path, "convergence", "digits", *short, "--error", asked, code=code)
    assert found["reached"] == reached
    assert found["training_s"] + found["start_s"] < found["seconds"] + 1, "the first chunk counts for both"
    assert ("set training.epochs higher" in told) is not bool(reached)


def test_what_a_shell_did_before_does_not_count():
    """The kernel's start of a process is that of the shell that replaced itself by it; it lies before the import."""
    code = (
        "import time; before = time.monotonic(); from ffdist.bench.stretch import process_age_s; "
        "assert 0 < process_age_s() <= time.monotonic() - before"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=200)


def test_a_table_of_many_columns_is_whole(capsys):
    print_figures({f"stages_{number}/ray_samples_per_s": 1e6 for number in range(40)})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].count("stages_") == lines[2].count("1,000,000") == 40
