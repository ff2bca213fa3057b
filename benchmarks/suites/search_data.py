"""A million vectors like real ones: a mixture of Gaussians fitted to the demo's embeddings, in 512 real dimensions.

Both of the demo's bundles embed into 256 dimensions; side by side, each half at norm 1/sqrt(2), they are one real model of 512 (the cosine is the
mean of both cosines). Pictures and captions of all splits are embedded, k-means finds clusters, each with a covariance of its own, shrunk towards
the one that all clusters share. The gallery is drawn from the pictures' mixture; queries are drawn from the pictures' and from the captions', whose
distribution is another one, as it is when people search.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtime.encoder import load
from runtime.pairs import open_pairs

BUNDLES = ("bundle", "teacher-bundle")
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, eq=False, slots=True)
class Mixture:
    """weights (C,), means (C, D), factors (C, D, D): a draw is mean + factor @ normal, then unit norm."""

    weights: np.ndarray
    means: np.ndarray
    factors: np.ndarray


def embed(run: Path, threads: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Pictures and captions of the demo's pairs by both bundles side by side, float32 (n, 512) each, unit norm."""
    kinds: dict[str, list[np.ndarray]] = {"image": [], "text": []}
    for name in BUNDLES:
        clip = load(run / name, threads=threads, prefer="fp32")
        parts: dict[str, list[np.ndarray]] = {"image": [], "text": []}
        for split in SPLITS:
            pairs = open_pairs(run / "pairs" / split)
            for start in range(0, len(pairs), 64):
                rows = range(start, min(start + 64, len(pairs)))
                parts["image"].append(clip.encode_image([pairs.image(row) for row in rows]))
                parts["text"].append(clip.encode_text([pairs.caption(row) for row in rows]))
        for kind, found in parts.items():
            kinds[kind].append(np.concatenate(found))
    images, texts = (np.concatenate(kinds[kind], axis=1) / np.float32(np.sqrt(len(BUNDLES))) for kind in ("image", "text"))
    return images, texts


def fit_mixture(vectors: np.ndarray, clusters: int = 64, seed: int = 0, rounds: int = 25) -> Mixture:
    """k-means, then a covariance a cluster: with n_c vectors of D dimensions its share is n_c / (n_c + D), the rest is the shared one."""
    generator = np.random.default_rng(seed)
    vectors = vectors.astype(np.float64)
    means = vectors[generator.choice(len(vectors), clusters, replace=False)]
    for _ in range(rounds):
        nearest = np.argmax(vectors @ means.T - 0.5 * np.square(means).sum(axis=1), axis=1)
        means = np.stack([vectors[nearest == c].mean(axis=0) if (nearest == c).any() else vectors[generator.integers(len(vectors))] for c in range(clusters)])
    rest = vectors - means[nearest]
    dims = vectors.shape[1]
    shared = rest.T @ rest / len(vectors)
    factors = []
    for c in range(clusters):
        own = rest[nearest == c]
        share = len(own) / (len(own) + dims)
        covariance = share * (own.T @ own) / max(len(own), 1) + (1 - share) * shared
        values, directions = np.linalg.eigh(covariance)
        factors.append(directions * np.sqrt(np.maximum(values, 0)))
    counts = np.bincount(nearest, minlength=clusters)
    return Mixture(counts / counts.sum(), means.astype(np.float32), np.stack(factors).astype(np.float32))


def draw(mixture: Mixture, n: int, generator: np.random.Generator) -> np.ndarray:
    """n vectors, float32 (n, D), unit norm, in random order."""
    chosen = generator.choice(len(mixture.weights), n, p=mixture.weights)
    found = np.empty((n, mixture.means.shape[1]), np.float32)
    for c in range(len(mixture.weights)):
        rows = np.flatnonzero(chosen == c)
        noise = generator.standard_normal((len(rows), found.shape[1]), dtype=np.float32)
        found[rows] = mixture.means[c] + noise @ mixture.factors[c].T
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    return found
