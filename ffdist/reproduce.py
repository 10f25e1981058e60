"""The figures of configurations, reached anew: what is finished counts, what was stopped goes on."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from ffdist.checkpoint import CommitError
from ffdist.config import DECIDES_NOTHING, Config, ConfigError, RunFailed
from ffdist.config_file import find_config, load_config, shipped_configs
from ffdist.files import file_in
from ffdist.finished import Run
from ffdist.offline import fit_readout
from ffdist.paths import in_each_folder, kind_of
from ffdist.prepare import prepare
from ffdist.screen import Screen
from ffdist.start import CONFIG, SUMMARY, commits_of, config_of
from ffdist.tracking.outbox import ORIGIN, OUTBOX, Outbox
from ffdist.tracking.results import MISSED, Row, finished_runs, result_rows
from ffdist.tracking.sending import LOCK, send_leftovers
from ffdist.tracking.server import a_client, tracking_uri
from ffdist.trainer import train


class Reproduced(NamedTuple):
    """What came of it."""

    rows: list[Row]
    """Of the table of results: paper, target and reached figures of each configuration side by side."""
    missed: list[str]
    """Those that missed their target."""


def reproduce(names: Sequence[str], *, seeds: int, runs: Path, **how: Any) -> Reproduced:
    """Trains configurations one after the other, and looks their figures up in MLflow.

    A run that the runs folder has is not trained again, and one that was stopped goes on. Where no label is shown, a
    readout is fitted to the finished layers as well.

    Args:
        names: Paths, or names of shipped ones; all that are shipped where there is none.
        seeds: Of each, counted on from the configuration's.
        runs: Runs folder.
        **how: Runner and address, as `train` takes them.

    Raises:
        ConfigError: One of them cannot be trained; nothing was yet, unless it is MLflow or the cluster that refuses.
        RunFailed: A run had to stop, or MLflow does not have one that is finished.
        KeyboardInterrupt: A run was asked to stop; calling again goes on.
    """
    first = {name: load_config(name) for name in dict.fromkeys(names or shipped_configs())}
    todo = [
        (name, config.model_copy(update={"seed": config.seed + more}))
        for more in range(seeds)
        for name, config in first.items()
    ]
    past = list(_past(runs))
    found = [_earlier(config, past, runs) for _, config in todo]
    for name in {name for (name, _), earlier in zip(todo, found, strict=True) if not isinstance(earlier, Run)}:
        prepare(first[name])
    console, made = Screen(highlight=False), dict[str, Config]()
    for number, ((name, config), earlier) in enumerate(zip(todo, found, strict=True), 1):
        console.print(f"{number} of {len(todo)}: {name}, seed {config.seed}", style="bold", markup=False)
        if isinstance(earlier, Run):
            run = earlier
            console.print(f"finished: {run.folder}", markup=False, soft_wrap=True)
        else:
            run = train(config, name=find_config(name).stem, runs=runs, resumed=earlier, **how)
        made[run.summary["mlflow_run_id"]] = config
        if config.data.label == "none" and run.summary.get("test_fitted_readout_error") is None:
            fit_readout(run, runs=runs, uri=tracking_uri(config.tracking, runs))
    return _table(made, runs)


def _table(made: dict[str, Config], runs: Path) -> Reproduced:
    stores = {(tracking_uri(config.tracking, runs), config.tracking.experiment) for config in made.values()}
    for uri in {uri for uri, _ in stores}:
        with a_client(uri) as client:
            send_leftovers(client, uri, runs, lambda: False)
    tracked = [run for uri, experiment in sorted(stores) for run in finished_runs(uri, experiment, made)]
    if lost := made.keys() - {run.info.run_id for run in tracked}:
        raise RunFailed(
            f"MLflow has no finished run {', '.join(sorted(lost))}; correct it there, or set another --runs"
        )
    for run in tracked:  # paper and target are those of today
        run.data.params.update(_tracking(made.get(run.info.run_id)))
    rows = [row | {"rule": ""} for row in result_rows(tracked)]  # which the configuration's name stands for
    return Reproduced(rows, [row["run"] for row in rows if row["target"].endswith(MISSED)])


def _tracking(config: Config | None) -> dict[str, str]:
    return {key: str(value) for key, value in config.flat().items() if key.startswith("tracking.")} if config else {}


def _past(runs: Path) -> Iterator[tuple[Config, Path]]:
    """Yields the runs that began anew in a runs folder, oldest first; none of another version or damaged."""
    for path in sorted(in_each_folder(runs, CONFIG), key=lambda path: path.stat().st_mtime):
        if not Outbox.fact_of(path.parent / OUTBOX, ORIGIN):
            try:
                yield config_of(path.parent), path.parent
            except ConfigError:
                continue


def _earlier(config: Config, past: list[tuple[Config, Path]], runs: Path) -> Run | Path | None:
    """Returns a finished run of a configuration, else the folder of one that can go on."""
    stopped = None
    for then, folder in past:
        if config.training.precision == "auto":  # of which an earlier run recorded the resolved value
            then = then.with_precision("auto")
        if _identity(then, runs) != _identity(config, runs):
            continue
        try:
            if kind_of(folder / SUMMARY) != "file":
                stopped = folder if commits_of(config, folder).names() and not _in_use(folder) else stopped
            elif (run := Run.find(folder)).summary["mlflow_tracking_uri"] == tracking_uri(config.tracking, runs):
                return run
        except (ConfigError, CommitError):  # damaged
            continue
    return stopped


def _in_use(folder: Path) -> bool:
    """Returns whether another process trains the run now, or its lock must not be used."""
    try:
        with FileLock(file_in(folder, LOCK)).acquire(timeout=0):
            return False
    except (Timeout, OSError, ValueError):
        return True


def _identity(config: Config, runs: Path) -> dict[str, Any]:
    decisive = {key: value for key, value in config.flat().items() if not key.startswith(DECIDES_NOTHING)}
    return decisive | {"uri": tracking_uri(config.tracking, runs), "experiment": config.tracking.experiment}
