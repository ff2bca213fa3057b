"""Nucleus sampling: the distribution is the nucleus', and a caption's tokens depend on nothing but its own uniforms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.nucleus import Sampling, draw, generate, uniforms


def nucleus(probability: np.ndarray, top_p: float) -> set[int]:
    """The textbook's set: tokens by falling probability until their sum reaches top_p."""
    chosen, mass = set(), 0.0
    for token in np.argsort(-probability, kind="stable"):
        chosen.add(int(token))
        mass += probability[token]
        if mass >= top_p:
            break
    return chosen


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-8, 8), min_size=1, max_size=12), st.floats(0, 1, exclude_max=True), st.floats(0.05, 1), st.floats(0.2, 3))
def test_a_drawn_token_lies_in_the_nucleus(logits: list[float], random: float, top_p: float, temperature: float) -> None:
    rows = torch.tensor([logits], dtype=torch.float32)
    token = int(draw(rows, torch.tensor([random], dtype=torch.float64), top_p, temperature)[0])
    probability = torch.softmax(rows.double() / temperature, 1)[0].numpy()
    assert token in nucleus(probability, top_p - 1e-9) | nucleus(probability, top_p + 1e-9)


def test_frequencies_are_those_of_the_nucleus() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.05, 0.3, 0.15]]))
    randoms = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    found = np.bincount(draw(logits.expand(20_000, 4), randoms, 0.9, 1.0).numpy(), minlength=4) / 20_000
    np.testing.assert_allclose(found, np.array([0.5, 0.0, 0.3, 0.15]) / 0.95, atol=2e-4)


def test_warped_distribution_equals_transformers() -> None:
    warpers = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(50, 40, generator=torch.Generator().manual_seed(0)) * 3
    theirs = torch.softmax(warpers.TopPLogitsWarper(0.8)(None, warpers.TemperatureLogitsWarper(0.7)(None, logits)), 1)
    randoms = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    for row in range(50):
        found = np.bincount(draw(logits[row].expand(4000, 40), randoms, 0.8, 0.7).numpy(), minlength=40) / 4000
        np.testing.assert_allclose(found, theirs[row].numpy(), atol=1e-3)


def test_uniforms_are_a_function_of_seed_key_and_number() -> None:
    one = uniforms(0, "key", 3, 8)
    assert (one == uniforms(0, "key", 3, 8)).all()
    assert (one[:4] == uniforms(0, "key", 3, 4)).all()
    others = [uniforms(1, "key", 3, 8), uniforms(0, "kez", 3, 8), uniforms(0, "key", 4, 8)]
    assert all(not (one == other).any() for other in others)
    assert 0 <= one.min() < one.max() < 1


def test_not_finite_logits_are_an_error() -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(FloatingPointError, match="not finite"):
            draw(torch.tensor([[0.0, value]]), torch.tensor([0.5], dtype=torch.float64), 0.9, 1.0)


class Chain:
    """A Markov chain as a language model: token 0 ends."""

    def __init__(self, size: int = 6) -> None:
        self.table = torch.randn(size, size, generator=torch.Generator().manual_seed(3))
        self.asked: list[int] = []

    def __call__(self, last: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        self.asked.append(len(rows))
        return self.table[last]


def test_rows_do_not_depend_on_their_neighbours_and_ended_ones_are_left_out() -> None:
    randoms = np.random.default_rng(0).random((64, 12))
    sampling, chain = Sampling(max_tokens=12, min_tokens=2), Chain()
    all_rows = generate(chain, torch.ones(64, dtype=torch.int64), randoms, sampling, 0, (1,))
    assert chain.asked == sorted(chain.asked, reverse=True)
    assert chain.asked[-1] < 64
    for row in range(0, 64, 7):
        assert generate(Chain(), torch.ones(1, dtype=torch.int64), randoms[row : row + 1], sampling, 0, (1,)) == [all_rows[row]]
    lengths = {len(row) for row in all_rows}
    assert min(lengths) >= 2
    assert max(lengths) <= 12
    assert len(lengths) > 3
    assert not any(1 in row for row in all_rows)
