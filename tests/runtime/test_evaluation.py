"""Evaluation on drawn pairs whose answers are known by hand."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import runtime
from runtime.errors import PairsError
from runtime.evaluation import embed_gallery, retrieval, split_rows, zero_shot
from runtime.metrics import paired_recall_test
from runtime.pairs import Pairs, open_pairs, write_shard
from tests.runtime import toy

CODES = {"red": 0, "green": 1, "blue": 2, "white": 3}


def sample(key: str, colour: str | bytes, caption: str | None, meta: dict[str, Any] | None) -> tuple[str, dict[str, bytes]]:
    buffer = io.BytesIO()
    if isinstance(colour, str):
        Image.new("RGB", (8, 8), toy.COLOURS[colour]).save(buffer, "PNG")
    members = {"png": colour if isinstance(colour, bytes) else buffer.getvalue()}
    if caption is not None:
        members["txt"] = caption.encode()
    if meta is not None:
        members["json"] = json.dumps(meta).encode()
    return key, members


def facts(concept: str, group: str, held_out: bool = False, slice: str = "main") -> dict[str, Any]:
    return {"concept": concept, "slice": slice, "held_out": held_out, "group": group, "label": concept}


@pytest.fixture
def pairs(tmp_path: Path) -> Pairs:
    samples = [
        sample("a", "red", "wrong caption", facts("red", "warm", held_out=True)),
        sample("b", "green", "green", facts("green", "cold-tones")),
        sample("c", "blue", "blue", facts("blue", "cold-tones")),
        sample("d", "white", "white", facts("white", "warm", slice="clock")),
    ]
    write_shard(tmp_path / "0.tar", samples)
    return open_pairs(tmp_path)


class Table:
    """An encoder whose answers are written down: picture colour and text -> vector."""

    def __init__(self, texts: dict[str, list[float]], swap: dict[int, int] | None = None) -> None:
        self.texts, self.swap, self.batches = texts, swap or {}, 0

    def encode_image(self, images: list[Image.Image]) -> np.ndarray:
        self.batches += 1
        order = [next(n for n, rgb in enumerate(toy.COLOURS.values()) if image.getpixel((0, 0)) == rgb) for image in images]
        return np.eye(4, dtype=np.float32)[[self.swap.get(n, n) for n in order]]

    def encode_text(self, texts: list[str]) -> np.ndarray:
        return np.array([self.texts[text] for text in texts], np.float32)


PERFECT = {name: np.eye(4)[n].tolist() for name, n in CODES.items()}


def test_recall_by_hand(pairs: Pairs) -> None:
    # "red" prefers green, then blue, then red: rank 3; the other texts are right.
    encoder = Table({**PERFECT, "red": [0.5, 1.0, 0.7, 0.0]})
    found = retrieval(encoder, pairs, ks=(1, 2, 3))
    to_image = found["text_to_image"]
    assert list(to_image) == ["held_out", "trained", "clock", "all"]
    assert [to_image["held_out"][f"recall@{k}"]["value"] for k in (1, 2, 3)] == [0.0, 0.0, 1.0]
    assert to_image["trained"]["recall@1"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert (to_image["trained"]["n"], to_image["clock"]["n"], to_image["all"]["n"]) == (2, 1, 4)
    assert to_image["all"]["recall@1"]["value"] == 0.75
    assert to_image["all"]["recall@1"]["low"] < 0.75 < to_image["all"]["recall@1"]["high"]
    assert to_image["held_out"]["median_rank"] == 3.0
    # Picture green scores 1 with "green" and 0.76 with "red"; picture red has only "red".
    assert found["image_to_text"]["all"]["recall@1"]["value"] == 1.0
    assert found["ranks"]["text_to_image"]["all"] == [3, 1, 1, 1]
    assert found["queries"]["text_to_image"]["all"] == ["red", "green", "blue", "white"]
    assert found["queries"]["image_to_text"]["trained"] == ["b", "c"]
    assert found["gallery"] == {"count": 4, "texts": 4, "sha256": hashlib.sha256(b"a\nb\nc\nd").hexdigest()}
    json.dumps(found, allow_nan=False)


def test_labels_are_asked_for_and_captions_where_there_are_none(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", [sample("a", "red", "red", None), sample("b", "blue", "blue", {})])
    found = retrieval(Table(PERFECT), open_pairs(tmp_path))
    assert list(found["text_to_image"]) == ["all"]
    assert found["text_to_image"]["all"]["recall@1"]["value"] == 1.0


def test_several_pictures_of_a_concept(tmp_path: Path) -> None:
    samples = [sample(f"x{n}", "red", None, facts("red", "warm")) for n in range(3)] + [sample("y", "blue", None, facts("blue", "cold"))]
    write_shard(tmp_path / "0.tar", samples)
    found = retrieval(Table({**PERFECT, "blue": [1.0, 0.0, 0.9, 0.0]}), open_pairs(tmp_path))
    # One query a distinct text; for "blue" three red pictures stand before the blue one.
    assert found["ranks"]["text_to_image"]["trained"] == [1, 4]
    assert found["ranks"]["image_to_text"]["trained"] == [1, 1, 1, 1]
    assert found["gallery"]["texts"] == 2


def test_a_constant_encoder_earns_nothing(pairs: Pairs) -> None:
    constant = Table(dict.fromkeys(CODES, [1.0, 1.0, 1.0, 1.0]), swap={1: 0, 2: 0, 3: 0})
    found = retrieval(constant, pairs, ks=(1, 3))
    assert found["text_to_image"]["all"]["recall@3"]["value"] == 0.0
    assert found["image_to_text"]["all"]["recall@3"]["value"] == 0.0


def test_pictures_that_do_not_decode_are_skipped_and_listed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples = [sample("a", "red", "red", None), sample("bad", b"no picture", "white", None), sample("c", "blue", "blue", None)]
    write_shard(tmp_path / "0.tar", samples)
    found = retrieval(Table(PERFECT), open_pairs(tmp_path))
    assert found["skipped"] == ["bad"]
    assert found["gallery"]["count"] == 2
    assert "bad" in caplog.text
    write_shard(tmp_path / "0.tar", [sample("bad", b"no picture", "white", None)])
    with pytest.raises(PairsError, match="none of the 1 pictures"):
        retrieval(Table(PERFECT), open_pairs(tmp_path))


def test_two_encoders_are_compared_query_by_query(pairs: Pairs) -> None:
    gallery = embed_gallery(Table(PERFECT), pairs)
    good = retrieval(Table(PERFECT), pairs, gallery=gallery)
    encoder = Table({**PERFECT, "red": [0.0, 1.0, 0.0, 0.0]})
    bad = retrieval(encoder, pairs, gallery=gallery)
    assert encoder.batches == 0  # the gallery given was used
    assert good["queries"] == bad["queries"]
    ranks = [np.array(found["ranks"]["text_to_image"]["all"]) for found in (good, bad)]
    assert paired_recall_test(*ranks, k=1).difference == 0.25


def test_splits() -> None:
    meta = [facts("a", "g", held_out=True), facts("b", "g"), facts("c", "g", slice="flag"), facts("d", "g", True, slice="keycap"), {}, {"slice": "main"}]
    assert split_rows(meta) == {"held_out": [0], "trained": [1], "keycap": [3], "flag": [2], "all": [0, 1, 2, 3, 4, 5]}
    assert split_rows([{}]) == {"all": [0]}


def test_zero_shot_by_hand(pairs: Pairs) -> None:
    names = {"warm": [1.0, 0.0, 0.0, 0.1], "cold and tones": [0.0, 1.0, 1.0, 0.2]}
    encoder = Table({f"{prefix}{name}": vector for prefix in ("", "a ") for name, vector in names.items()})
    found = zero_shot(encoder, pairs, prompts=("{}", "a {}"))
    assert found["classes"] == ["cold-tones", "warm"]
    assert found["per_class"] == {"cold-tones": {"n": 2, "accuracy": 1.0}, "warm": {"n": 2, "accuracy": 0.5}}
    assert found["accuracy"]["value"] == 0.75
    assert found["majority"] == 0.5
    assert found["mean_per_class"] == 0.75
    json.dumps(found, allow_nan=False)


def test_zero_shot_of_a_constant_encoder_is_all_wrong(pairs: Pairs) -> None:
    encoder = Table(dict.fromkeys(("warm", "cold and tones"), [1.0, 1.0, 1.0, 1.0]))
    assert zero_shot(encoder, pairs, prompts=("{}",))["accuracy"]["value"] == 0.0


def test_zero_shot_refuses(pairs: Pairs, tmp_path: Path) -> None:
    for prompts in ((), ("no place",)):
        with pytest.raises(ValueError, match="at least one template"):
            zero_shot(Table(PERFECT), pairs, prompts=prompts)
    with pytest.raises(PairsError, match="at least two values of 'style'"):
        zero_shot(Table(PERFECT), pairs, field="style")


def test_a_clip_can_be_evaluated(toy_bundle: Path, pairs: Pairs) -> None:
    clip = runtime.load(toy_bundle, threads=1)
    found = retrieval(clip, pairs)
    assert found["text_to_image"]["all"]["recall@1"]["value"] == 1.0
    assert zero_shot(clip, pairs, prompts=("{}",))["n"] == 4
