"""Is an artefact still the checkpoint? Figures, thresholds, and a refusal to call an empty comparison a proof.

Shapes: N = samples, D = embed_dim. Row i of the picture embeddings belongs to row i of the text embeddings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from export.towers import Samples, Tower, embed, image_encoder, text_encoder
from runtime.errors import ParityError

MAX_SPREAD = 0.99  # mean cosine between different inputs; a collapsed model would pass every comparison
DRAWS = 2000  # of the bootstrap
TIE = 1e-3  # in cosines: no application depends on which of two such pictures comes first
ROUNDING = 1e-12  # -5/1000 is not -0.005 in binary


@dataclass(frozen=True, kw_only=True, slots=True)
class Parity:
    """How far an artefact's embeddings are from the checkpoint's, over n samples."""

    cosine_min: float
    cosine_p1: float
    cosine_mean: float
    centred_p1: float
    """First percentile of the cosines after the checkpoint's mean embedding is taken from both: what of the differences between inputs is left. Towers
    whose embeddings all lie in a narrow cone keep a high plain cosine whatever becomes of those differences."""
    centred_mean: float
    max_abs: float
    rank_agreement: float
    """Share of texts whose first picture is the checkpoint's first, or one that the checkpoint scores within `TIE` of it."""
    recall1_change: float
    """Recall@1 text to picture with this artefact and the checkpoint's other tower, minus the checkpoint's own."""
    recall1_low: float
    """95 % interval of that change: bootstrap over the samples, paired."""
    recall1_high: float
    recall1_clear: float
    """The part of that change that is no toss-up: texts that `rank_agreement` counts as unchanged are left out."""
    logit_drift: float
    """Mean absolute change of a logit (logit_scale times cosine) over all texts and pictures."""
    norm_error: float
    """Largest distance of an embedding's L2 norm from 1: cosines do not see it, dot products do."""
    n: int

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Thresholds:
    """The least figures (of `norm_error` the most) that count as proven; None: not asked."""

    cosine_min: float | None = None
    centred_p1: float | None = None
    rank_agreement: float | None = None
    recall1_change: float | None = None
    recall1_clear: float | None = None
    norm_error: float = 1e-2


FLOATS = ("fp32", "fp16", "bf16", "mixed")
"""Precisions that are to compute the same; all others cost accuracy by design and are judged by what retrieval loses."""

THRESHOLDS: dict[str, Thresholds] = {
    "fp32": Thresholds(cosine_min=0.99999, rank_agreement=0.98, recall1_clear=-0.02, norm_error=1e-4),
    "fp16": Thresholds(cosine_min=0.9995, rank_agreement=0.9, recall1_clear=-0.02, norm_error=2e-3),
    "mixed": Thresholds(cosine_min=0.9995, rank_agreement=0.9, recall1_clear=-0.02, norm_error=2e-3),
    "bf16": Thresholds(cosine_min=0.995, rank_agreement=0.9, recall1_clear=-0.02),
    "int4": Thresholds(centred_p1=0.9, recall1_change=-0.01),
    "lossy": Thresholds(centred_p1=0.98, recall1_change=-0.005),
}


def thresholds_of(precision: str, table: Mapping[str, Thresholds] = THRESHOLDS) -> Thresholds:
    """A precision's own thresholds, those of "lossy" for all that have none."""
    return table[precision if precision in table else "lossy"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """The checkpoint's own float32 embeddings of the samples, unit norm."""

    image: np.ndarray
    text: np.ndarray
    logit_scale: float = 100.0

    def of(self, tower: Tower) -> np.ndarray:
        return self.image if tower == "image" else self.text


def reference_of(model: Any, samples: Samples) -> Reference:
    """Embed the samples with the checkpoint in torch.

    Raises:
        ParityError: the embeddings are not finite, or so alike that no comparison could show a difference.
    """
    reference = Reference(
        image=embed(image_encoder(model), samples.pixels), text=embed(text_encoder(model), samples.tokens), logit_scale=float(model.logit_scale.detach().exp())
    )
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
    return float(_hits(texts @ pictures.T).mean())


def at_chance(reference: Reference) -> str | None:
    """Why no loss of retrieval could show: the checkpoint itself finds no more than drawing lots would (its recall@1 is within what luck gives once in
    a thousand times). None when it finds more."""
    n = len(reference.text)
    hits = round(recall1(reference.text, reference.image) * n)
    luck = np.random.default_rng(0).binomial(n, 1 / n, 20_000)
    if hits > np.quantile(luck, 0.999):
        return None
    return f"untrained. The checkpoint's own recall@1 is {hits} of {n}, which is chance, so what this precision loses cannot be seen"


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
        worst = dict.fromkeys(("cosine_min", "cosine_p1", "cosine_mean", "centred_p1", "centred_mean", "recall1_change", "recall1_low", "recall1_high", "recall1_clear"), -1.0)
        most = float(np.finfo(np.float32).max)
        return Parity(**worst, max_abs=most, rank_agreement=0.0, logit_drift=most, norm_error=most, n=n)
    a, b = embeddings.astype(np.float64), expected.astype(np.float64)
    plain, centred = cosines(a, b), centred_cosines(a, b)
    new_text, new_image = (text, embeddings) if tower == "image" else (embeddings, image)
    before, after = text @ image.T, new_text @ new_image.T
    gained = _hits(after).astype(np.float64) - _hits(before)
    draws = gained[np.random.default_rng(0).integers(0, n, (DRAWS, n))].mean(axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    alike = before[np.arange(n), after.argmax(axis=1)] >= before.max(axis=1) - TIE
    return Parity(
        cosine_min=float(plain.min()),
        cosine_p1=float(np.percentile(plain, 1)),
        cosine_mean=float(plain.mean()),
        centred_p1=float(np.percentile(centred, 1)),
        centred_mean=float(centred.mean()),
        max_abs=float(np.abs(a - b).max()),
        rank_agreement=float(alike.mean()),
        recall1_change=float(gained.mean()),
        recall1_low=float(low),
        recall1_high=float(high),
        recall1_clear=float(gained[~alike].sum() / n),
        logit_drift=float(np.abs(after - before).mean() * reference.logit_scale),
        norm_error=float(np.abs(np.linalg.norm(a, axis=1) - 1).max()),
        n=n,
    )


def centred_cosines(embeddings: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """(N,) cosines of rows (N, D) after the mean of `expected` is taken from both."""
    a, b = embeddings.astype(np.float64), expected.astype(np.float64)
    mean = b.mean(axis=0)
    return cosines(a - mean, b - mean)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(N,) cosines of the rows of two arrays (N, D), in float64."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-12)


def _hits(scores: np.ndarray) -> np.ndarray:
    """(N,) whether row i's best column is i."""
    return scores.argmax(axis=1) == np.arange(len(scores))


def failure(artefact: str, parity: Parity, precision: str, table: Mapping[str, Thresholds] = THRESHOLDS) -> str | None:
    """One sentence naming the artefact, the first figure below its threshold and the threshold; None when all hold."""
    limits = thresholds_of(precision, table)
    for field in dataclasses.fields(limits):
        found, least = getattr(parity, field.name), getattr(limits, field.name)
        if field.name == "norm_error" and not found <= least:
            return f"artefact {artefact}: the norm of an embedding differs from 1 by {found:.6g}, more than {least:g}, the most for {precision} (over {parity.n} samples)"
        if field.name != "norm_error" and least is not None and not found >= least - ROUNDING:
            return f"artefact {artefact}: {field.name} {found:.6f} is below {least:g}, the least for {precision} (over {parity.n} samples)"
    return None


def check(artefact: str, parity: Parity, precision: str, table: Mapping[str, Thresholds] = THRESHOLDS) -> None:
    """Raise ParityError when a figure misses its threshold."""
    problem = failure(artefact, parity, precision, table)
    if problem:
        raise ParityError(f"{problem}: the artefact does not compute what the checkpoint computes, and is not shipped")
