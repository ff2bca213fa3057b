"""The pairs reader: everything written comes back, and everything damaged is refused in one sentence."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from runtime.errors import ImageError, PairsError
from runtime.pairs import BLOCK, open_pairs, write_shard

few = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
keys = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="./\0"), min_size=1, max_size=150)
captions = st.text(st.characters(exclude_categories=("Cs",)), max_size=80)


def picture(colour: tuple[int, ...] = (10, 200, 30), size: tuple[int, int] = (6, 4), form: str = "PNG", mode: str = "RGB") -> bytes:
    out = io.BytesIO()
    Image.new(mode, size, colour).save(out, form)
    return out.getvalue()


def sample(caption: str = "a green thing", **members: bytes) -> dict[str, bytes]:
    return {"png": picture(), "txt": caption.encode(), "json": b'{"n": 1}'} | members


def shard(folder: Path, name: str = "a.tar", **samples: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    write_shard(folder / name, (samples or {"k0": sample(), "k1": sample("two")}).items())
    return folder / name


def refused(folder: Path) -> str:
    """The message that opening the folder is refused with: one line, no traceback material."""
    with pytest.raises(PairsError) as caught:
        open_pairs(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@few
@given(st.dictionaries(keys, captions, min_size=1, max_size=8))
def test_what_is_written_is_read_back(tmp_path: Path, wanted: dict[str, str]) -> None:
    for old in tmp_path.glob("*.tar"):
        old.unlink()
    half = len(wanted) // 2
    parts = [list(wanted.items())[:half], list(wanted.items())[half:]]
    for number, part in enumerate(parts):
        write_shard(tmp_path / f"{number}.tar", [(key, sample(text, json=json.dumps({"key": key}).encode())) for key, text in part])
    pairs = open_pairs(tmp_path)
    assert len(pairs) == len(wanted)
    assert sorted(pairs.keys) == sorted(wanted)
    for row, key in enumerate(pairs.keys):
        assert pairs.caption(row) == wanted[key].strip()
        assert pairs.meta(row) == {"key": key}
        assert pairs.image_bytes(row) == picture()
        assert pairs.keys[pairs.shard_of(row).start : pairs.shard_of(row).stop].count(key) == 1
    assert [(entry.start, entry.stop) for entry in pairs.shards] == [(0, half), (half, len(wanted))]


def test_the_same_samples_give_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    samples = [(f"k{number}", sample(str(number))) for number in range(5)]
    first = write_shard(tmp_path / "a.tar", samples)
    os.utime(tmp_path / "a.tar", (1, 1))
    second = write_shard(tmp_path / "b.tar", [(key, dict(reversed(members.items()))) for key, members in reversed(samples)])
    assert first == second
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    assert first.bytes == (tmp_path / "a.tar").stat().st_size
    assert first.samples == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "b.tar"]


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_shards_of_other_writers_are_read(tmp_path: Path, layout: int) -> None:
    long = "folder/" + "n" * (60 if layout == tarfile.USTAR_FORMAT else 180)
    with tarfile.open(tmp_path / "00000.tar", "w", format=layout) as archive:
        directory = tarfile.TarInfo("folder")
        directory.type = tarfile.DIRTYPE
        archive.addfile(directory)
        for key in ("./000000001", long, "ünï"):
            for extension, data in {"jpg": picture(form="JPEG"), "txt": key.encode(), "json": b"{}", "cls": b"7"}.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size, info.mtime = len(data), 1.5
                archive.addfile(info, io.BytesIO(data))
    pairs = open_pairs(tmp_path)
    assert pairs.keys == ["000000001", long, "ünï"]
    assert [pairs.caption(row) for row in range(3)] == ["./000000001", long, "ünï"]


def test_a_key_ends_at_the_first_dot_and_extensions_ignore_case(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, data in {"v1/cat.JPG": picture(form="JPEG"), "v1/cat.txt": b" a cat\n", "v1/cat.thumb.png": b"?", ".hidden": b"?"}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    pairs = open_pairs(tmp_path)
    assert pairs.keys == ["v1/cat"]
    assert pairs.caption(0) == "a cat"
    assert pairs.meta(0) == {}


def test_pickled_pairs_read_on_elsewhere(tmp_path: Path) -> None:
    shard(tmp_path)
    pairs = open_pairs(tmp_path)
    assert pairs.caption(1) == "two"  # a map is open when it is pickled
    copy = pickle.loads(pickle.dumps(pairs))
    assert copy.keys == pairs.keys
    assert copy.caption(1) == "two"
    assert copy.image(0).getpixel((0, 0)) == (10, 200, 30)


def test_pictures_come_as_upright_rgb_on_white(tmp_path: Path) -> None:
    half_red = picture((255, 0, 0, 128), mode="RGBA")
    palette = io.BytesIO()
    Image.new("P", (4, 4), 0).save(palette, "PNG", transparency=0)
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held sideways
    Image.new("RGB", (6, 4)).save(turned, "JPEG", exif=exif)
    deep = io.BytesIO()
    Image.fromarray(np.full((4, 4), 0x8000, dtype=np.uint16)).save(deep, "PNG")
    grey = picture((77,), mode="L")
    made = {"alpha": half_red, "deep": deep.getvalue(), "grey": grey, "palette": palette.getvalue()}
    samples = {key: {"png": data} for key, data in made.items()} | {"turned": {"jpg": turned.getvalue()}}
    shard(tmp_path, **samples)
    pairs = open_pairs(tmp_path)
    images = {key: pairs.image(row) for row, key in enumerate(pairs.keys)}
    assert {image.mode for image in images.values()} == {"RGB"}
    corner = {key: image.getpixel((0, 0)) for key, image in images.items()}
    assert corner["alpha"] == pytest.approx((255, 127, 127), abs=1)
    assert corner["palette"] == (255, 255, 255)
    assert corner["deep"] == (128, 128, 128)
    assert corner["grey"] == (77, 77, 77)
    assert images["turned"].size == (4, 6)


def test_rows_outside_are_index_errors(tmp_path: Path) -> None:
    shard(tmp_path)
    pairs = open_pairs(tmp_path)
    for row in (-1, 2):
        for read in (pairs.caption, pairs.image, pairs.meta, pairs.image_bytes, pairs.shard_of, pairs.has_caption):
            with pytest.raises(IndexError):
                read(row)


def test_folders_without_shards_are_refused(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no *.tar" in refused(tmp_path / "empty")
    shard(tmp_path / "train")
    assert f"give {tmp_path / 'train'}" in refused(tmp_path)  # the folder above: say which one was meant
    (tmp_path / "file").write_text("x")
    assert "is a file" in refused(tmp_path / "file")


def test_shards_without_samples_are_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [])
    assert "no samples" in refused(tmp_path)
    (tmp_path / "b.tar").write_bytes(b"")
    assert "0 bytes" in refused(tmp_path)


def test_compressed_shards_are_refused_with_what_to_do(tmp_path: Path) -> None:
    path = shard(tmp_path)
    packed = gzip.compress(path.read_bytes())
    path.write_bytes(packed)
    assert "gunzip" in refused(tmp_path)
    path.unlink()
    (tmp_path / "a.tar.gz").write_bytes(packed)
    assert "gunzip" in refused(tmp_path)


def test_a_shard_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = shard(tmp_path)
    whole = path.read_bytes()
    cuts = [*range(BLOCK, len(whole), BLOCK), 1, BLOCK - 1, BLOCK + 1, len(whole) - 1]
    for cut in cuts:
        path.write_bytes(whole[:cut])
        assert "truncated" in refused(tmp_path)
    path.write_bytes(whole)
    assert len(open_pairs(tmp_path)) == 2


@few
@given(st.data())
def test_a_changed_header_byte_is_refused(tmp_path: Path, data: st.DataObject) -> None:
    whole = bytearray(shard(tmp_path).read_bytes())
    at = data.draw(st.integers(0, BLOCK - 1).filter(lambda place: not 148 <= place < 156))
    whole[at] ^= data.draw(st.integers(1, 255))
    (tmp_path / "a.tar").write_bytes(bytes(whole))
    assert "wrong checksum" in refused(tmp_path) or "gzip" in refused(tmp_path)


@few
@given(st.binary(max_size=3 * BLOCK), st.booleans())
def test_any_bytes_are_pairs_or_a_pairs_error(tmp_path: Path, data: bytes, sealed: bool) -> None:
    if sealed and len(data) >= BLOCK:  # a right checksum, so that the fields behind it are reached
        head = bytearray(data[:BLOCK])
        head[148:156] = b" " * 8
        head[148:156] = b"%06o\0 " % sum(head)
        data = bytes(head) + data[BLOCK:]
    (tmp_path / "a.tar").write_bytes(data)
    assert refused(tmp_path)


@few
@given(st.binary(max_size=200))
def test_any_extended_header_is_read_or_refused(tmp_path: Path, records: bytes) -> None:
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, len(records)
    head = info.tobuf(tarfile.USTAR_FORMAT) + records + b"\0" * (-len(records) % BLOCK)
    (tmp_path / "a.tar").write_bytes(head + shard(tmp_path, "b.tar").read_bytes())
    (tmp_path / "b.tar").unlink()
    try:
        found = len(open_pairs(tmp_path))
    except PairsError:
        return  # the point: nothing else is raised
    assert found >= 1


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        info = tarfile.TarInfo("cat.png")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    assert "link or special file" in refused(tmp_path)


def test_keys_must_be_unique(tmp_path: Path) -> None:
    shard(tmp_path, "a.tar", one=sample(), two=sample())
    shard(tmp_path, "b.tar", two=sample())
    message = refused(tmp_path)
    assert "'two'" in message
    assert "a.tar" in message
    assert "b.tar" in message


def test_a_sample_has_one_picture(tmp_path: Path) -> None:
    shard(tmp_path, k={"txt": b"alone"})
    assert "no picture" in refused(tmp_path)
    shard(tmp_path, k={"png": picture(), "jpg": picture(form="JPEG")})
    assert "second picture" in refused(tmp_path)


def test_a_broken_picture_is_an_image_error_and_others_go_on(tmp_path: Path) -> None:
    cut = picture(size=(64, 64))[:-30]
    shard(tmp_path, bad=sample(png=b"not a picture"), cut=sample(png=cut), good=sample())
    pairs = open_pairs(tmp_path)
    for row in (0, 1):
        with pytest.raises(ImageError, match=rf"'{pairs.keys[row]}'.*a\.tar.*does not decode"):
            pairs.image(row)
    assert pairs.image(2).size == (6, 4)


def test_a_caption_is_utf8_text(tmp_path: Path) -> None:
    shard(tmp_path, bad=sample(txt=b"caf\xe9"), good=sample("café"), none={"png": picture()})
    pairs = open_pairs(tmp_path)
    with pytest.raises(PairsError, match=r"'bad'.*not UTF-8 \(byte 3 is 0xe9\)"):
        pairs.caption(0)
    assert pairs.caption(1) == "café"
    assert [pairs.has_caption(row) for row in range(3)] == [True, True, False]
    with pytest.raises(PairsError, match="'none'.*caption.*missing"):
        pairs.caption(2)


@pytest.mark.parametrize("facts", [b"{", b"[1]", b"\xff", b"[" * 100_000])
def test_facts_are_one_json_object(tmp_path: Path, facts: bytes) -> None:
    shard(tmp_path, k=sample(json=facts))
    with pytest.raises(PairsError, match=r"'k'.*\.json"):
        open_pairs(tmp_path).meta(0)


def test_a_shard_that_changes_after_opening_is_noticed(tmp_path: Path) -> None:
    path = shard(tmp_path)
    pairs = open_pairs(tmp_path)
    shard(tmp_path, other=sample("another caption"))
    with pytest.raises(PairsError, match="changed after it was opened"):
        pairs.caption(0)
    path.unlink()
    with pytest.raises(PairsError, match="cannot be read any more"):
        pairs.caption(0)


def test_more_shards_than_maps_are_kept(tmp_path: Path) -> None:
    for number in range(70):
        write_shard(tmp_path / f"{number:03d}.tar", [(f"k{number:03d}", sample(str(number)))])
    pairs = open_pairs(tmp_path)
    for _ in range(2):
        assert [pairs.caption(row) for row in range(70)] == [str(number) for number in range(70)]


@pytest.mark.parametrize("key", ["", "a.b", "folder/", "a\0b", "\ud800"])
def test_keys_that_cannot_be_read_back_are_not_written(tmp_path: Path, key: str) -> None:
    with pytest.raises(PairsError, match="key"):
        write_shard(tmp_path / "a.tar", [("good", sample()), (key, sample())])
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_shard(tmp_path: Path) -> None:
    path = shard(tmp_path)
    before = path.read_bytes()
    with pytest.raises(PairsError, match="comes twice"):
        write_shard(path, [("k", sample()), ("k", sample())])
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.tar"]
