"""Where a run starts: anew, from the weights of another, or where it stopped."""

import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from shlex import quote
from typing import NamedTuple

from ffdist.checkpoint import CommitError, Commits, DamagedCommit, Manifest
from ffdist.config import DECIDES_NOTHING, Config, ConfigError
from ffdist.config_file import load_config, parse_config
from ffdist.data.datasets import Dataset
from ffdist.data.folder import Folder
from ffdist.ff.network import Architecture, Network
from ffdist.files import UnsafeFile, file_in
from ffdist.paths import in_each_folder, kind_of
from ffdist.pipeline.hardware import Hardware
from ffdist.pipeline.schedule import Position
from ffdist.pipeline.stage import State, layer_name, state_of
from ffdist.prepare import Prepared
from ffdist.tracking.outbox import OUTBOX, Outbox

CONFIG, SUMMARY = "config.yaml", "summary.json"
"""Resolved configuration and final figures in the folder of a run."""
MAX_CONFIG_BYTES = 2**20
FORWARD_FORWARD, BACKPROPAGATION = "Forward-Forward", "backpropagation"
LEARNED = ("weight", "bias", "mean_activity")
"""What one run takes over from another; what an optimizer keeps begins anew."""


class Start(NamedTuple):
    """Where a run starts."""

    state: State
    """Of every part; empty where each begins as it was made."""
    manifest: Manifest | None = None
    """Of the commit that the run goes on from, if it goes on."""
    remarks: tuple[str, ...] = ()
    """What the user should know."""

    @property
    def position(self) -> Position:
        """Where in the schedule."""
        return Position(self.manifest.epoch, self.manifest.minibatch) if self.manifest else Position()

    @property
    def precision(self) -> str | None:
        """The precision that the run resolved before; None if it is new."""
        recorded = parse_config(self.manifest.config, "manifest").training.precision if self.manifest else "auto"
        return None if recorded == "auto" else recorded


def find_run(run: str, runs: Path, config: Config | None = None) -> Path:
    """Returns the folder of a run, given by its folder or by its MLflow run id.

    Where the folder is lost and `checkpoint.uri` of `config` has the commits, it is the one to be made anew.

    Raises:
        ConfigError: There is none.
    """
    if run:
        if os.path.isfile(os.path.join(run, CONFIG)):  # noqa: PTH113, PTH118, a run given may be too long for a path
            return Path(run)
        for path in in_each_folder(runs, OUTBOX):
            if Outbox.fact_of(path, "run_id") == run:
                return path.parent
        if config and config.checkpoint.uri and commits_of(config, Path(run)).names():
            return runs / Path(run).resolve().name
    raise ConfigError(f"a run is its folder, or the MLflow run id of one in {runs} (given: {run})")


def config_of(folder: Path, overrides: Iterable[str] = ()) -> Config:
    """Returns the configuration of a run, with what is set over it.

    Raises:
        ConfigError: It is missing or damaged.
    """
    try:
        return load_config(str(file_in(folder, CONFIG, max_bytes=MAX_CONFIG_BYTES)), overrides)
    except (OSError, UnsafeFile) as error:
        raise ConfigError(f"{folder / CONFIG} cannot be read ({error}); train the run again") from error


def commits_of(config: Config, folder: Path) -> Commits:
    """Returns the commits of a run: in its own folder, or by its name where `checkpoint.uri` says."""
    inner = folder.resolve().name if config.checkpoint.uri else "commits"
    return Commits(Folder(config.checkpoint.uri or str(folder), CommitError, inner))


class Checkpoint(NamedTuple):
    """A checkpoint of a run, chosen to be used."""

    name: str
    kind: str
    """`best` on validation, `last`, or `` for another."""
    path: str
    manifest: Manifest

    def __str__(self) -> str:
        """Names it for the user."""
        return f"{self.kind}, {self.path}".removeprefix(", ")


def find_checkpoint(commits: Commits, which: str | None = None) -> Checkpoint:
    """Finds a checkpoint of a run.

    Args:
        commits: Of the run.
        which: `best`, `last` or the checkpoint's name; None for the best one if the run was validated, else the last.

    Raises:
        ConfigError: There is no such checkpoint, or it is damaged.
    """
    with _refusing():
        names = commits.names()
        if not names:
            raise ConfigError(
                f"{commits.folder.path()} holds no whole commit; set checkpoint.uri in its "
                f"configuration to where they are, or train it again"
            )
        if which not in (None, "best", "last", *names):
            raise ConfigError(
                f"a checkpoint must be best, last or the name of one (given: {which}, {commits.folder.path()} has: "
                f"{', '.join(names)})"
            )
        best = None if which == "last" else commits.read_manifest(names[-1]).best_commit
        if which == "best" and best is None:
            raise ConfigError(
                f"{commits.folder.path()} has no best checkpoint, because the run was not validated; use last, or set "
                f"training.validation_samples in a new run"
            )
        name = names[-1] if which == "last" else best or names[-1] if which in (None, "best") else str(which)
        kind = "best" if name == best else "last" if name == names[-1] else ""
        return Checkpoint(name, kind, commits.path(name), commits.read_manifest(name))


def read_state(commits: Commits, checkpoint: Checkpoint, only: Collection[str] | None = None) -> State:
    """Returns what a checkpoint holds; of each part only the tensors named, where some are.

    Raises:
        ConfigError: It is damaged.
    """
    with _refusing():
        return commits.read(checkpoint.name, only)[1]


def check_data(config: Config, dataset: Dataset, manifest: Manifest, folder: Path) -> None:
    """Checks that a dataset is the one that a run was trained and tested on.

    Raises:
        ConfigError: It is another.
    """
    for split, digest in (("train", manifest.dataset_sha256), ("test", manifest.test_dataset_sha256)):
        if digest and digest != dataset.sha256(split):
            key = "data.path" if config.data.path else "data.root"
            raise ConfigError(
                f"{folder} was {split}ed on other samples than {config.data.path or config.data.name} holds now "
                f"(the SHA-256 of the {split} samples differs); set {key} to where its own data is"
            )


def network_of(architecture: Architecture, state: State) -> Network:
    """Returns a network that predicts with the weights of a state."""
    modules = {"readout": "readout"} | {layer_name(i): f"layers.{i}" for i in range(len(architecture.layers))}
    tensors = {f"{module}.{name}": tensor for part, module in modules.items() for name, tensor in state[part].items()}
    return Network.for_inference(architecture, tensors)


def resume(config: Config, prepared: Prepared, folder: Path, *, from_older: bool) -> Start:
    """Reads the commit that a run goes on from.

    Args:
        config: What the user asks for now.
        prepared: What it says.
        folder: Of the run.
        from_older: Whether a damaged commit is passed over.

    Raises:
        ConfigError: The run is finished, has no commit or a damaged one, or was another run.
    """
    if kind_of(folder / SUMMARY) == "file":
        raise ConfigError(f"{folder} is finished; give it more training as a new run, by --from {quote(str(folder))}")
    commits, passed_over = commits_of(config, folder), []
    with _refusing():
        names = commits.names()
    for name in reversed(names):
        try:
            manifest, state = commits.read(name)
        except CommitError as error:
            if not from_older:
                raise _refusal(error, "add --resume-from-older to go on from the commit before it") from error
            passed_over.append(f"passed over: {error}")
            continue
        remarks = [*passed_over, f"going on from {commits.path(name)}, {manifest.step:,} minibatches into the run"]
        check_data(config, prepared.dataset, manifest, folder)
        now = _algorithm(prepared.architecture)
        if (then := manifest.made_with.get("algorithm", now)) != now:
            raise ConfigError(
                f"{folder} was trained by {then} and can only go on so; `ffdist baseline` does {BACKPROPAGATION}, "
                f"`ffdist train` {FORWARD_FORWARD}"
            )
        return Start(state, manifest, (*remarks, *_check_same(config, manifest, folder)))
    damaged = f"; {len(passed_over)} are damaged" if passed_over else ""
    raise ConfigError(
        f"{commits.folder.path()} holds no whole commit to go on from{damaged}; set checkpoint.uri as it "
        f"was, or train it again"
    )


def go_on(commits: Commits, start: Start, last: str) -> Start:
    """Returns where a run that lost a part goes on.

    Args:
        commits: Of the run.
        start: Where it started.
        last: The newest commit that it started from or made; one that lies beyond may be damaged, and passed over.

    Raises:
        CommitError: That commit is damaged.
    """
    if not last:
        return start
    manifest, state = commits.read(last)
    return Start(state, manifest)


def start_from(config: Config, architecture: Architecture, folder: Path, which: str | None = None) -> Start:
    """Takes over what another run learned.

    Args:
        config: Of the new run.
        architecture: Of the new run.
        folder: Of the other run.
        which: Its checkpoint, as `find_checkpoint` takes it.

    Raises:
        ConfigError: It has no commit, or its layers do not fit.
    """
    with suppress(ConfigError):  # its commits lie where it said, not where the new run's will
        config = config_of(folder)
    commits = commits_of(config, folder)
    checkpoint = find_checkpoint(commits, which)
    learned = read_state(commits, checkpoint, LEARNED)
    network, state, remarks = Network(architecture), State(), [f"starting from checkpoint: {checkpoint}"]
    parts = {layer_name(index): layer for index, layer in enumerate(network.layers)} | {"readout": network.readout}
    for part, module in parts.items():
        state[part] = state_of(module)
        taken = learned.get(part, {})
        shapes = [{key: list(found[key].shape) for key in taken if key in found} for found in (taken, state[part])]
        if taken and shapes[0] == shapes[1]:
            state[part] |= taken
        elif part == "readout":
            remarks.append("its readout does not fit and begins anew")
        else:
            raise ConfigError(
                f"the layers of {folder} do not fit ({part}: {shapes[0] or 'none there'}, here "
                f"{list(state[part]['weight'].shape)}); set model.layers and data.label as they were"
            )
    return Start(state, None, tuple(remarks))


def provenance(architecture: Architecture, hardware: dict[str, Hardware]) -> dict[str, str | Hardware]:
    """Returns what the weights of a run depend on beside its configuration, if only in their last bits."""
    return {"algorithm": _algorithm(architecture), **hardware}


def differences(start: Start, hardware: dict[str, Hardware]) -> str:
    """Returns a warning if a resumed run computes on other hardware than its checkpoint did, else an empty string."""
    parts: dict[str, list[str]] = {}  # by what differs, so that a difference of all actors is named once
    for part, now in hardware.items():
        then = start.manifest.made_with.get(part) if start.manifest else None
        if isinstance(then, dict):  # not of a checkpoint of an earlier version, nor of more negative actors
            for name in now.keys() & then.keys():
                if now[name] != then[name]:
                    parts.setdefault(f"{name} was {then[name]} and is {now[name]}", []).append(part)
    found = "; ".join(f"{', '.join(names)}: {difference}" for difference, names in sorted(parts.items()))
    return found and f"warning: the last bits may differ from a run on the same hardware throughout ({found})"


def _algorithm(architecture: Architecture) -> str:
    return FORWARD_FORWARD if architecture.learned_goodness else BACKPROPAGATION


@contextmanager
def _refusing() -> Iterator[None]:
    """Makes of what cannot be read before a run begins a reason not to begin it."""
    try:
        yield
    except CommitError as error:
        raise _refusal(error, "bring it back from a copy, or train the run again") from error


def _refusal(error: CommitError, way_out: str) -> ConfigError:
    """Tells what cannot be read, with a way out of damage."""
    return ConfigError(f"{error}; {way_out}" if isinstance(error, DamagedCommit) else str(error))


def _check_same(config: Config, manifest: Manifest, folder: Path) -> list[str]:
    then, now = parse_config(manifest.config, str(folder)).flat(), config.flat()
    if config.training.precision == "auto":
        now["training.precision"] = then["training.precision"]
    changed = [key for key in now if now[key] != then[key]]
    free = (*DECIDES_NOTHING, "data.path")  # the samples were compared, wherever they are
    wrong = [f"{key}: {then[key]} then, {now[key]} now" for key in changed if not key.startswith(free)]
    if wrong:
        raise ConfigError(
            f"{folder} can only go on as the run that it was ({'; '.join(wrong)}); leave that as it was, or make a new "
            f"run of it by --from {quote(str(folder))}"
        )
    return [f"changed: {key} is now {now[key]}" for key in changed]
