"""Verification: every flipped byte is reported where it is; and what `mclip inspect` says of a store."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill import captions
from distill.store import open_store
from mobileclip.inspection import facts_of, main
from runtime import store_parts
from runtime.errors import StoreError
from runtime.store_parts import Part, row_checksums
from runtime.store_verification import find_damage, verify_store
from tests.distill.stores import append_layer, edit_index, flip, make_store


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    truth = make_store(folder)
    for n, kind in enumerate(("augmentations", "captions", "teachers")):
        append_layer(folder, truth, kind, seed=n)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "store"))


def owner(part: Part, position: int) -> str:
    """Whose a byte of a part is: 'header', the name of an array that is no row's, or the number of the row. Independent of the code under test."""
    if position < part.start:
        return "header"
    base = np.frombuffer(part.payload, np.uint8).__array_interface__["data"][0]
    for name, array in part.arrays.items():
        at = position - part.start - (array.__array_interface__["data"][0] - base)
        if 0 <= at < array.nbytes:
            if name in ("keys.offsets", "row_crc32"):
                return name
            if name in ("keys.bytes", "captions.bytes"):
                ends = part.get("keys.offsets")[1:] if name == "keys.bytes" else part.get("captions.offsets")[:, -1]
                return str(int(np.searchsorted(ends, at, side="right")))
            return str(at // (array.nbytes // len(array)))
    raise AssertionError(position)


@settings(max_examples=150, derandomize=True, deadline=None)
@given(st.data())
def test_every_flipped_byte_is_named(whole: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("flip")
    for path in whole.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    name = data.draw(st.sampled_from(sorted(path.name for path in whole.glob("s.000[02]*.safetensors"))))
    part = Part(whole / name)
    position = data.draw(st.integers(0, part.bytes - 1) if data.draw(st.booleans()) else st.integers(part.start, part.bytes - 1))
    bits = bytearray((whole / name).read_bytes())
    bits[position] ^= data.draw(st.integers(1, 255))
    (folder / name).write_bytes(bytes(bits))
    (told,) = find_damage(folder).damage
    assert f"'{name}'" in told
    place = owner(part, position)
    if place == "header":
        assert "header" in told or "lacks" in told or "truncated" in told
    elif place in ("keys.offsets", "row_crc32"):
        assert f"has changed in {place}, outside its rows (shard s)" in told
    else:
        key = open_store(whole).keys[int(place) + (5 if name.startswith("s.0002") else 0)]
        assert f"shard s, row {place} (key '" in told
        assert f"(key '{key}')" in told or name.count(".") == 2 and position - part.start  # a damaged key is shown as it now is


def test_a_sample_finds_what_lies_in_it(folder: Path) -> None:
    path = folder / "s.0002.safetensors"
    for row in range(7):
        stride = Part(path).get("image.0.embeddings")[0].nbytes
        place = Part(path).start + Part(path).payload.tobytes().index(Part(path).get("image.0.embeddings").tobytes())
        flip(path, place + row * stride)
    with pytest.raises(StoreError, match=r"'s\.0002\.safetensors' has changed: shard s, rows \d .*key-.* of 7"):
        verify_store(folder, sample=0.5)
    found = find_damage(folder, sample=0.5)
    assert len(found.damage) == 1
    assert found.files == 0


def test_a_sample_reads_its_share(whole: Path) -> None:
    rows = 12 * 4
    assert (verify_store(whole).rows, verify_store(whole).files) == (rows, 12)
    assert verify_store(whole, sample=1.0).rows == rows
    assert verify_store(whole, sample=0.3).rows == 4 * (2 + 0 + 3)
    for share in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(StoreError, match="cannot be drawn"):
            verify_store(whole, sample=share)


def test_damage_of_several_parts_is_counted(folder: Path) -> None:
    for name in ("s.0000.safetensors", "s.0000.1.safetensors", "s.0002.3.safetensors"):
        flip(folder / name, (folder / name).stat().st_size - 1)
    assert len(find_damage(folder).damage) == 3
    with pytest.raises(StoreError, match="2 more parts are damaged"):
        open_store(folder, verify=True)


def test_a_missing_and_a_longer_part(folder: Path) -> None:
    (folder / "s.0000.1.safetensors").unlink()
    (folder / "s.0002.safetensors").write_bytes((folder / "s.0002.safetensors").read_bytes() + b"x")
    told = find_damage(folder).damage
    assert "cannot be opened" in told[0]
    assert "arrays end at byte" in told[1]


def test_another_hash_in_the_index_is_told_apart_from_damaged_rows(folder: Path) -> None:
    edit_index(folder, lambda index: index["parts"][0].update(sha256="0" * 64))
    with pytest.raises(StoreError, match="in its header .* rows are as they were written"):
        verify_store(folder)


def test_row_checksums_by_hand() -> None:
    arrays = {
        "b": np.array([[1, 2], [3, 4]], "<u2"), "a": np.array([7, 8], np.uint8), "row_crc32": np.zeros(2, "<u4"), "keys.offsets": np.array([0, 2, 5], "<u4"),
        "keys.bytes": np.frombuffer(b"xyabc", np.uint8), "captions.offsets": np.array([[0, 1], [1, 3]], "<u4"), "captions.bytes": np.frombuffer(b"pqr", np.uint8),
    }  # fmt: skip
    offsets = arrays["captions.offsets"]
    expected = [
        zlib.crc32(bytes([7]) + arrays["b"][0].tobytes() + b"p" + offsets[0].tobytes() + b"xy"),
        zlib.crc32(bytes([8]) + arrays["b"][1].tobytes() + b"qr" + offsets[1].tobytes() + b"abc"),
    ]
    assert row_checksums(arrays, 2).tolist() == expected
    assert row_checksums(arrays, 2, np.array([1])).tolist() == expected[1:]


# ---------------------------------------------------------------- inspect


def test_inspect_tells_what_is_in_a_store(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(whole), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["schema"], found["rows"], found["parts"], found["verified"], found["augmentations"]) == ("store", 2, 12, 12, 12, 5)
    assert found["bytes"] == sum(path.stat().st_size for path in whole.iterdir())
    teachers = [(teacher["name"], teacher["dim"], teacher["logit_scale"], teacher["layer"]) for teacher in found["teachers"]]
    assert teachers == [("t0", 24, 20.0, 0), ("t1", 40, 20.0, 0), ("t2", 16, 30.0, 3)]
    store = open_store(whole)
    stored = [store.caption(row, j) for row in range(12) for j in range(store.caption_counts[row])]
    assert found["captions"]["stored"] == len(stored)
    for field in ("type", "source", "language"):
        counts = {name: sum(getattr(caption, field) == name for caption in stored) for name in {getattr(caption, field) for caption in stored}}
        assert found["captions"][field] == counts
    assert [(layer["kind"], layer["parts"]) for layer in found["layers"]] == [("rows", 3), ("augmentations", 3), ("captions", 3), ("teachers", 3)]
    assert (found["coverage"], found["skipped"]) == ({"pairs": 13, "rows": 12, "skipped": 1}, {"no picture": 1})
    sizes = dict(found["bytes_per_sample"])
    assert sizes.pop("all") == pytest.approx(found["bytes"] / 12, abs=0.1)
    assert sum(sizes.values()) == pytest.approx(found["bytes"] / 12, abs=1)
    assert sizes["parameters"] == 5 * 16
    assert sizes["image embeddings"] == 5 * (24 + 2 + 40 + 2 + 16 + 2)
    assert sizes["checksums"] == 4 * 4
    assert set(sizes) >= {"captions", "keys", "text embeddings", "headers", "index.json", "columns"}


def test_inspect_prints_lines_and_samples(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(whole)]) == 0
    out = capsys.readouterr().out
    assert "12 files match their hashes" in out
    assert '    name "t2", dim 16, logit_scale 30.0' in out
    assert "  dtype: int8\n" in out
    assert main([str(whole), "--sample", "0.3"]) == 0
    assert "20 of 48 rows match their checksums (a sample of 0.3)" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        main([str(whole), "--sample", "2"])
    assert caught.value.code == 2


def test_inspect_names_the_damaged_row(folder: Path) -> None:
    flip(folder / "s.0002.1.safetensors", (folder / "s.0002.1.safetensors").stat().st_size - 1)
    with pytest.raises(StoreError, match=r"s\.0002\.1\.safetensors' has changed: shard s, row 6 \(key 'key-11'\) of 7"):
        facts_of(str(folder))


def test_inspect_needs_neither_torch_nor_the_training_half(whole: Path) -> None:
    code = "import sys; from mobileclip.cli import main; assert main(['inspect', sys.argv[1]]) == 0; sys.exit(sorted({'torch', 'distill', 'timm'} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code, str(whole)], capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_inspect_refuses_captions_of_no_type(folder: Path) -> None:
    """Well hashed nonsense: written so, not damaged."""
    edit_index(folder, lambda index: index.update(sources=index["sources"][:1]))
    with pytest.raises(StoreError, match="has captions of source 1, the store knows 1 sources"):
        facts_of(str(folder))
    with pytest.raises(StoreError, match="unreadable caption"):
        open_store(folder).caption(1, 1)


def test_caption_types_are_the_same_everywhere() -> None:
    assert store_parts.CAPTION_TYPES == captions.TYPES
