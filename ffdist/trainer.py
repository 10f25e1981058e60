"""The training loop, from dataset to digest, on any runner."""

import json
import os
import shlex
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, get_args

from ffdist.checkpoint import Commits
from ffdist.config import Config, ConfigError, RunFailed
from ffdist.config_file import find_config, load_config, parse_config
from ffdist.data.datasets import Dataset
from ffdist.data.folder import Folder
from ffdist.failures import ClusterStopped, Failures
from ffdist.ff.negatives import NegativesError
from ffdist.finished import Run
from ffdist.interrupts import stop_requests
from ffdist.launch import Pipeline, Placed, RunnerName, allocate, assign_layers, machine, measure
from ffdist.loop import Loop
from ffdist.pipeline.hardware import Hardware
from ffdist.precision import Measured, is_driver_enough, measurement, own_device, resolve, with_precision
from ffdist.prepare import prepare
from ffdist.recovery import run_to_the_end
from ffdist.runtime.access import find_cluster
from ffdist.start import CONFIG, SUMMARY, Start, commits_of, differences, provenance, resume, start_from
from ffdist.tracking.progress import Display, closing_words, description
from ffdist.tracking.server import DESCRIPTION, how_to_look, tracking_uri
from ffdist.tracking.tracker import Tracker

PLACING_AGAIN_S = 900.0
"""Longest that a run waits for places after a loss; a cloud needs minutes to make another machine."""

LONGEST_NAME = 200
"""Bytes of a run's name that its folder's name begins with; file systems take 255, with the time and a number."""


def train(
    config: Config | Path | str | dict[str, Any],
    *,
    runner: RunnerName = "ray",
    address: str | None = "local",
    runs: Path | str = "runs",
    name: str | None = None,
    resumed: Path | str | None = None,
    from_older: bool = False,
    origin: Path | str | None = None,
    checkpoint: str | None = None,
) -> Run:
    """Trains a network, evaluates it and keeps it.

    Args:
        config: What to train: a configuration, the path of a file, the name of a shipped one, or nested dicts.
        runner: `ray` spreads the stages over actors; `serial` runs the same in this process; `backpropagation` trains
            the same layers end to end in this process, as a reference.
        address: Ray cluster to join; `local` starts one, None joins the one that this machine is part of, if any.
        runs: Folder that gets the run's own folder, and the tracking database where nothing else is set.
        name: Start of the run's name; the configuration's, where it has one, if there is none.
        resumed: Folder of a run that goes on from its newest commit, and ends as if it had never stopped.
        from_older: Whether a damaged commit is passed over.
        origin: Folder of a run from whose weights this one starts.
        checkpoint: Of `origin`: `best`, `last` or a name; the best one if it was validated, else the last.

    Raises:
        ConfigError: Something asked for cannot be; nothing was trained.
        RunFailed: The run had to stop; what was committed is kept.
        KeyboardInterrupt: The run was asked to stop; it can go on from its last commit.
    """
    started, runs = time.time(), Path(runs)
    if runner not in get_args(RunnerName):
        raise ConfigError(f"runner must be one of {', '.join(get_args(RunnerName))} (given: {runner})")
    if name is not None and (Path(name).name != name or "\0" in name):
        raise ConfigError(f"name is the start of a folder's name and must hold no / (name: {name!r})")
    if isinstance(config, dict):
        config = parse_config(config, "config")
    elif not isinstance(config, Config):
        name, config = name or find_config(str(config)).stem, load_config(str(config))
    if runner == "backpropagation":
        config = config.by_backpropagation()
    uri = tracking_uri(config.tracking, runs)
    if config.checkpoint.uri:
        Folder(config.checkpoint.uri, ConfigError).check_writable()
    if runner == "ray":
        address = find_cluster(address)  # a wrong address is an error before the data is read
    with ExitStack() as stack:
        prepared = prepare(config)
        if runner == "backpropagation":
            prepared = prepared._replace(architecture=replace(prepared.architecture, learned_goodness=False))
        start = Start({})
        if resumed is not None:
            resumed = Path(resumed)
            start = resume(config, prepared, resumed, from_older=from_older)
        elif origin is not None:
            start = start_from(config, prepared.architecture, Path(origin), checkpoint)
        _make_folder(runs)
        tracker = Tracker(uri, config.tracking, runs=runs)  # a server that is away is an error before Ray starts
        in_driver = is_driver_enough(config, runner, address)
        joined = stack.enter_context(machine(runner, address))  # Ray starts beside what follows
        if start.precision:
            config, prepared = with_precision(config, prepared, start.precision)
        measured: list[Measured] = []
        if in_driver:
            measured = [measurement(runner, prepared, config, own_device(config))()]
        stack.enter_context(tracker)  # opens beside what follows, too
        display = stack.enter_context(Display(config.passes, prepared.order.minibatches, prepared.order.batch_size))
        display.doing("starting")
        resources = joined()
        asked_to_stop = stack.enter_context(stop_requests(config.pipeline.stop_timeout_s))
        attempt = stack.enter_context(ExitStack())  # refused, it leaves no trace of the run
        place = attempt.enter_context(allocate(runner, prepared, config, resources))
        precision, costs = resolve(config.training.precision, measured or measure(place, prepared, config))
        config, prepared = with_precision(config, prepared, precision.value)
        placed = assign_layers(place, prepared, config, costs)
        tracker.wait_until_open()  # before anything is written
        folder = resumed or _new_folder(runs, name or "run")
        _begin(tracker, display, config, folder, start, {"runner": runner}, Path(origin) if origin else None)
        if precision.reason and not start.precision:
            display.say(precision.reason)
            tracker.log_tags({"precision": precision.reason})
        if not start.manifest:
            tracker.log_dataset(_described(config, prepared.dataset))
        display.say(f"data: {prepared.dataset.in_words()}")
        commits, limits = commits_of(config, folder), config.pipeline
        failures = Failures(limits.max_failures, limits.failure_window_s, tracker.recoveries(), tracker.note_recoveries)
        if start.manifest:
            failures.begin("the driver; resumed", start.manifest.step, started)
            failures.mark("placed", 0)
        reached: dict[str, float] = {}  # when first, whatever was lost later

        def mark(what: str, step: int) -> None:
            reached.setdefault(what, time.time())
            failures.mark(what, step)

        def note_hardware(start: Start, hardware: dict[str, Hardware]) -> dict[str, Any]:
            if found := differences(start, hardware):
                display.say(found)
                failures.note_differences(found)
                tracker.log_tags({"hardware_differences": found})
            return provenance(prepared.architecture, hardware)

        def place_again() -> Placed:
            place = attempt.enter_context(allocate(runner, prepared, config, resources))
            return assign_layers(place, prepared, config, costs, again=True)

        def pipelines() -> Iterator[AbstractContextManager[Pipeline]]:
            nonlocal attempt, placed
            while True:
                display.say(placed.in_words)
                display.doing("starting the pipeline")
                tracker.log_tags({"decided": placed.in_words, "cluster": placed.cluster})
                yield _started(attempt, placed, commits)
                attempt = stack.enter_context(ExitStack())
                display.doing("looking for places")
                placed = _place_again(attempt, asked_to_stop, placed, place_again)
                failures.mark("placed", 0)

        try:
            loop = run_to_the_end(
                pipelines(),
                lambda start: Loop(
                    config, prepared, commits, start, tracker, display, partial(note_hardware, start), mark
                ),
                commits,
                start,
                failures,
                asked_to_stop,
                display.say,
            )
            if loop.stopped:
                raise KeyboardInterrupt(f"stopped in order; resume with --resume {shlex.quote(str(folder))}")
            summary = {
                **loop.figures(),
                "epochs": config.passes,
                "predicted_samples_per_s": placed.predicted_samples_per_s,
                "start_s": reached["chunk"] - started if "chunk" in reached else None,
                "wall_s": time.time() - started,
                "runner": runner,
                "precision": precision.value,
                "stages": len(placed.blueprint.stage_layers),
                "mlflow_run_id": tracker.run_id,
                "mlflow_tracking_uri": tracker.uri,
                "recoveries": failures.recoveries,
            }
            tracker.log_tags({"weights_sha256": summary["weights_sha256"]})
            tracker.log_metrics({"train_s": summary["train_s"]}, loop.samples)
            tracker.note_end("FINISHED")
            Folder(str(folder), RunFailed).put(SUMMARY, json.dumps(summary, indent=2).encode())
            _illustrate(loop, tracker, summary, folder, display.say)
        except (OSError, sqlite3.Error) as error:  # a disk is full or gone
            raise RunFailed(f"{error}; resume with --resume {shlex.quote(str(folder))}") from error
        except ClusterStopped as error:
            raise ClusterStopped(f"{error}; resume the run with --resume {shlex.quote(str(folder))}") from error
        except NegativesError as error:
            raise RunFailed(f"negatives.kind={prepared.negatives.kind}: {error}") from error
    display.say(closing_words(summary, folder, look=how_to_look(tracker.uri, config.tracking.experiment, runs)))
    return Run(folder, summary)


def _illustrate(
    loop: Loop, tracker: Tracker, summary: dict[str, Any], folder: Path, say: Callable[[str], None]
) -> None:
    """Adds to a finished run what only shows it; whatever fails here is a warning."""
    try:
        loop.illustrate(folder, lambda text: say(f"warning: {text}"))
        tracker.log_tags({DESCRIPTION: description(summary, folder)})
    except KeyboardInterrupt:
        tracker.hurry()
        say("warning: interrupted; the run is finished, but not all plots are drawn or uploaded")
    except Exception as error:
        say(f"warning: the run is finished, but not all plots are drawn or uploaded ({error!r})")


def _described(config: Config, dataset: Dataset) -> dict[str, Any]:
    return {
        "name": config.data.name,
        "digest": dataset.sha256("train"),
        "source": str(config.data.path or config.data.name),
        "profile": {
            "samples": {split: len(labels) for split, labels in dataset.labels.items()},
            "classes": dataset.classes,
            "channels, height, width": dataset.shape,
        },
    }


def _begin(
    tracker: Tracker,
    display: Display,
    config: Config,
    folder: Path,
    start: Start,
    parameters: dict[str, Any],
    origin: Path | None,
) -> None:
    """Begins or resumes the run in MLflow and in its folder; if MLflow refuses a new run, its folder is removed."""
    manifest = start.manifest
    if not manifest:
        try:
            tracker.begin(folder, config.flat() | parameters | ({"from": str(origin)} if origin else {}))
        except BaseException:
            with suppress(OSError):  # of one that is not empty, as another process has it
                folder.rmdir()
            raise
    moved = manifest and parse_config(manifest.config, str(folder)).data != config.data
    if moved or not (folder / CONFIG).is_file():  # the folder may be lost, and its checkpoints elsewhere
        Folder(str(folder), RunFailed).put(CONFIG, config.to_yaml().encode())
    if manifest:
        tracker.resume(folder, manifest.mlflow_run_id)
        tracker.log_tags({"resumed": "; ".join(start.remarks)})
    else:
        if origin:
            tracker.note_origin(origin)
        tracker.log_artifact(folder / CONFIG)
    tracker.log_tags({"folder": str(folder.resolve())})
    for remark in start.remarks:
        display.say(remark)


@contextmanager
def _started(attempt: ExitStack, placed: Placed, commits: Commits) -> Iterator[Pipeline]:
    """Starts the pipeline in its place, and gives the place back at the end of a `with` block."""
    with attempt:
        yield attempt.enter_context(placed.start(commits.folder))


def _place_again(
    attempt: ExitStack, asked_to_stop: Callable[[], bool], before: Placed, place: Callable[[], Placed]
) -> Placed:
    """Places the pipeline on what is left; a cluster needs a while to know what that is.

    Raises:
        RunFailed: It cannot be placed.
        KeyboardInterrupt: The run was asked to stop.
    """
    deadline = time.monotonic() + PLACING_AGAIN_S
    while True:
        try:
            placed = place()
            if placed.blueprint.device == before.blueprint.device:
                return placed
            raise ConfigError(f"there is no {before.blueprint.device} any more, and another's last bits would differ")
        except ConfigError as error:
            attempt.close()
            if time.monotonic() > deadline:
                raise RunFailed(f"what was lost cannot be replaced: {error}") from error
        if asked_to_stop():
            raise KeyboardInterrupt
        time.sleep(1)


def _new_folder(runs: Path, name: str) -> Path:
    """Makes the folder of a run; of runs that start in one second, each gets its own."""
    name = os.fsencode(name)[:LONGEST_NAME].decode(errors="ignore")
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    return next(
        folder for number in count(1) if _make_folder(folder := runs / (f"{stem}-{number}" if number > 1 else stem))
    )


def _make_folder(folder: Path) -> bool:
    """Makes a folder and says whether it is new."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return False
    except OSError as error:
        raise ConfigError(f"the folder {folder} cannot be written ({error.strerror}); set --runs DIR") from error
    return True
