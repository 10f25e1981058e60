"""Reproduction of results: trains configurations, reusing finished runs and resuming interrupted ones."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ffdist.checkpoint.checkpoints import CheckpointError
from ffdist.config.loading import find_config, load_config, shipped_configs
from ffdist.config.schema import NEUTRAL_SETTINGS, Config
from ffdist.config.values import NO_TRACKING
from ffdist.console import Screen
from ffdist.errors import ConfigError, RunFailed
from ffdist.runs.folder import CONFIG, SUMMARY, checkpoints_of, config_of, is_in_use
from ffdist.runs.readout import fit_readout
from ffdist.runs.results import MISSED, Row, result_rows, runs_with_baselines
from ffdist.runs.run import Run
from ffdist.storage.paths import find_in_subfolders, kind_of
from ffdist.tracking.outbox import ORIGIN, OUTBOX, Outbox
from ffdist.tracking.server import open_client, tracking_uri
from ffdist.tracking.sync import send_leftovers
from ffdist.training.prepare import prepare
from ffdist.training.trainer import train


class Reproduction(NamedTuple):
    """Results of all configurations."""

    rows: list[Row]
    """Rows of the results table: the errors in the paper, the target and the errors of each configuration."""
    missed: list[str]
    """Names of the runs that missed their target."""
    failed: list[str]
    """Name and cause of each run that failed."""


def reproduce(names: Sequence[str], *, seeds: int, runs: Path, **options: Any) -> Reproduction:
    """Trains configurations one after another, and reads their results from MLflow.

    Finished runs in the runs folder are reused, and interrupted ones are resumed. If a run fails, the others are still
    trained. If no label is shown, a readout is also fitted to the frozen layers.

    Args:
        names: Paths, or names of shipped configurations; all shipped ones if empty.
        seeds: Number of seeds of each configuration, counted from its own seed.
        runs: Runs folder.
        **options: Runner and address, as `train` takes them.

    Raises:
        ConfigError: A configuration cannot be trained. Nothing was trained yet, unless MLflow or the cluster failed.
        RunFailed: MLflow lacks a finished run.
        KeyboardInterrupt: A stop was requested; calling again resumes the run.
    """
    configs_by_name = {name: load_config(name) for name in dict.fromkeys(names or shipped_configs())}
    jobs = [
        (name, config.model_copy(update={"seed": config.seed + offset}))
        for offset in range(seeds)
        for name, config in configs_by_name.items()
    ]
    untracked = [name for name, each in configs_by_name.items() if tracking_uri(each.tracking, runs) == NO_TRACKING]
    if untracked:
        raise ConfigError(
            f"results are read from MLflow, which is switched off (tracking URI: {NO_TRACKING}, configurations: "
            f"{', '.join(untracked)}); leave tracking.uri and MLFLOW_TRACKING_URI out"
        )
    candidates = list(_previous_runs(runs))
    previous = [_find_previous(config, candidates, runs) for _, config in jobs]
    for name in {name for (name, _), run in zip(jobs, previous, strict=True) if not isinstance(run, Run)}:
        prepare(configs_by_name[name])
    console, configs, failed = Screen(highlight=False), dict[str, Config](), list[str]()
    for number, ((name, config), run) in enumerate(zip(jobs, previous, strict=True), 1):
        console.print(f"{number} of {len(jobs)}: {name}, seed {config.seed}", style="bold", markup=False)
        if isinstance(run, Run):
            console.print(f"finished: {run.folder}", markup=False, soft_wrap=True)
        else:
            try:
                run = train(config, name=find_config(name).stem, runs=runs, resume=run, **options)
            except RunFailed as error:
                console.print(f"failed: {error}", markup=False, soft_wrap=True)
                failed.append(f"{name}, seed {config.seed}: {error}")
                continue
        configs[run.summary["mlflow_run_id"]] = config
        errors = run.summary["test_goodness_error"], run.summary.get("test_fitted_readout_error")
        if config.data.label == "none" and errors == (None, None):
            fit_readout(run, runs=runs, uri=tracking_uri(config.tracking, runs))
    rows = _rows(configs, runs)
    return Reproduction(rows, [row["run"] for row in rows if row["target"].endswith(MISSED)], failed)


def _rows(configs: dict[str, Config], runs: Path) -> list[Row]:
    stores = sorted({tracking_uri(config.tracking, runs) for config in configs.values()})
    for uri in stores:
        with open_client(uri) as client:
            send_leftovers(client, uri, runs, lambda: False)
    tracked = [run for uri in stores for run in runs_with_baselines(uri, configs)]
    if missing := configs.keys() - {run.info.run_id for run in tracked}:
        raise RunFailed(
            f"MLflow has no finished run {', '.join(sorted(missing))}; restore it there, or set another --runs"
        )
    for run in tracked:  # the paper's error and the target may have changed since
        run.data.params.update(_reference(configs.get(run.info.run_id)))
    return [row | {"rule": ""} for row in result_rows(tracked)]  # the configuration's name implies the rule


def _reference(config: Config | None) -> dict[str, str]:
    return {key: str(value) for key, value in config.flat().items() if key.startswith("reference.")} if config else {}


def _previous_runs(runs: Path) -> Iterator[tuple[Config, Path]]:
    """Yields the runs in a runs folder, oldest first, without warm starts, damaged runs and those of other versions."""
    for path in sorted(find_in_subfolders(runs, CONFIG), key=lambda path: path.stat().st_mtime):
        if not Outbox.fact_of(path.parent / OUTBOX, ORIGIN):
            try:
                yield config_of(path.parent), path.parent
            except ConfigError:
                continue


def _find_previous(config: Config, candidates: list[tuple[Config, Path]], runs: Path) -> Run | Path | None:
    """Returns a finished run of a configuration, else the folder of one that can be resumed, if any."""
    resumable, may_end_early = None, config.training.stop.is_active or config.training.callbacks
    for other, folder in candidates:
        if config.training.precision == "auto":  # the other run recorded the resolved precision
            other = other.with_precision("auto")
        if _identity(other, runs) != _identity(config, runs):
            continue
        try:
            if kind_of(folder / SUMMARY) != "file":
                resumable = folder if checkpoints_of(config, folder).names() and not is_in_use(folder) else resumable
                continue
            run = Run.find(folder)
            # Without these settings, a callback that is not part of the configuration ended a run early.
            is_complete = may_end_early or not run.summary.get("stopped")
            if is_complete and run.summary["mlflow_tracking_uri"] == tracking_uri(config.tracking, runs):
                return run
        except (ConfigError, CheckpointError):  # damaged
            continue
    return resumable


def _identity(config: Config, runs: Path) -> dict[str, Any]:
    decisive = {key: value for key, value in config.flat().items() if not key.startswith(NEUTRAL_SETTINGS)}
    return decisive | {"uri": tracking_uri(config.tracking, runs), "experiment": config.tracking.experiment}
