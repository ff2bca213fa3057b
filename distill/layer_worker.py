"""What a worker does for a layer that is added to a store: one part beside one base part, with the same rows in the same order."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from distill import augment
from distill.captions import Caption
from distill.reinforce_captions import given_captions
from distill.reinforce_tasks import LayerTask, PartDone
from distill.reinforce_worker import decode_threads, draw_views, embed_distinct, found_done, loaded_teachers, padded_texts, said_plainly, shard_pairs
from distill.store import Store
from distill.store_writing import PartRows, write_part
from distill.view_embedding import Draw, embed_views
from runtime.errors import StoreError


def embed_layer(task: LayerTask) -> PartDone:
    """Make one part of a layer, or find that a former run did.

    Raises:
        StoreError: a row of the base part cannot be given what the layer adds. A layer has no room for a missing row.
    """
    if (done := found_done(task)) is not None:
        return done
    seconds = Counter[str]()
    base = Store(Path(task.store), task.index, max_open=64)
    rows = PartRows(keys=list(base.keys), pair_rows=[], augmentations=np.zeros((0, 0, augment.PACKED_BYTES), np.uint8), captions=[], image_embeddings=[], text_embeddings=[])
    if task.kind == "captions":
        _add_captions(task, base, rows, seconds)
    else:
        _add_views(task, base, rows, seconds)
    clock = time.thread_time()
    with said_plainly(Path(task.path)):
        entry = write_part(Path(task.path), rows, dtype=task.dtype, tables=task.tables, metadata=task.metadata, kind=task.kind, teachers=task.teachers)
    seconds["write"] += time.thread_time() - clock
    return PartDone(entry=entry, skipped=[], seconds=dict(seconds))


def _teachers(task: LayerTask) -> list[Any]:
    loaded = loaded_teachers()
    return [loaded[n] for n in task.loaded]


def _add_views(task: LayerTask, base: Store, rows: PartRows, seconds: Counter[str]) -> None:
    """New views by the teachers of the store, or its own views by new teachers, who also read its captions."""
    pairs, numbers = shard_pairs(task.place), range(*task.views)
    place_of = {key: row for row, key in enumerate(pairs.keys)}
    missing = [key for key in rows.keys if key not in place_of]
    if missing:
        raise StoreError(f"the sample '{missing[0]}' of the store is not in shard {task.place.name}; name the pairs that were reinforced")

    def fresh(place: int, size: tuple[int, int]) -> np.ndarray:
        return draw_views(task.seed, rows.keys[place], numbers, task.spec, size)

    def stored(place: int, size: tuple[int, int]) -> np.ndarray:
        return base.augmentation(np.full(len(numbers), place), np.asarray(numbers))

    adds_teachers = task.kind == "teachers"
    draw: Draw = stored if adds_teachers else fresh
    pictures = ((n, pairs.image_bytes(place_of[key])) for n, key in enumerate(rows.keys))
    found = embed_views(_teachers(task), pictures, draw, len(numbers), threads=decode_threads(), seconds=seconds)
    if found.failures:
        place, reason = next(iter(sorted(found.failures.items())))
        raise StoreError(f"sample '{rows.keys[place]}' of shard {task.place.name} is in the store, but {reason}; nothing was added")
    rows.image_embeddings = found.vectors
    if adds_teachers:
        made = [[base.caption(row, j) for j in range(int(base.caption_counts[row]))] for row in range(len(base))]
        rows.text_embeddings = _texts(task, made, seconds)
    else:
        rows.augmentations = found.packed


def _add_captions(task: LayerTask, base: Store, rows: PartRows, seconds: Counter[str]) -> None:
    for row, key in enumerate(rows.keys):
        own = base.caption(row, 0).type == "raw"
        found = given_captions(task.given, task.place.name, key, 0 if not own else int(base.caption_counts[row]))
        rows.captions.append(found if own else _behind(found, int(base.caption_counts[row])))
    rows.text_embeddings = _texts(task, rows.captions, seconds)


def _behind(captions: list[Caption], count: int) -> list[Caption]:
    """Captions whose parents count from 0, as they stand behind `count` others."""
    return [dataclasses.replace(caption, parent=caption.parent + count) if caption.parent >= 0 else caption for caption in captions]


def _texts(task: LayerTask, captions: list[list[Caption]], seconds: Counter[str]) -> list[np.ndarray]:
    """Per teacher of the task (n, C, D)."""
    clock = time.thread_time()
    known = embed_distinct([caption.text for made in captions for caption in made])
    teachers = loaded_teachers()
    out = []
    for n in task.loaded:
        dim = teachers[n].facts.dim
        vectors = [np.stack([known[caption.text][n] for caption in made]) if made else np.zeros((0, dim), np.float32) for made in captions]
        bad = [row for row, found in enumerate(vectors) if not np.isfinite(found).all()]
        if bad:
            raise StoreError(f"teacher '{teachers[n].facts.name}' gave no finite embedding for a caption of row {bad[0]} of shard {task.place.name}; nothing was added")
        out.append(padded_texts(vectors, dim))
    seconds["texts"] += time.thread_time() - clock
    return out
