"""Searches for duplicates against brute force, and the hash against the package ImageHash."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from distill import duplicates
from distill.duplicates import Kept
from distill.perceptual_hash import BITS, HammingIndex, colour_thumbnail, perceptual_hash
from tests.distill.curation_world import blobs, encode

HASH = st.integers(0, 2**BITS - 1)


@st.composite
def clustered_hashes(draw: st.DrawFn) -> list[int]:
    """Hashes with neighbours: each is fresh, or a former one with a few bits flipped."""
    out = [draw(HASH)]
    for _ in range(draw(st.integers(0, 40))):
        value = draw(HASH) if draw(st.booleans()) else draw(st.sampled_from(out))
        for bit in draw(st.lists(st.integers(0, BITS - 1), max_size=7)):
            value ^= 1 << bit
        out.append(value)
    return out


@settings(max_examples=150, deadline=None)
@given(hashes=clustered_hashes(), distance=st.integers(0, 9), expected=st.sampled_from([1, 1000, 10**6, 10**9]))
def test_the_index_finds_what_brute_force_finds(hashes: list[int], distance: int, expected: int) -> None:
    """`expected` decides the bands (from many narrow ones to few wide ones whose bits are flipped), never the answer."""
    index = HammingIndex(distance, min(expected, 10**6) if distance > 5 else expected)
    for n, value in enumerate(hashes):
        assert index.add(value) == n
    for value in hashes:
        apart = [(value ^ other).bit_count() for other in hashes]
        assert index.within(value) == sorted((bits, n) for n, bits in enumerate(apart) if bits <= distance)


def test_bands_grow_wider_with_the_number_of_hashes() -> None:
    bands = [len(HammingIndex(4, expected)._bands) for expected in (100, 10**6, 10**8)]
    assert bands == sorted(bands, reverse=True)
    assert bands[0] > bands[-1]


@pytest.mark.parametrize("distance", [-1, 32])
def test_distances_that_mean_nothing(distance: int) -> None:
    with pytest.raises(ValueError, match="expected 0 to 31"):
        HammingIndex(distance, 10)


def check(kept: Kept, alike: np.ndarray, order: np.ndarray) -> None:
    """The law: the first of the order that has no kept neighbour before it is kept, and only such."""
    stays: list[int] = []
    for n in order.tolist():
        better = [other for other in stays if alike[n, other]]
        if better:
            assert kept.by[n] in better
        else:
            assert kept.by[n] == n
            stays.append(n)
    groups = kept.groups()
    assert sorted(np.flatnonzero(~kept.dropped).tolist()) == sorted(stays)
    assert sum(len(others) for others in groups.values()) == kept.dropped.sum()
    assert all(not kept.dropped[best] for best in groups)  # exactly one of each group stays


@settings(max_examples=100, deadline=None)
@given(hashes=clustered_hashes(), distance=st.integers(0, 6), colour=st.sampled_from([0, 10, 255]), seed=st.integers(0, 99))
def test_near_duplicates_follow_the_law(hashes: list[int], distance: int, colour: int, seed: int) -> None:
    rng, n = np.random.default_rng(seed), len(hashes)
    thumbnails = rng.integers(0, 12, (n, 48)).astype(np.uint8)
    values = np.array(hashes, np.uint64)
    alike = np.array([[(a ^ b).bit_count() <= distance for b in hashes] for a in hashes])
    alike &= np.abs(thumbnails[:, None].astype(int) - thumbnails[None]).max(axis=2) <= colour
    order = rng.permutation(n)
    kept, _ = duplicates.near(values, thumbnails, order, distance=distance, colour=colour)
    check(kept, alike, order)
    moved = rng.permutation(n)  # the same pictures in another order of the folder, the same preference
    again, _ = duplicates.near(values[moved], thumbnails[moved], np.argsort(moved)[order], distance=distance, colour=colour)
    assert set(moved[np.flatnonzero(again.dropped)]) == set(np.flatnonzero(kept.dropped))


@settings(max_examples=60, deadline=None)
@given(labels=st.lists(st.integers(0, 6), min_size=1, max_size=40), seed=st.integers(0, 99))
def test_exact_duplicates_keep_one_of_each(labels: list[int], seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(labels))
    kept = duplicates.exact(labels, order)
    check(kept, np.array(labels)[:, None] == np.array(labels)[None], order)
    assert (~kept.dropped).sum() == len(set(labels))


def scattered(rng: np.random.Generator, n: int, centres: int, dim: int, noise: float) -> np.ndarray:
    points = rng.standard_normal((centres, dim))[rng.integers(0, centres, n)] + noise * rng.standard_normal((n, dim))
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 1300), seed=st.integers(0, 99), threshold=st.sampled_from([0.5, 0.8, 0.95]))
def test_one_cell_finds_every_embedding_duplicate(n: int, seed: int, threshold: float) -> None:
    """Blocks (512 rows) are crossed; cosines within rounding of the threshold may fall either way."""
    rng = np.random.default_rng(seed)
    vectors, order = scattered(rng, n, 1 + n // 4, 16, 0.12), rng.permutation(n)
    cosine = vectors @ vectors.T
    if (np.abs(cosine - threshold) < 1e-6).any():
        return
    kept, cells = duplicates.embedded(lambda rows: vectors[rows], order, threshold=threshold, cells=1)
    assert cells == 1
    check(kept, cosine >= threshold, order)
    dropped = np.flatnonzero(kept.dropped)
    np.testing.assert_allclose(kept.apart[dropped], cosine[dropped, kept.by[dropped]], atol=1e-5)


def test_cells_find_nearly_all_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    vectors, order = scattered(rng, 6000, 1500, 32, 0.04), rng.permutation(6000)
    complete, _ = duplicates.embedded(lambda rows: vectors[rows], order, threshold=0.96, cells=1)
    kept, cells = duplicates.embedded(lambda rows: vectors[rows], order, threshold=0.96, cells=12)
    assert cells == 12
    dropped = np.flatnonzero(kept.dropped)
    assert ((vectors[dropped] * vectors[kept.by[dropped]]).sum(axis=1) >= 0.96 - 1e-5).all()
    assert not kept.dropped[kept.by[dropped]].any()
    assert kept.dropped.sum() >= 0.98 * complete.dropped.sum()
    assert complete.dropped.sum() > 4000
    moved = rng.permutation(6000)
    again, _ = duplicates.embedded(lambda rows: vectors[moved][rows], np.argsort(moved)[order], threshold=0.96, cells=12)
    assert set(moved[np.flatnonzero(again.dropped)]) == set(dropped)


def test_more_cells_than_rows() -> None:
    vectors = np.eye(3, dtype=np.float32)[[0, 1, 2, 0]]
    kept, _ = duplicates.embedded(lambda rows: vectors[rows], np.arange(4), threshold=0.9, cells=50)
    assert kept.by.tolist() == [0, 1, 2, 0]


# ---------------------------------------------------------------- the hash


def test_the_hash_is_that_of_imagehash() -> None:
    imagehash = pytest.importorskip("imagehash", reason="the peer is installed with the extra dev")
    for seed in range(200):
        picture = blobs(seed, (37 + seed, 300 - seed))
        ImageDraw.Draw(picture).ellipse((5, 5, 20 + seed % 13, 30), fill=(seed, 0, 255 - seed))
        assert perceptual_hash(picture) == int(str(imagehash.phash(picture)), 16)


def test_golden_hash() -> None:
    assert f"{perceptual_hash(blobs(7)):016x}" == "a96416f36c61ae9c"


def test_pictures_without_content_share_one_hash() -> None:
    flat = {perceptual_hash(Image.new("RGB", size, colour)) for size in ((8, 8), (100, 31)) for colour in ((9, 9, 9), (200, 10, 90), (255, 255, 255))}
    assert len(flat) == 1
    assert colour_thumbnail(Image.new("RGB", (9, 5), (1, 2, 3))).tolist() == [1, 2, 3] * 16


def test_recompressed_and_resized_pictures_stay_near() -> None:
    bits, strangers = [], []
    for seed in range(50):
        picture = blobs(seed, (128, 128))
        worse = Image.open(io.BytesIO(encode(picture, "JPEG", quality=30))).convert("RGB")
        bits += [(perceptual_hash(picture) ^ perceptual_hash(other)).bit_count() for other in (worse, picture.resize((60, 60)), picture.resize((300, 300)))]
        strangers.append((perceptual_hash(picture) ^ perceptual_hash(blobs(seed + 1000, (128, 128)))).bit_count())
    assert np.mean(np.array(bits) <= 4) > 0.95
    assert max(bits) < min(strangers)
