"""Benchmarks run, and report ratios of what they measure."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from ffdist import load_config
from ffdist.bench.peers import PEERS
from ffdist.bench.plain import PlainLoop
from ffdist.bench.report import print_figures
from ffdist.bench.step import LOCAL_LAYERS
from ffdist.bench.stretch import process_age_s
from ffdist.cli import main
from ffdist.training.prepare import prepare


def run_bench(tmp_path, *arguments: str, code: int = 0) -> tuple[str, dict[str, float]]:
    result = CliRunner().invoke(main, ["bench", *arguments, "--json", str(tmp_path / "found.json")])
    assert result.exit_code == code, result.output
    return result.output, json.loads((tmp_path / "found.json").read_text())


def test_step_reports_fractions_of_the_floor(tmp_path, monkeypatch):
    monkeypatch.setattr("ffdist.bench.step.ROUND_S", 0.001)
    output, figures = run_bench(tmp_path, "step", "--units", "60", "--batch", "10", "--batch", "20")
    names = [
        f"{figure}/{layer}/{batch}/{precision}"
        for precision in ("float32", "bfloat16")
        for layer in ("dense_60", *LOCAL_LAYERS)
        for batch in (10, 20)
        for figure in ("step_floor_fraction", "lowest", "highest")
    ]
    assert list(figures) == names
    assert all(fraction > 0 for fraction in figures.values())
    assert output.count("\n| dense_60 |") == 4 + 2, "one row per measurement, and one per layer and precision"
    assert "\n| floor / update | precision | 10 | 20 |\n| --- | --- | --- | --- |\n| dense_60 | float32 | " in output


@pytest.mark.slow
def test_pipeline_reports_efficiency_and_overhead(tmp_path):
    before_s = process_age_s()
    output, figures = run_bench(
        tmp_path, "pipeline", "digits", "pipeline.stages=2", "model.layers=[30,20]", "--seconds", "0.1", "--backprop"
    )
    one_stage = {
        name.removeprefix("stages_1/"): value for name, value in figures.items() if name.startswith("stages_1/")
    }
    assert "pipeline_efficiency" in one_stage
    assert set(one_stage) < set(figures)
    assert before_s < figures["start_s"] < process_age_s()
    assert 0 < figures["serialization_fraction"] < 1
    assert figures["stage_unique_bytes"] < figures["stage_resident_bytes"]
    assert "stages_2/pipeline_efficiency" not in figures
    assert figures["lowest/ray_samples_per_s"] <= figures["ray_samples_per_s"] <= figures["highest/ray_samples_per_s"]
    assert "| pipeline_efficiency" in output
    assert {"checkpointing_over_not", "epoch_boundary_over_not", "predicted_over_ray"} < set(figures)
    assert {"gpipe_samples_per_s", "ray_over_gpipe", "1f1b_samples_per_s", "ray_over_1f1b"} < set(figures)
    assert "ray_over_gpipe" not in one_stage
    assert figures["evaluation_s"] > 0
    assert 0 < figures["busy_fraction"] <= 1


@pytest.mark.slow
def test_growth_reports_cost_per_added_parameter(tmp_path, monkeypatch):
    monkeypatch.setattr("ffdist.bench.growth.SIZES", ((1, 1), (2, 1)))
    monkeypatch.setattr("ffdist.bench.growth.NUM_ROUNDS", 1)
    output, figures = run_bench(tmp_path, "growth", "digits", "--units", "30", "--seconds", "0.1")
    one_layer, two_layers = (
        {
            name.partition("/")[2]: value
            for name, value in figures.items()
            if name.startswith(f"{layers}_layers_1_stages/")
        }
        for layers in (1, 2)
    )
    assert set(one_layer) == {"ray_samples_per_s", "parameters", "stages_unique_bytes"}
    assert set(two_layers) == {*one_layer, "ps_per_added_parameter", "bytes_per_added_parameter"}
    assert two_layers["parameters"] == one_layer["parameters"] + 30 * 31
    assert "| ps_per_added_parameter" in output


@pytest.mark.slow
@pytest.mark.parametrize(("target", "code", "reached"), [("1", 0, 1), ("0", 1, 0)])
def test_convergence_reports_the_time_to_an_error(target, code, reached, tmp_path):
    settings = ["training.epochs=1", "model.layers=[30,20]", "--runs", str(tmp_path / "runs")]
    output, figures = run_bench(tmp_path, "convergence", "digits", *settings, "--error", target, code=code)
    assert figures["reached"] == reached
    assert figures["training_s"] + figures["start_s"] < figures["seconds"] + 1, "the first chunk counts for both"
    assert ("set training.epochs higher" in output) is not bool(reached)


def test_a_plain_loop_learns():
    prepared = prepare(load_config("digits", ["data.label=overwrite", "training.batch_size=50"]))
    loop = PlainLoop([100, 100], prepared)
    progress = loop.train_to_error(0.1, 60.0)
    assert progress.test_error == loop.test_error() <= 0.1
    assert progress.seconds > 0
    assert loop.train_to_error(0.0, 0.0).test_error > 0, "the time limit ends it"


@pytest.mark.slow
def test_peers_are_compared(tmp_path):
    settings = ["data.label=overwrite", "training.epochs=1", "model.layers=[30,20]", "--runs", str(tmp_path / "runs")]
    output, figures = run_bench(
        tmp_path, "peers", "digits", *settings, "--seconds", "0.1", "--error", "0.95", "--minutes", "0.01"
    )
    for peer in PEERS:
        assert figures[f"lowest/ray_over_{peer}"] <= figures[f"ray_over_{peer}"] <= figures[f"highest/ray_over_{peer}"]
        assert figures[f"lowest/{peer}_samples_per_s"] > 0
    assert "| ray_over_plain |" in output
    assert {figures[f"{peer}/seconds"] > 0 for peer in ("ray", "plain", "backpropagation")} == {True}
    assert 0 < figures["backpropagation/test_error"] < 1


def test_peers_need_dense_layers_on_images():
    result = CliRunner().invoke(main, ["bench", "peers", "digits", "data.label=append"])
    assert result.exit_code == 2
    assert "dense layers with data.label=overwrite, such as mnist" in " ".join(result.output.split())


def test_process_age_excludes_the_time_of_the_shell():
    """If a shell runs the command by `exec`, the process has the start time of the shell, before the import."""
    code = (
        "import time; before = time.monotonic(); from ffdist.bench.stretch import process_age_s; "
        "assert 0 < process_age_s() <= time.monotonic() - before"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=200)


def test_table_of_many_columns_is_not_truncated(capsys):
    print_figures({f"stages_{number}/ray_samples_per_s": 1e6 for number in range(40)})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].count("stages_") == lines[2].count("1,000,000") == 40
