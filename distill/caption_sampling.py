"""Which stored caption a training sample shows, and its tokens.

A *mix* gives every type of caption a share: a sample draws a type among those that it has, by their shares, then one of its captions of
that type, all alike. Without a mix every stored caption is drawn alike.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Mapping, Sequence

import numpy as np

from distill.captions import TYPES
from distill.order import CAPTION_TYPES, CAPTIONS, uniform
from distill.store import Store
from runtime.errors import RecipeError, TrainingError
from runtime.tokenizer import Tokenizer

REMEMBERED = 100_000
"""Captions whose tokens are kept: about half a kilobyte each."""
_ROWS_AT_ONCE = 1 << 16


def check_mix(mix: Mapping[str, float]) -> None:
    """Raises RecipeError: a type that captions do not have, or shares that are no shares."""
    if not isinstance(mix, Mapping):
        raise RecipeError(f"caption_mix is {mix!r}; expected an object of types and shares, for instance {{\"raw\": 0.3, \"synthetic\": 0.7}}")
    unknown = sorted(set(mix) - set(TYPES))
    if unknown:
        raise RecipeError(f"caption_mix names the type {', '.join(unknown)}; known are {', '.join(TYPES)}")
    bad = [f"{name} {share}" for name, share in mix.items() if isinstance(share, bool) or not isinstance(share, (int, float)) or not math.isfinite(share) or share < 0]
    if bad or (mix and sum(mix.values()) <= 0):
        raise RecipeError(f"caption_mix has {', '.join(bad) or 'no share above 0'}; expected one number of at least 0 per type, with a positive sum")


def check_sets(sets: Sequence[str]) -> None:
    """Raises RecipeError: a type that captions do not have, or one twice."""
    if isinstance(sets, str) or not set(sets) <= set(TYPES) or len(set(sets)) != len(sets):
        raise RecipeError(f"caption_sets are {sets!r}; expected different types of {', '.join(TYPES)}")


class CaptionSampler:
    """Draws captions: a function of (seed, epoch, row)."""

    def __init__(self, store: Store, seed: int, mix: Mapping[str, float] | None = None) -> None:
        check_mix(mix or {})
        self._store, self._seed = store, seed
        total = sum((mix or {}).values())
        self._shares = {TYPES.index(name): share / total for name, share in sorted((mix or {}).items()) if share > 0}

    def check(self, rows: np.ndarray) -> None:
        """Raises TrainingError when a row (of (N,)) has no caption that the mix allows. Reads only the captions' types."""
        if not self._shares:
            return
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            some = rows[start : start + _ROWS_AT_ONCE]
            without = np.flatnonzero(~np.isin(self._store.caption_types(some), list(self._shares)).any(axis=1))
            if len(without):
                types = " or ".join(TYPES[number] for number in self._shares)
                raise TrainingError(f"sample '{self._store.keys[some[without[0]]]}' has no caption of type {types}; reinforce with such captions or allow others")

    def draw(self, rows: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """Caption numbers, int64 (B,), of rows (B,) in their epochs (B,)."""
        draws = uniform(self._seed, epochs, CAPTIONS, rows)
        if not self._shares:
            return (draws * self._store.caption_counts[rows]).astype(np.int64)
        types = self._store.caption_types(rows)  # (B, C)
        numbers = np.array(list(self._shares))
        counts = (types[:, :, None] == numbers).sum(axis=1)  # (B, types of the mix)
        edges = np.cumsum(np.where(counts > 0, np.array(list(self._shares.values())), 0.0), axis=1)
        chosen = (uniform(self._seed, epochs, CAPTION_TYPES, rows)[:, None] * edges[:, -1:] >= edges).sum(axis=1)
        fits = types == numbers[chosen][:, None]
        wanted = (draws * counts[np.arange(len(rows)), chosen]).astype(np.int64)
        return (fits.cumsum(axis=1) > wanted[:, None]).argmax(axis=1)


class CaptionTokens:
    """Tokens of stored captions, made when they are first asked for and kept for the REMEMBERED last. Threads may share it."""

    def __init__(self, store: Store, tokenizer: Tokenizer, remembered: int = REMEMBERED, cut: bool = True) -> None:
        """cut: leave out what follows the longest text of a batch, as causal and pad-masked towers allow."""
        self._store, self._tokenizer, self._remembered, self._cut = store, tokenizer, remembered, cut
        self._numbers: dict[tuple[int, int], int] = {}  # (row, caption) to the number of its text
        self._texts: dict[str, int] = {}
        self._rows: list[np.ndarray] = []  # per text its (context_length,) int32
        self._lock = threading.Lock()

    def __call__(self, rows: np.ndarray, captions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Captions (B,) of rows (B,) -> tokens int32 (B, T), cut after the longest, and int64 (B,) that are equal where the texts are:
        the place of the first such text in the batch. Cutting is exact for causal and pad-masked towers only.
        """
        places = list(zip(rows.tolist(), captions.tolist(), strict=True))
        with self._lock:
            if len(self._numbers) + len(places) > self._remembered:
                self._numbers, self._texts, self._rows = {}, {}, []
            self._learn([place for place in places if place not in self._numbers])
            numbers = [self._numbers[place] for place in places]
            tokens = np.stack([self._rows[number] for number in numbers])
        first: dict[int, int] = {}
        same = np.array([first.setdefault(number, n) for n, number in enumerate(numbers)])
        longest = int(tokens.argmax(axis=1).max()) + 1 if self._cut else tokens.shape[1]  # EOT is the largest id
        return tokens[:, :longest], same

    def identities(self, rows: np.ndarray, captions: np.ndarray) -> np.ndarray:
        """int64 (B,), equal where the texts are, in every process: a hash of the text."""
        texts = (self._store.caption(*place).text for place in zip(rows.tolist(), captions.tolist(), strict=True))
        return np.array([int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True) for text in texts], np.int64)

    def _learn(self, places: list[tuple[int, int]]) -> None:
        texts = {place: self._store.caption(*place).text for place in places}
        new = [text for text in dict.fromkeys(texts.values()) if text not in self._texts]
        if new:
            self._texts.update(zip(new, range(len(self._rows), len(self._rows) + len(new)), strict=True))
            self._rows.extend(self._tokenizer(new))
        self._numbers.update((place, self._texts[text]) for place, text in texts.items())
