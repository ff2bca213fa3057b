"""Reading a reinforcement store: rows by mmap, checked against its index. Format: docs/store-format.md (normative).

Shapes: n = rows of a part, N = rows of the store, D = a teacher's dimension, B = rows asked for.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from distill import augment
from distill.captions import TYPES, Caption
from distill.store_writing import INDEX, SCHEMA, from_bfloat16, hash_keys, unit
from distill.store_writing import PartRows as PartRows  # the writing half, for those who know one module
from distill.store_writing import hash_shards as hash_shards
from distill.store_writing import write_index as write_index
from distill.store_writing import write_part as write_part
from runtime.errors import StoreError
from runtime.files import file_sha256

DTYPES = ("int8", "float32", "float16", "bfloat16")
_NUMPY = {"I8": "i1", "U8": "u1", "I16": "<i2", "U16": "<u2", "I32": "<i4", "I64": "<i8", "F16": "<f2", "F32": "<f4", "BF16": "<u2"}
_MAX_HEADER = 16 << 20


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


class Part:
    """One mapped safetensors file. Every array is a view into the mapping: nothing is read before it is indexed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as stream:
                self.bytes = os.fstat(stream.fileno()).st_size
                if self.bytes < 8:
                    raise StoreError(f"store part '{path.name}' has {self.bytes} bytes, which is no safetensors file; reinforce again to replace it")
                data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise StoreError(f"store part '{path.name}' cannot be opened ({error.strerror}); restore it or reinforce again") from None
        (length,) = struct.unpack("<Q", data[:8])
        if length > min(_MAX_HEADER, self.bytes - 8):
            raise StoreError(f"store part '{path.name}' is truncated or no safetensors file: header of {length} bytes in a file of {self.bytes}; reinforce again")
        try:
            header = json.loads(data[8 : 8 + length])
            self._payload = memoryview(data)[8 + length :]
            self.metadata: dict[str, str] = dict(header.pop("__metadata__", {}))
            self.arrays = {name: self._view(data, 8 + length, **entry) for name, entry in header.items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise StoreError(f"store part '{path.name}' is truncated or damaged ({error}); reinforce again to replace it") from None

    def _view(self, data: mmap.mmap, base: int, dtype: str, shape: list[int], data_offsets: list[int]) -> np.ndarray:
        kind = np.dtype(_NUMPY[dtype])
        start, stop = data_offsets
        count = int(np.prod(shape, dtype=np.int64))
        if min(shape, default=0) < 0 or start < 0 or stop - start != count * kind.itemsize or base + stop > self.bytes:
            raise ValueError(f"an array of shape {shape} at bytes {start} to {stop} does not fit a file of {self.bytes} bytes")
        return np.ndarray(shape, kind, buffer=data, offset=base + start)

    def get(self, name: str) -> np.ndarray:
        if name not in self.arrays:
            raise StoreError(f"store part '{self.path.name}' lacks the array '{name}'; it was written by another version or is damaged, reinforce again")
        return self.arrays[name]

    def intact(self) -> bool:
        """Whether the arrays still have the hash that stands in the header (reads all of them)."""
        return hashlib.sha256(self._payload).hexdigest() == self.metadata.get("payload_sha256")

    def read_keys(self) -> list[str]:
        data, offsets = self.get("keys.bytes").tobytes(), self.get("keys.offsets")
        try:
            return [data[a:b].decode() for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
        except UnicodeDecodeError:
            raise StoreError(f"store part '{self.path.name}' holds keys that are not UTF-8; it is damaged, reinforce again") from None


class Store:
    """A store, open for reading. Rows are numbered over all parts, in pairs order; pairs that were skipped have no row.

    Can be pickled (it opens its files again).
    """

    def __init__(self, path: Path, index: dict[str, Any], parts: list[Part]) -> None:
        self.path, self.index, self._parts = path, index, parts
        self.teachers = [TeacherFacts(**facts) for facts in index["teachers"]]
        self.dtype: str = index["dtype"]
        self._starts = np.cumsum([0, *(entry["rows"] for entry in index["parts"])])
        self.keys: list[str] = [key for part in parts for key in part.read_keys()]
        self.pair_rows = self._gather_all("pair_rows").astype(np.int64)
        """(N,) int64: row of each sample in the pairs folder that was reinforced."""
        self.n_augmentations = self._gather_all("n_augmentations").astype(np.int64)
        """(N,) int64: stored views of each row."""
        self.caption_counts = self._gather_all("n_captions").astype(np.int64)
        """(N,) int64: captions of each row; caption 0 is the pair's own."""

    def __len__(self) -> int:
        return int(self._starts[-1])

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

    def image_embeddings(self, teacher: int | str, rows: np.ndarray, augs: np.ndarray) -> np.ndarray:
        """rows (B,), augs (B,) -> float32 (B, D), unit norm."""
        rows, augs = self._check(rows, augs, self.n_augmentations, "augmentation")
        return self._vectors(f"image.{self.teacher_index(teacher)}", self.teachers[self.teacher_index(teacher)].dim, rows, augs)

    def text_embeddings(self, teacher: int | str, rows: np.ndarray, captions: np.ndarray) -> np.ndarray:
        """rows (B,), captions (B,) -> float32 (B, D), unit norm."""
        rows, captions = self._check(rows, captions, self.caption_counts, "caption")
        return self._vectors(f"text.{self.teacher_index(teacher)}", self.teachers[self.teacher_index(teacher)].dim, rows, captions)

    def augmentation(self, rows: np.ndarray, augs: np.ndarray) -> np.ndarray:
        """rows (B,), augs (B,) -> uint8 (B, 16), for `distill.augment.apply`."""
        rows, augs = self._check(rows, augs, self.n_augmentations, "augmentation")
        out = np.empty((len(rows), augment.PACKED_BYTES), np.uint8)
        for part, local, where in self._split(rows):
            out[where] = part.get("augmentations")[local, augs[where]]
        return out

    def caption(self, row: int, j: int) -> Caption:
        """Caption j of a row. Raises StoreError when there is none."""
        rows, _ = self._check(np.asarray([row]), np.asarray([j]), self.caption_counts, "caption")
        number = int(np.searchsorted(self._starts, rows[0], side="right")) - 1
        part, local = self._parts[number], int(rows[0] - self._starts[number])
        start, stop = part.get("captions.offsets")[local, j : j + 2]
        try:
            return Caption(
                text=part.get("captions.bytes")[start:stop].tobytes().decode(),
                type=TYPES[part.get("captions.types")[local, j]],
                source=self.index["sources"][part.get("captions.sources")[local, j]],
                language=self.index["languages"][part.get("captions.languages")[local, j]],
                parent=int(part.get("captions.parents")[local, j]),
                sentence=int(part.get("captions.sentences")[local, j]),
            )
        except (IndexError, UnicodeDecodeError) as error:
            raise StoreError(f"store part '{part.path.name}' holds an unreadable caption at row {local} ({error}); reinforce again") from None

    def column(self, name: str) -> np.ndarray:
        """A per-sample column (N,) by name. Raises StoreError when there is none."""
        if name not in self.index.get("columns", {}):
            raise StoreError(f"the store has no column '{name}'; it has {', '.join(self.index.get('columns', {})) or 'none'}")
        return self._gather_all(f"column.{name}")

    def _gather_all(self, name: str) -> np.ndarray:
        return np.concatenate([part.get(name) for part in self._parts]) if self._parts else np.zeros(0, np.int64)

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

    def _split(self, rows: np.ndarray) -> list[tuple[Part, np.ndarray, np.ndarray]]:
        """Per part that is touched: the part, row numbers inside it, positions in the answer."""
        numbers = np.searchsorted(self._starts, rows, side="right") - 1
        return [
            (self._parts[number], rows[where] - self._starts[number], where)
            for number in np.unique(numbers)
            for where in [np.flatnonzero(numbers == number)]
        ]

    def _vectors(self, name: str, dim: int, rows: np.ndarray, items: np.ndarray) -> np.ndarray:
        out = np.empty((len(rows), dim), np.float32)
        for part, local, where in self._split(rows):
            values = part.get(f"{name}.embeddings")[local, items[where]]
            if self.dtype == "int8":
                out[where] = values.astype(np.float32) * part.get(f"{name}.scales")[local, items[where]].astype(np.float32)[:, None]
            else:
                out[where] = from_bfloat16(values) if self.dtype == "bfloat16" else values
        return unit(out)


def open_store(path: str | os.PathLike[str], verify: bool = False) -> Store:
    """Open a store and check that index and parts agree: files, sizes, row counts, shapes, keys; with `verify` also every sha256.

    Raises:
        StoreError: no index (reinforcement did not finish), another schema, or any disagreement; the message names the part.
    """
    folder = Path(path)
    index = read_index(folder)
    parts = []
    for entry in index["parts"]:
        part = Part(folder / entry["path"])
        if part.bytes != entry["bytes"]:
            raise StoreError(f"store part '{entry['path']}' has {part.bytes} bytes, the index says {entry['bytes']}; it is truncated or changed, reinforce again")
        if verify and (found := file_sha256(part.path)) != entry["sha256"]:
            raise StoreError(f"store part '{entry['path']}' has changed: sha256 {found[:16]}…, the index says {entry['sha256'][:16]}…; reinforce again")
        _check_part(part, entry, index)
        parts.append(part)
    store = Store(folder, index, parts)
    if len(store) != index["rows"] or len(set(store.keys)) != len(store):
        raise StoreError(f"store '{folder}' has {len(store)} rows with {len(set(store.keys))} different keys, the index says {index['rows']}; reinforce again")
    return store


def read_index(folder: Path) -> dict[str, Any]:
    """index.json, checked for schema and the fields that a reader needs. Raises StoreError."""
    path = folder / INDEX
    if not path.is_file():
        raise StoreError(f"'{folder}' is not a finished store: it has no {INDEX}; run mclip reinforce (again, it continues)")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise StoreError(f"'{path}' is not JSON ({error}); reinforce again") from None
    if not isinstance(index, dict) or index.get("schema") != SCHEMA or index.get("kind") != "store":
        found = index.get("schema") if isinstance(index, dict) else type(index).__name__
        raise StoreError(f"'{path}' has schema {found!r}, this release reads store schema {SCHEMA}; update it or reinforce again")
    kinds = {"teachers": list, "parts": list, "rows": int, "dtype": str, "sources": list, "languages": list}
    wrong = [name for name, kind in kinds.items() if not isinstance(index.get(name), kind)]
    facts = {"path": str, "rows": int, "bytes": int, "sha256": str, "keys_sha256": str}
    for n, entry in enumerate(index["parts"] if "parts" not in wrong else []):
        if not isinstance(entry, dict) or any(not isinstance(entry.get(name), kind) for name, kind in facts.items()):
            wrong.append(f"parts[{n}]")
        elif Path(entry["path"]).name != entry["path"]:
            raise StoreError(f"'{path}' names the part '{entry['path']}', which lies outside the store; the index is not to be trusted")
        elif entry.get("kind", "rows") != "rows":
            raise StoreError(f"'{path}' has a part of kind '{entry['kind']}', this release reads 'rows'; update it or reinforce again")
    if wrong or index["dtype"] not in DTYPES:
        raise StoreError(f"'{path}' has unusable fields: {', '.join(wrong) or 'dtype'}; reinforce again")
    try:
        [TeacherFacts(**facts) for facts in index["teachers"]]
    except TypeError as error:
        raise StoreError(f"'{path}' has an unusable teacher ({error}); reinforce again") from None
    return index


def _check_part(part: Part, entry: dict[str, Any], index: dict[str, Any]) -> None:
    n = entry["rows"]
    expected = {"pair_rows": 1, "n_augmentations": 1, "n_captions": 1, "augmentations": 3, "captions.offsets": 2, "captions.types": 2,
                "captions.sources": 2, "captions.languages": 2, "captions.parents": 2, "captions.sentences": 2}  # fmt: skip
    for t in range(len(index["teachers"])):
        expected |= {f"image.{t}.embeddings": 3, f"text.{t}.embeddings": 3}
        expected |= {f"image.{t}.scales": 2, f"text.{t}.scales": 2} if index["dtype"] == "int8" else {}
    expected |= {f"column.{name}": 1 for name in index.get("columns", {})}
    for name, dimensions in expected.items():
        array = part.get(name)
        if array.ndim != dimensions or array.shape[0] != n:
            raise StoreError(f"store part '{entry['path']}': array '{name}' has shape {array.shape}, the index says {n} rows; reinforce again")
    if len(part.get("keys.offsets")) != n + 1 or hash_keys(part.read_keys()) != entry["keys_sha256"]:
        raise StoreError(f"store part '{entry['path']}' holds other keys than the index says; it belongs to another store, reinforce again")
    views, captions = part.get("augmentations").shape[1], part.get("captions.types").shape[1]
    kinds = {"int8": "I8", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    for t, facts in enumerate(index["teachers"]):
        for name, count in ((f"image.{t}", views), (f"text.{t}", captions)):
            array = part.get(f"{name}.embeddings")
            if array.shape != (n, count, facts["dim"]) or array.dtype != np.dtype(_NUMPY[kinds[index["dtype"]]]):
                raise StoreError(
                    f"store part '{entry['path']}': '{name}' is {array.dtype} {array.shape}, the index says {index['dtype']} ({n}, {count}, {facts['dim']}); reinforce again"
                )
    if n and (part.get("n_augmentations").max() > views or part.get("n_captions").max() > captions or part.get("captions.offsets").shape[1] != captions + 1):
        raise StoreError(f"store part '{entry['path']}' counts more augmentations or captions than it holds; it is damaged, reinforce again")
