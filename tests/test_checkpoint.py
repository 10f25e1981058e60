import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from ffdist.checkpoint.checkpoints import (
    MANIFEST,
    CheckpointError,
    Checkpoints,
    CheckpointWriter,
    checkpoint_name,
    digest,
    weights_sha256,
)
from ffdist.pipeline.schedule import Position, Snapshot, Train
from ffdist.pipeline.source import Drawn
from ffdist.storage.folder import Folder

MANIFEST_FIELDS = {
    **{"validation_error": None, "best_checkpoint": None, "best_error": None, "train_s": 1.5, "mlflow_run_id": "run"},
    **{"dataset_sha256": "", "test_dataset_sha256": "", "config": {"seed": 0}, "provenance": {"torch": "2"}},
}


def make_state(seed=0, layers=2):
    generator = torch.Generator().manual_seed(seed)
    names = [*(f"layer_{layer}" for layer in range(1, layers + 1)), "readout"]
    return {
        name: {
            "weight": torch.randn(3, 4, generator=generator),
            "bias": torch.randn(3, generator=generator),
            "optimizer.weight/gradient": torch.randn(3, 4, generator=generator),
        }
        for name in names
    }


@pytest.fixture
def checkpoints(tmp_path) -> Checkpoints:
    return Checkpoints(Folder(str(tmp_path), CheckpointError))


def write_checkpoint(checkpoints, state=None, position=Position(3, 20)) -> str:  # noqa: B008, immutable
    name = checkpoint_name(position)
    result = CheckpointWriter(checkpoints.folder).write(Snapshot(position, 320), state or make_state())
    checkpoints.finish(
        name, result, {"epoch": torch.tensor(position.epoch)}, **MANIFEST_FIELDS, **position._asdict(), step=320
    )
    return name


def test_checkpoint_round_trip(checkpoints):
    state = make_state()
    manifest, actual = checkpoints.read(write_checkpoint(checkpoints, state))
    assert (manifest.epoch, manifest.minibatch, manifest.step, manifest.train_s) == (3, 20, 320, 1.5)
    assert actual.pop("position")["epoch"] == 3
    assert actual.keys() == state.keys()
    assert all(torch.equal(actual[layer][name], state[layer][name]) for layer in state for name in state[layer])


def test_names_are_ordered_and_exclude_checkpoints_without_manifest(checkpoints):
    names = [
        write_checkpoint(checkpoints, position=Position(*position))
        for position in ((0, 5), (0, 1_000_000), (2, 0), (12_345, 3))
    ]
    CheckpointWriter(checkpoints.folder).write(Snapshot(Position(99_999, 0), 1), make_state())
    assert checkpoints.names() == names


def test_checkpoint_contains_pending_labels(tmp_path):
    negatives_state = {
        "newest": torch.tensor([-1, 4]),
        "pending_steps": torch.tensor([6]),
        "pending_labels": torch.tensor([[1, 2]]),
    }
    drawn = Drawn(Train(0, 7, 2, 7, 1.0), torch.tensor([[3, 4], [5, 6]]))
    result = CheckpointWriter(Folder(str(tmp_path), CheckpointError)).write(
        Snapshot(Position(0, 9), 9), make_state(), {"negatives": negatives_state}, drawn
    )
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "0000-000009" / "negatives.safetensors")
    assert tensors["pending_steps"].tolist() == [6, 7, 8]
    assert tensors["pending_labels"].tolist() == [[1, 2], [3, 4], [5, 6]]
    assert result.not_finite is None


def test_non_finite_tensor_is_named(tmp_path):
    for value in (torch.nan, torch.inf):
        state = make_state()
        state["layer_2"]["optimizer.weight/gradient"][1, 2] = value
        result = CheckpointWriter(Folder(str(tmp_path), CheckpointError)).write(Snapshot(Position(), 0), state)
        assert result.not_finite == "layer_2/optimizer.weight/gradient"


def test_manifest_describes_every_file(checkpoints):
    folder = Path(checkpoints.path(write_checkpoint(checkpoints)))
    for name, facts in json.loads((folder / MANIFEST).read_text())["files"].items():
        content = (folder / name).read_bytes()
        assert facts == {"sha256": hashlib.sha256(content).hexdigest(), "num_bytes": len(content)}


def test_prune_keeps_the_newest_and_the_best_checkpoint(checkpoints):
    names = [write_checkpoint(checkpoints, position=Position(epoch)) for epoch in (5, 10, 15, 100_000, 1_000_000)]
    # Their writers died, or are still writing.
    incomplete = [checkpoint_name(Position(epoch)) for epoch in (7, 2_000_000)]
    for name in incomplete:
        checkpoints.folder.put(f"{name}/layer_1.safetensors", b"half")
    checkpoints.prune(names[-1], keep=2, spare=names[1])
    assert checkpoints.names() == [names[1], *names[-2:]]
    assert incomplete[0] not in str(checkpoints.folder.names())
    assert incomplete[1] in str(checkpoints.folder.names())


def test_prune_keeps_checkpoints_later_than_the_one_just_written(checkpoints):
    """The run skipped a damaged checkpoint, and its new checkpoint precedes the damaged one."""
    names = [write_checkpoint(checkpoints, position=Position(epoch)) for epoch in (1, 2, 3, 9)]
    checkpoints.prune(names[2], keep=1, spare=names[0])
    assert checkpoints.names() == [names[0], names[2], names[3]]
    with pytest.raises(CheckpointError, match=f"{names[1]} is gone"):
        checkpoints.prune(names[1], keep=1, spare=None)


class Payload:
    """Creates a file when it is unpickled."""

    def __reduce__(self):
        return (Path("pickled-code-ran").touch, ())


def change_manifest(change):
    """Changes a manifest and updates its digest."""

    def apply(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        del manifest["sha256"]
        change(manifest)
        manifest["sha256"] = digest(manifest)
        (folder / MANIFEST).write_text(json.dumps(manifest))

    return apply


def replace_file(content: bytes, name="layer_1.safetensors"):
    """Replaces a file and updates the manifest."""

    def apply(folder: Path) -> None:
        (folder / name).write_bytes(content)
        entry = {"sha256": hashlib.sha256(content).hexdigest(), "num_bytes": len(content)}
        change_manifest(lambda manifest: manifest["files"].update({name: entry}))(folder)

    return apply


DAMAGES = {
    "empty manifest": (lambda folder: (folder / MANIFEST).write_text(""), "is damaged"),
    "manifest is not JSON": (lambda folder: (folder / MANIFEST).write_bytes(b"\x80\x04\xff"), "is damaged"),
    "manifest is a list": (lambda folder: (folder / MANIFEST).write_text("[]"), "is damaged"),
    "old schema": (
        change_manifest(lambda manifest: manifest.update(schema_version=1)),
        "has schema 1, and this",
    ),
    "missing key": (change_manifest(lambda manifest: manifest.pop("step")), "is damaged.*step"),
    "unknown key": (change_manifest(lambda manifest: manifest.update(run="rm")), "is damaged.*run"),
    "wrong type": (change_manifest(lambda manifest: manifest.update(step="3")), "is damaged.*step"),
    "path out of the folder": (
        change_manifest(
            lambda manifest: manifest["files"].update({"../../x.safetensors": {"sha256": "", "num_bytes": 0}})
        ),
        "is damaged.*pattern",
    ),
    "other step": (
        lambda folder: (folder / MANIFEST).write_text((folder / MANIFEST).read_text().replace('"step": ', '"step": 1')),
        "manifest.json is corrupted",
    ),
    "position of another checkpoint": (change_manifest(lambda manifest: manifest.update(epoch=77)), "is corrupted"),
    "best checkpoint out of the folder": (
        change_manifest(lambda manifest: manifest.update(best_checkpoint="../../x")),
        "is damaged.*pattern",
    ),
    "missing file": (lambda folder: (folder / "readout.safetensors").unlink(), "readout.safetensors is missing"),
    "truncated file": (
        lambda folder: (folder / "layer_1.safetensors").write_bytes((folder / "layer_1.safetensors").read_bytes()[:-1]),
        "has the wrong size",
    ),
    "changed byte": (
        lambda folder: (folder / "layer_1.safetensors").write_bytes(
            (folder / "layer_1.safetensors").read_bytes()[:-1] + b"\x01"
        ),
        "is corrupted",
    ),
    "pickled code": (replace_file(pickle.dumps(Payload())), "is not a safetensors file"),
    "invalid safetensors header": (replace_file(b"\xff" * 64), "is not a safetensors file"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_checkpoint_is_reported_and_runs_no_code(checkpoints, damage, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = write_checkpoint(checkpoints)
    damage(Path(checkpoints.path(name)))
    with pytest.raises(CheckpointError, match=f"{name}.*{message}"):
        checkpoints.read(name)
    assert not (tmp_path / "pickled-code-ran").exists()


def test_weights_sha256_matches_its_documentation():
    state = make_state(layers=11)
    expected = hashlib.sha256()
    for layer in [*(f"layer_{number}" for number in range(1, 12)), "readout"]:
        for name, shape in (("bias", "[3]"), ("weight", "[3, 4]")):
            expected.update(f"{layer}/{name} float32 {shape}\n".encode())
            expected.update(np.asarray(state[layer][name], dtype="<f4").tobytes())
    assert weights_sha256(state) == expected.hexdigest()


def test_weights_sha256_depends_only_on_weights():
    state = make_state()
    expected = weights_sha256(dict(reversed(state.items())))
    assert expected == weights_sha256(state | {"negatives": {}, "position": {}})
    state["layer_1"]["optimizer.weight/gradient"] += 1
    assert weights_sha256(state) == expected
    state["readout"]["bias"][2] += 1e-6
    assert weights_sha256(state) != expected
