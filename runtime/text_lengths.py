"""Texts of few tokens, computed as such: a causal or pad-masked tower gives the same without the padding.

Rows are cut to the length of what they hold, rounded up to one of a few, so that a runtime plans its memory for few shapes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

LENGTHS = (8, 16, 24, 32, 48, 64)


def token_counts(tokens: np.ndarray, pad_id: int) -> np.ndarray:
    """(B, T) int32 -> (B,): places up to the last that is not padding, and in any case up to the largest id, where CLIP's towers pool."""
    used = tokens != pad_id
    last = tokens.shape[1] - used[:, ::-1].argmax(axis=1)
    last[~used.any(axis=1)] = 1
    return np.maximum(last, tokens.argmax(axis=1) + 1)


def by_length(tokens: np.ndarray, pad_id: int, run: Callable[[np.ndarray], np.ndarray], embed_dim: int) -> np.ndarray:
    """(B, context_length) -> (B, D), each row computed with no more padding than its length needs.

    Args:
        run: (n, T) -> (n, D) for any T up to context_length.
    """
    whole = tokens.shape[1]
    steps = np.array([length for length in LENGTHS if length < whole] + [whole])
    lengths = steps[np.searchsorted(steps, token_counts(tokens, pad_id))]
    found = np.empty((len(tokens), embed_dim), np.float32)
    for length in np.unique(lengths):
        rows = np.flatnonzero(lengths == length)
        found[rows] = run(np.ascontiguousarray(tokens[rows, :length]))
    return found
