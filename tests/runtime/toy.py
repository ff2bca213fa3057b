"""A toy bundle: real ONNX graphs of two small towers, a real tokenizer, golden inputs; built in a fraction of a second.

The towers share a meaning: both measure colour. The image tower averages 4 x 4 blocks of the picture; the text tower
looks its words up. "red", "green" and "blue" therefore find pictures of that colour.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from runtime.manifest import Artefact, ImageSpec, Manifest, TextSpec, write_manifest
from runtime.preprocess import preprocess
from runtime.selfcheck import write_golden
from runtime.tokenizer import Tokenizer, build_clip_tokenizer

SIZE, CONTEXT, VOCAB, DIM = 16, 8, 2048, 12
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
IMAGE = ImageSpec(image_size=SIZE, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bicubic")
TEXT = TextSpec(context_length=CONTEXT, vocab_size=VOCAB)
GOLDEN_TEXTS = ["red", "green", "blue", "white", "a red heart", "Blue &amp; green"]


def merges() -> Path:
    spec = importlib.util.find_spec("open_clip")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz"


def weights(tokenizer: Tokenizer, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(48, DIM) of the image tower and (VOCAB, DIM) of the text tower."""
    generator = np.random.default_rng(seed)
    basis = generator.normal(size=(3, DIM)).astype(np.float32)
    image = np.repeat(basis / 16, 16, axis=0) + generator.normal(0, 0.01, (48, DIM)).astype(np.float32)
    words = generator.normal(0, 0.02, (VOCAB, DIM)).astype(np.float32)
    for name, rgb in COLOURS.items():
        for token in tokenizer([name])[0, 1:]:
            if 0 < token < VOCAB - 2:
                words[token] += (np.array(rgb) / 127.5 - 1) @ basis
    return image.astype(np.float32), words


def graph(tower: str, weight: np.ndarray, batch: int | str = "batch") -> onnx.ModelProto:
    """Pool or look up, project, normalise."""
    if tower == "image":
        entry = helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, 3, SIZE, SIZE])
        nodes = [
            helper.make_node("AveragePool", ["image"], ["pooled"], kernel_shape=[4, 4], strides=[4, 4]),
            helper.make_node("Flatten", ["pooled"], ["flat"]),
            helper.make_node("MatMul", ["flat", "weight"], ["raw"]),
        ]
        output = "image_embedding"
    else:
        entry = helper.make_tensor_value_info("tokens", TensorProto.INT32, [batch, CONTEXT])
        nodes = [
            helper.make_node("Gather", ["weight", "tokens"], ["words"]),
            helper.make_node("ReduceSum", ["words", "axis"], ["raw"], keepdims=0),
        ]
        output = "text_embedding"
    nodes += [helper.make_node("ReduceL2", ["raw", "last"], ["norm"], keepdims=1), helper.make_node("Div", ["raw", "norm"], [output])]
    constants = [numpy_helper.from_array(weight, "weight")]
    constants += [numpy_helper.from_array(np.array([axis], np.int64), name) for name, axis in (("axis", 1), ("last", -1))]
    body = helper.make_graph(nodes, tower, [entry], [helper.make_tensor_value_info(output, TensorProto.FLOAT, [batch, DIM])], constants)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model


def reference(tower: str, weight: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    """The same in numpy: the checkpoint of this bundle."""
    if tower == "image":
        blocks = inputs.reshape(len(inputs), 3, SIZE // 4, 4, SIZE // 4, 4).mean(axis=(3, 5))
        raw = blocks.reshape(len(inputs), -1) @ weight
    else:
        raw = weight[inputs].sum(axis=1)
    return (raw / np.linalg.norm(raw, axis=1, keepdims=True)).astype(np.float32)


def picture(colour: str, seed: int = 0, size: tuple[int, int] = (24, 20)) -> Image.Image:
    """A noisy plain picture."""
    noise = np.random.default_rng(seed).normal(0, 25, (size[1], size[0], 3))
    return Image.fromarray(np.clip(np.array(COLOURS[colour]) + noise, 0, 255).astype(np.uint8))


def artefact(tower: str, precision: str, batch: str = "dynamic", p50_ms: float | None = None, **change: object) -> Artefact:
    suffix = "" if batch == "dynamic" else ".static"
    path = f"onnx/{tower}.{precision}{suffix}.onnx"
    parity = {"cosine_min": {"fp32": 1.0, "int8": 0.995}[precision], "cosine_p1": 1.0, "cosine_mean": 1.0}
    parity |= {"max_abs": 0.0, "rank_agreement": 1.0, "recall1_change": 0.0, "n": 6}
    latency = None if p50_ms is None else {"p50_ms": p50_ms}
    facts = {"target": "onnx", "path": path, "parity": parity, "latency": latency, "bytes": 1}
    return Artefact(**{"id": f"{tower}-onnx-{precision}{suffix}", "tower": tower, "precision": precision, "batch": batch, **facts, **change})  # type: ignore[arg-type]


def build(folder: Path, artefacts: list[Artefact] | None = None, **change: object) -> Manifest:
    """Write the bundle; int8 artefacts are the fp32 graph with rounded weights."""
    (folder / "onnx").mkdir(parents=True)
    build_clip_tokenizer(merges(), VOCAB, folder / "tokenizer.json")
    tokenizer = Tokenizer.open(folder / "tokenizer.json", CONTEXT)
    by_tower = dict(zip(("image", "text"), weights(tokenizer), strict=True))
    if artefacts is None:
        artefacts = [artefact("image", "fp32", p50_ms=0.2), artefact("text", "fp32", p50_ms=0.3), artefact("text", "int8", p50_ms=0.1)]
        artefacts.append(artefact("image", "int8", status="refused", path=None, bytes=None, reason="0.30 ms, fp32 takes 0.20 ms", parity=None, p50_ms=0.3))
    for entry in artefacts:
        if entry.path and entry.target == "onnx":
            weight = by_tower[entry.tower]
            if entry.precision == "int8":
                step = np.abs(weight).max() / 127
                weight = (np.round(weight / step) * step).astype(np.float32)
            onnx.save(graph(entry.tower, weight, "batch" if entry.batch == "dynamic" else int(entry.batch)), folder / entry.path)
    images = [picture(name, n) for n, name in enumerate([*COLOURS, "red", "blue"])]
    pixels, tokens = preprocess(images, IMAGE.preprocess_config()), tokenizer(GOLDEN_TEXTS)
    golden = write_golden(
        folder,
        images=images,
        texts=GOLDEN_TEXTS,
        pixels=pixels,
        tokens=tokens,
        image_embedding=reference("image", by_tower["image"], pixels),
        text_embedding=reference("text", by_tower["text"], tokens),
    )
    facts = {"name": "toy", "embed_dim": DIM, "image": IMAGE, "text": TEXT, "logit_scale": 20.0, "golden": golden}
    manifest = Manifest(**{**facts, "artefacts": tuple(artefacts), "licences": ("MIT",), "provenance": {"checkpoint_sha256": "0" * 64}, **change})  # type: ignore[arg-type]
    return write_manifest(folder, manifest)
