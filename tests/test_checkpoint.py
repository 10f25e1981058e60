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

FACTS = {
    **{"validation_error": None, "best_checkpoint": None, "best_error": None, "train_s": 1.5, "mlflow_run_id": "run"},
    **{"dataset_sha256": "", "test_dataset_sha256": "", "config": {"seed": 0}, "provenance": {"torch": "2"}},
}


def a_state(seed=0, layers=2):
    draw = torch.Generator().manual_seed(seed)
    names = [*(f"layer_{layer}" for layer in range(1, layers + 1)), "readout"]
    return {
        name: {
            "weight": torch.randn(3, 4, generator=draw),
            "bias": torch.randn(3, generator=draw),
            "optimizer.weight/gradient": torch.randn(3, 4, generator=draw),
        }
        for name in names
    }


@pytest.fixture
def checkpoints(tmp_path) -> Checkpoints:
    return Checkpoints(Folder(str(tmp_path), CheckpointError))


def checkpoint(checkpoints, state=None, at=Position(3, 20)) -> str:  # noqa: B008, a tuple
    name = checkpoint_name(at)
    written = CheckpointWriter(checkpoints.folder).write(Snapshot(at, 320), state or a_state())
    checkpoints.finish(name, written, {"epoch": torch.tensor(at.epoch)}, **FACTS, **at._asdict(), step=320)
    return name


def test_a_checkpoint_comes_back_as_it_was(checkpoints):
    state = a_state()
    manifest, read = checkpoints.read(checkpoint(checkpoints, state))
    assert (manifest.epoch, manifest.minibatch, manifest.step, manifest.train_s) == (3, 20, 320, 1.5)
    assert read.pop("position")["epoch"] == 3
    assert read.keys() == state.keys()
    assert all(torch.equal(read[layer][name], state[layer][name]) for layer in state for name in state[layer])


def test_checkpoints_are_in_order_and_without_a_manifest_there_is_none(checkpoints):
    made = [checkpoint(checkpoints, at=Position(*at)) for at in ((0, 5), (0, 1_000_000), (2, 0), (12_345, 3))]
    CheckpointWriter(checkpoints.folder).write(Snapshot(Position(99_999, 0), 1), a_state())
    assert checkpoints.names() == made


def test_labels_still_to_be_delivered_are_part_of_a_checkpoint(tmp_path):
    held = {
        "newest": torch.tensor([-1, 4]),
        "pending_steps": torch.tensor([6]),
        "pending_labels": torch.tensor([[1, 2]]),
    }
    drawn = Drawn(Train(0, 7, 2, 7, 1.0), torch.tensor([[3, 4], [5, 6]]))
    written = CheckpointWriter(Folder(str(tmp_path), CheckpointError)).write(
        Snapshot(Position(0, 9), 9), a_state(), {"negatives": held}, drawn
    )
    from safetensors.torch import load_file

    kept = load_file(tmp_path / "0000-000009" / "negatives.safetensors")
    assert kept["pending_steps"].tolist() == [6, 7, 8]
    assert kept["pending_labels"].tolist() == [[1, 2], [3, 4], [5, 6]]
    assert written.not_finite is None


def test_what_is_not_finite_is_named(tmp_path):
    for bad in (torch.nan, torch.inf):
        state = a_state()
        state["layer_2"]["optimizer.weight/gradient"][1, 2] = bad
        written = CheckpointWriter(Folder(str(tmp_path), CheckpointError)).write(Snapshot(Position(), 0), state)
        assert written.not_finite == "layer_2/optimizer.weight/gradient"


def test_manifest_describes_every_file(checkpoints):
    folder = Path(checkpoints.path(checkpoint(checkpoints)))
    for name, facts in json.loads((folder / MANIFEST).read_text())["files"].items():
        content = (folder / name).read_bytes()
        assert facts == {"sha256": hashlib.sha256(content).hexdigest(), "num_bytes": len(content)}


def test_pruning_spares_the_newest_and_the_best(checkpoints):
    made = [checkpoint(checkpoints, at=Position(epoch)) for epoch in (5, 10, 15, 100_000, 1_000_000)]
    torn = [checkpoint_name(Position(epoch)) for epoch in (7, 2_000_000)]  # of a writer that died, or is at it
    for name in torn:
        checkpoints.folder.put(f"{name}/layer_1.safetensors", b"half")
    checkpoints.prune(made[-1], keep=2, spare=made[1])
    assert checkpoints.names() == [made[1], *made[-2:]]
    assert torn[0] not in str(checkpoints.folder.names())
    assert torn[1] in str(checkpoints.folder.names())


def test_pruning_leaves_alone_what_lies_beyond_a_checkpoint_just_made(checkpoints):
    """A damaged checkpoint was passed over, and the one just made is before it."""
    made = [checkpoint(checkpoints, at=Position(epoch)) for epoch in (1, 2, 3, 9)]
    checkpoints.prune(made[2], keep=1, spare=made[0])
    assert checkpoints.names() == [made[0], made[2], made[3]]
    with pytest.raises(CheckpointError, match=f"{made[1]} is gone"):
        checkpoints.prune(made[1], keep=1, spare=None)


class Code:
    """What pickle would run."""

    def __reduce__(self):
        return (Path("pickled-code-ran").touch, ())


def broken(change):
    """Changes a manifest, and its digest with it."""

    def apply(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        del manifest["sha256"]
        change(manifest)
        manifest["sha256"] = digest(manifest)
        (folder / MANIFEST).write_text(json.dumps(manifest))

    return apply


def planted(content: bytes, name="layer_1.safetensors"):
    """Puts a file in the place of another, and makes the manifest say so."""

    def apply(folder: Path) -> None:
        (folder / name).write_bytes(content)
        facts = {"sha256": hashlib.sha256(content).hexdigest(), "num_bytes": len(content)}
        broken(lambda manifest: manifest["files"].update({name: facts}))(folder)

    return apply


HOSTILE = {
    "no manifest to speak of": (lambda folder: (folder / MANIFEST).write_text(""), "is damaged"),
    "not JSON": (lambda folder: (folder / MANIFEST).write_bytes(b"\x80\x04\xff"), "is damaged"),
    "a list": (lambda folder: (folder / MANIFEST).write_text("[]"), "is damaged"),
    "an old schema": (
        broken(lambda manifest: manifest.update(schema_version=1)),
        "has schema 1, and this",
    ),
    "a missing key": (broken(lambda manifest: manifest.pop("step")), "is damaged.*step"),
    "an unknown key": (broken(lambda manifest: manifest.update(run="rm")), "is damaged.*run"),
    "a wrong type": (broken(lambda manifest: manifest.update(step="3")), "is damaged.*step"),
    "a path out of the folder": (
        broken(lambda manifest: manifest["files"].update({"../../x.safetensors": {"sha256": "", "num_bytes": 0}})),
        "is damaged.*pattern",
    ),
    "another minibatch": (
        lambda folder: (folder / MANIFEST).write_text((folder / MANIFEST).read_text().replace('"step": ', '"step": 1')),
        "manifest.json is corrupted",
    ),
    "another checkpoint's place": (broken(lambda manifest: manifest.update(epoch=77)), "is corrupted"),
    "a best checkpoint out of the folder": (
        broken(lambda manifest: manifest.update(best_checkpoint="../../x")),
        "is damaged.*pattern",
    ),
    "a missing file": (lambda folder: (folder / "readout.safetensors").unlink(), "readout.safetensors is missing"),
    "a cut file": (
        lambda folder: (folder / "layer_1.safetensors").write_bytes((folder / "layer_1.safetensors").read_bytes()[:-1]),
        "has the wrong size",
    ),
    "a flipped byte": (
        lambda folder: (folder / "layer_1.safetensors").write_bytes(
            (folder / "layer_1.safetensors").read_bytes()[:-1] + b"\x01"
        ),
        "is corrupted",
    ),
    "pickled code": (planted(pickle.dumps(Code())), "is not a safetensors file"),
    "a header that lies": (planted(b"\xff" * 64), "is not a safetensors file"),
}


@pytest.mark.parametrize(("damage", "told"), HOSTILE.values(), ids=HOSTILE)
def test_a_damaged_checkpoint_is_named_and_runs_no_code(checkpoints, damage, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = checkpoint(checkpoints)
    damage(Path(checkpoints.path(name)))
    with pytest.raises(CheckpointError, match=f"{name}.*{told}"):
        checkpoints.read(name)
    assert not (tmp_path / "pickled-code-ran").exists()


def test_digest_follows_its_description():
    state = a_state(layers=11)
    expected = hashlib.sha256()
    for layer in [*(f"layer_{number}" for number in range(1, 12)), "readout"]:
        for name, shape in (("bias", "[3]"), ("weight", "[3, 4]")):
            expected.update(f"{layer}/{name} float32 {shape}\n".encode())
            expected.update(np.asarray(state[layer][name], dtype="<f4").tobytes())
    assert weights_sha256(state) == expected.hexdigest()


def test_digest_sees_weights_alone():
    state = a_state()
    before = weights_sha256(dict(reversed(state.items())))
    assert before == weights_sha256(state | {"negatives": {}, "position": {}})
    state["layer_1"]["optimizer.weight/gradient"] += 1
    assert weights_sha256(state) == before
    state["readout"]["bias"][2] += 1e-6
    assert weights_sha256(state) != before
