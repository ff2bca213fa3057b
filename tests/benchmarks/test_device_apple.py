"""Apple's devices up to their boundary: the folders are written, the Swift and the shell script parse, what would come back is imported."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.device_apple import IosDevice, import_ios, write_ios
from benchmarks.device_plan import write_plan
from benchmarks.devices import DeviceSettings, measure_on, open_device
from benchmarks.results import ResultsError, append_results
from runtime.errors import DeviceError
from runtime.manifest import read_manifest, write_manifest
from tests.runtime import toy


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """The toy bundle with Core ML packages (their content does not matter here)."""
    folder = tmp_path / "bundle"
    toy.build(folder)
    manifest = read_manifest(folder)
    extra = []
    for tower in ("image", "text"):
        place = folder / "coreml" / f"{tower}.mlpackage"
        place.mkdir(parents=True)
        (place / "Manifest.json").write_text("{}", encoding="utf-8")
        extra.append(dataclasses.replace(manifest.artefact(f"{tower}-onnx-fp32"), id=f"{tower}-coreml-fp16", target="coreml", batch="1", path=f"coreml/{tower}.mlpackage"))
    write_manifest(folder, dataclasses.replace(manifest, artefacts=(*manifest.artefacts, *extra)))
    return folder


def test_a_plan_carries_core_ml_and_leaves_it_out_where_there_is_no_mac(bundle: Path, tmp_path: Path) -> None:
    plan = write_plan(bundle, tmp_path / "plan", DeviceSettings(seconds=0.02))
    steps = {step["artefact"]: step for step in plan["steps"]}
    assert steps["image-coreml-fp16"]["input"] == "image"
    done = subprocess.run([sys.executable, str(tmp_path / "plan" / "measure.py")], capture_output=True, text=True, env={"PATH": os.environ["PATH"]}, timeout=100, check=False)
    if sys.platform != "darwin":
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("Core ML runs on Macs only") == 2
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'plan')!r}); import measure; print(measure.digest({str(tmp_path / 'plan' / steps['image-coreml-fp16']['file'])!r}))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert found == steps["image-coreml-fp16"]["sha256"]  # the script hashes packages as the writer does


@pytest.mark.skipif(sys.platform == "darwin", reason="this is a Mac")
def test_mac_from_elsewhere_is_one_sentence() -> None:
    with pytest.raises(DeviceError, match="carry a folder to one: --device plan:FOLDER"):
        open_device("mac", DeviceSettings())


def test_the_app_and_its_script_parse(bundle: Path, tmp_path: Path) -> None:
    write_ios(bundle, tmp_path / "ios", DeviceSettings(seconds=2))
    assert subprocess.run(["sh", "-n", str(tmp_path / "ios" / "ios.sh")], check=False).returncode == 0
    assert subprocess.run(["sh", str(tmp_path / "ios" / "ios.sh")], capture_output=True, check=False).returncode == 2
    tree_sitter, tree_sitter_swift = pytest.importorskip("tree_sitter"), pytest.importorskip("tree_sitter_swift")
    parser = tree_sitter.Parser(tree_sitter.Language(tree_sitter_swift.language()))
    root = parser.parse((tmp_path / "ios" / "Benchmark.swift").read_bytes()).root_node
    assert not root.has_error
    plan = json.loads((tmp_path / "ios" / "plan.json").read_text(encoding="utf-8"))
    assert {step["artefact"] for step in plan["steps"]} == {"image-coreml-fp16", "text-coreml-fp16"}
    inputs = json.loads((tmp_path / "ios" / "inputs-image.json").read_text(encoding="utf-8"))
    assert len(inputs["rows"][0]) == inputs["shape"][1] * inputs["shape"][2] * inputs["shape"][3]


def test_what_the_app_writes_is_imported(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "ios"
    write_ios(bundle, folder, DeviceSettings())
    row = {
        "artefact": "image-coreml-fp16", "samples": list(range(1_500_000, 1_500_100)), "cosine_min": 0.9997, "compile_ns": 90_000_000, "load_ns": 30_000_000,
        "thermal_before": "nominal", "thermal_after": "fair", "peak_bytes": 50_000_000, "system": "18.2",
    }  # fmt: skip
    failed = {"artefact": "text-coreml-fp16", "error": "wrong answers here (cosine 0.5)"}
    (folder / "ios.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(failed) + "\n" + json.dumps(row)[:80], encoding="utf-8")
    rows = import_ios(folder, bundle)
    assert [(one["kind"], one["phase"]) for one in rows] == [("latency", "image_tower"), ("load", "load_cold"), ("load", "load_warm"), ("memory", "image_tower")]
    assert rows[0]["figures"]["after"] == {"thermal_status": "fair"}
    assert rows[1]["samples"] == [120_000_000]
    append_results(tmp_path / "r.jsonl", rows)
    (folder / "ios.jsonl").write_text("[]\n" + json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(ResultsError, match="line 1 of ios/ios.jsonl"):
        import_ios(folder, bundle)
    toy.build(tmp_path / "other", name="other")
    with pytest.raises(DeviceError, match="another bundle"):
        import_ios(folder, tmp_path / "other")


def test_ios_says_what_to_do_next_and_writes_no_number_of_the_device(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = measure_on("ios:00008110-SECRET", bundle, tmp_path / "r.jsonl", DeviceSettings())
    assert found["error"] is None
    assert "not run on hardware" in found["note"]
    assert not [path for path in (tmp_path / "ios-benchmark").rglob("*") if path.is_file() and b"SECRET" in path.read_bytes()]
    toy.build(tmp_path / "plain")
    with pytest.raises(DeviceError, match="no proven Core ML"):
        IosDevice(DeviceSettings(), tmp_path / "x").push(tmp_path / "plain", [])
