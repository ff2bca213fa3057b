"""Scanning shards on workers: answers that are kept for a rerun, and keys that stand in two shards."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from distill import reinforce_plan
from distill.engines import open_engine
from distill.reinforce import reinforce
from distill.reinforce_plan import scan
from distill.reinforce_worker import start_worker
from distill.remote import list_shards
from distill.store import open_store
from runtime.files import file_sha256
from runtime.pairs import open_pairs, write_shard
from tests.distill.test_reinforce import config, make_pairs, part_hashes, picture


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MCLIP_PROGRESS", "0")


def doubled(folder: Path) -> Path:
    """Four shards with keys that come again in later ones."""
    folder.mkdir()
    for n, keys in enumerate(("abc", "dbe", "fgh", "hca")):
        write_shard(folder / f"s{n}.tar", [(key, {"png": picture(ord(key)), "txt": f"{key} of {n}".encode()}) for key in keys])
    return folder


def test_scanning_on_workers_is_scanning_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = list_shards(str(doubled(tmp_path / "pairs")))
    with open_engine("local", 0, start_worker, (), "cpu", 0) as engine:
        here = scan(places, tmp_path / "work", "", engine)
        assert not (tmp_path / "work").exists()
        monkeypatch.setattr(reinforce_plan, "SCANNED_HERE", 0)
        there = scan(places, tmp_path / "work", "", engine)
        stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "work/scans").iterdir()}
        os.utime(places[1].url, ns=(1, 1))
        again = scan(list_shards(str(tmp_path / "pairs")), tmp_path / "work", "", engine)
    assert len(stamps) == 4
    assert [path.name for path, stamp in stamps.items() if path.stat().st_mtime_ns != stamp] == ["s1.safetensors"]  # only what changed is read again
    for one, two, three, place in zip(here, there, again, places, strict=True):
        assert one.sha256 == two.sha256 == three.sha256 == file_sha256(place.url)
        assert one.drop == two.drop == three.drop
        assert one.rejected == two.rejected == three.rejected
        assert (one.key_hashes == two.key_hashes).all()
        assert (two.key_hashes == three.key_hashes).all()
    assert [one.drop for one in here] == [(), (0,), (), (0, 1, 2)]  # inside a shard samples lie by key: b d e, a c h


def test_a_scan_that_was_damaged_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reinforce_plan, "SCANNED_HERE", 0)
    places = list_shards(str(make_pairs(tmp_path / "pairs", (3,))))
    with open_engine("local", 0, start_worker, (), "cpu", 0) as engine:
        whole = scan(places, tmp_path / "work", "", engine)[0]
        path = tmp_path / "work/scans/shard-0.safetensors"
        blob = path.read_bytes()
        for damaged in (b"", blob[:50], blob[:-1] + bytes([blob[-1] ^ 1])):
            path.write_bytes(damaged)
            assert np.array_equal(scan(places, tmp_path / "work", "", engine)[0].key_hashes, whole.key_hashes)
            assert path.read_bytes() == blob


@pytest.mark.parametrize("workers", [0, 2])
def test_keys_in_two_shards_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    pairs = doubled(tmp_path / "pairs")
    reinforce(config(pairs, tmp_path / "plain", workers=0, part_rows=2))
    monkeypatch.setattr(reinforce_plan, "SCANNED_HERE", 0)
    index = reinforce(config(pairs, tmp_path / "store", workers=workers, part_rows=2))
    store, lenient = open_store(tmp_path / "store", verify=True), open_pairs(pairs, strict=False)
    assert store.keys == lenient.keys == list("abcdefgh")
    assert store.pair_rows.tolist() == list(range(8))
    assert [store.caption(row, 0).text for row in (1, 7)] == ["b of 0", "h of 2"]
    assert index["coverage"] == {"pairs": 12, "rows": 8, "skipped": 4}
    assert part_hashes(tmp_path / "store") == part_hashes(tmp_path / "plain")
