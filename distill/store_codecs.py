"""How embeddings are stored: int8, int4, float32, float16 and bfloat16, to bytes and back. Pure functions of their arguments.

int4 turns every vector before it is rounded: random signs, then a Hadamard transform of blocks, so that its values are spread like a
Gaussian whatever they were (QuIP#, arXiv 2402.04396, section 3; QuaRot, arXiv 2404.00456). Sixteen levels made for a Gaussian (Lloyd 1982,
Max 1960) then lose least. Both steps are orthogonal: inner products, all that training uses, suffer the rounding only.

Encoding is elementwise or summed along the last axis alone, so the bytes of a vector do not depend on its neighbours.
Shapes: D = dimension, b = block (largest power of two that divides D), G = scales a vector, g = D / G values that share one.
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np

from runtime.errors import StoreError
from runtime.store_index import DTYPES
from runtime.store_parts import int4_scales

_SMALLEST = np.float16(6e-8)
"""The smallest positive half: an all-zero vector must not divide by zero."""

LEVELS = np.array([
    -2.7326, -2.0690, -1.6181, -1.2562, -0.9424, -0.6568, -0.3881, -0.1284, 0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0690, 2.7326,
], np.float32)  # fmt: skip
"""The 16 levels of least squared error for a standard Gaussian, to four digits; part of the format."""


def encode(vectors: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray | None]:
    """float32 (…, D) -> stored values (…, D; D/2 for int4) and, for int8 and int4, float16 scales (…) or (…, G)."""
    vectors = np.ascontiguousarray(vectors, np.float32)
    if dtype == "int8":
        return quantise(vectors)
    if dtype == "int4":
        return quantise_int4(vectors)
    if dtype == "bfloat16":
        return to_bfloat16(vectors), None
    if dtype not in DTYPES:
        raise StoreError(f"dtype '{dtype}' is unknown; expected {', '.join(DTYPES)}")
    return vectors.astype({"float32": "<f4", "float16": "<f2"}[dtype]), None


def decode(values: np.ndarray, scales: np.ndarray | None, dtype: str, dim: int) -> np.ndarray:
    """What `encode` made -> float32 (…, D), not normalised."""
    if dtype == "int8":
        assert scales is not None
        return values.astype(np.float32) * scales.astype(np.float32)[..., None]
    if dtype == "int4":
        assert scales is not None
        return dequantise_int4(values, scales, dim)
    if dtype == "bfloat16":
        return from_bfloat16(values)
    return values.astype(np.float32)


def decode_unit(values: np.ndarray, scales: np.ndarray | None, dtype: str, dim: int) -> np.ndarray:
    """One stored vector (D,) -> float32 (D,) of unit norm, with little overhead."""
    if dtype == "int4":
        assert scales is not None
        vector = _dequantise_one(values, scales, dim)
    else:  # int8: one scale for the whole vector falls out of the norm
        vector = values.astype(np.float32) if dtype == "int8" else decode(values, scales, dtype, dim)
    norm = float(np.dot(vector, vector)) ** 0.5
    return vector if norm == 0 else np.multiply(vector, np.float32(1 / norm), out=vector)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows of unit norm; a zero row stays zero."""
    norm = np.sqrt((vectors * vectors).sum(axis=-1, keepdims=True, dtype=np.float32))
    return vectors / np.maximum(norm, np.float32(1e-12))


# ---------------------------------------------------------------- bfloat16, int8


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 bits as uint16, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits as uint16 -> float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def quantise(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 (…, D) -> int8 (…, D) and float16 scales (…), so that int8 * scale approximates the vector."""
    scales = (np.abs(vectors).max(axis=-1) / 127).astype(np.float16)
    scales = np.maximum(scales, _SMALLEST)
    values = np.rint(vectors / scales.astype(np.float32)[..., None])
    return np.clip(values, -127, 127).astype(np.int8), scales


# ---------------------------------------------------------------- int4


def block_size(dim: int) -> int:
    """Largest power of two that divides the dimension: the rotation needs no padding. An odd dimension is not rotated (b = 1)."""
    return dim & -dim


@functools.lru_cache(maxsize=64)
def rotation_signs(dim: int) -> np.ndarray:
    """(D,) float32 of +1 and -1: bit i % 8 (lowest first) of byte i // 8 of the stream sha256("mclip-int4-1:D:0"), sha256("mclip-int4-1:D:1"), …"""
    stream = b"".join(hashlib.sha256(f"mclip-int4-1:{dim}:{n}".encode()).digest() for n in range(-(-dim // 256)))
    bits = np.unpackbits(np.frombuffer(stream, np.uint8), bitorder="little")[:dim]
    signs = np.where(bits == 1, np.float32(-1), np.float32(1))
    signs.setflags(write=False)
    return signs


def rotate(vectors: np.ndarray) -> np.ndarray:
    """float32 (…, D) -> float32 (…, D): signs, then the orthonormal Hadamard transform (Sylvester's order) of each block of b values."""
    return _hadamard(vectors * rotation_signs(vectors.shape[-1]))


def unrotate(vectors: np.ndarray) -> np.ndarray:
    """The inverse of `rotate`, by two products with small matrices: Sylvester's matrix is the Kronecker product of two smaller ones."""
    dim = vectors.shape[-1]
    size = block_size(dim)
    if size > 1:
        rows = 1 << (size.bit_length() // 2)
        across, down = hadamard_matrix(size // rows), hadamard_matrix(rows)
        turned = vectors.reshape(-1, size // rows) @ across
        turned = turned.reshape(-1, rows, size // rows).transpose(0, 2, 1).reshape(-1, rows) @ down
        vectors = turned.reshape(-1, size // rows, rows).transpose(0, 2, 1).reshape(vectors.shape)
    return vectors * rotation_signs(dim)


@functools.lru_cache(maxsize=16)
def hadamard_matrix(size: int) -> np.ndarray:
    """(size, size) float32, orthonormal and symmetric, in Sylvester's order; size is a power of two."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return np.ascontiguousarray(matrix * np.float32(size**-0.5), np.float32)


def _hadamard(vectors: np.ndarray) -> np.ndarray:
    """Blocks stand in columns, so each butterfly step adds long contiguous runs; no sum's order depends on how many vectors there are."""
    dim = vectors.shape[-1]
    size = block_size(dim)
    if size == 1 or not vectors.size:
        return vectors.astype(np.float32, copy=False)
    columns = np.ascontiguousarray(vectors.reshape(-1, size).T, np.float32)
    other = np.empty_like(columns)
    half = 1
    while half < size:
        source, target = columns.reshape(size // (2 * half), 2, half, -1), other.reshape(size // (2 * half), 2, half, -1)
        np.add(source[:, 0], source[:, 1], out=target[:, 0])
        np.subtract(source[:, 0], source[:, 1], out=target[:, 1])
        columns, other = other, columns
        half *= 2
    columns *= np.float32(size**-0.5)
    return np.ascontiguousarray(columns.T).reshape(vectors.shape)


def quantise_int4(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 (…, D) -> uint8 (…, ceil(D / 2)), the even value in the low half of its byte, and float16 scales (…, G).

    Each scale is the one of least squared error among those that follow from nine trial scales around the root mean square.
    """
    dim, lines = vectors.shape[-1], vectors.reshape(-1, vectors.shape[-1])
    groups = int4_scales(dim)
    packed, scales = np.empty((len(lines), -(-dim // 2)), np.uint8), np.empty((len(lines), groups), np.float16)
    for start in range(0, len(lines), _AT_ONCE):  # what fits the processor's cache
        span = slice(start, start + _AT_ONCE)
        turned = rotate(lines[span]).reshape(-1, groups, dim // groups)
        scales[span] = np.maximum(_best_scales(turned).astype(np.float16), _SMALLEST)
        codes = nearest_level(turned, scales[span].astype(np.float32)).reshape(-1, dim)
        if dim % 2:
            codes = np.concatenate([codes, np.zeros((len(codes), 1), np.uint8)], axis=1)
        packed[span] = codes[:, 0::2] | (codes[:, 1::2] << 4)
    return packed.reshape(*vectors.shape[:-1], -(-dim // 2)), scales.reshape(*vectors.shape[:-1], groups)


_AT_ONCE = 128
"""Vectors that are encoded together; no byte depends on it."""


def _best_scales(turned: np.ndarray) -> np.ndarray:
    """float32 (…, g) -> float32 (…). For levels l chosen with a trial scale, s = vl/ll has the least error, vv - (vl)^2/ll."""
    spread = np.maximum(np.sqrt((turned * turned).mean(axis=-1, dtype=np.float32)), np.float32(_SMALLEST))
    shares = turned * (np.float32(_BINS) / spread)[..., None]
    best, scales = np.full(spread.shape, -1, np.float32), spread
    for trial in np.arange(0.76, 1.25, 0.06):
        bins = np.clip(shares * np.float32(1 / trial) + np.float32(4 * _BINS), 0, 8 * _BINS - 1).astype(np.intp)
        levels = _level_table().take(bins)
        gain = (turned * levels).sum(axis=-1, dtype=np.float32)
        energy = (levels * levels).sum(axis=-1, dtype=np.float32)
        better = gain * gain > best * energy
        best, scales = np.where(better, gain * gain / energy, best), np.where(better, gain / energy, scales)
    return scales


_BINS = 64
"""Bins a unit of the table that finds levels while a scale is sought; the values that are stored are found exactly."""


@functools.lru_cache(maxsize=1)
def _level_table() -> np.ndarray:
    """(8 * _BINS,) float32: the level nearest to the middle of each bin, from -4 to 4."""
    middles = ((np.arange(8 * _BINS) - 4 * _BINS + 0.5) / _BINS).astype(np.float32)
    return LEVELS[nearest_level(middles, np.float32(1))]


def nearest_level(values: np.ndarray, scales: np.ndarray | np.float32) -> np.ndarray:
    """float32 (…, g), scales (…) -> uint8 (…, g): number of the level nearest to value / scale; the upper one where two are alike."""
    shares = values / np.asarray(scales)[..., None]
    codes = np.zeros(shares.shape, np.uint8)
    for bound in (LEVELS[1:] + LEVELS[:-1]) / 2:  # fifteen comparisons are faster than a search
        codes += shares >= bound
    return codes


@functools.lru_cache(maxsize=1)
def _level_pairs() -> np.ndarray:
    """(256,) items of 8 bytes: both levels of a byte, as float32 (numpy takes one item faster than two)."""
    codes = np.arange(256)
    return np.stack([LEVELS[codes & 15], LEVELS[codes >> 4]], axis=1).astype(np.float32).view(np.complex64).ravel()


def dequantise_int4(packed: np.ndarray, scales: np.ndarray, dim: int) -> np.ndarray:
    """uint8 (…, ceil(D / 2)) and float16 (…, G) -> float32 (…, D)."""
    groups = scales.shape[-1]
    levels = _level_pairs().take(packed).view(np.float32).reshape(-1, 2 * packed.shape[-1])[:, :dim]
    turned = levels.reshape(-1, groups, dim // groups)
    turned *= scales.astype(np.float32).reshape(-1, groups, 1)
    return unrotate(turned.reshape(-1, dim)).reshape(*packed.shape[:-1], dim)


def _dequantise_one(packed: np.ndarray, scales: np.ndarray, dim: int) -> np.ndarray:
    """`dequantise_int4` of one vector, with fewer steps: (ceil(D / 2),) and (G,) -> (D,)."""
    size = block_size(dim)
    if size < 4:
        return dequantise_int4(packed, scales, dim)
    turned = _level_pairs().take(packed).view(np.float32).reshape(len(scales), -1)
    turned *= scales.astype(np.float32)[:, None]
    rows = 1 << (size.bit_length() // 2)
    blocks = hadamard_matrix(rows) @ (turned.reshape(-1, rows, size // rows) @ hadamard_matrix(size // rows))
    return blocks.reshape(dim) * rotation_signs(dim)
