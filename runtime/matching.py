"""How probable it is that a text fits a picture, each pair for itself, and what photographs are worth as texts.

A cosine alone says little: some pictures are near to every text, and some texts to every picture. What was fitted at export (`export/score_calibration.py`) weighs a
pair's cosine against both: against the picture's nearest *null prompt* ("a picture", "nothing", …), and against the text's cosine to the mean picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.bundle_files import read_file
from runtime.errors import BundleError

if TYPE_CHECKING:
    from runtime.encoder import Clip

VECTORS = "calibration.safetensors"
FEATURES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """What was fitted on pairs of pictures and captions.

    Attributes:
        null: float32 (K, D), embeddings of the null prompts.
        image_mean, text_mean: float32 (D,), means of the embeddings.
        weights: (4,) of `features`.
        prior: share of matching pairs that probabilities assume.
        gain: what a picture's distance from the mean picture is worth as a text's from the mean text.
        facts: the manifest's entry: how often a wrong pair is accepted, on how many pairs that was counted.
    """

    null: np.ndarray
    image_mean: np.ndarray
    text_mean: np.ndarray
    weights: np.ndarray
    prior: float
    gain: float
    facts: dict[str, Any]

    def probability(self, images: np.ndarray, texts: np.ndarray) -> np.ndarray:
        """(B, D), (L, D) of unit norm -> float32 (B, L)."""
        logits = features(images, texts, self.null, self.image_mean) @ self.weights
        return (0.5 * (1 + np.tanh(logits / 2))).astype(np.float32)

    def as_text(self, images: np.ndarray) -> np.ndarray:
        """(B, D) embeddings of pictures of one thing -> float32 (D,), unit norm: where a text that names it would lie.

        Pictures and texts lie in two cones; what differs between things is moved from one to the other: `text_mean + gain * (picture - image_mean)`.
        """
        moved = self.text_mean + self.gain * (images.mean(axis=0) - self.image_mean)
        return (moved / np.linalg.norm(moved)).astype(np.float32)


def features(images: np.ndarray, texts: np.ndarray, null: np.ndarray, image_mean: np.ndarray) -> np.ndarray:
    """float64 (B, L, 4): the cosine, the picture's largest cosine to a null prompt, the text's cosine to the mean picture, one."""
    cosines = images.astype(np.float64) @ texts.T
    found = np.ones((*cosines.shape, FEATURES))
    found[..., 0] = cosines
    found[..., 1] = (images @ null.T).max(axis=1)[:, None]
    found[..., 2] = (texts @ image_mean)[None]
    return found


def read_calibration(clip: Clip) -> Calibration:
    """The calibration of a bundle, read once.

    Raises:
        BundleError: it carries none, or a damaged one.
    """
    facts, folder = clip.manifest.calibration, Path(clip.folder)
    if facts is None:
        raise BundleError(
            f"the bundle '{clip.manifest.name}' carries no score calibration: it was exported by an earlier version, or from too few pairs, or from a checkpoint that "
            "finds nothing; export it again with pairs that the model knows"
        )
    if clip.calibration is not None:
        return clip.calibration
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        arrays = load(read_file(folder, clip.manifest, VECTORS))
        found = Calibration(
            null=arrays["null"], image_mean=arrays["image_mean"], text_mean=arrays["text_mean"], weights=np.array(facts["weights"], np.float64),
            prior=float(facts["prior"]), gain=float(facts["gain"]), facts=facts,
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise BundleError(f"{folder}: the score calibration cannot be read ({type(error).__name__}: {error}); export the bundle again") from error
    dim = clip.embed_dim
    shapes = found.null.shape[1:], found.image_mean.shape, found.text_mean.shape, found.weights.shape
    if shapes != ((dim,), (dim,), (dim,), (FEATURES,)) or not len(found.null) or not np.isfinite(found.weights).all():
        raise BundleError(f"{folder}: the score calibration has arrays of shapes {shapes}, expected embeddings of {dim} values; export the bundle again")
    clip.calibration = found
    return found
