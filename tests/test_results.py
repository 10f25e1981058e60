from types import SimpleNamespace

from ffdist.runs.results import result_rows, results_table

LOCAL = "[{'kind': 'local', 'grid': 4, 'stride': 6, 'field': 10, 'units': 128}, 500]"


def make_run(name, seed, goodness, readout, *, train_s=60.0, tags=(), **changes):
    params = {
        "seed": str(seed),
        "runner": "ray",
        "data.name": "mnist",
        "data.label": "overwrite",
        "data.jitter": "0",
        "model.layers": "[30, 20]",
        "negatives.kind": "hard_label",
        "negatives.store": "None",
        "training.epochs": "40",
        "reference.paper_error": "0.0136",
    } | {key.replace("__", "."): value for key, value in changes.items()}
    metrics = {"test/goodness_error": goodness, "test/readout_error": readout, "train_s": train_s}
    metrics = {key: value for key, value in metrics.items() if value is not None}
    return SimpleNamespace(
        info=SimpleNamespace(run_name=name), data=SimpleNamespace(params=params, metrics=metrics, tags=dict(tags))
    )


def make_rows(*runs):
    return result_rows(list(runs))


def test_seeds_share_a_row_with_median_and_range():
    (row,) = make_rows(
        make_run("hard-20261122-101010", 2, 0.015, 0.016, train_s=50.0),
        make_run("hard-20261122-101010-2", 1, 0.013, 0.018, train_s=70.0, negatives__store="made", runner="serial"),
        make_run("hard-20261121-101010", 0, 0.014, 0.017),
        make_run("hard-20261120-101010", 0, 0.9, 0.9),  # older run of the same seed, which is ignored
    )
    assert row["run"] == "hard"
    assert row["by goodness"] == "1.40% (1.30% to 1.50%, 3 seeds)"
    assert row["by readout"] == "1.70% (1.60% to 1.80%, 3 seeds)"
    assert (row["paper"], row["seconds"], row["network"], row["negatives"]) == ("1.36%", "60", "30-20", "hard_label")


def test_empty_columns_are_omitted():
    table = results_table(make_rows(make_run("a-20261122-101010", 0, 0.1, 0.2)))
    assert table.splitlines()[0] == (
        "| run | network | label | negatives | epochs | paper | by goodness | by readout | seconds |"
    )
    assert table.splitlines()[2] == "| a | 30-20 | overwrite | hard_label | 40 | 1.36% | 10.00% | 20.00% | 60 |"
    assert results_table([]) == "| run |\n| --- |"


def test_target_applies_to_goodness_or_without_labels_to_the_readout():
    target = {"reference__target_error": "0.02"}
    goodness = [
        make_run("a-20261122-101010", seed, error, 0.01, **target) for seed, error in enumerate((0.01, 0.02, 0.9))
    ]
    unlabelled = make_run("u-20261122-101010", 0, None, 0.03, data__label="none", **target)
    (first, second) = make_rows(*goodness, unlabelled)
    assert (first["target"], second["target"]) == ("2.00%, reached", "2.00%, missed")
    unlabelled.data.metrics["test/fitted_readout_error"] = 0.019
    assert make_rows(unlabelled)[0]["target"] == "2.00%, reached"
    assert make_rows(make_run("b-20261122-101010", 0, 0.021, 0.01, **target))[0]["target"] == "2.00%, missed"


def test_settings_that_affect_the_result_create_separate_rows():
    rows = make_rows(
        make_run("a-20261122-101010", 0, 0.1, 0.2), make_run("a-20261122-101011", 0, 0.1, 0.2, data__jitter="2")
    )
    assert sorted(row["label"] for row in rows) == ["overwrite", "overwrite, jitter 2"]


def test_default_values_of_new_settings_create_no_separate_row():
    (row,) = make_rows(
        make_run("a-20261122-101010", 0, 0.1, 0.2),
        make_run("a-20261122-101011", 1, 0.1, 0.2, training__optimizer="hinton", model__threshold="units"),
    )
    assert "2 seeds" in row["by goodness"]


def test_settings_of_early_stopping_create_separate_rows_and_are_shown_for_baselines():
    rows = make_rows(
        make_run("a-20261122-101010", 0, 0.1, 0.2, training__stop__patience="None", training__stop__metric="error"),
        make_run("a-20261122-101011", 1, 0.1, 0.2),
        make_run("b-20261122-101011", 0, 0.1, 0.2, training__stop__patience="5"),
    )
    assert sorted((row["run"], "2 seeds" in row["by goodness"]) for row in rows) == [("a", True), ("b", False)]
    baselines = [
        make_run("c-20261122-101011", 0, None, 0.1, runner="backpropagation", training__stop__patience=value)
        for value in ("None", "5")
    ]
    (row,) = make_rows(*baselines)
    assert row["backprop"] == "10.00% (stop.patience None); 10.00% (stop.patience 5)"


def test_unlabeled_run_has_a_fitted_readout_and_no_goodness():
    run = make_run("u-20261122-101010", 0, None, 0.02, train_s=None, model__layers=LOCAL, reference__paper_error="None")
    run.data.metrics["test/fitted_readout_error"] = 0.0123
    del run.data.params["data.jitter"]  # as in runs of an older version, which lacked this setting
    (row,) = make_rows(run)
    assert (row["by goodness"], row["by readout"], row["paper"]) == ("", "2.00%; 1.23% fitted", "")
    assert (row["network"], row["seconds"]) == ("4x4x128-500", "")


def test_precisions_have_separate_rows_and_are_shown():
    rows = make_rows(
        make_run("a-20261122-101010", 0, 0.1, 0.2, training__precision="bfloat16"),
        make_run("a-20261122-101011", 0, 0.1, 0.2, training__precision="float32"),
    )
    assert sorted(row["precision"] for row in rows) == ["bfloat16", "float32"]


def test_learning_rules_that_are_not_the_default_are_shown():
    rows = make_rows(
        make_run("a-20261122-101010", 0, 0.1, 0.2),
        make_run("b-20261122-101010", 0, 0.1, 0.2, training__loss="symmetric", training__alpha="4.0"),
    )
    assert {row["run"]: row["rule"] for row in rows} == {"a": "", "b": "loss symmetric, alpha 4.0"}


def test_baseline_is_shown_beside_runs_of_the_same_task():
    rows = make_rows(
        make_run("ff-20261122-101010", 0, 0.02, 0.03),
        make_run("long-20261122-101010", 0, 0.015, 0.02, training__epochs="80"),
        *(make_run(f"ff-20261122-1010{n}", n, None, 0.01 + n / 1000, runner="backpropagation") for n in range(3)),
        make_run("other-20261122-101014", 0, None, 0.5, runner="backpropagation", model__layers="[9]"),
    )
    assert {row["run"]: row["backprop"] for row in rows} == {
        "ff": "1.10% (1.00% to 1.20%, 3 seeds)",
        "long": "",
        "other": "50.00%",
    }


def test_baseline_without_other_runs_has_its_own_row():
    (row,) = make_rows(make_run("ff-20261122-101010", 0, None, 0.01, runner="backpropagation", negatives__kind="noise"))
    assert (row["run"], row["backprop"], row["seconds"]) == ("ff", "1.00%", "60")
    assert (row["negatives"], row["by goodness"], row["by readout"]) == ("", "", "")


def test_baseline_with_another_label_column_is_not_shown():
    fine, coarse = ({"data__label_column": column} for column in ("fine", "coarse"))
    rows = make_rows(
        make_run("fine-20261122-101010", 0, 0.3, 0.3, **fine),
        make_run("coarse-20261122-101011", 0, 0.2, 0.2, data__label="none", **coarse),
        make_run("fine-20261122-101012", 0, None, 0.66, runner="backpropagation", **fine),
    )
    assert {row["run"]: row["backprop"] for row in rows} == {"fine": "66.00%", "coarse": ""}


def test_baselines_with_different_settings_are_shown_in_one_cell():
    rates = [{"training__readout_learning_rate": rate} for rate in ("0.1", "0.01")]
    (row,) = make_rows(
        make_run("ff-20261122-101010", 0, 0.3, 0.3),
        *(
            make_run("ff-20261122-101012", 0, None, float(*rate.values()), runner="backpropagation", **rate)
            for rate in rates
        ),
    )
    assert row["backprop"] == "10.00% (readout_learning_rate 0.1); 1.00% (readout_learning_rate 0.01)"


def test_epochs_of_runs_that_stopped_early_are_an_upper_bound():
    runs = [make_run("a", 0, 0.02, 0.03), make_run("a", 1, 0.02, 0.03, tags={"stopped": "at epoch 7"})]
    assert [row["epochs"] for row in make_rows(*runs)] == ["up to 40"]
    assert [row["epochs"] for row in make_rows(runs[0])] == ["40"]
