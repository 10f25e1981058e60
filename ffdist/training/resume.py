"""The start of a run: from initial weights, from those of another run, or from a checkpoint of the run itself."""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from shlex import quote
from typing import Literal, NamedTuple

from ffdist.checkpoint.checkpoints import CheckpointError, Manifest
from ffdist.config.loading import parse_config, parse_with_overrides
from ffdist.config.schema import NEUTRAL_SETTINGS, Config
from ffdist.errors import ConfigError
from ffdist.export.network import load_network
from ffdist.ff.architecture import Architecture
from ffdist.ff.layers import OBJECTIVE
from ffdist.ff.network import Network
from ffdist.ff.optimizers import is_for_inference, is_optimizer_state
from ffdist.pipeline.schedule import Position
from ffdist.pipeline.stage import State, state_of
from ffdist.runs.folder import (
    CONFIG,
    SUMMARY,
    as_config_error,
    check_data,
    checkpoints_at,
    checkpoints_of,
    config_error,
    config_of,
    find_checkpoint,
    find_run,
    is_model,
    resume_command,
    unconfirmed_settings,
)
from ffdist.storage.paths import kind_of
from ffdist.tracking.server import database_has_run, default_uri
from ffdist.training.prepare import Prepared
from ffdist.training.provenance import BACKPROPAGATION, algorithm_of


class Start(NamedTuple):
    """State and position from which a run starts."""

    state: State
    """State of each layer, the readout and the negatives; empty for the initial state."""
    manifest: Manifest | None = None
    """Manifest of the checkpoint that the run resumes from; None for a new run."""
    remarks: tuple[str, ...] = ()
    """Messages for the user."""

    @property
    def position(self) -> Position:
        """Position in the schedule."""
        return Position(self.manifest.epoch, self.manifest.minibatch) if self.manifest else Position()

    @property
    def step(self) -> int:
        """Number of minibatches done."""
        return self.manifest.step if self.manifest else 0

    @property
    def train_s(self) -> float:
        """Training time so far."""
        return self.manifest.train_s if self.manifest else 0.0

    @property
    def precision(self) -> str | None:
        """The precision that the run resolved before; None for a new run."""
        recorded = parse_config(self.manifest.config, "manifest").training.precision if self.manifest else "auto"
        return None if recorded == "auto" else recorded

    def with_callbacks(self, given: Iterable[str]) -> "Start":
        """Adds a message if the run that is resumed had callbacks that are not given again.

        Args:
            given: Names of all callbacks now.
        """
        before = str(self.manifest.provenance.get("callbacks", "")) if self.manifest else ""
        missing = [name for name in before.split(", ") if name and name not in set(given)]
        if not missing:
            return self
        remark = f"warning: the run was started with the callbacks {', '.join(missing)}; give them to ffdist.resume"
        return self._replace(remarks=(*self.remarks, remark))


class Interrupted(NamedTuple):
    """An interrupted run."""

    config: Config
    folder: Path
    runs: Path
    """Runs folder: the given one if its tracking database has the run, else the one that the run is in."""
    runner: Literal["ray", "serial", "backpropagation"]
    """The runner that it was started with."""


def find_interrupted(run: str | Path, runs: Path, overrides: Iterable[str] = ()) -> Interrupted:
    """Finds an interrupted run.

    Args:
        run: Folder or MLflow run id of the run. If its folder is lost, but not its checkpoints, its name.
        runs: Runs folder.
        overrides: `section.key=value` strings; with `checkpoint.uri` if the folder is lost.

    Raises:
        ConfigError: There is no such run, it is finished, its configuration is damaged, or it names code or a server
            that no override repeats.
    """
    overrides = tuple(overrides)
    uri = dict(each.partition("=")[::2] for each in overrides).get("checkpoint.uri")
    folder = find_run(str(run), runs, uri)
    config = config_of(folder, overrides) if kind_of(folder / CONFIG) == "file" else None
    checkpoints = checkpoints_of(config, folder) if config else checkpoints_at(str(uri), folder)
    manifest = None
    with suppress(CheckpointError):  # reported later, when the checkpoint is read
        for name in checkpoints.names()[-1:]:
            manifest = checkpoints.read_manifest(name)
    is_tracked_there = manifest and database_has_run(default_uri(runs), manifest.mlflow_run_id)
    if not is_tracked_there and kind_of(folder.parent / "mlflow.db"):
        runs = folder.parent
    if config is None:
        if manifest is None:
            raise ConfigError(
                f"{folder} is lost, and {checkpoints.folder.path()} has no complete checkpoint; train the run again"
            )
        config = parse_with_overrides(manifest.config, checkpoints.folder.path(), overrides)
    _check_unfinished(folder)
    given = {each.partition("=")[0] for each in overrides}
    if unconfirmed := [key for key in unconfirmed_settings(config) if key not in given]:
        raise ConfigError(
            f"{folder} may come from another person, and names code to import or a tracking server "
            f"({', '.join(unconfirmed)}); if you trust it, repeat that: {resume_command(folder, config)}"
        )
    provenance = manifest.provenance if manifest else {}
    if provenance.get("algorithm") == BACKPROPAGATION:
        return Interrupted(config, folder, runs, "backpropagation")
    return Interrupted(config, folder, runs, "serial" if provenance.get("runner") == "serial" else "ray")


def _check_unfinished(folder: Path) -> None:
    if kind_of(folder / SUMMARY) == "file":
        raise ConfigError(f"{folder} is finished; train it further as a new run, with --init-from {quote(str(folder))}")


def start_from_checkpoint(config: Config, prepared: Prepared, folder: Path, *, skip_damaged: bool) -> Start:
    """Reads the checkpoint from which a run is resumed.

    Args:
        config: Configuration to resume with.
        prepared: Its inputs.
        folder: Folder of the run.
        skip_damaged: Whether to use an older checkpoint if the newest one is damaged.

    Raises:
        ConfigError: The run is finished, has another configuration or dataset, or has no checkpoint or a damaged one.
    """
    _check_unfinished(folder)
    if is_model(folder):
        raise ConfigError(
            f"{folder} is only a model, without the checkpoints of its run; start a new run from its weights with "
            f"--init-from"
        )
    checkpoints, skipped = checkpoints_of(config, folder), []
    with as_config_error():
        names = checkpoints.names()
    for name in reversed(names):
        try:
            manifest, state = checkpoints.read(name)
        except CheckpointError as error:
            if not skip_damaged:
                raise config_error(error, "add --skip-damaged to resume from the checkpoint before it") from error
            skipped.append(f"skipped: {error}")
            continue
        remarks = [*skipped, f"resuming from {checkpoints.path(name)}, {manifest.step:,} minibatches into the run"]
        check_data(config, prepared.dataset, manifest, folder)
        now = algorithm_of(prepared.architecture)
        if (then := manifest.provenance.get("algorithm", now)) != now:
            raise ConfigError(
                f"{folder} can only be resumed with its own algorithm, {then} (given: {now}); leave out the runner"
            )
        return Start(state, manifest, (*remarks, *_check_same(config, manifest, folder)))
    damaged = f"; {len(skipped)} are damaged" if skipped else ""
    raise ConfigError(
        f"{checkpoints.folder.path()} contains no complete checkpoint to resume from{damaged}; set checkpoint.uri to "
        f"the run's own value, or train the run again"
    )


def start_from_weights(config: Config, architecture: Architecture, folder: Path, which: str | None) -> Start:
    """Starts a new run from the weights of another run (warm start).

    Args:
        config: Configuration of the new run.
        architecture: Architecture of the new run.
        folder: Folder of the other run, or of a model.
        which: Checkpoint of the other run, as `find_checkpoint` takes it.

    Raises:
        ConfigError: The other run has no checkpoint, or its layers do not fit.
    """
    weights, source_text = _weights_of(config, folder, which)
    network, state, remarks = Network(architecture), State(), [f"starting from {source_text}"]
    modules = {name: network.get_submodule(module) for name, module in architecture.parts.items()}

    def is_own(key: str) -> bool:
        """Returns whether a tensor is of the layer itself, and neither of its optimizer nor of its objective."""
        return not is_optimizer_state(key) and not key.startswith(OBJECTIVE)

    for name, module in modules.items():
        state[name] = state_of(module)
        if source := weights.get(name, {}):  # a model has no statistics of the training
            source = {key: tensor for key, tensor in state[name].items() if not is_for_inference(key)} | source
        shapes, expected = (
            {key: list(tensor.shape) for key, tensor in each.items() if is_own(key)} for each in (source, state[name])
        )
        if shapes == expected:
            heads = {key: state[name][key].shape for key in state[name] if key.startswith(OBJECTIVE)}
            fits = heads == {key: tensor.shape for key, tensor in source.items() if key.startswith(OBJECTIVE)}
            if not fits and heads:
                remarks.append(f"the class scores of {name} of that run do not fit, and are initialized instead")
            state[name] |= {key: tensor for key, tensor in source.items() if is_own(key) or fits}
        elif name.startswith("readout"):
            remarks.append(f"the {name} of that run does not fit, and is initialized instead")
        else:
            raise ConfigError(
                f"the layers of {folder} do not fit ({name}: {shapes or 'missing'}, expected: "
                f"{expected}); set model.layers and data.label to the values of that run"
            )
    return Start(state, None, tuple(remarks))


def _weights_of(config: Config, folder: Path, which: str | None) -> tuple[State, str]:
    """Returns the weights in a run or a model without optimizer state, and a text that names them."""
    if is_model(folder):
        if which is not None:
            raise ConfigError(f"a model has the weights of one checkpoint only (given: {which}); leave it out")
        try:
            network = load_network(folder)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{folder} cannot be read ({error}); remove it, and try again") from error
        parts = network.architecture.parts.items()
        return {name: state_of(network.get_submodule(module)) for name, module in parts}, f"model: {folder}"
    with suppress(ConfigError):  # its own configuration says where its checkpoints are
        config = config_of(folder)
    checkpoints = checkpoints_of(config, folder)
    checkpoint = find_checkpoint(checkpoints, which)
    with as_config_error():
        weights = checkpoints.read(checkpoint.name, lambda name: not is_optimizer_state(name))[1]
    return weights, f"checkpoint: {checkpoint}"


def _check_same(config: Config, manifest: Manifest, folder: Path) -> list[str]:
    then, now = parse_config(manifest.config, str(folder)).flat(), config.flat()
    if config.training.precision == "auto":
        now["training.precision"] = then["training.precision"]
    changed = [key for key in now if now[key] != then[key]]
    # The samples themselves were compared, and callbacks can only end a run.
    free = (*NEUTRAL_SETTINGS, "data.path", "training.callbacks")
    wrong = [f"{key}: {then[key]} then, {now[key]} now" for key in changed if not key.startswith(free)]
    if wrong:
        raise ConfigError(
            f"{folder} can only be resumed with its own settings ({'; '.join(wrong)}); restore them, or start a new "
            f"run from its weights with --init-from {quote(str(folder))}"
        )
    return [f"changed: {key} is now {now[key]}" for key in changed]
