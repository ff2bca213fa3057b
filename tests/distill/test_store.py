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
from distill.store import DTYPES, open_store
from distill.store_writing import write_part
from mobileclip.inspection import facts_of
from runtime.errors import StoreError
from tests.distill.stores import FLOOR, TABLES, VIEWS, cut, edit_index, flip, make_rows, make_store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_store(tmp_path / "store")
    return tmp_path / "store"


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_row_comes_back(tmp_path: Path, dtype: str) -> None:
    truth = make_store(tmp_path, dtype)
    store = open_store(tmp_path, verify=True)
    assert len(store) == 12
    assert store.keys == truth.keys == [f"key-{n}" for n in range(12)]
    assert store.pair_rows.tolist() == list(range(0, 24, 2))
    assert store.n_augmentations.tolist() == [VIEWS] * 12
    assert set(store.caption_counts.tolist()) == {1, 2}
    rows, augs = np.array([11, 0, 4, 5, 0]), np.array([2, 0, 1, 2, 1])
    for t in (0, 1):
        found = store.image_embeddings(t, rows, augs)
        assert found.dtype == np.float32
        assert np.abs(np.linalg.norm(found, axis=1) - 1).max() < 1e-6
        assert (found * truth.images[t][rows, augs]).sum(1).min() > FLOOR[dtype]
        text = np.stack([truth.texts[t][row][0] for row in rows])
        assert (store.text_embeddings(f"t{t}", rows, np.zeros(5, int)) * text).sum(1).min() > FLOOR[dtype]
    assert np.array_equal(store.augmentation(rows, augs), truth.parameters[rows, augs])
    assert np.array_equal(store.column("similarity"), truth.columns["similarity"])
    assert all(store.caption(row, j) == caption for row, own in enumerate(truth.captions) for j, caption in enumerate(own))


def test_float32_is_exact(tmp_path: Path) -> None:
    truth = make_store(tmp_path, "float32")
    found = open_store(tmp_path).image_embeddings(0, np.arange(5), np.zeros(5, int))
    assert np.abs(found - truth.images[0][:5, 0]).max() < 1e-7


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_view_is_a_view_into_the_file(tmp_path: Path, dtype: str) -> None:
    truth = make_store(tmp_path, dtype)
    store = open_store(tmp_path)
    stored, parameters = store.read_view(6, 1)
    assert np.array_equal(parameters, truth.parameters[6, 1])
    assert all(not array.flags.owndata and not array.flags.writeable for array in (parameters, *(values for values, _ in stored)))
    assert [values.shape for values, _ in stored] == ([(12,), (20,)] if dtype == "int4" else [(24,), (40,)])
    assert {scale is None for _, scale in stored} == {dtype not in ("int8", "int4")}
    vectors, _ = store.read_view_float(6, 1)
    for t, vector in enumerate(vectors):
        assert vector.dtype == np.float32
        assert np.abs(vector - store.image_embeddings(t, [6], [1])[0]).max() < 1e-6


@pytest.mark.parametrize(("row", "aug"), [(12, 0), (-1, 0), (0, 3), (0, -1)])
def test_a_view_that_does_not_exist(folder: Path, row: int, aug: int) -> None:
    with pytest.raises(StoreError, match="does not exist|has no augmentation"):
        open_store(folder).read_view(row, aug)


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
    "a header of no JSON": (lambda f: _header(f, lambda h: "{"), "damaged in its header"),
    "an array beyond the file": (lambda f: _array(f, "augmentations", data_offsets=[0, 1 << 40], shape=[1 << 36, 1, 16]), "damaged in its header"),
    "an array of another size than its shape": (lambda f: _array(f, "augmentations", shape=[5, 3, 17]), "damaged in its header"),
    "an array with a negative length": (lambda f: _array(f, "augmentations", shape=[-5, -3, 16]), "damaged in its header"),
    "an array of text": (lambda f: _array(f, "augmentations", dtype="TEXT"), "damaged in its header"),
    "a shape that is no list": (lambda f: _array(f, "augmentations", shape="abc"), "damaged in its header"),
    "arrays over one another": (lambda f: _header(f, _overlap), "overlap or leave a gap"),
    "an array left out": (lambda f: _header(f, lambda h: json.dumps({k: v for k, v in h.items() if k != "augmentations"})), "overlap or leave a gap"),
    "a header that is a list": (lambda f: _header(f, lambda h: "[]"), "damaged in its header"),
    "deep JSON": (lambda f: _header(f, lambda h: "[" * 100_000), "damaged in its header|does not fit|index says"),
    "more captions than there are": (lambda f: _poke(f, "n_captions", 3), "counts more captions than it holds"),
    "a row without captions": (lambda f: _poke(f, "n_captions", 0), "or none; it is damaged"),
    "a text beyond the texts": (lambda f: _poke(f, "captions.offsets", 1 << 31), "counts more captions"),
    "a key beyond the keys": (lambda f: _poke(f, "keys.offsets", 1 << 31), "its keys are damaged"),
    "teachers that are not objects": (lambda f: edit_index(f, lambda i: i.update(teachers=[1, 2])), "unusable teacher"),
    "a scale of nothing": (lambda f: edit_index(f, lambda i: i["teachers"][0].update(logit_scale=0)), "unusable teacher"),
    "a scale that is not finite": (lambda f: edit_index(f, lambda i: i["teachers"][0].update(logit_scale=float("nan"))), "unusable teacher"),
    "sources that are numbers": (lambda f: edit_index(f, lambda i: i.update(sources=[1])), "unusable fields: sources"),
    "an unknown dtype": (lambda f: edit_index(f, lambda i: i.update(dtype="int2")), "unusable fields: dtype"),
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


def _header(folder: Path, change) -> None:
    """Rewrite the header of the first part and enter the new length into the index."""
    path = folder / "s.0000.safetensors"
    blob = path.read_bytes()
    (length,) = struct.unpack("<Q", blob[:8])
    text = change(json.loads(blob[8 : 8 + length])).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + blob[8 + length :])
    edit_index(folder, lambda index: index["parts"][0].update(bytes=path.stat().st_size))


def _array(folder: Path, name: str, **fields) -> None:
    _header(folder, lambda header: json.dumps({**header, name: {**header[name], **fields}}))


def _overlap(header: dict) -> str:
    a, b = header["image.0.scales"], header["text.0.scales"]
    width = a["data_offsets"][1] - a["data_offsets"][0]
    b["data_offsets"] = [a["data_offsets"][0], a["data_offsets"][0] + b["data_offsets"][1] - b["data_offsets"][0]]
    assert width >= b["data_offsets"][1] - b["data_offsets"][0]
    return json.dumps(header)


def _poke(folder: Path, name: str, value: int) -> None:
    """Set the second entry of an array of the first part."""
    path = folder / "s.0000.safetensors"
    array = store_module.Part(path).get(name)
    place = path.read_bytes().rindex(array.tobytes()) + array.itemsize
    data = bytearray(path.read_bytes())
    data[place : place + array.itemsize] = np.array([value], array.dtype).tobytes()
    path.write_bytes(bytes(data))


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
    with pytest.raises(StoreError, match=r"s\.0000\.safetensors' has changed: shard s, row \d \(key 'key-\d'\) of 5"):
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
        store.read_view_float(1, 2)
        store.column("similarity")
        facts_of(str(folder))
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
