"""OpenVINO IR: what it computes, that two conversions are the same bytes, and what is said where something is missing."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

for name in ("openvino", "nncf"):
    if importlib.util.find_spec(name) is None:  # not importorskip: it would import them before their usage statistics are switched off
        pytest.skip(f"{name} is not installed", allow_module_level=True)

from export import to_openvino  # noqa: E402
from export.draft import Draft, Job  # noqa: E402
from export.to_openvino import PRECISIONS, OpenVinoEncoder, drafts, require  # noqa: E402
from export.verify import measure  # noqa: E402
from mobileclip.folding import reparameterize  # noqa: E402
from runtime.errors import BundleError, MissingExtraError, ParityError  # noqa: E402

LEAST = {"fp32": 0.99999, "fp16": 0.9995}


@pytest.fixture(scope="module")
def jobs(pocket, samples, tmp_path_factory) -> dict[str, Job]:
    folded, _ = reparameterize(pocket)
    folder = tmp_path_factory.mktemp("openvino")
    return {tower: Job(model=folded, tower=tower, calibration=samples.head(12), folder=folder) for tower in ("image", "text")}


@pytest.fixture(scope="module")
def made(jobs) -> dict[str, Draft]:
    return {draft.id: draft for job in jobs.values() for draft in drafts(job, PRECISIONS)}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("tower", ["image", "text"])
def test_files_compute_what_the_checkpoint_does(tower, precision, made, jobs, samples, reference):
    draft = made[f"{tower}-openvino-{precision}"]
    assert sorted(path.name for path in (jobs[tower].folder / draft.path).iterdir()) == ["model.bin", "model.xml"]
    assert draft.timed
    assert draft.batch == "dynamic"
    embeddings = draft.run(samples.inputs(tower))
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-3)
    parity = measure(tower, embeddings, reference)
    assert parity.cosine_min >= LEAST.get(precision, 0.5)
    assert parity.cosine_mean >= 0.95
    if precision == "int8":
        assert draft.facts["int8_weights"] > 0
        assert (draft.facts["quantised_activations"] > 0) == (tower == "image")
        assert parity.max_abs > 1e-4  # it did compute with int8 values


def test_files_shrink_with_the_precision_and_keep_names_and_types(made, jobs):
    import openvino

    for tower, given, kind in (("image", "image", "f32"), ("text", "tokens", "i32")):
        folder = jobs[tower].folder / "openvino"
        sizes = [(folder / f"{tower}.{precision}" / "model.bin").stat().st_size for precision in PRECISIONS]
        assert sizes[1] < 0.6 * sizes[0]
        assert sizes[2] < 0.6 * sizes[1]
        for precision in PRECISIONS:
            model = openvino.Core().read_model(folder / f"{tower}.{precision}" / "model.xml")
            assert model.input(0).get_any_name() == given
            assert model.output(0).get_any_name() == f"{tower}_embedding"
            assert model.input(0).element_type.to_string() == kind
            assert model.input(0).partial_shape[0].is_dynamic


@pytest.mark.parametrize("tower", ["image", "text"])
def test_second_conversion_gives_the_same_bytes(tower, made, jobs, tmp_path):
    again = Job(model=jobs[tower].model, tower=tower, calibration=jobs[tower].calibration, folder=tmp_path)
    again.__dict__["onnx"] = jobs[tower].onnx  # its own bytes are test_onnx's business
    for draft in drafts(again, PRECISIONS):
        for name in ("model.xml", "model.bin"):
            assert (tmp_path / draft.path / name).read_bytes() == (jobs[tower].folder / draft.path / name).read_bytes(), f"{draft.id} {name}"


def test_nothing_of_the_machine_is_inside(made, jobs, tmp_path_factory):
    words = [str(Path(__file__).parents[2]), "site-packages", str(Path.home()), str(tmp_path_factory.getbasetemp())]
    files = [path for path in (jobs["image"].folder / "openvino").rglob("*") if path.is_file()]
    assert len(files) == 12
    for path in files:
        found = [word for word in words if word.encode() in path.read_bytes()]
        assert not found, f"{path.name} holds {found}"


def test_neither_output_nor_usage_statistics(made, jobs, tmp_path, capfd):
    assert "openvino_telemetry" not in sys.modules
    job = Job(model=jobs["text"].model, tower="text", calibration=jobs["text"].calibration.head(2), folder=tmp_path)
    job.__dict__["onnx"] = jobs["text"].onnx
    list(drafts(job, ["int8"]))
    assert capfd.readouterr() == ("", "")


def test_unknown_operation_is_named_with_the_weights_before_it(jobs, tmp_path):
    weight = helper.make_tensor("tower.blocks.0.fc.weight", TensorProto.FLOAT, [4, 4], np.eye(4, dtype=np.float32).tobytes(), raw=True)
    shapes = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in ("image", "image_embedding")]
    nodes = [helper.make_node("MatMul", ["image", weight.name], ["h"]), helper.make_node("Swirl", ["h"], ["image_embedding"], domain="ours")]
    job = Job(model=None, tower="image", calibration=jobs["image"].calibration, folder=tmp_path)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("ours", 1)]
    job.__dict__["onnx"] = onnx.ModelProto(graph=helper.make_graph(nodes, "main", shapes[:1], shapes[1:], [weight]), opset_import=opsets, ir_version=10)
    with pytest.raises(ParityError, match=r"does not translate the operation Swirl \(after the weights tower\.blocks\.0\.fc\.weight\) of the image tower"):
        list(drafts(job, ["fp32"]))
    assert list(tmp_path.iterdir()) == []


def test_damaged_folder_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "model.xml").write_text("<net")
    with pytest.raises(BundleError, match="export it again"):
        OpenVinoEncoder(tmp_path)


@pytest.mark.parametrize("package", ["openvino", "nncf"])
def test_missing_package_names_the_extra(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"'{package}', which is not installed.*mobileclip-edge\[openvino\]"):
        require()
    with pytest.raises(MissingExtraError, match=package):
        to_openvino.import_openvino("exporting to OpenVINO", quantiser=package == "nncf")
