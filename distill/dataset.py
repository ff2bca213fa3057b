"""Training samples, read from pairs and a store.

Sample n of the endless order is a row, one of its stored views and one of its stored captions, all functions of (seed, n): see
distill/order.py. Resuming at sample n therefore needs the number n and nothing else, at any number of processes.
"""

from __future__ import annotations

import logging
import math
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from distill.caption_sampling import CaptionSampler, CaptionTokens
from distill.keep_list import KeepList
from distill.order import VIEWS, Order, uniform
from distill.store import Store
from distill.views import open_picture
from runtime.errors import ImageError, TrainingError
from runtime.pairs import Pairs
from runtime.preprocess import PreprocessConfig, normalise
from runtime.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

BLOCK = 1024
"""Samples whose place in the order is drawn at once."""
UNREADABLE_NAMED = 100
"""Pictures that no longer decode are all counted; so many are named."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """Which B samples: rows of the store, and of each a view and a caption; all int64 (B,). With caption sets, captions are (B, C): one of each."""

    rows: np.ndarray
    augs: np.ndarray
    captions: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """B samples as a training step reads them. `rows`, `augs`, `captions` index the store. With C caption sets, tokens and all that belongs to texts
    have C * B rows, set after set."""

    rows: np.ndarray
    augs: np.ndarray
    captions: np.ndarray
    pixels: np.ndarray
    """(B, 3, S, S) float32, normalised for the student; (0, 3, S, S) where only texts were asked for."""
    tokens: np.ndarray
    """(B, T) int32, T = the longest text of the batch."""
    same: np.ndarray
    """(B,) int64, equal where the caption's text is."""
    teacher_images: tuple[np.ndarray, ...] = ()
    """Per followed teacher (B, E_k) float32 of unit norm: the view's embedding. Empty where only texts were asked for."""
    teacher_texts: tuple[np.ndarray, ...] = ()
    """Per followed teacher (B, E_k) float32 of unit norm: the caption's embedding."""
    texts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """(B,) int64, equal where the caption's text is, in every process; empty where one process has the whole batch."""


class ReinforcedPairs:
    """Samples of a pairs folder as its store augments and captions them. Threads may share it.

    Replayed views are kept as uint8 while all of them fit into `cache_bytes`: a stored view comes back every few epochs, and reading it
    back costs a hundredth of decoding and replaying it.

    Attributes:
        rows: (N,) rows of the store that are trained on, in the order of the pairs.
        missing: rows of the store whose picture is not in the pairs; left out.
        dropped: rows that the keep-list leaves out.
        unreadable_count, unreadable: pictures that did not decode, shown as grey; the first of them with the reason.
    """

    def __init__(
        self, pairs: Pairs, store: Store, config: PreprocessConfig, tokenizer: Tokenizer, *, seed: int, caption_mix: Mapping[str, float] | None = None,
        caption_sets: Sequence[str] = (), teachers: Sequence[int] = (), max_augmentations: int = 0, shuffle_shards: int = 0, keep: KeepList | None = None,
        rank: int = 0, world: int = 1, matched_views: bool = True, cut_texts: bool = True, cache_bytes: int = 1 << 30,
    ) -> None:  # fmt: skip
        """
        Args:
            caption_mix: share of each type of caption; None or empty: any stored one alike.
            caption_sets: types of which each sample shows one caption each; empty: one by the mix.
            teachers: numbers of the teachers whose embeddings a batch carries.
            max_augmentations: draw from the first so many views; 0: from all.
            shuffle_shards: shards that are shuffled together; 0: all.
            keep: train on these keys only.
            matched_views: whether a teacher's embedding is that of the view that is shown; False: of the stored one after it.
            cut_texts: leave out padding beyond a batch's longest text.
            rank, world: this process takes the rank-th of `world` equal slices of every batch.

        Raises:
            TrainingError: store and pairs do not belong together, nothing is left to train on, or a sample has no caption of the mix.
            RecipeError: the mix makes no sense.
        """
        self.pairs, self.store, self.config, self.seed = pairs, store, config, seed
        self.teachers, self.rank, self.world, self._shift = tuple(teachers), rank, world, 0 if matched_views else 1
        self._pair_row = _join(pairs, store)
        self._choose_rows(keep)
        counts = store.n_augmentations if max_augmentations <= 0 else np.minimum(store.n_augmentations, max_augmentations)
        self._n_augs = counts
        mixes = [{name: 1.0} for name in caption_sets] or [caption_mix]
        self._samplers, self.tokens = [CaptionSampler(store, seed, mix) for mix in mixes], CaptionTokens(store, tokenizer, cut=cut_texts)
        for sampler in self._samplers:
            sampler.check(self.rows)
        starts = np.array([shard.start for shard in pairs.shards] + [len(pairs)])
        self.order = Order(np.diff(np.searchsorted(self._pair_row[self.rows], starts)), seed, shuffle_shards)
        size, most = config.image_size, int(counts[self.rows].max())
        self._cached = len(self.rows) * most * size * size * 3 <= cache_bytes
        self._place = np.full(len(store) if self._cached else 0, -1, np.int64)
        if self._cached:
            self._place[self.rows] = np.arange(len(self.rows)) * most
        held = len(self.rows) * most if self._cached else 0
        self._views, self._filled = np.zeros((held, size, size, 3), np.uint8), np.zeros(held, bool)
        self.unreadable: dict[str, str] = {}
        self.unreadable_count = 0
        self._lock = threading.Lock()
        self._blocks: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self._buffers = _Buffers()

    def _choose_rows(self, keep: KeepList | None) -> None:
        there = self._pair_row >= 0
        self.missing = int((~there).sum())
        if 2 * self.missing >= len(there):
            first = f", the first '{self.store.keys[int(np.argmin(there))]}'," if self.missing else ""
            found = f"{self.missing} of its {len(there)} samples{first} are not in the pairs" if len(there) else "it is empty"
            raise TrainingError(f"the store does not belong to these pairs: {found}; reinforce these pairs, or name the folder that was reinforced")
        if self.missing:
            logger.warning("%d of the store's %d samples have no picture in %s; they are left out", self.missing, len(there), self.pairs.folder)
        self.dropped = 0
        if keep is not None:
            kept = keep.mask(self.store.keys)
            self.dropped = int((there & ~kept).sum())
            there &= kept
            if not there.any():
                raise TrainingError(f"the keep-list keeps none of the store's {len(there)} samples; give the list that was made for these pairs")
        rows = np.flatnonzero(there)
        self.rows = rows[np.argsort(self._pair_row[rows], kind="stable")]

    def __len__(self) -> int:
        return len(self.rows)

    def samples(self, first: int, size: int) -> Samples:
        """Samples `first` to `first + size` of the endless order (of these this process's slice); they may cross into the next epoch."""
        if size % self.world:
            raise TrainingError(f"a batch of {size} cannot be shared by {self.world} processes; choose a batch_size that is a multiple of it")
        share = size // self.world
        start = first + self.rank * share
        found = []
        for number in range(start // BLOCK, (start + share - 1) // BLOCK + 1):
            inside = slice(max(start - number * BLOCK, 0), start + share - number * BLOCK)
            found.append([column[inside] for column in self._block(number)])
        rows, augs, captions = (np.concatenate(columns) for columns in zip(*found, strict=True))
        return Samples(rows=rows, augs=augs, captions=captions)

    def _block(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows, views and captions of places number * BLOCK to (number + 1) * BLOCK of the order: drawn together, since most of it is per call."""
        with self._lock:
            if number not in self._blocks:
                places, epochs = self.order.rows(number * BLOCK, BLOCK)
                rows = self.rows[places]
                augs = (uniform(self.seed, epochs, VIEWS, rows) * self._n_augs[rows]).astype(np.int64)
                captions = [sampler.draw(rows, epochs) for sampler in self._samplers]
                captions_of_all = captions[0] if len(captions) == 1 else np.stack(captions, axis=1)
                self._blocks = dict([*self._blocks.items()][-3:]) | {number: (rows, augs, captions_of_all)}
            return self._blocks[number]

    def batch(self, first: int, size: int, pictures: bool = True) -> Batch:
        """The samples that `samples` names, whole."""
        samples = self.samples(first, size)
        if not pictures:
            return self.finish(samples, None)
        pixels = self.empty_pixels(len(samples))
        self.fill(samples, 0, len(samples), pixels)
        return self.finish(samples, pixels)

    def finish(self, samples: Samples, pixels: np.ndarray | None) -> Batch:
        """What a batch holds besides its pixels, and the batch. pixels None: only texts are asked for."""
        captions = samples.captions.T.reshape(-1)
        rows = np.tile(samples.rows, len(captions) // len(samples))
        tokens, same = self.tokens(rows, captions)
        side = self.config.image_size
        taught = (samples.augs + self._shift) % self._n_augs[samples.rows] if self._shift else samples.augs
        return Batch(
            rows=samples.rows, augs=samples.augs, captions=samples.captions, tokens=tokens, same=same,
            pixels=np.zeros((0, 3, side, side), np.float32) if pixels is None else pixels,
            teacher_images=() if pixels is None else tuple(self.store.image_embeddings(k, samples.rows, taught) for k in self.teachers),
            teacher_texts=tuple(self.store.text_embeddings(k, rows, captions) for k in self.teachers),
            texts=self.tokens.identities(rows, captions) if self.world > 1 else np.zeros(0, np.int64),
        )  # fmt: skip

    def empty_pixels(self, count: int) -> np.ndarray:
        """float32 (count, 3, S, S) of any content, for `fill`."""
        return self._buffers.take((count, 3, self.config.image_size, self.config.image_size))

    def fill(self, samples: Samples, start: int, stop: int, pixels: np.ndarray) -> None:
        """Write the views of samples start to stop into their places of pixels (B, 3, S, S), float32, normalised."""
        stop = min(stop, len(samples))
        rows, augs, out = samples.rows[start:stop], samples.augs[start:stop], pixels[start:stop]
        if not self._cached:
            for n, view in self._replay(rows, augs):
                normalise(view[None], self.config, out[n : n + 1])
            return
        places = self._place[rows] + augs
        missing = np.flatnonzero(~self._filled[places])
        if len(missing) < len(rows):
            normalise(self._views[places], self.config, out)
        for n, view in self._replay(rows[missing], augs[missing], places[missing]):
            normalise(view[None], self.config, out[missing[n] : missing[n] + 1])

    def view(self, row: int, aug: int) -> np.ndarray:
        """uint8 (S, S, 3): the picture of a row of the store, replayed."""
        return next(view for _, view in self._replay(np.array([row]), np.array([aug])))

    def _replay(self, rows: np.ndarray, augs: np.ndarray, places: np.ndarray | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """Number and view, uint8 (S, S, 3), of each; with `places` views are kept there. A picture that no longer decodes is grey, and counted."""
        side = self.config.image_size
        if not len(rows):
            return
        for n, (row, packed) in enumerate(zip(rows.tolist(), self.store.augmentation(rows, augs), strict=True)):
            try:
                with self._lock:  # the pairs keep a list of the shards they used last
                    data = self.pairs.image_bytes(int(self._pair_row[row]))
                view = open_picture(data).view(packed, side)
            except ImageError as error:
                self._note(self.store.keys[row], error)
                yield n, np.full((side, side, 3), 128, np.uint8)
                continue
            if places is not None:
                self._views[places[n]] = view
                self._filled[places[n]] = True
            yield n, view

    def _note(self, key: str, error: ImageError) -> None:
        with self._lock:
            self.unreadable_count += 1
            if key not in self.unreadable and len(self.unreadable) < UNREADABLE_NAMED:
                self.unreadable[key] = str(error)
                logger.warning("sample '%s': %s", key, error)


class _Buffers:
    """Float32 memory of batches that nobody holds any more, used again: fresh pages are cleared by the system first, which takes as long as
    normalising. A block that any array, slice or tensor still refers to is left alone."""

    def __init__(self, kept: int = 8) -> None:
        self._blocks: list[np.ndarray] = []
        self._kept, self._lock = kept, threading.Lock()

    def take(self, shape: tuple[int, ...]) -> np.ndarray:
        """An array (shape) of any content."""
        size = math.prod(shape)
        with self._lock:
            for n in range(len(self._blocks)):
                if sys.getrefcount(self._blocks[n]) == _UNUSED and len(self._blocks[n]) == size:
                    return self._blocks[n].reshape(shape)
            block = np.empty(size, np.float32)
            self._blocks = [*self._blocks[-self._kept + 1 :], block]
            return block.reshape(shape)


_UNUSED = sys.getrefcount([np.empty(0)][0])
"""References that Python counts for an array that only a list holds."""


def _join(pairs: Pairs, store: Store) -> np.ndarray:
    """(rows of the store,) int64: each one's row in the pairs, found by key; -1 where the pairs lack it."""
    rows = store.pair_rows
    if len(rows) and rows.min() >= 0 and rows.max() < len(pairs) and all(pairs.keys[row] == key for row, key in zip(rows.tolist(), store.keys, strict=True)):
        return rows
    place = {key: row for row, key in enumerate(pairs.keys)}
    return np.array([place.get(key, -1) for key in store.keys], np.int64)
