"""What CLIP does to a text before it is split: repair, unescape, one space, lower case; ftfy only where it could matter.

ftfy's `fix_text` costs ten times the rest of the tokenizer, and almost every real text comes out of it as it went in. Three
cases are told apart, and the first two are proved (in `tests/runtime/test_cleaning.py`, against the tables of the ftfy that is
installed, over all code points) to give what ftfy and two rounds of `html.unescape` would give:

1. Printable ASCII without "&".
2. Text without *trouble*, as `_patterns` describes it, that is in Unicode's composed form (NFC) once its curly quotes are
   straight. What else ftfy changes there is one white space into another, and white space is joined afterwards anyway.
3. Everything else: ftfy and html run, imported when first needed (0.1 s).

Why a list of characters is enough for case 2. `fix_text` repeats eleven steps, line by line, until nothing changes. Nine of
them look at single characters or at "&" and the escape character. NFC is asked of the text itself. There remains the repair of
mojibake, which does nothing unless ftfy's pattern of suspicious neighbours matches. Each of its alternatives needs a character
that is excluded here, or one of the *edgy* characters directly beside a second character outside ASCII; a text in which edgy
characters touch ASCII only, or the ends of the text, matches none of them, and neither do its lines.
"""

from __future__ import annotations

import re
from functools import cache

_CURLY = {**dict.fromkeys(map(ord, "\u02bc\u2018\u2019\u201a\u201b"), "'"), **dict.fromkeys(map(ord, "\u201c\u201d\u201e\u201f"), '"')}


def clean_text(text: str) -> str:
    """What CLIP does to a caption before splitting it: repair, unescape twice, one space, lower case.

    Equal to open_clip's `clean="lower"` for every string.
    """
    return " ".join((text if is_plain(text) else repair(text)).split()).lower()


def clean_words(text: str) -> list[str]:
    """`clean_text`, cut where open_clip's tokens end in any case: at spaces and at U+0345; no word is empty.

    U+0345, the Greek iota below a letter, is lost in open_clip: its pattern ignores case, and so takes the mark for a letter
    where it looks for other signs, and for a mark where it looks for letters. It is the only character that this happens to.
    """
    return text.lower().split() if is_plain(text) else clean_text(text).replace("\u0345", " ").split()


def is_plain(text: str) -> bool:
    """Whether a text is printable ASCII without "&"."""
    return text.isascii() and text.isprintable() and "&" not in text


def repair(text: str) -> str:
    """`html.unescape` twice after `ftfy.fix_text`, but for the kind of white space."""
    suspicious, trouble, curly = _patterns()
    if not suspicious.search(text) or not trouble.search(text):
        from unicodedata import is_normalized

        straight = text.translate(_CURLY) if curly.search(text) else text
        if is_normalized("NFC", straight):
            return straight
    import html

    import ftfy

    return html.unescape(html.unescape(ftfy.fix_text(text)))


@cache
def _patterns() -> tuple[re.Pattern[str], re.Pattern[str], re.Pattern[str]]:
    """(what needs a closer look, trouble, curly quotes); compiled when the first text needs them."""
    excluded = (
        "\x00-\x08\x0b\x0e-\x1f\x7f-\x9f"  # controls: removed, or the surest sign of mojibake
        "ÂÃÎÐØÙŒœƒЂ"  # mojibake even beside ASCII, or beside ordinary letters
        "ĲĳŉǄ-ǌǱ-ǳ\ufb00-\ufb06"  # ligatures that are taken apart
        "\u206a-\u206f\ufeff\uff00-\uffff"  # removed, or changed in width
        "\ud800-\udfff\ue000-\uf8ff"  # surrogates, private use
    )
    capitals = "".join(c for c in map(chr, range(0xC0, 0x180)) if c.isupper() and c not in excluded)
    edgy = (
        f"¡-¬®-³µ¶¸-¿×÷{capitals}ˆˇ\u02d8-\u02dd\u0384\u0385Ґ"  # signs of Latin-1, capitals, spacing accents
        "\u2018\u201a\u201c-\u201e\u2020-\u2022‰‹›\u2044\u20a0-\u20cf№™"  # quotes, daggers, money
        "\u2200-\u22ff⌐\u2500-\u259f◊"  # mathematics, boxes
    )
    near, beyond = f"[{edgy}]", r"[^\x00-\x7f]"
    # An entity's name or number begins with a letter or "#": any other "&" is one.
    trouble = rf"[{excluded}]|&(?=[#0-9A-Za-z])|(?<={beyond}){near}|{near}(?={beyond})"
    curly = "".join(map(chr, _CURLY))
    return re.compile(f"[&{excluded}{edgy}]"), re.compile(trouble), re.compile(f"[{curly}]")
