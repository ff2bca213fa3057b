"""Writing a reinforcement store: vectors to int8 and back, parts, the index. Format: docs/store-format.md (normative).

Shapes: n = rows of a part, A = most augmentations of a row, C = most captions of a row, D = a teacher's dimension.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from distill.captions import TYPES, Caption
from runtime.errors import StoreError
from runtime.files import file_sha256, write_json, write_whole

SCHEMA = 1
INDEX = "index.json"


@dataclass(kw_only=True, slots=True)
class PartRows:
    """What one part holds before it is encoded. Rows are pairs that have a picture and a caption, in pairs order."""

    keys: list[str]
    pair_rows: list[int]
    """Row of each sample in its pairs folder."""
    augmentations: np.ndarray
    """(n, A, 16) uint8."""
    captions: list[list[Caption]]
    image_embeddings: list[np.ndarray]
    """Per teacher (n, A, D) float32, unit norm."""
    text_embeddings: list[np.ndarray]
    """Per teacher (n, at least C, D) float32; what lies beyond a sample's captions is ignored."""
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    """Per sample columns (n,), float32 or int32."""


# ---------------------------------------------------------------- vectors


def quantise(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 (…, D) -> int8 (…, D) and float16 scales (…), so that int8 * scale approximates the vector."""
    scales = (np.abs(vectors).max(axis=-1) / 127).astype(np.float16)
    scales = np.maximum(scales, np.float16(6e-8))  # the smallest half: an all-zero row must not divide by zero
    values = np.rint(vectors / scales.astype(np.float32)[..., None])
    return np.clip(values, -127, 127).astype(np.int8), scales


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 bits as uint16, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits as uint16 -> float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows of unit norm; a zero row stays zero."""
    norm = np.sqrt((vectors * vectors).sum(axis=-1, keepdims=True, dtype=np.float32))
    return vectors / np.maximum(norm, np.float32(1e-12))


# ---------------------------------------------------------------- writing


def write_part(path: Path, rows: PartRows, *, dtype: str, tables: dict[str, list[str]], metadata: dict[str, str]) -> dict[str, Any]:
    """Write one part under a temporary name and rename it.

    Args:
        tables: {"sources": [...], "languages": [...]}: names that captions are stored as indices of.
        metadata: strings for the safetensors header (settings hash, shard, part, hash of the input shard).

    Returns:
        The part's entry for index.json, without "shard" facts of the caller.
    """
    n = len(rows.keys)
    width = max((len(captions) for captions in rows.captions), default=0)
    arrays: dict[str, tuple[str, np.ndarray]] = {
        "pair_rows": ("I64", np.asarray(rows.pair_rows, "<i8")),
        "n_augmentations": ("U16", np.full(n, rows.augmentations.shape[1], "<u2")),
        "n_captions": ("U16", np.asarray([len(captions) for captions in rows.captions], "<u2")),
        "augmentations": ("U8", np.ascontiguousarray(rows.augmentations, np.uint8)),
        **_string_arrays("keys", [key.encode() for key in rows.keys]),
        **_caption_arrays(rows.captions, width, tables),
    }
    for t, (images, texts) in enumerate(zip(rows.image_embeddings, rows.text_embeddings, strict=True)):
        texts = texts[:, :width].copy()
        for row, captions in enumerate(rows.captions):
            texts[row, len(captions) :] = 0
        arrays |= _vector_arrays(f"image.{t}", images, dtype) | _vector_arrays(f"text.{t}", texts, dtype)
    for name, column in sorted(rows.columns.items()):
        code = {"f": ("F32", "<f4"), "i": ("I32", "<i4")}[np.asarray(column).dtype.kind]
        arrays[f"column.{name}"] = (code[0], np.asarray(column, code[1]))
    blob = write_safetensors(path, arrays, metadata)
    return part_entry(path.name, hashlib.sha256(blob).hexdigest(), len(blob), rows.keys)


def write_safetensors(path: Path, arrays: dict[str, tuple[str, np.ndarray]], metadata: dict[str, str]) -> bytes:
    """Write arrays {name: (safetensors dtype, array)} under a temporary name, flush to disk, rename. Returns the bytes."""
    blob = encode_safetensors(arrays, metadata)
    write_whole(path, blob)
    return blob


def part_entry(name: str, sha256: str, size: int, keys: list[str]) -> dict[str, Any]:
    """The facts by which index.json knows a part."""
    return {"path": name, "rows": len(keys), "bytes": size, "sha256": sha256, "keys_sha256": hash_keys(keys)}


def hash_keys(keys: list[str]) -> str:
    """sha256 of the keys, each followed by a line feed."""
    return hashlib.sha256("".join(key + "\n" for key in keys).encode()).hexdigest()


def encode_safetensors(arrays: dict[str, tuple[str, np.ndarray]], metadata: dict[str, str]) -> bytes:
    """A safetensors file in memory with a fixed order: tensors by falling item size, then name; header padded to 8 bytes.

    The metadata gain `payload_sha256`, so that a part can be trusted before there is an index.
    """
    order = sorted(arrays, key=lambda name: (-arrays[name][1].itemsize, name))
    payload = b"".join(np.ascontiguousarray(arrays[name][1]).tobytes() for name in order)
    header: dict[str, Any] = {"__metadata__": dict(sorted({**metadata, "payload_sha256": hashlib.sha256(payload).hexdigest()}.items()))}
    position = 0
    for name in order:
        code, array = arrays[name]
        header[name] = {"dtype": code, "shape": list(array.shape), "data_offsets": [position, position + array.nbytes]}
        position += array.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + payload


def _string_arrays(name: str, items: list[bytes]) -> dict[str, tuple[str, np.ndarray]]:
    offsets = np.cumsum([0, *map(len, items)]).astype("<i8")
    return {f"{name}.bytes": ("U8", np.frombuffer(b"".join(items), np.uint8)), f"{name}.offsets": ("I64", offsets)}


def _caption_arrays(captions: list[list[Caption]], width: int, tables: dict[str, list[str]]) -> dict[str, tuple[str, np.ndarray]]:
    n = len(captions)
    offsets = np.zeros((n, width + 1), "<i8")
    fields = {name: np.full((n, width), fill, code) for name, fill, code in (
        ("types", 0, "u1"), ("sources", 0, "<u2"), ("languages", 0, "<u2"), ("parents", -1, "<i2"), ("sentences", -1, "<i2"),
    )}  # fmt: skip
    text, position = [], 0
    for row, made in enumerate(captions):
        offsets[row] = position
        for j, caption in enumerate(made):
            data = caption.text.encode()
            text.append(data)
            position += len(data)
            offsets[row, j + 1 :] = position
            fields["types"][row, j] = TYPES.index(caption.type)
            fields["sources"][row, j] = tables["sources"].index(caption.source)
            fields["languages"][row, j] = tables["languages"].index(caption.language)
            fields["parents"][row, j] = caption.parent
            fields["sentences"][row, j] = caption.sentence
    codes = {"types": "U8", "sources": "U16", "languages": "U16", "parents": "I16", "sentences": "I16"}
    return {
        "captions.bytes": ("U8", np.frombuffer(b"".join(text), np.uint8)),
        "captions.offsets": ("I64", offsets),
        **{f"captions.{name}": (codes[name], values) for name, values in fields.items()},
    }


def _vector_arrays(name: str, vectors: np.ndarray, dtype: str) -> dict[str, tuple[str, np.ndarray]]:
    if not np.isfinite(vectors).all():
        raise StoreError(f"embeddings '{name}' hold values that are not finite; the teacher is broken or overflows, nothing was stored")
    vectors = np.ascontiguousarray(vectors, np.float32)
    if dtype == "int8":
        values, scales = quantise(vectors)
        return {f"{name}.embeddings": ("I8", values), f"{name}.scales": ("F16", scales)}
    if dtype == "bfloat16":
        return {f"{name}.embeddings": ("BF16", to_bfloat16(vectors))}
    code, kind = {"float32": ("F32", "<f4"), "float16": ("F16", "<f2")}[dtype]
    return {f"{name}.embeddings": (code, vectors.astype(kind))}


def write_index(folder: Path, index: dict[str, Any]) -> None:
    """Write index.json under a temporary name and rename it: the act that makes a folder a store."""
    write_json(folder / INDEX, {"schema": SCHEMA, "kind": "store", **index})


def hash_shards(pairs: Any) -> dict[str, str]:
    """sha256 of every shard of an open pairs folder, by shard name."""
    return {shard.name: file_sha256(shard.path) for shard in pairs.shards}
