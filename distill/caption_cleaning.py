"""From what a captioner wrote to captions: white space, first sentence, doubles."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from distill.caption_files import MAX_CHARACTERS
from distill.captioners import CaptionerFacts, Draft
from distill.captions import Caption

_SENTENCE_END = re.compile(r"(?<=[.!?。!?])(?:\s+|$)|(?<=[。!?])")
_SHORTENED = re.compile(r"(?:^|\s)(?:[A-Z]|[Mm]rs?|[Dd]r|[Ss]t|[Nn]o|vs|etc|e\.g|i\.e|approx)\.$")
"""A full stop after these ends no sentence."""


def first_sentence(text: str) -> str:
    """The text up to the end of its first sentence, the mark included.

    >>> first_sentence("A dog. It runs."), first_sentence("Dr. No, 3.5 m tall! Really?"), first_sentence("no end")
    ('A dog.', 'Dr. No, 3.5 m tall!', 'no end')
    """
    for match in _SENTENCE_END.finditer(text):
        if not _SHORTENED.search(text[: match.start()]):
            return text[: match.start()]
    return text


def cleaned(
    drafts: Sequence[Draft], facts: CaptionerFacts, *, first_sentence: bool, language: str, own: str | None
) -> tuple[list[Caption], Counter[str]]:
    """Captions as they are stored, and how many were dropped as empty, duplicate or too long.

    A caption that differs from an earlier one in letter case alone is its duplicate; one that only repeats the text it was made from
    (`own`) is a duplicate too. The order of the drafts stays.
    """
    seen = {_folded(own)} if own is not None else set()
    made: list[Caption] = []
    dropped: Counter[str] = Counter()
    for draft in drafts:
        text = _printable(draft.text)
        cut = _first(text) if first_sentence else text
        if not cut:
            dropped["empty"] += 1
        elif len(cut) > MAX_CHARACTERS:
            dropped["too long"] += 1
        elif _folded(cut) in seen:
            dropped["duplicate"] += 1
        else:
            seen.add(_folded(cut))
            source = f"{facts.name} {draft.note}".strip()
            made.append(Caption(
                text=cut, type=facts.type, language=language, source=source, parent=-1 if facts.reads == "picture" else 0, sentence=0 if first_sentence and cut != text else -1
            ))  # fmt: skip
    return made, dropped


_first = first_sentence


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()


def _printable(text: str) -> str:
    """White space collapsed, control characters and halves of surrogate pairs left out: a model without training writes such."""
    if not text.isascii() or not text.isprintable():
        text = "".join(" " if character.isspace() else character for character in text if character.isspace() or unicodedata.category(character) not in ("Cc", "Cs", "Co", "Cn"))
    return " ".join(text.split())
