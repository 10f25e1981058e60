"""Commits: one safetensors file per layer and for the readout, and a manifest that makes them one.

    RUN/commits/000042/layer_1.safetensors ... readout.safetensors manifest.json

A commit is whole or invisible: the files are written and synced first, the manifest is renamed into place last.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from ffdist.pipeline.stage import State

MANIFEST = "manifest.json"
SCHEMA = 1


def write_commit(folder: Path, state: State, *, step: int, **facts: Any) -> Path:
    """Writes a commit under `folder` and returns its own folder, named by the step.

    Args:
        folder: Holds a run's commits; made where it is missing.
        state: What to write.
        step: Minibatches done.
        **facts: What the manifest tells beside the files, as JSON.
    """
    commit = folder / f"{step:06d}"
    commit.mkdir(parents=True, exist_ok=True)
    described = {}
    for name, tensors in state.items():
        content = save({key: tensor.contiguous() for key, tensor in tensors.items()})
        _write(commit / f"{name}.safetensors", content)
        described[f"{name}.safetensors"] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    # Renamed last: without its manifest a commit does not exist, whatever lies in its folder.
    manifest = {"schema": SCHEMA, "step": step, **facts, "files": described}
    _write(commit / f"{MANIFEST}.part", json.dumps(manifest, indent=2).encode())
    (commit / f"{MANIFEST}.part").rename(commit / MANIFEST)
    return commit


def commits(folder: Path) -> list[Path]:
    """Returns the whole commits under a folder, oldest first."""
    return sorted((path.parent for path in folder.glob(f"*/{MANIFEST}")), key=lambda path: int(path.name))


def read_commit(commit: Path) -> State:
    """Reads the state of a commit."""
    manifest = json.loads((commit / MANIFEST).read_text())
    return {name.removesuffix(".safetensors"): load_file(commit / name) for name in manifest["files"]}


def prune(folder: Path, *, keep: int, spare: Path | None) -> None:
    """Removes all whole commits but the `keep` newest and `spare`; due after a newer one is whole, never before."""
    for commit in commits(folder)[:-keep]:
        if commit != spare:
            (commit / MANIFEST).unlink()
            shutil.rmtree(commit)


def weights_sha256(state: State) -> str:
    """Digests what a network computes with: weights and biases, not the smoothed gradients nor the running means.

    The bytes are, for `layer_1`, `layer_2`, ... and `readout`, for `bias` and then `weight`: the line
    `layer_1/bias float32 [1000]` with a line feed, then the values, little-endian float32, in row order.
    """
    digest = hashlib.sha256()
    for layer in sorted(state, key=lambda name: (name == "readout", len(name), name)):
        for name in ("bias", "weight"):
            tensor = state[layer][name].to("cpu", torch.float32).contiguous()
            digest.update(f"{layer}/{name} float32 {list(tensor.shape)}\n".encode())
            digest.update(tensor.numpy().astype("<f4", copy=False).tobytes())
    return digest.hexdigest()


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
