"""Tests of the store of negatives: round trips, and errors of damaged files."""

import hashlib
import json
import os

import pytest
import torch

from ffdist.data.negatives_store import Store
from ffdist.ff.negatives import NegativesError

FACTS = {"kind": "hybrid", "options": {"blurs": 6}, "seed": 0}


def random_images() -> torch.Tensor:
    return torch.randint(0, 256, (30, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def store(tmp_path) -> Store:
    store = Store(str(tmp_path / "store"), FACTS)
    store.check()
    store.write(3, 1, random_images())
    return store


@pytest.mark.parametrize("shape", [(30,), (30, 9)])
def test_labels_survive_a_round_trip_as_int64(store, shape):
    labels = torch.randint(0, 256, shape)
    store.write(0, 0, labels)
    result = store.read(0, 0)
    assert result.dtype == torch.int64
    assert torch.equal(result, labels)


def test_images_survive_a_round_trip_as_uint8(store):
    result = store.read(3, 1)
    assert result.dtype == torch.uint8
    assert torch.equal(result, random_images())


def test_store_can_be_opened_by_uri(store, tmp_path):
    reopened = Store((tmp_path / "store").as_uri(), FACTS)
    reopened.check()
    assert torch.equal(reopened.read(3, 1), random_images())


def test_reading_a_missing_shard_returns_none(store):
    assert store.read(3, 2) is None


def test_shard_without_an_entry_counts_as_missing(store, tmp_path):
    """An interrupted write leaves such a shard."""
    (tmp_path / "store/epoch_0003/shard_000001.json").unlink()
    assert store.read(3, 1) is None
    assert not list(store.entries())


def test_entries_have_position_and_size_of_shards(store, tmp_path):
    (entry,) = store.entries()
    assert (entry.epoch, entry.number, entry.first, entry.num_samples) == (3, 1, 5000, 30)
    assert entry.num_bytes == (tmp_path / "store/epoch_0003/shard_000001.arrow").stat().st_size
    assert not list((tmp_path / "store").rglob("*.part"))


def make_damage(name: str, change):
    def damage(folder):
        path = folder / "epoch_0003" / name
        path.write_bytes(change(path.read_bytes()))

    return damage


def replace_by_other_store(folder):
    """Replaces the shard and its entry by those of a store with another seed."""
    other = Store(str(folder.parent / "other"), FACTS | {"seed": 1})
    other.write(3, 1, random_images())
    for suffix in ("arrow", "json"):
        (folder.parent / f"other/epoch_0003/shard_000001.{suffix}").rename(folder / f"epoch_0003/shard_000001.{suffix}")


def replace_by_other_format(folder):
    path, content = folder / "epoch_0003/shard_000001.arrow", b"anything"
    path.write_bytes(content)
    entry = path.with_suffix(".json")
    changes = {"num_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    entry.write_text(json.dumps(json.loads(entry.read_text()) | changes))


def rename_shard(folder):
    for suffix in ("arrow", "json"):
        (folder / f"epoch_0003/shard_000001.{suffix}").rename(folder / f"epoch_0003/shard_000002.{suffix}")


DAMAGES = {
    "missing": (lambda folder: (folder / "epoch_0003/shard_000001.arrow").unlink(), 1, "shard_000001.arrow is missing"),
    "truncated": (make_damage("shard_000001.arrow", lambda content: content[:-9]), 1, "1.arrow has the wrong size"),
    "altered": (
        make_damage("shard_000001.arrow", lambda content: content[:300] + bytes([content[300] ^ 1]) + content[301:]),
        1,
        "shard_000001.arrow is corrupted",
    ),
    "other store": (replace_by_other_store, 1, "shard_000001.arrow belongs to another shard or store"),
    "renamed": (rename_shard, 2, "shard_000002.arrow belongs to another shard or store"),
    "not an Arrow file": (replace_by_other_format, 1, "shard_000001.arrow holds no negatives"),
    "entry truncated": (
        make_damage("shard_000001.json", lambda content: content[:-9]),
        1,
        "shard_000001.json is damaged",
    ),
    "entry of wrong types": (
        make_damage("shard_000001.json", lambda content: content.replace(b": 30", b': "x"')),
        1,
        "shard_000001.json is damaged",
    ),
    "entry is a list": (make_damage("shard_000001.json", lambda content: b"[1]"), 1, "shard_000001.json is damaged"),
}


@pytest.mark.parametrize(("damage", "number", "message"), DAMAGES.values(), ids=DAMAGES)
def test_error_names_the_damaged_file(store, tmp_path, damage, number, message):
    damage(tmp_path / "store")
    with pytest.raises(NegativesError, match=message):
        store.read(3, number)


def test_store_with_other_settings_is_rejected_with_the_difference(store):
    Store(store.uri, FACTS, config={"anything": "else"}).check()
    with pytest.raises(NegativesError, match=r"holds other negatives than this run needs .*seed: store 0, run 1"):
        Store(store.uri, FACTS | {"seed": 1}).check()


def test_check_leaves_no_files(tmp_path):
    Store(str(tmp_path / "new"), FACTS).check()
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize("manifest", ["{", "[]", "{}", '{"facts": {}, "config": null}'])
def test_error_names_the_damaged_manifest(store, tmp_path, manifest):
    (tmp_path / "store/manifest.json").write_text(manifest)
    for function in (store.check, lambda: Store.find(store.uri)):
        with pytest.raises(NegativesError, match=r"manifest\.json is damaged"):
            function()


def test_other_schema_and_missing_store_are_rejected(store, tmp_path):
    path = tmp_path / "store/manifest.json"
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 0'))
    with pytest.raises(NegativesError, match="schema: store 0, run 1"):
        store.check()
    with pytest.raises(NegativesError, match="holds no negatives"):
        Store.find(str(tmp_path / "nowhere"))


def test_unusable_path_and_unknown_scheme_are_rejected(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NegativesError, match=r"cannot be (read|written)"):
        Store(str(tmp_path / "file" / "store"), FACTS).check()
    with pytest.raises(NegativesError, match="cannot be opened"):
        Store("nonsense://bucket", FACTS).check()


def test_stale_partial_files_are_removed_and_fresh_ones_kept(store, tmp_path):
    stale, fresh = (tmp_path / f"store/epoch_0003/shard_000002.arrow.{name}.part" for name in ("0123abcd", "4567abcd"))
    for path in (stale, fresh):
        path.write_bytes(b"half")
    os.utime(stale, (0, 0))
    store.check()
    assert (stale.exists(), fresh.exists()) == (False, True)
