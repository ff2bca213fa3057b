"""`mclip bench` on a toy bundle: every phase, resume, comparison, refusals."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from benchmarks import bench_steps
from benchmarks import latency as module
from benchmarks.child import high_water_mark
from benchmarks.flops import gflop
from benchmarks.inputs import draw_inputs
from benchmarks.latency import BenchConfig, bench, main
from benchmarks.modes import ModePlan
from benchmarks.phases import Subject, run_child
from benchmarks.results import read_results
from runtime.errors import BundleError, DeviceError, ParityError
from runtime.manifest import read_manifest, write_manifest
from runtime.preprocess import load_image
from tests.runtime import toy


@pytest.fixture(scope="module")
def measured(toy_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    out = tmp_path_factory.mktemp("results") / "results.jsonl"
    return out, bench(BenchConfig(bundle=toy_bundle, out=out, seconds=0.05))


@pytest.fixture
def quick_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that are not about the measuring processes: what one would print, at once."""
    answers = {
        "cold": {"ns": 5, "import_ns": 2, "load_ns": 2, "first_ns": 1, "artefact": "x"},
        "memory": {"bytes": 10**8},
        "load": {"file_read": 5, "load_cold": 9, "load_warm": 7, "first_inference": 8, "file_bytes": 10, "cold": True},
        "operations": {"runs": 20, "nodes": 1, "operations": [], "slowest_nodes": [], "placement": {"CPUExecutionProvider": 1.0}, "outside_share": 0.1},
        "peak": {"gemm_gflops": 50.0, "copy_gbytes": 9.0},
    }
    monkeypatch.setattr(bench_steps, "run_child", lambda arguments, inputs=None: dict(answers[arguments[0].split("-")[0]]))


def test_every_phase_of_every_proven_artefact_is_there(measured: tuple[Path, dict[str, object]], toy_bundle: Path) -> None:
    out, summary = measured
    rows = read_results([out])
    timed = {(row["phase"], row["artefact"]) for row in rows if row["kind"] == "latency"}
    assert timed == {
        ("decode", None),
        ("preprocess", None),
        ("tokenise", None),
        ("normalise", None),
        ("search", None),
        ("image_tower", "image-onnx-fp32"),
        ("text_tower", "text-onnx-fp32"),
        ("text_tower", "text-onnx-int8"),
        ("end_to_end_image", "image-onnx-fp32"),
        ("end_to_end_text", "text-onnx-fp32"),
        ("end_to_end_text", "text-onnx-int8"),
    }
    manifest = toy_bundle / "manifest.json"
    assert {row["bundle"]["sha256"] for row in rows} == {hashlib.sha256(manifest.read_bytes()).hexdigest()}
    for row in rows:
        if row["kind"] == "latency":
            assert len(row["samples"]) == row["summary"]["n"] >= 50
            assert row["summary"]["p50"] == pytest.approx(np.median(row["samples"]))
            assert row["environment"]["threads"] == 1
    fp32, int8 = (next(row for row in rows if row["phase"] == "text_tower" and row["artefact"] == f"text-onnx-{p}") for p in ("fp32", "int8"))
    assert len(fp32["samples"]) == len(int8["samples"])  # interleaved: rounds in common
    assert fp32["figures"]["golden_cosine_min"] > 0.999
    assert summary["latency_ms"]["text_tower.text-onnx-int8"]["n"] == len(int8["samples"])  # type: ignore[index]


def test_cold_start_memory_and_peak(measured: tuple[Path, dict[str, object]]) -> None:
    rows = read_results([measured[0]])
    for tower in ("image", "text"):
        start = next(row for row in rows if row["phase"] == f"cold_start_{tower}")
        assert start["figures"]["torch_imported"] is False
        assert len(start["samples"]) == 5
        parts = sum(start["figures"][name] for name in ("import_ns", "load_ns", "first_ns"))
        assert parts == pytest.approx(start["summary"]["p50"], rel=0.5)
    memory = {(row["phase"], row["artefact"]): row["samples"][0] for row in rows if row["kind"] == "memory"}
    assert set(memory) == {("preprocess", None), ("tokenise", None), ("image_tower", "image-onnx-fp32"), ("text_tower", "text-onnx-fp32"), ("text_tower", "text-onnx-int8")}
    assert all(15e6 < size < 400e6 for size in memory.values())
    peak = next(row for row in rows if row["kind"] == "peak")
    assert peak["figures"]["gemm_gflops"] > 0.1


def test_artefacts_are_compared_with_fp32(measured: tuple[Path, dict[str, object]]) -> None:
    rows = [row for row in read_results([measured[0]]) if row["kind"] == "comparison"]
    assert {(row["phase"], row["artefact"]) for row in rows} == {("text_tower", "text-onnx-int8"), ("end_to_end_text", "text-onnx-int8")}
    for row in rows:
        assert row["figures"]["reference"] == "text-onnx-fp32"
        assert row["figures"]["low"] <= row["figures"]["value"] <= row["figures"]["high"]


def test_a_rerun_measures_nothing_and_a_half_done_one_goes_on(measured: tuple[Path, dict[str, object]], toy_bundle: Path, tmp_path: Path) -> None:
    out = Path(shutil.copy(measured[0], tmp_path / "results.jsonl"))
    again = bench(BenchConfig(bundle=toy_bundle, out=out, seconds=0.05))
    assert again["lines_measured"] == 0
    assert again["latency_ms"] == measured[1]["latency_ms"]
    assert out.read_bytes() == measured[0].read_bytes()
    kept = [row for row in out.read_text(encoding="utf-8").splitlines() if json.loads(row)["phase"] != "tokenise"]
    out.write_text("\n".join(kept) + "\n", encoding="utf-8")
    resumed = bench(BenchConfig(bundle=toy_bundle, out=out, seconds=0.05))
    assert resumed["lines_measured"] == 2  # tokenise: its latency and its memory
    assert [row["phase"] for row in read_results([out])[-2:]] == ["tokenise", "tokenise"]


@pytest.mark.usefixtures("quick_children")
def test_interrupted_at_any_step_the_file_stays_whole(toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "results.jsonl"
    append, calls = module.append_results, []

    def interrupted(path: Path, rows: list[dict[str, object]]) -> None:
        calls.append(rows)
        if len(calls) == 3:
            raise KeyboardInterrupt
        append(path, rows)

    monkeypatch.setattr(module, "append_results", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench(BenchConfig(bundle=toy_bundle, out=out, seconds=0.02))
    assert [row["phase"] for row in read_results([out])] == ["machine", "decode"]


@pytest.mark.usefixtures("quick_children")
def test_another_bundle_in_the_same_file_is_measured(measured: tuple[Path, dict[str, object]], tmp_path: Path) -> None:
    toy.build(tmp_path / "other", name="other")
    out = Path(shutil.copy(measured[0], tmp_path / "results.jsonl"))
    summary = bench(BenchConfig(bundle=tmp_path / "other", out=out, seconds=0.02))
    assert summary["steps_skipped"] == 0
    assert {row["bundle"]["name"] for row in read_results([out])} == {"toy", "other"}


@pytest.mark.slow
def test_two_bundles_are_compared_phase_by_phase(toy_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy.build(tmp_path / "b", name="candidate")
    out = tmp_path / "compare.jsonl"
    assert main([str(toy_bundle), str(tmp_path / "b"), "--compare", "--out", str(out), "--seconds", "0.02", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert [row["phase"] for row in summary["comparisons"]] == ["preprocess", "tokenise", "image_tower", "text_tower", "end_to_end_image", "end_to_end_text"]
    assert {(row["candidate"], row["reference"]) for row in summary["comparisons"]} == {("candidate", "toy")}
    row = read_results([out])[0]
    assert len(row["figures"]["reference_samples"]) == len(row["figures"]["candidate_samples"]) == row["figures"]["n"]
    assert main([str(toy_bundle), str(tmp_path / "b"), "--compare", "--out", str(out), "--seconds", "0.02"]) == 0
    printed = capsys.readouterr().out
    assert "0 lines measured, 6 steps were there already" in printed


@pytest.mark.usefixtures("quick_children")
def test_what_cannot_run_here_is_said(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    toy.build(bundle)
    manifest = read_manifest(bundle)
    (bundle / "coreml").mkdir()
    (bundle / "coreml" / "image.mlpackage").write_bytes(b"package")
    extra = dataclasses.replace(manifest.artefact("image-onnx-fp32"), id="image-coreml-fp16", target="coreml", precision="fp16", path="coreml/image.mlpackage", bytes=7)
    write_manifest(bundle, dataclasses.replace(manifest, artefacts=(*manifest.artefacts, extra)))
    summary = bench(BenchConfig(bundle=bundle, out=tmp_path / "r.jsonl", seconds=0.02))
    assert "Apple devices only" in summary["not_measured"]["latency.image-coreml-fp16"]


@pytest.mark.usefixtures("quick_children")
def test_a_bundle_that_answers_wrongly_is_not_timed(tmp_path: Path) -> None:
    bundle, other = tmp_path / "bundle", tmp_path / "other"
    toy.build(bundle)
    tokenizer = Subject(bundle, 1, draw_inputs(1)).clip.tokenizer
    other.mkdir()
    onnx.save(toy.graph("text", toy.weights(tokenizer, seed=9)[1], "batch"), bundle / "onnx" / "text.fp32.onnx")
    write_manifest(bundle, read_manifest(bundle, verify=False))  # hashes agree; only the golden vectors know
    with pytest.raises(ParityError, match="text-onnx-fp32.*not timed"):
        bench(BenchConfig(bundle=bundle, out=tmp_path / "r.jsonl", seconds=0.02))


def test_bad_input(toy_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        main([str(tmp_path / "nowhere"), "--out", str(tmp_path / "r.jsonl")])
    for arguments in ([str(toy_bundle), str(toy_bundle)], [str(toy_bundle), "--compare"], []):
        with pytest.raises(SystemExit) as error:
            main(arguments)
        assert error.value.code == 2
    with pytest.raises(DeviceError, match="--threads"):
        BenchConfig(bundle=toy_bundle, threads=0)
    with pytest.raises(DeviceError, match="--seconds"):
        BenchConfig(bundle=toy_bundle, seconds=float("nan"))
    with pytest.raises(DeviceError, match="exit code"):
        run_child(["memory-image_tower", str(tmp_path / "nowhere")])


def test_torch_below_the_runtime_is_refused(toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("", encoding="utf-8")
    (tmp_path / "sitecustomize.py").write_text("import torch\n", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(DeviceError, match="torch was imported"):
        run_child(["cold-text", str(toy_bundle)])


def test_memory_is_that_of_the_child_alone() -> None:
    """ru_maxrss would report the parent's peak when the parent is larger; VmHWM does not."""
    ballast = np.ones(200 * 2**20, np.uint8)
    code = "from benchmarks.child import high_water_mark; print(high_water_mark())"
    small = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    mine = high_water_mark()
    assert mine is not None
    assert small < 60e6 < len(ballast) < mine


def test_operations_are_counted(tmp_path: Path) -> None:
    weights = [numpy_helper.from_array(np.ones((8, 3, 3, 3), np.float32), "w"), numpy_helper.from_array(np.ones((8 * 4 * 4, 5), np.float32), "m")]
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Flatten", ["c"], ["f"]),
        helper.make_node("MatMul", ["f", "m"], ["y"]),
    ]
    entry, end = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 8, 8]), helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 5])
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [entry], [end], weights), opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "g.onnx")
    assert gflop(tmp_path / "g.onnx") == pytest.approx(2 * (8 * 4 * 4 * 27 + 128 * 5) / 1e9)
    (tmp_path / "bad.onnx").write_bytes(b"no graph")
    assert gflop(tmp_path / "bad.onnx") is None


def test_inputs_are_the_same_each_time() -> None:
    first, second = draw_inputs(2), draw_inputs(2)
    assert first == second
    assert first.jpegs[0] != first.jpegs[1]
    assert load_image(first.jpegs[0]).size == (640, 480)
    assert 20_000 < len(first.jpegs[0]) < 200_000  # as much to decode as in a photograph


def test_loading_and_operations_are_measured(measured: tuple[Path, dict[str, object]], toy_bundle: Path) -> None:
    rows = read_results([measured[0]])
    chosen = {choice.id for choice in Subject(toy_bundle, 1, draw_inputs(1)).clip.choice.values()}
    for artefact in chosen:
        loads = {row["phase"]: row for row in rows if row["artefact"] == artefact and row["phase"] in ("file_read", "load_cold", "load_warm", "first_inference")}
        assert len(loads) == 4
        for phase, row in loads.items():
            assert row["kind"] == "load" or (phase == "load_cold" and "cache" in row["figures"]["reason"])
        assert loads["load_warm"]["summary"]["p50"] > loads["file_read"]["summary"]["p50"] > 0
        assert len(loads["load_warm"]["samples"]) == 5
    profiled = {row["artefact"]: row["figures"] for row in rows if row["kind"] == "profile"}
    assert set(profiled) == chosen
    for figures in profiled.values():
        assert figures["runs"] == 20
        assert figures["placement"] == {"CPUExecutionProvider": pytest.approx(1.0)}
        assert sum(row["share"] for row in figures["operations"]) == pytest.approx(1.0)
    assert {"AveragePool", "MatMul"} & {row["op"] for row in profiled["image-onnx-fp32"]["operations"]}


def test_accuracy_and_processor_time_travel_with_each_row(measured: tuple[Path, dict[str, object]], toy_bundle: Path) -> None:
    manifest = read_manifest(toy_bundle)
    for row in read_results([measured[0]]):
        if row["kind"] != "latency":
            continue
        assert row["figures"]["cpu_ns"] > 0
        assert row["figures"]["first_ns"] > 0
        assert 0 < row["summary"]["independent"] <= row["summary"]["n"]
        if row["artefact"]:
            parity = manifest.artefact(row["artefact"]).parity
            assert parity is not None
            assert row["figures"]["accuracy"]["cosine_min"] == parity["cosine_min"]


def test_peak_memory_is_that_of_a_process_that_ran_only_the_phase(tmp_path: Path) -> None:
    """A tower with 60 MB of weights: what the step reports, and what a process written here by hand sees of itself."""
    from benchmarks.bench_steps import Bench, _memory

    bundle = tmp_path / "bundle"
    toy.build(bundle)
    model = onnx.load(bundle / "onnx" / "image.fp32.onnx")
    ballast = numpy_helper.from_array(np.random.default_rng(0).random((12, 1_250_000), np.float32), "ballast")
    model.graph.initializer.append(ballast)
    final = model.graph.node[-1].output[0]
    model.graph.node[-1].output[0] = "before"
    model.graph.node.append(helper.make_node("MatMul", ["before", "ballast"], ["wide"]))
    model.graph.node.append(helper.make_node("ReduceMin", ["wide"], ["least"], keepdims=1))
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.float32), "nothing"))
    model.graph.node.append(helper.make_node("Mul", ["least", "nothing"], ["zero"]))
    model.graph.node.append(helper.make_node("Add", ["before", "zero"], [final]))
    onnx.save(model, bundle / "onnx" / "image.fp32.onnx")
    write_manifest(bundle, read_manifest(bundle, verify=False))
    subject = Subject(bundle, 1, draw_inputs(1))
    (row,) = _memory(Bench(BenchConfig(bundle=bundle), subject, {}), "image_tower", "image-onnx-fp32")
    code = f"""
import numpy as np, runtime
from pathlib import Path
from runtime.encoder import open_artefact
manifest = runtime.read_manifest(Path({str(bundle)!r}), verify=False)
tower = open_artefact(Path({str(bundle)!r}), manifest, manifest.artefact("image-onnx-fp32"), 1)
for _ in range(10):
    tower.run(np.zeros((1, 3, 16, 16), np.float32))
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024)
"""
    alone = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert alone > 100e6  # the weights, read and packed
    assert row["samples"][0] == pytest.approx(alone, rel=0.03)
    assert 0 < row["figures"]["resident_bytes"] <= row["samples"][0]


@pytest.mark.usefixtures("quick_children")
def test_modes_have_lines_of_their_own_and_are_not_measured_twice(toy_bundle: Path, tmp_path: Path) -> None:
    config = BenchConfig(
        bundle=toy_bundle, out=tmp_path / "r.jsonl", seconds=0.02, modes=("single", "offline", "burst", "sustained", "duty"), batch=4,
        mode_plan=ModePlan(rest=0.01, sustained=0.3, period=0.004, queries=64),
    )  # fmt: skip
    summary = bench(config)
    rows = {(row["settings"].get("mode"), row["phase"]): row for row in read_results([config.out]) if row["kind"] == "latency"}
    for tower in ("image_tower", "text_tower"):
        offline, burst, sustained, duty = (rows[mode, tower] for mode in ("offline", "burst", "sustained", "duty"))
        assert offline["settings"]["batch"] == 4
        assert offline["figures"]["per_second"] == pytest.approx(4e9 / offline["summary"]["p50"])
        assert len(burst["samples"]) == 50
        assert burst["figures"]["first_ns"] == burst["samples"][0]
        assert sustained["figures"]["seconds"] >= 0.3
        assert sustained["figures"]["energy"]["joules"] is not None or sustained["figures"]["energy"]["reason"]
        assert len(duty["samples"]) == 64
        assert duty["settings"]["mode"] == "duty"
    assert any("(duty)" in name for name in summary["latency_ms"])
    assert bench(config)["lines_measured"] == 0
    with pytest.raises(DeviceError, match="--modes"):
        BenchConfig(bundle=toy_bundle, modes=("fast",))


def test_the_gate_ends_with_its_exit_code(toy_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The candidate's image tower does forty times the work: the gate fails on it, and says on what."""
    slow = tmp_path / "slow"
    toy.build(slow, name="slow")
    model = onnx.load(slow / "onnx" / "image.fp32.onnx")
    final = model.graph.node[-1].output[0]
    model.graph.node[-1].output[0] = "before"
    wide = numpy_helper.from_array(np.zeros((12, 400_000), np.float32), "wide")
    model.graph.initializer.extend([wide])
    model.graph.node.extend([
        helper.make_node("MatMul", ["before", "wide"], ["product"]),
        helper.make_node("ReduceMax", ["product"], ["zero"], keepdims=1),
        helper.make_node("Add", ["before", "zero"], [final]),
    ])  # fmt: skip
    onnx.save(model, slow / "onnx" / "image.fp32.onnx")
    write_manifest(slow, read_manifest(slow, verify=False))
    common = ["--compare", "--seconds", "0.1", "--json", "--gate", "1.5", "--phases", "image_tower"]
    assert main([str(toy_bundle), str(slow), "--out", str(tmp_path / "a.jsonl"), *common]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["gate"]["verdict"] == "fail"
    assert "image tower" in found["gate"]["sentence"]
    assert main([str(slow), str(toy_bundle), "--out", str(tmp_path / "b.jsonl"), *common]) == 0
    with pytest.raises(SystemExit):
        main([str(toy_bundle), "--gate", "1.05"])


def test_numpy_s_own_products_keep_to_the_threads() -> None:
    """In a process of its own: one thread's worth of processor time passes, not all cores'."""
    code = """
import time, numpy as np
from benchmarks.phases import hold_blas
held = hold_blas(1)
a = np.ones((900, 900), np.float32)
for _ in range(3): a @ a
wall, used = time.perf_counter(), time.process_time()
while time.perf_counter() - wall < 0.5: a @ a
print(held, (time.process_time() - used) / (time.perf_counter() - wall))
"""
    held, cores = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert held == "False" or float(cores) < 1.15
