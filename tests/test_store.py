"""What is in a store is what was written there, or it is named."""

import json

import pytest
import torch

from ffdist.data.store import Store, StoreError

FACTS = {"kind": "hybrid", "options": {"blurs": 6}, "seed": 0}


def some_images() -> torch.Tensor:
    return torch.randint(0, 256, (30, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def store(tmp_path) -> Store:
    store = Store(str(tmp_path / "store"))
    store.open(FACTS, config={})
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
    again = Store((tmp_path / "store").as_uri())
    again.open(FACTS, config={})
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
    other = Store(str(folder.parent / "other"))
    other.write(3, 1, some_images().flip(0))
    (folder.parent / "other/epoch_0003/shard_000001.arrow").rename(folder / "epoch_0003/shard_000001.arrow")


def moved(folder):
    for suffix in ("arrow", "json"):
        (folder / f"epoch_0003/shard_000001.{suffix}").rename(folder / f"epoch_0003/shard_000002.{suffix}")


DAMAGES = {
    "missing": (lambda folder: (folder / "epoch_0003/shard_000001.arrow").unlink(), 1, "shard_000001.arrow is missing"),
    "truncated": (damaged("shard_000001.arrow", lambda content: content[:-9]), 1, "shard_000001.arrow is cut"),
    "altered": (
        damaged("shard_000001.arrow", lambda content: content[:300] + bytes([content[300] ^ 1]) + content[301:]),
        1,
        "shard_000001.arrow is not what was written there",
    ),
    "foreign": (foreign, 1, "shard_000001.arrow is (not what was written|cut or grown)"),
    "moved": (moved, 2, "shard_000002.arrow is not what was written there"),
    "entry cut": (damaged("shard_000001.json", lambda content: content[:-9]), 1, "shard_000001.json is damaged"),
    "entry of another kind": (damaged("shard_000001.json", lambda content: b"[1]"), 1, "shard_000001.json is damaged"),
}


@pytest.mark.parametrize(("damage", "number", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_found_and_named(store, tmp_path, damage, number, message):
    damage(tmp_path / "store")
    with pytest.raises(StoreError, match=message):
        store.read(3, number)


def test_another_runs_store_is_refused_and_the_difference_told(store):
    store.open(FACTS, config={"anything": "else"})
    with pytest.raises(StoreError, match=r"holds other negatives than this run needs .*seed: store 0, run 1"):
        store.open(FACTS | {"seed": 1}, config={})


def test_a_store_of_another_schema_or_none_at_all_is_refused(store, tmp_path):
    path = tmp_path / "store/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 0}))
    with pytest.raises(StoreError, match="schema: store 0, run 1"):
        store.open(FACTS, config={})
    path.write_text("{")
    with pytest.raises(StoreError, match=r"manifest.json is damaged"):
        store.open(FACTS, config={})
    with pytest.raises(StoreError, match="holds no negatives"):
        Store(str(tmp_path / "nowhere")).manifest()


def test_where_nothing_can_be_written_it_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot be (read|written)"):
        Store(str(tmp_path / "file" / "store")).open(FACTS, config={})
    with pytest.raises(StoreError, match="cannot be opened"):
        Store("nonsense://bucket").open(FACTS, config={})
