"""What `runtime.cleaning` skips is proved here against the tables of the ftfy that is installed, over all code points."""

from __future__ import annotations

import html
import html.entities
import re
import subprocess
import sys
import unicodedata
from collections.abc import Iterable
from typing import Any

import ftfy
import pytest
from ftfy import badness, chardata
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.odd_texts import SUSPECTS, odd_texts
from runtime.cleaning import _CURLY, _patterns, clean_text, clean_words, is_plain, repair

EVERY = [chr(n) for n in range(0x110000)]
SUSPICIOUS, TROUBLE, CURLY = _patterns()
ACCEPTED = frozenset(c for c in EVERY if not TROUBLE.search(c))
# An accepted character is edgy when it may stand beside ASCII but not beside another one from outside ASCII.
EDGY = frozenset(c for c in ACCEPTED if c > "\x7f" and TROUBLE.search("é" + c))
# The kinds of characters that a class of ftfy's pattern can meet in an accepted text: ASCII, calm, edgy.
KINDS = frozenset("ace")


def ftfys_way(text: str) -> str:
    """The cleaning of open_clip, written out."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()


def test_the_closer_look_misses_no_trouble() -> None:
    assert all(SUSPICIOUS.search(c) for c in EVERY if c not in ACCEPTED or c in EDGY)
    assert SUSPICIOUS.search("&")


def test_the_classes_are_neither_empty_nor_everything() -> None:
    assert {"a", " ", "\n", "é", "ß", "я", "漢", "가", "ا", "👍", "\u200d", "\ufe0f", "’", "…", "–", "\xa0"} <= ACCEPTED - EDGY
    assert {"É", "«", "»", "“", "”", "€", "½", "™", "•"} <= EDGY
    assert not {"\x1b", "\x85", "Ã", "Â", "ﬁ", "ｱ", "Œ", "\ud800", "\ufeff"} & ACCEPTED


def test_steps_that_look_at_single_characters() -> None:
    assert {chr(n) for n in chardata.LIGATURES} & ACCEPTED == set()
    assert {chr(n) for n in chardata.CONTROL_CHARS} & ACCEPTED == set()
    assert {chr(n) for n in chardata.WIDTH_MAP} & ACCEPTED == {"\u3000"}
    assert not {"\x1b", "\x85", *map(chr, range(0xD800, 0xE000))} & ACCEPTED
    for pattern, straight in ((chardata.SINGLE_QUOTE_RE, "'"), (chardata.DOUBLE_QUOTE_RE, '"')):
        assert {c for c in EVERY if pattern.search(c)} == {chr(n) for n, to in _CURLY.items() if to == straight}
    assert {c for c in EVERY if CURLY.search(c)} == {chr(n) for n in _CURLY}


def test_what_changes_into_white_space_is_white_space() -> None:
    for old, new in (("\r\n", "\n"), ("\r", "\n"), ("\u2028", "\n"), ("\u2029", "\n"), ("\u3000", " ")):
        assert old.isspace()
        assert ftfy.fix_text(f"a{old}b") == f"a{new}b"


def test_the_composed_form_does_not_hang_on_what_is_replaced() -> None:
    replaced = {*"\r\n \u2028\u2029\u3000'\"", *map(chr, _CURLY)}
    firsts = {chr(int(parts[0], 16)) for c in EVERY if (parts := unicodedata.decomposition(c).split()) and not parts[0].startswith("<")}
    assert not replaced & firsts
    assert all(unicodedata.combining(c) == 0 and unicodedata.is_normalized("NFC", c) for c in replaced)


def test_an_entity_begins_with_a_letter_or_a_number_sign() -> None:
    assert all(name[0].isascii() and name[0].isalpha() for name in html.entities.html5)
    assert all(entity[1].isascii() and entity[1].isalpha() for entity in chardata.HTML_ENTITIES)
    for c in set(EVERY[:0x250]) - {"#", "&", *"0123456789"}:
        if not (c.isascii() and c.isalpha()):
            text = f"&{c}lt;&{c}amp;lt &{c}#38; &"
            assert html.unescape(text) == text
            assert not chardata.HTML_ENTITY_RE.search(text)


def test_no_alternative_of_the_search_for_mojibake_fits_an_accepted_text() -> None:
    ways = list(expand(re._parser.parse(badness.BADNESS_RE.pattern, badness.BADNESS_RE.flags)))  # type: ignore[attr-defined]
    assert len(ways) > 30
    assert [way for way in ways if fits(way)] == []
    # The check itself can fail: with edgy characters free to stand anywhere, many alternatives fit.
    assert sum(all(way) for way in ways) > 10


def fits(way: tuple[frozenset[str], ...]) -> bool:
    """Whether characters of these kinds can follow one another where no edgy one touches another one from outside ASCII."""
    last = way[0]
    for kinds in way[1:]:
        last = frozenset(b for a in last for b in kinds if "a" in (a, b) or (a, b) == ("c", "c"))
    return bool(last)


def expand(sequence: Iterable[tuple[Any, Any]]) -> list[tuple[frozenset[str], ...]]:
    """Every way through a parsed pattern, as the kinds that each of its places can meet; a place that is not understood meets all."""
    ways: list[tuple[frozenset[str], ...]] = [()]
    for op, value in sequence:
        name = str(op)
        if name == "LITERAL":
            found = [(kinds_of([(op, value)]),)]
        elif name == "IN":
            found = [(kinds_of(value),)]
        elif name in ("ANY", "NOT_LITERAL"):
            found = [(KINDS,)]
        elif name == "AT":
            found = [()]
        elif name == "SUBPATTERN":
            found = expand(value[3])
        elif name == "BRANCH":
            found = [way for branch in value[1] for way in expand(branch)]
        else:
            low, high, inner = value
            assert (name, low, high) == ("MAX_REPEAT", 0, 1), "a new kind of place in ftfy's pattern: extend the proof"
            found = [(), *expand(inner)]
        ways = [way + more for way in ways for more in found]
    return ways


def kinds_of(items: list[tuple[Any, Any]]) -> frozenset[str]:
    found: set[str] = set()
    for op, value in items:
        if str(op) in ("NEGATE", "CATEGORY"):
            return KINDS
        first, last = (value, value) if str(op) == "LITERAL" else value
        found |= {"a" if n < 128 else "e" if chr(n) in EDGY else "c" for n in range(first, last + 1) if chr(n) in ACCEPTED}
    return frozenset(found)


def test_every_accepted_character_beside_ascii() -> None:
    composed = [c for c in EVERY[:0x3100] if c in ACCEPTED and c != "&" and unicodedata.is_normalized("NFC", c)]
    assert len(composed) > 10_000
    for start in range(0, len(composed), 64):
        text = " ".join(f"a{c} {c} 1{c}Z" for c in composed[start : start + 64])
        assert not TROUBLE.search(text)
        assert repair(text).split() == ftfy.fix_text(text).split()


def test_every_pair_of_plain_characters_needs_no_repair() -> None:
    plain = [c for c in EVERY[:128] if is_plain(c)]
    assert len(plain) == 94
    text = "".join(a + b for a in plain for b in plain)
    assert html.unescape(ftfy.fix_text(text)) == text


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(text=st.lists(st.sampled_from([*SUSPECTS, *"aZe &;é漢я’“\n\r\u2028\u0301\u3000👍", "&amp;", "& "]), max_size=16).map("".join))
def test_suspects_equal_ftfys_way(text: str) -> None:
    assert clean_text(text) == ftfys_way(text)


def test_odd_texts_equal_ftfys_way() -> None:
    texts = odd_texts(1500, seed=11)
    assert [text for text in texts if clean_text(text) != ftfys_way(text)] == []
    assert [text for text in texts if clean_words(text) != clean_text(text).replace("\u0345", " ").split()] == []
    # Both ways are taken: the test would be worth little otherwise.
    quick = sum(not TROUBLE.search(text) for text in texts)
    assert len(texts) * 0.2 < quick < len(texts) * 0.8


def test_one_character_is_passed_over_by_open_clips_pattern() -> None:
    import regex
    from open_clip.tokenizer import SimpleTokenizer

    sane = [c for c in EVERY if not (c.isspace() or "\ud800" <= c <= "\udfff")]
    pattern = SimpleTokenizer().pat
    assert regex.sub(pattern, "", " ".join(sane)).strip() == "\u0345"
    assert clean_words("Á\u0345b \u0345") == ["á", "b"]


def test_lower_case_makes_no_white_space() -> None:
    assert [c for c in EVERY if any(map(str.isspace, c.lower())) and not c.isspace()] == []


@pytest.mark.parametrize("text", ["a photo of a cat", "tab\\tand “quotes” & café, 5 €", "эмодзи 👍🏽 漢字"])
def test_harmless_text_imports_neither_ftfy_nor_html(text: str) -> None:
    code = f"import sys\nfrom runtime.cleaning import clean_text\nclean_text('{text}')\nprint(sorted({{'ftfy', 'html'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8", check=True)
    assert done.stdout.strip() == "[]"
