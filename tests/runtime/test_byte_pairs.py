"""CLIP's vocabulary spelled without the package `tokenizers`: long pieces, files that lie, and a process that does not have the package."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.byte_pairs import BytePairs, read_byte_pairs
from runtime.errors import CheckpointError, MissingExtraError
from runtime.tokenizer import Tokenizer, build_clip_tokenizer
from tests.runtime import toy


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_clip_tokenizer(toy.merges(), 2048, tmp_path_factory.mktemp("pairs") / "tokenizer.json")


@pytest.fixture(scope="module")
def pairs(file: Path) -> BytePairs:
    found = read_byte_pairs(file.read_bytes())
    assert found is not None
    return found


def slowly(pairs: BytePairs, written: str) -> list[int]:
    """Byte-pair encoding as its definition has it: look at all neighbours, join the first merge of the list everywhere, begin again."""
    tokens = [*written[:-1], written[-1] + "</w>"]
    while True:
        ranked = [(pairs.ranks[f"{a} {b}"], a, b) for a, b in zip(tokens, tokens[1:], strict=False) if f"{a} {b}" in pairs.ranks]
        if not ranked:
            return [pairs.vocab[token] for token in tokens]
        _, left, right = min(ranked)
        joined: list[str] = []
        for token in tokens:
            if joined and joined[-1] == left and token == right:
                joined[-1] = left + right
            else:
                joined.append(token)
        tokens = joined


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(written=st.text(alphabet="abcdehinorst!Ġ", min_size=1, max_size=40))
def test_the_quick_way_joins_what_the_definition_joins(pairs: BytePairs, written: str) -> None:
    written = written.replace("Ġ", "e")
    assert pairs.spell(written) == slowly(pairs, written)


def test_a_piece_of_a_million_letters_takes_seconds_at_most(pairs: BytePairs) -> None:
    start = time.perf_counter()
    ids = pairs.spell("the" * 333_333)
    assert time.perf_counter() - start < 20
    assert len(ids) > 300_000


def test_files_of_another_form_are_left_to_the_package(file: Path) -> None:
    whole = json.loads(file.read_text(encoding="utf-8"))

    def changed(**model: Any) -> bytes:
        return json.dumps({**whole, "model": {**whole["model"], **model}}).encode()

    assert read_byte_pairs(json.dumps(whole).encode()) is not None
    vocab = whole["model"]["vocab"]
    for data in (
        b"", b"{", b"[]", b"null", b'{"model": 3}', b"\xff", b"[" * 100_000,
        changed(type="WordPiece"), changed(dropout=0.1), changed(end_of_word_suffix=None), changed(byte_fallback=True), changed(ignore_merges=True),
        changed(merges=[["a"]]), changed(merges=[["never", "there"]]), changed(merges=7), changed(vocab={name: id for name, id in vocab.items() if name != "a"}),
        changed(vocab={**vocab, "a": 5_000_000}), changed(vocab={**vocab, "a": "b"}), changed(vocab=list(vocab)),
        json.dumps({**whole, "added_tokens": []}).encode(), json.dumps({**whole, "post_processor": None}).encode(), json.dumps({**whole, "pre_tokenizer": None}).encode(),
    ):  # fmt: skip
        assert read_byte_pairs(data) is None


def test_merges_in_either_notation(file: Path, pairs: BytePairs) -> None:
    whole = json.loads(file.read_text(encoding="utf-8"))
    whole["model"]["merges"] = [" ".join(pair) for pair in whole["model"]["merges"]]
    assert read_byte_pairs(json.dumps(whole).encode()) == pairs


def test_a_damaged_file_is_refused(file: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="not a tokenizer file"):
        Tokenizer.open(tmp_path / "tokenizer.json", 16)


WITHOUT = """
import sys
sys.modules["tokenizers"] = None
import runtime
clip = runtime.load(sys.argv[1], measure=False)
print(clip.tokenizer(["a red heart", "naïve café", "漢字"]).tolist())
"""


def test_a_bundle_works_without_the_package(toy_bundle: Path) -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT, str(toy_bundle)], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == runtime_tokens(toy_bundle)


def runtime_tokens(bundle: Path) -> list[list[int]]:
    import runtime

    tokenizer = runtime.load(bundle, measure=False).tokenizer
    package = Tokenizer.by_package(tokenizer._data, tokenizer.path, tokenizer.context_length, "clip", 0)
    rows: np.ndarray = package(["a red heart", "naïve café", "漢字"])
    return rows.tolist()  # type: ignore[no-any-return]


def test_another_tokenizer_names_the_package_that_it_needs(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingExtraError, match=r"mobileclip-edge\[tokenizers\]"):
        Tokenizer.open(file, 16, cleaning="none")
