"""What the teachers of a store say of its pairs: one vector a picture, and how well captions fit.

Several teachers count as one: their unit vectors stand side by side, each divided by the root of their number, so that a product of two
such vectors is the mean of the teachers' cosines. Shapes: B = rows asked for, D = sum of the teachers' dimensions.
"""

from __future__ import annotations

import numpy as np

from distill.store import Store
from distill.store_writing import unit

ROWS_AT_ONCE = 1024


def picture_vectors(store: Store, rows: np.ndarray) -> np.ndarray:
    """rows (B,) -> float32 (B, D), unit norm: the mean over a row's stored views, each teacher's normalised."""
    share = np.float32(len(store.teachers) ** -0.5)
    return np.concatenate([_mean_view(store, teacher, rows) * share for teacher in range(len(store.teachers))], axis=1)


def caption_similarities(store: Store, rows: np.ndarray) -> np.ndarray:
    """rows (B,) -> float32 (B, C): mean over teachers of the cosine between the mean view and each stored caption; NaN beyond a row's captions."""
    counts = store.caption_counts[rows]
    out = np.full((len(rows), int(counts.max(initial=0))), np.nan, np.float32)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        some, where = rows[start : start + ROWS_AT_ONCE], np.arange(start, min(start + ROWS_AT_ONCE, len(rows)))
        pictures = [_mean_view(store, teacher, some) for teacher in range(len(store.teachers))]
        for j in range(out.shape[1]):
            has = np.flatnonzero(counts[where] > j)
            texts = [store.text_embeddings(teacher, some[has], np.full(len(has), j)) for teacher in range(len(store.teachers))]
            out[where[has], j] = np.mean([(picture[has] * text).sum(axis=1) for picture, text in zip(pictures, texts, strict=True)], axis=0)
    return out


def _mean_view(store: Store, teacher: int, rows: np.ndarray) -> np.ndarray:
    counts = store.n_augmentations[rows]
    total = np.zeros((len(rows), store.teachers[teacher].dim), np.float32)
    for view in range(int(counts.max(initial=0))):
        has = np.flatnonzero(counts > view)
        total[has] += store.image_embeddings(teacher, rows[has], np.full(len(has), view))
    return unit(total)
