"""Two baselines without a model of text: look the caption up among the training captions, then find the picture that looks most like theirs.

(a) `thumbnail_baseline`: pictures compared as 8 x 8 thumbnails. (b) `lookup` with any other picture features, e.g. those of an ImageNet backbone,
which the caller passes as arrays. Both answer only captions that occur in the training pairs, letter for letter (but for case and space): a
concept that was held out gets no answer, which counts as recall 0 and is said in the result ("answered"). A student that is not ahead of them
has only memorised.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from runtime.errors import ClipError, ImageError
from runtime.evaluation import Gallery, embed_gallery, interval, right_answers, split_rows
from runtime.metrics import TIE
from runtime.pairs import Pairs

SIDE = 8
SIMILARITIES = ("euclidean", "cosine")


class BaselineError(ClipError):
    """A baseline was given features and captions that do not belong together."""


class Thumbnails:
    """The picture half of an encoder: 8 x 8 RGB means less the colour of the border, 192 numbers from -1 to 1.

    The background says nothing of the thing; left in, it decides what is near (on the sample's validation style, recall@5 0.19 instead of 0.26).
    A baseline should be as good as its idea allows.
    """

    def encode_image(self, images: Sequence[Image.Image]) -> np.ndarray:
        """RGB pictures -> float32 (B, 192)."""
        made = np.zeros((len(images), SIDE, SIDE, 3), np.float32)
        for n, image in enumerate(images):
            made[n] = np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX), np.float32) / 255
        border = np.concatenate([made[:, 0], made[:, -1], made[:, 1:-1, 0], made[:, 1:-1, -1]], axis=1)
        return (made - np.median(border, axis=1)[:, None, None]).reshape(len(made), -1)

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        """Refused: this is what a baseline lacks."""
        raise BaselineError(f"thumbnails know no text, {len(texts)} were asked for; use thumbnail_baseline")


def thumbnail_baseline(train: Pairs, test: Pairs, *, captions: Sequence[str] | None = None, ks: Sequence[int] = (1, 5, 10), seed: int = 0) -> dict[str, Any]:
    """Baseline (a): 8 x 8 thumbnails.

    Args:
        train: pairs whose captions are looked up, as they are (with the noise of web-like pairs).
        test: the gallery; its labels are the queries.
        captions: others for the training rows, e.g. clean ones; one a row.

    Returns:
        See `lookup`. Training pictures that do not decode are left out.
    """
    if captions is not None and len(captions) != len(train):
        raise BaselineError(f"{len(captions)} captions were given for {len(train)} training pairs; give one for each")
    encoder = Thumbnails()
    features, kept = [], []
    for row in range(len(train)):
        try:
            features.append(encoder.encode_image([train.image(row)])[0])
        except ImageError:
            continue
        kept.append(captions[row] if captions is not None else train.caption(row) if train.has_caption(row) else "")
    if not features:
        raise BaselineError("no training picture decodes, so there is nothing to look up; check the training pairs")
    return lookup(np.stack(features), kept, embed_gallery(encoder, test), similarity="cosine", ks=ks, seed=seed)


def lookup(
    train_features: np.ndarray,
    train_captions: Sequence[str],
    gallery: Gallery,
    *,
    similarity: str = "cosine",
    ks: Sequence[int] = (1, 5, 10),
    seed: int = 0,
) -> dict[str, Any]:
    """Baseline (b), and the core of (a): query -> training pictures with that caption -> gallery pictures by nearness to the nearest of them.

    Args:
        train_features: (N, D) float, one row a training picture.
        train_captions: N captions.
        gallery: the test pictures with features of the same kind as `embeddings` (`runtime.evaluation.embed_gallery` makes it from anything
            that has encode_image).
        similarity: "cosine", or "euclidean" for features whose length means something.

    Returns:
        The members of `runtime.evaluation.retrieval` (so the two can be compared query by query), and in each split "answered": the share of
        queries whose text (text to image), or whose right text (image to text), occurs in the training captions.

    Raises:
        BaselineError: counts or widths that do not fit, values that are not finite.
    """
    captions = [_key(caption) for caption in train_captions]
    if train_features.ndim != 2 or len(captions) != len(train_features) or not captions:
        raise BaselineError(f"expected one row of features for each of the {len(captions)} captions (at least one), found shape {train_features.shape}")
    if train_features.shape[1] != gallery.embeddings.shape[1]:
        raise BaselineError(f"training features have width {train_features.shape[1]}, those of the gallery {gallery.embeddings.shape[1]}; use the same kind for both")
    if similarity not in SIMILARITIES:
        raise BaselineError(f"unknown similarity '{similarity}', expected one of {', '.join(SIMILARITIES)}")
    if not (np.isfinite(train_features).all() and np.isfinite(gallery.embeddings).all()):
        raise BaselineError("some features are not finite; compute them again")
    near = _nearness(np.asarray(train_features, np.float64), np.asarray(gallery.embeddings, np.float64), similarity)
    rows_of: dict[str, list[int]] = defaultdict(list)
    for row, caption in enumerate(captions):
        rows_of[caption].append(row)
    texts = list(dict.fromkeys(gallery.texts))
    scores = np.full((len(texts), len(gallery.keys)), -np.inf)
    for position, text in enumerate(texts):
        rows = rows_of.get(_key(text))
        if rows:
            scores[position] = near[rows].max(axis=0)
    return _result(scores, texts, gallery, ks, seed)


def _result(scores: np.ndarray, texts: list[str], gallery: Gallery, ks: Sequence[int], seed: int) -> dict[str, Any]:
    """Recalls from a (texts, pictures) score matrix, with the rules of `runtime.evaluation.retrieval`; a row of -inf has no answer."""
    position = {text: n for n, text in enumerate(texts)}
    pictures_of, texts_of, groups_of = right_answers(gallery, position)
    known = np.isfinite(scores).any(axis=1)
    result: dict[str, Any] = {"text_to_image": {}, "image_to_text": {}}
    found: dict[str, dict[str, list[int]]] = {"text_to_image": {}, "image_to_text": {}}
    queries: dict[str, dict[str, list[str]]] = {"text_to_image": {}, "image_to_text": {}}
    for split, rows in split_rows(gallery.meta).items():
        asked = list(dict.fromkeys(gallery.texts[n] for n in rows))
        right = [sorted(n for group in groups_of[text] for n in pictures_of[group]) for text in asked]
        there = _ranks(scores[[position[text] for text in asked]], right)
        right_texts = [sorted(texts_of[gallery.groups[n]]) for n in rows]
        back = _ranks(scores.T[rows], right_texts)
        answered = {"text_to_image": np.mean([known[position[text]] for text in asked]), "image_to_text": np.mean([known[t].any() for t in right_texts])}
        for direction, ranks, names in (("text_to_image", there, asked), ("image_to_text", back, [gallery.keys[n] for n in rows])):
            result[direction][split] = {
                "n": len(ranks),
                **{f"recall@{k}": interval(ranks <= k, seed) for k in ks},
                "median_rank": float(np.median(ranks)),
                "answered": float(answered[direction]),
            }
            found[direction][split], queries[direction][split] = ranks.tolist(), names
    facts = {"count": len(gallery.keys), "texts": len(texts), "sha256": gallery.sha256}
    return {**result, "gallery": facts, "skipped": gallery.skipped, "ranks": found, "queries": queries}


def _ranks(scores: np.ndarray, targets: Sequence[Sequence[int]]) -> np.ndarray:
    """Rank of the best right item of every row; ties count against it, and a right item without a score comes last."""
    made = np.empty(len(scores), np.int64)
    for n, (row, right) in enumerate(zip(scores, targets, strict=True)):
        best = row[list(right)].max()
        others = np.delete(row, list(right))
        made[n] = 1 + (np.count_nonzero(others >= best - TIE) if np.isfinite(best) else len(row) - 1)
    return made


def _nearness(train: np.ndarray, gallery: np.ndarray, similarity: str) -> np.ndarray:
    """(N, G), larger is nearer."""
    if similarity == "cosine":
        train, gallery = (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12) for rows in (train, gallery))
        return train @ gallery.T
    squares = (train**2).sum(axis=1)[:, None] + (gallery**2).sum(axis=1)[None] - 2 * train @ gallery.T
    return -np.sqrt(np.maximum(squares, 0))


def _key(caption: str) -> str:
    return " ".join(caption.casefold().split())
