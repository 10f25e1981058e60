"""The table of results, from the finished runs of a tracking store."""

import ast
import re
from collections.abc import Container
from statistics import median
from typing import Any

from ffdist.config import DECIDES_NOTHING, Config
from ffdist.screen import Screen, is_interactive, print_rows
from ffdist.sections import Section
from ffdist.tracking.server import a_client, find_experiment

DEFAULTS = {
    f"{section}.{key}": str(setting.default)
    for section, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    for key, setting in field.annotation.model_fields.items()
}
"""Parameters that say nothing: runs of a version that did not have them stand in one row with those of later ones."""
REFERENCE = (
    *("data.", "model.layers", "model.normalization"),
    *("model.predict_from", "training.epochs", "training.batch_size", "training.validation_samples"),
)
"""Parameters, by the start of their name, in which runs and their reference by backpropagation must be equal."""
NOT_THE_TASK = ("data.label", "data.label_scale", "data.root")
"""Parameters in which they may differ: how the input shows the label, and where the dataset lies."""
RULE = (
    *("model.goodness", "model.threshold", "model.normalization", "training.loss", "training.alpha"),
    *("training.updates", "training.schedule", "training.repeats", "training.optimizer"),
)
"""Parameters that the table tells where they are not the default."""
GOODNESS, READOUT, FITTED = (f"test/{name}_error" for name in ("goodness", "readout", "fitted_readout"))
FINISHED = "attributes.status = 'FINISHED'"
REACHED, MISSED = ", reached", ", missed"
Row = dict[str, str]
"""What a row of the table says, by the words at the head of its columns."""


def result_rows(runs: list[Any]) -> list[Row]:
    """Returns one row for each configuration; of several seeds it tells the median and the range.

    Args:
        runs: As `finished_runs` returns them; the newest of each seed counts.
    """
    groups: dict[str, dict[str, Any]] = {}
    references: dict[str, dict[str, dict[str, Any]]] = {}  # by task, then by what else they differ in
    for run in runs:
        decides = [key for key in run.data.params if not key.startswith(("seed", "runner", *DECIDES_NOTHING))]
        same = references.setdefault(_task(run), {}) if _is_reference(run) else groups
        same.setdefault(_told(run, decides), {}).setdefault(run.data.params["seed"], run)
    pairs = [(list(group.values()), _task(next(iter(group.values())))) for group in groups.values()]
    pairs += [([], alone) for alone in references.keys() - {task for _, task in pairs}]
    rows = [(own, [list(group.values()) for group in references.get(task, {}).values()]) for own, task in pairs]
    return [_row(own, beside) for own, beside in sorted(rows, key=lambda row: _order((row[0] or row[1][0])[0]))]


def results_table(rows: list[Row]) -> str:
    """Returns rows as a table in Markdown; columns that say nothing are left out."""
    head = [name for name in rows[0] if any(row[name] for row in rows)] if rows else ["run"]
    cells = [head, ["---"] * len(head), *([row[name] for name in head] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def print_results(rows: list[Row]) -> None:
    """Prints the table: in Markdown on a terminal, tab-separated values elsewhere."""
    if is_interactive(Screen()):
        print(results_table(rows))
    else:
        print_rows(rows)


def finished_runs(uri: str, experiment: str, only: Container[str] | None = None) -> list[Any]:
    """Returns finished runs, newest first.

    Args:
        uri: Tracking server or database.
        experiment: Name of the experiment.
        only: MLflow run ids that count, beside runs by backpropagation that are the reference of one of them.

    Raises:
        ConfigError: It is not there, or cannot be reached.
    """
    runs: list[Any] = []
    with a_client(uri) as client:
        found, token = find_experiment(client, uri, experiment), None
        while True:
            page = client.search_runs([found.experiment_id], FINISHED, page_token=token)
            runs += [run for run in page if READOUT in run.data.metrics and _is_ours(run)]
            token = page.token
            if not token:
                break
    if only is None:
        return runs
    beside = {_task(run) for run in runs if run.info.run_id in only}
    return [run for run in runs if run.info.run_id in only or (_is_reference(run) and _task(run) in beside)]


def _is_ours(run: Any) -> bool:
    """Says whether the table has what it needs of a run; others may log to the experiment, too."""
    try:
        result_rows([run])
    except (LookupError, TypeError, ValueError, AttributeError, SyntaxError, RecursionError, MemoryError):
        return False
    return True


def _task(run: Any) -> str:
    """Returns what a run and its reference by backpropagation have in common."""
    return _told(run, [key for key in run.data.params if key.startswith(REFERENCE) and key not in NOT_THE_TASK])


def _is_reference(run: Any) -> bool:
    return bool(run.data.params["runner"] == "backpropagation")


def _row(runs: list[Any], references: list[list[Any]]) -> Row:
    """Returns the row of runs that differ in their seeds alone, and of groups of such runs by backpropagation."""
    first = (runs or references[0])[0]
    params = first.data.params
    paper, target = params.get("tracking.paper_error", "None"), params.get("tracking.target_error", "None")
    jitter = params.get("data.jitter", "0")
    rule = [f"{key.split('.')[1]} {params[key]}" for key in RULE if params.get(key, DEFAULTS[key]) != DEFAULTS[key]]
    fitted = _errors(runs, FITTED)
    times = [run.data.metrics["train_s"] for run in runs or references[0] if "train_s" in run.data.metrics]
    return {
        "run": re.sub(r"-\d{8}-\d{6}(-\d+)?$", "", first.info.run_name),
        "network": _network(params),
        "label": params["data.label"] + (f", jitter {jitter}" if jitter != "0" else ""),
        "negatives": params["negatives.kind"] if runs else "",
        "rule": ", ".join(rule),
        "epochs": params["training.epochs"],
        "paper": "" if paper == "None" else f"{float(paper):.2%}",
        "target": "" if target == "None" or not runs else f"{float(target):.2%}{_verdict(runs, float(target))}",
        "by goodness": _errors(runs, GOODNESS),
        "by readout": _errors(runs, READOUT) + (fitted and f"; {fitted} fitted"),
        "backprop": "; ".join(_reference(group, references) for group in references),
        "seconds": f"{median(times):,.0f}" if times else "",
        "precision": params.get("training.precision", ""),
    }


def _reference(group: list[Any], groups: list[list[Any]]) -> str:
    """Returns the errors of a group of references, and in what it differs from the other groups."""
    all_params = [each[0].data.params for each in groups]
    own = group[0].data.params
    differ = [
        f"{key.split('.')[1]} {own.get(key, DEFAULTS.get(key))}"
        for key in sorted({key for params in all_params for key in params if "." in key})
        if not key.startswith(DECIDES_NOTHING)
        and len({params.get(key, DEFAULTS.get(key)) for params in all_params}) > 1
    ]
    return _errors(group, READOUT) + (f" ({', '.join(differ)})" if differ else "")


def _verdict(runs: list[Any], target: float) -> str:
    """Says whether a median reached a target: by goodness, or where no label is shown by a fitted readout."""
    values = next(filter(None, (_values(runs, name) for name in (GOODNESS, FITTED, READOUT))))
    return REACHED if median(values) <= target else MISSED


def _told(run: Any, names: Container[str]) -> str:
    """Returns those of some of a run's parameters that are not the default."""
    return repr(sorted(item for item in run.data.params.items() if item[0] in names and item not in DEFAULTS.items()))


def _order(run: Any) -> tuple[str, str]:
    return run.data.params["data.name"], run.info.run_name


def _network(params: dict[str, str]) -> str:
    layers = ast.literal_eval(params["model.layers"])
    return "-".join(
        str(layer) if isinstance(layer, int) else f"{layer['grid']}x{layer['grid']}x{layer['units']}"
        for layer in layers
    )


def _values(runs: list[Any], name: str) -> list[float]:
    return [run.data.metrics[name] for run in runs if name in run.data.metrics]


def _errors(runs: list[Any], name: str) -> str:
    errors = _values(runs, name)
    if not errors:
        return ""
    spread = f" ({min(errors):.2%} to {max(errors):.2%}, {len(errors)} seeds)" if len(errors) > 1 else ""
    return f"{median(errors):.2%}{spread}"
