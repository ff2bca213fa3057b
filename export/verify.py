"""Is an artefact still the checkpoint? Figures, thresholds, and a refusal to call an empty comparison a proof.

Shapes: N = samples, D = embed_dim. Row i of the picture embeddings belongs to row i of the text embeddings.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from export.towers import Samples, Tower, embed, image_encoder, text_encoder
from runtime.errors import ParityError

MAX_SPREAD = 0.99  # mean cosine between different inputs; a collapsed model would pass every comparison


@dataclass(frozen=True, kw_only=True, slots=True)
class Parity:
    """How far an artefact's embeddings are from the checkpoint's, over n samples."""

    cosine_min: float
    cosine_p1: float
    cosine_mean: float
    max_abs: float
    rank_agreement: float
    """Share of texts whose first picture is the same one."""
    recall1_change: float
    """Recall@1 text to picture with this artefact and the checkpoint's other tower, minus the checkpoint's own."""
    n: int

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Thresholds:
    """The least figures that count as proven."""

    cosine_min: float
    cosine_mean: float
    rank_agreement: float
    recall1_change: float


THRESHOLDS: dict[str, Thresholds] = {
    "fp32": Thresholds(cosine_min=0.99999, cosine_mean=0.99999, rank_agreement=0.98, recall1_change=-0.02),
    "fp16": Thresholds(cosine_min=0.999, cosine_mean=0.999, rank_agreement=0.9, recall1_change=-0.02),
    "int8": Thresholds(cosine_min=0.9, cosine_mean=0.98, rank_agreement=0.75, recall1_change=-0.02),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """The checkpoint's own float32 embeddings of the samples, unit norm."""

    image: np.ndarray
    text: np.ndarray

    def of(self, tower: Tower) -> np.ndarray:
        return self.image if tower == "image" else self.text


def reference_of(model: Any, samples: Samples) -> Reference:
    """Embed the samples with the checkpoint in torch.

    Raises:
        ParityError: the embeddings are not finite, or so alike that no comparison could show a difference.
    """
    reference = Reference(image=embed(image_encoder(model), samples.pixels), text=embed(text_encoder(model), samples.tokens))
    for tower in ("image", "text"):
        require_spread(reference.of(tower), f"the checkpoint's {tower} tower")
    return reference


def spread(embeddings: np.ndarray) -> float:
    """Mean cosine between different rows: 0 when they point everywhere, 1 when they are all the same."""
    unit = embeddings.astype(np.float64)
    unit = unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    n = len(unit)
    total = np.square(unit.sum(axis=0)).sum()
    return float((total - n) / (n * (n - 1)))


def require_spread(embeddings: np.ndarray, what: str) -> None:
    """Raise ParityError where a comparison over these embeddings would be empty."""
    if len(embeddings) < 4:
        raise ParityError(f"{what}: {len(embeddings)} samples prove nothing; give at least 4 pairs")
    if not np.isfinite(embeddings).all():
        raise ParityError(f"{what} gives values that are not finite; train it, or calibrate its batch norm, before exporting")
    value = spread(embeddings)
    if value >= MAX_SPREAD:
        raise ParityError(
            f"{what} maps different samples to nearly the same embedding (mean cosine {value:.4f}, expected below {MAX_SPREAD}): parity on it proves nothing; "
            "train the model, or calibrate its batch norm on real pictures, or give more varied pairs"
        )


def recall1(texts: np.ndarray, pictures: np.ndarray) -> float:
    """Share of texts whose own picture (same row) ranks first."""
    return float((np.argmax(texts @ pictures.T, axis=1) == np.arange(len(texts))).mean())


def measure(tower: Tower, embeddings: np.ndarray, reference: Reference) -> Parity:
    """Compare an artefact's embeddings of the first n samples with the checkpoint's; n = rows of `embeddings` (N', D).

    Ranking always runs over those n pictures.
    """
    n = len(embeddings)
    image, text = reference.image[:n], reference.text[:n]
    expected = image if tower == "image" else text
    if embeddings.shape != expected.shape:
        raise ParityError(f"the {tower} artefact gives embeddings of shape {embeddings.shape}, the checkpoint {expected.shape}")
    if not np.isfinite(embeddings).all():
        return Parity(cosine_min=-1.0, cosine_p1=-1.0, cosine_mean=-1.0, max_abs=float(np.finfo(np.float32).max), rank_agreement=0.0, recall1_change=-1.0, n=n)
    a, b = embeddings.astype(np.float64), expected.astype(np.float64)
    cosines = (a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-12)
    new_text, new_image = (text, embeddings) if tower == "image" else (embeddings, image)
    same = np.argmax(new_text @ new_image.T, axis=1) == np.argmax(text @ image.T, axis=1)
    return Parity(
        cosine_min=float(cosines.min()),
        cosine_p1=float(np.percentile(cosines, 1)),
        cosine_mean=float(cosines.mean()),
        max_abs=float(np.abs(a - b).max()),
        rank_agreement=float(same.mean()),
        recall1_change=recall1(new_text, new_image) - recall1(text, image),
        n=n,
    )


def failure(artefact: str, parity: Parity, precision: str, thresholds: Thresholds | None = None) -> str | None:
    """One sentence naming the artefact, the first figure below its threshold and the threshold; None when all hold."""
    limits = thresholds or THRESHOLDS[precision]
    for field in dataclasses.fields(limits):
        found, least = getattr(parity, field.name), getattr(limits, field.name)
        if not found >= least:
            return f"artefact {artefact}: {field.name} {found:.6f} is below {least:g}, the least for {precision} (over {parity.n} samples)"
    return None


def check(artefact: str, parity: Parity, precision: str, thresholds: Thresholds | None = None) -> None:
    """Raise ParityError when a figure misses its threshold."""
    problem = failure(artefact, parity, precision, thresholds)
    if problem:
        raise ParityError(f"{problem}: the artefact does not compute what the checkpoint computes, and is not shipped")
