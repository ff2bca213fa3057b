"""The order of samples: permutations without lists, windows of shards, draws that depend on nothing but their place."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.order import CAPTIONS, VIEWS, Order, mix, permute, stream_key, uniform


def reference_mix(value: int) -> int:
    """SplitMix64's output function, with Python's integers."""
    z = (value + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=20))
def test_mix_is_splitmix64(values: list[int]) -> None:
    assert mix(np.array(values, np.uint64)).tolist() == [reference_mix(value) for value in values]


def test_mix_gives_the_published_first_numbers_of_splitmix64() -> None:
    # Vigna's splitmix64.c with state 1234567: the generator adds the golden ratio before each output, as mix does
    states = np.array([(1234567 + n * 0x9E3779B97F4A7C15) % 2**64 for n in range(5)], np.uint64)
    assert mix(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]


@settings(max_examples=150, derandomize=True, deadline=None)
@given(st.integers(1, 700), st.integers(0, 2**63))
def test_permute_is_a_permutation_and_does_not_depend_on_who_else_is_asked(count: int, key: int) -> None:
    whole = permute(np.arange(count), count, np.uint64(key))
    assert sorted(whole.tolist()) == list(range(count))
    some = np.array([count - 1, 0, count // 2])
    np.testing.assert_array_equal(permute(some, count, np.uint64(key)), whole[some])


def test_a_huge_permutation_needs_no_list() -> None:
    count = 1_280_000_000
    places = np.concatenate([np.arange(1000), np.arange(count - 1000, count)])
    rows = permute(places, count, np.uint64(7))
    assert len(set(rows.tolist())) == 2000
    assert 0 <= rows.min() < 0.01 * count
    assert 0.99 * count < rows.max() < count
    assert abs(rows.mean() / count - 0.5) < 0.03
    assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 0.08


@pytest.mark.parametrize("count", [5, 12, 60])
def test_every_place_goes_everywhere_equally_often(count: int) -> None:
    """Chi-square of place against row over many epochs: within 6 standard deviations of its mean."""
    epochs = 1500
    hits = np.zeros((count, count))
    for epoch in range(epochs):
        hits[np.arange(count), permute(np.arange(count), count, stream_key(3, epoch, 4))] += 1
    expected = epochs / count
    chi = ((hits - expected) ** 2 / expected).sum()
    freedom = (count - 1) ** 2
    assert abs(chi - freedom) < 6 * np.sqrt(2 * freedom)


def test_small_permutations_are_all_found_about_equally_often() -> None:
    found = Counter(tuple(permute(np.arange(4), 4, stream_key(0, epoch, 0)).tolist()) for epoch in range(3000))
    assert set(found) == set(itertools.permutations(range(4)))
    assert 70 < min(found.values()) <= max(found.values()) < 190  # 125 on average


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any), st.integers(0, 5), st.integers(0, 2**40), st.integers(0, 100), st.integers(1, 60))
def test_any_stretch_of_the_order_is_that_of_the_whole(sizes: list[int], window: int, seed: int, first: int, size: int) -> None:
    order, count = Order(np.array(sizes), seed, window), sum(sizes)
    assert len(order) == count
    whole, epochs = order.rows(0, (first + size) // count * count + count)
    for start in range(0, len(whole), count):
        assert sorted(whole[start : start + count].tolist()) == list(range(count))
    assert epochs.tolist() == [n // count for n in range(len(whole))]
    again, its_epochs = Order(np.array(sizes), seed, window).rows(first, size)
    np.testing.assert_array_equal(again, whole[first : first + size])
    np.testing.assert_array_equal(its_epochs, epochs[first : first + size])


def test_windows_touch_few_shards_at_a_time_and_every_epoch_groups_them_anew() -> None:
    sizes = np.full(12, 50)
    order = Order(sizes, seed=1, shuffle_shards=3)
    groups = []
    for epoch in range(3):
        rows, _ = order.rows(epoch * 600, 600)
        for start in range(0, 600, 150):
            window = rows[start : start + 150]
            shards = frozenset((window // 50).tolist())
            assert len(shards) == 3
            assert len(set(window.tolist())) == 150
            assert window.tolist() != sorted(window.tolist())
            groups.append(shards)
    assert len(set(groups)) > 8


def test_draws_are_uniform_and_their_own() -> None:
    rows = np.arange(20_000)
    draws = uniform(5, 2, VIEWS, rows)
    assert 0 <= draws.min() < 0.001
    assert 0.999 < draws.max() < 1
    counts = np.bincount((draws * 30).astype(int), minlength=30)
    assert ((counts - 20_000 / 30) ** 2 / (20_000 / 30)).sum() < 29 + 6 * np.sqrt(58)
    np.testing.assert_array_equal(uniform(5, 2, VIEWS, rows[[7, 3]]), draws[[7, 3]])
    np.testing.assert_array_equal(uniform(5, np.array([2, 2]), VIEWS, rows[[7, 3]]), draws[[7, 3]])
    for other in (uniform(6, 2, VIEWS, rows), uniform(5, 3, VIEWS, rows), uniform(5, 2, CAPTIONS, rows), draws[::-1]):
        assert abs(np.corrcoef(draws, other)[0, 1]) < 0.04
