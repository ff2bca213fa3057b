"""A bundle in one file: the same bytes, the same answers, and archives that lie."""

from __future__ import annotations

import os
import stat
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import runtime
from runtime import shell
from runtime.bundle_zip import folder_of, is_zip, pack
from runtime.errors import BundleError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOBILECLIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def packed(own_bundle: Path) -> Path:
    return pack(own_bundle)


def rewritten(packed: Path, change: Callable[[zipfile.ZipInfo, bytes], Iterator[tuple[zipfile.ZipInfo | str, bytes]]]) -> Path:
    """The archive with its entries passed through `change`."""
    place = packed.with_name("other.zip")
    with zipfile.ZipFile(packed) as source, zipfile.ZipFile(place, "w") as target:
        for entry in source.infolist():
            for name, data in change(entry, source.read(entry)):
                target.writestr(name, data)
    return place


def test_packing_gives_the_same_bytes_whatever_the_files_dates(own_bundle: Path) -> None:
    first = pack(own_bundle).read_bytes()
    for path in own_bundle.rglob("*"):
        os.utime(path, (time.time() + 1000,) * 2)
    assert pack(own_bundle).read_bytes() == first


def test_a_packed_bundle_is_used_like_a_folder(packed: Path, own_bundle: Path, capsys: pytest.CaptureFixture[str], cache: Path) -> None:
    assert is_zip(packed)
    ours, theirs = runtime.load(packed), runtime.load(own_bundle)
    np.testing.assert_array_equal(ours.encode_text(["a cat", "red"]), theirs.encode_text(["a cat", "red"]))
    assert ours.folder.is_relative_to(cache)
    assert runtime.load(packed).folder == ours.folder
    assert shell.verify([str(packed)]) == 0
    assert shell.inspect([str(packed)]) == 0
    assert str(packed) in capsys.readouterr().out
    assert [path.name for path in (cache / "bundles").iterdir()] == [ours.folder.name]


def swapped(name: str) -> Callable[[zipfile.ZipInfo, bytes], Iterator[tuple[zipfile.ZipInfo | str, bytes]]]:
    def change(entry: zipfile.ZipInfo, data: bytes) -> Iterator[tuple[zipfile.ZipInfo | str, bytes]]:
        yield (name if entry.filename == "tokenizer.json" else entry), data

    return change


def added(name: str, data: bytes = b"x", mode: int = stat.S_IFREG | 0o644) -> Callable[[zipfile.ZipInfo, bytes], Iterator[tuple[zipfile.ZipInfo | str, bytes]]]:
    def change(entry: zipfile.ZipInfo, content: bytes) -> Iterator[tuple[zipfile.ZipInfo | str, bytes]]:
        yield entry, content
        if entry.filename == "manifest.json":
            more = zipfile.ZipInfo(name)
            more.external_attr = mode << 16
            yield more, data

    return change


def longer(entry: zipfile.ZipInfo, data: bytes) -> Iterator[tuple[zipfile.ZipInfo | str, bytes]]:
    yield entry, data + (b"\0" * 5_000_000 if entry.filename == "tokenizer.json" else b"")


def changed(entry: zipfile.ZipInfo, data: bytes) -> Iterator[tuple[zipfile.ZipInfo | str, bytes]]:
    yield entry, (data[:-1] + bytes([data[-1] ^ 1]) if entry.filename == "tokenizer.json" else data)


def without_manifest(entry: zipfile.ZipInfo, data: bytes) -> Iterator[tuple[zipfile.ZipInfo | str, bytes]]:
    if entry.filename != "manifest.json":
        yield entry, data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swapped("../outside.json"), "in the archive or in its manifest, not in both"),
        (swapped("/tmp/outside.json"), "not in both"),
        (added("../../outside"), "not in both"),
        (added("more.bin"), "not in both"),
        (added("link", b"/etc/passwd", stat.S_IFLNK | 0o777), "is a link or encrypted"),
        (longer, "larger than its manifest says"),
        (changed, "its sha256 is not the manifest's"),
        (without_manifest, "holds no manifest.json"),
    ],
    ids=["renamed outside", "absolute", "added outside", "added", "link", "longer", "changed", "no manifest"],
)
def test_an_archive_that_lies_is_refused_and_leaves_nothing(packed: Path, cache: Path, change: Callable[..., Iterator[tuple[zipfile.ZipInfo | str, bytes]]], message: str) -> None:
    place = rewritten(packed, change)
    before = {path for path in packed.parent.parent.rglob("*") if not path.is_relative_to(cache)}
    with pytest.raises(BundleError, match=message):
        folder_of(place)
    assert not list((cache / "bundles").glob("*/manifest.json"))
    assert not [path for path in (cache / "bundles").rglob("*") if path.is_file()]
    assert {path for path in packed.parent.parent.rglob("*") if not path.is_relative_to(cache)} == before


def test_a_name_that_comes_twice_is_refused(packed: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(packed, "a") as archive:
        archive.writestr("tokenizer.json", b"other")
    with pytest.raises(BundleError, match="two of one name"):
        folder_of(packed)


def test_what_is_no_archive_is_refused(packed: Path, tmp_path: Path) -> None:
    for name, data in (("empty.zip", b""), ("text.zip", b"hello"), ("cut.zip", packed.read_bytes()[:-200])):
        (tmp_path / name).write_bytes(data)
        assert not is_zip(tmp_path / name)
        with pytest.raises(BundleError, match="cannot be read as a zip archive"):
            folder_of(tmp_path / name)
