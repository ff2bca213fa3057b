"""Reading a reinforcement store: rows by mmap, layers stacked, checked against its index. Format: docs/store-format.md (normative).

Shapes: n = rows of a part, N = rows of the store, A = views of a row, D = a teacher's dimension, B = rows asked for.
"""

from __future__ import annotations

import os
import resource
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from distill.captions import TYPES, Caption
from distill.store_codecs import decode, decode_unit
from distill.store_codecs import unit as unit
from distill.store_writing import PartRows as PartRows  # the writing half, for those who know one module
from distill.store_writing import hash_shards as hash_shards
from distill.store_writing import write_index as write_index
from distill.store_writing import write_part as write_part
from runtime.errors import StoreError
from runtime.store_index import DTYPES as DTYPES
from runtime.store_index import Layer, layers_of, parts_by_layer
from runtime.store_index import read_index as read_index
from runtime.store_parts import PARAMETER_BYTES, Part, check_part
from runtime.store_verification import verify_store

_FEW = 4
"""Rows of one part below which copying them one by one is faster than numpy's indexing by lists."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherFacts:
    """What the store says of a teacher. logit_scale is multiplicative; preprocessing is what turned a view into its pixels."""

    name: str
    dim: int
    logit_scale: float
    licence: str = "unknown"
    source: str = ""
    sha256: str = ""
    preprocessing: dict[str, Any] = field(default_factory=dict)
    micro_batch: int = 0

    def __post_init__(self) -> None:
        if not self.name or self.dim < 1 or not np.isfinite(self.logit_scale) or self.logit_scale <= 0:
            raise StoreError(f"teacher '{self.name}' has dim {self.dim} and logit_scale {self.logit_scale}; expected a name, dim >= 1, a positive scale")


@dataclass(slots=True)
class _Stack:
    """One base part and its parts of later layers, mapped. views: made when one view is first asked for; per view (parameters, place in them,
    per teacher (values, scales, place))."""

    parts: list[Part]
    views: list[tuple[np.ndarray, int, list[tuple[np.ndarray, np.ndarray | None, int]]]]


class Store:
    """A store, open for reading. Rows are numbered over all base parts, in pairs order; pairs that were skipped have no row. Views, captions
    and teachers are numbered over all layers.

    At most `max_open` files are mapped at a time, those used last. Threads may share a store. It can be pickled (it opens its files again).
    """

    def __init__(self, path: Path, index: dict[str, Any], max_open: int) -> None:
        self.path, self.index = path, index
        self.teachers = [TeacherFacts(**facts) for facts in index["teachers"]]
        self.dtype: str = index["dtype"]
        self.layers: list[Layer] = layers_of(index)
        self._entries = parts_by_layer(index)
        self._edges: list[int] = np.cumsum([0, *(entries[0]["rows"] for entries in self._entries)]).tolist()
        self._rows, self._views = self._edges[-1], index["augmentations"]
        self._open: OrderedDict[int, _Stack] = OrderedDict()
        self._most_stacks = max(1, max_open // len(self.layers))
        self._checked: set[int] = set()
        self._lock = threading.Lock()
        self._view_places = self._find_views()
        self._caption_layers = [layer for layer in self.layers if layer.adds_captions]
        self._gather()

    def __len__(self) -> int:
        return self._rows

    def __reduce__(self) -> tuple[Any, ...]:
        return (open_store, (str(self.path),))

    def teacher_index(self, teacher: int | str) -> int:
        """Number of a teacher, given by number or name. Raises StoreError when there is none."""
        names = [facts.name for facts in self.teachers]
        if isinstance(teacher, str) and teacher in names:
            return names.index(teacher)
        if isinstance(teacher, (int, np.integer)) and 0 <= teacher < len(names):
            return int(teacher)
        raise StoreError(f"the store has no teacher {teacher!r}; it has {', '.join(f'{n} ({name})' for n, name in enumerate(names))}")

    # ------------------------------------------------------------ one view, fast

    def read_view(self, row: int, aug: int) -> tuple[list[tuple[np.ndarray, np.ndarray | None]], np.ndarray]:
        """One view of one row as it is stored; nothing is copied or decoded.

        Returns:
            Per teacher its stored values (for int8 (D,) int8, for int4 (ceil(D / 2),) uint8) with their float16 scale or scales (None for
            dtypes without), and the parameters, uint8 (16,), for `distill.augment.apply`. All are views into mapped files.
        """
        if not (0 <= row < self._rows and 0 <= aug < self._views):
            self._check(np.asarray([row]), np.asarray([aug]), self.n_augmentations, "augmentation")
        number = bisect_right(self._edges, row) - 1
        local = row - self._edges[number]
        stack = self._stack(number)
        parameters, place, teachers = (stack.views or self._find_arrays(stack))[aug]
        return [(values[local, n], scales[local, n] if scales is not None else None) for values, scales, n in teachers], parameters[local, place]

    def read_view_float(self, row: int, aug: int) -> tuple[list[np.ndarray], np.ndarray]:
        """`read_view`, decoded: per teacher float32 (D,) of unit norm, and the parameters, uint8 (16,)."""
        stored, parameters = self.read_view(row, aug)
        vectors = [decode_unit(values, scales, self.dtype, facts.dim) for (values, scales), facts in zip(stored, self.teachers, strict=True)]
        return vectors, parameters

    # ------------------------------------------------------------ batches

    def image_embeddings(self, teacher: int | str, rows: np.ndarray, augs: np.ndarray) -> np.ndarray:
        """rows (B,), augs (B,) -> float32 (B, D), unit norm."""
        rows, augs = self._check(rows, augs, self.n_augmentations, "augmentation")
        t = self.teacher_index(teacher)
        layers, items = self._view_places[t + 1]
        return self._vectors(f"image.{t}", t, rows, layers[augs], items[augs])

    def text_embeddings(self, teacher: int | str, rows: np.ndarray, captions: np.ndarray) -> np.ndarray:
        """rows (B,), captions (B,) -> float32 (B, D), unit norm."""
        rows, captions = self._check(rows, captions, self.caption_counts, "caption")
        t = self.teacher_index(teacher)
        layers, items = self._find_captions(rows, captions)
        own = next(layer.number for layer in self.layers if t in layer.teachers)
        late = layers < own  # a teacher that came later holds all captions of before, by their run-on numbers
        return self._vectors(f"text.{t}", t, rows, np.where(late, own, layers), np.where(late, captions, items))

    def augmentation(self, rows: np.ndarray, augs: np.ndarray) -> np.ndarray:
        """rows (B,), augs (B,) -> uint8 (B, 16), for `distill.augment.apply`."""
        rows, augs = self._check(rows, augs, self.n_augmentations, "augmentation")
        layers, items = self._view_places[0]
        out = np.empty((len(rows), PARAMETER_BYTES), np.uint8)
        self._copy(["augmentations"], [out], rows, layers[augs], items[augs])
        return out

    def caption(self, row: int, j: int) -> Caption:
        """Caption j of a row. Raises StoreError when there is none."""
        rows, captions = self._check(np.asarray([row]), np.asarray([j]), self.caption_counts, "caption")
        layers, items = self._find_captions(rows, captions)
        number = bisect_right(self._edges, int(rows[0])) - 1
        part, local, item = self._stack(number).parts[int(layers[0])], int(rows[0]) - self._edges[number], int(items[0])
        start, stop = part.get("captions.offsets")[local, item : item + 2].tolist()
        try:
            return Caption(
                text=part.get("captions.bytes")[start:stop].tobytes().decode(),
                type=TYPES[part.get("captions.types")[local, item]],
                source=self.index["sources"][part.get("captions.sources")[local, item]],
                language=self.index["languages"][part.get("captions.languages")[local, item]],
                parent=int(part.get("captions.parents")[local, item]),
                sentence=int(part.get("captions.sentences")[local, item]),
            )
        except (IndexError, UnicodeDecodeError) as error:
            raise StoreError(f"store part '{part.path.name}' holds an unreadable caption at row {local} ({error}); reinforce again") from None

    def caption_types(self, rows: np.ndarray) -> np.ndarray:
        """rows (B,) -> uint8 (B, C): index into `captions.TYPES` of every caption, 255 beyond a row's count; C = the most captions of these rows."""
        rows = np.atleast_1d(np.asarray(rows, np.int64))
        counts = self.caption_counts[rows]
        out = np.full((len(rows), int(counts.max(initial=0))), 255, np.uint8)
        places, captions = np.nonzero(np.arange(out.shape[1]) < counts[:, None])
        layers, items = self._find_captions(rows[places], captions)
        found = np.empty(len(places), np.uint8)
        self._copy(["captions.types"], [found], rows[places], layers, items)
        out[places, captions] = found
        return out

    def column(self, name: str) -> np.ndarray:
        """A per-sample column (N,) by name. Raises StoreError when there is none."""
        if name not in self.index["columns"]:
            raise StoreError(f"the store has no column '{name}'; it has {', '.join(self.index['columns']) or 'none'}")
        layer = self.index["columns"][name].get("layer", 0)
        found = [np.array(stack.parts[layer].get(f"column.{name}")) for stack in self._stacks()]
        return np.concatenate(found) if found else np.zeros(0, np.float32)

    # ------------------------------------------------------------ where things are

    def _find_views(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Layer and place in it of every view: of its parameters, then of its vectors for each teacher. Each (A,) int64."""
        layers, items = np.zeros((1 + len(self.teachers), self._views), np.int64), np.zeros((1 + len(self.teachers), self._views), np.int64)
        for layer in self.layers:
            span = slice(layer.views.start, layer.views.stop)
            for line in [*([0] if layer.adds_views else []), *(t + 1 for t in layer.teachers)]:
                layers[line, span], items[line, span] = layer.number, np.arange(len(layer.views))
        return list(zip(layers, items, strict=True))

    def _find_captions(self, rows: np.ndarray, captions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Layer and place in it of captions (B,) of rows (B,), by their run-on numbers."""
        layers, items = np.zeros(len(rows), np.int64), captions.copy()
        for layer, starts in zip(self._caption_layers[1:], self._caption_starts[1:], strict=True):
            here = captions >= starts[rows]
            layers[here], items[here] = layer.number, captions[here] - starts[rows[here]]
        return layers, items

    def _gather(self) -> None:
        """Read what is held in memory: keys, pair rows and counts. Opens, and so checks, every part once."""
        keys: list[str] = []
        pair_rows, counts = np.zeros(self._rows, np.int64), np.zeros((len(self._caption_layers), self._rows), np.int64)
        for number, stack in enumerate(self._stacks()):
            span = slice(self._edges[number], self._edges[number + 1])
            keys += stack.parts[0].read_keys()
            pair_rows[span] = stack.parts[0].get("pair_rows")
            for n, layer in enumerate(self._caption_layers):
                counts[n, span] = stack.parts[layer.number].get("n_captions")
        if len(set(keys)) != self._rows:
            raise StoreError(f"store '{self.path}' has {self._rows} rows with {len(set(keys))} different keys; keys must be unique, reinforce again")
        self.keys: list[str] = keys
        self.pair_rows: np.ndarray = pair_rows
        """(N,) int64: row of each sample in the pairs folder that was reinforced."""
        self.n_augmentations: np.ndarray = np.full(self._rows, self._views, np.int64)
        """(N,) int64: stored views of each row, over all layers."""
        self.caption_counts: np.ndarray = counts.sum(axis=0)
        """(N,) int64: captions of each row, over all layers; caption 0 is the pair's own."""
        self._caption_starts: np.ndarray = counts.cumsum(axis=0) - counts

    def _stacks(self) -> Iterator[_Stack]:
        return (self._stack(number) for number in range(len(self._entries)))

    def _stack(self, number: int) -> _Stack:
        """The mapped files of a base part. The one used longest ago is let go when there are too many; views into it stay valid."""
        with self._lock:
            stack = self._open.get(number)
            if stack is not None:
                self._open.move_to_end(number)
                return stack
        stack = self._map(number)  # by two threads at once, at the worst
        with self._lock:
            self._open[number] = stack
            if len(self._open) > self._most_stacks:
                self._open.popitem(last=False)
        return stack

    def _map(self, number: int) -> _Stack:
        parts = [Part(self.path / entry["path"]) for entry in self._entries[number]]
        if number not in self._checked:
            for part, entry, layer in zip(parts, self._entries[number], self.layers, strict=True):
                check_part(part, entry, layer, self.index)
            self._check_late_texts(number, parts)
            self._checked.add(number)
        return _Stack(parts=parts, views=[])

    def _find_arrays(self, stack: _Stack) -> list[tuple[np.ndarray, int, list[tuple[np.ndarray, np.ndarray | None, int]]]]:
        views, parts = [], stack.parts
        for aug in range(self._views):
            (layer, item), *teachers = [(int(layers[aug]), int(items[aug])) for layers, items in self._view_places]
            arrays = [(parts[at].arrays[f"image.{t}.embeddings"], parts[at].arrays.get(f"image.{t}.scales"), place) for t, (at, place) in enumerate(teachers)]
            views.append((parts[layer].arrays["augmentations"], item, arrays))
        stack.views = views
        return views

    def _check_late_texts(self, number: int, parts: list[Part]) -> None:
        """A later teacher must have a text vector for every caption that existed before it."""
        for layer, part in zip(self.layers, parts, strict=True):
            if layer.kind == "teachers" and self._entries[number][0]["rows"]:
                earlier = [other.number for other in self.layers[: layer.number] if other.adds_captions]
                most = int(np.sum([parts[n].get("n_captions").astype(np.int64) for n in earlier], axis=0).max())
                if part.get(f"text.{layer.teachers[0]}.embeddings").shape[1] < most:
                    raise StoreError(f"store part '{part.path.name}' has fewer text embeddings than its rows have captions ({most}); append layer {layer.number} again")

    # ------------------------------------------------------------ reading

    def _check(self, rows: np.ndarray, items: np.ndarray, counts: np.ndarray, what: str) -> tuple[np.ndarray, np.ndarray]:
        rows, items = np.atleast_1d(np.asarray(rows, np.int64)), np.atleast_1d(np.asarray(items, np.int64))
        if rows.shape != items.shape or rows.ndim != 1:
            raise StoreError(f"rows {rows.shape} and {what} numbers {items.shape} must be two lists of one length")
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            raise StoreError(f"row {rows.min() if rows.min() < 0 else rows.max()} does not exist; the store has {len(self)} rows")
        bad = np.flatnonzero((items < 0) | (items >= counts[rows]))
        if len(bad):
            raise StoreError(f"row {rows[bad[0]]} has no {what} {items[bad[0]]}; it has {counts[rows[bad[0]]]}")
        return rows, items

    def _vectors(self, name: str, teacher: int, rows: np.ndarray, layers: np.ndarray, items: np.ndarray) -> np.ndarray:
        dim = self.teachers[teacher].dim
        if not len(rows):
            return np.zeros((0, dim), np.float32)
        sample = self._stack(bisect_right(self._edges, int(rows[0])) - 1).parts[int(layers[0])]
        names = [array for array in (f"{name}.embeddings", f"{name}.scales") if array in sample.arrays]
        found = [np.empty((len(rows), *sample.arrays[array].shape[2:]), sample.arrays[array].dtype) for array in names]
        self._copy(names, found, rows, layers, items)
        return unit(decode(found[0], found[1] if len(found) > 1 else None, self.dtype, dim))

    def _copy(self, names: list[str], outs: list[np.ndarray], rows: np.ndarray, layers: np.ndarray, items: np.ndarray) -> None:
        """Fill outs[k][i] with array names[k] at (row, item) of the layer, part by part; then all is decoded at once."""
        numbers = np.searchsorted(self._edges, rows, side="right") - 1
        local = rows - np.asarray(self._edges)[numbers]
        codes = numbers * len(self.layers) + layers
        order = np.argsort(codes, kind="stable")
        ends = np.flatnonzero(np.diff(codes[order], append=-1)) + 1
        start = 0
        for stop in ends.tolist():
            where = order[start:stop]
            number, layer = divmod(int(codes[where[0]]), len(self.layers))
            part = self._stack(number).parts[layer]
            for name, out in zip(names, outs, strict=True):
                array = part.arrays[name]
                if stop - start <= _FEW:
                    for place in where.tolist():
                        out[place] = array[local[place], items[place]]
                else:
                    out[where] = array[local[where], items[where]]
            start = stop


def open_store(path: str | os.PathLike[str], verify: bool = False, max_open: int | None = None) -> Store:
    """Open a store and check that index and parts agree: files, sizes, row counts, shapes, keys; with `verify` also every byte.

    max_open: files mapped at a time; None: as many as half of this process's limit of open files, at most 4096.

    Raises:
        StoreError: no index (reinforcement did not finish), another schema, or any disagreement; the message names the part, and the rows
            where bytes have changed.
    """
    folder = Path(path)
    index = read_index(folder)
    try:
        [TeacherFacts(**facts) for facts in index["teachers"]]
    except TypeError as error:
        raise StoreError(f"'{folder}' has an unusable teacher ({error}); reinforce again") from None
    if verify:
        verify_store(folder)
    return Store(folder, index, max_open or _files_at_a_time())


def _files_at_a_time() -> int:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 4096 if limit == resource.RLIM_INFINITY else max(1, min(4096, limit // 2))
