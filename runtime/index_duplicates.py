"""Near-duplicates in a photo index: groups of files whose vectors are close to each other."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from runtime.errors import SearchError

if TYPE_CHECKING:
    from runtime.index import Index

EXACT_TO = 50_000
"""Pictures up to which every pair is compared; beyond, each picture with its NEAREST nearest ones."""
NEAREST = 32
_BLOCK = 2048


def duplicates(index: Index, threshold: float, progress: Callable[[int, int], None] | None = None) -> list[list[str]]:
    """Groups of paths, sorted inside, largest group first."""
    if not 0 < threshold <= 1:
        raise SearchError(f"the threshold is {threshold}, expected a cosine above 0 and at most 1, e.g. 0.95")
    index.refresh()
    rows = index.files.rows("SELECT segment, row, id, files FROM contents WHERE files > 0 ORDER BY segment, row")
    live, counts = [row[:3] for row in rows], {row[2]: row[3] for row in rows}
    labels = np.arange(len(live))
    step = progress or (lambda done, total: None)
    for place, others in _all_pairs(index, live, threshold, step) if len(live) <= EXACT_TO else _near_pairs(index, live, threshold, step):
        joined = np.union1d(labels[others], labels[place])
        if len(joined) > 1:
            labels[np.isin(labels, joined)] = joined[0]
    groups: dict[int, list[int]] = {}
    for (_, _, content), label in zip(live, labels.tolist(), strict=True):
        groups.setdefault(label, []).append(content)
    found = []
    for contents in groups.values():
        if len(contents) > 1 or counts[contents[0]] > 1:
            files = index.files.files_of({content: counts[content] for content in contents})
            found.append(sorted(os.fsdecode(path) for paths in files.values() for path in paths))
    return sorted(found, key=lambda group: (-len(group), group))


def _unit(index: Index, live: list[tuple[int, int, int]]) -> np.ndarray:
    """Vectors of live rows (segment, row, content), float32 (n, D), unit norm."""
    parts = []
    for number, segment in index.vectors.segments.items():
        rows = np.array([row for place, row, _ in live if place == number], np.int64)
        for start in range(0, segment.n, 4096):
            stop = min(start + 4096, segment.n)
            inside = rows[np.searchsorted(rows, start) : np.searchsorted(rows, stop)] - start
            if len(inside):
                parts.append(segment.vectors(start, stop)[inside])
    found = np.concatenate(parts)
    return np.asarray(found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12))


def _all_pairs(index: Index, live: list[tuple[int, int, int]], threshold: float, step: Callable[[int, int], None]) -> Iterator[tuple[int, np.ndarray]]:
    """Place of a picture, places of those after it that are close."""
    vectors = _unit(index, live) if live else np.zeros((0, 1), np.float32)
    for start in range(0, len(vectors), _BLOCK):
        close = vectors[start : start + _BLOCK] @ vectors[start:].T >= threshold
        for row in range(len(close)):
            others = np.flatnonzero(close[row, row + 1 :])
            if len(others):
                yield start + row, others + start + row + 1
        step(min(start + _BLOCK, len(vectors)), len(vectors))


def _near_pairs(index: Index, live: list[tuple[int, int, int]], threshold: float, step: Callable[[int, int], None]) -> Iterator[tuple[int, np.ndarray]]:
    place_of = {(segment, row): place for place, (segment, row, _) in enumerate(live)}
    for start in range(0, len(live), 1024):
        part = live[start : start + 1024]
        for offset, vector in enumerate(_unit(index, part)):
            best = [place_of.get((number, row), -1) for score, number, row in index.vectors.best(vector, NEAREST)[0] if score >= threshold]
            others = np.array([place for place in best if place >= 0 and place != start + offset], np.int64)
            if len(others):
                yield start + offset, others
        step(start + len(part), len(live))
