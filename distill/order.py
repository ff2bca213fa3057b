"""The order of training samples, and every draw that training makes, as functions of numbers.

Nothing here has a state: sample n of a run, its view and its caption follow from (seed, epoch, place) and (seed, epoch, row). A run
can therefore go on at any sample, at any number of processes, and a billion rows need no list of a billion numbers.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

VIEWS, CAPTIONS, CAPTION_TYPES, SHARDS, ROWS = range(5)
"""What a draw is for: each has its own stream."""

ROUNDS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(values: np.ndarray) -> np.ndarray:
    """uint64 -> uint64, every bit of the answer depends on every bit of the value: the finaliser of SplitMix64 (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        z = np.asarray(values, np.uint64) + _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def stream_key(seed: int, epoch: int | np.ndarray, stream: int) -> np.ndarray:
    """The number that tells one stream of draws from another: uint64, of the shape of `epoch`."""
    key = mix(np.uint64(seed % 2**64))
    for part in (epoch, stream):
        key = mix(key ^ mix(np.asarray(part, np.uint64)))
    return key


def uniform(seed: int, epoch: int | np.ndarray, stream: int, rows: np.ndarray) -> np.ndarray:
    """Draws in [0, 1), float64 (B,): one for each row number (B,) in its epoch (one or (B,)), whatever else is drawn."""
    return (mix(mix(np.asarray(rows, np.uint64)) ^ stream_key(seed, epoch, stream)) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permute(places: np.ndarray, count: int, key: np.ndarray) -> np.ndarray:
    """Where `places` (B,) in 0..count-1 go in the permutation of 0..count-1 that `key` names: int64 (B,), without making the others.

    A Feistel network (Luby and Rackoff 1988) of ROUNDS rounds on the next even number of bits; a number that falls outside goes
    through it again until it falls inside (cycle walking: Black and Rogaway 2002), four times on average at worst.
    """
    half = max(1, (max(count - 1, 1).bit_length() + 1) // 2)
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    keys = [mix(key ^ np.uint64(number)) for number in range(ROUNDS)]
    values = np.array(places, np.uint64)
    outside = np.arange(len(values))
    while len(outside):
        left, right = values[outside] >> bits, values[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (mix(right ^ round_key) & mask)
        values[outside] = left << bits | right
        outside = outside[values[outside] >= count]
    return values.astype(np.int64)


class Order:
    """The endless order over N samples that lie in shards.

    Without windows every epoch is a permutation of all samples. With `shuffle_shards` = W the shards are permuted, each W neighbours of
    that order form a window, and samples are permuted inside their window: a reader touches W shards at a time. Place n of the order
    belongs to epoch n // N.
    """

    def __init__(self, shard_sizes: np.ndarray, seed: int, shuffle_shards: int = 0) -> None:
        """shard_sizes: (number of shards,) samples in each; their sum is N."""
        self._sizes = np.asarray(shard_sizes, np.int64)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._seed, self._window = seed, shuffle_shards
        self._layouts: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self.count = int(self._sizes.sum())

    def __len__(self) -> int:
        return self.count

    def rows(self, first: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples at places `first` to `first + size`: their numbers 0..N-1 and their epochs, both int64 (size,)."""
        places = np.arange(first, first + size, dtype=np.int64)
        epochs = places // self.count
        rows = np.empty(size, np.int64)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            rows[inside] = self._epoch(int(epoch), places[inside] - epoch * self.count)
        return rows, epochs

    def _epoch(self, epoch: int, places: np.ndarray) -> np.ndarray:
        key = stream_key(self._seed, epoch, ROWS)
        if self._window <= 0 or self._window >= len(self._sizes):
            return permute(places, self.count, key)
        shards, starts = self._layout(epoch)  # starts: place in the epoch at which each shard of the permuted order would begin
        rows = np.empty(len(places), np.int64)
        windows = (np.searchsorted(starts, places, side="right") - 1) // self._window
        for window in np.unique(windows):
            inside = windows == window
            begin, end = window * self._window, min((window + 1) * self._window, len(shards))
            held = starts[begin : end + 1] - starts[begin]
            local = permute(places[inside] - starts[begin], int(held[-1]), mix(key ^ mix(np.uint64(window))))
            which = np.searchsorted(held, local, side="right") - 1
            rows[inside] = self._starts[shards[begin + which]] + local - held[which]
        return rows

    def _layout(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order of the shards, and where each begins: int64 (shards,) and (shards + 1,). Empty shards come last."""
        if epoch not in self._layouts:
            order = permute(np.arange(len(self._sizes)), len(self._sizes), stream_key(self._seed, epoch, SHARDS))
            order = order[np.argsort(self._sizes[order] == 0, kind="stable")]
            self._layouts[epoch] = order, np.concatenate([[0], np.cumsum(self._sizes[order])])
            while len(self._layouts) > 2:
                self._layouts.popitem(last=False)
        return self._layouts[epoch]
