"""What is in a store is what was written there, or it is named."""

import hashlib
import json
import os

import pytest
import torch

from ffdist.data.negatives_store import Store
from ffdist.ff.negatives import NegativesError

FACTS = {"kind": "hybrid", "options": {"blurs": 6}, "seed": 0}


def some_images() -> torch.Tensor:
    return torch.randint(0, 256, (30, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def store(tmp_path) -> Store:
    store = Store(str(tmp_path / "store"), FACTS)
    store.check()
    store.write(3, 1, some_images())
    return store


@pytest.mark.parametrize("shape", [(30,), (30, 9)])
def test_labels_come_back_as_they_were_and_take_a_byte_each(store, shape):
    labels = torch.randint(0, 256, shape)
    store.write(0, 0, labels)
    back = store.read(0, 0)
    assert back.dtype == torch.int64
    assert torch.equal(back, labels)


def test_images_come_back_as_they_were(store):
    back = store.read(3, 1)
    assert back.dtype == torch.uint8
    assert torch.equal(back, some_images())


def test_any_filesystem_of_pyarrow_will_do(store, tmp_path):
    again = Store((tmp_path / "store").as_uri(), FACTS)
    again.check()
    assert torch.equal(again.read(3, 1), some_images())


def test_what_was_not_made_is_none(store):
    assert store.read(3, 2) is None


def test_a_shard_without_its_entry_does_not_exist(store, tmp_path):
    """As an interrupted write leaves it."""
    (tmp_path / "store/epoch_0003/shard_000001.json").unlink()
    assert store.read(3, 1) is None
    assert not list(store.entries())


def test_entries_tell_which_samples_and_how_many_bytes(store, tmp_path):
    (entry,) = store.entries()
    assert (entry.epoch, entry.number, entry.first, entry.num_samples) == (3, 1, 5000, 30)
    assert entry.num_bytes == (tmp_path / "store/epoch_0003/shard_000001.arrow").stat().st_size
    assert not list((tmp_path / "store").rglob("*.part"))


def damaged(name: str, change):
    def damage(folder):
        path = folder / "epoch_0003" / name
        path.write_bytes(change(path.read_bytes()))

    return damage


def foreign(folder):
    """With its entry and all, from the store of another seed."""
    other = Store(str(folder.parent / "other"), FACTS | {"seed": 1})
    other.write(3, 1, some_images())
    for suffix in ("arrow", "json"):
        (folder.parent / f"other/epoch_0003/shard_000001.{suffix}").rename(folder / f"epoch_0003/shard_000001.{suffix}")


def no_arrow_file(folder):
    path, content = folder / "epoch_0003/shard_000001.arrow", b"anything"
    path.write_bytes(content)
    entry = path.with_suffix(".json")
    told = {"num_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    entry.write_text(json.dumps(json.loads(entry.read_text()) | told))


def moved(folder):
    for suffix in ("arrow", "json"):
        (folder / f"epoch_0003/shard_000001.{suffix}").rename(folder / f"epoch_0003/shard_000002.{suffix}")


DAMAGES = {
    "missing": (lambda folder: (folder / "epoch_0003/shard_000001.arrow").unlink(), 1, "shard_000001.arrow is missing"),
    "truncated": (damaged("shard_000001.arrow", lambda content: content[:-9]), 1, "1.arrow has the wrong size"),
    "altered": (
        damaged("shard_000001.arrow", lambda content: content[:300] + bytes([content[300] ^ 1]) + content[301:]),
        1,
        "shard_000001.arrow is corrupted",
    ),
    "foreign": (foreign, 1, "shard_000001.arrow belongs to another shard or store"),
    "moved": (moved, 2, "shard_000002.arrow belongs to another shard or store"),
    "no Arrow file": (no_arrow_file, 1, "shard_000001.arrow holds no negatives"),
    "entry cut": (damaged("shard_000001.json", lambda content: content[:-9]), 1, "shard_000001.json is damaged"),
    "entry of wrong types": (
        damaged("shard_000001.json", lambda content: content.replace(b": 30", b': "x"')),
        1,
        "shard_000001.json is damaged",
    ),
    "entry of another kind": (damaged("shard_000001.json", lambda content: b"[1]"), 1, "shard_000001.json is damaged"),
}


@pytest.mark.parametrize(("damage", "number", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_found_and_named(store, tmp_path, damage, number, message):
    damage(tmp_path / "store")
    with pytest.raises(NegativesError, match=message):
        store.read(3, number)


def test_another_runs_store_is_refused_and_the_difference_told(store):
    Store(store.uri, FACTS, config={"anything": "else"}).check()
    with pytest.raises(NegativesError, match=r"holds other negatives than this run needs .*seed: store 0, run 1"):
        Store(store.uri, FACTS | {"seed": 1}).check()


def test_a_check_leaves_nothing_behind(tmp_path):
    Store(str(tmp_path / "new"), FACTS).check()
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize("manifest", ["{", "[]", "{}", '{"facts": {}, "config": null}'])
def test_a_damaged_manifest_is_named(store, tmp_path, manifest):
    (tmp_path / "store/manifest.json").write_text(manifest)
    for use in (store.check, lambda: Store.find(store.uri)):
        with pytest.raises(NegativesError, match=r"manifest\.json is damaged"):
            use()


def test_a_store_of_another_schema_or_none_at_all_is_refused(store, tmp_path):
    path = tmp_path / "store/manifest.json"
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 0'))
    with pytest.raises(NegativesError, match="schema: store 0, run 1"):
        store.check()
    with pytest.raises(NegativesError, match="holds no negatives"):
        Store.find(str(tmp_path / "nowhere"))


def test_where_nothing_can_be_written_it_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NegativesError, match=r"cannot be (read|written)"):
        Store(str(tmp_path / "file" / "store"), FACTS).check()
    with pytest.raises(NegativesError, match="cannot be opened"):
        Store("nonsense://bucket", FACTS).check()


def test_what_a_killed_writer_left_is_removed_after_a_day(store, tmp_path):
    stale, fresh = (tmp_path / f"store/epoch_0003/shard_000002.arrow.{name}.part" for name in ("0123abcd", "4567abcd"))
    for path in (stale, fresh):
        path.write_bytes(b"half")
    os.utime(stale, (0, 0))
    store.check()
    assert (stale.exists(), fresh.exists()) == (False, True)
