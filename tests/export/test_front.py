"""The front of compression: every arm measured, what beats what, and what the report makes of it."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest

from benchmarks.report import main as report_main
from export.compress import CompressConfig, compress
from export.draft import Job
from export.front import Arm, arms_of, measure_front
from export.int8_recipe import Int8Recipe, make_int8
from export.quality import Limits
from export.search import Search
from export.to_onnx import OnnxEncoder, serialize
from export.to_tensorrt import audit_types, build_ahead, typed_onnx
from tests.export.test_search import PAIRS, fast, many_pairs, short_ladder, taught_checkpoint  # noqa: F401


def arm(name: str, embeddings: np.ndarray, size: int) -> Arm:
    return Arm(name=name, runtime="onnx", run=lambda rows: embeddings[: len(rows)], bytes=size)


def test_what_is_worse_everywhere_is_not_on_the_front(pocket, samples, reference):
    rng = np.random.default_rng(0)

    def noisy(exact: np.ndarray, size: float) -> np.ndarray:
        found = exact + size * rng.normal(size=exact.shape).astype(np.float32)
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    arms = {
        tower: [arm("float32", reference.of(tower), 100), arm("small", noisy(reference.of(tower), 0.02), 25), arm("small and worse", noisy(reference.of(tower), 0.2), 30)]
        for tower in ("image", "text")
    }
    found = measure_front(arms, samples, reference)
    json.dumps(found)
    own = {point["name"]: point for point in found["points"] if point["tower"] == "image"}
    assert own["float32"]["front"]
    assert own["float32"]["latency_ratio"] == 1.0
    assert own["small"]["front"]
    assert own["small"]["bytes_ratio"] == 0.25
    assert own["small"]["overlap10"] > own["small and worse"]["overlap10"]
    joint = [point for point in found["points"] if point["tower"] == "joint"]
    assert len(joint) == 9
    both = next(point for point in joint if point["image"][0] == point["text"][0] == "small")
    assert both["bytes_ratio"] == 0.25
    assert both["overlap10"] <= min(own["small"]["overlap10"], 1.0) + 0.05
    assert next(point for point in joint if point["image"][0] == point["text"][0] == "float32")["recall1_loss"] == 0


def test_arms_hold_what_a_user_would_do_in_one_call(pocket, samples, tmp_path):
    pytest.importorskip("onnxscript")
    job = Job(model=pocket, tower="text", calibration=samples, folder=tmp_path)
    searched = {"searched, 0 layers float": serialize(make_int8(job.onnx, job.rows, Int8Recipe(form="dynamic")))}
    arms = arms_of("text", job.onnx, job.rows[:8], job.onnx_half, searched, tmp_path)
    names = [(one.name, one.runtime) for one in arms]
    assert names[0] == ("float32", "onnx")
    assert {("float16", "onnx"), ("one call, dynamic", "onnx"), ("4-bit weights", "onnx"), ("searched, 0 layers float", "onnx")} <= set(names)
    sizes = {one.name: one.bytes for one in arms if one.runtime == "onnx"}
    assert sizes["4-bit weights"] < sizes["one call, dynamic"] < sizes["float16"] < sizes["float32"]
    exact = arms[0].run(job.rows[:4])
    assert all(np.isfinite(one.run(job.rows[:4])).all() and one.run(job.rows[:4]).shape == exact.shape for one in arms)


@pytest.mark.slow
def test_the_command_and_the_report(taught_checkpoint, many_pairs, short_ladder, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(Search, "_timed", fast)
    monkeypatch.setattr("export.search_towers.limits_of", lambda config: Limits(recall1_loss=0.5, centred_p1=0.2, overlap10=0.2))
    config = CompressConfig(checkpoint=taught_checkpoint, out=tmp_path / "small", calibrate=many_pairs, max_recall_loss=2.0, judge=64)
    compress(config)
    assert not (config.out / "front.json").exists()
    compress(dataclasses.replace(config, front=True))  # the same settings: the front is added
    found = json.loads((config.out / "front.json").read_text())
    assert found["n"] == 64 < PAIRS
    assert {point["tower"] for point in found["points"]} == {"image", "text", "joint"}
    receipt = json.loads((config.out / "receipt.json").read_text())
    assert "front.json" in receipt["files"]
    assert report_main(["--front", str(config.out), "-o", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "What compression costs" in page
    assert page.count("<svg") == 3
    assert re.search(r"one call, static, onnx", page)
    capsys.readouterr()


@pytest.mark.parametrize("recipe", [Int8Recipe(form="static", ranges="mse", corrected=True), Int8Recipe(form="dynamic", alpha=0.5)])
def test_tensorrt_gets_the_same_decisions_in_its_own_form(recipe, pocket, samples, tmp_path):
    tower = "image" if recipe.form == "static" else "text"
    job = Job(model=pocket, tower=tower, calibration=samples.head(12), folder=tmp_path, recipe=recipe)
    model = typed_onnx(job, "int8")
    audit_types(model)
    kinds = {node.op_type for node in model.graph.node}
    assert "QuantizeLinear" in kinds
    assert not kinds & {"MatMulInteger", "MatMulNBits", "Attention"}
    build_ahead(model)
    exact = OnnxEncoder(serialize(job.onnx))(job.rows)
    assert (OnnxEncoder(serialize(model))(job.rows) * exact).sum(1).min() > 0.9


def test_openvino_runs_the_graph_that_was_found(pocket, samples, tmp_path):
    pytest.importorskip("openvino")
    from export.to_openvino import drafts

    recipe = Int8Recipe(form="static", ranges="mse", corrected=True)
    job = Job(model=pocket, tower="image", calibration=samples.head(12), folder=tmp_path, recipe=recipe)
    (draft,) = drafts(job, ("int8",))
    assert draft.run is not None
    own = OnnxEncoder(serialize(job.onnx_int8))(samples.pixels)
    np.testing.assert_allclose(draft.run(samples.pixels), own, atol=0.02)
    assert isinstance(job.onnx_int8, onnx.ModelProto)
    assert Path(draft.path).name == "image.int8"
