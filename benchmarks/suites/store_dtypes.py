"""What a narrower store costs: KL divergence of the teachers' affinity rows, and the student's recall, against the float32 that was rounded.

The store is made once in float32 and rewritten in the narrower types, so that they differ in the rounding alone.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.suites.stages import Stages
from benchmarks.suites.student_arms import Arms, arm_figures, train_arms
from distill.affinity import affinity_kl
from distill.store import Store, open_store
from distill.store_writing import INDEX, PartRows, write_index, write_part
from runtime.files import file_sha256

DTYPES = ("bfloat16", "int8", "int4")
ROWS_COMPARED = 1024
"""Of one affinity matrix; KL grows with the number of texts, so it is part of the figure."""


def dtype_figures(out: Path, pairs: Path, judged: Path, teachers: list[Path], arms: Arms, stages: Stages) -> dict[str, Any]:
    """Stores of one sample in every type, their KL, and students of int8 and int4.

    Returns:
        Flat: `affinity_kl_DTYPE` in nats (mean over teachers), `cosine_DTYPE` (smallest), `store_bytes_per_sample_DTYPE`, `recall5_DTYPE…`.
    """
    exact = out / "store-float32"
    stages.run(
        "reinforce-float32",
        [["mobileclip.cli", "reinforce", str(pairs), str(exact), "--teachers", *map(str, teachers), "--augmentations", "5", "--dtype", "float32", "--workers", "2"]],
        inputs=[teacher / "receipt.json" for teacher in teachers], outputs=[exact / INDEX],
    )  # fmt: skip
    figures: dict[str, Any] = {}
    for dtype in DTYPES:
        narrow = open_store(rewrite(exact, out / f"store-{dtype}", dtype))
        figures |= _loss(open_store(exact), narrow, dtype)
    hits = train_arms(arms, {dtype: ["--store", str(out / f"store-{dtype}"), "--recipe", "reinforced"] for dtype in ("int8", "int4")}, stages)
    return figures | arm_figures(hits, "int8", "recall5")


def rewrite(source: Path, target: Path, dtype: str) -> Path:
    """Write a store of one layer again with another dtype. Does nothing when it has been done. Returns the target."""
    store, origin = open_store(source), file_sha256(source / INDEX)
    if (target / INDEX).is_file() and open_store(target).index.get("rewritten_from") == origin:
        return target
    target.mkdir(parents=True, exist_ok=True)
    parts = []
    edges = [0, *itertools.accumulate(entry["rows"] for entry in store.index["parts"])]
    tables = {name: store.index[name] for name in ("sources", "languages")}
    for entry, start, stop in zip(store.index["parts"], edges[:-1], edges[1:], strict=True):
        written = write_part(target / entry["path"], _rows(store, start, stop), dtype=dtype, tables=tables, metadata={"format": "mclip-store"})
        parts.append({**entry, **written})
    write_index(target, {**store.index, "dtype": dtype, "parts": parts, "rewritten_from": origin})
    return target


def _rows(store: Store, start: int, stop: int) -> PartRows:
    views, n = int(store.index["augmentations"]), stop - start
    counts = store.caption_counts[start:stop]
    captions = [[store.caption(row, j) for j in range(count)] for row, count in zip(range(start, stop), counts.tolist(), strict=True)]
    rows, augs = (grid.reshape(-1) for grid in np.meshgrid(np.arange(start, stop), np.arange(views), indexing="ij"))
    places, numbers = np.nonzero(np.arange(counts.max(initial=0)) < counts[:, None])
    texts = []
    for t, facts in enumerate(store.teachers):
        padded = np.zeros((n, int(counts.max(initial=0)), facts.dim), np.float32)
        padded[places, numbers] = store.text_embeddings(t, places + start, numbers)
        texts.append(padded)
    return PartRows(
        keys=store.keys[start:stop], pair_rows=store.pair_rows[start:stop].tolist(), captions=captions,
        augmentations=store.augmentation(rows, augs).reshape(n, views, -1),
        image_embeddings=[store.image_embeddings(t, rows, augs).reshape(n, views, -1) for t in range(len(store.teachers))], text_embeddings=texts,
        columns={name: store.column(name)[start:stop] for name in store.index["columns"]},
    )  # fmt: skip


def _loss(exact: Store, narrow: Store, dtype: str) -> dict[str, Any]:
    rows = np.linspace(0, len(exact) - 1, min(len(exact), ROWS_COMPARED)).astype(np.int64)
    augs, zeros = rows % int(exact.index["augmentations"]), np.zeros_like(rows)
    divergence, smallest = [], 1.0
    for t, facts in enumerate(exact.teachers):
        (image, text), (found_image, found_text) = ((store.image_embeddings(t, rows, augs), store.text_embeddings(t, rows, zeros)) for store in (exact, narrow))
        divergence.append(affinity_kl(image, text, found_image, found_text, facts.logit_scale))
        smallest = min(smallest, float((image * found_image).sum(1).min()), float((text * found_text).sum(1).min()))
    size = sum(entry["bytes"] for entry in narrow.index["parts"]) + (narrow.path / INDEX).stat().st_size
    return {
        f"affinity_kl_{dtype}": float(f"{np.mean(divergence):.3g}"), f"smallest_cosine_{dtype}": round(smallest, 5),
        f"sample_bytes_per_sample_{dtype}": round(size / len(narrow), 1),
    }  # fmt: skip
