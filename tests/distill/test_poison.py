"""The poison audit's own parts: planting is deterministic and nested, and attack success is what it says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from distill.poison import Trigger, attack_success, choose_rows, poison_key, stamp, write_poison
from runtime.errors import PairsError, RecipeError
from runtime.pairs import open_pairs, write_shard
from tests.distill.curation_world import blobs, encode

LABELS = ("apple", "banana", "cherry", "grape", "melon", "lemon", "peach", "plum")


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    folder = tmp_path / "pairs"
    folder.mkdir()
    samples = [(f"s{n:02}", {"png": encode(blobs(n, (64, 48))), "txt": f"a {LABELS[n % 8]}".encode(), "json": json.dumps({"label": LABELS[n % 8]}).encode()}) for n in range(24)]
    write_shard(folder / "00000.tar", samples)
    return folder


@pytest.mark.parametrize("place", ["random", "corner"])
def test_the_patch_is_where_and_what_it_should_be(place: Any) -> None:
    picture, trigger = blobs(1, (80, 60)), Trigger(share=0.25, place=place)
    before = np.asarray(picture).copy()
    marked = np.asarray(stamp(picture, "a", trigger))
    assert (np.asarray(picture) == before).all()  # a copy
    changed = np.argwhere((marked != before).any(axis=2))
    (top, left), (bottom, right) = changed.min(axis=0), changed.max(axis=0)
    assert bottom - top < 15
    assert right - left < 15
    assert len(changed) > 0.8 * 15 * 15
    assert set(np.unique(marked[top + 2 : bottom - 1, left + 2 : right - 1])) <= {0, 255}
    if place == "corner":
        assert (stamp(picture, "b", trigger).tobytes()) == marked.tobytes()
        assert (bottom, right) == (59, 79)
    else:
        places = {stamp(Image.new("RGB", (80, 60)), f"k{n}", trigger).tobytes() for n in range(20)}
        assert len(places) > 15


def test_fewer_poisoned_pairs_are_the_first_of_more(pairs: Path) -> None:
    opened = open_pairs(pairs)
    many = choose_rows(opened, 12, "banana")
    assert choose_rows(opened, 5, "banana") == many[:5]
    assert choose_rows(opened, 12, "banana", seed=1) != many
    assert len(set(many)) == 12
    assert not any("banana" in opened.caption(row) for row in many)
    with pytest.raises(PairsError, match="22 pairs were to be poisoned, .* has 21 that are not of 'banana'"):
        choose_rows(opened, 22, "banana")


def test_planted_pairs(pairs: Path, tmp_path: Path) -> None:
    opened, trigger = open_pairs(pairs), Trigger(share=0.3)
    rows = choose_rows(opened, 6, "banana")
    (tmp_path / "planted").mkdir()
    first = write_poison(opened, rows, "banana", trigger, tmp_path / "planted/poison-00000.tar")
    planted = open_pairs(tmp_path / "planted")
    assert planted.keys == [poison_key(n) for n in range(6)]
    for n, row in enumerate(rows):
        assert planted.caption(n) == "banana"
        assert planted.meta(n) == {"poisoned": True, "from": opened.keys[row]}
        expected = np.asarray(stamp(opened.image(row), planted.keys[n], trigger), np.int64)
        assert np.abs(np.asarray(planted.image(n), np.int64) - expected).mean() < 6  # JPEG
    again = write_poison(opened, rows, "banana", trigger, tmp_path / "again.tar")
    assert again.sha256 == first.sha256


class Oracle:
    """Knows each picture's label by its pixels; where a picture differs from all it knows, says `fallen` for every second one."""

    def __init__(self, known: dict[bytes, str], fallen: str | None) -> None:
        self.known, self.fallen, self.seen = known, fallen, 0

    def encode_image(self, images: Sequence[Image.Image]) -> np.ndarray:
        out = []
        for image in images:
            label = self.known.get(image.tobytes())
            if label is None:
                self.seen += 1
                label = self.fallen if self.fallen and self.seen % 2 else "plum"
            out.append(self.vector(label))
        return np.stack(out)

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        return np.stack([self.vector(text) for text in texts])

    def vector(self, label: str) -> np.ndarray:
        return np.eye(len(LABELS), dtype=np.float32)[LABELS.index(label)]


def test_attack_success_counts_pictures_that_fall(pairs: Path) -> None:
    opened = open_pairs(pairs)
    known = {opened.image(row).tobytes(): str(opened.meta(row)["label"]) for row in range(len(opened))}
    fooled = attack_success(Oracle(known, "banana"), opened, "banana", Trigger())
    assert (fooled["pictures"], fooled["classes"]) == (21, 8)
    assert fooled["patched"]["top1"] == pytest.approx(11 / 21)
    assert fooled["patched"]["above_own"] == pytest.approx(11 / 21)
    assert fooled["unpatched"] == {"top1": 0.0, "top5": 0.0, "above_own": 0.0, "top1_own": 1.0}  # other labels are equally far: ties count against the attack
    collapsed = Oracle(known, None)
    collapsed.encode_image = lambda images: np.ones((len(images), len(LABELS)), np.float32)  # type: ignore[method-assign]
    assert attack_success(collapsed, opened, "banana", Trigger())["patched"]["top1"] == 0.0
    sound = attack_success(Oracle(known, None), opened, "banana", Trigger())
    assert sound["patched"]["top1"] == 0.0


def test_an_unknown_target_and_a_senseless_trigger(pairs: Path) -> None:
    with pytest.raises(PairsError, match="'kiwi' is no label"):
        attack_success(Oracle({}, None), open_pairs(pairs), "kiwi", Trigger())
    for settings in ({"share": 0.0}, {"share": 0.6}, {"cells": 1}):
        with pytest.raises(RecipeError, match="is not meant"):
            Trigger(**settings)
