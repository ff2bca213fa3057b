"""mclip curate: rules drop what they say, keep one of each group, and depend on content alone; bad input is one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ImageOps

from distill.curate import CurateConfig, curate
from distill.dataset import ReinforcedPairs
from distill.keep_list import read_keep_list, write_keep_list
from distill.store import open_store
from distill.train import TrainConfig, train
from mobileclip import cli
from mobileclip.checkpoint import build_tokenizer
from runtime.errors import ClipError, PairsError, RecipeError, StoreError
from runtime.pairs import open_pairs
from runtime.preprocess import PreprocessConfig
from runtime.tokenizer import Tokenizer
from tests.distill.curation_world import blobs, encode, orders, write_pairs, write_store
from tests.distill.world import make_pairs, make_store


def run(pairs: Path, tmp_path: Path, **settings: Any) -> tuple[set[str], dict[str, Any]]:
    """The keys that are kept, and each rule's step by name."""
    report = curate(CurateConfig(pairs=str(pairs), out=str(tmp_path / "out.keep"), **settings))
    keep = read_keep_list(tmp_path / "out.keep")
    assert json.loads((tmp_path / "out.keep.json").read_text()) == json.loads(json.dumps(report))
    assert keep.facts["pairs_kept"] == len(keep) == report["pairs_kept"]
    assert report["pairs_in"] - sum(step["dropped"] for step in report["rules"]) == len(keep)
    return set(keep), {step["rule"]: step for step in report["rules"]}


# ---------------------------------------------------------------- before


def test_exact_duplicates(tmp_path: Path) -> None:
    one, two = encode(blobs(1)), encode(blobs(2))
    again = encode(blobs(1), compress_level=0)
    assert again != one
    samples = {"b": (one, "x"), "a": (one, "y"), "c": (again, "z"), "d": (two, "w")}
    for n, order in enumerate(orders(list(samples))):
        kept, steps = run(write_pairs(tmp_path / f"p{n}", {key: samples[key] for key in order}), tmp_path, exact=True)
        assert kept == {"c", "d"}  # the largest file, as similarity and size are equal
        step = steps["exact duplicates"]
        assert step["why"] == {"the same pixels in another file": 2}
        dropped = [{"key": "a", "same": "pixels"}, {"key": "b", "same": "pixels"}]
        assert step["examples"] == [{"kept": "c", "why": f"largest file, {len(again)} bytes", "dropped": dropped}]


def test_the_same_file_keeps_the_first_key(tmp_path: Path) -> None:
    data = encode(blobs(1))
    kept, steps = run(write_pairs(tmp_path / "p", {key: (data, "x") for key in ("m", "b", "z")}), tmp_path, exact=True)
    assert kept == {"b"}
    assert steps["exact duplicates"]["why"] == {"the same file": 2}
    assert steps["exact duplicates"]["examples"][0]["why"] == "first key"


def test_near_duplicates(tmp_path: Path) -> None:
    samples = {f"s{n}": (encode(blobs(n)), "x") for n in range(20)}
    samples["larger"] = (encode(blobs(3).resize((288, 192))), "x")
    samples["worse"] = (encode(blobs(5), "JPEG", quality=40), "x")
    grey = blobs(100).convert("L")
    for name, colour in (("red", (255, 0, 0)), ("green", (0, 130, 0))):  # of the same brightness
        samples[name] = (encode(ImageOps.colorize(grey, (0, 0, 0), colour)), "x")
    for n, order in enumerate(orders(list(samples))):
        kept, steps = run(write_pairs(tmp_path / f"p{n}", {key: samples[key] for key in order}), tmp_path, near=True)
        assert set(samples) - kept == {"s3", "worse" if len(samples["worse"][0]) < len(samples["s5"][0]) else "s5"}
        groups = {group["kept"]: group for group in steps["near duplicates"]["examples"]}
        assert groups["larger"]["why"] == "largest picture, 192 x 288"
        assert [entry["key"] for entry in groups["larger"]["dropped"]] == ["s3"]
        assert steps["near duplicates"]["spared_for_their_colours"] == 1
    assert len({"red", "green"} & run(tmp_path / "p0", tmp_path, near=True, near_colour=255)[0]) == 1


def test_test_pictures_are_left_out_of_training(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "train", {f"s{n}": (encode(blobs(n)), "x") for n in range(8)})
    test = write_pairs(tmp_path / "test", {"t1": (encode(blobs(3), "JPEG", quality=70), "y"), "t2": (encode(blobs(100)), "y"), "t3": (b"no picture", "y")})
    kept, steps = run(pairs, tmp_path, apart_from=str(test))
    assert kept == {f"s{n}" for n in range(8)} - {"s3"}
    assert steps["apart from"]["examples"][0]["like"] == "t1"


def test_captions(tmp_path: Path) -> None:
    samples = {
        "none": (encode(blobs(0)), None), "empty": (encode(blobs(1)), "  \n"), "short": (encode(blobs(2)), "ab"), "word": (encode(blobs(3)), "butterfly"),
        "good": (encode(blobs(4)), "a red bird"), "long": (encode(blobs(5)), "very " * 30 + "long"), "bytes": (encode(blobs(6)), b"\xff\xfe\xff"),
    }  # fmt: skip
    pairs = write_pairs(tmp_path / "p", samples)
    kept, steps = run(pairs, tmp_path, min_caption_chars=3, min_caption_words=2, max_caption_words=20)
    assert kept == {"good"}
    assert steps["caption length"]["why"] == {"empty": 2, "too few characters": 1, "too few words": 1, "too many words": 1, "not UTF-8": 1}
    assert run(pairs, tmp_path, min_caption_chars=1)[0] == {"short", "word", "good", "long"}
    assert "none" in run(pairs, tmp_path, max_caption_words=40)[0]  # a picture alone is a valid sample


def test_a_caption_of_many_pictures(tmp_path: Path) -> None:
    samples = {f"i{n}": (encode(blobs(n)), ("Image", " image ", "IMAGE")[n % 3]) for n in range(4)} | {f"b{n}": (encode(blobs(9)), "bird") for n in range(4)}
    pairs = write_pairs(tmp_path / "p", samples)
    assert run(pairs, tmp_path, max_shared_caption=3, exact=True)[0] == {"b0"}  # one picture four times is one picture
    assert run(pairs, tmp_path, max_shared_caption=4)[0] == set(samples)
    steps = run(pairs, tmp_path, max_shared_caption=3, exact=True)[1]
    assert steps["shared caption"]["examples"] == [{"caption": "image", "pictures": 4}]


def test_picture_sizes_and_pictures_that_do_not_decode(tmp_path: Path) -> None:
    samples = {
        "good": (encode(blobs(1, (100, 80))), "x"), "small": (encode(blobs(2, (100, 20))), "x"), "thin": (encode(blobs(3, (400, 100))), "x"),
        "broken": (encode(blobs(4))[:200], "x"), "nothing": (b"", "x"),
    }  # fmt: skip
    kept, steps = run(write_pairs(tmp_path / "p", samples), tmp_path, min_side=50, max_aspect=3)
    assert kept == {"good"}
    assert steps["picture size"]["why"] == {"too small": 1, "too long for their width": 1}
    assert steps["unreadable"]["dropped_keys"] == ["broken", "nothing"]


def test_workers_do_not_change_the_result(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "p", {f"s{n:03}": (encode(blobs(n % 290, (24, 24))), "x") for n in range(300)})
    run(pairs, tmp_path, exact=True, near=True)
    alone = (tmp_path / "out.keep").read_bytes(), (tmp_path / "out.keep.json").read_bytes()
    run(pairs, tmp_path, exact=True, near=True, workers=2)
    assert ((tmp_path / "out.keep").read_bytes(), (tmp_path / "out.keep.json").read_bytes()) == alone
    assert len(read_keep_list(tmp_path / "out.keep")) == 290


# ---------------------------------------------------------------- after


@pytest.fixture
def judged(tmp_path: Path) -> tuple[Path, Path, dict[str, float]]:
    """24 pairs, their store, and the similarity of each. Pairs 2n and 2n + 1 have the same embedding up to noise."""
    rng = np.random.default_rng(0)
    keys = [f"k{n:02}" for n in range(24)]
    pairs = write_pairs(tmp_path / "pairs", {key: (encode(blobs(n)), f"thing {n}") for n, key in enumerate(keys)})
    centres = rng.standard_normal((12, 32))
    vectors = {key: centres[n // 2] + 0.01 * rng.standard_normal(32) for n, key in enumerate(keys)}
    similarity = {key: float(value) for key, value in zip(keys, rng.permutation(24) / 24, strict=True)}
    return pairs, write_store(tmp_path / "store", pairs, vectors, similarity, spread=0.02), similarity


def test_similarity_keeps_the_best(judged: tuple[Path, Path, dict[str, float]], tmp_path: Path) -> None:
    pairs, store, similarity = judged
    assert run(pairs, tmp_path, store=str(store), min_similarity=0.5)[0] == {key for key, value in similarity.items() if value >= 0.5}
    kept, steps = run(pairs, tmp_path, store=str(store), keep_fraction=0.3)
    best = sorted(similarity, key=lambda key: -similarity[key])[:8]  # 7.2 rounded up
    assert kept == set(best)
    assert steps["similarity"]["threshold"] == pytest.approx(similarity[best[-1]], abs=1e-5)


def test_stricter_thresholds_keep_less(judged: tuple[Path, Path, dict[str, float]], tmp_path: Path) -> None:
    pairs, store, _ = judged
    for name, loose_to_strict in (("min_similarity", (-1, 0.1, 0.4, 0.4001, 0.9)), ("keep_fraction", (1.0, 0.7, 0.5, 0.01))):
        kept = [run(pairs, tmp_path, store=str(store), **{name: value})[0] for value in loose_to_strict]
        assert all(later <= former for former, later in zip(kept, kept[1:], strict=False))
        assert len(kept[0]) == 24
        assert 0 < len(kept[-1]) < 4


def test_embedding_duplicates_keep_the_better_of_two(judged: tuple[Path, Path, dict[str, float]], tmp_path: Path) -> None:
    pairs, store, similarity = judged
    kept, steps = run(pairs, tmp_path, store=str(store), embedding_duplicates=0.96)
    assert kept == {max((f"k{n:02}", f"k{n + 1:02}"), key=similarity.get) for n in range(0, 24, 2)}
    assert all(group["why"].startswith("highest similarity") for group in steps["embedding duplicates"]["examples"])
    assert all(entry["cosine"] >= 0.96 for group in steps["embedding duplicates"]["examples"] for entry in group["dropped"])
    assert len(run(pairs, tmp_path, store=str(store), embedding_duplicates=1.0)[0]) == 24


def test_the_store_decides_which_duplicate_stays(tmp_path: Path) -> None:
    data = encode(blobs(1))
    pairs = write_pairs(tmp_path / "pairs", {key: (data, key) for key in ("a", "b", "c")})
    store = write_store(tmp_path / "store", pairs, {key: np.ones(4) for key in "abc"}, {"a": 0.1, "b": 0.3, "c": 0.2})
    kept, steps = run(pairs, tmp_path, store=str(store), exact=True)
    assert kept == {"b"}
    assert steps["exact duplicates"]["examples"][0]["why"] == "highest similarity, 0.300 over 0.200"


def test_the_best_caption_counts_when_asked(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs", {key: (encode(blobs(n)), key) for n, key in enumerate("abc")})
    vectors = {"a": np.array([1.0, 0, 0]), "b": np.array([0, 1.0, 0]), "c": np.array([0, 0, 1.0])}  # caption 0 lies along x, caption 1 along y
    store = write_store(tmp_path / "store", pairs, vectors, {"a": 1.0, "b": 0.0, "c": 0.0})
    assert run(pairs, tmp_path, store=str(store), min_similarity=0.5)[0] == {"a"}
    assert run(pairs, tmp_path, store=str(store), min_similarity=0.5, similarity_of="best")[0] == {"a", "b"}


def test_values_that_are_not_finite_and_pairs_without_a_row_are_dropped(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs", {key: (encode(blobs(n)), key) for n, key in enumerate("abcd")})
    store = write_store(tmp_path / "store", pairs, {key: np.ones(4) for key in "abd"}, {"a": 0.1, "b": float("nan"), "d": 0.0})
    for settings in ({"min_similarity": -1.0}, {"keep_fraction": 1.0}):
        kept, steps = run(pairs, tmp_path, store=str(store), **settings)
        assert kept == {"a", "d"}
        assert steps["not in the store"]["dropped_keys"] == ["c"]
        assert steps["similarity"]["why"] == {"not finite": 1}


def test_lists_are_made_from_lists(judged: tuple[Path, Path, dict[str, float]], tmp_path: Path) -> None:
    pairs, store, _ = judged
    first = run(pairs, tmp_path, store=str(store), embedding_duplicates=0.96)[0]
    (tmp_path / "out.keep").rename(tmp_path / "first.keep")
    then, steps = run(pairs, tmp_path, store=str(store), keep_fraction=0.5, within=str(tmp_path / "first.keep"))
    assert (len(first), len(then), steps["former list"]["dropped"]) == (12, 6, 12)
    assert then == run(pairs, tmp_path, store=str(store), embedding_duplicates=0.96, keep_fraction=0.5)[0]
    write_keep_list(tmp_path / "other.keep", ["k00", "elsewhere"], {})
    refused(PairsError, "made for other pairs: 1 of its 2 keys", tmp_path, pairs=str(pairs), exact=True, within=str(tmp_path / "other.keep"))
    (tmp_path / "other.keep").write_bytes(b"garbage")
    refused(PairsError, "must begin with", tmp_path, pairs=str(pairs), exact=True, within=str(tmp_path / "other.keep"))


def test_nothing_is_rewritten(judged: tuple[Path, Path, dict[str, float]], tmp_path: Path) -> None:
    pairs, store, _ = judged
    before = {path: path.read_bytes() for folder in (pairs, store) for path in folder.rglob("*") if path.is_file()}
    run(pairs, tmp_path, store=str(store), exact=True, near=True, embedding_duplicates=0.96, keep_fraction=0.5)
    assert {path: path.read_bytes() for folder in (pairs, store) for path in folder.rglob("*") if path.is_file()} == before


def test_the_header_says_how_it_was_made(judged: tuple[Path, Path, dict[str, float]], tmp_path: Path) -> None:
    pairs, store, _ = judged
    run(pairs, tmp_path, store=str(store), keep_fraction=0.5)
    first = (tmp_path / "out.keep").read_bytes()
    facts = read_keep_list(tmp_path / "out.keep").facts
    assert facts["settings"]["keep_fraction"] == 0.5
    assert set(facts["inputs"]) == {"pairs", "store"}
    assert (facts["pairs_in"], facts["pairs_kept"], facts["dropped"]) == (24, 12, {"similarity": 12})
    assert str(tmp_path) not in first.decode()
    pairs.rename(tmp_path / "elsewhere")
    run(tmp_path / "elsewhere", tmp_path, store=str(store), keep_fraction=0.5)
    assert (tmp_path / "out.keep").read_bytes() == first


# ---------------------------------------------------------------- bad input


def refused(kind: type[ClipError], expected: str, tmp_path: Path, **settings: Any) -> None:
    out = settings.pop("out", str(tmp_path / "none.keep"))
    with pytest.raises(kind, match=expected) as caught:
        curate(CurateConfig(out=out, **settings))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "none.keep").exists()
    assert not (tmp_path / "none.keep.json").exists()


def test_a_store_of_other_pairs(judged: tuple[Path, Path, dict[str, float]], tmp_path: Path) -> None:
    _, store, _ = judged
    other = write_pairs(tmp_path / "other", {"k00": (encode(blobs(1)), "x"), "new": (encode(blobs(2)), "y")})
    refused(StoreError, "does not belong to these pairs: 23 of its 24 keys, the first 'k02', are not among them", tmp_path, pairs=str(other), store=str(store), keep_fraction=0.5)
    changed = write_pairs(tmp_path / "changed", {f"k{n:02}": (encode(blobs(50 + n)), "x") for n in range(24)})
    refused(StoreError, "another version of the shard '00000'", tmp_path, pairs=str(changed), store=str(store), keep_fraction=0.5)


def test_pictures_may_have_gone_since(judged: tuple[Path, Path, dict[str, float]], tmp_path: Path) -> None:
    pairs, store, similarity = judged
    (pairs / "00001.tar").rename(tmp_path / "gone.tar")
    refused(StoreError, "12 of its 24 keys", tmp_path, pairs=str(pairs), store=str(store), keep_fraction=0.5)
    samples = {f"k{n:02}": (encode(blobs(n)), f"thing {n}") for n in range(1, 21, 2)}
    write_pairs(tmp_path / "rest", samples, shards=1)
    (tmp_path / "rest/00000.tar").rename(pairs / "rest.tar")
    kept, steps = run(pairs, tmp_path, store=str(store), min_similarity=0.0)
    assert len(kept) == 22
    assert "not in the store" not in steps


def test_samples_that_cannot_be_used_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = write_pairs(tmp_path / "p", {"a": (encode(blobs(1)), "x"), "b": (encode(blobs(2)), "y")})
    write_pairs(tmp_path / "q", {"a": (encode(blobs(3)), "z")}, shards=1)
    (tmp_path / "q/00000.tar").rename(pairs / "more.tar")  # its key is in another shard already
    assert cli.main(["curate", str(pairs), str(tmp_path / "out.keep"), "--exact"]) == 0
    assert capsys.readouterr().out.startswith("1 samples of the shards cannot be used at all; the first: the key 'a' is in")
    report = json.loads((tmp_path / "out.keep.json").read_text())
    assert (report["pairs_in"], report["unusable_samples"], report["unusable"][0]["shard"]) == (2, 1, "more")


def test_training_takes_the_list(tmp_path: Path) -> None:
    pairs, store = make_pairs(tmp_path / "pairs"), make_store(tmp_path / "store", tmp_path / "pairs")
    kept, _ = run(pairs, tmp_path, near=True, near_distance=20, near_colour=60)
    assert 2 <= len(kept) < 48
    build_tokenizer(8192, tmp_path / "tokenizer.json")
    tokenizer = Tokenizer.open(tmp_path / "tokenizer.json", context_length=20, cleaning="clip", pad_id=0)
    opened, keep = open_store(store), read_keep_list(tmp_path / "out.keep")
    data = ReinforcedPairs(open_pairs(pairs), opened, PreprocessConfig(image_size=32), tokenizer, seed=0, keep=keep)
    seen = [opened.keys[row] for row in data.samples(0, 2 * len(kept)).rows]
    assert sorted(seen) == sorted([*kept, *kept])  # two epochs
    (tmp_path / "out.keep").write_bytes((tmp_path / "out.keep").read_bytes()[:-3])
    with pytest.raises(PairsError, match="cut off"):
        train(TrainConfig(pairs=str(pairs), store=str(store), out=str(tmp_path / "ckpt"), keep=str(tmp_path / "out.keep")))


def test_a_store_without_similarity(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs", {key: (encode(blobs(n)), key) for n, key in enumerate("ab")})
    store = write_store(tmp_path / "store", pairs, {"a": np.array([1.0, 0.1]), "b": np.array([0.1, 1.0])}, None)
    refused(StoreError, "no column 'similarity'", tmp_path, pairs=str(pairs), store=str(store), min_similarity=0.1)
    assert run(pairs, tmp_path, store=str(store), embedding_duplicates=0.96)[0] == {"a", "b"}
    assert run(pairs, tmp_path, store=str(store), keep_fraction=0.5, similarity_of="best")[0] == {"a"}


def test_everything_dropped(judged: tuple[Path, Path, dict[str, float]], tmp_path: Path) -> None:
    pairs, store, _ = judged
    refused(PairsError, r"every one of the 24 pairs was dropped \(similarity 24\)", tmp_path, pairs=str(pairs), store=str(store), min_similarity=0.99)
    refused(PairsError, r"every one of the 24 pairs was dropped \(caption length 24\)", tmp_path, pairs=str(pairs), min_caption_words=9, exact=True, near=True)


def test_outputs_that_cannot_be(judged: tuple[Path, Path, dict[str, float]], tmp_path: Path) -> None:
    pairs, store, _ = judged
    refused(PairsError, "it is a folder", tmp_path, pairs=str(pairs), out=str(tmp_path), exact=True)
    refused(PairsError, "there is no folder", tmp_path, pairs=str(pairs), out=str(tmp_path / "no" / "x"), exact=True)
    refused(PairsError, "does not exist", tmp_path, pairs=str(tmp_path / "nowhere"), exact=True)
    refused(StoreError, "not a finished store", tmp_path, pairs=str(pairs), store=str(pairs), keep_fraction=0.5)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "no rule was chosen"),
        ({"near_distance": 3}, "no rule was chosen"),
        ({"store": "s", "min_similarity": 0.1, "keep_fraction": 0.5}, "give one of them"),
        ({"keep_fraction": 0.5}, "give --store"),
        ({"embedding_duplicates": 0.9}, "give --store"),
        ({"store": "s", "keep_fraction": 0.0}, "keeps nothing"),
        ({"store": "s", "keep_fraction": 1.2}, "--keep-fraction is 1.2, expected 0 to 1"),
        ({"store": "s", "min_similarity": float("nan")}, "--min-similarity is nan"),
        ({"near": True, "near_distance": 32}, "--near-distance is 32, expected 0 to 31"),
        ({"near": True, "near_colour": -1}, "--near-colour is -1"),
        ({"exact": True, "workers": 0}, "--workers is 0"),
        ({"max_aspect": 0.5}, "--max-aspect is 0.5"),
    ],
)
def test_settings_that_contradict(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(RecipeError, match=expected):
        CurateConfig(pairs="p", out="o", **settings)


def test_the_command(judged: tuple[Path, Path, dict[str, float]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs, store, _ = judged
    out = str(tmp_path / "cli.keep")
    assert cli.main(["curate", str(pairs), out, "--store", str(store), "--exact", "--near", "--embedding-duplicates", "0.96", "--keep-fraction", "0.7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[:-1]] == ["unreadable", "exact duplicates", "near duplicates", "embedding duplicates", "similarity"]
    assert lines[-1].startswith(f"{out}: keeps 9 of 24 pairs")
    assert cli.main(["curate", str(pairs), out, "--exact", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"out": out, "pairs_in": 24, "pairs_kept": 24, "dropped": {"unreadable": 0, "exact duplicates": 0}}
    assert cli.main(["curate", str(pairs), out, "--keep-fraction", "0.5"]) == 1
    assert capsys.readouterr().err.startswith("error: --keep-fraction reads what teachers said of the pairs; give --store")
