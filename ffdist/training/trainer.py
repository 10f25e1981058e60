"""Training a network, from a configuration to a finished run."""

import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, get_args

from ffdist.config.loading import find_config, load_config, load_for_arrays, parse_config
from ffdist.config.schema import Config
from ffdist.config.sections import ARRAYS
from ffdist.errors import ClusterStopped, ConfigError, RunFailed
from ffdist.ff.negatives import NegativesError
from ffdist.runs.folder import checkpoints_of, resume_command
from ffdist.runs.run import Run
from ffdist.runtime.access import find_cluster
from ffdist.signals import stop_requests
from ffdist.storage.folder import Folder
from ffdist.tracking.server import tracking_uri, ui_command
from ffdist.tracking.tracker import Tracker
from ffdist.training.callbacks import Callback, CallbackFailed, Callbacks, callback_name, load_callbacks
from ffdist.training.checkpointing import Checkpointer
from ffdist.training.early_stopping import EarlyStopping
from ffdist.training.launch import RunnerName, machine
from ffdist.training.layer_watch import LayerWatch
from ffdist.training.loop import Loop
from ffdist.training.metrics import Metrics
from ffdist.training.node_metrics import NodeMetrics
from ffdist.training.precision import driver_device, is_driver_enough, measurement, with_precision
from ffdist.training.prepare import Prepared, prepare
from ffdist.training.progress import Display, closing_text
from ffdist.training.record import Record
from ffdist.training.recoveries import Recoveries
from ffdist.training.reporting import Reporter
from ffdist.training.resume import Start, find_interrupted, start_from_checkpoint, start_from_weights
from ffdist.training.session import Session

MAX_NAME_BYTES = 200
"""Bytes of a run's name that its folder's name begins with; file systems take 255, with the time and a number."""


def train(  # noqa: PLR0913, the one entry point
    config: Config | Path | str | dict[str, Any],
    *,
    data: Any = None,
    runner: RunnerName = "ray",
    address: str | None = "local",
    runs: Path | str = "runs",
    name: str | None = None,
    resume: Path | str | None = None,
    skip_damaged: bool = False,
    init_from: Path | str | None = None,
    checkpoint: str | None = None,
    callbacks: Sequence[Callback] = (),
) -> Run:
    """Trains a network, evaluates it and keeps it.

    Args:
        config: Configuration of the run: a `Config`, the path of a file, the name of a shipped one, or nested dicts.
        data: Samples and labels, in place of the dataset in `config`, whose section `data` may then be missing. One of

            - `(inputs, labels)`. A fifth of the samples, stratified by class and chosen by the seed, is the test set.
            - `{"train": (inputs, labels), "test": (inputs, labels)}`, and optionally `"validation"`.
            - a torch `Dataset` with items `(input, label)` in place of a pair, such as one of torchvision's.

            Inputs are uint8 images `[N, H, W]`, `[N, C, H, W]` or `[N, H, W, C]` with 1 or 3 channels, Pillow images,
            or the rows of a table of numbers `[N, D]`. Labels are integers from 0, or strings. The run gets a copy.
        runner: `ray` runs each stage in an actor; `serial` runs the same in this process; `backpropagation` trains the
            same layers end to end in this process, as a baseline.
        address: Ray cluster to join; `local` starts one, None joins the one that this machine is part of, if any.
        runs: Folder for the folders of runs, and for the tracking database if no other is set.
        name: Start of the name of the run's folder; `tracking.name` precedes it. Default: name of the configuration.
        resume: Folder of a run to resume from its newest checkpoint. It ends as if it had never stopped.
        skip_damaged: Whether to resume from an older checkpoint if the newest one is damaged.
        init_from: Folder of a run whose weights are the initial weights.
        checkpoint: Checkpoint of `init_from`: `best`, `last` or a name; by default the best one if there is one.
        callbacks: Objects that follow the run, in addition to `training.callbacks`.

    Raises:
        ConfigError: A setting or an input is wrong; nothing was trained.
        RunFailed: The run had to stop; its checkpoints are kept.
        KeyboardInterrupt: A stop was requested; the run can be resumed from its last checkpoint.
    """
    started, runs = time.time(), Path(runs)
    config, name = _read_config(config, runner, name, is_given=data is not None)
    uri = tracking_uri(config.tracking, runs)
    options: dict[str, str] = {"runner": runner}
    options |= {"callbacks": ", ".join(map(callback_name, callbacks))} if callbacks else {}
    callbacks = load_callbacks(config.training.callbacks, callbacks)
    if config.checkpoint.uri:
        Folder(config.checkpoint.uri, ConfigError).check_writable()
    if runner == "ray":
        address = find_cluster(address)  # a wrong address is an error before the data is read
    with ExitStack() as stack:
        prepared = _prepare(config, runner, data)
        start = _find_start(
            config, prepared, resume, init_from, checkpoint, skip_damaged=skip_damaged, callbacks=callbacks
        )
        _make_folder(runs)
        # A server that is away is an error before Ray starts.
        tracker = Tracker(uri, config.tracking, runs=runs, is_new=resume is None)
        in_driver = is_driver_enough(config, runner, address)
        joined = stack.enter_context(machine(runner, address))  # Ray starts in the background
        if start.precision:
            config, prepared = with_precision(config, prepared, start.precision)
        measured = [measurement(runner, prepared, config, driver_device(config))()] if in_driver else []
        stack.enter_context(tracker)  # MLflow opens in the background
        display = stack.enter_context(Display(config.num_epochs, prepared.order))
        resources = joined()
        should_stop = stack.enter_context(stop_requests(config.pipeline.stop_timeout_s))
        session = stack.enter_context(Session(runner, resources, config, prepared, measured))
        config, prepared = session.config, session.prepared
        tracker.wait_until_open()  # before anything is written
        record = Record(tracker, display, Path(resume) if resume is not None else _new_folder(runs, name or "run"))
        record.begin(config, prepared.dataset, start, options, init_from)
        if session.precision.reason and not start.precision:
            record.say(session.precision.reason, precision=session.precision.reason.removeprefix("precision: "))
        record.say(f"data: {prepared.dataset.describe()}")

        checkpoints, limits = checkpoints_of(config, record.folder), config.pipeline
        recoveries = Recoveries(
            limits.max_failures, limits.failure_window_s, tracker.recoveries(), tracker.note_recoveries, record.say
        )
        if start.manifest:
            recoveries.begin("the driver; resumed", start.step, started)
            recoveries.mark("placed")
        metrics = Metrics(
            config.tracking.log_every_minibatches,
            prepared.order.batch_size,
            record.log,
            LayerWatch(config, prepared.order, record.say).check,
            prepared.dataset.names,
        )
        reporter, stopping = Reporter(config, prepared, record), EarlyStopping(config, prepared)
        checkpointer = Checkpointer(
            config,
            prepared,
            checkpoints,
            metrics,
            stopping,
            run_id=tracker.run_id,
            provenance=options,
            say=record.say,
            on_best=reporter.log_best,
        )
        observers = [
            *(metrics, display, reporter, NodeMetrics(tracker, runner, config.training.batch_size)),
            Callbacks(callbacks, config, prepared, record, stopping),
        ]
        loop = Loop(config, prepared, checkpointer, stopping, recoveries, observers)
        with _resumable(record.folder, config, prepared, has_callbacks="callbacks" in options) as fix:
            loop.run(session.pipelines(record, recoveries, checkpoints.folder, should_stop), start, should_stop)
            if loop.interrupted:
                raise KeyboardInterrupt(f"stopped; resume with: {fix}")
            metrics.finish(loop.step)
            summary = reporter.finish(loop, checkpointer, session, recoveries, started)
    record.display.print(closing_text(summary, record.folder, look=ui_command(uri, tracker.experiment, runs)))
    return _finished_run(Run(record.folder, summary), config, prepared)


def resume(
    run: Path | str,
    overrides: Iterable[str] = (),
    *,
    data: Any = None,
    callbacks: Sequence[Callback] = (),
    runner: RunnerName | None = None,
    address: str | None = "local",
    runs: Path | str = "runs",
    skip_damaged: bool = False,
) -> Run:
    """Resumes an interrupted run from its newest checkpoint, with its own configuration.

    Args:
        run: Folder or MLflow run id of the run.
        overrides: `section.key=value` strings, of settings that do not affect the weights.
        data: The same samples as before, if they were given to `train`.
        callbacks: See `train`.
        runner: By default that of the run.
        address: See `train`.
        runs: Runs folder to search for an id.
        skip_damaged: See `train`.

    Raises:
        ConfigError: There is no such run, it is finished, or a setting is wrong.
        RunFailed: See `train`.
        KeyboardInterrupt: See `train`.
    """
    interrupted = find_interrupted(run, Path(runs), overrides)
    return train(
        interrupted.config,
        data=data,
        callbacks=callbacks,
        runner=runner or interrupted.runner,
        address=address,
        runs=interrupted.runs,
        resume=interrupted.folder,
        skip_damaged=skip_damaged,
    )


def _read_config(
    config: Config | Path | str | dict[str, Any], runner: RunnerName, name: str | None, *, is_given: bool
) -> tuple[Config, str | None]:
    """Returns the configuration of a run, and the prefix of its name."""
    if runner not in get_args(RunnerName):
        raise ConfigError(f"runner must be one of {', '.join(get_args(RunnerName))} (given: {runner})")
    if name is not None and (Path(name).name != name or "\0" in name):
        raise ConfigError(f"name is the start of a folder's name and must hold no / (name: {name!r})")
    if isinstance(config, Path | str):
        name = name or find_config(str(config)).stem
    if is_given:
        config = load_for_arrays(config)
    elif isinstance(config, dict):
        config = parse_config(config, "config")
    elif not isinstance(config, Config):
        config = load_config(str(config))
    return config.by_backpropagation() if runner == "backpropagation" else config, config.tracking.name or name


def _find_start(
    config: Config,
    prepared: Prepared,
    resume: Path | str | None,
    init_from: Path | str | None,
    checkpoint: str | None,
    *,
    skip_damaged: bool,
    callbacks: Sequence[Callback],
) -> Start:
    """Returns where a run starts; for the arguments see `train`."""
    if resume is not None:
        start = start_from_checkpoint(config, prepared, Path(resume), skip_damaged=skip_damaged)
        return start.with_callbacks(map(callback_name, callbacks))
    if init_from is not None:
        return start_from_weights(config, prepared.architecture, Path(init_from), checkpoint)
    return Start({})


def _prepare(config: Config, runner: RunnerName, data: Any) -> Prepared:
    prepared = prepare(config, data)
    if runner != "backpropagation":
        return prepared
    return prepared._replace(architecture=replace(prepared.architecture, learned_goodness=False))


def _finished_run(run: Run, config: Config, prepared: Prepared) -> Run:
    """Returns a run with its dataset, if the run's folder does not say how to load it again."""
    if not config.data.is_loadable:
        vars(run)["dataset"] = prepared.dataset  # the value of a cached property
    return run


@contextmanager
def _resumable(folder: Path, config: Config, prepared: Prepared, *, has_callbacks: bool) -> Iterator[str]:
    """Adds to errors how the run is resumed: in Python, if samples or callbacks were given there; yields the same."""
    has_data = config.data.name == ARRAYS
    fix = resume_command(folder, config)
    if has_data or has_callbacks:
        fix = f"ffdist.resume({str(folder)!r}{', data=...' * has_data}{', callbacks=...' * has_callbacks})"
    try:
        yield fix
    except (OSError, sqlite3.Error) as error:  # a disk is full or gone
        raise RunFailed(f"{error}; resume with: {fix}") from error
    except (ClusterStopped, CallbackFailed) as error:
        raise type(error)(f"{error}; resume with: {fix}") from error
    except NegativesError as error:
        raise RunFailed(f"negatives.kind={prepared.negatives.kind}: {error}") from error


def _new_folder(runs: Path, name: str) -> Path:
    """Makes the folder of a run; of runs that start in one second, each gets its own."""
    name = os.fsencode(name)[:MAX_NAME_BYTES].decode(errors="ignore")
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    return next(
        folder for number in count(1) if _make_folder(folder := runs / (f"{stem}-{number}" if number > 1 else stem))
    )


def _make_folder(folder: Path) -> bool:
    """Makes a folder; returns whether it is new."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return False
    except OSError as error:
        raise ConfigError(f"the folder {folder} cannot be written ({error.strerror}); set --runs DIR") from error
    return True
