"""A tiny world drawn by code: pictures of coloured shapes, and a store that a teacher who knows them has written."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from distill.augment import AugmentSpec, sample_parameters
from distill.captions import Caption, captions_of
from distill.store import PartRows, hash_shards, unit, write_index, write_part
from runtime.pairs import open_pairs, write_shard

COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (40, 80, 220), "yellow": (230, 200, 30)}
SHAPES = ("disc", "square", "stripe")


def draw(colour: str, shape: str, rng: np.random.Generator) -> bytes:
    picture = Image.new("RGB", (48, 48), tuple(int(v) for v in rng.integers(200, 256, 3)))
    pen, box = ImageDraw.Draw(picture), tuple(int(v) for v in (rng.integers(2, 10), rng.integers(2, 10), rng.integers(36, 46), rng.integers(36, 46)))
    if shape == "disc":
        pen.ellipse(box, fill=COLOURS[colour])
    elif shape == "square":
        pen.rectangle(box, fill=COLOURS[colour])
    else:
        pen.line(box, fill=COLOURS[colour], width=12)
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


def make_pairs(folder: Path, copies: int = 4, seed: int = 0) -> Path:
    """`copies` shards of 12 pairs each."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for copy in range(copies):
        samples = []
        for n, (colour, shape) in enumerate((c, s) for c in COLOURS for s in SHAPES):
            meta = {"concept": f"{colour}-{shape}", "held_out": False, "slice": "main", "group": shape}
            samples.append((f"s{copy}-{n:02}", {"png": draw(colour, shape, rng), "txt": f"a {colour} {shape}".encode(), "json": json.dumps(meta).encode()}))
        write_shard(folder / f"{copy:05}.tar", samples)
    return folder


def make_store(
    folder: Path, pairs_folder: Path, views: int = 2, dims: tuple[int, ...] = (16, 24), more: Callable[[int, str], list[Caption]] = lambda row, caption: []
) -> Path:
    """What perfect teachers would store: one direction a colour, one a shape, the same for pictures and texts. more: further captions of a row."""
    pairs, rng = open_pairs(pairs_folder), np.random.default_rng(7)
    folder.mkdir(parents=True, exist_ok=True)
    words = {word: [rng.standard_normal(dim) for dim in dims] for word in (*COLOURS, *SHAPES)}
    entries = []
    for number, shard in enumerate(pairs.shards):
        rows = range(shard.start, shard.stop)
        truth = [unit(np.stack([sum(words[word][k] for word in pairs.caption(row).split()[1:]) for row in rows]).astype(np.float32)) for k in range(len(dims))]
        captions = [captions_of(pairs.caption(row), ("drawing",)) + more(row, pairs.caption(row)) for row in rows]
        width = max(len(found) for found in captions)
        made = PartRows(
            keys=[pairs.keys[row] for row in rows], pair_rows=list(rows), captions=captions,
            augmentations=np.stack([[np.frombuffer(sample_parameters(rng, AugmentSpec(), (48, 48)), np.uint8) for _ in range(views)] for _ in rows]),
            image_embeddings=[np.repeat(vectors[:, None], views, axis=1) for vectors in truth],
            text_embeddings=[np.repeat(vectors[:, None], width, axis=1) for vectors in truth], columns={},
        )  # fmt: skip
        tables = {"sources": ["pairs", "drawing", "captioner"], "languages": ["en"]}
        entries.append({"kind": "rows", **write_part(folder / f"{shard.name}.{number:04}.safetensors", made, dtype="int8", tables=tables, metadata={"part": str(number)})})
    write_index(folder, {
        "rows": len(pairs), "dtype": "int8", "seed": 0, "teachers": [{"name": f"t{n}", "dim": dim, "logit_scale": 20.0, "licence": "test"} for n, dim in enumerate(dims)],
        "parts": entries, "columns": {}, "sources": ["pairs", "drawing", "captioner"], "languages": ["en"], "shards": hash_shards(pairs),
    })  # fmt: skip
    return folder
