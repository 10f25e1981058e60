"""The table of results, from the finished runs of a tracking store."""

import ast
import re
from collections.abc import Iterable, Iterator
from statistics import median
from typing import Any

from ffdist.config import DECIDES_NOTHING, Config
from ffdist.sections import Section
from ffdist.tracking.server import a_client

DEFAULTS = {
    f"{section}.{key}": str(setting.default)
    for section, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    for key, setting in field.annotation.model_fields.items()
}
"""Parameters that say nothing: runs of a version that did not have them stand in one row with those of later ones."""
REFERENCE = (
    *("data.name", "data.path", "data.image_", "data.jitter", "model.layers", "model.normalization"),
    *("model.predict_from", "training.epochs", "training.batch_size", "training.validation_samples"),
)
"""Parameters, by the start of their name, in which runs and their reference by backpropagation must be equal."""
RULE = (
    *("model.goodness", "model.threshold", "model.normalization", "training.loss", "training.alpha"),
    *("training.updates", "training.schedule", "training.repeats", "training.optimizer"),
)
"""Parameters that the table tells where they are not the default."""
FINISHED = "attributes.status = 'FINISHED'"
HEAD = (
    "run",
    "network",
    "label",
    "negatives",
    "rule",
    "epochs",
    "by goodness",
    "by readout",
    "backprop",
    "paper",
    "seconds",
)


def results_table(uri: str, experiment: str) -> str:
    """Returns a table in Markdown, one row for each configuration; of several seeds it tells the median and the range.

    Args:
        uri: Tracking server or database.
        experiment: Name of the experiment.
    """
    rows = [list(HEAD), ["---"] * len(HEAD), *_rows(_finished(uri, experiment))]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _finished(uri: str, experiment: str) -> list[Any]:
    """Returns the finished runs, newest first."""
    runs: list[Any] = []
    with a_client(uri) as client:
        found, token = client.get_experiment_by_name(experiment), None
        while found:
            page = client.search_runs([found.experiment_id], FINISHED, page_token=token)
            runs += [run for run in page if "test/readout_error" in run.data.metrics]
            token = page.token
            if not token:
                break
    return runs


def _rows(runs: list[Any]) -> Iterator[list[str]]:
    groups: dict[str, dict[str, Any]] = {}
    references: dict[str, dict[str, Any]] = {}
    for run in runs:
        if run.data.params["runner"] == "backpropagation":
            by_seed = references.setdefault(_told(run, REFERENCE), {})
        else:
            decides = [key for key in run.data.params if not key.startswith(("seed", "runner", *DECIDES_NOTHING))]
            by_seed = groups.setdefault(_told(run, decides), {})
        by_seed.setdefault(run.data.params["seed"], run)  # the newest of each seed
    told = [(list(group.values()), _told(next(iter(group.values())), REFERENCE)) for group in groups.values()]
    told += [([], alone) for alone in references.keys() - {reference for _, reference in told}]
    rows = [(own, list(references.get(reference, {}).values())) for own, reference in told]
    yield from (_row(own, reference) for own, reference in sorted(rows, key=lambda row: _order((row[0] or row[1])[0])))


def _row(runs: list[Any], references: list[Any]) -> list[str]:
    """Returns the row of runs that differ in their seeds alone, and of those by backpropagation that stand beside."""
    first = (runs or references)[0]
    params = first.data.params
    paper, jitter = params.get("tracking.paper_error", "None"), params.get("data.jitter", "0")
    rule = [f"{key.split('.')[1]} {params[key]}" for key in RULE if params.get(key, DEFAULTS[key]) != DEFAULTS[key]]
    times = [run.data.metrics["train_s"] for run in runs or references if "train_s" in run.data.metrics]
    return [
        re.sub(r"-\d{8}-\d{6}(-\d+)?$", "", first.info.run_name),
        _network(params),
        params["data.label"] + (f", jitter {jitter}" if jitter != "0" else ""),
        params["negatives.kind"] if runs else "",
        ", ".join(rule),
        params["training.epochs"],
        _errors(runs, "test/goodness_error"),
        _errors(runs, "test/readout_error") + _fitted(runs),
        _errors(references, "test/readout_error"),
        "" if paper == "None" else f"{float(paper):.2%}",
        f"{median(times):,.0f}" if times else "",
    ]


def _told(run: Any, names: Iterable[str]) -> str:
    """Returns those of a run's parameters, by the start of their name, that are not the default."""
    return repr(
        sorted(
            item
            for item in run.data.params.items()
            if item[0].startswith(tuple(names)) and item not in DEFAULTS.items()
        )
    )


def _order(run: Any) -> tuple[str, str]:
    return run.data.params["data.name"], run.info.run_name


def _network(params: dict[str, str]) -> str:
    layers = ast.literal_eval(params["model.layers"])
    return "-".join(
        str(layer) if isinstance(layer, int) else f"{layer['grid']}x{layer['grid']}x{layer['units']}"
        for layer in layers
    )


def _errors(runs: list[Any], name: str) -> str:
    errors = [run.data.metrics[name] for run in runs if name in run.data.metrics]
    if not errors:
        return ""
    spread = f" ({min(errors):.2%} to {max(errors):.2%}, {len(errors)} seeds)" if len(errors) > 1 else ""
    return f"{median(errors):.2%}{spread}"


def _fitted(runs: list[Any]) -> str:
    fitted = _errors(runs, "test/fitted_readout_error")
    return fitted and f"; {fitted} fitted"
