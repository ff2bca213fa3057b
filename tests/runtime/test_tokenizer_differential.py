"""Many odd texts against open_clip's tokenizer, and the word cache against the Rust model alone."""

from __future__ import annotations

import functools
import importlib.util
import json
import pickle
import random
import threading
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.odd_texts import SHAPES, odd_texts
from runtime.byte_pairs import SPLIT, pieces
from runtime.cleaning import clean_text
from runtime.tokenizer import Tokenizer, build_clip_tokenizer
from runtime.word_cache import WordCache

SPEC = importlib.util.find_spec("open_clip")
MERGES = Path(SPEC.origin).parent / "bpe_simple_vocab_16e6.txt.gz" if SPEC and SPEC.origin else Path("missing")
EVERY = [chr(n) for n in range(0x110000) if not 0xD800 <= n < 0xE000]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("vocabularies")
    return {size: build_clip_tokenizer(MERGES, size, folder / f"{size}.json") for size in (514, 2048, 49408)}


@pytest.fixture(scope="module")
def theirs() -> Any:
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    # Rows of two lengths are asked of each text; it is cleaned and spelled once.
    tokenizer.encode = functools.lru_cache(maxsize=4096)(tokenizer.encode)
    return tokenizer


def rust_runs(kind: str, text: str) -> set[str]:
    """The runs of a class of characters in a text, as the Rust side finds them."""
    from tokenizers import Regex, pre_tokenizers

    return {run for run, _ in pre_tokenizers.Split(Regex(f"[{kind}]+"), behavior="removed", invert=True).pre_tokenize_str(text)}


def their_runs(kind: str, text: str) -> set[str]:
    """The same, as the matcher of open_clip finds them."""
    import regex

    return set(regex.findall(f"[{kind}]+", text))


@pytest.fixture(scope="module")
def newer() -> frozenset[str]:
    """Characters of which not all matchers, the Rust side's, open_clip's and Python's own, know that they are letters or numbers."""
    found: set[str] = set()
    for start in range(0, len(EVERY), 4096):  # the Rust side takes three times as long for all of them at once
        text = "".join(EVERY[start : start + 4096])
        for kind in (r"\p{L}", r"\p{N}", r"\s"):
            ours, theirs = rust_runs(kind, text), their_runs(kind, text)
            found |= set("".join(ours - theirs)) ^ set("".join(theirs - ours))
            known = {c for c in text if kind[3:4] == unicodedata.category(c)[0]}
            found |= set("".join(ours)) ^ known if kind != r"\s" else set()
    return frozenset(found)


def differences(ours: Tokenizer, theirs: Any, texts: list[str]) -> list[str]:
    """The texts whose padded rows differ."""
    expected = theirs(texts, ours.context_length).numpy()
    found = ours(texts)
    assert found.shape == expected.shape
    assert found.dtype == np.int32
    return [text for text, wrong in zip(texts, (found != expected).any(axis=1), strict=True) if wrong]


def count_differences(files: dict[int, Path], theirs: Any, newer: frozenset[str], count: int, seed: int, short: int) -> None:
    """`count` texts in rows of 77, the first `short` of them in rows of 16, too.

    A text that differs does not count, neither way, if it holds a newer character once it is cleaned; another one takes its place.
    """
    wrong: list[tuple[int, str]] = []
    seen, excused = 0, 0
    rows = {length: Tokenizer.open(files[49408], length) for length in (77, 16)}
    while seen < count:
        texts = odd_texts(min(1000, count - seen), seed + seen + excused)
        differing = {(length, text) for length, ours in rows.items() if length == 77 or seen < short for text in differences(ours, theirs, texts)}
        known = {(length, text) for length, text in differing if newer.isdisjoint(clean_text(text))}
        wrong += sorted(known)
        fresh = {text for _, text in differing - known}
        excused += len(fresh)
        seen += sum(text not in fresh for text in texts)
    assert not wrong, f"{len(wrong)} of {count} texts differ, such as {[(length, ascii(text)[:300]) for length, text in wrong[:5]]}"
    assert seen == count
    assert excused < count * 0.02


def test_ten_thousand_odd_texts_equal_open_clip(files: dict[int, Path], theirs: Any, newer: frozenset[str]) -> None:
    count_differences(files, theirs, newer, 10_000, seed=20_000, short=2_000)


@pytest.mark.slow
def test_a_hundred_thousand_odd_texts_equal_open_clip(files: dict[int, Path], theirs: Any, newer: frozenset[str]) -> None:
    count_differences(files, theirs, newer, 100_000, seed=0, short=100_000)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(texts=st.lists(st.text(max_size=40), min_size=20, max_size=30))
def test_texts_of_hypothesis_equal_open_clip(files: dict[int, Path], theirs: Any, newer: frozenset[str], texts: list[str]) -> None:
    texts = [text for text in texts if newer.isdisjoint(clean_text(text))]
    assert differences(shared(files[49408], 16), theirs, texts) == []


@functools.cache
def shared(path: Path, length: int) -> Tokenizer:
    return Tokenizer.open(path, length)


def test_the_matchers_differ_only_in_characters_that_one_does_not_know(newer: frozenset[str]) -> None:
    text = "".join(sorted(newer))
    assert newer == set("".join(rust_runs(r"\p{Cn}", text) | their_runs(r"\p{Cn}", text))) | {c for c in newer if unicodedata.category(c) == "Cn"}
    assert max(map(ord, newer), default=0) < 0x40000
    assert not [c for c in newer if c < "\u0250"]


def test_the_generator_covers_its_shapes_and_repeats_itself() -> None:
    texts = odd_texts(3000, seed=5)
    assert texts == odd_texts(3000, seed=5)
    assert texts != odd_texts(3000, seed=6)
    for shape in SHAPES:
        assert len(set(odd_texts(40, 0, (shape,)))) > 15
    joined = "".join(texts)
    for piece in ("\u200d", "\U0001f3fd", "&amp;amp;", "<start_of_text>", "<End_Of_Text>", "\x00", "\x1b[", "\u3000", "'ſ", "Ã", "\ufffd", "漢", "&#x"):
        assert piece in joined
    assert "" in texts
    assert max(map(len, texts)) > 900


def by_rust(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer by the package `tokenizers`, a whole text at a time."""
    return Tokenizer.by_package(tokenizer._data, tokenizer.path, tokenizer.context_length, tokenizer.cleaning, tokenizer.pad_id)


@pytest.mark.parametrize("size", [514, 2048, 49408])
@pytest.mark.parametrize(("length", "pad_id"), [(77, 0), (16, 7), (3, 0), (2, 0)])
def test_words_equal_whole_texts(files: dict[int, Path], newer: frozenset[str], size: int, length: int, pad_id: int) -> None:
    tokenizer = Tokenizer.open(files[size], length, pad_id=pad_id)
    assert tokenizer._words is not None
    texts = [text for text in odd_texts(700, seed=size + length) if newer.isdisjoint(clean_text(text))]
    assert len(texts) > 650
    np.testing.assert_array_equal(tokenizer(texts), by_rust(tokenizer)(texts))


def test_every_character_equals_whole_texts(files: dict[int, Path], newer: frozenset[str]) -> None:
    # One word a character, each with a token at least; nothing is cleaned here, so that all of them arrive.
    tokenizer = Tokenizer.open(files[514])
    words = [c for c in EVERY if not c.isspace()]
    rust = by_rust(tokenizer)
    split = rust._tokenizer.pre_tokenizer
    for start in range(0, len(words), 65_536):
        some = words[start : start + 65_536]
        assert len(split.pre_tokenize_str(" ".join(some))) == len(some)
    some = [word for word in (*words[:0x600], *random.Random(0).sample(words, 4000)) if word not in newer]
    rust._tokenizer.no_truncation()
    rust._tokenizer.no_padding()
    cache, whole = tokenizer._words, rust._tokenizer.encode(" ".join(some), add_special_tokens=False).ids
    assert cache is not None
    assert b"".join(cache[word] for word in some) == np.array(whole, np.int32).tobytes()


def test_a_piece_stays_whole_when_it_is_cut_again(newer: frozenset[str]) -> None:
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(SPLIT), behavior="removed", invert=True)
    for text in odd_texts(2000, seed=3):
        for word in clean_text(text).split():
            parts = pieces(word)
            assert "".join(parts) == word
            assert [pieces(piece) for piece in parts] == [[piece] for piece in parts]
            # What is written here and what the Rust side does are one and the same.
            if newer.isdisjoint(word):
                assert parts == [piece for piece, _ in split.pre_tokenize_str(word)]


def test_rows_do_not_depend_on_what_was_asked_before(files: dict[int, Path]) -> None:
    texts = odd_texts(700, seed=8)
    expected = Tokenizer.open(files[2048], 40)(texts)
    for words, units in ((1, 10**6), (7, 10**6), (100, 10**6), (10**6, 500), (65_536, 10**6)):
        tokenizer = Tokenizer.open(files[2048], 40)
        cache = tokenizer._words
        assert cache is not None
        cache.words, cache.units = words, units
        order = np.random.default_rng(words).permutation(len(texts))
        np.testing.assert_array_equal(tokenizer([texts[n] for n in order]), expected[order])
        np.testing.assert_array_equal(tokenizer(texts), expected)
        assert len(cache) <= words
        longest = max(len(word) + len(ids) for word, ids in cache.items())
        assert sum(len(word) + len(ids) for word, ids in cache.items()) <= units + longest


def test_the_cache_is_bounded(files: dict[int, Path]) -> None:
    tokenizer = Tokenizer.open(files[514], 16)
    cache = tokenizer._words
    assert cache is not None
    tokenizer(["x" * 100_000, "漢" * 50_000])
    assert len(cache) == 0
    for start in range(0, 90_000, 10_000):
        tokenizer([f"number{n}" for n in range(start, start + 10_000)])
        assert len(cache) <= 65_536
    assert len(cache) > 5_000


def test_the_cache_does_not_travel(files: dict[int, Path]) -> None:
    tokenizer = Tokenizer.open(files[514], 16)
    empty = len(pickle.dumps(tokenizer))
    tokenizer(odd_texts(500))
    assert len(pickle.dumps(tokenizer)) == empty
    assert pickle.loads(pickle.dumps(tokenizer))._words == {}


def test_threads_may_share_a_tokenizer(files: dict[int, Path]) -> None:
    texts = odd_texts(600, seed=4)
    expected = Tokenizer.open(files[2048], 20)(texts)
    tokenizer = Tokenizer.open(files[2048], 20)
    assert tokenizer._words is not None
    tokenizer._words.words = 50
    wrong: list[int] = []

    def work(seed: int) -> None:
        order = np.random.default_rng(seed).permutation(len(texts))
        if (tokenizer([texts[n] for n in order]) != expected[order]).any():
            wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_rows_may_be_written_to(files: dict[int, Path]) -> None:
    row = Tokenizer.open(files[514], 16)(["a cat"])
    row[0, 0] = 3
    assert row[0, 0] == 3


def test_a_file_that_spells_over_spaces_has_no_word_cache(files: dict[int, Path], tmp_path: Path) -> None:
    facts = json.loads(files[514].read_text(encoding="utf-8"))
    added = {"id": 514, "content": "new york", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    other = facts["pre_tokenizer"]["pretokenizers"]
    for name, changes in {
        "added": {"added_tokens": [*facts["added_tokens"], added]},
        "random": {"model": {**facts["model"], "dropout": 0.5}},
        "split": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{**other[0], "pattern": {"Regex": r".+"}}, other[1]]}},
        "bytes": {"pre_tokenizer": other[1]},
        "bare": {"pre_tokenizer": None},
        "ends": {"post_processor": None},
    }.items():
        (tmp_path / name).write_text(json.dumps({**facts, **changes}), encoding="utf-8")
        tokenizer = Tokenizer.open(tmp_path / name, 16)
        assert tokenizer._words is None, name
        assert tokenizer(["in new york", "a"]).shape == (2, 16)
    assert 514 in Tokenizer.open(tmp_path / "added", 16)(["in new york"])


def test_other_cleanings_have_no_word_cache(files: dict[int, Path]) -> None:
    tokenizer = Tokenizer.open(files[514], 16, cleaning="none")
    assert tokenizer._words is None
    np.testing.assert_array_equal(tokenizer(["a cat"]), Tokenizer.open(files[514], 16)(["a cat"]))


def test_the_cache_alone(files: dict[int, Path]) -> None:
    tokenizer = Tokenizer.open(files[514])
    assert tokenizer._pairs is not None
    cache = WordCache(tokenizer._pairs.spell, {"<end_of_text>": 513}, {n: "b" if n == 0x21 else chr(n) for n in range(256)})
    assert cache["!"] == cache["b"] == np.array([65 + 256], np.int32).tobytes()
    assert cache["<end_of_text>"] == np.array([513], np.int32).tobytes()
    assert cache[""] == b""
    assert SPLIT.startswith("<[sſ]tart_of_text>")
