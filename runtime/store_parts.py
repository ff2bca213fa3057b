"""The parts of a reinforcement store: mapped safetensors files, checked against the index, and a checksum of every row. numpy only.

Shapes: n = rows of a part, A = views it holds, C = the most captions of a row in it, D = a teacher's dimension, G = scales a vector.
Format: docs/store-format.md (normative).
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from runtime.errors import StoreError
from runtime.store_index import Layer

PARAMETER_BYTES = 16
"""Augmentation parameters of one view."""
CAPTION_TYPES = ("raw", "template", "synthetic", "rewritten", "fused")
CHECKSUMS = "row_crc32"
UNROWED = ("keys.offsets", CHECKSUMS)
"""Arrays that are no row's: each has a checksum of its own, in the header."""

INT4_GROUP = 64
"""Values of a vector that share a scale in int4, where the dimension is a multiple of it."""

_NUMPY = {name: np.dtype(code) for name, code in (
    ("I8", "i1"), ("U8", "u1"), ("I16", "<i2"), ("U16", "<u2"), ("I32", "<i4"), ("U32", "<u4"), ("I64", "<i8"), ("F16", "<f2"), ("F32", "<f4"), ("BF16", "<u2"),
)}  # fmt: skip
_MAX_HEADER = 16 << 20


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
            raise StoreError(f"store part '{path.name}' cannot be opened ({error.strerror or error}); restore it or reinforce again") from None
        (length,) = struct.unpack("<Q", data[:8])
        if length > min(_MAX_HEADER, self.bytes - 8):
            raise StoreError(f"store part '{path.name}' is truncated or no safetensors file: header of {length} bytes in a file of {self.bytes}; reinforce again")
        self.start = 8 + int(length)
        """Where the payload begins."""
        self.codes: dict[str, str] = {}
        """Name of each array to its safetensors dtype."""
        try:
            header = json.loads(data[8 : self.start])
            self.metadata: dict[str, str] = dict(header.pop("__metadata__", {}))
            self.payload = memoryview(data)[self.start :]
            self.arrays = {name: self._view(data, name, **entry) for name, entry in header.items()}
            self._check_tiling([entry["data_offsets"] for entry in header.values()])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            raise StoreError(f"store part '{path.name}' is truncated or damaged in its header ({error}); reinforce again to replace it") from None

    def _view(self, data: mmap.mmap, name: str, dtype: str, shape: list[int], data_offsets: list[int]) -> np.ndarray:
        kind = _NUMPY[dtype]
        start, stop = data_offsets
        if len(shape) > 8 or not all(type(n) is int and 0 <= n <= self.bytes for n in (*shape, start, stop)):
            raise ValueError(f"an array has a shape or bytes that no file of {self.bytes} bytes holds: {str(shape)[:60]}")
        count = math.prod(shape)
        if start < 0 or stop - start != count * kind.itemsize or self.start + stop > self.bytes:
            raise ValueError(f"an array of shape {shape} at bytes {start} to {stop} does not fit a file of {self.bytes} bytes")
        self.codes[name] = dtype
        return np.ndarray(shape, kind, buffer=data, offset=self.start + start)

    def _check_tiling(self, spans: list[list[int]]) -> None:
        at = 0
        for start, stop in sorted(spans):
            if start != at:
                raise ValueError(f"arrays overlap or leave a gap at byte {min(start, at)} of the payload")
            at = stop
        if at != self.bytes - self.start:
            raise ValueError(f"arrays end at byte {at} of a payload of {self.bytes - self.start}")

    def get(self, name: str) -> np.ndarray:
        if name not in self.arrays:
            raise StoreError(f"store part '{self.path.name}' lacks the array '{name}'; it was written by another version or is damaged, reinforce again")
        return self.arrays[name]

    def intact(self) -> bool:
        """Whether the arrays still have the hash that stands in the header (reads all of them)."""
        return hashlib.sha256(self.payload).hexdigest() == self.metadata.get("payload_sha256")

    def read_keys(self) -> list[str]:
        data, offsets = self.get("keys.bytes").tobytes(), self.get("keys.offsets").tolist()
        try:
            return [data[a:b].decode() for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
        except UnicodeDecodeError:
            raise StoreError(f"store part '{self.path.name}' holds keys that are not UTF-8; it is damaged, reinforce again") from None


def hash_keys(keys: list[str]) -> str:
    """sha256 of the keys, each followed by a line feed."""
    return hashlib.sha256("".join(key + "\n" for key in keys).encode()).hexdigest()


# ---------------------------------------------------------------- checksums


def row_checksums(arrays: dict[str, np.ndarray], n: int, rows: np.ndarray | None = None) -> np.ndarray:
    """CRC-32 (zlib's) of each of the n rows (or of those asked for): its bytes of every array in order of name, keys and texts included.

    Returns:
        uint32 (n,) or as many as asked for. A row whose offsets point outside their bytes gets the checksum of what is there.
    """
    names = sorted(name for name in arrays if name not in UNROWED)
    flat: list[tuple[memoryview, int, np.ndarray | None]] = []
    for name in names:
        array = np.ascontiguousarray(arrays[name])
        view = memoryview(array.reshape(-1).view(np.uint8).data) if array.size else memoryview(b"")
        if name == "keys.bytes":
            offsets = arrays["keys.offsets"].astype(np.int64)
            flat.append((view, 0, np.stack([offsets[:-1], offsets[1:]], axis=1)))
        elif name == "captions.bytes":
            flat.append((view, 0, arrays["captions.offsets"][:, [0, -1]].astype(np.int64)))
        else:
            flat.append((view, array.nbytes // n if n else 0, None))
    wanted = range(n) if rows is None else rows.tolist()
    out = np.zeros(len(wanted), np.uint32)
    crc32 = zlib.crc32
    for place, row in enumerate(wanted):
        crc = 0
        for view, stride, spans in flat:
            if spans is None:
                crc = crc32(view[row * stride : (row + 1) * stride], crc)
            else:
                crc = crc32(view[spans[row, 0] : spans[row, 1]], crc)
        out[place] = crc
    return out


def array_checksums(arrays: dict[str, np.ndarray]) -> dict[str, int]:
    """CRC-32 of each array that is no row's, for the header."""
    return {name: zlib.crc32(np.ascontiguousarray(arrays[name]).tobytes()) for name in UNROWED if name in arrays}


# ---------------------------------------------------------------- what a part must hold


def int4_scales(dim: int) -> int:
    """Scales a vector of int4: one for each INT4_GROUP values, one alone where the dimension is no multiple of it."""
    return dim // INT4_GROUP if dim % INT4_GROUP == 0 else 1


def vector_arrays(name: str, dtype: str, dim: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Arrays of one kind of vectors: name to (safetensors dtype, shape after (n, items))."""
    if dtype == "int8":
        return {f"{name}.embeddings": ("I8", (dim,)), f"{name}.scales": ("F16", ())}
    if dtype == "int4":
        return {f"{name}.embeddings": ("U8", (-(-dim // 2),)), f"{name}.scales": ("F16", (int4_scales(dim),))}
    return {f"{name}.embeddings": ({"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype], (dim,))}


def part_arrays(layer: Layer, index: dict[str, Any], captions: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Every array with one entry a row that a part of this layer must hold: name to (safetensors dtype, shape after n). captions: its C."""
    out: dict[str, tuple[str, tuple[int, ...]]] = {CHECKSUMS: ("U32", ())}
    if layer.kind == "rows":
        out |= {"pair_rows": ("I64", ())}
    if layer.adds_captions:
        out |= {"n_captions": ("U16", ()), "captions.offsets": ("U32", (captions + 1,)), "captions.types": ("U8", (captions,))}
        out |= {"captions.sources": ("U8", (captions,)), "captions.languages": ("U16", (captions,))}
        out |= {"captions.parents": ("I16", (captions,)), "captions.sentences": ("I16", (captions,))}
    if layer.adds_views:
        out |= {"augmentations": ("U8", (len(layer.views), PARAMETER_BYTES))}
    for t in layer.teachers:
        kinds = (("image", len(layer.views)) if layer.kind != "captions" else None, ("text", captions) if layer.kind != "augmentations" else None)
        for kind in kinds:
            if kind is not None:
                found = vector_arrays(f"{kind[0]}.{t}", index["dtype"], index["teachers"][t]["dim"])
                out |= {name: (code, (kind[1], *shape)) for name, (code, shape) in found.items()}
    for name, facts in index["columns"].items():
        if facts.get("layer", 0) == layer.number:
            out |= {f"column.{name}": ("F32" if facts.get("dtype", "float32") == "float32" else "I32", ())}
    return out


def check_part(part: Part, entry: dict[str, Any], layer: Layer, index: dict[str, Any]) -> None:
    """Size, shapes, dtypes, keys and counts of a part against its entry in the index; embeddings are not read. Raises StoreError."""
    name, n = entry["path"], entry["rows"]
    if part.bytes != entry["bytes"]:
        raise StoreError(f"store part '{name}' has {part.bytes} bytes, the index says {entry['bytes']}; it is truncated or changed, reinforce again")
    captions = 0
    if layer.kind != "augmentations":
        shape = part.get("captions.types" if layer.adds_captions else f"text.{layer.teachers[0]}.embeddings").shape
        captions = shape[1] if len(shape) > 1 else 0
    for array_name, (code, rest) in part_arrays(layer, index, captions).items():
        array = part.get(array_name)
        if part.codes[array_name] != code or array.shape != (n, *rest):
            raise StoreError(
                f"store part '{name}': '{array_name}' is {part.codes[array_name]} {array.shape}, the index says {code} {(n, *rest)} "
                f"({n} rows, dtype {index['dtype']}); reinforce again"
            )
    if part.metadata.get("keys_sha256") != entry["keys_sha256"]:
        raise StoreError(f"store part '{name}' holds other keys than the index says; it belongs to another store, reinforce again")
    if layer.kind == "rows":
        offsets = part.get("keys.offsets")
        if offsets.shape != (n + 1,) or not _rising(offsets[None], len(part.get("keys.bytes"))) or hash_keys(part.read_keys()) != entry["keys_sha256"]:
            raise StoreError(f"store part '{name}' holds other keys than the index says; it belongs to another store or its keys are damaged, reinforce again")
    if layer.adds_captions and n:
        counts = part.get("n_captions")
        if counts.max() > captions or (layer.kind == "rows" and counts.min() < 1) or not _rising(part.get("captions.offsets"), len(part.get("captions.bytes"))):
            raise StoreError(f"store part '{name}' counts more captions than it holds, or none; it is damaged, reinforce again")


def _rising(offsets: np.ndarray, stop: int) -> bool:
    """Whether offsets (n, k), U32, never fall along a row and stay within `stop` bytes."""
    return offsets.dtype == np.dtype("<u4") and bool((offsets[:, 1:] >= offsets[:, :-1]).all()) and bool((offsets[:, -1] <= stop).all())
