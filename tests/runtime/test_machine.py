"""What a machine finds out about a bundle: who is fastest here, who computes something else, which files were hashed."""

from __future__ import annotations

import json
import os
import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import runtime
import runtime.machine
from runtime.errors import BundleError
from runtime.manifest import read_manifest, write_manifest
from tests.runtime import toy


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("MOBILECLIP_MEASURE", "1")
    monkeypatch.setenv("MOBILECLIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def slow_down(bundle: Path, path: str) -> None:
    """Give a text graph work to do that changes nothing: a product of large matrices times zero."""
    model = onnx.load(bundle / path)
    size = 400
    matrix = numpy_helper.from_array(np.ones((size, size), np.float32), "matrix")
    zero = numpy_helper.from_array(np.zeros(1, np.float32), "zero")
    model.graph.initializer.extend([matrix, zero, numpy_helper.from_array(np.array([0, 1, 2], np.int64), "every")])
    (raw,) = [node for node in model.graph.node if "raw" in node.output]
    raw.output[0] = "fast"
    nodes = [
        helper.make_node("ReduceSum", ["fast", "last"], ["summed"], keepdims=1),
        helper.make_node("Unsqueeze", ["summed", "last"], ["column"]),
        helper.make_node("Mul", ["matrix", "column"], ["large"]),
        *(helper.make_node("MatMul", [f"large{n or ''}", "matrix"], [f"large{n + 1}"]) for n in range(4)),
        helper.make_node("ReduceSum", ["large4", "every"], ["much"], keepdims=0),
        helper.make_node("Mul", ["much", "zero"], ["nothing"]),
        helper.make_node("Add", ["fast", "nothing"], ["raw"]),
    ]
    place = list(model.graph.node).index(raw) + 1
    rest = list(model.graph.node)[place:]
    del model.graph.node[place:]
    model.graph.node.extend([*nodes, *rest])
    (bundle / path).write_bytes(model.SerializeToString())
    write_manifest(bundle, read_manifest(bundle, verify=False))


def test_the_machine_at_hand_decides_and_remembers(own_bundle: Path) -> None:
    """The manifest says int8 is the faster one; here it is not."""
    slow_down(own_bundle, "onnx/text.int8.onnx")
    clip = runtime.load(own_bundle, threads=1)
    assert clip.choice["text"].id == "text-onnx-int8"
    clip.encode_text("red")
    assert clip.choice["text"].id == "text-onnx-fp32"
    assert "on this machine" in clip.choice["text"].why
    again = runtime.load(own_bundle, threads=1)
    assert again.choice["text"].id == "text-onnx-fp32"
    assert again.choice["text"].why == clip.choice["text"].why
    assert runtime.load(own_bundle, threads=2).choice["text"].id == "text-onnx-int8"
    assert runtime.load(own_bundle, threads=1, prefer={"text": "int8"}).choice["text"].id == "text-onnx-int8"
    assert runtime.load(own_bundle, threads=1, measure=False).choice["text"].id == "text-onnx-int8"


def test_explain_tells_the_whole_story(own_bundle: Path) -> None:
    said = runtime.load(own_bundle, threads=1).explain()
    assert said.startswith("image: onnx fp32 (image-onnx-fp32): the only proven artefact that runs here")
    assert "  not image-onnx-int8: refused" in said
    assert "\ntext: onnx " in said


def test_what_computes_something_else_here_is_left_out_with_a_warning(own_bundle: Path) -> None:
    """Stands in for a driver that is wrong: the file is what the manifest says, its numbers are not."""
    model = onnx.load(own_bundle / "onnx/text.int8.onnx")
    (weight,) = [item for item in model.graph.initializer if item.name == "weight"]
    weight.CopyFrom(numpy_helper.from_array(np.random.default_rng(0).normal(size=(toy.VOCAB, toy.DIM)).astype(np.float32), "weight"))
    (own_bundle / "onnx/text.int8.onnx").write_bytes(model.SerializeToString())
    write_manifest(own_bundle, read_manifest(own_bundle, verify=False))
    clip = runtime.load(own_bundle, threads=1)
    assert clip.choice["text"].id == "text-onnx-int8"
    with pytest.warns(RuntimeWarning, match="text-onnx-int8 of the bundle 'toy' is not used here: its least cosine"):
        found = clip.encode_text("red")
    np.testing.assert_allclose(found, runtime.load(own_bundle, prefer="fp32", measure=False).encode_text("red"), atol=1e-6)
    assert "failed the golden check on this machine" in clip.choice["text"].passed_over["text-onnx-int8"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runtime.load(own_bundle, threads=1).encode_text("red")
    manifest = read_manifest(own_bundle)
    write_manifest(own_bundle, replace(manifest, artefacts=tuple(a for a in manifest.artefacts if a.id != "text-onnx-fp32")))
    (own_bundle / "onnx/text.fp32.onnx").unlink()
    write_manifest(own_bundle, read_manifest(own_bundle, verify=False))
    with pytest.warns(RuntimeWarning, match="not used here"), pytest.raises(BundleError, match="no text artefact that runs here .*golden check"):
        runtime.load(own_bundle, threads=1).encode_text("red")


def test_files_are_hashed_once(own_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    real = runtime.machine.verify_file
    monkeypatch.setattr(runtime.machine, "verify_file", lambda path, facts: (hashed.append(path.name), real(path, facts)))
    runtime.load(own_bundle)
    assert sorted(hashed) == ["image.fp32.onnx", "text.int8.onnx", "tokenizer.json"]
    runtime.load(own_bundle)
    assert len(hashed) == 3
    runtime.load(own_bundle, measure=False)
    assert len(hashed) == 6
    path = own_bundle / "onnx/text.int8.onnx"
    os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns + 1))
    runtime.load(own_bundle)
    assert hashed[6:] == ["text.int8.onnx"]


def test_a_change_is_found_although_the_file_was_trusted(own_bundle: Path) -> None:
    runtime.load(own_bundle)
    path = own_bundle / "onnx/text.int8.onnx"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match="was changed"):
        runtime.load(own_bundle)


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"schema": 9}', b'{"schema": 1, "files": {}, "towers": {"text, 1 threads, None": 3}}', b"[" * 100_000, b"\xff\xfe"])
def test_damaged_notes_count_as_none(own_bundle: Path, measured: Path, damage: bytes) -> None:
    runtime.load(own_bundle, threads=1).encode_text("red")
    (notes,) = (measured / "bundles").glob("*.json")
    notes.write_bytes(damage)
    clip = runtime.load(own_bundle, threads=1)
    clip.encode_text("red")
    assert "text, 1 threads, None" in json.loads(notes.read_text())["towers"]


def test_notes_of_another_machine_count_as_none(own_bundle: Path, measured: Path) -> None:
    runtime.load(own_bundle, threads=1).encode_text("red")
    (notes,) = (measured / "bundles").glob("*.json")
    found = json.loads(notes.read_text())
    found["towers"]["text, 1 threads, None"] |= {"machine": "another", "failed": {"text-onnx-int8": "x"}, "milliseconds": {"text-onnx-fp32": 1.0}}
    notes.write_text(json.dumps(found))
    assert runtime.load(own_bundle, threads=1).choice["text"].id == "text-onnx-int8"


def test_a_cache_that_cannot_be_written(own_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOBILECLIP_CACHE", str(tmp_path / "file"))
    assert runtime.load(own_bundle).encode_text("red").shape == (1, toy.DIM)


def test_old_notes_make_room(own_bundle: Path, measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.machine, "MOST_BUNDLES", 3)
    (measured / "bundles").mkdir(parents=True)
    for n in range(5):
        path = measured / "bundles" / f"{n}.json"
        path.write_text("{}")
        os.utime(path, (n, n))
    runtime.load(own_bundle)
    left = {path.stem for path in (measured / "bundles").glob("*.json")}
    assert len(left) == 3
    assert {"3", "4"} <= left


def test_threads_share_a_clip(own_bundle: Path) -> None:
    """All first uses at once: one session, the same numbers."""
    clip = runtime.load(own_bundle, threads=1, prefer="fp32")
    texts = [f"red {n}" for n in range(16)]
    alone = runtime.load(own_bundle, threads=1, prefer="fp32").encode_text(texts)
    found: dict[int, np.ndarray] = {}
    start = threading.Barrier(8)

    def work(n: int) -> None:
        start.wait()
        for _ in range(20):
            clip.queries.clear()
            found[n] = clip.encode_text(texts)
            clip.encode_image([toy.picture("red", n)] * 3)

    workers = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 8
    for rows in found.values():
        np.testing.assert_allclose(rows, alone, atol=1e-6)


def test_the_graphs_of_these_tests_are_sound(own_bundle: Path) -> None:
    slow_down(own_bundle, "onnx/text.int8.onnx")
    model = onnx.load(own_bundle / "onnx/text.int8.onnx")
    onnx.checker.check_model(model)
    assert model.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
