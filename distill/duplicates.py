"""Groups of duplicates, and which one of each group stays.

A preference orders all pairs. Going through them from the best to the worst, one is kept unless it is a duplicate of one that was kept
before. So every one that is dropped has a kept one within the threshold, no two kept ones are duplicates, and the answer depends on the
preference alone, never on the order of the pairs in the folder. (Groups by chains of duplicates could drop pictures that resemble no kept
one; SemDeDup's own rule, dropping whatever has a better neighbour even if that was dropped, too.)

Shapes: N pairs, D = dimension of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import numpy as np

from distill.perceptual_hash import HammingIndex

EXACT_ROWS = 20_000
"""Up to so many, embeddings are compared all with all; beyond, inside cells."""
CELL_ROWS = 5_000
"""Rows a cell, about, when cells are chosen by themselves."""
BLOCK = 512


class Kept:
    """Who stays. `by[n]` is n for a kept one, and otherwise the kept one that it duplicates; `apart[n]` says how near the two are."""

    def __init__(self, n: int) -> None:
        self.by = np.arange(n)
        self.apart = np.zeros(n)

    @property
    def dropped(self) -> np.ndarray:
        """(N,) bool."""
        return self.by != np.arange(len(self.by))

    def groups(self) -> dict[int, list[int]]:
        """Kept one -> those dropped for it, both in rising order; only groups of two or more."""
        out: dict[int, list[int]] = {}
        for n in np.flatnonzero(self.dropped):
            out.setdefault(int(self.by[n]), []).append(int(n))
        return dict(sorted(out.items()))


def exact(values: Sequence[Hashable], order: np.ndarray) -> Kept:
    """Equal values are duplicates. order (N,): positions from the best to the worst."""
    kept, first = Kept(len(values)), {}
    for n in order.tolist():
        kept.by[n] = first.setdefault(values[n], n)
    return kept


def near(hashes: np.ndarray, thumbnails: np.ndarray, order: np.ndarray, *, distance: int, colour: int) -> tuple[Kept, int]:
    """Pictures whose hashes differ in at most `distance` bits, and each of whose thumbnail's values differs by at most `colour`.

    Args:
        hashes: (N,) uint64. thumbnails: (N, 48) uint8. order: (N,) positions from the best to the worst.

    Returns:
        Who stays, and how many were spared although their hash is near a kept one's, because the colours differ.
    """
    kept, index, numbers = Kept(len(hashes)), HammingIndex(distance, len(hashes)), []
    values, colours = hashes.tolist(), thumbnails.astype(np.int16)
    spared = 0
    for n in order.tolist():
        found = index.within(values[n])
        if found:
            others = [numbers[number] for _, number in found]
            fits = np.flatnonzero(np.abs(colours[others] - colours[n]).max(axis=1) <= colour)
            if len(fits):
                kept.by[n], kept.apart[n] = others[fits[0]], found[fits[0]][0]
                continue
            spared += 1
        index.add(values[n])
        numbers.append(n)
    return kept, spared


def embedded(vectors: Callable[[np.ndarray], np.ndarray], order: np.ndarray, *, threshold: float, cells: int | None = None, seed: int = 0) -> tuple[Kept, int]:
    """Pictures whose embeddings have a cosine of at least `threshold`, searched inside cells of spherical k-means.

    Cells make it scale, as in SemDeDup (Abbas et al., 2023): two duplicates that fall into different cells are both kept. With one cell
    the search is complete.

    Args:
        vectors: positions (B,) -> float32 (B, D), unit norm; called again and again, so that only one cell lies in memory.
        order: (N,) positions from the best to the worst.
        cells: None chooses: one up to 20,000 rows, then one for each 5,000.

    Returns:
        Who stays (`apart` is the cosine), and the number of cells.
    """
    n = len(order)
    cells = cells or (1 if n <= EXACT_ROWS else round(n / CELL_ROWS))
    kept = Kept(n)
    cell = np.zeros(n, np.int64) if cells == 1 else _cells(vectors, order, cells, seed)
    for number in range(cells):
        members = order[cell == number]
        _leaders(vectors(members), members, threshold, kept)
    return kept, cells


def _leaders(values: np.ndarray, members: np.ndarray, threshold: float, kept: Kept) -> None:
    """values (M, D) of members (M,), best first: marks in `kept` those within the threshold of a better one that is kept."""
    leaders = np.empty_like(values)
    who: list[int] = []
    for start in range(0, len(members), BLOCK):
        block = values[start : start + BLOCK]
        near_old = block @ leaders[: len(who)].T
        inside = block @ block.T
        fresh: list[int] = []
        for n in range(len(block)):
            best, place = -2.0, -1
            if near_old.shape[1]:
                place = int(near_old[n].argmax())
                best = float(near_old[n, place])
            if fresh and (there := int(inside[n, fresh].argmax())) >= 0 and inside[n, fresh[there]] > best:
                best, place = float(inside[n, fresh[there]]), near_old.shape[1] + there
            if best >= threshold:
                kept.by[members[start + n]], kept.apart[members[start + n]] = who[place], best
                continue
            leaders[len(who)] = block[n]
            who.append(int(members[start + n]))
            fresh.append(n)


def _cells(vectors: Callable[[np.ndarray], np.ndarray], order: np.ndarray, cells: int, seed: int, rounds: int = 10, sample: int = 128) -> np.ndarray:
    """(N,) cell of each, in the given order: spherical k-means on `sample` rows a cell, then the nearest centre of every row."""
    n, rng = len(order), np.random.default_rng(seed)
    cells = min(cells, n)
    seen = vectors(order[np.sort(rng.choice(n, min(n, sample * cells), replace=False))])
    centres = seen[rng.choice(len(seen), cells, replace=False)].copy()
    for _ in range(rounds):
        nearest = _nearest(seen, centres)
        sums = np.zeros_like(centres)
        np.add.at(sums, nearest, seen)
        norms = np.linalg.norm(sums, axis=1, keepdims=True)
        centres = np.where(norms > 0, sums / np.maximum(norms, 1e-12), centres)
    return np.concatenate([_nearest(vectors(order[start : start + 4096]), centres) for start in range(0, n, 4096)])


def _nearest(values: np.ndarray, centres: np.ndarray) -> np.ndarray:
    return np.concatenate([(values[start : start + 4096] @ centres.T).argmax(axis=1) for start in range(0, len(values), 4096)])
