"""Codecs: bounds of what they lose, against peers where there are any, and what that loss does to a teacher's affinities."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from distill import store_codecs
from distill.affinity import affinity_kl
from distill.store_codecs import LEVELS, block_size, decode, decode_unit, encode, from_bfloat16, quantise, rotate, rotation_signs, to_bfloat16, unit, unrotate
from runtime.errors import StoreError
from runtime.store_index import DTYPES

DIMS = (1, 2, 3, 8, 24, 40, 63, 64, 100, 256, 512, 640, 768, 1152)


def teacher_like(rng: np.random.Generator, n: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Images and texts of n things of 20 kinds, with the few large coordinates and the falling spectrum that towers of CLIP have."""
    turn = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    kinds, own = (rng.standard_normal((count, dim)) * np.arange(1, dim + 1) ** -0.5 @ turn for count in (20, n))
    latent = kinds[rng.integers(0, 20, n)] + 0.3 * own
    latent /= np.linalg.norm(latent, axis=1, keepdims=True)
    noise = [rng.standard_normal((n, dim)) * dim**-0.5 for _ in range(2)]
    offset = np.zeros(dim)
    offset[[7, dim // 3]] = 0.6, -0.4
    return unit((latent / 2 + noise[0] + offset).astype(np.float32)), unit((latent / 2 + noise[1] - offset / 2).astype(np.float32))


# ---------------------------------------------------------------- int8, bfloat16


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1e-6, 1e-3, 1.0, 100.0]))
def test_int8_error_is_half_a_step(seed: int, size: float) -> None:
    vectors = np.random.default_rng(seed).standard_normal((4, 32)).astype(np.float32) * np.float32(size)
    values, scales = quantise(vectors)
    step = scales.astype(np.float32)[:, None]
    # half a step of rounding; the largest value may also be clipped by what float16 rounds off its scale
    assert (np.abs(values * step - vectors) <= 0.5 * step + 0.08 * step).all()


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.floats(-(2.0**100), 2.0**100, width=32))
def test_bfloat16_equals_torch(value: float) -> None:
    import torch

    found = from_bfloat16(to_bfloat16(np.array([value], np.float32)))
    assert found[0] == torch.tensor([value]).to(torch.bfloat16).float().item()


# ---------------------------------------------------------------- any


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_shapes_and_single_vectors(dtype: str, dim: int) -> None:
    vectors = unit(np.random.default_rng(dim).standard_normal((2, 3, dim)).astype(np.float32))
    values, scales = encode(vectors, dtype)
    found = decode(values, scales, dtype, dim)
    assert found.shape == vectors.shape
    assert found.dtype == np.float32
    one = decode_unit(values[1, 2], None if scales is None else scales[1, 2], dtype, dim)
    assert np.abs(one - unit(found)[1, 2]).max() < 1e-6
    alone, own = encode(vectors[1, 2], dtype)
    assert np.array_equal(alone, values[1, 2])  # neighbours change no bit
    assert (own is None) == (scales is None) or np.array_equal(own, scales[1, 2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_vectors_stay_finite(dtype: str) -> None:
    values, scales = encode(np.zeros((2, 8), np.float32), dtype)
    found = decode(values, scales, dtype, 8)
    assert np.abs(found).max() < 1e-6
    assert np.isfinite(decode_unit(values[0], None if scales is None else scales[0], dtype, 8)).all()


def test_an_unknown_dtype() -> None:
    with pytest.raises(StoreError, match="dtype 'int2' is unknown; expected int8"):
        encode(np.zeros((1, 8), np.float32), "int2")


# ---------------------------------------------------------------- int4


@pytest.mark.parametrize("dim", DIMS)
def test_the_rotation_is_orthogonal_and_the_one_that_the_format_names(dim: int) -> None:
    matrix = rotate(np.eye(dim, dtype=np.float32))  # rows: images of the axes
    assert np.abs(matrix @ matrix.T - np.eye(dim)).max() < 1e-5
    size = block_size(dim)
    assert dim % size == 0
    assert size & (size - 1) == 0
    assert dim % (2 * size) != 0
    expected = np.kron(np.eye(dim // size), scipy.linalg.hadamard(size) / size**0.5) * rotation_signs(dim)  # y = H (s * x): column i carries s[i]
    assert np.abs(matrix.T - expected).max() < 1e-5


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.sampled_from(DIMS), st.integers(0, 10_000))
def test_turning_back_gives_the_vector_and_keeps_products(dim: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((2, 5, dim)).astype(np.float32)
    assert np.abs(unrotate(rotate(a)) - a).max() < 1e-5 * (1 + np.abs(a).max())
    assert np.abs((rotate(a) * rotate(b)).sum(1) - (a * b).sum(1)).max() < 1e-4 * dim


def test_signs_come_from_sha256() -> None:
    digest = hashlib.sha256(b"mclip-int4-1:768:1").digest()
    assert [rotation_signs(768)[256 + i] < 0 for i in range(16)] == [bool(digest[i // 8] >> i % 8 & 1) for i in range(16)]
    assert 300 < (rotation_signs(768) < 0).sum() < 468


def test_the_levels_are_those_of_lloyd_and_max() -> None:
    """Their condition, found anew: every level is the mean of a Gaussian between its borders."""
    levels = np.linspace(-3, 3, 16)
    for _ in range(3000):
        borders = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
        levels = -np.diff(scipy.stats.norm.pdf(borders)) / np.diff(scipy.stats.norm.cdf(borders))
    assert np.abs(levels - LEVELS).max() < 1e-4


@settings(max_examples=40, derandomize=True, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([64, 192, 256, 768]), st.sampled_from(["gauss", "spike", "sparse", "constant", "uniform"]))
def test_int4_error_is_bounded_whatever_the_vector(seed: int, dim: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    vectors = {
        "gauss": lambda: rng.standard_normal((6, dim)), "spike": lambda: np.eye(dim)[rng.integers(0, dim, 6)] + 0.01 * rng.standard_normal((6, dim)),
        "sparse": lambda: rng.standard_normal((6, dim)) * (rng.random((6, dim)) < 0.05) + 1e-3, "constant": lambda: np.full((6, dim), rng.standard_normal()),
        "uniform": lambda: rng.uniform(-1, 1, (6, dim)),
    }[kind]().astype(np.float32)  # fmt: skip
    found = decode(*encode(vectors, "int4"), "int4", dim)
    # a Gaussian loses 0.0095 of its energy on the average; the turned blocks are close to one
    assert (((found - vectors) ** 2).sum(1) <= 0.02 * (vectors**2).sum(1)).all()


def test_the_scale_is_the_best_of_all() -> None:
    """Against a fine search of the scale, exact levels at each step."""
    turned = np.random.default_rng(0).standard_normal((50, 64)).astype(np.float32)
    scales = store_codecs._best_scales(turned)
    tried = np.linspace(0.6, 1.4, 200, dtype=np.float32)
    errors = np.stack([((turned - s * LEVELS[store_codecs.nearest_level(turned, np.full(50, s))]) ** 2).sum(1) for s in tried])
    own = ((turned - scales[:, None] * LEVELS[store_codecs.nearest_level(turned, scales)]) ** 2).sum(1)
    assert (own / errors.min(axis=0)).mean() < 1.02
    at_rms = ((turned - LEVELS[store_codecs.nearest_level(turned, np.sqrt((turned**2).mean(1)))] * np.sqrt((turned**2).mean(1))[:, None]) ** 2).sum(1)
    assert own.sum() < 0.85 * at_rms.sum()


def test_int4_bytes_are_the_format() -> None:
    """Canonical bytes of two vectors; a change of the format must come with another version of it."""
    vectors = unit(np.arange(2 * 192, dtype=np.float32).reshape(2, 192) % 37 - 18)
    values, scales = encode(vectors, "int4")
    assert (values.shape, scales.shape) == ((2, 96), (2, 3))
    assert hashlib.sha256(values.tobytes() + scales.tobytes()).hexdigest() == INT4_SHA256
    assert np.array_equal(values, np.concatenate([encode(vectors[n], "int4")[0][None] for n in range(2)]))


INT4_SHA256 = "735dd70e8d595c992fd47e266d917945ec6346d93859be48d49f053d32f6ded5"


# ---------------------------------------------------------------- what matters: affinities


def test_affinity_kl_by_hand() -> None:
    import torch

    rng = np.random.default_rng(0)
    i, t, di, dt = (unit(rng.standard_normal((n, 6)).astype(np.float32)) for n in (5, 7, 5, 7))
    p, q = torch.tensor(20 * i @ t.T), torch.tensor(20 * di @ dt.T)
    rows = [torch.nn.functional.kl_div(b.log_softmax(1), a.log_softmax(1), reduction="batchmean", log_target=True).item() for a, b in ((p, q), (p.T, q.T))]
    assert affinity_kl(i, t, di, dt, 20.0) == pytest.approx(np.mean(rows), rel=1e-4)
    assert affinity_kl(i, t, i, t, 20.0) == 0
    with pytest.raises(StoreError, match="twice each"):
        affinity_kl(i, t, di[:4], dt, 20.0)


def _kl(images: np.ndarray, texts: np.ndarray, dtype: str = "int4") -> float:
    dim = images.shape[1]
    return affinity_kl(images, texts, *(unit(decode(*encode(vectors, dtype), dtype, dim)) for vectors in (images, texts)), 100.0)


@pytest.mark.parametrize("dim", [256, 768])
def test_rotation_and_levels_pay_in_affinities(monkeypatch: pytest.MonkeyPatch, dim: int) -> None:
    """On vectors with large coordinates: int4 as stored, without the rotation, with evenly spaced levels, and rounded by the largest value."""
    images, texts = teacher_like(np.random.default_rng(0), 300, dim)
    stored, int8 = _kl(images, texts), _kl(images, texts, "int8")
    with monkeypatch.context() as patched:
        patched.setattr(store_codecs, "rotate", lambda vectors: vectors)
        patched.setattr(store_codecs, "unrotate", lambda vectors: vectors)
        unrotated = _kl(images, texts)
    tables = (store_codecs._level_pairs, store_codecs._level_table)
    with monkeypatch.context() as patched:
        patched.setattr(store_codecs, "LEVELS", ((np.arange(16) - 7.5) * 0.3352).astype(np.float32))  # the best even step for a Gaussian
        [table.cache_clear() for table in tables]
        even = _kl(images, texts)
    [table.cache_clear() for table in tables]
    largest = [np.abs(vectors).max(1, keepdims=True) / 7 for vectors in (images, texts)]
    naive = affinity_kl(images, texts, *(unit(np.rint(vectors / s) * s) for vectors, s in zip((images, texts), largest, strict=True)), 100.0)
    assert int8 < 0.1 * stored
    assert stored < 0.95 * even
    assert stored < 0.6 * unrotated
    assert stored < 0.2 * naive
