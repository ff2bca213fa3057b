"""Captions from elsewhere enter a store beside the pairs' own: what they are called, whose they are, and pairs that have no other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distill.captions import Caption
from distill.reinforce import reinforce
from distill.reinforce_captions import CaptionPlan, caption_facts, captions_for, given_captions
from distill.store import open_store
from runtime.errors import ClipError, PairsError
from runtime.files import file_sha256
from runtime.pairs import open_pairs, write_shard
from tests.distill import tiny_teachers
from tests.distill.test_reinforce import config, part_hashes, picture


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MCLIP_PROGRESS", "0")


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Two shards; b has no caption of its own, c neither one nor a given one."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    write_shard(folder / "s0.tar", [("a", {"png": picture(1), "txt": b"own  words"}), ("b", {"png": picture(2)}), ("c", {"png": picture(3)})])
    write_shard(folder / "s1.tar", [("d", {"png": picture(4), "txt": b"alone"}), ("e", {"png": picture(5), "txt": b"last"})])
    return folder


def given(text: str, **more: object) -> dict:
    return {"text": text, **more}


LINES = {
    "s0": [
        {"key": "a", "captions": [
            given("seen a", source="looker"), given("two of seen a", type="rewritten", parent=1), given("own, told anew", type="rewritten", parent=0),
        ]},
        {"key": "b", "captions": [
            given("seen b", source="looker", language="de"), given("of b's own", type="rewritten", parent=0), given("of seen b", type="fused", parent=1),
        ]},
    ],
    "s1": [{"key": "e", "captions": ["plain words"]}, {"key": "stranger", "captions": ["nobody's"]}],
}  # fmt: skip


def one_file(folder: Path) -> Path:
    path = folder / "captions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for lines in LINES.values() for line in lines))
    return path


def a_folder(folder: Path) -> Path:
    """As `mclip caption` leaves it."""
    out = folder / "captions"
    out.mkdir()
    for shard, lines in LINES.items():
        (out / f"{shard}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = {f"{shard}.jsonl": {"sha256": file_sha256(out / f"{shard}.jsonl")} for shard in LINES}
    (out / "receipt.json").write_text(json.dumps({"kind": "captions", "captioner": {"name": "looker", "licence": "MIT", "sha256": "00"}, "files": files}))
    return out


@pytest.mark.parametrize("make", [one_file, a_folder])
def test_given_captions_stand_behind_the_pairs_own(pairs: Path, tmp_path: Path, make) -> None:
    path = make(tmp_path)
    index = reinforce(config(pairs, tmp_path / "store", workers=0, templates=("photo",), captions=str(path)))
    store = open_store(tmp_path / "store", verify=True)
    assert store.keys == ["a", "b", "d", "e"]
    assert index["coverage"] == {"pairs": 5, "rows": 4, "skipped": 1}
    assert index["skipped"] == [{"key": "c", "shard": "s0", "reason": "sample 'c' of s0.tar: it has no caption (c.txt), and none is given for it; add one, or give --captions"}]
    assert [store.caption(0, j) for j in range(5)] == [
        Caption(text="own words"), Caption(text="a photo of own words", type="template", source="photo", parent=0), Caption(text="seen a", type="synthetic", source="looker"),
        Caption(text="two of seen a", type="rewritten", source="captions", parent=2), Caption(text="own, told anew", type="rewritten", source="captions", parent=0),
    ]  # fmt: skip
    assert [store.caption(1, j) for j in range(3)] == [
        Caption(text="seen b", type="synthetic", source="looker", language="de"), Caption(text="of b's own", type="rewritten", source="captions", parent=-1),
        Caption(text="of seen b", type="fused", source="captions", parent=0),
    ]  # fmt: skip
    assert store.caption_counts.tolist() == [5, 3, 2, 3]
    assert index["sources"] == ["pairs", "photo", "captions", "looker"]
    assert index["languages"] == ["en", "de"]
    assert index["captioner"] == index["layers"][0]["captioner"]
    assert index["captioner"]["captioner"] == ("looker" if make is a_folder else "captions.jsonl")
    assert (store.text_embeddings(1, [1], [2]) * tiny_teachers.blue().encode_text(["of seen b"])).sum() > 0.999
    reinforce(config(pairs, tmp_path / "part", workers=0, templates=("photo",), captions=str(path), texts="part"))
    assert part_hashes(tmp_path / "part") == part_hashes(tmp_path / "store")


def test_a_pair_without_any_caption_says_so(pairs: Path) -> None:
    opened = open_pairs(pairs)
    assert [caption.text for caption in captions_for(opened, 0, "s0", CaptionPlan(templates=("icon",)))] == ["own words", "own words, icon"]
    with pytest.raises(PairsError, match=r"sample 'b' of s0.tar: it has no caption \(b.txt\), and none is given"):
        captions_for(opened, 1, "s0", CaptionPlan())


def test_a_captions_folder_that_changed_is_refused(pairs: Path, tmp_path: Path) -> None:
    folder = a_folder(tmp_path)
    assert [caption.text for caption in given_captions(str(folder), "s1", "e", 1)] == ["plain words"]
    before = caption_facts(str(folder))["sha256"]
    other = tmp_path / "other"
    folder.rename(other)
    with (other / "s0.jsonl").open("a") as stream:
        stream.write('{"key": "z", "captions": ["new"]}\n')
    assert caption_facts(str(other))["sha256"] == before
    with pytest.raises(ClipError, match="has changed since it was written"):
        reinforce(config(pairs, tmp_path / "store", workers=0, captions=str(other)))
    assert not (tmp_path / "store/index.json").exists()
