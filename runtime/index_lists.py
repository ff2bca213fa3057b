"""How a large segment is searched in a small part of it: lists of rows around centroids, two bits a dimension of what is left, exact vectors last.

1. The centroids nearest to the query choose the lists. How many is found out: as many as may still hold one of the best rows.
2. In these lists the first bit of every row's dimensions, the sign, is compared with the query's (Hamming distance, popcount).
3. The best thousand are compared by both bits, which stand for four even levels, with the query itself in BIT_PLANES bits a dimension.
   The best of them are what `candidates` returns, and the segment scores those by its stored vectors.

Shapes: n = rows, L = lists, D = dimensions, W = 64-bit words of a code. Format: docs/index-format.md (normative).
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from runtime.index_coding import along
from runtime.index_files import damaged
from runtime.index_segments import BLOCK, read_head, write_tensors

BIT_PLANES = 3
KMEANS_ROUNDS, SAMPLE_PER_LIST = 8, 64
FIRST_SHARE = 0.026
"""Share of the rows that every query looks at."""
KEPT, SCORED = 70, 5
"""Rows that go on to step 3, and to the stored vectors, for each row wanted and FIRST_SHARE looked at."""
MORE = 4
"""So many times as many rows go on in a second look."""
TOWARDS_QUERY = 1.5
"""Rows spread wider towards queries, which come from where pictures are, than in a random direction."""
MISSED = 0.02
"""Lists are added until the rows expected among the best in all others are fewer than this share of those wanted."""
LEVEL = 0.9957
"""Step between the four levels, in standard deviations of what they stand for: the least squared error for a bell."""
_FLOATS, _ROWED = ("centroids", "spreads", "rotation"), ("signs", "levels", "scales", "level_scales", "rows")
_CODES = {"F32": "<f4", "U8": "u1", "U32": "<u4", "U64": "<u8"}


class Lists:
    """An open file of lists, mapped: what a query does not look at is not read."""

    def __init__(self, path: Path, n: int, facts: dict[str, Any]) -> None:
        self.path, self.n = path, n
        start, header = read_head(path, facts)
        self._data = np.memmap(path, np.uint8, "r")
        try:
            self._arrays = {name: self._view(start, **header[name]) for name in (*_FLOATS, "offsets", "checks", *_ROWED)}
            sums = json.loads(header["__metadata__"]["crc32"])
        except (KeyError, ValueError, TypeError) as error:
            raise damaged(path, f"its header lacks something: {error}") from error
        for name in (*_FLOATS, "offsets", "checks"):
            if zlib.crc32(self._arrays[name].tobytes()) != sums[name]:
                raise damaged(path, f"'{name}' does not match its checksum")
        self._centroids, self._spreads, self._rotation = (np.array(self._arrays[name]) for name in _FLOATS)
        self._offsets = self._arrays["offsets"].astype(np.int64)
        if self._offsets[-1] != n or len(self._arrays["rows"]) != n:
            raise damaged(path, f"{len(self._arrays['rows'])} rows, the index says {n}")
        self._checked = np.zeros(len(self._centroids), bool)

    def _view(self, start: int, dtype: str, shape: list[int], data_offsets: list[int]) -> np.ndarray:
        begin, end = data_offsets
        return np.asarray(self._data[start + begin : start + end]).view(_CODES[dtype]).reshape(shape)

    def few(self, want: int) -> bool:
        """Whether so few rows are wanted that lists pay."""
        return want * 32 <= self.n

    def candidates(self, query: np.ndarray, want: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows, estimated scores) of more rows than `want`, in no order, among them nearly all of the best, for float32 (width,)."""
        query = query[: self._centroids.shape[1]]
        near = along(self._centroids, query)
        order = np.argsort(-near)
        sizes = np.diff(self._offsets)
        reached = np.cumsum(sizes[order])
        first = int(np.searchsorted(reached, max(FIRST_SHARE * self.n, 64 * want))) + 1
        turned = along(self._rotation, query)
        rough = max(1.0, 512 / len(query)) * want  # fewer bits tell less
        rows, scores = self._look(order[:first], near, turned, int(KEPT * rough), int(SCORED * rough))
        if first >= len(order):
            return rows, scores
        # The rows of a list lie around its centroid like a bell: how many of those not looked at may be better than the last one wanted?
        last = np.partition(scores, -want)[-want] if len(scores) >= want else -np.inf
        rest = order[first:]
        away = np.maximum((last - near[rest]) / (TOWARDS_QUERY * self._spreads[rest] * np.linalg.norm(query)), 0)
        expected = sizes[rest] * 0.5 * np.exp(-0.717 * away - 0.416 * away * away)
        ranked = np.argsort(-expected)
        missed = expected.sum() - np.cumsum(expected[ranked])
        if expected.sum() <= MISSED * want:
            return rows, scores
        added = rest[ranked[: int(np.searchsorted(-missed, -MISSED * want)) + 1]]
        # Such a query comes from elsewhere than the pictures do (it is a text, say): the bits tell less about it, also in the lists that were looked at.
        share = MORE * (1 + sizes[added].sum() / max(reached[first - 1], 1))
        return self._look(np.concatenate([order[:first], added]), near, turned, int(KEPT * rough * share), int(SCORED * rough * share))

    def _look(self, lists: np.ndarray, near: np.ndarray, turned: np.ndarray, kept: int, scored: int) -> tuple[np.ndarray, np.ndarray]:
        """Steps 2 and 3 in some lists."""
        codes, scales, offsets = self._arrays["signs"], self._arrays["scales"], self._offsets
        signs = _packed(turned >= 0)
        starts, stops = offsets[lists], offsets[lists + 1]
        sizes = stops - starts
        ends = np.cumsum(sizes)
        counts = np.empty((int(ends[-1]), codes.shape[1]), np.uint8)
        bits = np.empty((int(sizes.max()), codes.shape[1]), np.uint64)
        parts = []
        for number, start, stop, end in zip(lists.tolist(), starts.tolist(), stops.tolist(), ends.tolist(), strict=True):
            if not self._checked[number]:
                self._check(number)
            part = bits[: stop - start]
            np.bitwise_xor(codes[start:stop], signs, out=part)
            np.bitwise_count(part, out=counts[end - stop + start : end])
            parts.append(scales[start:stop])
        estimate = _row_sums(counts)
        height = float(np.abs(turned).mean())
        estimate *= -2 * height
        estimate += height * len(turned)
        estimate *= np.concatenate(parts)
        estimate += np.repeat(near[lists], sizes)
        places = np.argpartition(estimate, len(estimate) - kept)[-kept:] if kept < len(estimate) else np.arange(len(estimate))
        own = np.searchsorted(ends, places, side="right")
        places = places + (stops - ends)[own]
        inner = 2 * _inner(codes[places], turned) + _inner(self._arrays["levels"][places], turned) - 1.5 * turned.sum()
        estimate = near[lists][own] + self._arrays["level_scales"][places] * inner
        if scored < len(places):
            best = np.argpartition(estimate, len(places) - scored)[-scored:]
            places, estimate = places[best], estimate[best]
        return self._arrays["rows"][places].astype(np.int64), estimate

    def _check(self, number: int) -> None:
        start, stop = self._offsets[number], self._offsets[number + 1]
        if _list_crc(self._arrays, start, stop) != self._arrays["checks"][number]:
            raise damaged(self.path, f"list {number} does not match its checksum")
        self._checked[number] = True


def _packed(signs: np.ndarray) -> np.ndarray:
    """Bits (D,) -> uint64 (W,), padded with zeros."""
    data = np.packbits(signs)
    return np.concatenate([data, np.zeros(-len(data) % 8, np.uint8)]).view("<u8")


def _row_sums(counts: np.ndarray) -> np.ndarray:
    """uint8 (n, W) -> float32 (n,): sums of rows."""
    if counts.shape[1] == 8:  # the eight counts of a row in one word: two by two, then all by a multiplication
        word = counts.view("<u8")[:, 0]
        low = np.uint64(0x00FF00FF00FF00FF)
        pairs = (word & low) + ((word >> np.uint64(8)) & low)
        return np.asarray((pairs * np.uint64(0x0001000100010001)) >> np.uint64(48)).astype(np.float32)
    return counts.sum(axis=1, dtype=np.float32)


def _inner(bits: np.ndarray, turned: np.ndarray) -> np.ndarray:
    """Sum of the query's values where a row has a bit, (n, W) -> (n,); the query is quantised to BIT_PLANES bits a dimension."""
    low, high = float(turned.min()), float(turned.max())
    step = max((high - low) / (2**BIT_PLANES - 1), 1e-12)
    levels = np.rint((turned - low) / step).astype(np.uint8)
    sums = _row_sums(np.bitwise_count(bits)) * np.float32(low / step)
    for plane in range(BIT_PLANES):
        sums += 2.0**plane * _row_sums(np.bitwise_count(bits & _packed((levels >> plane) & 1)))
    return np.asarray(sums * np.float32(step))


def _list_crc(arrays: dict[str, np.ndarray], start: int, stop: int) -> int:
    found = 0
    for name in _ROWED:
        found = zlib.crc32(arrays[name][start:stop].tobytes(), found)
    return found


def write_lists(path: Path, n: int, vectors: Callable[[int, int], np.ndarray], seed: int = 0) -> dict[str, Any]:
    """Make the lists of a segment; vectors(start, stop) gives its rows as float32 (m, D). Returns the facts of the file."""
    generator = np.random.default_rng(seed)
    count = min(max(16, round(math.sqrt(n))), n)
    chosen = np.sort(generator.choice(n, min(n, SAMPLE_PER_LIST * count), replace=False))
    sample = np.concatenate([vectors(start, stop)[chosen[(chosen >= start) & (chosen < stop)] - start] for start, stop in _blocks(n)])
    centroids = _kmeans(sample, count, generator)
    dims = centroids.shape[1]
    rotation = np.linalg.qr(generator.normal(size=(dims, dims)))[0].astype(np.float32)
    own, squares = np.empty(n, np.int64), np.zeros(count)
    coded = {name: np.zeros((n, -(-dims // 64)), "<u8") for name in ("signs", "levels")} | {name: np.empty(n, "<f4") for name in ("scales", "level_scales")}
    for start, stop in _blocks(n):
        part = vectors(start, stop)
        own[start:stop] = _nearest(part, centroids)
        rest = (part - centroids[own[start:stop]]) @ rotation.T
        square = np.square(rest).sum(axis=1)
        level = np.clip(np.floor(rest / (LEVEL * np.sqrt(square / dims + 1e-24))[:, None]), -2, 1) + 2
        for name, bits in (("signs", rest >= 0), ("levels", level % 2 == 1)):
            packed = np.packbits(bits, axis=1)
            coded[name].view(np.uint8)[start:stop, : packed.shape[1]] = packed
        # With these scales what is decoded has the true inner product with the row itself.
        coded["scales"][start:stop] = square / np.maximum(np.abs(rest).sum(axis=1), 1e-12)
        coded["level_scales"][start:stop] = square / np.maximum((rest * (level - 1.5)).sum(axis=1), 1e-12)
        np.add.at(squares, own[start:stop], square)
    order = np.argsort(own, kind="stable")
    sizes = np.bincount(own, minlength=count)
    spreads = np.sqrt(squares / np.maximum(sizes, 1) / dims)
    floats = {"centroids": centroids, "spreads": np.maximum(spreads, 1e-6), "rotation": rotation}
    rowed = {**{name: value[order] for name, value in coded.items()}, "rows": order.astype("<u4")}
    return _write(path, {name: value.astype("<f4") for name, value in floats.items()}, rowed, np.concatenate([[0], np.cumsum(sizes)]))


def _write(path: Path, floats: dict[str, np.ndarray], rowed: dict[str, np.ndarray], offsets: np.ndarray) -> dict[str, Any]:
    checks = np.array([_list_crc(rowed, start, stop) for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)], "<u4")
    whole = {**floats, "offsets": offsets.astype("<u4"), "checks": checks}
    sums = {name: zlib.crc32(value.tobytes()) for name, value in whole.items()}
    kinds = {np.dtype("<f4"): "F32", np.dtype("<u4"): "U32", np.dtype("<u8"): "U64"}
    header: dict[str, Any] = {"__metadata__": {"format": "mclip-index", "kind": "lists", "crc32": json.dumps(sums, sort_keys=True)}}
    arrays = {**rowed, **whole}  # words of eight bytes first, so that all are aligned
    at = 0
    for name, value in arrays.items():
        header[name] = {"dtype": kinds[value.dtype], "shape": list(value.shape), "data_offsets": [at, at + value.nbytes]}
        at += value.nbytes
    return write_tensors(path, header, arrays.values())


def _blocks(n: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + BLOCK, n)) for start in range(0, n, BLOCK))


def _nearest(vectors: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    return np.argmax(vectors @ centroids.T - 0.5 * np.square(centroids).sum(axis=1), axis=1)


def _kmeans(sample: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """float32 (count, D); a centroid that loses all its rows starts again at a random one."""
    centroids = sample[generator.choice(len(sample), count, replace=False)].copy()
    for _ in range(KMEANS_ROUNDS):
        own = np.concatenate([_nearest(sample[start : start + BLOCK], centroids) for start in range(0, len(sample), BLOCK)])
        order = np.argsort(own, kind="stable")
        sizes = np.bincount(own, minlength=count)
        full = np.flatnonzero(sizes)
        sums = np.add.reduceat(sample[order], np.concatenate([[0], np.cumsum(sizes[full])[:-1]]), axis=0)
        centroids[full] = sums / sizes[full, None]
        empty = np.flatnonzero(sizes == 0)
        centroids[empty] = sample[generator.choice(len(sample), len(empty))]
    return centroids
