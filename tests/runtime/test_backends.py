"""Artefacts of other runtimes through the SDK, made by the real exporters: the numbers are the checkpoint's, the choice is the machine's."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import runtime
from runtime.backends import BACKENDS, NEEDS, missing
from runtime.errors import BundleError
from runtime.manifest import read_manifest, write_manifest
from runtime.selfcheck import selfcheck
from tests.runtime import toy


@pytest.fixture
def with_openvino(own_bundle: Path) -> Path:
    """The toy bundle, its towers in OpenVINO's form too."""
    openvino = pytest.importorskip("openvino")
    manifest = read_manifest(own_bundle)
    more = []
    for tower in ("image", "text"):
        folder = own_bundle / "openvino" / f"{tower}.fp32"
        folder.mkdir(parents=True)
        openvino.save_model(openvino.convert_model(str(own_bundle / f"onnx/{tower}.fp32.onnx")), folder / "model.xml", compress_to_fp16=False)
        more.append(replace(toy.artefact(tower, "fp32"), id=f"{tower}-openvino-fp32", target="openvino", path=f"openvino/{tower}.fp32", latency={"p50_ms": 0.01}))
    write_manifest(own_bundle, replace(manifest, artefacts=(*manifest.artefacts, *more)))
    return own_bundle


def test_openvino_gives_the_same_embeddings(with_openvino: Path) -> None:
    ours = runtime.load(with_openvino, threads=1, prefer="openvino")
    plain = runtime.load(with_openvino, threads=1, prefer={"image": "image-onnx-fp32", "text": "text-onnx-fp32"})
    assert ours.choice["text"].id == "text-openvino-fp32"
    pictures = [toy.picture(name, n) for n, name in enumerate(toy.COLOURS)] * 10
    np.testing.assert_allclose(ours.encode_image(pictures), plain.encode_image(pictures), atol=1e-5)
    texts = ["red", "a blue heart", "green " * 30]
    np.testing.assert_allclose(ours.encode_text(texts), plain.encode_text(texts), atol=1e-5)
    assert "openvino" in ours._towers["image"][0].facts["runtime"]


QUIET = """
import sys, runtime
runtime.load(sys.argv[1], prefer="openvino").encode_text("red")
assert "openvino" in sys.modules
assert "openvino_telemetry" not in sys.modules, "reports its use"
"""


def test_its_use_is_reported_to_nobody(with_openvino: Path) -> None:
    done = subprocess.run([sys.executable, "-c", QUIET, str(with_openvino)], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr


def test_the_selfcheck_runs_them_too(with_openvino: Path) -> None:
    report = selfcheck(with_openvino, threads=1)
    entries = {entry["id"]: entry for entry in report["artefacts"]}
    assert entries["text-openvino-fp32"]["how"] == "run"
    assert report["ok"]


def test_a_package_that_is_not_installed_is_named(with_openvino: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NEEDS, "openvino", "no_such_package")
    assert missing("openvino") == "target openvino needs the package 'no_such_package', which is not installed"
    clip = runtime.load(with_openvino)
    assert clip.choice["image"].id == "image-onnx-fp32"
    assert "not installed" in clip.choice["image"].passed_over["image-openvino-fp32"]
    with pytest.raises(BundleError, match="no usable image artefact 'openvino'"):
        runtime.load(with_openvino, prefer="openvino")


def test_a_folder_that_is_no_model(with_openvino: Path) -> None:
    (with_openvino / "openvino/text.fp32/model.xml").write_text("<net></net>")
    write_manifest(with_openvino, read_manifest(with_openvino, verify=False))
    with pytest.raises(BundleError, match="is not a model that openvino"):
        runtime.load(with_openvino, prefer={"text": "openvino"}).encode_text("red")


def test_every_backend_says_what_it_needs() -> None:
    assert set(BACKENDS) == set(NEEDS)
    assert missing("tensorrt") == "target tensorrt does not run in this SDK"


CORE_ML = """
import sys, logging
logging.disable(logging.CRITICAL)
from pathlib import Path
import numpy as np
from runtime.backends import CoreMlTower
from runtime.errors import BundleError, DeviceError
path = Path(sys.argv[1])
tower = CoreMlTower(path, 1, "pixels", "embedding")
assert not [name for name in ("torch", "transformers") if name in sys.modules]
try:
    CoreMlTower(path, 1, "tokens", "embedding")
except BundleError as error:
    assert "the manifest says 'tokens'" in str(error)
try:
    CoreMlTower(path.with_name("nothing.mlpackage"), 1, "pixels", "embedding")
except BundleError as error:
    assert "is not a package that coremltools" in str(error)
if sys.platform != "darwin":
    try:
        tower.run(np.zeros((1, 4), np.float32))
    except DeviceError as error:
        print("the device refused:", error)
"""


@pytest.mark.skipif(sys.platform == "darwin", reason="on a Mac it runs")
def test_core_ml_goes_as_far_as_the_system_lets_it_and_never_imports_torch(tmp_path: Path) -> None:
    pytest.importorskip("coremltools")
    from export.mil_interpreter import import_coremltools

    ct = import_coremltools("a test")
    from coremltools.converters.mil import Builder as mb

    @mb.program(input_specs=[mb.TensorSpec(shape=(1, 4))], opset_version=ct.target.iOS16)
    def program(pixels):  # type: ignore[no-untyped-def]
        return mb.mul(x=pixels, y=2.0, name="embedding")

    ct.convert(program, minimum_deployment_target=ct.target.iOS16, skip_model_load=True).save(str(tmp_path / "tower.mlpackage"))
    done = subprocess.run([sys.executable, "-c", CORE_ML, str(tmp_path / "tower.mlpackage")], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the device refused: tower.mlpackage failed on an input of float32 (1, 4)")
    assert missing("coreml") == "target coreml runs on Macs alone"
