"""The manifest: what is written is read back, and anything else is refused with one sentence."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runtime.bundle_files import read_file
from runtime.errors import BundleError
from runtime.manifest import Artefact, FileFacts, read_manifest, write_manifest
from tests.runtime import toy

ZEROS = "0" * 64


def sign(document: dict[str, Any]) -> bytes:
    """The bytes of a manifest with a right hash of its own, whatever else is wrong with it."""
    raw = json.dumps({**document, "manifest_sha256": ZEROS}).encode()
    return raw.replace(ZEROS.encode(), hashlib.sha256(raw).hexdigest().encode(), 1) if raw.count(ZEROS.encode()) == 1 else raw


def document(bundle: Path) -> dict[str, Any]:
    found = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    found["provenance"] = {}  # the toy's has zeros, which `sign` must be alone with
    return found


def refuses(bundle: Path, match: str, verify: bool = True) -> None:
    with pytest.raises(BundleError, match=match) as caught:
        read_manifest(bundle, verify=verify)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_round_trip(own_bundle: Path) -> None:
    manifest = read_manifest(own_bundle)
    assert manifest.name == "toy"
    assert manifest.image == toy.IMAGE
    assert manifest.text == toy.TEXT
    assert [a.status for a in manifest.artefacts] == ["proven", "proven", "proven", "refused"]
    assert manifest.artefacts[0].bytes == (own_bundle / "onnx/image.fp32.onnx").stat().st_size
    before = (own_bundle / "manifest.json").read_bytes()
    assert write_manifest(own_bundle, manifest) == manifest
    assert (own_bundle / "manifest.json").read_bytes() == before
    assert not list(own_bundle.parent.glob("*.part")) + list(own_bundle.parent.glob(".*.part"))


def test_document_agrees_with_the_format_page(own_bundle: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "bundle-format.md").read_text(encoding="utf-8")
    found = json.loads((own_bundle / "manifest.json").read_text(encoding="utf-8"))
    names = {*found, *found["image"], *found["text"], *(name for entry in found["artefacts"] for name in entry)}
    assert [name for name in sorted(names) if f"`{name}`" not in page] == []


def test_one_flipped_bit_anywhere_is_found(toy_bundle: Path, tmp_path: Path) -> None:
    small = Path(shutil.copytree(toy_bundle, tmp_path / "bundle"))
    files = sorted(path for path in small.rglob("*") if path.is_file())
    assert len(files) == 13
    for path in files:
        data = path.read_bytes()
        for position in {0, len(data) // 3, len(data) - 1}:
            path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
            refuses(small, path.name.replace(".", r"\."))
        path.write_bytes(data)
    assert read_manifest(small).name == "toy"


def test_every_byte_of_the_manifest_counts(own_bundle: Path) -> None:
    path = own_bundle / "manifest.json"
    data = path.read_bytes()
    for position in range(0, len(data), 7):
        for bit in (1, 0x20):
            path.write_bytes(data[:position] + bytes([data[position] ^ bit]) + data[position + 1 :])
            refuses(own_bundle, "manifest.json", verify=False)


def test_cut_short_and_grown_files(own_bundle: Path) -> None:
    path = own_bundle / "onnx/text.fp32.onnx"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    refuses(own_bundle, r"text\.fp32\.onnx has \d+ bytes, the manifest says \d+")
    path.write_bytes(data + b"\0")
    refuses(own_bundle, "text.fp32.onnx has")


def test_missing_and_unlisted_files(own_bundle: Path) -> None:
    (own_bundle / "golden/00.png").rename(own_bundle / "golden/hidden.png")
    refuses(own_bundle, r"00\.png is listed in the manifest but missing")
    (own_bundle / "golden/hidden.png").rename(own_bundle / "golden/00.png")
    (own_bundle / "onnx/.extra").write_bytes(b"")
    refuses(own_bundle, r"\.extra is not listed in the manifest")
    assert read_manifest(own_bundle, verify=False).name == "toy"


def test_links(own_bundle: Path, tmp_path: Path) -> None:
    # A file that is a link to the right content is fine (model hubs keep bundles that way), a linked folder is not.
    path = own_bundle / "tokenizer.json"
    shutil.move(path, tmp_path / "blob")
    path.symlink_to(tmp_path / "blob")
    assert read_manifest(own_bundle).name == "toy"
    (own_bundle / "more").symlink_to(tmp_path, target_is_directory=True)
    refuses(own_bundle, "more is not listed")


def test_no_bundle(tmp_path: Path) -> None:
    refuses(tmp_path / "none", "there is no such folder")
    refuses(tmp_path, "no readable manifest.json")
    (tmp_path / "manifest.json").write_bytes(b"")
    refuses(tmp_path, "not the JSON of a manifest")
    (tmp_path / "manifest.json").write_bytes(b"[" * 100_000)
    refuses(tmp_path, "not the JSON of a manifest")
    (tmp_path / "manifest.json").write_bytes(b"[]")
    refuses(tmp_path, "holds a list")
    (tmp_path / "manifest.json").write_bytes(b'{"schema": 1, "schema": 1}')
    refuses(tmp_path, "comes twice")
    (tmp_path / "manifest.json").write_bytes(b'{"schema": NaN}')
    refuses(tmp_path, "NaN is not a JSON number")
    (tmp_path / "manifest.json").write_bytes(b" " * (17 * 1024 * 1024))
    refuses(tmp_path, "it is no manifest")
    (tmp_path / "manifest.json").write_bytes(b"\xff\xfe{}")
    refuses(tmp_path, "not the JSON of a manifest")


def test_every_field_is_needed_and_typed(own_bundle: Path) -> None:
    path, whole = own_bundle / "manifest.json", document(own_bundle)
    holders: list[tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = [
        (lambda d: d, ""),
        (lambda d: d["image"], "image."),
        (lambda d: d["text"], "text."),
        (lambda d: d["artefacts"][0], "artefacts"),
        (lambda d: d["files"]["tokenizer.json"], "files"),
    ]
    tried = 0
    for holder, _ in holders:
        for name in holder(whole):
            for value in (None, "lacks"), ({"object": True}, "is .*expected|is no object|unusable"):
                changed = json.loads(json.dumps(whole))
                if value[0] is None:
                    if name in ("threshold", "facts", "manifest_sha256", "any_length", "calibration", "classes"):
                        continue
                    del holder(changed)[name]
                elif name in ("manifest_sha256", "golden", "provenance", "image", "text", "parity", "latency", "facts", "calibration"):
                    continue
                else:
                    holder(changed)[name] = [] if name == "files" else value[0]
                path.write_bytes(sign(changed))
                refuses(own_bundle, value[1] if name != "files" else "lacks|expected dict", verify=False)
                tried += 1
    assert tried > 70


CHANGES: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    ("schema", lambda d: d.update(schema=2), "has schema 2, this version reads schema 1"),
    ("true is no number", lambda d: d.update(embed_dim=True), "embed_dim"),
    ("no width", lambda d: d.update(embed_dim=0), "embed_dim is 0"),
    ("loss", lambda d: d.update(loss="hinge"), "loss is 'hinge'"),
    ("scale", lambda d: d.update(logit_scale=0), "logit_scale is 0"),
    ("resize", lambda d: d["image"].update(resize="squash"), "image.resize"),
    ("crop", lambda d: d["image"].update(crop="random"), "image.crop"),
    ("mean", lambda d: d["image"].update(mean=[0, 0]), "three numbers"),
    ("std", lambda d: d["image"].update(std=[1, 0, 1]), "'image' is unusable"),
    ("interpolation", lambda d: d["image"].update(interpolation="nearest"), "'image' is unusable"),
    ("pad", lambda d: d["text"].update(pad_id=2048), "pad_id 2048 lies outside"),
    ("mask", lambda d: d["text"].update(mask="sliding"), "text.mask"),
    ("cleaning", lambda d: d["text"].update(cleaning="lower"), "text.cleaning"),
    ("context", lambda d: d["text"].update(context_length=0), "context_length is 0"),
    ("tower", lambda d: d["artefacts"][0].update(tower="audio"), "tower 'audio'"),
    ("batch", lambda d: d["artefacts"][0].update(batch="0"), "batch '0'"),
    ("status", lambda d: d["artefacts"][0].update(status="maybe"), "status 'maybe'"),
    ("same id", lambda d: d["artefacts"].append(d["artefacts"][0]), "share an id"),
    ("refused with a path", lambda d: d["artefacts"][0].update(status="refused", reason="slow"), "refused, so it has no path"),
    ("refused without reason", lambda d: d["artefacts"][3].update(reason=None), "must have a reason"),
    ("unproven without reason", lambda d: d["artefacts"][0].update(status="unproven"), "is unproven, so it must have a reason"),
    ("failed without path", lambda d: d["artefacts"][3].update(status="failed"), "is failed, so it needs a path"),
    ("proven without path", lambda d: d["artefacts"][0].update(path=None), "needs a path"),
    ("proven without parity", lambda d: d["artefacts"][0].update(parity={}), "needs the field 'cosine_min'"),
    ("unlisted path", lambda d: d["artefacts"][0].update(path="onnx/other.onnx"), "not among the files"),
    ("size", lambda d: d["artefacts"][0].update(bytes=5), "says it has 5 bytes"),
    ("artefact is no object", lambda d: d["artefacts"].append(3), r"artefacts\[4\] is no object"),
    ("tokenizer", lambda d: d["files"].pop("tokenizer.json"), "no tokenizer.json"),
    ("hash", lambda d: d["files"]["tokenizer.json"].update(sha256="F" * 64), "64 lower-case hex"),
    ("size below 0", lambda d: d["files"]["tokenizer.json"].update(bytes=-1), "negative"),
]


@pytest.mark.parametrize(("change", "match"), [case[1:] for case in CHANGES], ids=[case[0] for case in CHANGES])
def test_contradictions(own_bundle: Path, change: Callable[[dict[str, Any]], Any], match: str) -> None:
    changed = document(own_bundle)
    change(changed)
    (own_bundle / "manifest.json").write_bytes(sign(changed))
    refuses(own_bundle, match, verify=False)


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a\\b", "C:x", "a/", "", "a\0b", "a\nb", ".", ".."])
def test_paths_stay_inside(own_bundle: Path, name: str) -> None:
    whole = json.dumps(document(own_bundle))
    changed = json.loads(whole)
    changed["files"][name] = {"sha256": "a" * 64, "bytes": 1}
    (own_bundle / "manifest.json").write_bytes(sign(changed))
    refuses(own_bundle, "may not leave the bundle", verify=False)
    changed = json.loads(whole)
    changed["artefacts"][0]["path"] = name
    (own_bundle / "manifest.json").write_bytes(sign(changed))
    refuses(own_bundle, "needs a path inside the bundle", verify=False)


def test_unknown_fields_are_ignored(own_bundle: Path) -> None:
    changed = document(own_bundle)
    changed["colour"] = "blue"
    changed["image"]["gamma"] = 2.2
    changed["artefacts"][0]["flavour"] = 1
    (own_bundle / "manifest.json").write_bytes(sign(changed))
    assert read_manifest(own_bundle).name == "toy"


def test_a_package_folder_is_an_artefact(own_bundle: Path) -> None:
    (own_bundle / "coreml/image.fp16.mlpackage/Data").mkdir(parents=True)
    (own_bundle / "coreml/image.fp16.mlpackage/Manifest.json").write_text("{}")
    (own_bundle / "coreml/image.fp16.mlpackage/Data/weight.bin").write_bytes(b"12345")
    manifest = read_manifest(own_bundle, verify=False)
    package = toy.artefact("image", "fp32", id="image-coreml-fp16", target="coreml", path="coreml/image.fp16.mlpackage")
    written = write_manifest(own_bundle, replace(manifest, artefacts=(*manifest.artefacts, package)))
    assert written.artefact("image-coreml-fp16").bytes == 7
    assert "coreml/image.fp16.mlpackage/Data/weight.bin" in read_manifest(own_bundle).files


def test_writing_refuses_what_reading_would(own_bundle: Path) -> None:
    manifest = read_manifest(own_bundle)
    before = (own_bundle / "manifest.json").read_bytes()
    lost = replace(manifest.artefacts[0], path="onnx/none.onnx")
    with pytest.raises(BundleError, match="not among the files"):
        write_manifest(own_bundle, replace(manifest, artefacts=(lost,)))
    with pytest.raises(BundleError, match="cannot be written as JSON"):
        write_manifest(own_bundle, replace(manifest, provenance={"loss": float("nan")}))
    with pytest.raises(BundleError, match="embed_dim"):
        write_manifest(own_bundle, replace(manifest, embed_dim=-1))
    assert (own_bundle / "manifest.json").read_bytes() == before
    assert not list(own_bundle.parent.glob(".*part"))


def test_reading_one_file_checks_it(own_bundle: Path) -> None:
    manifest = read_manifest(own_bundle, verify=False)
    assert read_file(own_bundle, manifest, "golden/golden.json").startswith(b"{")
    with pytest.raises(BundleError, match="lists no file"):
        read_file(own_bundle, manifest, "golden/other.json")
    wrong = replace(manifest, files={"tokenizer.json": FileFacts(sha256="a" * 64, bytes=manifest.files["tokenizer.json"].bytes)})
    with pytest.raises(BundleError, match="was changed"):
        read_file(own_bundle, wrong, "tokenizer.json")
    (own_bundle / "tokenizer.json").unlink()
    with pytest.raises(BundleError, match="cannot be read"):
        read_file(own_bundle, manifest, "tokenizer.json")


def test_thresholds_and_speed() -> None:
    entry = toy.artefact("image", "fp32")
    assert entry.cosine_threshold == 0.99999
    assert replace(entry, precision="fp16").cosine_threshold == 0.999
    assert replace(entry, threshold=0.5).cosine_threshold == 0.5
    assert entry.p50_ms == float("inf")
    assert replace(entry, latency={"p50_ms": 3}).p50_ms == 3.0
    assert isinstance(entry, Artefact)
