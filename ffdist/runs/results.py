"""The results table, from the finished runs of a tracking store."""

import ast
import re
from collections.abc import Collection, Container, Iterator, Sequence
from statistics import median
from typing import Any

from ffdist.config.schema import NEUTRAL_SETTINGS, Config
from ffdist.console import Screen, is_interactive, print_rows
from ffdist.ff.specs import parse_layer
from ffdist.tracking.server import experiments_of, find_experiment, open_client

DEFAULTS = {key: str(field.default) for key, field in Config.settings()}
"""Default value of each parameter. Parameters at their default are ignored, so that runs of an earlier version, which
lacked some of them, share a row with those of later versions."""
TASK_PREFIXES = (
    *("data.", "model.layers", "model.normalization"),
    *("model.predict_from", "training.epochs", "training.batch_size", "training.validation_samples"),
    *("model.predict_to", "training.pooled_features"),
)
"""Prefixes of the parameters that must be equal in a run and its baseline."""
TASK_EXCEPTIONS = ("data.label", "data.label_scale", "data.root")
"""Parameters that may differ in spite of their prefix: how the input shows the label, and the location of the data."""
AUGMENTATIONS = ("crop", "jitter", "flip", "color", "cutout", "standardize")
"""Settings of the section `data` that change the images."""
RULE_PARAMETERS = (
    *("training.objective", "model.goodness", "model.threshold", "model.normalization", "training.loss"),
    *(
        "training.alpha",
        "training.updates",
        "training.schedule",
        "training.updates_per_minibatch",
        "training.optimizer",
        "training.class_scores",
        "training.label_smoothing",
        "training.similarity",
        "training.contrast",
        "training.learning_rate_schedule",
        "training.warmup_epochs",
        "model.readout",
    ),
)
"""Parameters of the learning rule, which the table shows unless they are at their default."""
GOODNESS_ERROR, READOUT_ERROR, FITTED_ERROR = "test/goodness_error", "test/readout_error", "test/fitted_readout_error"
FINISHED_FILTER = "attributes.status = 'FINISHED'"
REACHED, MISSED = ", reached", ", missed"
"""Text after the target in a row."""
Row = dict[str, str]
"""Cells of a row, by the column's title."""


def result_rows(runs: list[Any]) -> list[Row]:
    """Returns one row per configuration, with median and range over its seeds.

    Args:
        runs: As `finished_runs` returns them; the newest run of each seed counts.
    """
    groups: dict[str, dict[str, Any]] = {}
    baselines: dict[str, dict[str, dict[str, Any]]] = {}  # by task, then by their other parameters
    for run in runs:
        keys = [key for key in run.data.params if not key.startswith(("seed", "runner", *NEUTRAL_SETTINGS))]
        table = baselines.setdefault(_task(run), {}) if _is_baseline(run) else groups
        table.setdefault(_parameters(run, keys), {}).setdefault(run.data.params["seed"], run)
    pairs = [(list(group.values()), _task(next(iter(group.values())))) for group in groups.values()]
    pairs += [([], baseline_task) for baseline_task in baselines.keys() - {task for _, task in pairs}]
    rows = [(group, [list(each.values()) for each in baselines.get(task, {}).values()]) for group, task in pairs]
    return [_row(*row) for row in sorted(rows, key=lambda row: _order((row[0] or row[1][0])[0]))]


def results_table(rows: list[Row]) -> str:
    """Returns rows as a Markdown table, without empty columns."""
    columns = [name for name in rows[0] if any(row[name] for row in rows)] if rows else ["run"]
    cells = [columns, ["---"] * len(columns), *([row[name] for name in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def print_results(rows: list[Row], form: str | None = None) -> None:
    """Prints rows as `print_rows` does, but as a Markdown table on a terminal."""
    if form is None and is_interactive(Screen()):
        print(results_table(rows))
    else:
        print_rows(rows, form)


def finished_runs(uri: str, experiment: str | None) -> list[Any]:
    """Returns the finished runs of an experiment, newest first.

    Args:
        uri: Tracking server or database.
        experiment: Name of the experiment, or None for the default one.

    Raises:
        ConfigError: The store or the experiment does not exist, or cannot be reached.
    """
    with open_client(uri) as client:
        return list(_search(client, [find_experiment(client, uri, experiment).experiment_id]))


def runs_with_baselines(uri: str, ids: Collection[str]) -> list[Any]:
    """Returns the finished runs with some MLflow ids, and the baselines in their experiments.

    Runs that do not exist are left out.

    Raises:
        ConfigError: The store does not exist, or cannot be reached.
    """
    with open_client(uri) as client:
        experiments = experiments_of(client, ids)
        runs = list(_search(client, sorted(experiments))) if experiments else []
    tasks = {_task(run) for run in runs if run.info.run_id in ids}
    return [run for run in runs if run.info.run_id in ids or (_is_baseline(run) and _task(run) in tasks)]


def _search(client: Any, experiments: Sequence[str]) -> Iterator[Any]:
    token = None
    while True:
        page = client.search_runs(experiments, FINISHED_FILTER, page_token=token)
        yield from (run for run in page if {READOUT_ERROR, GOODNESS_ERROR} & run.data.metrics.keys() and _has_row(run))
        token = page.token
        if not token:
            return


def _has_row(run: Any) -> bool:
    """Returns whether the table can show a run; other programs may log to the same experiment."""
    try:
        result_rows([run])
    except (LookupError, TypeError, ValueError, AttributeError, SyntaxError, RecursionError, MemoryError):
        return False
    return True


def _task(run: Any) -> str:
    """Returns a key that is equal for a run and its baselines by backpropagation."""
    names = [key for key in run.data.params if key.startswith(TASK_PREFIXES) and key not in TASK_EXCEPTIONS]
    if run.data.params.get("model.predict_from") == "auto":  # the readout, as that of a baseline, reads the default
        names.remove("model.predict_from")
    return _parameters(run, names)


def _is_baseline(run: Any) -> bool:
    return bool(run.data.params["runner"] == "backpropagation")


def _row(runs: list[Any], baselines: list[list[Any]]) -> Row:
    """Returns the row for runs that differ only in their seeds, and for groups of such baselines."""
    first = (runs or baselines[0])[0]
    params = first.data.params
    paper, target = params.get("reference.paper_error", "None"), params.get("reference.target_error", "None")
    augmented = [
        name if value == "True" else f"{name} {value}"
        for name in AUGMENTATIONS
        if (value := params.get(f"data.{name}", DEFAULTS[f"data.{name}"])) != DEFAULTS[f"data.{name}"]
    ]
    changed = [key for key in RULE_PARAMETERS if params.get(key, DEFAULTS[key]) != DEFAULTS[key]]
    fitted_error = _errors(runs, FITTED_ERROR)
    times = [run.data.metrics["train_s"] for run in runs or baselines[0] if "train_s" in run.data.metrics]
    return {
        "run": re.sub(r"-\d{8}-\d{6}(-\d+)?$", "", first.info.run_name),
        "network": "-".join(str(parse_layer(layer)) for layer in ast.literal_eval(params["model.layers"])),
        "label": ", ".join((params["data.label"], *augmented)),
        "negatives": params["negatives.kind"] if runs else "",
        "rule": ", ".join(f"{key.split('.')[1]} {params[key]}" for key in changed),
        "epochs": ("up to " if any("stopped" in run.data.tags for run in runs) else "") + params["training.epochs"],
        "paper": "" if paper == "None" else f"{float(paper):.2%}",
        "target": "" if target == "None" or not runs else f"{float(target):.2%}{_verdict(runs, float(target))}",
        "by goodness": _errors(runs, GOODNESS_ERROR),
        "by readout": _errors(runs, READOUT_ERROR) + (fitted_error and f"; {fitted_error} fitted"),
        "backprop": "; ".join(_baseline(group, baselines) for group in baselines),
        "seconds": f"{median(times):,.0f}" if times else "",
        "precision": params.get("training.precision", ""),
    }


def _baseline(group: list[Any], groups: list[list[Any]]) -> str:
    """Returns the errors of a group of baselines, and the parameters that differ between the groups."""
    all_params = [each[0].data.params for each in groups]
    group_params = group[0].data.params
    differences = [
        f"{key.partition('.')[2]} {group_params.get(key, DEFAULTS.get(key))}"
        for key in sorted({key for params in all_params for key in params if "." in key})
        if not key.startswith(NEUTRAL_SETTINGS)
        and len({params.get(key, DEFAULTS.get(key)) for params in all_params}) > 1
    ]
    return _errors(group, READOUT_ERROR) + (f" ({', '.join(differences)})" if differences else "")


def _verdict(runs: list[Any], target: float) -> str:
    """Compares the median error with a target: by goodness, or by a fitted readout if no label is shown."""
    values = next(filter(None, (_values(runs, name) for name in (GOODNESS_ERROR, FITTED_ERROR, READOUT_ERROR))))
    return REACHED if median(values) <= target else MISSED


def _parameters(run: Any, names: Container[str]) -> str:
    """Returns the parameters of a run with the given names, except those at their default, as text to compare."""
    return repr(sorted(item for item in run.data.params.items() if item[0] in names and item not in DEFAULTS.items()))


def _order(run: Any) -> tuple[str, str]:
    return run.data.params["data.name"], run.info.run_name


def _values(runs: list[Any], name: str) -> list[float]:
    return [run.data.metrics[name] for run in runs if name in run.data.metrics]


def _errors(runs: list[Any], name: str) -> str:
    errors = _values(runs, name)
    if not errors:
        return ""
    spread = f" ({min(errors):.2%} to {max(errors):.2%}, {len(errors)} seeds)" if len(errors) > 1 else ""
    return f"{median(errors):.2%}{spread}"
