"""Q/DQ files for Snapdragon NPUs: one piece on the emulated NPU, near to the checkpoint, reproducible, silent."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

pytest.importorskip("onnxruntime_qnn")

from export import to_qnn  # noqa: E402
from export.to_onnx import export_onnx  # noqa: E402
from export.towers import Encoder  # noqa: E402
from export.verify import measure  # noqa: E402
from mobileclip.folding import reparameterize  # noqa: E402
from runtime.errors import MissingExtraError, ParityError  # noqa: E402
from tests.export.conftest import job_of  # noqa: E402

LEAST = {("image", "int8"): 0.99, ("image", "a16w8"): 0.995, ("text", "int8"): 0.98, ("text", "a16w8"): 0.995}


@pytest.fixture(scope="module")
def made(pocket, samples, tmp_path_factory):
    """Drafts by id and the folder that they lie in."""
    folder = tmp_path_factory.mktemp("qnn")
    folded, _ = reparameterize(pocket)
    found = [draft for tower in ("image", "text") for draft in to_qnn.drafts(job_of(folded, tower, samples.head(16), folder), to_qnn.PRECISIONS)]
    return {draft.id: draft for draft in found}, folder


@pytest.mark.parametrize(("tower", "precision"), list(LEAST))
def test_whole_tower_runs_on_the_emulated_npu(tower, precision, made, samples, reference):
    draft = made[0][f"{tower}-qnn-{precision}"]
    assert draft.path == f"qnn/{tower}.{precision}.onnx"
    assert draft.batch == "1"
    assert not draft.timed
    assert "emulated HTP" in draft.how
    assert draft.facts["partitions"] == 1
    assert draft.facts["npu_operations"] > 40
    assert set(draft.facts["cpu_operations"]) <= {"QuantizeLinear", "DequantizeLinear"}
    assert sum(draft.facts["cpu_operations"].values()) <= 2
    embeddings = draft.run(samples.inputs(tower)[16:24])
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=2e-3)
    where = dataclasses.replace(reference, **{tower: getattr(reference, tower)[16:]})
    parity = measure(tower, embeddings, where)
    assert LEAST[tower, precision] < parity.centred_mean < 0.99999


def test_every_chip_generation_compiles(made):
    for draft in made[0].values():
        assert list(draft.facts["context_bytes"]) == [f"v{arch}" for arch in to_qnn.HTP_ARCHS]
        assert "not_compiled" not in draft.facts


def test_unknown_chip_is_reported_not_raised(made):
    facts = to_qnn.compile_contexts(made[1] / "qnn/text.int8.onnx", ["7"])
    assert list(facts["context_bytes"]) + list(facts.get("not_compiled", {})) == ["v7"]


def test_file_is_plain_onnx_of_batch_1(made):
    for path in (made[1] / "qnn").iterdir():
        model = onnx.load(path)
        onnx.checker.check_model(model, full_check=True)
        assert [item.domain for item in model.opset_import] == [""]
        assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1
        pairs = {node.op_type for node in model.graph.node} & {"QuantizeLinear", "DequantizeLinear"}
        assert len(pairs) == 2
        convolutions = {node.input[1] for node in model.graph.node if node.op_type == "Conv"}
        scales = {node.output[0]: node.input[1] for node in model.graph.node if node.op_type == "DequantizeLinear"}
        shapes = {item.name: tuple(item.dims) for item in model.graph.initializer}
        assert all(len(shapes[scales[name]]) == 1 for name in convolutions)  # one scale per channel
    assert sorted(path.name for path in (made[1] / "qnn").iterdir()) == ["image.a16w8.onnx", "image.int8.onnx", "text.a16w8.onnx", "text.int8.onnx"]


@pytest.mark.slow
def test_second_conversion_gives_the_same_bytes(made, pocket, samples, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(to_qnn, "HTP_ARCHS", ("75",))
    folded, _ = reparameterize(pocket)
    capfd.readouterr()
    for tower in ("image", "text"):
        list(to_qnn.drafts(job_of(folded, tower, samples.head(16), tmp_path), ("int8",)))
        assert (tmp_path / f"qnn/{tower}.int8.onnx").read_bytes() == (made[1] / f"qnn/{tower}.int8.onnx").read_bytes()
    assert capfd.readouterr() == ("", "")


def test_nothing_of_the_machine_inside(made):
    here = Path(__file__).resolve().parents[2]
    for path in (made[1] / "qnn").iterdir():
        data = path.read_bytes()
        for word in (str(here), str(Path.home()) + "/", "site-packages", str(made[1])):
            assert word.encode() not in data, (path.name, word)


def test_without_the_provider_the_cpu_evaluates(made, samples, monkeypatch):
    def broken(*_: object) -> None:
        raise RuntimeError("no backend")

    monkeypatch.setattr(to_qnn, "_npu_session", broken)
    encoder = to_qnn.NpuEncoder(made[1] / "qnn/image.a16w8.onnx")
    assert "on the CPU, Q/DQ as written (no HTP here: RuntimeError)" in encoder.how
    assert encoder.facts == {}
    expected = made[0]["image-qnn-a16w8"].run(samples.pixels[:4])
    assert (encoder(samples.pixels[:4]) * expected).sum(1).min() > 0.998
    assert to_qnn.compile_contexts(made[1] / "qnn/image.a16w8.onnx", ["75"]) == {"context_bytes": {}, "not_compiled": {"v75": "RuntimeError"}}


def test_large_towers_are_judged_as_written(pocket, samples, tmp_path, monkeypatch):
    monkeypatch.setattr(to_qnn, "EMULATED_PRODUCTS", 1e6)
    monkeypatch.setattr(to_qnn, "HTP_ARCHS", ())
    (draft,) = to_qnn.drafts(job_of(reparameterize(pocket)[0], "text", samples.head(16), tmp_path), ("int8",))
    assert draft.most_rows is None
    assert draft.how.endswith("on the CPU, Q/DQ as written")
    assert draft.facts["partitions"] == 1
    assert 0.99 < draft.facts["emulated_cosine"] < 1


def test_products_are_counted():
    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.linear = nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.Linear(24, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(self.convolution(x).flatten(1))

    model = to_qnn.with_batch_1(export_onnx(Encoder(Tower(), "image"), np.ones((2, 4, 4, 4), np.float32)))
    assert to_qnn.products(model) == 24 * 2 * 9 + 24 * 5


def test_missing_package_names_the_extra(monkeypatch, pocket, samples, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxruntime_qnn", None)
    with pytest.raises(MissingExtraError, match=r"onnxruntime-qnn.*\[qnn\]"):
        to_qnn.require()
    with pytest.raises(MissingExtraError):
        next(to_qnn.drafts(job_of(pocket, "text", samples, tmp_path), ("int8",)))
    assert list(tmp_path.iterdir()) == []


def test_no_calibration_rows_is_refused(made):
    with pytest.raises(ParityError, match="calibration inputs and got none"):
        to_qnn.quantize_npu(onnx.ModelProto(), np.zeros((0, 3, 8, 8), np.float32), "int8")


def test_graph_without_the_norm_is_refused():
    class Bare(Encoder):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.tower(x.flatten(1))

    rows = np.ones((2, 3, 2, 2), np.float32)
    with pytest.raises(ParityError, match="instead of the L2 norm"):
        to_qnn.quantize_npu(export_onnx(Bare(nn.Linear(12, 4), "image"), rows), rows, "int8")
