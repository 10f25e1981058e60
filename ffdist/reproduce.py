"""The figures of shipped configurations, reached anew: what is finished counts, what was stopped goes on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from ffdist.checkpoint import CommitError
from ffdist.config import DECIDES_NOTHING, Config, ConfigError
from ffdist.config_file import find_config, load_config, shipped_configs
from ffdist.finished import Run
from ffdist.offline import fit_readout
from ffdist.prepare import prepare
from ffdist.start import CONFIG, SUMMARY, commits_of
from ffdist.tracking.results import MISSED, finished_runs, result_rows, results_table
from ffdist.tracking.server import tracking_uri
from ffdist.trainer import train


class Reproduced(NamedTuple):
    """What came of it."""

    table: str
    """Paper, target and reached figures of each configuration side by side, in Markdown."""
    missed: list[str]
    """Those that missed their target."""


def reproduce(names: Sequence[str], *, seeds: int, runs: Path, **how: Any) -> Reproduced:
    """Trains configurations one after the other, and looks their figures up in MLflow.

    A run that the runs folder has is not trained again, and one that was stopped goes on. Where no label is shown, a
    readout is fitted to the finished layers as well.

    Args:
        names: Paths, or names of shipped ones; all that are shipped where there is none.
        seeds: Of each, from 0 on.
        runs: Runs folder.
        **how: Runner and address, as `train` takes them.

    Raises:
        ConfigError: One of them cannot be trained; nothing was yet, unless it is MLflow or the cluster that refuses.
        RunFailed: A run had to stop.
        KeyboardInterrupt: The same, asked to; calling again goes on.
    """
    names = list(names) or list(shipped_configs())
    todo = [(name, load_config(name, [f"seed={seed}"])) for seed in range(seeds) for name in names]
    found = [_earlier(config, runs) for _, config in todo]
    for (_, config), earlier in zip(todo, found, strict=True):
        if not isinstance(earlier, Run):
            prepare(config)
    console, ids = Console(highlight=False), set[str]()
    for number, ((name, config), earlier) in enumerate(zip(todo, found, strict=True), 1):
        console.print(f"[bold]{number} of {len(todo)}: {name}, seed {config.seed}")
        if isinstance(earlier, Run):
            run = earlier
            console.print(f"finished: {run.folder}", markup=False, soft_wrap=True)
        else:
            run = train(config, name=find_config(name).stem, runs=runs, resumed=earlier, **how)
        ids.add(run.summary["mlflow_run_id"])
        if config.data.label == "none" and run.summary.get("test_fitted_readout_error") is None:
            fit_readout(str(run.folder), runs=runs)
    tracking = todo[0][1].tracking
    rows = result_rows(finished_runs(tracking_uri(tracking, runs), tracking.experiment, ids))
    told = [row | {"rule": ""} for row in rows]  # which the configuration's name stands for
    return Reproduced(results_table(told), [row["run"] for row in rows if row["target"].endswith(MISSED)])


def _earlier(config: Config, runs: Path) -> Run | Path | None:
    """Returns a finished run of a configuration, else the folder of one that can go on."""
    stopped = None
    for path in sorted(runs.glob(f"*/{CONFIG}"), key=lambda path: path.stat().st_mtime):
        try:
            then, folder = load_config(str(path)), path.parent
            if _decisive(then) != _decisive(config):
                continue
            if not (folder / SUMMARY).is_file():
                stopped = folder if commits_of(then, folder).names() else stopped
            elif (run := Run.find(folder)).summary["mlflow_tracking_uri"] == tracking_uri(config.tracking, runs):
                return run
        except (ConfigError, CommitError):  # of another version, or damaged
            continue
    return stopped


def _decisive(config: Config) -> dict[str, Any]:
    return {key: value for key, value in config.flat().items() if not key.startswith(DECIDES_NOTHING)}
