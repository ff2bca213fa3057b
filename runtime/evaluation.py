"""Retrieval and zero-shot figures of anything that embeds pictures and texts, on a pairs folder, with intervals."""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from runtime.errors import ImageError, PairsError
from runtime.metrics import bootstrap_interval, ranks, recall_at_k

if TYPE_CHECKING:
    from PIL import Image

    from runtime.pairs import Pairs

logger = logging.getLogger(__name__)

SLICES = ("keycap", "clock", "flag")
TEMPLATES = ("{}", "a picture of {}", "an emoji of {}", "a drawing that shows {}")
_BATCH = 64


class Encoder(Protocol):
    """What can be evaluated: a `runtime.Clip`, a checkpoint in torch, an ensemble, a baseline."""

    def encode_image(self, images: list[Image.Image]) -> np.ndarray:
        """RGB pictures -> (B, D) float."""
        ...

    def encode_text(self, texts: list[str]) -> np.ndarray:
        """Texts -> (B, D) float."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Gallery:
    """The pictures of a pairs folder that decode, embedded.

    Attributes:
        embeddings: (G, D). rows: their rows in the pairs. keys: their keys.
        texts: the query text of each: the clean label where the sample has one, else the caption.
        groups: what counts as the same thing: the concept where the sample has one, else the text.
        meta: the sample's facts. skipped: keys of pictures that do not decode.
    """

    embeddings: np.ndarray
    rows: list[int]
    keys: list[str]
    texts: list[str]
    groups: list[str]
    meta: list[dict[str, Any]]
    skipped: list[str]

    @property
    def sha256(self) -> str:
        """Hash of the sorted keys, one a line: the same gallery gives the same hash, as in the sample's receipt."""
        return hashlib.sha256("\n".join(sorted(self.keys)).encode()).hexdigest()


def embed_gallery(encoder: Encoder, pairs: Pairs) -> Gallery:
    """Embed every picture; those that do not decode are skipped, logged and listed.

    Raises:
        PairsError: no picture decodes, or a sample has neither label nor caption.
    """
    parts: list[np.ndarray] = []
    rows: list[int] = []
    skipped: list[str] = []
    batch: list[Image.Image] = []
    for row in range(len(pairs)):
        try:
            batch.append(pairs.image(row))
            rows.append(row)
        except ImageError as error:
            logger.warning("skipped: %s", error)
            skipped.append(pairs.keys[row])
        if batch and (len(batch) == _BATCH or row == len(pairs) - 1):
            parts.append(np.asarray(encoder.encode_image(batch)))
            batch = []
    if not rows:
        raise PairsError(f"none of the {len(skipped)} pictures decodes; nothing can be evaluated, check the shards")
    meta = [pairs.meta(row) for row in rows]
    texts = [str(facts["label"]) if isinstance(facts.get("label"), str) else pairs.caption(row) for row, facts in zip(rows, meta, strict=True)]
    groups = [str(facts.get("concept", text)) for facts, text in zip(meta, texts, strict=True)]
    return Gallery(embeddings=np.concatenate(parts), rows=rows, keys=[pairs.keys[row] for row in rows], texts=texts, groups=groups, meta=meta, skipped=skipped)


def split_rows(meta: Sequence[dict[str, Any]]) -> dict[str, list[int]]:
    """Gallery positions of each split that has any: held_out and trained (main slice), keycap, clock, flag, and all.

    Facts without "slice" or "held_out" are in "all" alone.
    """
    splits: dict[str, list[int]] = {"held_out": [], "trained": [], **{name: [] for name in SLICES}, "all": list(range(len(meta)))}
    for n, facts in enumerate(meta):
        if facts.get("slice") == "main" and isinstance(facts.get("held_out"), bool):
            splits["held_out" if facts["held_out"] else "trained"].append(n)
        elif facts.get("slice") in SLICES:
            splits[facts["slice"]].append(n)
    return {name: found for name, found in splits.items() if found}


def right_answers(gallery: Gallery, position: dict[str, int]) -> tuple[dict[str, list[int]], dict[str, set[int]], dict[str, set[str]]]:
    """What counts as right: gallery positions of each group, text numbers (by `position`) of each group, and the groups of each text."""
    pictures_of: dict[str, list[int]] = defaultdict(list)
    texts_of: dict[str, set[int]] = defaultdict(set)
    groups_of: dict[str, set[str]] = defaultdict(set)
    for n, (group, text) in enumerate(zip(gallery.groups, gallery.texts, strict=True)):
        pictures_of[group].append(n)
        texts_of[group].add(position[text])
        groups_of[text].add(group)
    return pictures_of, texts_of, groups_of


def retrieval(encoder: Encoder, pairs: Pairs, ks: Sequence[int] = (1, 5, 10), seed: int = 0, gallery: Gallery | None = None) -> dict[str, Any]:
    """Recall@k in both directions for each split; the queries are the split's, the gallery is always everything.

    Text to image: the distinct texts of the split against all pictures; every picture of the same concept is right.
    Image to text: the pictures of the split against all distinct texts. Ties count against the encoder.

    Args:
        encoder: see `Encoder`.
        pairs: what to retrieve from.
        ks: the k of recall@k.
        seed: of the bootstrap intervals (95 %, over queries).
        gallery: the embedded pictures, where `embed_gallery` ran already.

    Returns:
        JSON-ready {"text_to_image": {split: {"n", "recall@K": {"value", "low", "high"}, "median_rank"}}, "image_to_text":
        {…}, "gallery": {"count", "texts", "sha256"}, "skipped": [keys], "ranks": {direction: {split: [rank, …]}},
        "queries": {direction: {split: [text or key, …]}}}; ranks and queries run in step, in pairs order, so that two
        encoders on the same pairs can be compared query by query with `metrics.paired_recall_test`.
    """
    gallery = embed_gallery(encoder, pairs) if gallery is None else gallery
    texts = list(dict.fromkeys(gallery.texts))
    position = {text: n for n, text in enumerate(texts)}
    text_embeddings = np.concatenate([np.asarray(encoder.encode_text(texts[n : n + 256])) for n in range(0, len(texts), 256)])
    pictures_of, texts_of, groups_of = right_answers(gallery, position)
    to_image: dict[str, Any] = {}
    to_text: dict[str, Any] = {}
    found: dict[str, dict[str, list[int]]] = {"text_to_image": {}, "image_to_text": {}}
    queries: dict[str, dict[str, list[str]]] = {"text_to_image": {}, "image_to_text": {}}
    for split, rows in split_rows(gallery.meta).items():
        asked = list(dict.fromkeys(gallery.texts[n] for n in rows))
        right = [sorted(n for group in groups_of[text] for n in pictures_of[group]) for text in asked]
        there = ranks(text_embeddings[[position[text] for text in asked]], gallery.embeddings, right)
        back = ranks(gallery.embeddings[rows], text_embeddings, [sorted(texts_of[gallery.groups[n]]) for n in rows])
        to_image[split], to_text[split] = _recalls(there, ks, seed), _recalls(back, ks, seed)
        found["text_to_image"][split], found["image_to_text"][split] = there.tolist(), back.tolist()
        queries["text_to_image"][split], queries["image_to_text"][split] = asked, [gallery.keys[n] for n in rows]
    return {
        "text_to_image": to_image,
        "image_to_text": to_text,
        "gallery": {"count": len(gallery.keys), "texts": len(texts), "sha256": gallery.sha256},
        "skipped": gallery.skipped,
        "ranks": found,
        "queries": queries,
    }


def _recalls(found: np.ndarray, ks: Sequence[int], seed: int) -> dict[str, Any]:
    figures: dict[str, Any] = {"n": len(found)}
    for k in ks:
        figures[f"recall@{k}"] = interval(found <= k, seed)
    figures["median_rank"] = float(np.median(found))
    return figures


def interval(values: np.ndarray, seed: int) -> dict[str, float]:
    """{"value", "low", "high"}: a mean over queries with its 95 % bootstrap interval."""
    values = np.asarray(values, np.float64)
    low, high = bootstrap_interval(values, seed=seed)
    return {"value": float(values.mean()), "low": low, "high": high}


def zero_shot(
    encoder: Encoder, pairs: Pairs, prompts: Sequence[str] = TEMPLATES, seed: int = 0, gallery: Gallery | None = None, field: str = "group"
) -> dict[str, Any]:
    """Accuracy of sorting pictures into the values of a metadata field by prompts alone.

    A class's vector is the mean of its unit prompt embeddings; a picture goes to the class of the greatest cosine.

    Args:
        encoder: see `Encoder`.
        pairs: samples whose facts hold `field` (others are left out).
        prompts: templates with "{}" for the class's name; "smileys-emotion" is read as "smileys and emotion".
        seed: of the interval.
        gallery: the embedded pictures, where `embed_gallery` ran already.
        field: the metadata field that holds the class.

    Returns:
        JSON-ready {"n", "classes", "accuracy": {"value", "low", "high"}, "mean_per_class", "per_class": {class: {"n",
        "accuracy"}}, "majority": share of the largest class, "prompts", "skipped"}.

    Raises:
        PairsError: fewer than two classes. ValueError: no template, or one without "{}".
    """
    if not prompts or any("{}" not in prompt for prompt in prompts):
        raise ValueError(f"prompts are {list(prompts)}, expected at least one template, each with {{}}")
    gallery = embed_gallery(encoder, pairs) if gallery is None else gallery
    chosen = [n for n, facts in enumerate(gallery.meta) if isinstance(facts.get(field), str)]
    truth = [str(gallery.meta[n][field]) for n in chosen]
    classes = sorted(set(truth))
    if len(classes) < 2:
        raise PairsError(
            f"zero-shot needs at least two values of '{field}' in the samples' facts, found {len(classes)}; use pairs that have it (mclip sample emoji)"
        )
    vectors = np.stack([class_vector(encoder, name.replace("-", " and "), prompts) for name in classes])
    own = np.array([classes.index(name) for name in truth])
    rank = ranks(gallery.embeddings[chosen], vectors, own)
    counts = {name: truth.count(name) for name in classes}
    per_class = {name: {"n": counts[name], "accuracy": recall_at_k(rank[own == c], 1)} for c, name in enumerate(classes)}
    return {
        "n": len(chosen),
        "classes": classes,
        "accuracy": interval(rank == 1, seed),
        "mean_per_class": float(np.mean([entry["accuracy"] for entry in per_class.values()])),
        "per_class": per_class,
        "majority": max(counts.values()) / len(chosen),
        "prompts": list(prompts),
        "skipped": gallery.skipped,
    }


def class_vector(encoder: Encoder, name: str, prompts: Sequence[str]) -> np.ndarray:
    """(D,), unit norm: the mean of the unit embeddings of the prompts, each with the class's name in the place of "{}"."""
    embeddings = _unit(np.asarray(encoder.encode_text([prompt.replace("{}", name) for prompt in prompts]), np.float64))
    return _unit(embeddings.mean(axis=0, keepdims=True))[0]


def _unit(values: np.ndarray) -> np.ndarray:
    return values / np.maximum(np.linalg.norm(values, axis=-1, keepdims=True), 1e-12)
