"""What fuzzing found, each as small as it can be said: none of it may come back."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtime.errors import ClipError
from tests.fuzz.targets import TARGETS, well


def edited(change: Callable[[Any], object]) -> Callable[[bytes], bytes]:
    def made(sound: bytes) -> bytes:
        document = json.loads(sound)
        change(document)
        return json.dumps(document).encode()

    return made


def head(change: Callable[[Any], object]) -> Callable[[bytes], bytes]:
    """Of a safetensors file."""

    def made(sound: bytes) -> bytes:
        (length,) = struct.unpack("<Q", sound[:8])
        document = json.loads(sound[8 : 8 + length])
        change(document)
        text = json.dumps(document).encode()
        return struct.pack("<Q", len(text)) + text + sound[8 + length :]

    return made


def zip_of(name: str, compression: int = zipfile.ZIP_STORED, after: Callable[[bytes], bytes] = lambda data: data) -> Callable[[bytes], bytes]:
    def made(sound: bytes) -> bytes:
        out = io.BytesIO(sound)
        with zipfile.ZipFile(out, "a") as archive:
            archive.writestr(zipfile.ZipInfo(name), b"x", compression)
        return after(out.getvalue())

    return made


def first(document: Any) -> Any:
    return document[next(name for name in document if name != "__metadata__")]


FOUND: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "a refusal that quotes a line feed": ("manifest", edited(lambda d: d["files"].update({"a\nb": {"sha256": 7, "bytes": 1}}))),
    "an entry without a name": ("bundle-zip", zip_of("")),
    "a name that is not UTF-8": ("bundle-zip", zip_of("\u00e9\u00e9", after=lambda data: data.replace("\u00e9\u00e9".encode(), b"\xa4\xa4\xa4\xa4"))),
    "a rare compression": ("bundle-zip", zip_of("a", zipfile.ZIP_LZMA)),
    "a template of nothing": ("tokenizer-file", edited(lambda d: d["post_processor"].update(single=[{}, {}, {}]))),
    "a template of unknown tokens": ("tokenizer-file", edited(lambda d: d["post_processor"].update(special_tokens={}))),
    "an unknown unknown": ("tokenizer-file", edited(lambda d: (d["model"].update(unk_token="nowhere"), d["model"]["vocab"].pop("a</w>")))),
    "a shape whose product is nothing": ("store-part", head(lambda d: first(d).update(shape=[0, 2**62, 2**62]))),
    "a mean that is false": ("checkpoint-config", edited(lambda d: d["image"].update(mean=False))),
    "no heads": ("checkpoint-config", edited(lambda d: d["text"].update(heads=0))),
    "2^31 layers": ("checkpoint-config", edited(lambda d: d["text"].update(layers=2**31))),
    "arguments that no backbone has": ("checkpoint-config", edited(lambda d: d["image"].update(backbone_args={"widths": None, "nothing": 1}))),
    "records without a shape": ("photo-segment", head(lambda d: d["records"].update(shape=[]))),
    "2^60 records": ("photo-segment", head(lambda d: d["records"].update(shape=[2**60, d["records"]["shape"][1]]))),
    "a line without a bundle": ("results", edited(lambda d: d.pop("bundle"))),
    "a summary of other names": ("results", edited(lambda d: d["summary"].pop("p90"))),
    "a peak that is no number": ("importers", lambda sound: b"\x02" + b"model,0.0012,100&,50,0\n"),
    "a peak without end": ("importers", lambda sound: b"\x02" + b"model,0.0012,1e999,50,0\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_stays_mended(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOBILECLIP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "place").mkdir()
    target, made = FOUND[name]
    reader, sound = TARGETS[target].prepare(tmp_path / "place")
    data = made(sound[0])
    assert data != sound[0]
    found = well(reader, data)
    if target not in ("tokenizer-file", "results"):  # the first tries two ways, the second shows what it can
        assert isinstance(found, ClipError), found
