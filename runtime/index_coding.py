"""How vectors lie on disk: one record a vector, with a checksum in it. Float16, int8 or one bit a dimension.

Shapes: n = vectors, D = dimensions stored. Format: docs/index-format.md (normative).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

DTYPES = ("float16", "int8", "binary")
_GOLDEN = np.uint32(0x9E3779B1)


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Coding:
    """What a record holds.

    Attributes:
        dtype: of DTYPES.
        dims: D. Below the model's width, the first D values at unit norm: a nested prefix.
        centre, rotation: float32 (D,) and orthogonal (D, D), of binary codes only.
    """

    dtype: str
    dims: int
    centre: np.ndarray | None = None
    rotation: np.ndarray | None = None

    @property
    def code_bytes(self) -> int:
        """Bytes of the values alone."""
        return {"float16": 2 * self.dims, "int8": self.dims, "binary": (self.dims + 7) // 8}[self.dtype]

    @property
    def record_bytes(self) -> int:
        """Bytes of a record: values, scale where there is one, padding to a multiple of 4, checksum."""
        return -(-(self.code_bytes + (2 if self.dtype != "float16" else 0)) // 4) * 4 + 4

    def prefix(self, vectors: np.ndarray) -> np.ndarray:
        """The part of float32 (n, width) that is stored, at unit norm."""
        if vectors.shape[-1] == self.dims:
            return vectors
        part = vectors[..., : self.dims]
        return np.asarray(part / np.maximum(np.linalg.norm(part, axis=-1, keepdims=True), 1e-12), np.float32)

    def encode(self, vectors: np.ndarray, first: int = 0) -> np.ndarray:
        """float32 (n, width) -> uint8 (n, record_bytes); first: number of the first row."""
        vectors = self.prefix(np.ascontiguousarray(vectors, np.float32))
        records = np.zeros((len(vectors), self.record_bytes), np.uint8)
        scales = None
        if self.dtype == "float16":
            codes = vectors.astype("<f2").view(np.uint8)
        elif self.dtype == "int8":
            scales = np.maximum(np.abs(vectors).max(axis=1) / 127, 2.0**-24).astype("<f2")
            codes = np.clip(np.rint(vectors / scales.astype(np.float32)[:, None]), -127, 127).astype(np.int8).view(np.uint8)
        else:
            rest = (vectors - self.centre) @ self.rotation.T  # type: ignore[union-attr]
            # With this scale the decoded residual has the true inner product with the residual itself.
            scales = np.minimum(np.square(rest).sum(axis=1) / np.maximum(np.abs(rest).sum(axis=1), 1e-12), 6e4).astype("<f2")
            codes = np.packbits(rest >= 0, axis=1)
        records[:, : self.code_bytes] = codes.reshape(len(vectors), -1)
        if scales is not None:
            records[:, self.code_bytes : self.code_bytes + 2] = scales.view(np.uint8).reshape(-1, 2)
        return sealed(records, first)

    def decode(self, records: np.ndarray) -> np.ndarray:
        """uint8 (n, record_bytes) -> float32 (n, D)."""
        codes = np.ascontiguousarray(records[:, : self.code_bytes])
        if self.dtype == "float16":
            return codes.view("<f2").astype(np.float32)
        if self.dtype == "int8":
            return codes.view(np.int8).astype(np.float32) * self._scales(records)
        signs = np.unpackbits(codes, axis=1, count=self.dims).astype(np.float32) * 2 - 1
        return np.asarray((signs * self._scales(records)) @ self.rotation + self.centre, np.float32)

    def scores(self, records: np.ndarray, query: np.ndarray) -> np.ndarray:
        """Inner products of records with a query, float32 (D,) -> float32 (n,)."""
        codes = np.ascontiguousarray(records[:, : self.code_bytes])
        if self.dtype == "float16":
            return along(codes.view("<f2").astype(np.float32), query)
        if self.dtype == "int8":
            return along(codes.view(np.int8).astype(np.float32), query) * self._scales(records)[:, 0]
        turned = along(np.asarray(self.rotation), query)
        bits = along(np.unpackbits(codes, axis=1, count=self.dims).astype(np.float32), 2 * turned) - turned.sum()
        return np.asarray(bits * self._scales(records)[:, 0] + self.centre @ query, np.float32)

    def _scales(self, records: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(records[:, self.code_bytes : self.code_bytes + 2]).view("<f2").astype(np.float32)


def along(rows: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Inner products of float32 (n, D) with (D,). One query is no work for the threads of a BLAS: on a busy machine waking them takes longer than this."""
    return np.asarray(np.einsum("ij,j->i", rows, query))


def binary_frame(vectors: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Centre (D,) and a random rotation (D, D) for binary codes of vectors like these; both are stored with the index."""
    dims = vectors.shape[1]
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(dims, dims)))
    return vectors.mean(axis=0).astype(np.float32), rotation.astype(np.float32)


def sealed(records: np.ndarray, first: int) -> np.ndarray:
    """The same records with the checksum of each in its last four bytes; `first` is the number of the first row."""
    records[:, -4:] = _sums(records, first + np.arange(len(records))).view(np.uint8).reshape(-1, 4)
    return records


def broken(records: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Which records do not match their checksum: places among `rows` (their numbers)."""
    return np.flatnonzero(_sums(records, rows) != np.ascontiguousarray(records[:, -4:]).view("<u4")[:, 0])


def _sums(records: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Sum of word times weight, plus the row's own term, modulo 2^32: any change of a single word is certain to show."""
    words = np.ascontiguousarray(records[:, :-4]).view("<u4")
    with np.errstate(over="ignore"):
        mixed = np.arange(1, words.shape[1] + 1, dtype=np.uint32)
        for factor in (np.uint32(0x7FEB352D), np.uint32(0x846CA68B)):
            mixed ^= mixed >> np.uint32(16)
            mixed *= factor
        weights = mixed | np.uint32(1)
        return np.asarray(np.einsum("ij,j->i", words, weights, dtype=np.uint32) + (rows.astype(np.uint32) + np.uint32(1)) * _GOLDEN, "<u4")
