"""The golden inputs find what changed, and only that."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

import runtime
from runtime import preprocess as preprocess_module
from runtime.errors import BundleError
from runtime.manifest import read_manifest, write_manifest
from runtime.selfcheck import read_golden, selfcheck, write_golden
from tests.runtime import toy


def test_a_sound_bundle_passes(toy_bundle: Path) -> None:
    report = selfcheck(toy_bundle, threads=1)
    assert report["ok"] is True
    assert report["n"] == 6
    assert report["preprocess"]["max_abs"] == 0
    by_id = {entry["id"]: entry for entry in report["artefacts"]}
    assert {id: entry["how"] for id, entry in by_id.items()} == {
        "image-onnx-fp32": "run",
        "text-onnx-fp32": "run",
        "text-onnx-int8": "run",
        "image-onnx-int8": "refused",
    }
    assert by_id["text-onnx-fp32"]["cosine_min"] > 0.999999
    assert 0.99 < by_id["text-onnx-int8"]["cosine_min"] < 0.99999
    json.dumps(report, allow_nan=False)


def test_a_clip_checks_what_it_uses(toy_bundle: Path) -> None:
    report = runtime.load(toy_bundle, threads=1).selfcheck()
    assert report["ok"] is True
    assert [entry["id"] for entry in report["artefacts"]] == ["image-onnx-fp32", "text-onnx-int8"]


def test_a_wrong_graph_is_found(own_bundle: Path) -> None:
    weights = toy.weights(runtime.load(own_bundle).tokenizer, seed=1)
    onnx.save(toy.graph("image", weights[0]), own_bundle / "onnx/image.fp32.onnx")
    write_manifest(own_bundle, read_manifest(own_bundle, verify=False))
    report = selfcheck(own_bundle)
    assert report["ok"] is False
    bad = [entry for entry in report["artefacts"] if not entry["ok"]]
    assert [entry["id"] for entry in bad] == ["image-onnx-fp32"]
    assert "expected at least 0.99999" in bad[0]["reason"]


def test_a_stricter_threshold_fails_int8(own_bundle: Path) -> None:
    manifest = read_manifest(own_bundle)
    strict = tuple(replace(a, threshold=0.99999) if a.precision == "int8" and a.path else a for a in manifest.artefacts)
    write_manifest(own_bundle, replace(manifest, artefacts=strict))
    assert [entry["id"] for entry in selfcheck(own_bundle)["artefacts"] if not entry["ok"]] == ["text-onnx-int8"]


def test_another_resize_is_found(toy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nearest(image: Image.Image, config: preprocess_module.PreprocessConfig, **_: object) -> Image.Image:
        return image.resize((config.image_size, config.image_size), Image.Resampling.NEAREST)

    monkeypatch.setattr(preprocess_module, "resize_and_crop", nearest)
    report = selfcheck(toy_bundle)
    assert report["preprocess"]["ok"] is False
    assert report["ok"] is False
    assert all(entry["ok"] for entry in report["artefacts"])


def test_another_tokenizer_is_found(own_bundle: Path) -> None:
    manifest = read_manifest(own_bundle)
    write_manifest(own_bundle, replace(manifest, text=replace(manifest.text, pad_id=7)))
    report = selfcheck(own_bundle)
    assert report["tokenizer"] == {"ok": False, "rows_different": 6}
    assert report["ok"] is False


def test_an_artefact_that_breaks_is_reported_not_raised(own_bundle: Path) -> None:
    (own_bundle / "onnx/image.fp32.onnx").write_bytes(b"no graph")
    write_manifest(own_bundle, read_manifest(own_bundle, verify=False))
    entry = selfcheck(own_bundle)["artefacts"][0]
    assert entry["ok"] is False
    assert "image.fp32.onnx is refused" in entry["reason"]


def test_embeddings_that_lost_their_norm_are_found(own_bundle: Path) -> None:
    _, weight = toy.weights(runtime.load(own_bundle).tokenizer)
    model = toy.graph("text", weight)
    raw = [node for node in model.graph.node if node.output[0] == "raw"][0]
    raw.output[0] = "text_embedding"
    kept = [node for node in model.graph.node if node.op_type not in ("ReduceL2", "Div")]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    onnx.save(model, own_bundle / "onnx/text.fp32.onnx")
    write_manifest(own_bundle, read_manifest(own_bundle, verify=False))
    entry = selfcheck(own_bundle, artefacts=["text-onnx-fp32"])["artefacts"][0]
    assert entry["ok"] is False
    assert "norms that differ" in entry["reason"]
    assert entry["cosine_min"] > 0.99999


def test_other_targets_are_judged_by_their_record(own_bundle: Path) -> None:
    manifest = read_manifest(own_bundle)
    other = tuple(replace(a, target="coreml") if a.id == "text-onnx-fp32" else a for a in manifest.artefacts)
    write_manifest(own_bundle, replace(manifest, artefacts=other))
    entry = selfcheck(own_bundle)["artefacts"][1]
    assert (entry["how"], entry["ok"], entry["cosine_min"]) == ("recorded", True, 1.0)
    low = tuple(replace(a, parity={"cosine_min": 0.9}) if a.target == "coreml" else a for a in other)
    write_manifest(own_bundle, replace(manifest, artefacts=low))
    assert selfcheck(own_bundle)["ok"] is False


def test_golden_inputs_that_do_not_fit(own_bundle: Path, tmp_path: Path) -> None:
    manifest = read_manifest(own_bundle)
    golden = read_golden(own_bundle, manifest)
    assert golden.texts == toy.GOLDEN_TEXTS
    arrays = {"pixels": golden.pixels, "tokens": golden.tokens, "image_embedding": golden.image_embedding, "text_embedding": golden.text_embedding}
    images = [toy.picture("red", n) for n in range(6)]
    with pytest.raises(BundleError, match="differ in number"):
        write_golden(tmp_path, images=images, texts=["a"], **arrays)
    write_golden(own_bundle, images=images, texts=golden.texts, **{**arrays, "pixels": np.zeros((6, 3, 4, 4), np.float32)})
    write_manifest(own_bundle, manifest)
    with pytest.raises(BundleError, match="have shapes"):
        selfcheck(own_bundle)
    (own_bundle / "golden/golden.json").write_text('{"images": []}')
    with pytest.raises(BundleError, match="cannot be read"):
        selfcheck_after_rewrite(own_bundle)
    (own_bundle / "golden/golden.safetensors").write_bytes(b"x")
    with pytest.raises(BundleError, match="cannot be read"):
        selfcheck_after_rewrite(own_bundle)


def selfcheck_after_rewrite(bundle: Path) -> None:
    write_manifest(bundle, read_manifest(bundle, verify=False))
    selfcheck(bundle)
