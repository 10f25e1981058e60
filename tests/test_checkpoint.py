import hashlib
import json

import numpy as np
import pytest
import torch

from ffdist.checkpoint import MANIFEST, commits, prune, read_commit, weights_sha256, write_commit


def a_state(seed=0, layers=2):
    draw = torch.Generator().manual_seed(seed)
    names = [*(f"layer_{layer}" for layer in range(1, layers + 1)), "readout"]
    return {
        name: {
            "weight": torch.randn(3, 4, generator=draw),
            "bias": torch.randn(3, generator=draw),
            "weight_gradient": torch.randn(3, 4, generator=draw),
        }
        for name in names
    }


def test_a_commit_comes_back_as_it_was(tmp_path):
    state = a_state()
    read = read_commit(write_commit(tmp_path, state, step=12, epochs=1))
    assert read.keys() == state.keys()
    assert all(torch.equal(read[layer][name], state[layer][name]) for layer in state for name in state[layer])


def test_interrupted_commit_is_invisible(tmp_path, monkeypatch):
    whole = write_commit(tmp_path, a_state(), step=1)
    monkeypatch.setattr("pathlib.Path.rename", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        write_commit(tmp_path, a_state(), step=2)
    assert commits(tmp_path) == [whole]


def test_manifest_describes_every_file(tmp_path):
    commit = write_commit(tmp_path, a_state(), step=1)
    for name, facts in json.loads((commit / MANIFEST).read_text())["files"].items():
        content = (commit / name).read_bytes()
        assert facts == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


def test_pruning_spares_the_newest_and_the_best(tmp_path):
    made = [write_commit(tmp_path, a_state(), step=step) for step in (5, 10, 15, 100_000, 1_000_000)]
    prune(tmp_path, keep=2, spare=made[1])
    assert commits(tmp_path) == [made[1], *made[-2:]]


def test_digest_follows_its_description():
    state = a_state(layers=11)
    digest = hashlib.sha256()
    for layer in [*(f"layer_{number}" for number in range(1, 12)), "readout"]:
        for name, shape in (("bias", "[3]"), ("weight", "[3, 4]")):
            digest.update(f"{layer}/{name} float32 {shape}\n".encode())
            digest.update(np.asarray(state[layer][name], dtype="<f4").tobytes())
    assert weights_sha256(state) == digest.hexdigest()


def test_digest_sees_weights_alone():
    state = a_state()
    before = weights_sha256(dict(reversed(state.items())))
    assert before == weights_sha256(state)
    state["layer_1"]["weight_gradient"] += 1
    assert weights_sha256(state) == before
    state["readout"]["bias"][2] += 1e-6
    assert weights_sha256(state) != before
