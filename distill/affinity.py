"""How much stored embeddings change what a teacher teaches: its affinity rows, softmax(scale * image · text), against the decoded ones.

The student learns these rows (MobileCLIP, arXiv 2311.17049, section 3, the affinity loss), so a way of storing is judged by them; a cosine of 0.99
says little at a logit scale of 100.
"""

from __future__ import annotations

import numpy as np

from runtime.errors import StoreError


def affinity_kl(teacher_image: np.ndarray, teacher_text: np.ndarray, decoded_image: np.ndarray, decoded_text: np.ndarray, scale: float) -> float:
    """KL(teacher's row || decoded row) in nats, mean over all rows image to text and all rows text to image.

    Args:
        teacher_image, teacher_text: (n, D) and (m, D), unit norm, as the teacher gave them.
        decoded_image, decoded_text: the same after storing and reading, unit norm.
        scale: the teacher's logit scale (multiplicative).

    Raises:
        StoreError: shapes that do not belong together.
    """
    if teacher_image.shape != decoded_image.shape or teacher_text.shape != decoded_text.shape or teacher_image.shape[1:] != teacher_text.shape[1:]:
        shapes = [array.shape for array in (teacher_image, teacher_text, decoded_image, decoded_text)]
        raise StoreError(f"affinities need images (n, D) and texts (m, D), twice each; found {shapes}")
    truth = scale * (teacher_image.astype(np.float64) @ teacher_text.astype(np.float64).T)
    found = scale * (decoded_image.astype(np.float64) @ decoded_text.astype(np.float64).T)
    return float((_row_kl(truth, found) + _row_kl(truth.T, found.T)) / 2)


def _row_kl(truth: np.ndarray, found: np.ndarray) -> float:
    p, q = _log_softmax(truth), _log_softmax(found)
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
