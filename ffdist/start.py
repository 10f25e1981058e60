"""Where a run starts: anew, from the weights of another, or where it stopped."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import torch

from ffdist.checkpoint import CommitError, Commits, DamagedCommit, Manifest, commit_name
from ffdist.config import DECIDES_NOTHING, Config, ConfigError
from ffdist.config_file import load_config, parse_config
from ffdist.data.folder import Folder
from ffdist.ff.network import Architecture, Network
from ffdist.pipeline.schedule import Position
from ffdist.pipeline.stage import State, layer_name, state_of
from ffdist.prepare import Prepared
from ffdist.tracking.outbox import OUTBOX, Outbox

CONFIG, SUMMARY = "config.yaml", "summary.json"
"""Resolved configuration and final figures in the folder of a run."""
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


def find_run(run: str, runs: Path, config: Config | None = None) -> Path:
    """Returns the folder of a run, given by its folder or by its MLflow run id.

    Where the folder is lost and `checkpoint.uri` of `config` has the commits, it is the one to be made anew.

    Raises:
        ConfigError: There is none.
    """
    if run:
        if (Path(run) / CONFIG).is_file():
            return Path(run)
        for path in sorted(runs.glob(f"*/{OUTBOX}")):
            if Outbox.fact_of(path, "run_id") == run:
                return path.parent
        if config and config.checkpoint.uri and commits_of(config, Path(run)).names():
            return runs / Path(run).resolve().name
    raise ConfigError(f"a run is its folder, or the MLflow run id of one in {runs} (given: {run})")


def commits_of(config: Config, folder: Path) -> Commits:
    """Returns the commits of a run: in its own folder, or by its name where `checkpoint.uri` says."""
    inner = folder.resolve().name if config.checkpoint.uri else "commits"
    return Commits(Folder(config.checkpoint.uri or str(folder), CommitError, inner))


def newest(commits: Commits) -> tuple[Manifest, State]:
    """Returns the newest commit of a run.

    Raises:
        ConfigError: There is none, or it is damaged.
    """
    with _refusing():
        names = commits.names()
        if not names:
            raise ConfigError(
                f"{commits.folder.path()} holds no whole commit; set checkpoint.uri in its "
                f"configuration to where they are, or train it again"
            )
        return commits.read(names[-1])


def network_of(architecture: Architecture, state: State) -> Network:
    """Returns the network of a state."""
    network = Network(architecture)
    for index, layer in enumerate(network.layers):
        layer.load_state_dict(state[layer_name(index)])
    network.readout.load_state_dict(state["readout"])
    return network


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
    if (folder / SUMMARY).is_file():
        raise ConfigError(f"{folder} is finished; give it more training as a new run, by --from {folder}")
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
        if manifest.dataset_sha256 != prepared.dataset.sha256("train"):
            raise ConfigError(f"{folder} was trained on other samples than {config.data.name} gives now; set data.root")
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
    if not last or (start.manifest and commit_name(start.position) == last):
        return start
    manifest, state = commits.read(last)
    return Start(state, manifest)


def start_from(config: Config, architecture: Architecture, folder: Path) -> Start:
    """Takes over what another run learned: its best commit where it was validated, else its newest.

    Args:
        config: Of the new run.
        architecture: Of the new run.
        folder: Of the other run.

    Raises:
        ConfigError: It has no commit, or its layers do not fit.
    """
    with suppress(ConfigError):  # its commits lie where it said, not where the new run's will
        config = load_config(str(folder / CONFIG))
    commits = commits_of(config, folder)
    manifest, learned = newest(commits)
    name = commit_name(Position(manifest.epoch, manifest.minibatch))
    if manifest.best_commit not in (None, name):
        name = str(manifest.best_commit)
        with _refusing():
            _, learned = commits.read(name)
    network, state, remarks = Network(architecture), State(), [f"starting from {commits.path(name)}"]
    parts = {layer_name(index): layer for index, layer in enumerate(network.layers)} | {"readout": network.readout}
    for part, module in parts.items():
        state[part] = state_of(module)
        taken = {key: tensor for key, tensor in learned.get(part, {}).items() if key in LEARNED}
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


def made_with(config: Config, architecture: Architecture, device: str) -> dict[str, str | int]:
    """Returns what the weights of a run depend on beside its configuration, if only in their last bits."""
    return {
        "algorithm": _algorithm(architecture),
        "processor": _processor(),
        "torch": torch.__version__,
        "threads_per_stage": config.pipeline.threads_per_stage,
        "device": device,
    }


def differences(start: Start, made: dict[str, str | int]) -> list[str]:
    """Says in what the last bits of a run that goes on may differ from before."""
    then = start.manifest.made_with if start.manifest else made
    return [
        f"the last bits may differ: {key} was {then.get(key)}, and is {made[key]}"
        for key in made
        if then.get(key, made[key]) != made[key]
    ]


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
    changed = [key for key in now if now[key] != then[key]]
    wrong = [f"{key}: {then[key]} then, {now[key]} now" for key in changed if not key.startswith(DECIDES_NOTHING)]
    if wrong:
        raise ConfigError(
            f"{folder} can only go on as the run that it was ({'; '.join(wrong)}); leave that as it was, or make a new "
            f"run of it by --from {folder}"
        )
    return [f"changed: {key} is now {now[key]}" for key in changed]


def _processor() -> str:
    """Names the kind of processor, whose instructions decide the order of sums."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}"
