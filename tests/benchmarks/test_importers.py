"""Importers: LiteRT's own benchmark run here on a model made here; trtexec, benchmark_model, onnxruntime_perf_test and AI Hub on samples laid out as their
sources and documentation lay them out (no GPU, no phone and no account is at hand)."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.comparison import compare_results
from benchmarks.importers import lines_of_tool, main, read_ai_hub, read_litert, read_perf_test, read_trtexec
from benchmarks.results import ResultsError, read_results
from runtime.manifest import read_manifest


def trace(copies: float, compute: float = 1.5, n: int = 80) -> list[dict[str, float]]:
    rng = np.random.default_rng(0)
    rows = []
    for index in range(n):
        taken = compute * (1 + 0.02 * float(rng.random()))
        rows.append({
            "startEnqMs": index * 3.0, "endEnqMs": index * 3.0 + 0.1, "startH2dMs": index * 3.0, "endH2dMs": index * 3.0 + copies, "startComputeMs": index * 3.0 + copies,
            "endComputeMs": index * 3.0 + copies + taken, "startD2hMs": 0.0, "endD2hMs": 0.0, "h2dMs": copies, "computeMs": taken, "d2hMs": copies / 4,
            "latencyMs": taken + copies * 1.25,
        })  # fmt: skip
    return rows


TEN = "&&&& RUNNING TensorRT.trtexec [TensorRT v100300] # trtexec --onnx=image.onnx --exportTimes=times.json\n[I] === Inference Options ===\n"
ELEVEN = "&&&& RUNNING TensorRT.trtexec [TensorRT v110400] [b106] # trtexec --onnx=image.onnx --exportTimes=times.json\n"


def test_trtexec_10_and_11_are_told_apart() -> None:
    ten = read_trtexec(json.dumps(trace(0.2)), "t.json", TEN)
    eleven = read_trtexec(json.dumps(trace(0.0)), "t.json", ELEVEN)
    assert (ten.tool, eleven.tool) == ("trtexec 10.3, with copies", "trtexec 11.4, without copies")
    assert ten.figures["trtexec"] == {"version": "10.3", "transfers": True, "spin_wait": False, "cuda_graph": False}
    assert eleven.figures["trtexec"] == {"version": "11.4", "transfers": False, "spin_wait": True, "cuda_graph": True}
    assert ten.figures["compute_p50_ms"] == pytest.approx(eleven.figures["compute_p50_ms"])
    assert np.median(ten.nanoseconds) == pytest.approx(np.median(eleven.nanoseconds) + 0.25e6)
    undone = read_trtexec(json.dumps(trace(0.2)), "t.json", ELEVEN.rstrip() + " --includeDataTransfers --noSpinWait --noCudaGraph")
    assert undone.figures["trtexec"] == {"version": "11.4", "transfers": True, "spin_wait": False, "cuda_graph": False}
    eight = read_trtexec(json.dumps([{**row, "inMs": 0.1, "outMs": 0.1} for row in trace(0.0)]), "t.json", TEN.replace("100300", "8601"))
    assert eight.figures["trtexec"]["version"] == "8.6"
    with pytest.raises(ResultsError, match="does not tell its version"):
        read_trtexec(json.dumps(trace(0.2)), "t.json")
    assert read_trtexec(json.dumps(trace(0.2)), "t.json", version="10.3").tool == "trtexec 10.3, with copies"


def test_what_the_two_versions_measure_is_not_compared() -> None:
    lines = [lines_of_tool(read_trtexec(json.dumps(trace(copies)), "t.json", log), tower="image") for copies, log in ((0.2, TEN), (0.0, ELEVEN))]
    with pytest.raises(ResultsError, match="no measurement in common"):
        compare_results(*lines)
    (row,) = compare_results(lines[0], lines[0])
    assert row["figures"]["verdict"] == "no difference"


def test_onnxruntime_perf_test() -> None:
    rng = np.random.default_rng(1)
    times = 0.004 * (1 + 0.1 * rng.random(200))
    text = "".join(f"image,{value},123456789,97,{run}\n" for run, value in enumerate(times))
    text += "\nMin Latency is 0.004sec\nP50 Latency is 0.0042sec\n"
    found = read_perf_test(text, "perf.csv", "Session creation time cost: 0.25 s\nFirst inference time cost: 12 ms\n", "1.32")
    assert found.tool == "onnxruntime_perf_test 1.32"
    assert found.nanoseconds == [round(float(str(value)) * 1e9) for value in times]
    assert (found.memory, found.figures["processor_percent"]) == (123456789, 97)
    assert found.loads == {"load_warm": 250_000_000, "first_inference": 12_000_000}


def test_ai_hub_profile() -> None:
    times = [1430, 1410, 1455, 1402] * 25
    profile: dict[str, Any] = {
        "execution_summary": {
            "estimated_inference_time": 1402, "estimated_inference_peak_memory": 10_821_632, "first_load_time": 501_234, "warm_load_time": 301_000,
            "inference_memory_peak_range": [61_440, 10_821_632], "all_inference_times": times,
        },
        "execution_detail": [
            {"name": "conv", "type": "Conv2D", "compute_unit": "NPU", "execution_time": 900, "execution_cycles": 0},
            {"name": "gelu", "type": "Gelu", "compute_unit": "NPU", "execution_time": 400},
            {"name": "argmax", "type": "ArgMax", "compute_unit": "CPU", "execution_time": 100},
        ],
    }  # fmt: skip
    found = read_ai_hub(json.dumps(profile), "p.json")
    assert found.nanoseconds == [value * 1000 for value in times]
    assert found.loads == {"load_cold": 501_234_000, "load_warm": 301_000_000}
    assert found.figures["layers"] == {"NPU": 2, "CPU": 1}
    assert found.figures["placement"] == {"NPU": pytest.approx(1300 / 1400), "CPU": pytest.approx(100 / 1400)}
    del profile["execution_summary"]["all_inference_times"]
    kinds = [row["kind"] for row in lines_of_tool(read_ai_hub(json.dumps(profile), "p.json"), tower="image")]
    assert kinds[0] == "latency_summary"


BENCHMARK_MODEL = """INFO: STARTING!
INFO: Num threads: [2]
INFO: Replacing 57 out of 60 node(s) with delegate (TfLiteXNNPackDelegate) node, yielding 4 partitions for subgraph 0.
INFO: Running benchmark for at least 1 iterations and at least 0.5 seconds but terminate if exceeding 150 seconds.
INFO: count=32 first=18535 curr=14462 min=14211 max=18535 avg=14975.1 std=720
INFO: Running benchmark for at least 50 iterations and at least 1 seconds but terminate if exceeding 150 seconds.
INFO: count=69 first=14575 curr=14575 min=14301 max=15920 avg=14575.2 std=210 p5=14320 median=14550 p95=15010
INFO: Inference timings in us: Init: 5685, First inference: 18535, Warmup (avg): 14975.1, Inference (avg): 14575.2
INFO: Note: as the benchmark tool itself affects memory footprint, the following is only APPROXIMATE to the actual memory footprint of the model at runtime.
INFO: Memory footprint delta from the start of the tool (MB): init=4.1 overall=45.2
"""


def test_benchmark_model_of_android() -> None:
    found = read_litert(BENCHMARK_MODEL, "b.txt")
    assert found.summary == {"minimum": 14_301_000, "maximum": 15_920_000, "mean": 14_575_200, "std": 210_000, "p50": 14_550_000, "p5": 14_320_000, "p95": 15_010_000, "n": 69}
    assert found.loads == {"load_warm": 5_685_000, "first_inference": 18_535_000}
    assert found.threads == 2
    assert found.figures["placement"] == {"TfLiteXNNPackDelegate": 0.95}
    assert found.memory == int(45.2 * 2**20)


@pytest.mark.slow
def test_litert_s_own_tool_run_here(tmp_path: Path) -> None:
    """A convolution made with LiteRT's converter, timed by LiteRT's benchmark, imported."""
    if not all(importlib.util.find_spec(name) for name in ("litert_torch", "ai_edge_litert")):
        pytest.skip("the extra litert is not installed")
    code = f"""
import torch, litert_torch
module = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()).eval()
litert_torch.convert(module, (torch.zeros(1, 3, 32, 32),)).export({str(tmp_path / "m.tflite")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-600:]
    tool = [sys.executable, "-m", "ai_edge_litert.tools.benchmark_litert_model", "--model", str(tmp_path / "m.tflite"), "--num_runs", "30", "--num_threads", "1"]
    subprocess.run([*tool, "--result_json", str(tmp_path / "r.json")], capture_output=True, check=True, timeout=120)
    out = tmp_path / "results.jsonl"
    assert main(["litert", str(tmp_path / "r.json"), "--tower", "image", "--label", "this machine", "--out", str(out)]) == 0
    rows = read_results([out])
    assert [row["kind"] for row in rows][0] == "latency_summary"
    assert 0 < rows[0]["summary"]["minimum"] <= rows[0]["summary"]["p50"] <= rows[0]["summary"]["maximum"]
    assert rows[0]["summary"]["n"] == 30
    assert rows[0]["settings"]["threads"] == 1
    assert {row["phase"] for row in rows[1:]} >= {"load_warm"}


def test_identity_and_accuracy_travel_from_the_bundle(toy_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "times.json").write_text(json.dumps(trace(0.2)), encoding="utf-8")
    (tmp_path / "log.txt").write_text(TEN, encoding="utf-8")
    out = tmp_path / "results.jsonl"
    command = ["trtexec", str(tmp_path / "times.json"), "--log", str(tmp_path / "log.txt"), "--tower", "image", "--bundle", str(toy_bundle), "--artefact", "image-onnx-fp32"]
    assert main([*command, "--label", "Orin Nano, 15 W", "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 80
    (row,) = read_results([out])
    manifest = read_manifest(toy_bundle)
    assert row["bundle"]["name"] == manifest.name
    assert row["figures"]["accuracy"]["cosine_min"] == manifest.artefact("image-onnx-fp32").parity["cosine_min"]  # type: ignore[index]
    assert row["device"] == {"kind": "imported", "label": "Orin Nano, 15 W"}
    assert row["summary"]["p90_bound"] is not None


@pytest.mark.parametrize(
    ("format", "text", "match"),
    [
        ("trtexec", json.dumps(trace(0.2))[:-200], "is not JSON"),
        ("trtexec", "[]", "no trace of trtexec"),
        ("trtexec", json.dumps([{**trace(0.2)[0], "computeMs": -3, "latencyMs": -3}]), "clock may have jumped"),
        ("litert", "nothing here", "no output of LiteRT"),
        ("litert", '{"latency": 3}', "no result of litert-benchmark"),
        ("perf-test", "model,nan,1,1,0\n", "clock may have jumped"),
        ("perf-test", "Min Latency is 3sec", "no result file of onnxruntime_perf_test"),
        ("ai-hub", '{"execution_detail": []}', "no profile of Qualcomm AI Hub"),
    ],
)
def test_half_files_wrong_files_and_clocks_that_jump_are_one_sentence(format: str, text: str, match: str, tmp_path: Path) -> None:
    (tmp_path / "given").write_text(text, encoding="utf-8")
    out = tmp_path / "results.jsonl"
    with pytest.raises(ResultsError, match=match) as caught:
        main([format, str(tmp_path / "given"), "--tower", "image", "--tool-version", "10.3", "--out", str(out)])
    assert "\n" not in str(caught.value)
    assert not out.exists()
