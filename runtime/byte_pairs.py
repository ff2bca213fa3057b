"""CLIP's byte-pair vocabulary, read from its `tokenizer.json` and spelled here: a phone or a shell starts without the package `tokenizers`.

Only files of the very form that `build_clip_tokenizer` writes are read: the same split, two added tokens, no dropout. Everything else goes to `tokenizers`, which is the
truth for this module too (`tests/runtime/test_byte_pairs.py` holds the two side by side).
"""

from __future__ import annotations

import heapq
import json
import re
import unicodedata
from dataclasses import dataclass
from typing import Any

SOT = "<start_of_text>"
EOT = "<end_of_text>"
END = "</w>"
SPLIT = r"<[sſ]tart_of_text>|<end_of_text>|'[sſ]|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""How CLIP cuts a cleaned text into pieces. open_clip compiles it with IGNORECASE, under which U+017F (long s) equals s: hence the two classes.

What is a letter or a number depends on the version of Unicode that a matcher was made for: the Rust side's, open_clip's and Python's own disagree about
characters that only the newer of them knows, and about no others (a test looks at all).
"""
_SPLIT_ASCII = re.compile(SPLIT.replace(r"\p{L}", "A-Za-z").replace(r"\p{N}", "0-9"))
_KINDS = {"L": "L", "N": "0"}
_OTHER = "#"


@dataclass(frozen=True, kw_only=True, slots=True)
class BytePairs:
    """A vocabulary and the order of its merges.

    Attributes:
        vocab: token, in CLIP's alphabet of bytes, to id.
        ranks: pair of tokens, a space between them, to its place among the merges.
        start, end: ids of the two special tokens.
    """

    vocab: dict[str, int]
    ranks: dict[str, int]
    start: int
    end: int

    def spell(self, written: str) -> list[int]:
        """Ids of one piece in CLIP's alphabet of bytes: of all neighbours that are a merge, those that come first in the list are joined, the left ones first, until
        none is left. Takes n log n steps for n bytes, so that no text is long enough to stop an application."""
        tokens: list[str | None] = [*written[:-1], written[-1] + END]
        ranks, count = self.ranks, len(tokens)
        after = list(range(1, count + 1))
        before = list(range(-1, count - 1))
        pairs = (f"{left} {right}" for left, right in zip(tokens, tokens[1:], strict=False))
        waiting = [(ranks[pair], place) for place, pair in enumerate(pairs) if pair in ranks]
        heapq.heapify(waiting)
        while waiting:
            rank, place = heapq.heappop(waiting)
            following = after[place]
            if following >= count or ranks.get(f"{tokens[place]} {tokens[following]}") != rank:
                continue  # one of the two has been joined to something else since
            joined = f"{tokens[place]}{tokens[following]}"
            tokens[place], tokens[following] = joined, None
            after[place] = after[following]
            if after[place] < count:
                before[after[place]] = place
                found = ranks.get(f"{joined} {tokens[after[place]]}")
                if found is not None:
                    heapq.heappush(waiting, (found, place))
            if before[place] >= 0:
                found = ranks.get(f"{tokens[before[place]]} {joined}")
                if found is not None:
                    heapq.heappush(waiting, (found, before[place]))
        return [self.vocab[token] for token in tokens if token is not None]


def pieces(word: str) -> list[str]:
    """What `SPLIT` finds in a word without white space."""
    if word.isascii():
        return _SPLIT_ASCII.findall(word)
    # Each character beyond ASCII stands for its kind; the long s for the short one, which it equals in contractions.
    plain = "".join(c if c < "\x80" else "s" if c == "ſ" else _KINDS.get(unicodedata.category(c)[0], _OTHER) for c in word)
    return [word[found.start() : found.end()] for found in _SPLIT_ASCII.finditer(plain)]


def read_byte_pairs(data: bytes) -> BytePairs | None:
    """The vocabulary in these bytes of a `tokenizer.json`; None for any other tokenizer, or none at all."""
    try:
        document = json.loads(data)
        model, added = document["model"], document["added_tokens"]
        if model["type"] != "BPE" or not _as_written(document) or not _plain_model(model):
            return None
        vocab: dict[str, int] = model["vocab"]
        ids = {token["content"]: token["id"] for token in added}
        if set(ids) != {SOT, EOT} or len(added) != 2 or any(vocab.get(name) != id for name, id in ids.items()):
            return None
        merges = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
        found = BytePairs(vocab=vocab, ranks={pair: rank for rank, pair in enumerate(merges)}, start=ids[SOT], end=ids[EOT])
        return found if _sound(found) else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _as_written(document: dict[str, Any]) -> bool:
    """Split and special tokens as `build_clip_tokenizer` writes them; the normaliser is not used."""
    split, levels = document["pre_tokenizer"]["pretokenizers"]
    single = document["post_processor"]["single"]
    around = [list(part)[:1] for part in single] == [["SpecialToken"], ["Sequence"], ["SpecialToken"]]
    return (
        split["pattern"] == {"Regex": SPLIT} and (split["behavior"], split["invert"]) == ("Removed", True)
        and (levels["type"], levels["add_prefix_space"], levels["use_regex"]) == ("ByteLevel", False, False)
        and around and [single[0]["SpecialToken"]["id"], single[2]["SpecialToken"]["id"]] == [SOT, EOT]
    )  # fmt: skip


def _plain_model(model: dict[str, Any]) -> bool:
    """No part of a BPE model that `spell` does not have."""
    off = ("dropout", "continuing_subword_prefix", "fuse_unk", "byte_fallback", "ignore_merges")
    return model["end_of_word_suffix"] == END and not any(model.get(name) for name in off)


def _sound(found: BytePairs) -> bool:
    """Every byte has a token, alone and at the end of a word; every merge gives one; ids are whole numbers from 0 on."""
    letters = byte_alphabet().values()
    return (
        all(letter in found.vocab and letter + END in found.vocab for letter in letters)
        and all(pair.count(" ") == 1 and pair.replace(" ", "") in found.vocab for pair in found.ranks)
        and set(found.vocab.values()) == set(range(len(found.vocab)))
    )


def byte_alphabet() -> dict[int, str]:
    """The 256 byte values as printable characters, in the order in which CLIP's vocabulary lists them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {byte: chr(byte) for byte in printable}
    hidden = [byte for byte in range(256) if byte not in alphabet]
    alphabet.update({byte: chr(256 + n) for n, byte in enumerate(hidden)})
    return alphabet
