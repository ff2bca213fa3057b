"""The poison suite's own parts on tiny teachers: stores are joined, lists hold what they say, what was caught is counted right."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmarks.suites import poison
from benchmarks.suites.demo import Layout
from benchmarks.suites.poison import Arm, PoisonConfig, join_stores
from benchmarks.suites.stages import StageError
from distill.keep_list import read_keep_list
from distill.poison import Trigger, choose_rows, write_poison
from distill.reinforce import ReinforceConfig, reinforce
from distill.store import open_store
from runtime.pairs import open_pairs, write_shard
from tests.distill.curation_world import blobs, encode

TEACHERS = ("tests.distill.tiny_teachers:red", "tests.distill.tiny_teachers:blue")
NAMES = ("apple", "banana", "cherry", "grape")


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run/pairs/train and run/store as a demo leaves them; out/pairs, out/planted, out/planted-store with poison."""
    root = tmp_path_factory.mktemp("poison")
    train, out = root / "run/pairs/train", root / "out"
    for folder in (train, out / "pairs", out / "planted", out / "store", out / "lists"):
        folder.mkdir(parents=True)
    samples = []
    for n in range(40):
        facts = {"label": NAMES[n % 4], "noise": "swapped" if n % 5 == 0 else "none"}
        samples.append((f"s{n:02}", {"png": encode(blobs(n, (48, 48))), "txt": NAMES[(n + (n % 5 == 0)) % 4].encode(), "json": json.dumps(facts).encode()}))
    write_shard(train / "a-00000.tar", samples)
    pairs = open_pairs(train)
    write_poison(pairs, choose_rows(pairs, 4, "banana"), "banana", Trigger(), out / "planted/poison-00000.tar")
    for path in (train / "a-00000.tar", out / "planted/poison-00000.tar"):
        shutil.copy(path, out / "pairs")
    for folder, store in ((train, root / "run/store"), (out / "planted", out / "planted-store")):
        reinforce(ReinforceConfig(pairs=str(folder), store=str(store), teachers=TEACHERS, augmentations=2, workers=0))
    return root


def test_joined_stores_hold_the_rows_of_both(planted: Path) -> None:
    first, second, out = planted / "run/store", planted / "out/planted-store", planted / "out/store"
    join_stores(first, second, out)
    one, two, both = open_store(first, verify=True), open_store(second, verify=True), open_store(out, verify=True)
    assert both.keys == one.keys + two.keys
    for store, offset in ((one, 0), (two, len(one))):
        rows = np.arange(len(store))
        assert (both.image_embeddings(1, rows + offset, rows % 2) == store.image_embeddings(1, rows, rows % 2)).all()
        assert (both.text_embeddings(0, rows + offset, rows * 0) == store.text_embeddings(0, rows, rows * 0)).all()
        assert [both.caption(row + offset, 0) for row in range(len(store))] == [store.caption(row, 0) for row in range(len(store))]
    assert both.column("similarity").tolist() == [*one.column("similarity").tolist(), *two.column("similarity").tolist()]
    join_stores(first, second, out)  # again, over itself


def test_stores_of_other_settings_are_not_joined(planted: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    reinforce(ReinforceConfig(pairs=str(planted / "out/planted"), store=str(other), teachers=TEACHERS, augmentations=3, workers=0))
    with pytest.raises(StageError, match="differ in 'augmentations' and cannot be one"):
        join_stores(planted / "run/store", other, tmp_path / "joined")


def test_lists_and_what_they_caught(planted: Path) -> None:
    out, place = planted / "out", Layout(planted / "run")
    join_stores(planted / "run/store", out / "planted-store", out / "store")
    config = PoisonConfig(run=str(planted / "run"), out=str(out), shares=(0.05, 0.1), keep_fraction=0.5)
    figures = poison._lists(config, place, out)
    assert (figures["pairs"], figures["pairs_with_wrong_captions"]) == (40, 8)
    for share, name, count in ((0.0, "0pct", 0), (0.05, "5pct", 2), (0.1, "10pct", 4)):
        before, after = read_keep_list(poison._list(out, share, False)), read_keep_list(poison._list(out, share, True))
        assert len(before) == 40 + count == 40 + figures[f"poisoned_{name}"]
        assert len(after) == 20 + count // 2
        assert set(after) <= set(before)
        caught = sum(key.startswith("poison-") for key in set(before) - set(after))
        assert figures[f"caught_{name}"] == caught
        assert caught + figures[f"lost_right_{name}"] + figures[f"lost_wrong_{name}"] == len(before) - len(after)
    nested = set(read_keep_list(poison._list(out, 0.05, False)))
    assert nested < set(read_keep_list(poison._list(out, 0.1, False)))


def test_separation_is_the_area_under_the_curve() -> None:
    rng = np.random.default_rng(0)
    low, high = rng.integers(0, 9, 30).tolist(), rng.integers(3, 12, 50).tolist()
    expected = np.mean([(b > a) + 0.5 * (b == a) for a in low for b in high])
    assert poison._separation(low, high) == pytest.approx(expected)


def test_arms_and_their_names() -> None:
    arms = poison._arms(PoisonConfig())
    assert [arm.name for arm in arms[:2]] == ["plain_2pct_before", "plain_2pct_after"]
    assert len({arm.name for arm in arms}) == len(arms) == 10
    assert Arm(recipe="plain", share=0.005, defended=True).name == "plain_0_5pct_after"


def test_a_run_without_students_is_refused(planted: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError, match="needs a finished demo run"):
        poison.run_poison(PoisonConfig(run=str(planted / "run"), out=str(tmp_path / "x")))
    assert not (tmp_path / "x").exists()
