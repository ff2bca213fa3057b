"""Nucleus sampling with randomness by counter: which token is drawn depends on (seed, key, caption number, step) and the logits alone.

Libraries draw from one global generator, so that a caption changes with its neighbours in the batch and with what ran before. Here
every caption has its own uniforms, made before the first token, and a token is found by inverting the cumulative distribution.

Shapes: B = captions in a batch, T = tokens so far, V = vocabulary, L = most new tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from runtime.errors import RecipeError


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How captions are drawn."""

    top_p: float = 0.9
    """Tokens are drawn from the smallest set that holds this much probability (Holtzman et al. 2020, arXiv 1904.09751)."""
    temperature: float = 1.0
    """Divides the logits before the nucleus is taken; 0 takes the likeliest token."""
    min_tokens: int = 1
    """The end is not drawn before."""
    max_tokens: int = 30
    """New tokens at most, the end included."""

    def __post_init__(self) -> None:
        if not 0 < self.top_p <= 1 or not 0 <= self.temperature < float("inf"):
            raise RecipeError(f"top_p is {self.top_p} and temperature {self.temperature}; expected 0 < top_p <= 1 and a temperature of at least 0")
        if not 0 <= self.min_tokens < self.max_tokens <= 1024:
            raise RecipeError(f"min_tokens is {self.min_tokens} and max_tokens {self.max_tokens}; expected 0 <= min_tokens < max_tokens <= 1024")


def uniforms(seed: int, key: str, number: int, steps: int) -> np.ndarray:
    """(steps,) float64 in [0, 1) of one caption: a function of its arguments alone."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    return np.random.default_rng([seed, number, *np.frombuffer(digest[:16], "<u4").tolist()]).random(steps)


def draw(logits: Tensor, randoms: Tensor, top_p: float, temperature: float) -> Tensor:
    """logits (B, V), randoms (B,) float64 in [0, 1) -> token ids (B,) int64. Of equal probabilities the smaller id comes first.

    Where a row's logits are all -inf or hold NaN, the model is broken: FloatingPointError.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    probability = torch.softmax(logits.double() / temperature, dim=-1)
    if not bool(torch.isfinite(probability).all()):
        raise FloatingPointError("the captioner's logits are not finite")
    ordered, ids = torch.sort(probability, dim=-1, descending=True, stable=True)
    outside = ordered.cumsum(dim=-1) - ordered >= top_p
    # In the order of ids: noise in the last digits reorders near-equal tokens, and must not change what is drawn.
    probability = probability.masked_fill(torch.empty_like(outside).scatter_(1, ids, outside), 0.0)
    mass = probability.cumsum(dim=-1)
    place = torch.searchsorted(mass, (randoms * mass[:, -1])[:, None], right=True)
    last = torch.searchsorted(mass, mass[:, -1:].contiguous())  # rounding may lead one past the nucleus
    return torch.minimum(place, last)[:, 0]


@torch.inference_mode()
def generate(step: Callable[[Tensor, Tensor], Tensor], first: Tensor, randoms: np.ndarray, sampling: Sampling, end: int, banned: tuple[int, ...] = ()) -> list[list[int]]:
    """Token lists of B captions, without `first` and the end.

    Args:
        step: (tokens (b,) drawn last, rows (b,) of the batch they belong to) -> logits (b, V). Rows that ended are no longer asked for.
        first: (B,) int64, the token that opens every caption.
        randoms: (B, L) float64, L at least `sampling.max_tokens`.
        end: id that closes a caption.
        banned: ids that are never drawn.
    """
    out: list[list[int]] = [[] for _ in first]
    alive, last, drawn = torch.arange(len(first)), first, torch.from_numpy(randoms)
    for position in range(sampling.max_tokens):
        logits = step(last, alive).clone()
        if banned:
            logits[:, list(banned)] = -torch.inf
        if position < sampling.min_tokens:
            logits[:, end] = -torch.inf
        last = draw(logits, drawn[alive, position], sampling.top_p, sampling.temperature)
        for row, token in zip(alive.tolist(), last.tolist(), strict=True):
            if token != end:
                out[row].append(token)
        going = last != end
        alive, last = alive[going], last[going]
        if not len(alive):
            break
    return out


class DrawnTokens:
    """A logits processor for `transformers`' generate(): leaves one token a row, the one that its own uniforms draw.

    With it, `do_sample=True` has no choice left, and the library keeps its caches, prompts and stopping.
    """

    def __init__(self, randoms: np.ndarray, sampling: Sampling, ends: tuple[int, ...]) -> None:
        self.randoms, self.sampling, self.ends, self.position = torch.from_numpy(randoms), sampling, list(ends), 0

    def __call__(self, tokens: Any, scores: Tensor) -> Tensor:
        scores = scores.clone()
        if self.position < self.sampling.min_tokens and self.ends:
            scores[:, self.ends] = -torch.inf
        drawn = draw(scores, self.randoms[:, min(self.position, self.randoms.shape[1] - 1)].to(scores.device), self.sampling.top_p, self.sampling.temperature)
        self.position += 1
        return torch.full_like(scores, -torch.inf).scatter(1, drawn[:, None], 0.0)
