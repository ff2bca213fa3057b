"""Stores of random vectors for tests, with any layers on top, and what must be read from them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from distill.captions import Caption, captions_of
from distill.store_codecs import unit
from distill.store_writing import PartRows, base_layer, next_layer, write_index, write_part

TABLES = {"sources": ["pairs", "emoji", "captioner"], "languages": ["en", "cs"]}
VIEWS = 3
FLOOR = {"float32": 0.9999995, "float16": 0.999999, "bfloat16": 0.99999, "int8": 0.9999, "int4": 0.99}
"""Cosine that a stored vector must keep."""


@dataclass(kw_only=True, slots=True)
class Truth:
    """What was written. images: per teacher (N, A, D); texts: per teacher and row (captions, D); parameters (N, A, 16)."""

    keys: list[str]
    images: list[np.ndarray]
    texts: list[list[np.ndarray]]
    captions: list[list[Caption]]
    parameters: np.ndarray
    columns: dict[str, np.ndarray] = field(default_factory=dict)


def vectors(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return unit(rng.standard_normal(shape, dtype=np.float32))


def make_rows(rng: np.random.Generator, start: int, count: int, dims: tuple[int, ...]) -> PartRows:
    captions = [captions_of(f"caption {start + n} of é猫", ("emoji",) if n % 2 else ()) for n in range(count)]
    return PartRows(
        keys=[f"key-{start + n}" for n in range(count)], pair_rows=[2 * (start + n) for n in range(count)], captions=captions,
        augmentations=rng.integers(0, 255, (count, VIEWS, 16), dtype=np.uint8),
        image_embeddings=[vectors(rng, count, VIEWS, dim) for dim in dims], text_embeddings=[vectors(rng, count, 2, dim) for dim in dims],
        columns={"similarity": rng.standard_normal(count).astype(np.float32)},
    )  # fmt: skip


def make_store(folder: Path, dtype: str = "int8", dims: tuple[int, ...] = (24, 40), counts: tuple[int, ...] = (5, 0, 7)) -> Truth:
    """Layer 0: one part a count, all of shard 's'. Views of row r have random parameters (no real ones); every second row has two captions."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, made, entries, start = np.random.default_rng(1), [], [], 0
    for n, count in enumerate(counts):
        rows = make_rows(rng, start, count, dims)
        entry = write_part(folder / f"s.{n:04d}.safetensors", rows, dtype=dtype, tables=TABLES, metadata={"shard": "s", "part": str(n)})
        entries.append({**entry, "shard": "s", "part": n})
        made.append(rows)
        start += count
    write_index(folder, {
        "rows": start, "dtype": dtype, "seed": 0, "teachers": [{"name": f"t{n}", "dim": dim, "logit_scale": 20.0} for n, dim in enumerate(dims)], "parts": entries,
        "columns": {"similarity": {"version": 1, "dtype": "float32"}}, "layers": [base_layer(VIEWS, len(dims), seed=0)], "augmentations": VIEWS, **TABLES,
        "coverage": {"pairs": start + 1, "rows": start, "skipped": 1}, "skipped": [{"key": "gone", "shard": "s", "reason": "no picture"}], "shards": {"s": "0" * 64},
    })  # fmt: skip
    captions = [caption for part in made for caption in part.captions]
    texts = [[vector[: len(own)] for vector, own in zip(np.concatenate([part.text_embeddings[t] for part in made]), captions, strict=True)] for t in range(len(dims))]
    return Truth(
        keys=[key for part in made for key in part.keys], images=[np.concatenate([part.image_embeddings[t] for part in made]) for t in range(len(dims))],
        texts=texts, captions=captions, parameters=np.concatenate([part.augmentations for part in made]),
        columns={"similarity": np.concatenate([part.columns["similarity"] for part in made])},
    )  # fmt: skip


def append_layer(folder: Path, truth: Truth, kind: str, seed: int, dim: int = 16) -> None:
    """Two more views, zero to two more captions a row, or one more teacher of `dim`, with a column of its own; `truth` grows with the store."""
    index, rng = json.loads((folder / "index.json").read_text()), np.random.default_rng(seed)
    number, n = len(index["layers"]), len(truth.keys)
    dims = [teacher["dim"] for teacher in index["teachers"]]
    base = [entry for entry in index["parts"] if entry["kind"] == "rows"]
    nothing = {"pair_rows": [], "captions": [], "augmentations": np.zeros((0, 0, 16), np.uint8), "image_embeddings": [], "text_embeddings": []}
    if kind == "augmentations":
        parameters, images = rng.integers(0, 255, (n, 2, 16), dtype=np.uint8), [vectors(rng, n, 2, dim) for dim in dims]
        truth.parameters = np.concatenate([truth.parameters, parameters], axis=1)
        truth.images = [np.concatenate([old, new], axis=1) for old, new in zip(truth.images, images, strict=True)]
        index["augmentations"] += 2
    elif kind == "captions":
        made = [[Caption(text=f"made {seed} {row} {j}", type="synthetic", source="captioner", language="cs", parent=0, sentence=j) for j in range(row % 3)] for row in range(n)]
        texts = [vectors(rng, n, 2, dim) for dim in dims]
        for row, own in enumerate(made):
            truth.captions[row] = truth.captions[row] + own
            for t, found in enumerate(texts):
                truth.texts[t][row] = np.concatenate([truth.texts[t][row], found[row, : len(own)]])
    else:
        width = max(len(own) for own in truth.captions)
        image, text = vectors(rng, n, truth.parameters.shape[1], dim), vectors(rng, n, width, dim)
        truth.images.append(image)
        truth.texts.append([text[row, : len(own)] for row, own in enumerate(truth.captions)])
        index["teachers"].append({"name": f"t{len(dims)}", "dim": dim, "logit_scale": 30.0})
    added = {"augmentations": 2, "captions": 0, "teachers": 1}[kind]
    layer = next_layer({**index, "teachers": index["teachers"][: len(dims)], "augmentations": index["augmentations"] - 2 * (kind == "augmentations")}, kind, added)
    column = rng.standard_normal(n).astype(np.float32)
    truth.columns[f"from-{number}"] = column
    index["columns"][f"from-{number}"] = {"version": 1, "dtype": "float32", "layer": number}
    start = 0
    for entry in base:
        span = slice(start, start + entry["rows"])
        rows = PartRows(keys=truth.keys[span], columns={f"from-{number}": column[span]}, **{
            "augmentations": {**nothing, "augmentations": parameters[span], "image_embeddings": [found[span] for found in images]} if kind == "augmentations" else nothing,
            "captions": {**nothing, "captions": made[span], "text_embeddings": [found[span] for found in texts]} if kind == "captions" else nothing,
            "teachers": {**nothing, "image_embeddings": [image[span]], "text_embeddings": [text[span]]} if kind == "teachers" else nothing,
        }[kind])  # fmt: skip
        path = folder / f"{entry['path'].removesuffix('.safetensors')}.{number}.safetensors"
        metadata = {"shard": "s", "part": str(entry["part"]), "layer": str(number)}
        found_entry = write_part(path, rows, dtype=index["dtype"], tables=TABLES, metadata=metadata, kind=kind, teachers=layer["teachers"])
        index["parts"].append({**found_entry, "shard": "s", "part": entry["part"]})
        start = span.stop
    index["layers"].append(layer)
    write_index(folder, index)


def edit_index(folder: Path, change) -> None:
    index = json.loads((folder / "index.json").read_text())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


def cut(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])
