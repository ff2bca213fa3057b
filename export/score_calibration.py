"""Probabilities of a match, fitted at export: what a cosine means for this model.

Pairs of a picture and its caption are matches; a picture and the caption of another are none, unless the two captions say nearly the same. A logistic regression on
`runtime.matching.features` is fitted on half of the pairs and counted on the other half: how often is a wrong pair accepted, how often a right one missed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from export.verify import Reference, at_chance
from runtime.matching import FEATURES, VECTORS, features

NULL_TEXTS = ("", "a picture", "a photo", "an image of something", "nothing", "something else", "a thing", "text")
FEWEST = 32
SAME = 0.9  # cosine of two captions above which they are not told apart
PRIOR = 0.01  # share of matches among the pairs that an application asks about
RIDGE = 1e-3
STEPS = 50


def calibrate_scores(reference: Reference, embed_texts: Callable[[tuple[str, ...]], np.ndarray], folder: Path) -> dict[str, Any] | None:
    """Fit, count, and write `calibration.safetensors` into a bundle under construction.

    Args:
        reference: embeddings (N, D) of pictures and their captions by the checkpoint.
        embed_texts: texts -> (K, D).

    Returns:
        The manifest's entry; None where there are too few pairs, or the checkpoint finds no more than chance would.
    """
    image, text = reference.image, reference.text
    if len(image) < FEWEST or at_chance(reference):
        return None
    null = embed_texts(NULL_TEXTS).astype(np.float32)
    half = len(image) // 2
    mean = image[:half].mean(axis=0).astype(np.float32)
    found, labels = pairs_of(image[:half], text[:half], null, mean)
    weights = fit(found, labels)
    tested, truth = pairs_of(image[half:], text[half:], null, mean)
    said = 1 / (1 + np.exp(-(tested @ weights)))
    centred_image, centred_text = image - image.mean(axis=0), text - text.mean(axis=0)
    gain = float((centred_image * centred_text).sum() / np.square(centred_image).sum())
    (folder / VECTORS).write_bytes(save({"null": null, "image_mean": mean, "text_mean": text.mean(axis=0).astype(np.float32)}))
    return {
        "weights": [float(value) for value in weights], "prior": PRIOR, "gain": gain, "null_texts": list(NULL_TEXTS), "fitted_on": half, "counted_on": len(image) - half,
        "at": {f"{least:g}": {"false_accept": float((said[~truth] >= least).mean()), "missed": float((said[truth] < least).mean())} for least in (0.5, 0.1, 0.01)},
    }  # fmt: skip


def pairs_of(image: np.ndarray, text: np.ndarray, null: np.ndarray, mean: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(P, 4) features of all pairs that surely match or surely do not, and (P,) bool: matches."""
    own = np.eye(len(image), dtype=bool)
    clear = own | (text @ text.T < SAME)
    return features(image, text, null, mean)[clear], own[clear]


def fit(found: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Logistic regression by Newton's method, (P, 4) and (P,) -> (4,); classes weighted to the prior, features but the last standardised for the ridge."""
    centre, scale = found.mean(axis=0), found.std(axis=0) + 1e-9
    centre[-1], scale[-1] = 0.0, 1.0
    x = (found - centre) / scale
    share = np.where(labels, PRIOR / labels.mean(), (1 - PRIOR) / (1 - labels.mean())) / len(labels)
    penalty = RIDGE * np.eye(FEATURES) * PRIOR
    penalty[-1, -1] = 0.0
    weights = np.zeros(FEATURES)
    weights[-1] = np.log(PRIOR / (1 - PRIOR))
    for _ in range(STEPS):
        said = 0.5 * (1 + np.tanh(x @ weights / 2))
        slope = x.T @ (share * (said - labels)) + penalty @ weights
        curve = (x * (share * said * (1 - said))[:, None]).T @ x + penalty + 1e-12 * np.eye(FEATURES)
        step = np.linalg.solve(curve, slope)
        weights -= step * min(1.0, 5.0 / max(float(np.abs(step).max()), 1e-12))
        if np.abs(step).max() < 1e-9:
            break
    raw = weights / scale
    raw[-1] = weights[-1] - float((weights[:-1] * centre[:-1] / scale[:-1]).sum())
    return raw
