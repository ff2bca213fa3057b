"""Odd texts made by code: what a tokenizer meets where captions come from the web, and what only a test would write.

Tests compare tokenizers on them, `benchmarks.suites.tokenizer` times tokenizers on them; the same seed gives the same texts.
"""

from __future__ import annotations

import html.entities
from collections.abc import Callable, Sequence
from random import Random

SCRIPTS: dict[str, tuple[tuple[int, int], ...]] = {
    "latin": ((0x41, 0x5A), (0x61, 0x7A)),
    "latin, accented": ((0x61, 0x7A), (0xC0, 0x24F)),
    "phonetic": ((0x250, 0x2FF),),
    "greek": ((0x370, 0x3FF), (0x1F00, 0x1FFF)),
    "cyrillic": ((0x400, 0x52F),),
    "armenian": ((0x531, 0x58A),),
    "hebrew": ((0x591, 0x5F4),),
    "arabic": ((0x600, 0x6FF),),
    "devanagari": ((0x900, 0x97F),),
    "bengali": ((0x980, 0x9FE),),
    "tamil": ((0xB82, 0xBFA),),
    "thai": ((0xE01, 0xE5B),),
    "tibetan": ((0xF00, 0xFD4),),
    "georgian": ((0x10A0, 0x10FF),),
    "hangul": ((0xAC00, 0xD7A3), (0x1100, 0x11FF)),
    "ethiopic": ((0x1200, 0x137C),),
    "kana": ((0x3041, 0x30FF), (0x31F0, 0x31FF)),
    "han": ((0x4E00, 0x9FFF), (0x20000, 0x20100), (0xF900, 0xFAFF)),
    "mathematical": ((0x1D400, 0x1D7FF),),
    "gothic": ((0x10330, 0x1034A),),
}
BLANKS = "\t\n\v\f\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u180e\u2000\u2001\u2004\u2009\u200a\u200b\u2028\u2029\u202f\u205f\u2060\u3000\ufeff"
CONTROLS = (
    *map(chr, (*range(0x20), *range(0x7F, 0xA0))),
    *"\u200b\u200c\u200d\u200e\u202a\u202e\u206a\u206f\ufff9\ufffb\ufffc\ufffd\ufeff\xad",
    *("\x1b[31m", "\x1b[0m", "\x1b[", "\r\n"),
)
SPECIALS = ("<start_of_text>", "<end_of_text>", "<START_OF_TEXT>", "<End_Of_Text>", "<ſtart_of_text>", "<|endoftext|>", "&lt;end_of_text&gt;", "＜end_of_text＞")
ENDINGS = ("'s", "'S", "'t", "'T", "'re", "'Re", "'ve", "'m", "'ll", "'LL", "'d", "'D", "'ſ", "\u2019s", "\u2018S", "\u02bcll", "&#39;s", "&rsquo;ve", "''s", "'", "'x", "´s", "`s")
SIGNS = [chr(n) for first, last in ((0xA0, 0x17F), (0x2010, 0x2044), (0x20A0, 0x20BF), (0x2100, 0x2122), (0x2200, 0x2265), (0x2500, 0x25CA)) for n in range(first, last + 1)]
SUSPECTS = [*SIGNS, *"ƒˆˇ˘˙˚˛˜˝΄΅ΆΒΓΞΟβЂВГРСвГўґҐ\uf8ff\ufffdﬁﬂ"]
ENTITIES = [name for name in html.entities.html5 if len(name) < 12]
CHARSETS = ("latin-1", "cp1252", "cp1251", "cp1250", "cp1253", "cp1254", "cp1257", "mac_roman", "cp437", "iso-8859-2")
WORDS = (
    *("a", "the", "photo", "of", "cat", "dog", "on", "red", "house", "two", "people", "and", "with", "in", "at", "sky"),
    *("It", "DON", "NASA", "cafe", "3d", "iPhone", "no.1", "re-use", "and/or", "e.g.", "C++", "#tag", "@you", "x_y"),
)
FACES = [0x1F44D, 0x1F469, 0x1F468, 0x1F467, 0x1F466, 0x1F600, 0x1F9D1, 0x1F4BB, 0x2764, 0x260E, 0x2620, 0x1F3F4, 0x1F308, 0x2694, 0x26A7, 0x1FAF1, 0x25B6, 0x203C, 0x2122, 0xA9]


def plain(rng: Random) -> str:
    """Words as in a caption."""
    return " ".join(rng.choices(WORDS, k=rng.randint(1, 14)))


def ascii_noise(rng: Random) -> str:
    """Printable ASCII in any order."""
    return "".join(map(chr, rng.choices(range(32, 127), k=rng.randint(0, 60))))


def scripts(rng: Random) -> str:
    """Words of one script or several."""
    names = rng.choices(list(SCRIPTS), k=rng.choice((1, 1, 2, 4)))
    return " ".join(_word(rng, SCRIPTS[rng.choice(names)]) for _ in range(rng.randint(1, 8)))


def anything(rng: Random) -> str:
    """Code points from the whole of Unicode, surrogates and unassigned ones among them."""
    tops = (0x80, 0x100, 0x250, 0x3000, 0x10000, 0x20000, 0x110000)
    return "".join(chr(rng.randrange(rng.choice(tops))) for _ in range(rng.randint(0, 40)))


def emoji(rng: Random) -> str:
    """Emoji: joined, with skin tones, variation selectors, flags, keycaps, tags; whole and broken."""
    return "".join(_emoji(rng) + rng.choice(("", "", " ", " cat ")) for _ in range(rng.randint(1, 8)))


def entities(rng: Random) -> str:
    """HTML entities: named, numbered, nested, without their end, beyond Unicode; sometimes beside a "<"."""
    return "".join(_entity(rng) + rng.choice(("", " ", "a", "1", ";", "<b>", " & ", "&")) for _ in range(rng.randint(1, 8)))


def controls(rng: Random) -> str:
    """Words with control characters, terminal escapes and other invisible ones between and inside them."""
    return "".join(rng.choice((rng.choice(CONTROLS), rng.choice(WORDS), " ")) for _ in range(rng.randint(1, 20)))


def specials(rng: Random) -> str:
    """Literal special tokens, in any case, cut off, and with something before or behind."""
    out = []
    for _ in range(rng.randint(1, 6)):
        special = rng.choice(SPECIALS)
        if rng.random() < 0.3:
            special = special[: rng.randrange(len(special))]
        if rng.random() < 0.3:
            special = "".join(rng.choice((c.lower(), c.upper())) for c in special)
        out.append(rng.choice(("", "", "!", "<", "x", " ", "'", "é", "&")) + special + rng.choice(("", "", ">", "x", " ", "9", "'s")))
    return "".join(out)


def contractions(rng: Random) -> str:
    """Words with English endings, their quotes straight, curly or escaped."""
    return rng.choice((" ", " ", "")).join(rng.choice(WORDS) + rng.choice(ENDINGS) for _ in range(rng.randint(1, 10)))


def blanks(rng: Random) -> str:
    """Nothing, or white space of every kind, alone or between words."""
    words = rng.choices(("", "", "a", "Cat", "漢", "é", "&"), k=rng.randint(0, 8)) if rng.random() < 0.7 else [""]
    return "".join(word + "".join(rng.choices(BLANKS, k=rng.randint(0, 4))) for word in words)


def mojibake(rng: Random) -> str:
    """Text that was read in the wrong encoding, once or twice, as a whole or in part."""
    text = rng.choice((scripts, emoji, contractions, suspects))(rng)
    for _ in range(rng.choice((1, 1, 1, 2))):
        text = text.encode("utf-8", "replace").decode(rng.choice(CHARSETS), rng.choice(("replace", "ignore")))
    if rng.random() < 0.3:
        text = text.replace("\xa0", " ")
    return rng.choice(("", plain(rng) + " ", "Ünï ")) + text[:200]


def suspects(rng: Random) -> str:
    """The characters that a search for mojibake looks at, beside each other, beside ASCII and beside ordinary letters."""
    others = ("", " ", "a", "Z", "e", "\n", "é", "ß", "я", "漢", "\u0301", "’", "5")
    return "".join(rng.choice(SUSPECTS) + rng.choice(others) for _ in range(rng.randint(1, 12)))


def forms(rng: Random) -> str:
    """Full-width letters, ligatures, quotes, combining marks in any order, capitals with an unusual lower case."""
    pool = "ＬＯＵＤ　！ｱｶﾞ ﬂﬁﬃĲŉǆ“”„‘’‚‛—…éÅÅΩΩİIıſẞßΣςΑΣ\u0301\u0323\u0308\u0327가각"
    return "".join(rng.choice((rng.choice(pool), rng.choice(pool), "e", " ")) for _ in range(rng.randint(1, 24)))


def numbers(rng: Random) -> str:
    """Digits of several scripts, fractions, superscripts, money."""
    pool = "0123456789.,:-/%$€£¥½²³①Ⅳ٣९〇×±°№µ "
    return "".join(rng.choices(pool, k=rng.randint(1, 30)))


def long(rng: Random) -> str:
    """Far more than a row holds: one long word, or many pieces."""
    piece = rng.choice((plain, emoji, entities, scripts, suspects, ascii_noise))(rng) or "x"
    if rng.random() < 0.3:
        return rng.choice(("a", "ab", "é", "漢字", "!", "7", "<", "ha")) * rng.randint(50, 300)
    return (piece + rng.choice(("", " ", "\n"))) * min(40, 1000 // len(piece) + 1)


def mixture(rng: Random) -> str:
    """Several of the other shapes in one text."""
    others = [shape for name, shape in SHAPES.items() if name not in ("mixture", "long")]
    return rng.choice((" ", "", "\n")).join(shape(rng) for shape in rng.choices(others, k=rng.randint(2, 4)))


SHAPES: dict[str, Callable[[Random], str]] = {
    shape.__name__: shape
    for shape in (
        *(plain, ascii_noise, scripts, anything, emoji, entities, controls, specials),
        *(contractions, blanks, mojibake, suspects, forms, numbers, long, mixture),
    )
}


def odd_texts(count: int, seed: int = 0, shapes: Sequence[str] = tuple(SHAPES)) -> list[str]:
    """`count` texts, each of a shape drawn from `shapes`."""
    rng = Random(seed)
    return [SHAPES[rng.choice(shapes)](rng) for _ in range(count)]


def _word(rng: Random, ranges: Sequence[tuple[int, int]]) -> str:
    first, last = rng.choice(ranges)
    return "".join(chr(rng.randint(first, last)) for _ in range(rng.randint(1, 10)))


def _emoji(rng: Random) -> str:
    kind = rng.randrange(6)
    if kind == 0:
        return "".join(chr(rng.randint(0x1F1E6, 0x1F1FF)) for _ in range(rng.choice((1, 2, 2, 3))))
    if kind == 1:
        return rng.choice("0123456789#*") + rng.choice(("\ufe0f", "")) + "\u20e3"
    if kind == 2:
        return "\U0001f3f4" + "".join(map(chr, rng.choices(range(0xE0061, 0xE007B), k=5))) + rng.choice(("\U000e007f", ""))
    parts = []
    for _ in range(rng.choice((1, 1, 2, 3, 4))):
        tone = chr(rng.randint(0x1F3FB, 0x1F3FF)) if rng.random() < 0.4 else rng.choice(("\ufe0f", "\ufe0e", "", ""))
        parts.append(chr(rng.choice((rng.choice(FACES), rng.randint(0x1F300, 0x1FAFF), rng.randint(0x2190, 0x2BFF)))) + tone)
    return "\u200d".join(parts)


def _entity(rng: Random) -> str:
    kind = rng.randrange(8)
    if kind == 0:
        return f"&#{rng.choice((rng.randrange(300), rng.randrange(0x110000), 0xD800, 99999999))}" + rng.choice((";", ";", ""))
    if kind == 1:
        return f"&#{rng.choice('xX')}{rng.choice((rng.randrange(300), rng.randrange(0x110000), 0xDFFF)):{rng.choice('xX')}}" + rng.choice((";", ";", ""))
    if kind == 2:
        return "&" + "amp;" * rng.randint(1, 4) + rng.choice(("lt;", "eacute;", "#233;", "quot", "&amp;lt;"))
    if kind == 3:
        return rng.choice(("&", "&;", "&#;", "&#x;", "&# 1;", "&unknown;", "&notin", "&notit;", "& amp;", "&1;", "&.lt;", "&é;", "&EACUTE;", "&SZLIG;"))
    name = rng.choice(ENTITIES)
    return "&" + (name if kind < 6 else rng.choice((name.upper(), name.rstrip(";"), name[: rng.randint(1, len(name))])))
