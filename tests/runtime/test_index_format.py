"""docs/index-format.md against the code: exact bytes, and a reader that was written from the page alone."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from runtime import index_writing
from runtime.index import Index
from runtime.index_coding import DTYPES, Coding, binary_frame, broken
from tests.runtime.test_index import MODEL, cloud

# First bytes of records of plain vectors: exact, for they are made of whole numbers.
GOLDEN = {
    "float16": "003800b800340000d7fff539",
    "int8": "7f814000081c0000fc7e102d",
}


def weight(i: int) -> int:
    x = i
    x = ((x ^ (x >> 16)) * 2146121005) % 2**32
    x = ((x ^ (x >> 16)) * 2221713035) % 2**32
    return x | 1


def checksum(record: bytes, row: int) -> int:
    words = struct.unpack(f"<{len(record) // 4 - 1}I", record[:-4])
    return ((row + 1) * 2654435761 + sum(word * weight(i) for i, word in enumerate(words, start=1))) % 2**32


@pytest.mark.parametrize("dtype", GOLDEN)
def test_golden_records(dtype: str) -> None:
    record = Coding(dtype=dtype, dims=4).encode(np.array([[0.5, -0.5, 0.25, 0.0]], np.float32), first=6)[0]
    assert record.tobytes().hex() == GOLDEN[dtype]
    assert struct.unpack("<I", record[-4:].tobytes())[0] == checksum(record.tobytes(), 6)


@given(st.integers(1, 70), st.sampled_from(DTYPES), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_records_and_their_checksums(dims: int, dtype: str, seed: int) -> None:
    vectors = np.random.default_rng(seed).normal(size=(5, dims)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    centre, rotation = binary_frame(vectors)
    coding = Coding(dtype=dtype, dims=dims, centre=centre, rotation=rotation)
    records = coding.encode(vectors, first=100)
    assert records.shape == (5, coding.record_bytes)
    assert coding.record_bytes % 4 == 0
    assert [struct.unpack("<I", record[-4:].tobytes())[0] for record in records] == [checksum(record.tobytes(), 100 + row) for row, record in enumerate(records)]
    decoded = coding.decode(records)
    np.testing.assert_allclose(coding.scores(records, vectors[0]), decoded @ vectors[0], atol=2e-5)
    if dtype != "binary":
        np.testing.assert_allclose(decoded, vectors, atol={"float16": 5e-4, "int8": 5e-3}[dtype])
    else:  # what is decoded has the true inner product with the vector's own residual
        rest, own = vectors - centre, decoded - centre
        np.testing.assert_allclose((rest * own).sum(axis=1), np.square(rest).sum(axis=1), rtol=2e-3, atol=1e-4)
    spot = int(np.random.default_rng(seed).integers(records.size))
    changed = records.copy()
    changed.reshape(-1)[spot] ^= 1 << (seed % 8)
    assert broken(changed, np.arange(100, 105)).tolist() == [spot // coding.record_bytes]
    assert len(broken(records, np.arange(101, 106))) == 5  # the right records in the wrong rows


def crc(*values: object) -> int:
    parts = [value if isinstance(value, bytes) else b"" if value is None else str(value).encode() for value in values]
    return zlib.crc32(b"".join(part + b"\x1f" for part in parts))


def test_another_reader_finds_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Search in an index with sqlite3, safetensors and numpy alone."""
    monkeypatch.setattr(index_writing, "LISTS_FROM", 500)
    vectors, query = cloud(600), cloud(1, seed=1)[0]
    with Index.create(tmp_path / "i", MODEL, dtype="int8", dims=24, rescore="float16") as index:
        index.add_vectors([f"/v/{n}" for n in range(600)], vectors)
        index.settle()
        expected = index.search_vector(query, k=600)
    db = sqlite3.connect(tmp_path / "i" / "index.sqlite")
    assert db.execute("PRAGMA user_version").fetchone() == (1,)
    assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    ((key, value, sum_),) = db.execute("SELECT * FROM meta").fetchall()
    assert (key, sum_) == ("settings", crc(key, value))
    known = json.loads(value)
    assert known == {"dims": 24, "dtype": "int8", "model": MODEL, "rescore": "float16", "width": 48}
    ((number, rows, files, sum_),) = db.execute("SELECT * FROM segments").fetchall()
    assert (rows, sum_) == (600, crc(number, rows, files))
    for kind, facts in json.loads(files).items():
        data = (tmp_path / "i" / "segments" / f"{number:06d}.{kind}").read_bytes()
        assert facts["bytes"] == len(data)
        assert facts["sha256"] == hashlib.sha256(data).hexdigest()
        assert facts["head"] == hashlib.sha256(data[: 8 + struct.unpack("<Q", data[:8])[0]]).hexdigest()
        assert (8 + struct.unpack("<Q", data[:8])[0]) % 64 == 0
    full = load_file(tmp_path / "i" / "segments" / f"{number:06d}.full")["records"]
    decoded = full[:, :96].copy().view("<f2").astype(np.float32)
    scores = decoded @ query
    scanned = load_file(tmp_path / "i" / "segments" / f"{number:06d}.vectors")["records"]
    values = scanned[:, :24].copy().view(np.int8) * scanned[:, 24:26].copy().view("<f2").astype(np.float32)
    part = vectors[:, :24] / np.linalg.norm(vectors[:, :24], axis=1, keepdims=True)
    np.testing.assert_allclose(values, part, atol=5e-3)
    found = {}
    for content, digest, segment, row, sum_, count in db.execute("SELECT * FROM contents"):
        assert (segment, count, sum_) == (number, 1, crc(content, digest, segment, row))
        ((path, *rest),) = db.execute("SELECT * FROM files WHERE content=?", (content,)).fetchall()
        assert rest[-1] == crc(path, *rest[:-1])
        assert digest == hashlib.sha256(vectors[int(path[3:])].tobytes()).digest()[:16]
        found[path.decode()] = scores[row]
    assert [hit.path for hit in expected] == sorted(found, key=lambda path: -found[path])
    np.testing.assert_allclose([hit.score for hit in expected], sorted(found.values(), reverse=True), atol=1e-5)


def test_lists_hold_what_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_writing, "LISTS_FROM", 500)
    with Index.create(tmp_path / "i", MODEL, dtype="float16") as index:
        index.add_vectors([f"/v/{n}" for n in range(900)], cloud(900))
        index.settle()
        (segment,) = index.vectors.segments.values()
        vectors = segment.vectors(0, 900)
        path = index.vectors.path(segment.number, "lists")
    held = load_file(path)
    assert sorted(held["rows"].tolist()) == list(range(900))
    offsets = held["offsets"].tolist()
    assert (offsets[0], offsets[-1], len(offsets)) == (0, 900, len(held["centroids"]) + 1)
    np.testing.assert_allclose(held["rotation"] @ held["rotation"].T, np.eye(48), atol=1e-5)
    for number, (start, stop) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        own = vectors[held["rows"][start:stop]]
        rest = (own - held["centroids"][number]) @ held["rotation"].T
        sign, level = (np.unpackbits(held[name][start:stop].view(np.uint8), axis=1, count=48) for name in ("signs", "levels"))
        sure = np.abs(rest) > 1e-6
        assert (sign == (rest >= 0))[sure].all()
        step = 0.9957 * np.sqrt(np.square(rest).mean(axis=1, keepdims=True))
        wanted = 0 + (rest >= -step).astype(int) + (rest >= 0) + (rest >= step)
        assert (np.abs(2 * sign.astype(int) + level - wanted) <= (np.abs(np.abs(rest) - step) < 1e-5) | ~sure).all()
        if stop > start:
            u = 2.0 * sign + level - 1.5
            np.testing.assert_allclose(held["level_scales"][start:stop], np.square(rest).sum(axis=1) / (rest * u).sum(axis=1), rtol=1e-3)
            np.testing.assert_allclose(held["scales"][start:stop], np.square(rest).sum(axis=1) / np.abs(rest).sum(axis=1), rtol=1e-3)
            np.testing.assert_allclose(held["spreads"][number], np.sqrt(np.square(rest).mean()), rtol=1e-3)
        bytes_ = b"".join(held[name][start:stop].tobytes() for name in ("signs", "levels", "scales", "level_scales", "rows"))
        assert held["checks"][number] == zlib.crc32(bytes_)
