"""Pairs and stores by address: the bounded cache, and a reinforcement from and to another file system."""

from __future__ import annotations

import os
import pickle
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from distill import remote
from distill.reinforce import reinforce
from distill.remote import cached, list_shards, local_pairs, local_store
from distill.store import open_store
from runtime.errors import PairsError, StoreError
from runtime.pairs import open_pairs
from tests.distill.test_reinforce import config, make_pairs, part_hashes


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MCLIP_PROGRESS", "0")
    monkeypatch.setenv("MOBILECLIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    fs = fsspec.filesystem("memory")
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


def in_memory(fs: fsspec.AbstractFileSystem, folder: Path) -> str:
    for path in sorted(folder.iterdir()):
        fs.pipe_file(f"/bucket/{folder.name}/{path.name}", path.read_bytes())
    return f"memory://bucket/{folder.name}"


def test_pairs_by_address_are_the_pairs(tmp_path: Path, memory: fsspec.AbstractFileSystem) -> None:
    folder = make_pairs(tmp_path / "pairs", (4, 3))
    here, there = open_pairs(folder), local_pairs(in_memory(memory, folder))
    assert there.keys == here.keys
    assert [shard.name for shard in there.shards] == ["shard-0", "shard-1"]
    copied = pickle.loads(pickle.dumps(there))
    for row in range(7):
        assert there.image_bytes(row) == copied.image_bytes(row) == here.image_bytes(row)
        assert there.caption(row) == here.caption(row)
    assert local_pairs(folder).keys == here.keys
    assert local_pairs(f"file://{folder}").keys == here.keys


def test_the_cache_stays_within_its_bound_and_fetches_again(tmp_path: Path, memory: fsspec.AbstractFileSystem, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_pairs(tmp_path / "pairs", (3, 3, 3))
    size = max(path.stat().st_size for path in folder.iterdir())
    monkeypatch.setenv("MOBILECLIP_CACHE_GB", str(1.5 * size / 1e9))
    pairs, here = local_pairs(in_memory(memory, folder)), open_pairs(folder)
    for row in (8, 0, 4, 8, 1, 7):
        assert pickle.loads(pickle.dumps(pairs)).image_bytes(row) == here.image_bytes(row)
        assert sum(path.stat().st_size for path in (cache / "shards").glob("*.tar")) <= 1.5 * size
    monkeypatch.setenv("MOBILECLIP_CACHE_GB", str(0.5 * size / 1e9))
    with pytest.raises(PairsError, match="set MOBILECLIP_CACHE_GB to at least"):
        pickle.loads(pickle.dumps(pairs)).image_bytes(0)
    monkeypatch.setenv("MOBILECLIP_CACHE_GB", "much")
    with pytest.raises(PairsError, match="expected a number of gigabytes"):
        pickle.loads(pickle.dumps(pairs)).image_bytes(0)


def test_a_changed_source_is_another_file(tmp_path: Path, memory: fsspec.AbstractFileSystem) -> None:
    folder = make_pairs(tmp_path / "pairs", (3,))
    url = in_memory(memory, folder)
    assert len(local_pairs(url)) == 3
    time.sleep(0.01)
    make_pairs(folder, (5,))
    in_memory(memory, folder)
    assert len(local_pairs(url)) == 5


def test_one_fetches_and_the_others_wait(memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.pipe_file("/bucket/a.tar", b"x" * 1000)
    fetched = []
    original = remote._fetch

    def slowly(*arguments: object) -> None:
        fetched.append(arguments)
        time.sleep(0.1)
        original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(remote, "_fetch", slowly)
    threads = [threading.Thread(target=cached, args=("memory://bucket/a.tar", "state", 1000, PairsError)) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(fetched) == 1


def test_bad_addresses_are_one_sentence(tmp_path: Path, memory: fsspec.AbstractFileSystem) -> None:
    memory.pipe_file("/bucket/zipped/a.tar.gz", b"x")
    memory.pipe_file("/bucket/empty/readme.txt", b"x")
    for url, message in (
        ("memory://bucket/zipped", "is compressed"), ("memory://bucket/empty", r"holds no \*.tar shard"), ("memory://bucket/nowhere", "cannot be listed"),
        ("nonsense://bucket", "cannot be opened"), (f"file://{tmp_path}/none", "cannot be listed"),
    ):  # fmt: skip
        with pytest.raises(PairsError, match=message):
            list_shards(url)
    with pytest.raises(StoreError, match="is not a finished store"):
        local_store("memory://bucket/empty")
    memory.pipe_file("/bucket/short.tar", b"x" * 10)
    with pytest.raises(PairsError, match="gave 10 bytes, expected 20"):
        cached("memory://bucket/short.tar", "state", 20, PairsError)


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    pairs = make_pairs(tmp_path / "pairs", (6, 5), damage=True)
    reinforce(config(pairs, tmp_path / "store", workers=0))
    return pairs, part_hashes(tmp_path / "store")


def test_a_store_elsewhere_from_pairs_elsewhere(tmp_path: Path, made: tuple[Path, dict[str, str]], memory: fsspec.AbstractFileSystem, cache: Path) -> None:
    url = in_memory(memory, made[0])
    index = reinforce(config(url, "memory://bucket/store", workers=0))
    assert index["coverage"] == {"pairs": 11, "rows": 9, "skipped": 2}
    there = {path.rpartition("/")[2] for path in memory.ls("/bucket/store", detail=False)} - {".work"}
    assert there == {*made[1], "index.json", "settings.json"}
    store = local_store("memory://bucket/store", verify=True)
    assert part_hashes(store.path) == made[1]
    before = memory.cat_file("/bucket/store/index.json")
    assert reinforce(config(url, "memory://bucket/store", workers=0)) == index
    assert memory.cat_file("/bucket/store/index.json") == before
    with pytest.raises(StoreError, match="begun with other seed"):
        reinforce(config(url, "memory://bucket/store", workers=0, seed=4))
    with pytest.raises(StoreError, match="lies elsewhere"):
        reinforce(config(url, "memory://bucket/store", workers=0, add_augmentations=1))


def test_a_store_elsewhere_goes_on_where_it_was(tmp_path: Path, made: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """With workers, and pairs and store on a disk that is spoken of by address."""
    there = tmp_path / "there"
    places = (f"file://{made[0]}", f"file://{there}")
    original, uploads = remote.upload, []

    def stops(path: Path, url: str) -> None:
        original(path, url)
        uploads.append(url)
        if len([one for one in uploads if one.endswith(".safetensors")]) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(remote, "upload", stops)
    with pytest.raises(KeyboardInterrupt):
        reinforce(config(*places, workers=0))
    monkeypatch.undo()
    monkeypatch.setenv("MOBILECLIP_CACHE", str(tmp_path / "cache"))
    assert not (there / "index.json").exists()
    figures = reinforce(config(*places, workers=2))["figures"]
    assert figures["pairs_found_done"] > 0
    assert part_hashes(there) == made[1]
    assert len(open_store(there, verify=True)) == 9
    rows = np.arange(9)
    fetched = local_store(f"file://{there}")
    assert (fetched.image_embeddings(0, rows, 0 * rows) == open_store(there).image_embeddings(0, rows, 0 * rows)).all()
    assert not [name for name in os.listdir(there) if name.endswith(".part")]
