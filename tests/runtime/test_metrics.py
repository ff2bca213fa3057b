"""Retrieval metrics against values worked out by hand and against independent formulas."""

from __future__ import annotations

import doctest
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime import metrics
from runtime.metrics import bootstrap_interval, mcnemar_p, paired_recall_test, ranks, recall_at_k


def test_worked_examples() -> None:
    result = doctest.testmod(metrics)
    assert result.attempted >= 7
    assert not result.failed


def test_ranks_by_hand() -> None:
    gallery = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]], np.float32)
    query = np.array([[3, 2, 1], [0, 0, -1], [1, 0.9, 0]], np.float32)
    # cosines with the gallery, first row: 3, 2, 1, 5/sqrt(2) over |q|: the last item is nearest
    assert ranks(query, gallery, [0, 2, 1]).tolist() == [2, 4, 3]


def test_ties_go_against_the_model() -> None:
    constant = np.ones((7, 4))
    assert ranks(constant, constant, range(7)).tolist() == [7] * 7
    gallery = np.array([[1.0, 0.0], [1.0, 1e-9], [0.0, 1.0]])
    assert ranks(np.array([[1.0, 0.0]]), gallery, [0]).tolist() == [2]


def test_zero_vectors_are_last_not_first() -> None:
    assert ranks(np.zeros((1, 3)), np.eye(3), [0]).tolist() == [3]


def test_several_right_items_do_not_push_each_other() -> None:
    gallery = np.array([[1.0, 0.0], [0.9, 0.1], [0.8, 0.2], [0.0, 1.0]])
    query = np.array([[1.0, 0.0]])
    assert ranks(query, gallery, [[1, 2]]).tolist() == [2]
    assert ranks(query, gallery, [[0, 1, 2, 3]]).tolist() == [1]
    assert ranks(np.array([[0.0, 1.0]]), gallery, [[0, 2]]).tolist() == [2]


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 40), g=st.integers(1, 40))
def test_equal_to_sorting_and_invariant_under_permutation(seed: int, n: int, g: int) -> None:
    generator = np.random.default_rng(seed)
    query, gallery = generator.normal(size=(n, 5)), generator.normal(size=(g, 5))
    targets = generator.integers(0, g, n)
    found = ranks(query, gallery, targets)
    unit = gallery / np.linalg.norm(gallery, axis=1, keepdims=True)
    order = np.argsort(-(query @ unit.T), axis=1)
    assert found.tolist() == [1 + order[i].tolist().index(t) for i, t in enumerate(targets)]

    p, q = generator.permutation(n), generator.permutation(g)
    where = np.argsort(q)
    np.testing.assert_array_equal(ranks(query[p], gallery[q], where[targets[p]]), found[p])
    np.testing.assert_array_equal(ranks(query * 3.5, gallery * 0.2, targets), found)


def test_more_queries_than_a_chunk() -> None:
    generator = np.random.default_rng(0)
    query = generator.normal(size=(1100, 8))
    found = ranks(query, query, range(1100))
    assert found.tolist() == [1] * 1100
    np.testing.assert_array_equal(ranks(query[600:], query, range(1100)[600:]), found[600:])


@pytest.mark.parametrize(
    ("query", "gallery", "targets", "message"),
    [
        (np.ones((2, 3)), np.ones((2, 4)), [0, 1], "differ in width"),
        (np.ones((2, 3)), np.ones((2, 3)), [0], "1 targets for 2"),
        (np.ones((1, 3)), np.ones((2, 3)), [2], "expected rows"),
        (np.ones((1, 3)), np.ones((2, 3)), [-1], "expected rows"),
        (np.ones((1, 3)), np.ones((2, 3)), [[]], "expected rows"),
        (np.ones(3), np.ones((2, 3)), [0], "two dimensions"),
        (np.full((1, 3), np.nan), np.ones((2, 3)), [0], "not finite"),
    ],
)
def test_wrong_input(query: np.ndarray, gallery: np.ndarray, targets: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ranks(query, gallery, targets)


def test_recall() -> None:
    found = np.array([1, 5, 6, 10, 11])
    assert [recall_at_k(found, k) for k in (1, 5, 10, 100)] == [0.2, 0.4, 0.8, 1.0]
    with pytest.raises(ValueError, match="no queries"):
        recall_at_k(np.array([]), 1)


def test_bootstrap_matches_the_binomial() -> None:
    values = np.repeat([0.0, 1.0], [700, 300])
    low, high = bootstrap_interval(values, seed=3, draws=20_000)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
    assert low == pytest.approx(0.3 - half, abs=0.003)
    assert high == pytest.approx(0.3 + half, abs=0.003)
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)
    narrow = bootstrap_interval(values, level=0.5, seed=3)
    assert narrow[1] - narrow[0] < high - low


def test_bootstrap_of_many_valued_data() -> None:
    values = np.random.default_rng(0).normal(5, 2, 400)
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.03)
    assert high == pytest.approx(values.mean() + half, abs=0.03)


def test_bootstrap_covers_the_truth() -> None:
    generator = np.random.default_rng(1)
    hits = 0
    for n in range(200):
        low, high = bootstrap_interval(generator.random(150) < 0.4, seed=n, draws=500)
        hits += low <= 0.4 <= high
    assert 178 <= hits <= 200


@pytest.mark.parametrize(("values", "level"), [([], 0.95), ([1.0], 0.0), ([1.0], 1.0), ([[1.0]], 0.95)])
def test_bootstrap_refuses(values: list, level: float) -> None:
    with pytest.raises(ValueError, match="expected"):
        bootstrap_interval(np.array(values), level)


def test_paired_test_by_hand() -> None:
    a = np.array([1] * 30 + [9] * 30 + [1] * 15 + [9] * 5)
    b = np.array([1] * 30 + [9] * 30 + [9] * 15 + [1] * 5)
    result = paired_recall_test(a, b, k=5, seed=0)
    assert result.difference == pytest.approx(10 / 80)
    assert result.p == pytest.approx(2 * sum(math.comb(20, i) for i in range(6)) / 2**20)
    assert result.interval[0] < result.difference < result.interval[1]
    assert result.interval[0] > 0
    back = paired_recall_test(b, a, k=5, seed=0)
    assert back.difference == -result.difference
    assert back.p == result.p


def test_paired_test_of_a_model_with_itself() -> None:
    same = np.arange(1, 50)
    assert paired_recall_test(same, same, 5) == (0.0, (0.0, 0.0), 1.0)
    with pytest.raises(ValueError, match="same queries"):
        paired_recall_test(same, same[1:], 5)


def test_mcnemar_large_counts_join_small_ones() -> None:
    assert mcnemar_p(480, 521) == pytest.approx(mcnemar_p(480, 520), rel=0.1)
    assert mcnemar_p(1000, 1000) == 1.0
    assert mcnemar_p(0, 2000) == 0.0 or mcnemar_p(0, 2000) < 1e-300
    # normal approximation with continuity correction, n = 4000
    z = (abs(2100 - 1900) - 1) / math.sqrt(4000)
    assert mcnemar_p(2100, 1900) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.01)
