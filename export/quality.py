"""What a lossy form of a tower, or of both, still finds: the figures that the search for int8 and the front of compression judge by."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from export.verify import Reference, centred_cosines
from runtime.errors import ParityError

TOP = 10
DRAWS = 2000
RARE = 0.25
CLIFF = 4.0

_WORD = re.compile(r"\w+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a lossy form has to keep, and how fast it has to be."""

    recall1_loss: float = 0.005
    """Most recall@1 that may be lost, over the pairs that judge; its interval is reported beside it."""
    centred_p1: float = 0.98
    overlap10: float = 0.9
    """Least share of the ten first pictures of a query that stay among its ten first."""
    latency: float | None = None
    """Most time beside float32 ONNX Runtime on the same thread; None: anything faster."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    """What is left of text-to-image retrieval, over n pairs; losses with the 95 % interval of a paired bootstrap."""

    centred_p1: float
    """First percentile of the cosines to the checkpoint's embeddings after its mean is taken from both: raw cosines hide loss behind the mean."""
    centred_mean: float
    overlap10: float
    """Share of the ten first pictures of a query that stay among its ten first, mean over queries."""
    recall1_loss: float
    recall1_loss_low: float
    recall1_loss_high: float
    rare_loss: float
    """Of recall@1 over the captions with the rarest words (`rare_rows`): compression forgets those first (Hooker et al. 2020)."""
    rare_loss_low: float
    rare_n: int
    n: int

    def misses(self, limits: Limits) -> str | None:
        """The first limit that does not hold, as a clause; None when all do."""
        if self.centred_p1 < limits.centred_p1:
            return f"centred cosine p1 {self.centred_p1:.4f} below {limits.centred_p1:g}"
        if self.overlap10 < limits.overlap10:
            return f"top-10 overlap {self.overlap10:.4f} below {limits.overlap10:g}"
        if self.recall1_loss > limits.recall1_loss + 1e-12:
            return f"{100 * self.recall1_loss:.2f} points of recall@1 lost, more than {100 * limits.recall1_loss:g}"
        if self.rare_loss_low > limits.recall1_loss:
            return f"{100 * self.rare_loss:.2f} points of recall@1 lost on the {self.rare_n} captions with the rarest words, surely more than {100 * limits.recall1_loss:g}"
        return None


def judge(reference: Reference, *, image: np.ndarray | None = None, text: np.ndarray | None = None, rare: np.ndarray | None = None) -> Quality:
    """Compare the embeddings (N, D) of one tower, or of both, with the checkpoint's.

    Args:
        rare: (N,) bool, rows that are looked at beside the mean, as of `rare_rows`. Left out: all.

    Raises:
        ParityError: nothing to compare, other shapes, or values that are not finite.
    """
    changed = [(found, expected) for found, expected in ((image, reference.image), (text, reference.text)) if found is not None]
    if not changed:
        raise ParityError("there are no embeddings to judge; give those of the image tower, of the text tower, or of both")
    for found, expected in changed:
        if found.shape != expected.shape or not np.isfinite(found).all():
            raise ParityError(f"embeddings of shape {found.shape} cannot be judged beside the checkpoint's {expected.shape}, or are not finite")
    cosines = [centred_cosines(found, expected) for found, expected in changed]
    before = reference.text @ reference.image.T
    after = (reference.text if text is None else text) @ (reference.image if image is None else image).T
    n, top = len(before), min(TOP, before.shape[1])
    first, last = (np.argsort(-scores, axis=1, kind="stable")[:, :top] for scores in (before, after))
    overlap = np.mean([len(set(a) & set(b)) / top for a, b in zip(first.tolist(), last.tolist(), strict=True)])
    lost = (before.argmax(axis=1) == np.arange(n)).astype(np.float64) - (after.argmax(axis=1) == np.arange(n))
    rare = np.ones(n, bool) if rare is None or not rare.any() else rare
    low, high = _interval(lost)
    return Quality(
        centred_p1=float(min(np.percentile(found, 1) for found in cosines)), centred_mean=float(min(found.mean() for found in cosines)), overlap10=float(overlap),
        recall1_loss=float(lost.mean()), recall1_loss_low=low, recall1_loss_high=high, rare_loss=float(lost[rare].mean()), rare_loss_low=_interval(lost[rare])[0],
        rare_n=int(rare.sum()), n=n,
    )  # fmt: skip


def _interval(lost: np.ndarray) -> tuple[float, float]:
    draws = lost[np.random.default_rng(0).integers(0, len(lost), (DRAWS, len(lost)))].mean(axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def rare_rows(captions: Sequence[str], share: float = RARE) -> np.ndarray:
    """(N,) bool: the captions whose rarest word stands in the fewest captions: about `share` of them, fewer where too many have the same count.

    >>> rare_rows(["a red cat", "a red dog", "a red cat", "an axolotl"]).tolist()
    [False, True, False, True]
    """
    words = [set(_WORD.findall(caption.lower())) for caption in captions]
    seen = Counter(word for found in words for word in found)
    rarest = np.array([min((seen[word] for word in found), default=0) for found in words])
    if not len(rarest):
        return np.zeros(0, bool)
    border = np.sort(rarest)[max(0, round(share * len(rarest)) - 1)]
    with_ties, without = rarest <= border, rarest < border
    return without if with_ties.mean() > 2 * share and without.any() else with_ties


def sudden_drop(losses: Sequence[float], noise: float = 0.0) -> int | None:
    """Where a ladder of ever harder compression falls off its cliff: the first place whose loss grows by more than `CLIFF` times the mean growth of the places
    before it, and by more than `noise`. None where it goes down evenly. (A threshold of this kind is what pruned text-to-image models showed: fine up to it, gone
    behind it.)

    >>> sudden_drop([0.001, 0.002, 0.004, 0.2])
    3
    """
    for place in range(1, len(losses)):
        step = losses[place] - losses[place - 1]
        usual = max((losses[place - 1] - losses[0]) / (place - 1) if place > 1 else losses[0], noise, 1e-9)
        if step > CLIFF * usual:
            return place
    return None
