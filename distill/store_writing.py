"""Writing a reinforcement store: parts of every kind, the index. Format: docs/store-format.md (normative).

Shapes: n = rows of a part, A = views that it holds, C = most captions of a row in it, D = a teacher's dimension.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from distill.captions import TYPES, Caption
from distill.store_codecs import encode
from distill.store_codecs import from_bfloat16 as from_bfloat16
from distill.store_codecs import quantise as quantise
from distill.store_codecs import to_bfloat16 as to_bfloat16
from distill.store_codecs import unit as unit
from runtime.errors import StoreError
from runtime.files import file_sha256, write_json, write_whole
from runtime.store_index import INDEX, KINDS, SCHEMA, check_index, layer_part_name
from runtime.store_parts import CHECKSUMS, PARAMETER_BYTES, Part, array_checksums, hash_keys, row_checksums, vector_arrays


@dataclass(kw_only=True, slots=True)
class PartRows:
    """What one part holds before it is encoded. Rows are pairs that have a picture and a caption, in pairs order.

    A part of a later layer has the keys of its base part and leaves empty what its kind does not hold.
    """

    keys: list[str]
    pair_rows: list[int]
    """Row of each sample in its pairs folder. Kind "rows" only."""
    augmentations: np.ndarray
    """(n, A, 16) uint8. Kinds "rows" and "augmentations"."""
    captions: list[list[Caption]]
    """Kinds "rows" (at least one a row) and "captions" (a row may have none)."""
    image_embeddings: list[np.ndarray]
    """Per teacher (n, A, D) float32, unit norm; A = all views of the store for kind "teachers". Empty for kind "captions"."""
    text_embeddings: list[np.ndarray]
    """Per teacher (n, at least C, D) float32; what lies beyond a sample's captions is ignored. Empty for kind "augmentations".
    For kind "teachers", C is the largest number of captions that a row has over all layers, in their run-on order."""
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    """Per sample columns (n,), float32 or int32."""


# ---------------------------------------------------------------- parts


def write_part(
    path: Path, rows: PartRows, *, dtype: str, tables: dict[str, list[str]], metadata: dict[str, str], kind: str = "rows", teachers: Sequence[int] | None = None
) -> dict[str, Any]:
    """Write one part under a temporary name and rename it.

    Args:
        path: SHARD.PPPP.safetensors, for a later layer SHARD.PPPP.L.safetensors.
        tables: {"sources": [...], "languages": [...]}: names that captions are stored as indices of.
        metadata: strings for the safetensors header (settings hash, shard, part, hash of the input shard; "layer" for a later layer).
        kind: "rows", "augmentations", "captions" or "teachers".
        teachers: the store's numbers of those whose embeddings are given, in their order. None: 0, 1, 2, …

    Returns:
        The part's entry for index.json, without "shard" facts of the caller.

    Raises:
        StoreError: rows that do not fit the kind or one another, or embeddings that are not finite. Nothing is written.
    """
    layer = _layer_of(path, kind, metadata)
    n, width = len(rows.keys), max((len(captions) for captions in rows.captions), default=0)
    numbers = range(max(len(rows.image_embeddings), len(rows.text_embeddings))) if teachers is None else teachers
    _check_rows(rows, kind, numbers)
    arrays: dict[str, tuple[str, np.ndarray]] = {}
    if kind == "rows":
        arrays |= {"pair_rows": ("I64", np.asarray(rows.pair_rows, "<i8")), **_key_arrays(rows.keys)}
    if kind in ("rows", "augmentations"):
        arrays["augmentations"] = ("U8", np.ascontiguousarray(rows.augmentations, np.uint8))
    if kind in ("rows", "captions"):
        arrays |= {"n_captions": ("U16", np.asarray([len(captions) for captions in rows.captions], "<u2")), **_caption_arrays(rows.captions, width, tables)}
    for t, images in zip(numbers, rows.image_embeddings, strict=False):
        arrays |= _vector_arrays(f"image.{t}", images, dtype)
    for t, texts in zip(numbers, rows.text_embeddings, strict=False):
        if kind != "teachers":
            texts = texts[:, :width].copy()
            for row, captions in enumerate(rows.captions):
                texts[row, len(captions) :] = 0
        arrays |= _vector_arrays(f"text.{t}", texts, dtype)
    for name, column in sorted(rows.columns.items()):
        code = {"f": ("F32", "<f4"), "i": ("I32", "<i4")}[np.asarray(column).dtype.kind]
        arrays[f"column.{name}"] = (code[0], np.asarray(column, code[1]))
    plain = {name: array for name, (_, array) in arrays.items()}
    plain[CHECKSUMS] = row_checksums(plain, n).astype("<u4")
    arrays[CHECKSUMS] = ("U32", plain[CHECKSUMS])
    known = {**metadata, "kind": kind, "layer": str(layer), "keys_sha256": hash_keys(rows.keys), "array_crc32": json.dumps(array_checksums(plain))}
    blob = write_safetensors(path, arrays, known)
    return {**part_entry(path.name, hashlib.sha256(blob).hexdigest(), len(blob), rows.keys), "kind": kind, "layer": layer}


def entry_of(path: Path) -> dict[str, Any]:
    """The entry that `write_part` returned, from the part that it wrote (reads all of it). Raises StoreError."""
    part = Part(path)
    try:
        facts = {"kind": part.metadata["kind"], "layer": int(part.metadata["layer"])}
        keys_sha256 = part.metadata["keys_sha256"]
    except (KeyError, ValueError) as error:
        raise StoreError(f"store part '{path.name}' does not say its {error}; it was written by another version, reinforce again") from None
    return {**facts, "path": path.name, "rows": len(part.get(CHECKSUMS)), "bytes": part.bytes, "sha256": file_sha256(path), "keys_sha256": keys_sha256}


def part_entry(name: str, sha256: str, size: int, keys: list[str]) -> dict[str, Any]:
    """The facts by which index.json knows a part of layer 0; for any layer, `entry_of`."""
    return {"kind": "rows", "layer": 0, "path": name, "rows": len(keys), "bytes": size, "sha256": sha256, "keys_sha256": hash_keys(keys)}


def _layer_of(path: Path, kind: str, metadata: dict[str, str]) -> int:
    layer = int(metadata.get("layer", "0"))
    if kind not in KINDS or (kind == "rows") != (layer == 0):
        raise StoreError(f"a part of kind '{kind}' in layer {layer} cannot be written; layer 0 holds 'rows', later ones (metadata 'layer') {', '.join(KINDS[1:])}")
    if layer and not path.name.endswith(layer_part_name(".safetensors", layer)):
        raise StoreError(f"a part of layer {layer} cannot be named '{path.name}'; expected SHARD.PPPP.{layer}.safetensors")
    return layer


def _check_rows(rows: PartRows, kind: str, teachers: Sequence[int]) -> None:
    n, counts = len(rows.keys), [len(captions) for captions in rows.captions]
    needs = {"rows": (1, 1, 1, 1), "augmentations": (0, 1, 0, 1), "captions": (0, 0, 1, 0), "teachers": (0, 0, 0, 1)}[kind]
    given = (len(rows.pair_rows), len(rows.augmentations), len(counts), max((len(images) for images in rows.image_embeddings), default=0))
    if [n * need for need in needs] != list(given):
        raise StoreError(f"a part of kind '{kind}' with {n} keys was given {given[0]} pair rows, {given[1]} rows of views, {given[2]} of captions, {given[3]} of vectors")
    if rows.augmentations.ndim == 3 and rows.augmentations.shape[2] != PARAMETER_BYTES:
        raise StoreError(f"augmentation parameters have the shape {rows.augmentations.shape}; expected (rows, views, {PARAMETER_BYTES})")
    if kind == "rows" and min(counts, default=1) < 1:
        raise StoreError(f"sample '{rows.keys[counts.index(0)]}' has no caption; caption 0 is the pair's own and must be there")
    lists = {"rows": (1, 1), "augmentations": (1, 0), "captions": (0, 1), "teachers": (1, 1)}[kind]
    if [len(teachers) * have for have in lists] != [len(rows.image_embeddings), len(rows.text_embeddings)]:
        raise StoreError(
            f"a part of kind '{kind}' for {len(teachers)} teachers was given images of {len(rows.image_embeddings)} and texts of {len(rows.text_embeddings)}; "
            f"expected {len(teachers) * lists[0]} and {len(teachers) * lists[1]}"
        )
    width, views = max(counts, default=0), rows.augmentations.shape[1] if kind in ("rows", "augmentations") else None
    for t, images in zip(teachers, rows.image_embeddings, strict=False):
        if images.ndim != 3 or len(images) != n or (views is not None and images.shape[1] != views):
            raise StoreError(f"image embeddings of teacher {t} have the shape {images.shape}; expected ({n}, {'views' if views is None else views}, dimension)")
    for t, texts in zip(teachers, rows.text_embeddings, strict=False):
        if texts.ndim != 3 or len(texts) != n or texts.shape[1] < width:
            raise StoreError(f"text embeddings of teacher {t} have the shape {texts.shape}; expected ({n}, at least {width} captions, dimension)")


def write_safetensors(path: Path, arrays: dict[str, tuple[str, np.ndarray]], metadata: dict[str, str]) -> bytes:
    """Write arrays {name: (safetensors dtype, array)} under a temporary name, flush to disk, rename. Returns the bytes."""
    blob = encode_safetensors(arrays, metadata)
    write_whole(path, blob)
    return blob


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


def _key_arrays(keys: list[str]) -> dict[str, tuple[str, np.ndarray]]:
    items = [key.encode() for key in keys]
    return {"keys.bytes": ("U8", np.frombuffer(b"".join(items), np.uint8)), "keys.offsets": ("U32", _offsets([0, *map(len, items)]))}


def _offsets(lengths: list[int]) -> np.ndarray:
    offsets = np.cumsum(lengths, dtype=np.int64)
    if offsets[-1] >= 1 << 32:
        raise StoreError(f"the strings of one part take {offsets[-1]} bytes, more than 4 GB; write fewer rows a part")
    return offsets.astype("<u4")


def _caption_arrays(captions: list[list[Caption]], width: int, tables: dict[str, list[str]]) -> dict[str, tuple[str, np.ndarray]]:
    n = len(captions)
    fields = {name: (code, np.full((n, width), fill, kind)) for name, code, fill, kind in (
        ("types", "U8", 0, "u1"), ("sources", "U8", 0, "u1"), ("languages", "U16", 0, "<u2"), ("parents", "I16", -1, "<i2"), ("sentences", "I16", -1, "<i2"),
    )}  # fmt: skip
    sources, languages = ({name: number for number, name in enumerate(tables[table])} for table in ("sources", "languages"))
    if len(sources) > 256 or len(languages) > 65536 or width > 32767:
        raise StoreError(f"a store holds at most 256 sources, 65536 languages and 32767 captions a row, found {len(sources)}, {len(languages)} and {width}")
    texts = [[caption.text.encode() for caption in made] for made in captions]
    lengths = np.zeros((n, width), np.int64)
    for row, made in enumerate(captions):
        lengths[row, : len(made)] = [len(text) for text in texts[row]]
        for j, caption in enumerate(made):
            try:
                found = (TYPES.index(caption.type), sources[caption.source], languages[caption.language], caption.parent, caption.sentence)
            except (KeyError, ValueError):
                raise StoreError(f"caption type '{caption.type}', source '{caption.source}' or language '{caption.language}' is in no table of the store") from None
            for (_, values), value in zip(fields.values(), found, strict=True):
                values[row, j] = value
    starts = _offsets([0, *lengths.sum(axis=1).tolist()])[:-1, None]
    return {
        "captions.bytes": ("U8", np.frombuffer(b"".join(text for made in texts for text in made), np.uint8)),
        "captions.offsets": ("U32", np.concatenate([starts, starts + lengths.cumsum(axis=1)], axis=1).astype("<u4")),
        **{f"captions.{name}": found for name, found in fields.items()},
    }


def _vector_arrays(name: str, vectors: np.ndarray, dtype: str) -> dict[str, tuple[str, np.ndarray]]:
    if not np.isfinite(vectors).all():
        raise StoreError(f"embeddings '{name}' hold values that are not finite; the teacher is broken or overflows, nothing was stored")
    values, scales = encode(vectors, dtype)
    codes = {array: code for array, (code, _) in vector_arrays(name, dtype, vectors.shape[-1]).items()}
    found = {f"{name}.embeddings": values, **({f"{name}.scales": scales} if scales is not None else {})}
    return {array: (codes[array], np.ascontiguousarray(values)) for array, values in found.items()}


# ---------------------------------------------------------------- index


def base_layer(views: int, teachers: int, **facts: Any) -> dict[str, Any]:
    """Entry of layer 0 in the index's `layers`; facts: settings_sha256, augmentation, augmentations, seed, captioner, …"""
    return {"number": 0, "kind": "rows", "views": [0, views], "teachers": list(range(teachers)), **facts}


def next_layer(index: dict[str, Any], kind: str, added: int = 0, **facts: Any) -> dict[str, Any]:
    """Entry of the layer that follows an index's last. added: views of kind "augmentations", teachers of kind "teachers", else 0."""
    views, teachers = index["augmentations"], len(index["teachers"])
    span = {"augmentations": [views, views + added], "captions": None, "teachers": [0, views]}[kind]
    numbers = range(teachers, teachers + added) if kind == "teachers" else range(teachers)
    return {"number": len(index["layers"]), "kind": kind, "views": span, "teachers": list(numbers), **facts}


def write_index(folder: Path, index: dict[str, Any]) -> None:
    """Write index.json under a temporary name and rename it: the act that makes a folder a store, or a layer a part of it.

    `layers` and `augmentations` may be left out by a store of one layer; they follow from its first part.

    Raises:
        StoreError: no reader would accept it; nothing was written.
    """
    index = {"schema": SCHEMA, "kind": "store", "columns": {}, **index}
    if "layers" not in index:
        views = Part(folder / index["parts"][0]["path"]).get("augmentations").shape[1] if index["parts"] else 0
        facts = {name: index[name] for name in ("settings_sha256", "augmentation", "augmentations", "seed", "captioner") if name in index}
        index |= {"augmentations": views, "layers": [base_layer(views, len(index["teachers"]), **facts)]}
    check_index(index, f"the index of '{folder}'")
    write_json(folder / INDEX, index)


def hash_shards(pairs: Any) -> dict[str, str]:
    """sha256 of every shard of an open pairs folder, by shard name."""
    return {shard.name: file_sha256(shard.path) for shard in pairs.shards}
