"""Text graphs of any length: equal to the whole ones, and refused where they would not be."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest
import torch

import runtime
from export.any_length import free_length, freed
from export.bundle import ExportConfig, export_bundle
from export.int8_recipe import Int8Recipe, make_int8
from export.to_onnx import OnnxEncoder, export_onnx, serialize
from export.towers import encoder_of
from mobileclip.config import TextConfig
from mobileclip.presets import preset
from runtime.manifest import read_manifest
from runtime.text_lengths import LENGTHS, by_length, token_counts
from tests.export.conftest import calibrated

LENGTH = 77


def tower(**settings):
    text = TextConfig(**{"width": 64, "heads": 2, "layers": 2, "vocab_size": 600, "mask": "causal", **settings})
    return calibrated(dataclasses.replace(preset("pocket_s"), name="short", text=text))


def rows(count: int = 12, length: int = LENGTH, pad_id: int = 0) -> np.ndarray:
    """Texts of 1 to `length` tokens, some with CLIP's "!" (id 0, which is padding too) inside and at the end."""
    rng = np.random.default_rng(0)
    made = np.full((count, length), pad_id, np.int32)
    for n, words in enumerate(np.linspace(2, length, count).astype(int)):
        made[n, 0], made[n, 1 : words - 1], made[n, words - 1] = 598, rng.integers(1, 590, words - 2), 599
    made[2, 1], made[3, 3:5] = 0, 0
    return made


@pytest.fixture(scope="module")
def causal() -> onnx.ModelProto:
    return export_onnx(encoder_of(tower(), "text"), rows()[:2])


def test_counts_reach_to_the_end_token():
    made = rows()
    assert token_counts(made, 0).tolist() == np.linspace(2, LENGTH, 12).astype(int).tolist()
    assert token_counts(np.zeros((1, 5), np.int32), 0).tolist() == [1]
    assert token_counts(np.array([[3, 9, 9, 0, 0]], np.int32), 0).tolist() == [3]


def test_rows_are_cut_to_the_next_length():
    seen = []
    by_length(rows(), 0, lambda part: seen.append(part.shape) or np.zeros((len(part), 4), np.float32), 4)
    assert {shape[1] for shape in seen} <= {*LENGTHS, LENGTH}
    assert sum(shape[0] for shape in seen) == 12
    assert min(shape[1] for shape in seen) == 8


@pytest.mark.parametrize("settings", [{}, {"mask": "pad"}, {"mask": "pad", "pool": "mean", "norm": "post", "embedding_norm": True}], ids=["causal", "pad", "mean"])
def test_short_rows_give_what_whole_ones_give(settings):
    model = tower(**settings)
    made = rows()
    if settings.get("pool") == "mean":
        made[made == 0] = 1
        for n, count in enumerate(np.linspace(2, LENGTH, 12).astype(int)):
            made[n, count:] = 0
    short = freed(export_onnx(encoder_of(model, "text"), made[:2]), made, 0, exact=True)
    assert short is not None
    onnx.checker.check_model(short)
    run = OnnxEncoder(serialize(short))
    with torch.no_grad():
        wanted = torch.nn.functional.normalize(model.text(torch.from_numpy(made)), dim=-1).numpy()
    np.testing.assert_allclose(by_length(made, 0, run, wanted.shape[1]), wanted, atol=2e-6)
    np.testing.assert_allclose(run(made), wanted, atol=2e-6)
    for length in (1, 2, 5, 76):
        assert run(made[:3, :length]).shape == (3, wanted.shape[1])


def test_a_tower_without_a_mask_is_found_out():
    """Padding takes part there: the graph runs, and gives something else."""
    graph = export_onnx(encoder_of(tower(mask="none"), "text"), rows()[:2])
    assert free_length(graph) is not None
    assert freed(graph, rows(), 0, exact=True) is None


def test_a_length_that_is_also_a_width_is_not_freed_wrongly():
    """64 tokens in a tower of width 64: whatever comes out is either exact or nothing."""
    model, made = tower(context_length=64), rows(length=64)
    graph = export_onnx(encoder_of(model, "text"), made[:2])
    short = freed(graph, made, 0, exact=True)
    if short is not None:
        np.testing.assert_allclose(by_length(made, 0, OnnxEncoder(serialize(short)), 256), OnnxEncoder(serialize(graph))(made), atol=2e-6)


def test_rows_without_padding_prove_nothing(causal):
    assert freed(causal, rows()[-1:], 0, exact=True) is None


@pytest.mark.parametrize("recipe", [Int8Recipe(form="dynamic"), Int8Recipe(form="dynamic", alpha=0.5)], ids=["plain", "equalised"])
def test_eight_bits_are_freed_too(causal, recipe):
    made = rows()
    graph = make_int8(causal, made, recipe)
    short = freed(graph, made, 0, exact=False)
    assert short is not None
    exact, found = OnnxEncoder(serialize(causal))(made), by_length(made, 0, OnnxEncoder(serialize(short)), 256)
    # Ranges are taken over less padding now: as near to the exact embeddings as before, or nearer.
    assert (found * exact).sum(axis=1).mean() > (OnnxEncoder(serialize(graph))(made) * exact).sum(axis=1).mean() - 1e-3


def test_the_bundle_says_so_and_the_sdk_uses_it(pocket_bundle, monkeypatch):
    manifest = read_manifest(pocket_bundle)
    artefact = manifest.artefact("text-onnx-fp32")
    assert artefact.any_length
    assert not any(a.any_length for a in manifest.artefacts if a.tower == "image" or a.batch != "dynamic")
    clip = runtime.load(pocket_bundle, threads=1, prefer={"text": "text-onnx-fp32"})
    opened, _ = clip._open("text")
    shapes: list[tuple[int, ...]] = []
    real = opened.run
    monkeypatch.setattr(opened, "run", lambda inputs: shapes.append(inputs.shape) or real(inputs))
    clip.encode_text(["a cat", "a small red boat beside the old quiet house, the tall green tree and the round clock"])
    assert shapes == [(1, 8), (1, manifest.text.context_length)]


def test_the_gate_sees_what_the_sdk_computes(pocket_checkpoint, pairs_folder, tmp_path, monkeypatch):
    """Parity is judged on rows cut short: a graph that is wrong there only is not shipped."""
    import export.any_length

    monkeypatch.setattr(export.any_length, "freed", lambda model, rows, pad_id, exact: _spoilt(model))
    with pytest.raises(Exception, match="does not compute what the checkpoint computes"):
        export_bundle(ExportConfig(checkpoint=pocket_checkpoint, bundle=tmp_path / "b", pairs=pairs_folder, target="onnx", precision="fp32", samples=24, calibration=8, golden=4))


def _spoilt(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """A freed graph whose positions are upside down for short rows."""
    if model.graph.input[0].name != "tokens":
        return None
    short = free_length(model)
    assert short is not None
    for node in short.graph.node:
        if node.op_type == "Slice" and node.input[2] == "row_length":
            table = next(item for item in short.graph.initializer if item.name == node.input[0])
            values = onnx.numpy_helper.to_array(table)
            table.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(values[::-1]), table.name))
            return short
    raise AssertionError("no table of positions was cut")
