"""Core ML packages: what they compute, what they are called, and that two saves are the same bytes."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from torch import nn

coremltools = pytest.importorskip("coremltools")

import export.to_coreml_image  # noqa: E402
from export.mil_interpreter import MilProgram  # noqa: E402
from export.to_coreml import PRECISIONS, convert, drafts, evaluate, join, save  # noqa: E402
from export.to_onnx import OnnxEncoder, export_onnx, serialize  # noqa: E402
from export.towers import encoder_of  # noqa: E402
from export.verify import failure, measure, reference_of  # noqa: E402
from mobileclip.checkpoint import load_checkpoint  # noqa: E402
from mobileclip.folding import reparameterize  # noqa: E402
from runtime.errors import BundleError, ParityError, RecipeError  # noqa: E402
from runtime.manifest import read_manifest  # noqa: E402
from tests.export.conftest import job_of, rows_of, teacher_like  # noqa: E402


def package(model, tower, rows, path):
    return save(convert(job_of(model, tower, rows_of(tower, rows), path.parent)), path)


@pytest.mark.parametrize("tower", ["image", "text"])
def test_saved_package_computes_what_the_checkpoint_does(tower, pocket_bundle, samples, reference):
    program = MilProgram.open(pocket_bundle / f"coreml/{tower}.fp16.mlpackage")
    assert program.inputs == [{"image": "image", "text": "tokens"}[tower]]
    assert program.outputs == [f"{tower}_embedding"]
    parity = measure(tower, evaluate(program, samples.inputs(tower)[:8]), reference)
    assert parity.cosine_min >= 0.999
    assert parity.max_abs > 0  # it did compute in float16


def test_float32_arithmetic_is_nearer_than_float16(pocket_bundle, samples, reference):
    path = pocket_bundle / "coreml/text.fp16.mlpackage"
    single, half = (measure("text", evaluate(MilProgram.open(path, half=kind), samples.tokens[:8]), reference).cosine_mean for kind in (False, True))
    assert half < single < 1


def test_damaged_weights_show(pocket_bundle, samples, reference, tmp_path):
    import shutil

    copy = tmp_path / "damaged.mlpackage"
    shutil.copytree(pocket_bundle / "coreml/image.fp16.mlpackage", copy)
    (weights,) = copy.rglob("weight.bin")
    good = weights.read_bytes()
    arrays = [array.astype(np.float16) for array in MilProgram.open(copy).constants().values() if array.dtype.kind == "f"]
    largest = max(arrays, key=lambda array: array.nbytes)
    start = good.index(largest.tobytes())
    damaged = (largest + np.float16(1)).tobytes()
    weights.write_bytes(good[:start] + damaged + good[start + len(damaged) :])
    assert measure("image", evaluate(MilProgram.open(copy), samples.pixels[:6]), reference).cosine_min < 0.999
    weights.write_bytes(good.replace((0xDEADBEEF).to_bytes(4, "little"), b"\0\0\0\0"))
    with pytest.raises(BundleError, match="damaged"):
        MilProgram.open(copy)


def test_second_save_gives_the_same_bytes(pocket_bundle, pocket_checkpoint, samples, tmp_path):
    folded, _ = reparameterize(load_checkpoint(pocket_checkpoint))
    again = package(folded, "text", samples.tokens, tmp_path / "text.mlpackage")
    first = pocket_bundle / "coreml/text.fp16.mlpackage"
    for path in first.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (again / path.relative_to(first)).read_bytes(), path.name
    manifest = json.loads((again / "Manifest.json").read_text())
    assert len(manifest["itemInfoEntries"]) == 2


def test_mask_beyond_float16_is_refused(tmp_path):
    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(12, 8)
            self.register_buffer("mask", torch.full((8,), float("-inf")))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x.flatten(1)) + self.mask

    class Model(nn.Module):
        image = Tower()

    with pytest.raises(ParityError, match="beyond float16's 65504"):
        package(Model(), "image", np.zeros((1, 3, 2, 2), np.float32), tmp_path / "a.mlpackage")
    assert list(tmp_path.iterdir()) == []


def test_clamps_with_one_integer_bound_convert(tmp_path):
    class Tower(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            flat = x.flatten(1)
            return flat.clamp(min=1) + flat.clamp_min(0) + flat.clamp_max(2) + flat.clamp(max=3)

    class Model(nn.Module):
        image = Tower()

    pixels = np.linspace(-4, 4, 12, dtype=np.float32).reshape(1, 3, 2, 2)
    program = MilProgram.open(package(Model(), "image", pixels, tmp_path / "a.mlpackage"))
    flat = torch.from_numpy(pixels).flatten(1)
    expected = flat.clamp(min=1) + flat.clamp(min=0) + flat.clamp(max=2) + flat.clamp(max=3)
    np.testing.assert_allclose(evaluate(program, pixels), expected / expected.norm(), atol=2e-3)


@pytest.mark.parametrize("tower", [pytest.param("image", marks=pytest.mark.slow), "text"])
def test_sample_teachers_form_converts(tower, tmp_path, samples):
    """Asymmetric padding, ReLU6, a padding mask, mean pooling, post-norm: what the pocket model has none of."""
    model = teacher_like()
    reference = reference_of(model, samples)
    program = MilProgram.open(package(model, tower, samples.inputs(tower), tmp_path / "teacher.mlpackage"))
    # Random weights of this depth magnify float16's rounding; the trained teacher keeps 0.9999.
    assert measure(tower, evaluate(program, samples.inputs(tower)[:6]), reference).cosine_min >= 0.995
    exported = OnnxEncoder(serialize(export_onnx(encoder_of(model, tower), samples.inputs(tower))))
    assert measure(tower, exported(samples.inputs(tower)), reference).cosine_min >= 0.99999


@pytest.mark.slow
def test_weights_in_fewer_bits_are_smaller_and_further_away(pocket_bundle, pocket_checkpoint, samples, reference, tmp_path):
    """What the interpreter reads back from disk is the compressed program: fewer bits, larger distance, and a file that shows it."""
    folded, _ = reparameterize(load_checkpoint(pocket_checkpoint))
    precisions = [precision for precision in PRECISIONS if precision not in ("mixed", "w8a8")]
    found = {}
    for draft in drafts(job_of(folded, "text", samples, tmp_path), precisions):
        size = sum(path.stat().st_size for path in (tmp_path / draft.path).rglob("*") if path.is_file())
        found[draft.precision] = (measure("text", draft.run(samples.tokens[:16]), reference).centred_mean, size)
        assert draft.id == f"text-coreml-{draft.precision}"
    cosines, sizes = ({name: pair[place] for name, pair in found.items()} for place in (0, 1))
    assert cosines["fp32"] > 0.999999
    assert cosines["fp16"] > 0.99999
    assert cosines["fp16"] > cosines["palette8"] > cosines["palette6"] > cosines["palette4"]
    assert cosines["palette8"] > 0.99
    assert cosines["sparse"] < cosines["palette6"]
    assert sizes["fp32"] > 1.8 * sizes["fp16"]
    assert sizes["fp16"] > 1.5 * sizes["palette8"] > 1.5 * sizes["palette6"] > 1.5 * sizes["palette4"] * 1.2
    assert sizes["int8"] < 0.65 * sizes["fp16"]
    assert sizes["sparse"] < 0.8 * sizes["fp16"]


def test_a_weight_whose_range_overflows_float16_is_left_as_it_is(tmp_path):
    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.plain = nn.Linear(12, 256), nn.Linear(256, 128)
            with torch.no_grad():
                self.wide.weight[3, 5] = 48067

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.plain(self.wide(x.flatten(1)).clamp(-1, 1))

    class Model(nn.Module):
        image = Tower()

    pixels = np.random.default_rng(0).standard_normal((4, 3, 2, 2)).astype(np.float32)
    (draft,) = drafts(job_of(Model(), "image", rows_of("image", pixels), tmp_path), ("int8",))
    forms = {form for _, form, _ in MilProgram.open(tmp_path / draft.path).weights()}
    assert len(forms) == 2
    assert "const" in forms
    with torch.no_grad():
        expected = nn.functional.normalize(Model().image(torch.from_numpy(pixels)), dim=-1).numpy()
    assert (draft.run(pixels) * expected).sum(1).min() > 0.999


@pytest.mark.parametrize("precision", ["palette6", pytest.param("int8", marks=pytest.mark.slow)])
def test_compressed_weights_are_reproducible(precision, pocket_checkpoint, samples, tmp_path):
    folded, _ = reparameterize(load_checkpoint(pocket_checkpoint))
    for name in ("one", "two"):
        list(drafts(job_of(folded, "text", samples, tmp_path / name), (precision,)))
    first = {str(path.relative_to(tmp_path / "one")): path.read_bytes() for path in (tmp_path / "one").rglob("*") if path.is_file()}
    assert len(first) == 3
    assert first == {str(path.relative_to(tmp_path / "two")): path.read_bytes() for path in (tmp_path / "two").rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def folded(pocket_checkpoint):
    return reparameterize(load_checkpoint(pocket_checkpoint))[0]


def test_packages_that_take_a_picture(folded, samples, reference, tmp_path):
    (draft,) = export.to_coreml_image.drafts(job_of(folded, "image", samples, tmp_path), ("fp16",))
    assert failure(draft.id, measure("image", draft.run(samples.pixels[:12]), reference), "fp16") is None
    entry = coremltools.models.MLModel(str(tmp_path / draft.path), skip_model_load=True).get_spec().description.input[0]
    assert entry.type.WhichOneof("Type") == "imageType"
    assert (entry.type.imageType.width, entry.type.imageType.height) == (64, 64)
    assert list(export.to_coreml_image.drafts(job_of(folded, "text", samples, tmp_path), ("fp16",))) == []


@pytest.mark.parametrize("tower", [pytest.param("image", marks=pytest.mark.slow), "text"])
def test_activations_in_eight_bits(tower, folded, samples, reference, tmp_path):
    (draft,) = drafts(job_of(folded, tower, samples, tmp_path), ("w8a8",))
    program = MilProgram.open(tmp_path / draft.path)
    counts = program.operation_counts()
    assert counts["quantize"] > 4
    assert counts["dequantize"] >= counts["quantize"]
    assert draft.facts["weights"]["compressed"] > 0.9
    parity = measure(tower, draft.run(samples.inputs(tower)[:16]), reference)
    assert parity.cosine_mean > (0.95 if tower == "image" else 0.97)
    assert parity.cosine_min < 0.99999  # it is really coarser
    with pytest.raises(RecipeError, match="w8a8 needs --ios 17"):
        list(drafts(job_of(folded, tower, samples, tmp_path, ios=16), ("w8a8",)))


@pytest.mark.parametrize("tower", ["image", pytest.param("text", marks=pytest.mark.slow)])
def test_batches_of_the_sizes_asked_for(tower, folded, samples, reference, tmp_path):
    (draft,) = drafts(job_of(folded, tower, samples, tmp_path, batches=(4, 8)), ("fp16",))
    assert draft.facts["batches"] == [1, 4, 8]
    assert failure(draft.id, measure(tower, draft.run(samples.inputs(tower)[:6]), reference), "fp16") is None
    array = coremltools.models.MLModel(str(tmp_path / draft.path), skip_model_load=True).get_spec().description.input[0].type.multiArrayType
    assert [list(shape.shape)[0] for shape in array.enumeratedShapes.shapes] == [1, 4, 8]
    program = MilProgram.open(tmp_path / draft.path)
    together = program(**{program.inputs[0]: samples.inputs(tower)[:4]})[f"{tower}_embedding"]
    assert failure("four at once", measure(tower, together, reference), "fp16") is None


@pytest.mark.slow
def test_ranges_are_over_all_rows(folded, samples, tmp_path):
    (draft,) = drafts(job_of(folded, "image", samples, tmp_path), ("fp16",))
    program = MilProgram.open(tmp_path / draft.path)
    apart, together = [program.ranges(rows) for rows in (samples.pixels[:1], samples.pixels[1:2])], program.ranges(samples.pixels[:2])
    for name, (low, high) in together.items():
        assert (low, high) == (min(found[name][0] for found in apart), max(found[name][1] for found in apart))


@pytest.mark.slow
def test_some_operations_stay_in_single_precision(folded, samples, reference, tmp_path):
    (draft,) = drafts(job_of(folded, "text", samples, tmp_path), ("mixed",))
    assert failure(draft.id, measure("text", draft.run(samples.tokens[:12]), reference), "mixed") is None
    kinds = {(o.op_type, o.outputs[0].dtype.__name__) for o in MilProgram.open(tmp_path / draft.path)._function.operations}
    assert {("layer_norm", "fp32"), ("softmax", "fp32"), ("linear", "fp16")} <= kinds
    assert not {("layer_norm", "fp16"), ("softmax", "fp16"), ("linear", "fp32")} & kinds


@pytest.mark.slow
def test_text_with_channels_first(folded, samples, reference, tmp_path):
    (draft,) = drafts(job_of(folded, "text", samples, tmp_path, text_layout="channels"), ("fp16",))
    assert failure(draft.id, measure("text", draft.run(samples.tokens[:12]), reference), "fp16") is None
    counts = MilProgram.open(tmp_path / draft.path).operation_counts()
    assert counts["conv"] >= 2 * 6 + 1
    assert counts["linear"] == 0


@pytest.mark.slow
def test_the_feature_map_is_a_second_output(folded, samples, reference, tmp_path):
    (draft,) = drafts(job_of(folded, "image", samples, tmp_path, features=True), ("fp16",))
    program = MilProgram.open(tmp_path / draft.path)
    assert set(program.outputs) == {"image_embedding", "feature_map"}
    assert failure(draft.id, measure("image", draft.run(samples.pixels[:12]), reference), "fp16") is None
    found = program(image=samples.pixels[:1])["feature_map"]
    with torch.no_grad():
        expected = folded.image.trunk.forward_features(torch.from_numpy(samples.pixels[:1])).numpy()
    np.testing.assert_allclose(found, expected, atol=0.02 * np.abs(expected).max())


def test_both_towers_as_functions_of_one_package(pocket_bundle, tmp_path, monkeypatch):
    folder = tmp_path / "bundle"
    shutil.copytree(pocket_bundle, folder)
    manifest = read_manifest(folder)
    own = {tower: manifest.artefact(f"{tower}-coreml-fp16") for tower in ("image", "text")}
    found = join(folder, own)
    assert [(artefact.id, artefact.facts["function"]) for artefact in found] == [("image-coreml-fp16-function", "image"), ("text-coreml-fp16-function", "text")]
    first = {path.relative_to(folder): path.read_bytes() for path in (folder / found[0].path).rglob("*") if path.is_file()}
    with pytest.raises(BundleError, match="has no function 'main'; it has image, text"):
        MilProgram.open(folder / found[0].path)
    join(folder, own)
    assert first == {path.relative_to(folder): path.read_bytes() for path in (folder / found[0].path).rglob("*") if path.is_file()}
    opened = MilProgram.open
    other = folder / manifest.artefact("text-coreml-int8").path
    monkeypatch.setattr(MilProgram, "open", lambda path, **more: opened(other) if more.get("function") == "text" else opened(path, **more))
    with pytest.raises(ParityError, match="its function 'text' does not compute what coreml/text"):
        join(folder, own)


@pytest.mark.parametrize("ios", [pytest.param(16, marks=pytest.mark.slow), 18])
def test_the_oldest_system_is_chosen(ios, pocket_checkpoint, samples, reference, tmp_path):
    folded, _ = reparameterize(load_checkpoint(pocket_checkpoint))
    (draft,) = drafts(job_of(folded, "image", samples, tmp_path, ios=ios), ("fp16",))
    assert draft.facts["deployment_target"] == f"iOS{ios}"
    assert MilProgram.open(tmp_path / draft.path).specification_version == {16: 7, 18: 9}[ios]
    assert measure("image", draft.run(samples.pixels[:4]), reference).cosine_min >= 0.9995
