"""Layers: what is added to a finished store later, what it must equal, and that nothing that is there is touched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from distill import appending, augment
from distill.reinforce import reinforce
from distill.store import open_store
from runtime.errors import ClipError, RecipeError, StoreError
from runtime.pairs import open_pairs
from tests.distill import tiny_teachers
from tests.distill.test_reinforce import BLUE, RED, config, make_pairs, part_hashes

GREEN = "tests.distill.tiny_teachers:green"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def finished(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of two views, made in this process."""
    store = tmp_path_factory.mktemp("finished") / "store"
    reinforce(config(pairs, store, augmentations=2, workers=0))
    return store


@pytest.fixture
def store(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "store"))


def captions_file(folder: Path, pairs: Path, every: int = 2) -> Path:
    keys = open_pairs(pairs).keys
    lines = [
        {"key": key, "captions": [{"text": f"seen {n % 3}", "source": "looker", "language": "fr"}, {"text": f"said of {n}", "type": "rewritten", "parent": 0}]}
        for n, key in enumerate(keys) if n % every == 0
    ]  # fmt: skip
    path = folder / "captions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def add(pairs: Path, store: Path, **changes) -> dict:
    return reinforce(config(pairs, store, **{"teachers": (), "workers": 0, **changes}))


def test_views_added_later_are_those_of_one_run(pairs: Path, store: Path, tmp_path: Path) -> None:
    before = part_hashes(store)
    index = add(pairs, store, add_augmentations=3)
    assert {name: part_hashes(store)[name] for name in before} == before
    assert len(part_hashes(store)) == 2 * len(before)
    assert [layer["views"] for layer in index["layers"]] == [[0, 2], [2, 5]]
    reinforce(config(pairs, tmp_path / "one", augmentations=5, workers=0))
    grown, one = open_store(store, verify=True), open_store(tmp_path / "one")
    assert grown.keys == one.keys
    rows, augs = np.repeat(np.arange(len(one)), 5), np.tile(np.arange(5), len(one))
    assert (grown.augmentation(rows, augs) == one.augmentation(rows, augs)).all()
    for t in (0, 1):
        step = np.abs(one.image_embeddings(t, rows, augs)).max(axis=1) / 127
        assert (np.abs(grown.image_embeddings(t, rows, augs) - one.image_embeddings(t, rows, augs)).max(axis=1) <= step + 1e-6).all()
    again = add(pairs, store, add_augmentations=1)
    assert [layer["views"] for layer in again["layers"]] == [[0, 2], [2, 5], [5, 6]]
    assert len(open_store(store, verify=True).n_augmentations) == 14


def test_an_addition_has_the_same_bytes_with_any_number_of_workers(pairs: Path, store: Path, finished: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(finished, tmp_path / "other"))
    add(pairs, store, add_augmentations=2)
    add(pairs, other, add_augmentations=2, workers=2)
    assert part_hashes(store) == part_hashes(other)


def test_captions_added_later(pairs: Path, store: Path, tmp_path: Path) -> None:
    before, path = part_hashes(store), captions_file(tmp_path, pairs)
    index = add(pairs, store, add_captions=str(path))
    assert {name: part_hashes(store)[name] for name in before} == before
    made, red = open_store(store, verify=True), tiny_teachers.red()
    assert made.caption_counts.tolist() == [5 if n % 2 == 0 else 3 for n in range(14)]
    assert (made.caption(2, 3).text, made.caption(2, 3).source, made.caption(2, 3).language, made.caption(2, 3).type) == ("seen 2", "looker", "fr", "synthetic")
    assert made.caption(2, 4).parent == 0
    assert index["sources"][:3] == ["pairs", "emoji", "drawing"]
    assert (made.text_embeddings(0, [4], [4]) * red.encode_text(["said of 4"])).sum() > 0.999
    assert index["layers"][1]["captioner"]["captioner"] == "captions.jsonl"
    assert add(pairs, store, add_captions=str(path)) == index  # the same file is not added twice


def test_a_teacher_added_later_sees_all_views_and_captions(pairs: Path, store: Path, tmp_path: Path) -> None:
    add(pairs, store, add_captions=str(captions_file(tmp_path, pairs)))
    add(pairs, store, add_augmentations=1)
    before = part_hashes(store)
    index = add(pairs, store, add_teachers=(GREEN,))
    assert {name: part_hashes(store)[name] for name in before} == before
    made, green, source = open_store(store, verify=True), tiny_teachers.green(), open_pairs(pairs)
    assert [facts.name for facts in made.teachers] == ["red", "blue", "green"]
    for row, aug in ((0, 0), (13, 1), (7, 2)):
        view = np.asarray(augment.apply(source.image(row), made.augmentation([row], [aug])[0], 40))
        assert (made.image_embeddings(2, [row], [aug]) * green.encode_image([view])).sum() > 0.999
    for row, j in ((0, 4), (1, 2), (12, 3)):
        assert (made.text_embeddings(2, [row], [j]) * green.encode_text([made.caption(row, j).text])).sum() > 0.999
    assert add(pairs, store, add_teachers=(GREEN,)) == index
    grown = add(pairs, store, add_augmentations=1)  # with all three teachers, found where they were named
    assert [layer["teachers"] for layer in grown["layers"]] == [[0, 1], [0, 1], [0, 1], [2], [0, 1, 2]]
    assert open_store(store, verify=True).image_embeddings(2, [5], [3]).shape == (1, 16)


def test_an_addition_that_was_interrupted_goes_on(pairs: Path, store: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, whole = part_hashes(store), Path(shutil.copytree(finished, tmp_path / "whole"))
    add(pairs, whole, add_augmentations=2)
    original, calls = appending.embed_layer, []

    def stops(task: object) -> object:
        calls.append(task)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return original(task)

    monkeypatch.setattr(appending, "embed_layer", stops)
    with pytest.raises(KeyboardInterrupt):
        add(pairs, store, add_augmentations=2)
    monkeypatch.undo()
    assert len(part_hashes(store)) == len(before) + 2
    assert open_store(store, verify=True).index["augmentations"] == 2  # readers see the store as it was
    with pytest.raises(StoreError, match="another addition to .* was begun and did not finish"):
        add(pairs, store, add_augmentations=3)
    index = reinforce(config(pairs, store, augmentations=2, workers=0))  # the first command finds its store whole
    assert index["augmentations"] == 2
    figures = add(pairs, store, add_augmentations=2)["figures"]
    assert figures["pairs_found_done"] == 8
    assert part_hashes(store) == part_hashes(whole)


def test_a_damaged_layer_is_repaired_by_the_first_command(pairs: Path, store: Path) -> None:
    add(pairs, store, add_augmentations=1)
    add(pairs, store, add_teachers=(GREEN,))
    good, index = part_hashes(store), (store / "index.json").read_bytes()
    for name in ("shard-0.0001.safetensors", "shard-1.0000.1.safetensors", "shard-0.0000.2.safetensors"):
        blob = bytearray((store / name).read_bytes())
        blob[-5] ^= 4
        (store / name).write_bytes(bytes(blob))
    reinforce(config(pairs, store, augmentations=2, workers=0))
    assert part_hashes(store) == good
    assert json.loads((store / "index.json").read_bytes())["parts"] == json.loads(index)["parts"]
    assert len(open_store(store, verify=True).teachers) == 3


def test_what_cannot_be_added_is_refused_and_nothing_changes(pairs: Path, store: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in store.iterdir() if path.is_file()}
    for changes, message in (
        ({"add_augmentations": 1, "teachers": (BLUE, RED)}, "name its teachers in this order"),
        ({"add_augmentations": 1, "teachers": (RED,)}, "name its teachers in this order"),
        ({"add_teachers": ("tests.distill.tiny_teachers:broken",)}, "finite: False"),
        ({"add_captions": str(tmp_path / "none.jsonl")}, "do not exist"),
    ):
        with pytest.raises(ClipError, match=message):
            add(pairs, store, **changes)
    with pytest.raises(StoreError, match="made from other pairs"):
        add(make_pairs(tmp_path / "others", (3,)), store, add_augmentations=1)
    with pytest.raises(StoreError, match="not a finished store"):
        add(pairs, tmp_path / "nothing", add_augmentations=1)
    with pytest.raises(RecipeError, match="one thing is added at a time"):
        config(pairs, store, add_augmentations=1, add_teachers=(GREEN,))
    assert {path.name: path.read_bytes() for path in store.iterdir() if path.is_file()} == before


def test_a_store_that_does_not_say_how_it_was_made_is_refused(pairs: Path, store: Path) -> None:
    index = json.loads((store / "index.json").read_text())
    for name in ("shards", "seed"):
        (store / "index.json").write_text(json.dumps({key: value for key, value in index.items() if key != name}))
        with pytest.raises(StoreError, match=f"does not say {name}"):
            add(pairs, store, add_augmentations=1)
