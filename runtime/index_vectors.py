"""The vectors of a photo index: its segments, the best rows of all of them for a query, and merging.

A segment is up to three immutable files of the same rows: NUMBER.vectors (what is scanned), NUMBER.full (rescoring vectors, where the
index has them) and NUMBER.lists (how to look at a small part of a large segment only).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtime.index_coding import Coding
from runtime.index_files import damaged
from runtime.index_lists import Lists, write_lists
from runtime.index_segments import BLOCK, Records, resealed, write_records

LISTS_FROM = 50_000
"""Rows from which a segment gets lists: below, every row is compared."""


@dataclass(frozen=True, slots=True)
class Segment:
    """An open segment."""

    number: int
    n: int
    main: Records
    full: Records | None
    lists: Lists | None

    def best(self, query: np.ndarray, want: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows, scores) of about the `want` best rows for float32 (width,), best first."""
        lists = self.lists
        if lists is not None and lists.few(want):
            rows, rough = lists.candidates(query, want)
        else:
            rough = self.main.scores(_prefix(self.main.coding, query))
            rows = _top(rough, max(_rescored(self.main.coding, self.full.coding) * want, 100) if self.full else want)
            rough = rough[rows]
        if self.full is not None or lists is not None:
            rough = self.exact(rows, query)
        order = _top(rough, want)
        return rows[order], rough[order]

    def exact(self, rows: np.ndarray, query: np.ndarray) -> np.ndarray:
        """Scores of these rows by the most precise vectors that are stored, float32."""
        records = self.full or self.main
        return records.coding.scores(records.take(rows), _prefix(records.coding, query))

    def vectors(self, start: int, stop: int) -> np.ndarray:
        """Rows decoded as precisely as they are stored, float32 (m, dims)."""
        return (self.full or self.main).vectors(start, stop)


def _rescored(rough: Coding, exact: Coding) -> int:
    """How many rows are scored again for each one wanted: more where the first scores are rougher."""
    if rough.dtype == "binary":
        return 32 * max(1, 512 // rough.dims)
    return 4 if rough.dims == exact.dims else 16


def _prefix(coding: Coding, query: np.ndarray) -> np.ndarray:
    return coding.prefix(query[None])[0]


def _top(scores: np.ndarray, want: int) -> np.ndarray:
    """Places of the `want` highest scores, best first; of equal ones the earlier first."""
    if want < len(scores):
        places = np.argpartition(-scores, want)[:want]
        places.sort()
    else:
        places = np.arange(len(scores))
    return places[np.argsort(-scores[places], kind="stable")]


class Vectors:
    """All segments of an index, opened as the table of segments says."""

    def __init__(self, folder: Path, main: Coding, full: Coding | None) -> None:
        self.folder, self.main, self.full = folder, main, full
        self.segments: dict[int, Segment] = {}

    def open(self, table: dict[int, tuple[int, dict[str, dict[str, Any]]]]) -> None:
        """Open what is new in the table, let go of what is no more. Raises SearchError when a file is not the one that was written."""
        kept = {number: segment for number, segment in self.segments.items() if number in table and (segment.lists is not None) == ("lists" in table[number][1])}
        for number in table.keys() - kept.keys():
            rows, files = table[number]
            main = Records(self.path(number, "vectors"), self.main, files["vectors"])
            full = Records(self.path(number, "full"), self.full, files["full"]) if self.full else None
            for records in (main, full):
                if records is not None and records.n != rows:
                    raise damaged(records.path, f"{records.n} rows, the index says {rows}")
            lists = Lists(self.path(number, "lists"), rows, files["lists"]) if "lists" in files else None
            kept[number] = Segment(number, rows, main, full, lists)
        self.segments = dict(sorted(kept.items()))

    def path(self, number: int, kind: str) -> Path:
        """The file of a segment."""
        return self.folder / f"{number:06d}.{kind}"

    def best(self, query: np.ndarray, want: int) -> tuple[list[tuple[float, int, int]], bool]:
        """The best (score, segment, row) of all segments for float32 (width,), best first, and whether there are more."""
        found: list[tuple[float, int, int]] = []
        for segment in self.segments.values():
            rows, scores = segment.best(query, want)
            found.extend((score, segment.number, row) for score, row in zip(scores.tolist(), rows.tolist(), strict=True))
        if len(self.segments) > 1:
            found.sort(key=lambda entry: (-entry[0], entry[1], entry[2]))
        return found[:want], want < sum(segment.n for segment in self.segments.values())

    # ------------------------------------------------------------ writing

    def write(self, number: int, vectors: np.ndarray) -> dict[str, dict[str, Any]]:
        """Write float32 (n, width) as the files of a segment; they are part of the index when the table names them."""
        files = {}
        for kind, coding in (("vectors", self.main), ("full", self.full)):
            if coding is not None:
                files[kind] = write_records(self.path(number, kind), coding, len(vectors), [coding.encode(vectors)])
        return files

    def merge(self, number: int, taken: Sequence[tuple[int, np.ndarray]]) -> dict[str, dict[str, Any]]:
        """Write the files of a new segment from rows (in rising order) of others."""
        files = {}
        total = sum(len(rows) for _, rows in taken)
        for kind, coding in (("vectors", self.main), ("full", self.full)):
            if coding is not None:
                files[kind] = write_records(self.path(number, kind), coding, total, self._copied(taken, kind))
        return files

    def _copied(self, taken: Sequence[tuple[int, np.ndarray]], kind: str) -> Iterator[np.ndarray]:
        at = 0
        for number, rows in taken:
            segment = self.segments[number]
            records = segment.main if kind == "vectors" else segment.full
            assert records is not None
            for start in range(0, segment.n, BLOCK):
                stop = min(start + BLOCK, segment.n)
                inside = rows[np.searchsorted(rows, start) : np.searchsorted(rows, stop)] - start
                if len(inside):
                    yield resealed(records.block(start, stop)[inside], at)
                    at += len(inside)

    def add_lists(self, number: int) -> dict[str, Any]:
        """Write the lists of a segment; returns the facts of the file."""
        segment = self.segments[number]
        return write_lists(self.path(number, "lists"), segment.n, segment.vectors)


def to_merge(rows: dict[int, int]) -> list[int]:
    """Which segments (number -> rows) should become one: the smaller ones, once together they are half as large as the next larger one or more.

    So there are never more than a few, and a row is copied at most about log2(n) times.
    """
    ordered = sorted(rows, key=lambda number: (-rows[number], number))
    for place, number in enumerate(ordered[:-1]):
        if rows[number] < 2 * sum(rows[other] for other in ordered[place + 1 :]):
            return sorted(ordered[place:])
    return []
