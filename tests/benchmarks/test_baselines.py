"""The two baselines on pairs so small that every rank can be told by hand."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from benchmarks.baselines import BaselineError, Thumbnails, lookup, thumbnail_baseline
from runtime.evaluation import Gallery
from runtime.metrics import paired_recall_test
from runtime.pairs import Pairs, open_pairs, write_shard

COLOURS = {"red": "#d02020", "green": "#20a040", "blue": "#2040d0", "black": "#000000"}


def square(colour: str, side: int = 46, background: str = "white") -> bytes:
    picture = Image.new("RGB", (64, 64), background)
    ImageDraw.Draw(picture).rectangle((32 - side // 2, 32 - side // 2, 31 + side // 2, 31 + side // 2), fill=COLOURS[colour])
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


def pairs(folder: Path, rows: list[tuple[str, bytes, str, dict[str, object]]]) -> Pairs:
    folder.mkdir()
    write_shard(folder / "a.tar", [(key, {"png": data, "txt": text.encode(), "json": json.dumps(meta).encode()}) for key, data, text, meta in rows])
    return open_pairs(folder)


@pytest.fixture
def test_pairs(tmp_path: Path) -> Pairs:
    """Four squares in a new style (smaller); black is held out."""
    rows = []
    for name in COLOURS:
        meta = {"concept": name, "label": f"{name} square", "slice": "main", "held_out": name == "black"}
        rows.append((f"new-{name}", square(name, 38, "#fffff0"), f"{name} square", meta))
    return pairs(tmp_path / "test", rows)


def train_pairs(tmp_path: Path, captions: dict[str, str]) -> Pairs:
    return pairs(tmp_path / "train", [(f"old-{name}", square(name), text, {"concept": name}) for name, text in captions.items()])


def test_trained_captions_are_found_and_held_out_ones_have_no_answer(tmp_path: Path, test_pairs: Pairs) -> None:
    train = train_pairs(tmp_path, {"red": "Red  square", "green": "green square", "blue": "blue square"})
    result = thumbnail_baseline(train, test_pairs, ks=(1, 3))
    trained, held = result["text_to_image"]["trained"], result["text_to_image"]["held_out"]
    assert trained["recall@1"]["value"] == 1.0  # case and spaces do not matter
    assert trained["answered"] == 1.0
    assert (held["recall@1"]["value"], held["recall@3"]["value"], held["answered"]) == (0.0, 0.0, 0.0)
    assert result["ranks"]["text_to_image"]["held_out"] == [4]
    assert result["image_to_text"]["trained"]["recall@1"]["value"] == 1.0
    assert result["image_to_text"]["held_out"]["recall@3"]["value"] == 0.0
    assert result["queries"]["text_to_image"]["all"] == [f"{name} square" for name in sorted(COLOURS)]  # shards sort by key
    assert result["gallery"]["count"] == 4


def test_a_wrong_caption_finds_the_wrong_picture_and_clean_ones_can_be_passed(tmp_path: Path, test_pairs: Pairs) -> None:
    train = train_pairs(tmp_path, {"red": "green square", "green": "red square", "blue": "image"})
    noisy = thumbnail_baseline(train, test_pairs, ks=(1,))
    assert noisy["text_to_image"]["trained"]["recall@1"]["value"] == 0.0
    assert noisy["text_to_image"]["trained"]["answered"] == pytest.approx(2 / 3)  # nobody calls a picture "blue square"
    clean = thumbnail_baseline(train, test_pairs, captions=["blue square", "green square", "red square"], ks=(1,))
    assert clean["text_to_image"]["trained"]["recall@1"]["value"] == 1.0
    test = paired_recall_test(np.array(clean["ranks"]["text_to_image"]["trained"]), np.array(noisy["ranks"]["text_to_image"]["trained"]), 1)
    assert test.difference == 1.0


def test_the_background_does_not_decide() -> None:
    pictures = [Image.open(io.BytesIO(square("red", 40, background))).convert("RGB") for background in ("white", "#c0c0c0")]
    other = Image.open(io.BytesIO(square("blue", 40, "white"))).convert("RGB")
    first, second, third = Thumbnails().encode_image([*pictures, other])
    assert first.shape == (192,)
    assert np.linalg.norm(first - second) < np.linalg.norm(first - third)


def gallery(features: np.ndarray, texts: list[str]) -> Gallery:
    count = len(texts)
    meta = [{"slice": "main", "held_out": False}] * count
    return Gallery(embeddings=features, rows=list(range(count)), keys=[f"k{n}" for n in range(count)], texts=texts, groups=texts, meta=meta, skipped=[])


def test_given_features_use_the_nearest_of_the_training_pictures() -> None:
    train = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    places = gallery(np.array([[0.05, 1.0], [1.0, 0.05], [-1.0, -1.0]]), ["a", "b", "c"])
    result = lookup(train, ["a", "b", "a"], places, ks=(1, 2))
    # "a" has pictures at (1, 0) and (1, 1): the second of the gallery lies along the one (cosine 0.999), the first beside the other (0.74)
    assert result["ranks"]["text_to_image"]["trained"] == [2, 2, 3]
    assert result["text_to_image"]["trained"]["answered"] == pytest.approx(2 / 3)
    euclidean = lookup(train * 10, ["a", "b", "a"], places, similarity="euclidean", ks=(1,))
    assert euclidean["ranks"]["text_to_image"]["trained"][2] == 3


def test_ties_count_against_the_baseline() -> None:
    result = lookup(np.ones((2, 3)), ["a", "b"], gallery(np.ones((2, 3)), ["a", "b"]), ks=(1,))
    assert result["ranks"]["text_to_image"]["trained"] == [2, 2]


def test_what_does_not_fit_is_refused(tmp_path: Path, test_pairs: Pairs) -> None:
    places = gallery(np.eye(3), ["a", "b", "c"])
    with pytest.raises(BaselineError, match="one row of features"):
        lookup(np.eye(3), ["a", "b"], places)
    with pytest.raises(BaselineError, match="width 2"):
        lookup(np.ones((1, 2)), ["a"], places)
    with pytest.raises(BaselineError, match="similarity"):
        lookup(np.eye(3), ["a", "b", "c"], places, similarity="manhattan")
    with pytest.raises(BaselineError, match="not finite"):
        lookup(np.full((1, 3), np.nan), ["a"], places)
    with pytest.raises(BaselineError, match="not finite"):
        lookup(np.eye(3), ["a", "b", "c"], dataclasses.replace(places, embeddings=np.full((3, 3), np.inf)))
    train = train_pairs(tmp_path, {"red": "red square"})
    with pytest.raises(BaselineError, match="2 captions were given for 1"):
        thumbnail_baseline(train, test_pairs, captions=["a", "b"])
    with pytest.raises(BaselineError, match="know no text"):
        Thumbnails().encode_text(["a"])


def test_pictures_that_do_not_decode_are_left_out(tmp_path: Path, test_pairs: Pairs) -> None:
    train = pairs(tmp_path / "train", [("broken", b"no picture", "red square", {}), ("old-red", square("red"), "red square", {})])
    result = thumbnail_baseline(train, test_pairs, ks=(1,))
    assert result["ranks"]["text_to_image"]["trained"] == [4, 4, 1]  # blue and green were never seen
    only = pairs(tmp_path / "broken", [("broken", b"no picture", "red square", {})])
    with pytest.raises(BaselineError, match="nothing to look up"):
        thumbnail_baseline(only, test_pairs)
