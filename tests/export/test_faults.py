"""Every fault of the published list, planted into a real export or bundle: the gate catches each, for the right reason, and lets good exports pass."""

from __future__ import annotations

import copy
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from export.artefacts import Maker
from export.draft import Job
from export.quantize import quantize_dynamic
from export.to_onnx import OnnxEncoder, serialize
from export.towers import Samples, Tower
from export.verify import Reference, reference_of
from mobileclip.model import ImageTextModel
from runtime import shell
from runtime.errors import ParityError
from runtime.manifest import Artefact
from tests.export.faults import Fault, bundles, coreml, graphs, parameters, towers

LISTS = {"the network": towers.FAULTS, "the conversion": graphs.FAULTS, "Core ML packages": coreml.FAULTS, "the bundle": bundles.FAULTS}
GRAPHS = {"fp32": "onnx", "fp16": "onnx_half", "int8": "onnx_int8"}


@pytest.fixture(scope="module")
def outlier(pocket, samples) -> ImageTextModel:
    """A text tower with one large channel, as trained transformers have it, that finds pictures of the samples: its projection is solved for them."""
    model = copy.deepcopy(pocket)
    text = model.text
    with torch.no_grad():
        text.token_embedding.weight.mul_(30)
        text.positional_embedding[:, 5] += 30
        for norm in (module for module in text.modules() if isinstance(module, torch.nn.LayerNorm)):
            norm.weight[5] = 0.0
    return finding(model, samples)


@pytest.fixture(scope="module")
def signs(pocket, samples) -> ImageTextModel:
    """A text tower whose weights are one magnitude a row, as binary and ternary training leaves them: in eight bits each is at the end of the range."""
    model = copy.deepcopy(pocket)
    with torch.no_grad():
        for layer in (module for module in model.text.blocks.modules() if isinstance(module, torch.nn.Linear)):
            layer.weight.copy_(layer.weight.sign() * layer.weight.abs().mean(1, keepdim=True))
            layer.weight[:, 1::2] = layer.weight[:, 0::2]
    return finding(model, samples)


@torch.no_grad()
def finding(model: ImageTextModel, samples: Samples) -> ImageTextModel:
    """The model with its text projection solved for the pictures of the samples."""
    text = model.text
    embeddings = model.encode_image(torch.from_numpy(samples.pixels))
    kept: list[torch.Tensor] = []
    handle = text.projection.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    text(torch.from_numpy(samples.tokens))
    handle.remove()
    features, eye = kept[0].double(), torch.eye(kept[0].shape[1], dtype=torch.float64)
    gram = features.T @ features
    text.projection.weight.copy_(torch.linalg.solve(gram + gram.diagonal().mean() * eye, features.T @ embeddings.double()).T)
    return model.eval()


@pytest.fixture(scope="module")
def models(pocket, outlier, signs, samples) -> dict[str, tuple[ImageTextModel, Reference]]:
    return {name: (model, reference_of(model, samples)) for name, model in (("pocket", pocket), ("outlier", outlier), ("signs", signs))}


def judged(model: ImageTextModel, reference: Reference, tower: Tower, precisions: tuple[str, ...], samples: Samples, folder: Path) -> dict[str, Artefact]:
    folder.mkdir(parents=True, exist_ok=True)
    maker = Maker(model=model, samples=samples, reference=reference, calibration=samples, folder=folder, targets={"onnx": precisions}, say=lambda line: None)
    return {artefact.id: artefact for artefact in maker.make(tower)}


def answer(fault: Fault, model: ImageTextModel, reference: Reference, samples: Samples, folder: Path) -> str:
    """Why the artefact with the fault is not shipped."""
    precisions = ("fp32",) if fault.precision == "fp32" else ("fp32", fault.precision)
    try:
        found = judged(model, reference, fault.tower, precisions, samples, folder)[f"{fault.tower}-onnx-{fault.precision}"]
    except ParityError as error:
        return str(error)
    assert found.status == "refused", (found.status, found.parity)
    assert found.path is None
    assert not (folder / f"onnx/{fault.tower}.{fault.precision}.onnx").exists()
    return found.reason


@pytest.mark.parametrize("name", parameters(towers.FAULTS))
def test_fault_of_the_network(name, models, samples, tmp_path):
    fault = towers.FAULTS[name]
    model, reference = models[fault.model]
    faulty = copy.deepcopy(model)
    fault.plant(faulty)
    assert re.search(fault.says, answer(fault, faulty, reference, samples, tmp_path))


@pytest.mark.parametrize("name", parameters(graphs.FAULTS))
def test_fault_of_the_conversion(name, models, samples, tmp_path, monkeypatch):
    fault = graphs.FAULTS[name]
    model, reference = models[fault.model]
    monkeypatch.setattr(Job, GRAPHS[fault.precision], property(fault.plant))
    assert re.search(fault.says, answer(fault, model, reference, samples, tmp_path))


@pytest.mark.parametrize("name", parameters(coreml.FAULTS))
def test_fault_of_a_core_ml_package(name, models, samples, tmp_path, monkeypatch):
    pytest.importorskip("coremltools")
    fault = coreml.FAULTS[name]
    model, reference = models[fault.model]
    job = Job(model=model, tower=fault.tower, calibration=samples, folder=tmp_path)
    said = fault.plant(job, reference, monkeypatch)
    assert re.search(fault.says, said), said


def test_core_ml_packages_without_a_fault_pass(models, samples, tmp_path):
    pytest.importorskip("coremltools")
    model, reference = models["pocket"]
    for tower, precision in (("image", "palette8"), ("text", "fp16")):
        assert coreml.gate(Job(model=model, tower=tower, calibration=samples, folder=tmp_path), reference, precision) == "passes"


@pytest.mark.parametrize("name", parameters(bundles.FAULTS))
def test_fault_of_the_bundle(name, pocket_bundle, tmp_path, capsys):
    fault = bundles.FAULTS[name]
    folder = tmp_path / "bundle"
    shutil.copytree(pocket_bundle, folder)
    fault.plant(folder)
    assert shell.verify([str(folder)]) == 1
    said = capsys.readouterr()
    assert re.search(fault.says, said.out), said.out
    assert "does not pass" in said.err


def test_seven_bits_do_not_saturate_without_vnni(models, samples, tmp_path):
    """The remedy, computed in the same way: nothing saturates, so the emulation gives what this processor gives."""
    model, _ = models["signs"]
    job = Job(model=model, tower="text", calibration=samples, folder=tmp_path)
    emulated = OnnxEncoder(serialize(graphs.saturating(job, seven_bits=True)))(samples.tokens)
    np.testing.assert_allclose(emulated, OnnxEncoder(serialize(quantize_dynamic(job.onnx)))(samples.tokens), atol=2e-2)


def test_no_false_alarm(models, samples, tmp_path, pocket_bundle, capsys):
    """The same models and the same bundle without a fault."""
    for name, (model, reference) in models.items():
        for tower in ("image", "text"):
            for id, artefact in judged(model, reference, tower, ("fp32", "fp16", "int8"), samples, tmp_path / name / tower).items():
                slow = (artefact.reason or "").startswith("not faster than fp32")  # a figure of this machine, no fault
                unseen = (artefact.reason or "").startswith("untrained") and name == "pocket"
                assert artefact.status == "proven" or slow or unseen, (name, id, artefact.reason)
    folder = tmp_path / "bundle"
    shutil.copytree(pocket_bundle, folder)
    bundles.edit(folder)
    assert shell.verify([str(folder)]) == 0
    assert "FAIL" not in capsys.readouterr().out


def test_the_list_says_what_is_planted():
    """README.md has each fault with its sentence, and no other."""
    text = (Path(__file__).parent / "faults/README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \|$", text, flags=re.M)
    assert rows == [(name, fault.line) for faults in LISTS.values() for name, fault in faults.items()]
    assert len({name for name, _ in rows}) == len(rows) >= 30
    assert all(f"## Faults of {title}" in text for title in LISTS)
