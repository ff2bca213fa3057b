"""The kits that travel with a bundle: the TensorRT scripts are run with a trtexec that writes what it was asked (no GPU here), the Mac's are read."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

TRTEXEC = """#!{python}
import json, sys
arguments = dict(argument[2:].split("=", 1) if "=" in argument else (argument[2:], "") for argument in sys.argv[1:])
print("&&&& RUNNING TensorRT.trtexec [TensorRT v{version}] # " + " ".join(sys.argv))
with open({log!r}, "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
if "saveEngine" in arguments:
    open(arguments["saveEngine"], "w").close()
if "exportOutput" in arguments:
    tower = "image" if "image" in arguments["loadInputs"].split(":")[0] else "text"
    expected = json.load(open("golden/expected.json"))
    values = [value for row in expected["embeddings"][tower] for value in row]
    values = [value + {noise} * (place % 7 - 3) for place, value in enumerate(values)]
    rows = expected["embeddings"][tower]
    json.dump([dict(name=expected["outputs"][tower], dimensions="%dx%d" % (len(rows), len(rows[0])), values=values)], open(arguments["exportOutput"], "w"))
"""


@pytest.fixture
def kit(pocket_bundle, tmp_path) -> Path:
    return Path(shutil.copytree(pocket_bundle / "tensorrt", tmp_path / "a kit's folder"))


def build(kit: Path, version: str = "101300", noise: float = 0.0, **variables: str) -> tuple[subprocess.CompletedProcess, list[dict[str, str]]]:
    """Run build.sh with a trtexec of that version; returns what it said and every call's arguments."""
    program, log = kit.parent / "trtexec", kit.parent / "calls.jsonl"
    program.write_text(TRTEXEC.format(python=sys.executable, version=version, log=str(log), noise=noise))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    log.write_text("")
    done = subprocess.run(["sh", str(kit / "build.sh")], env={**os.environ, "TRTEXEC": str(program), **variables}, capture_output=True, text=True)
    calls = [dict(word[2:].split("=", 1) if "=" in word else (word[2:], "") for word in json.loads(line)) for line in log.read_text().splitlines()]
    return done, [call for call in calls if "help" not in call]


def test_every_file_is_built_checked_and_timed(kit):
    done, calls = build(kit)
    assert done.returncode == 0, done.stderr
    built = [call for call in calls if "onnx" in call]
    assert sorted(call["onnx"] for call in built) == sorted(path.name for path in kit.glob("*.onnx"))
    assert len(built) == 6
    assert all("stronglyTyped" in call and "fp16" not in call and "int8" not in call for call in built)
    assert built[0]["minShapes"] == "image:1x3x64x64"
    assert built[0]["maxShapes"] == "image:8x3x64x64"
    assert done.stdout.count("ok    ") == 6
    assert len(calls) == 18
    assert "includeDataTransfers" not in calls[-1]


def test_version_11_is_told_nothing_of_types_and_asked_for_the_same_times(kit):
    done, calls = build(kit, version="110400", PRECISIONS="fp16")
    assert done.returncode == 0, done.stderr
    assert [call["onnx"] for call in calls if "onnx" in call] == ["image.fp16.onnx", "text.fp16.onnx"]
    assert not any("stronglyTyped" in call for call in calls)
    assert {"includeDataTransfers", "noSpinWait", "noCudaGraph"} <= set(calls[-1])


def test_engines_that_compute_something_else_fail(kit):
    done, calls = build(kit, noise=0.1)
    assert done.returncode == 1
    assert "FAIL  image.fp32: least cosine to the checkpoint" in done.stdout
    assert not any("exportTimes" in call for call in calls)


def test_an_older_version_or_none_is_refused(kit):
    done, _ = build(kit, version="8601")
    assert done.returncode == 1
    assert "TensorRT 0 (v8601) is not supported: expected 10 (JetPack 6) or 11" in done.stderr
    done = subprocess.run(["sh", str(kit / "build.sh")], env={**os.environ, "TRTEXEC": "/nowhere/trtexec"}, capture_output=True, text=True)
    assert done.returncode == 1
    assert "there is no trtexec on the PATH or at /nowhere/trtexec" in done.stderr


def test_golden_inputs_are_those_of_the_bundle(kit, pocket_bundle):
    golden = load_file(pocket_bundle / "golden/golden.safetensors")
    np.testing.assert_array_equal(np.fromfile(kit / "golden/image.bin", np.float32), golden["pixels"].reshape(-1))
    np.testing.assert_array_equal(np.fromfile(kit / "golden/text.bin", np.int32), golden["tokens"].reshape(-1))


def errors_of(swift: bytes) -> list[str]:
    """Lines of Swift source that its grammar does not take."""
    import tree_sitter_swift
    from tree_sitter import Language, Parser

    found, nodes = [], [Parser(Language(tree_sitter_swift.language())).parse(swift).root_node]
    while nodes:
        node = nodes.pop()
        if node.is_error or node.is_missing:
            found.append(swift.splitlines()[node.start_point.row].decode())
        nodes += node.children
    return found


def test_swift_of_the_kit_is_swift(pocket_bundle):
    pytest.importorskip("coremltools")
    swift = (pocket_bundle / "coreml/selfcheck.swift").read_bytes()
    assert b"MLModel.compileModel" in swift
    assert errors_of(swift) == []
    assert errors_of(swift.replace(b"let ", b"let let ", 1))


def test_scripts_of_the_mac_are_there_and_refuse_elsewhere(pocket_bundle):
    pytest.importorskip("coremltools")
    done = subprocess.run([sys.executable, str(pocket_bundle / "coreml/selfcheck.py")], capture_output=True, text=True)
    assert done.returncode == 1
    assert "error: Core ML predicts on macOS only" in done.stderr
    assert "Traceback" not in done.stderr
