"""The SDK on real ONNX sessions: choice of artefacts, batches, inputs, and a cold start without torch."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

import runtime
from runtime.choice import choose
from runtime.encoder import probabilities
from runtime.errors import BundleError, DeviceError, ImageError
from runtime.manifest import Manifest, read_manifest, write_manifest
from runtime.preprocess import preprocess
from tests.runtime import toy


@pytest.fixture(scope="module")
def clip(toy_bundle: Path) -> runtime.Clip:
    return runtime.load(toy_bundle, threads=1)


def test_embeddings_are_the_checkpoint_s(clip: runtime.Clip) -> None:
    image, text = toy.weights(clip.tokenizer)
    pictures = [toy.picture(name, 50) for name in toy.COLOURS]
    found = clip.encode_image(pictures)
    assert found.dtype == np.float32
    assert found.shape == (4, toy.DIM)
    np.testing.assert_allclose(found, toy.reference("image", image, preprocess(pictures, clip.preprocess_config)), atol=1e-6)
    exact = runtime.load(clip.folder, threads=1, prefer="fp32")
    texts = ["red", "a blue heart", ""]
    np.testing.assert_allclose(exact.encode_text(texts), toy.reference("text", text, clip.tokenizer(texts)), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(clip.encode_text(texts), axis=1), 1, atol=1e-5)


def test_inputs_of_every_kind(clip: runtime.Clip, tmp_path: Path) -> None:
    picture = toy.picture("red", 3)
    picture.save(tmp_path / "red.png")
    mixed = clip.encode_image([picture, np.asarray(picture), tmp_path / "red.png", str(tmp_path / "red.png")])
    np.testing.assert_array_equal(mixed, np.repeat(mixed[:1], 4, axis=0))
    np.testing.assert_array_equal(clip.encode_image(picture), mixed[:1])
    np.testing.assert_array_equal(clip.encode_text("red"), clip.encode_text(["red"]))
    with pytest.raises(ImageError, match=r"none\.png"):
        clip.encode_image([picture, tmp_path / "none.png"])


@pytest.mark.parametrize("count", [0, 1, 2, 31, 32, 33, 70])
def test_any_batch_size(clip: runtime.Clip, count: int) -> None:
    pictures = [toy.picture("blue", n) for n in range(count)]
    found = clip.encode_image(pictures)
    assert found.shape == (count, toy.DIM)
    assert found.dtype == np.float32
    if count:
        np.testing.assert_allclose(found[-1:], clip.encode_image(pictures[-1]), atol=1e-6)
    texts = [f"red {n}" for n in range(count * 5)]
    assert clip.encode_text(texts).shape == (count * 5, toy.DIM)
    if count:
        np.testing.assert_allclose(clip.encode_text(texts)[-1:], clip.encode_text(texts[-1]), atol=1e-6)


@pytest.mark.parametrize("batch", ["1", "4"])
def test_fixed_batches_give_the_same(tmp_path: Path, clip: runtime.Clip, batch: str) -> None:
    artefacts = [toy.artefact("image", "fp32", batch), toy.artefact("text", "fp32", batch)]
    toy.build(tmp_path / "bundle", artefacts)
    fixed = runtime.load(tmp_path / "bundle", threads=1)
    exact = runtime.load(clip.folder, threads=1, prefer="fp32")
    for count in (0, 1, 4, 7):
        pictures = [toy.picture("green", n) for n in range(count)]
        np.testing.assert_allclose(fixed.encode_image(pictures), exact.encode_image(pictures), atol=1e-6)
        texts = ["red blue", "white", "a", "", "b", "c", "d"][:count]
        np.testing.assert_allclose(fixed.encode_text(texts), exact.encode_text(texts), atol=1e-6)


def test_classify(clip: runtime.Clip) -> None:
    labels = list(toy.COLOURS)
    found = clip.classify(toy.picture("green", 8), labels)
    assert found.shape == (4,)
    assert found.sum() == pytest.approx(1, abs=1e-6)
    assert labels[int(found.argmax())] == "green"
    both = clip.classify([toy.picture("green", 8), toy.picture("red", 8)], labels)
    assert both.shape == (2, 4)
    np.testing.assert_allclose(both[0], found, atol=1e-6)
    assert clip.classify([toy.picture("green", 8)], labels).shape == (1, 4)
    assert clip.classify(np.asarray(toy.picture("green", 8)), labels).shape == (4,)
    assert clip.classify([], labels).shape == (0, 4)
    for wrong in ([], "red"):
        with pytest.raises(ValueError, match="at least one text"):
            clip.classify(toy.picture("green", 8), wrong)


def test_probabilities_by_hand() -> None:
    cosines = np.array([[0.5, 0.25]])
    even = 1 / (1 + np.exp(-1.0))
    np.testing.assert_allclose(probabilities(cosines, "softmax", 4.0, None), [[even, 1 - even]], atol=1e-7)
    np.testing.assert_allclose(probabilities(cosines, "sigmoid", 4.0, -1.0), [[1 / (1 + np.exp(-1.0)), 0.5]], atol=1e-7)
    assert np.isfinite(probabilities(np.array([[1.0, -1.0]]), "softmax", 1e4, None)).all()
    assert np.isfinite(probabilities(np.array([[1.0, -1.0]]), "sigmoid", 1e4, None)).all()


def with_artefacts(manifest: Manifest, *artefacts: runtime.Artefact) -> Manifest:
    return replace(manifest, artefacts=tuple(artefacts))


def test_the_fastest_good_artefact_is_chosen(toy_bundle: Path) -> None:
    manifest = read_manifest(toy_bundle)
    assert choose(manifest, "text").id == "text-onnx-int8"
    assert "fastest of 2" in choose(manifest, "text").why
    assert choose(manifest, "image").passed_over == {"image-onnx-int8": "refused: 0.30 ms, fp32 takes 0.20 ms"}
    fp32, int8 = toy.artefact("text", "fp32", p50_ms=1.0), toy.artefact("text", "int8", p50_ms=0.99)
    assert choose(with_artefacts(manifest, int8, fp32), "text").id == fp32.id
    assert "equally fast" in choose(with_artefacts(manifest, int8, fp32), "text").why
    assert choose(with_artefacts(manifest, replace(int8, latency={"p50_ms": 0.9}), fp32), "text").id == int8.id
    untimed = replace(fp32, latency=None)
    assert choose(with_artefacts(manifest, int8, untimed), "text").id == int8.id
    assert choose(with_artefacts(manifest, replace(int8, latency=None), untimed), "text").id == fp32.id
    static = toy.artefact("text", "fp32", "1", p50_ms=1.0)
    assert choose(with_artefacts(manifest, static, fp32), "text").id == fp32.id
    assert choose(with_artefacts(manifest, replace(static, latency={"p50_ms": 0.5}), fp32), "text").id == static.id


def test_what_is_not_good_enough_is_passed_over(toy_bundle: Path) -> None:
    manifest = read_manifest(toy_bundle)
    fp32, int8 = toy.artefact("text", "fp32", p50_ms=1.0), toy.artefact("text", "int8", p50_ms=0.1)
    for bad, reason in [
        (replace(int8, parity={**(int8.parity or {}), "cosine_min": 0.89}), "below 0.9"),
        (replace(int8, threshold=0.999), "below 0.999"),
        (replace(int8, parity={**(int8.parity or {}), "recall1_change": -0.03}), "recall@1"),
        (replace(int8, target="coreai"), "does not run in this SDK"),
        (replace(int8, status="refused", path=None, reason="slow"), "refused: slow"),
    ]:
        choice = choose(with_artefacts(manifest, bad, fp32), "text")
        assert choice.id == fp32.id
        assert reason in choice.passed_over[bad.id]
        with pytest.raises(BundleError, match="no text artefact that runs here"):
            choose(with_artefacts(manifest, bad), "text")


def test_preferences(toy_bundle: Path) -> None:
    assert runtime.load(toy_bundle, prefer="fp32").choice["text"].id == "text-onnx-fp32"
    assert runtime.load(toy_bundle, prefer={"text": "text-onnx-fp32"}).choice["text"].id == "text-onnx-fp32"
    assert "asked for" in str(runtime.load(toy_bundle, prefer={"text": "int8"}).choice["text"])
    with pytest.raises(BundleError, match="no usable image artefact 'int8'"):
        runtime.load(toy_bundle, prefer="int8")
    with pytest.raises(BundleError, match="threads is 0"):
        runtime.load(toy_bundle, threads=0)


@pytest.mark.parametrize("name", ["tokenizer.json", "onnx/image.fp32.onnx", "onnx/text.int8.onnx", "manifest.json"])
def test_a_flipped_byte_in_what_is_used_is_refused(own_bundle: Path, name: str) -> None:
    data = bytearray((own_bundle / name).read_bytes())
    data[len(data) // 2] ^= 4
    (own_bundle / name).write_bytes(data)
    with pytest.raises(BundleError, match=Path(name).name):
        runtime.load(own_bundle)


def test_files_that_are_not_used_are_not_read(own_bundle: Path) -> None:
    (own_bundle / "onnx/text.fp32.onnx").unlink()
    assert runtime.load(own_bundle).encode_text(["red"]).shape == (1, toy.DIM)


def rewrite(bundle: Path, path: str, model: onnx.ModelProto | bytes) -> None:
    data = model if isinstance(model, bytes) else model.SerializeToString()
    (bundle / path).write_bytes(data)
    write_manifest(bundle, read_manifest(bundle, verify=False))


def test_graphs_that_are_not_what_the_manifest_says(own_bundle: Path) -> None:
    rewrite(own_bundle, "onnx/image.fp32.onnx", b"not a graph")
    with pytest.raises(BundleError, match="is refused: "):
        runtime.load(own_bundle).encode_image(toy.picture("red"))
    wide = toy.graph("text", np.ones((toy.VOCAB, toy.DIM), np.float32))
    wide.graph.input[0].name = "ids"
    wide.graph.node[0].input[1] = "ids"
    rewrite(own_bundle, "onnx/text.int8.onnx", wide)
    with pytest.raises(BundleError, match=r"inputs \['ids'\]"):
        runtime.load(own_bundle).encode_text("red")


def test_values_that_are_not_finite_are_refused(own_bundle: Path) -> None:
    rewrite(own_bundle, "onnx/text.int8.onnx", toy.graph("text", np.zeros((toy.VOCAB, toy.DIM), np.float32)))
    with pytest.raises(DeviceError, match="not finite"):
        runtime.load(own_bundle).encode_text("red")


def test_a_tokenizer_larger_than_the_tower_is_refused(own_bundle: Path) -> None:
    manifest = read_manifest(own_bundle)
    write_manifest(own_bundle, replace(manifest, text=replace(manifest.text, vocab_size=100)))
    with pytest.raises(BundleError, match="2048 tokens, the text tower 100"):
        runtime.load(own_bundle).encode_text("red")


def test_arrays_of_the_wrong_shape(clip: runtime.Clip) -> None:
    with pytest.raises(ValueError, match="expected"):
        clip.encode_pixels(np.zeros((1, 3, 8, 8), np.float32))
    with pytest.raises(ValueError, match="expected"):
        clip.encode_tokens(np.zeros((1, 3), np.int32))


def test_public_names() -> None:
    assert {"load", "Clip", "BundleError", "PreprocessConfig", "Tokenizer"} <= set(dir(runtime))
    for name in runtime.__all__:
        assert getattr(runtime, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'torch'"):
        _ = runtime.torch


COLD = """
import sys, time
start = time.perf_counter()
import runtime
imported = time.perf_counter()
light = {"numpy", "PIL", "onnxruntime", "tokenizers", "ftfy"} & set(sys.modules)
assert not light, light
clip = runtime.load(sys.argv[1])
clip.encode_text(["a red heart"])
done = time.perf_counter()
heavy = {"torch", "torchvision", "open_clip", "timm", "transformers", "huggingface_hub", "onnx", "mobileclip", "distill", "export"} & set(sys.modules)
assert not heavy, heavy
print(imported - start, done - start)
"""


def test_cold_start_without_torch(toy_bundle: Path, record_property: object) -> None:
    command = [sys.executable, "-c", COLD, str(toy_bundle)]
    times = []
    for _ in range(3):
        ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
        assert ran.returncode == 0, ran.stderr
        times.append([float(value) for value in ran.stdout.split()])
    first, whole = (min(column) for column in zip(*times, strict=True))
    sys.stdout.write(f"import runtime {first * 1e3:.1f} ms, with load and first text embedding {whole * 1e3:.0f} ms\n")
    assert first < 0.1
    assert whole < 1.0


def test_pictures_of_any_mode(clip: runtime.Clip) -> None:
    grey = Image.fromarray(np.full((20, 20), 255, np.uint8))
    np.testing.assert_allclose(clip.encode_image(grey), clip.encode_image(np.full((20, 20, 3), 255, np.uint8)), atol=1e-6)
