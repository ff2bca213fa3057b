"""Batches for training, read from pairs and a store.

The order is a pure function of (seed, number of samples seen): sample n is row `permutation(epoch)[n mod N]` with a stored
augmentation and a stored caption drawn for that epoch. Resuming at sample n therefore needs the number n and nothing else.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np

from distill.augment import apply
from distill.store import Store
from runtime.errors import ImageError, TrainingError
from runtime.pairs import Pairs
from runtime.preprocess import PreprocessConfig, normalise
from runtime.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """B samples. `rows`, `augs`, `captions` index the store; `same` is equal where the caption's text is."""

    rows: np.ndarray
    augs: np.ndarray
    captions: np.ndarray
    pixels: np.ndarray
    """(B, 3, S, S) float32, normalised for the student."""
    tokens: np.ndarray
    """(B, T) int32, T = the longest text of the batch."""
    same: np.ndarray
    """(B,) int64."""


class ReinforcedPairs:
    """Samples of a pairs folder as its store augments and captions them.

    Replayed views are kept as uint8 while they fit into `cache_bytes`: a stored augmentation comes back every few epochs,
    and reading it back costs a hundredth of decoding and replaying it.
    """

    def __init__(
        self, pairs: Pairs, store: Store, config: PreprocessConfig, tokenizer: Tokenizer, *,
        seed: int, caption_types: tuple[str, ...] | None = None, cache_bytes: int = 1 << 30,
    ) -> None:  # fmt: skip
        """caption_types: draw only captions of these types; None draws any stored one.

        Raises:
            TrainingError: store and pairs do not belong together, or no caption has one of the types.
        """
        self.pairs, self.store, self.config, self.seed = pairs, store, config, seed
        place = {key: row for row, key in enumerate(pairs.keys)}
        missing = [key for key in store.keys if key not in place]
        if missing or not len(store):
            found = f"{len(missing)} of its {len(store)} samples, the first '{missing[0]}', are not in the pairs" if missing else "it is empty"
            raise TrainingError(f"the store does not belong to these pairs: {found}; reinforce these pairs, or name the folder that was reinforced")
        self._pair_row = np.array([place[key] for key in store.keys])
        self._n_augs = np.asarray(store.n_augmentations)
        self._read_captions(tokenizer, caption_types)
        size = config.image_size
        self._offset = np.concatenate([[0], np.cumsum(self._n_augs)])
        views, bytes_per_view = int(self._offset[-1]), size * size * 3
        self._cached = views * bytes_per_view <= cache_bytes
        self._views = np.zeros((views if self._cached else 0, size, size, 3), np.uint8)
        self._filled = np.zeros(views if self._cached else 0, bool)
        self.unreadable: dict[str, str] = {}
        self._epoch: tuple[int, np.ndarray, np.ndarray, np.ndarray] | None = None

    def _read_captions(self, tokenizer: Tokenizer, types: tuple[str, ...] | None) -> None:
        counts = np.asarray(self.store.caption_counts)
        numbers: dict[str, int] = {}
        choices: list[np.ndarray] = []
        text_of: list[np.ndarray] = []
        for row in range(len(self.store)):
            stored = [self.store.caption(row, j) for j in range(int(counts[row]))]
            kept = [j for j, caption in enumerate(stored) if types is None or caption.type in types]
            if not kept:
                raise TrainingError(f"sample '{self.store.keys[row]}' has no caption of type {' or '.join(types or ())}; reinforce with such captions or allow others")
            choices.append(np.array(kept))
            text_of.append(np.array([numbers.setdefault(caption.text, len(numbers)) for caption in stored]))
        self.texts = list(numbers)
        self._choices, self._text_of = choices, text_of
        self._tokens = tokenizer(self.texts)  # (number of different texts, context_length)
        self._lengths = self._tokens.argmax(axis=1) + 1  # EOT is the largest id

    def __len__(self) -> int:
        return len(self.store)

    def order(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """rows, augmentations and captions of one epoch, each (N,)."""
        if self._epoch is None or self._epoch[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            rows = rng.permutation(len(self))
            augs = (rng.random(len(self)) * self._n_augs[rows]).astype(np.int64)
            draws = rng.random(len(self))
            captions = np.array([self._choices[row][int(draw * len(self._choices[row]))] for row, draw in zip(rows, draws, strict=True)])
            self._epoch = (epoch, rows, augs, captions)
        return self._epoch[1:]

    def batch(self, first: int, size: int) -> Batch:
        """Samples `first` to `first + size` of the endless order; a batch may cross into the next epoch."""
        parts, start, stop = [], first, first + size
        while start < stop:
            epoch, offset = divmod(start, len(self))
            end = min(len(self), offset + stop - start)
            parts.append([column[offset:end] for column in self.order(epoch)])
            start += end - offset
        rows, augs, captions = (np.concatenate(column) for column in zip(*parts, strict=True))
        texts = np.array([self._text_of[row][caption] for row, caption in zip(rows, captions, strict=True)])
        return Batch(
            rows=rows, augs=augs, captions=captions, same=texts,
            pixels=normalise(np.stack([self.view(int(row), int(aug)) for row, aug in zip(rows, augs, strict=True)]), self.config),
            tokens=self.tokens(texts),
        )  # fmt: skip

    def tokens(self, texts: np.ndarray) -> np.ndarray:
        """Numbers of different texts (B,) -> int32 (B, T), cut after the longest; exact for causal and pad-masked towers only."""
        return self._tokens[texts][:, : int(self._lengths[texts].max())]

    def view(self, row: int, aug: int) -> np.ndarray:
        """uint8 (S, S, 3): the picture of a row, replayed. One that no longer decodes is grey, and listed in `unreadable`."""
        place = int(self._offset[row]) + aug
        if self._cached and self._filled[place]:
            return self._views[place]
        try:
            picture = self.pairs.image(int(self._pair_row[row]))
        except ImageError as error:
            logger.warning("%s", error)
            self.unreadable[self.store.keys[row]] = str(error)
            return np.full((self.config.image_size, self.config.image_size, 3), 128, np.uint8)
        view = np.asarray(apply(picture, self.store.augmentation(np.array([row]), np.array([aug]))[0], self.config.image_size))
        if self._cached:
            self._views[place], self._filled[place] = view, True
        return view
