"""The store: rows come back, and every way in which index and parts can disagree is refused with one sentence."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from distill import store as store_module
from distill.captions import captions_of
from distill.store import DTYPES, open_store
from distill.store_writing import PartRows, from_bfloat16, quantise, to_bfloat16, unit, write_index, write_part
from runtime.errors import StoreError

TABLES = {"sources": ["pairs", "emoji"], "languages": ["en"]}
VIEWS = 3
FLOOR = {"float32": 0.9999999, "float16": 0.999999, "bfloat16": 0.99999, "int8": 0.9999, "int4": 0.99}
"""Cosine that a stored vector must keep."""


def make_rows(rng: np.random.Generator, start: int, count: int, dims: tuple[int, ...]) -> PartRows:
    captions = [captions_of(f"caption {start + n} of é猫", ("emoji",) if n % 2 else ()) for n in range(count)]
    return PartRows(
        keys=[f"key-{start + n}" for n in range(count)], pair_rows=[2 * (start + n) for n in range(count)], captions=captions,
        augmentations=rng.integers(0, 255, (count, VIEWS, 16), dtype=np.uint8),
        image_embeddings=[unit(rng.standard_normal((count, VIEWS, dim), dtype=np.float32)) for dim in dims],
        text_embeddings=[unit(rng.standard_normal((count, 2, dim), dtype=np.float32)) for dim in dims],
        columns={"similarity": rng.standard_normal(count).astype(np.float32)},
    )  # fmt: skip


def make_store(folder: Path, dtype: str = "int8", dims: tuple[int, ...] = (24, 40), counts: tuple[int, ...] = (5, 0, 7)) -> list[PartRows]:
    folder.mkdir(parents=True, exist_ok=True)
    rng, made, entries, start = np.random.default_rng(1), [], [], 0
    for n, count in enumerate(counts):
        rows = make_rows(rng, start, count, dims)
        entries.append({"kind": "rows", **write_part(folder / f"s.{n:04d}.safetensors", rows, dtype=dtype, tables=TABLES, metadata={"part": str(n)})})
        made.append(rows)
        start += count
    write_index(folder, {
        "rows": start, "dtype": dtype, "seed": 0, "teachers": [{"name": f"t{n}", "dim": dim, "logit_scale": 20.0} for n, dim in enumerate(dims)], "parts": entries,
        "columns": {"similarity": {"version": 1, "dtype": "float32"}}, **TABLES,
    })  # fmt: skip
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_store(tmp_path / "store")
    return tmp_path / "store"


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_row_comes_back(tmp_path: Path, dtype: str) -> None:
    made = make_store(tmp_path, dtype)
    store = open_store(tmp_path, verify=True)
    assert len(store) == 12
    assert store.keys == [f"key-{n}" for n in range(12)]
    assert store.pair_rows.tolist() == list(range(0, 24, 2))
    assert store.n_augmentations.tolist() == [VIEWS] * 12
    assert set(store.caption_counts.tolist()) == {1, 2}
    rows, augs = np.array([11, 0, 4, 5, 0]), np.array([2, 0, 1, 2, 1])
    for t in (0, 1):
        expected = np.concatenate([part.image_embeddings[t] for part in made])[rows, augs]
        found = store.image_embeddings(t, rows, augs)
        assert found.dtype == np.float32
        assert np.abs(np.linalg.norm(found, axis=1) - 1).max() < 1e-6
        assert (found * expected).sum(1).min() > FLOOR[dtype]
        text = np.concatenate([part.text_embeddings[t] for part in made])[rows, 0]
        assert (store.text_embeddings(f"t{t}", rows, np.zeros(5, int)) * text).sum(1).min() > FLOOR[dtype]
    assert np.array_equal(store.augmentation(rows, augs), np.concatenate([part.augmentations for part in made])[rows, augs])
    assert np.array_equal(store.column("similarity"), np.concatenate([part.columns["similarity"] for part in made]))
    captions = [caption for part in made for caption in part.captions]
    assert all(store.caption(row, j) == caption for row, own in enumerate(captions) for j, caption in enumerate(own))


def test_float32_is_exact(tmp_path: Path) -> None:
    made = make_store(tmp_path, "float32")
    found = open_store(tmp_path).image_embeddings(0, np.arange(5), np.zeros(5, int))
    assert np.abs(found - made[0].image_embeddings[0][:, 0]).max() < 1e-7


def test_parts_are_ordinary_safetensors(folder: Path) -> None:
    arrays = safetensors.numpy.load_file(folder / "s.0000.safetensors")
    assert arrays["image.0.embeddings"].dtype == np.int8
    assert arrays["image.0.embeddings"].shape == (5, VIEWS, 24)
    assert arrays["text.1.scales"].dtype == np.float16
    assert arrays["text.1.scales"].shape == (5, 2)


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    make_store(tmp_path / "a")
    make_store(tmp_path / "b")
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in ("s.0000.safetensors", "s.0002.safetensors", "index.json"))


def test_pickled_store_reads_the_same(folder: Path) -> None:
    store = open_store(folder)
    again = pickle.loads(pickle.dumps(store))
    assert again.keys == store.keys
    assert np.array_equal(again.image_embeddings(1, [3], [2]), store.image_embeddings(1, [3], [2]))


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1e-6, 1e-3, 1.0, 100.0]))
def test_int8_error_is_half_a_step(seed: int, size: float) -> None:
    vectors = np.random.default_rng(seed).standard_normal((4, 32)).astype(np.float32) * np.float32(size)
    values, scales = quantise(vectors)
    step = scales.astype(np.float32)[:, None]
    # half a step of rounding; the largest value may also be clipped by what float16 rounds off its scale
    assert (np.abs(values * step - vectors) <= 0.5 * step + 0.08 * step).all()


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.floats(-(2.0**100), 2.0**100, width=32))
def test_bfloat16_equals_torch(value: float) -> None:
    import torch

    found = from_bfloat16(to_bfloat16(np.array([value], np.float32)))
    assert found[0] == torch.tensor([value]).to(torch.bfloat16).float().item()


def test_zero_vectors_stay_finite() -> None:
    values, scales = quantise(np.zeros((2, 8), np.float32))
    assert not values.any()
    assert np.isfinite(unit(values * scales.astype(np.float32)[:, None])).all()


def test_values_that_are_not_finite_are_never_stored(tmp_path: Path) -> None:
    rows = make_rows(np.random.default_rng(0), 0, 3, (8,))
    rows.image_embeddings[0][1, 0, 3] = np.nan
    with pytest.raises(StoreError, match="not finite"):
        write_part(tmp_path / "x.safetensors", rows, dtype="int8", tables=TABLES, metadata={})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("rows", "items", "message"),
    [([12], [0], "row 12 does not exist; the store has 12"), ([-1], [0], "row -1"), ([0], [3], "row 0 has no augmentation 3; it has 3"), ([0, 1], [0], "one length")],
)
def test_rows_that_do_not_exist(folder: Path, rows: list[int], items: list[int], message: str) -> None:
    with pytest.raises(StoreError, match=message):
        open_store(folder).image_embeddings(0, np.array(rows), np.array(items))


def test_captions_and_teachers_that_do_not_exist(folder: Path) -> None:
    store = open_store(folder)
    with pytest.raises(StoreError, match="row 0 has no caption 1; it has 1"):
        store.caption(0, 1)
    with pytest.raises(StoreError, match=r"no teacher 'nobody'; it has 0 \(t0\), 1 \(t1\)"):
        store.text_embeddings("nobody", [0], [0])
    with pytest.raises(StoreError, match="no column 'flags'; it has similarity"):
        store.column("flags")


# ---------------------------------------------------------------- disagreement


def edit_index(folder: Path, change) -> None:
    index = json.loads((folder / "index.json").read_text())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


def cut(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


DAMAGE = {
    "no index": (lambda f: (f / "index.json").unlink(), "not a finished store"),
    "index is not JSON": (lambda f: cut(f / "index.json", 100), "is not JSON"),
    "another schema": (lambda f: edit_index(f, lambda i: i.update(schema=1)), "has schema 1, this release reads store schema 2"),
    "index is a list": (lambda f: (f / "index.json").write_text("[]"), "a list instead of an object"),
    "no parts": (lambda f: edit_index(f, lambda i: i.pop("parts")), "unusable fields: parts"),
    "a part that leaves the folder": (lambda f: edit_index(f, lambda i: i["parts"][0].update(path="../s.0000.safetensors")), "outside the store"),
    "an unknown kind of part": (lambda f: edit_index(f, lambda i: i["parts"][0].update(kind="views")), "kind 'views'"),
    "an unusable teacher": (lambda f: edit_index(f, lambda i: i["teachers"][0].update(colour="red")), "unusable teacher"),
    "a teacher of another dimension": (lambda f: edit_index(f, lambda i: i["teachers"][0].update(dim=25)), r"'image.0.embeddings' is I8 \(5, 3, 24\)"),
    "a teacher twice": (lambda f: edit_index(f, lambda i: i["teachers"].append(i["teachers"][0])), "two teachers of one name"),
    "a teacher that no part holds": (lambda f: edit_index(f, _one_more_teacher), "lacks the array 'image.2.embeddings'"),
    "one teacher too many": (lambda f: edit_index(f, lambda i: i["teachers"].append({**i["teachers"][0], "name": "x"})), "lists 3 teachers"),
    "another dtype": (lambda f: edit_index(f, lambda i: i.update(dtype="float32")), "the index says F32"),
    "a missing part": (lambda f: (f / "s.0002.safetensors").unlink(), "'s.0002.safetensors' cannot be opened"),
    "a truncated part": (lambda f: cut(f / "s.0002.safetensors", 2000), "s.0002.safetensors' is truncated"),
    "an empty part": (lambda f: cut(f / "s.0002.safetensors", 0), "s.0002.safetensors' has 0 bytes"),
    "a part with bytes added": (lambda f: (f / "s.0000.safetensors").write_bytes((f / "s.0000.safetensors").read_bytes() + b"x"), "damaged in its header"),
    "two parts exchanged": (lambda f: _exchange(f), "the index says"),
    "another row count": (lambda f: edit_index(f, lambda i: i["parts"][0].update(rows=4)), "says 12 rows, its parts have 11"),
    "another total": (lambda f: edit_index(f, lambda i: i.update(rows=13)), "says 13 rows, its parts have 12"),
    "other keys": (lambda f: edit_index(f, lambda i: i["parts"][0].update(keys_sha256="0" * 64)), "other keys"),
    "a column that is not there": (lambda f: edit_index(f, lambda i: i["columns"].update(flags={})), "lacks the array 'column.flags'"),
    "a header of four gigabytes": (lambda f: _header_length(f / "s.0000.safetensors"), "truncated or no safetensors file"),
}


def _one_more_teacher(index: dict) -> None:
    index["teachers"].append({**index["teachers"][0], "name": "x"})
    index["layers"][0]["teachers"].append(2)


def _exchange(folder: Path) -> None:
    a, b = folder / "s.0000.safetensors", folder / "s.0002.safetensors"
    shutil.move(a, folder / "x")
    shutil.move(b, a)
    shutil.move(folder / "x", b)


def _header_length(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 1 << 32) + path.read_bytes()[8:])


@pytest.mark.parametrize("name", DAMAGE)
def test_disagreement_is_refused_in_one_sentence(folder: Path, name: str) -> None:
    damage, message = DAMAGE[name]
    open_store(folder)
    damage(folder)
    with pytest.raises(StoreError, match=message) as caught:
        open_store(folder)
    assert "\n" not in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_one_flipped_bit_is_found_when_asked(folder: Path) -> None:
    path = folder / "s.0000.safetensors"
    flip(path, len(path.read_bytes()) - 3)
    open_store(folder)
    with pytest.raises(StoreError, match=r"s\.0000\.safetensors' has changed"):
        open_store(folder, verify=True)
    assert not store_module.Part(path).intact()


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.data())
def test_a_damaged_header_never_raises_anything_else(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    make_store(folder, counts=(2,), dims=(8,))
    path = folder / "s.0000.safetensors"
    blob = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", blob[:8])
    for _ in range(data.draw(st.integers(1, 4))):
        blob[data.draw(st.integers(0, 8 + length - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(blob))
    try:
        store = open_store(folder)
        store.caption(0, 0)
        store.image_embeddings(0, [0], [0])
    except StoreError:
        pass


def test_the_reader_does_not_load_the_embeddings(tmp_path: Path) -> None:
    """Opening maps the files: resident memory grows by far less than the part is large."""
    make_store(tmp_path, "float32", dims=(4096,), counts=(2000,))
    size = (tmp_path / "s.0000.safetensors").stat().st_size
    before = _resident()
    store = open_store(tmp_path)
    store.image_embeddings(0, [5], [1])
    assert size > 100 << 20
    assert _resident() - before < size // 10


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
