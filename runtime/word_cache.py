"""Words to token ids, remembered: a tokenizer meets the same words again and again."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping

from runtime.byte_pairs import pieces

WORDS = 65_536
"""Words remembered at most."""
UNITS = 4_000_000
"""Characters of these words and bytes of their ids, together, at most."""

_LONGEST = 4096


class WordCache(dict[str, bytes]):
    """Cleaned word -> its ids, as the bytes of native int32 values; `cache[word]` spells what is new.

    A word is what stands between two spaces of a cleaned text. No token reaches over a space, because no alternative of `SPLIT`
    matches one, and none looks at what stands before it: the ids of a text are those of its words, one after the other, whatever
    the script. In the same way the ids of a word are those of its pieces, and a piece, cut again, stays whole; pieces are
    remembered like words. What a key holds never depends on what else was asked.

    Memory is bounded by `words`, `units` and a longest word; a full cache is emptied, so that it follows its texts from one
    subject to the next. Full of English it takes about 10 MB, at the very worst 30 MB.

    Threads may share one: every step on the dictionary is atomic, and two threads that miss the same word store equal bytes.
    """

    def __init__(
        self, spell: Callable[[str], list[int]], specials: Mapping[str, int], alphabet: Mapping[int, str], words: int = WORDS, units: int = UNITS
    ) -> None:
        """`spell` gives the ids of a piece in CLIP's alphabet, `alphabet` is how that writes a byte, `specials` the pieces that have an id of their own."""
        super().__init__()
        self.words, self.units = words, units
        self._held = 0
        self._ids = spell
        self._specials = specials
        self._alphabet = alphabet

    def __missing__(self, word: str) -> bytes:
        if word.isalpha() and word.isascii():
            ids = self._spell(word)
        else:
            parts = pieces(word)
            ids = self._spell_piece(word) if parts == [word] else b"".join(map(self.__getitem__, parts))
        if len(word) <= _LONGEST:
            if len(self) >= self.words or self._held >= self.units:
                self.clear()
                self._held = 0
            self._held += len(word) + len(ids)
            self[word] = ids
        return ids

    def _spell_piece(self, piece: str) -> bytes:
        # open_clip gives a text that spells a special token the special's id, so do we.
        if piece in self._specials:
            return array("i", [self._specials[piece]]).tobytes()
        # Read as Latin-1, a byte is the character of the same number.
        return self._spell(piece.encode("utf-8").decode("latin-1").translate(self._alphabet))

    def _spell(self, written: str) -> bytes:
        """Of one piece in CLIP's alphabet of bytes, where ASCII letters stand for themselves."""
        return array("i", self._ids(written)).tobytes()
