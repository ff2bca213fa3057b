"""`mclip compress`: prune, recover from a real store, report; and what happens when it is run again or given nonsense."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from distill.reinforce import ReinforceConfig, reinforce
from export.artefacts import Maker
from export.compress import CompressConfig, compress, main
from export.precision_file import Precisions, read_precisions
from mobileclip.checkpoint import load_checkpoint, verify_receipt
from runtime.errors import CheckpointError, RecipeError, TrainingError


@pytest.fixture
def settings(pocket_checkpoint, pairs_folder, tmp_path) -> CompressConfig:
    return CompressConfig(checkpoint=pocket_checkpoint, out=tmp_path / "small", calibrate=pairs_folder, validation=pairs_folder, calibration=24, recover_samples=256)


@pytest.fixture(scope="module")
def store(pocket_checkpoint, pairs_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("store") / "store"
    reinforce(ReinforceConfig(pairs=str(pairs_folder), store=str(folder), teachers=(str(pocket_checkpoint),), augmentations=2, workers=1))
    return folder


def test_without_a_store_it_prunes_and_reports(settings, pocket):
    lines: list[str] = []
    report = compress(settings, lines.append)
    model = load_checkpoint(settings.out)
    assert report["after"]["parameters"]["total"] == sum(p.numel() for p in model.parameters()) < report["before"]["parameters"]["total"]
    assert model.config.ffn_widths == {path: new for path, (_, new) in report["prune"]["widths"].items()}
    assert 0 <= report["after"]["retrieval"]["text_to_image"]["all"]["recall@5"]["value"] <= 1
    assert report["after"]["bytes"] == (settings.out / "model.safetensors").stat().st_size
    assert any(line.startswith("pruned 25%") for line in lines)
    receipt = verify_receipt(settings.out)  # precision.json is covered by it
    assert "precision.json" in receipt["files"]
    assert receipt["compress"]["source_sha256"] == report["source_sha256"]
    assert read_precisions(settings.out).allowed["text"]["onnx"] == ["fp32", "fp16", "int8", "int4"]


def test_recovery_trains_from_the_store_and_a_rerun_does_nothing(settings, store, monkeypatch):
    settings = dataclasses.replace(settings, store=store)
    report = compress(settings)
    pruned, recovered = load_checkpoint(settings.out / "pruned"), load_checkpoint(settings.out)
    assert pruned.config.ffn_widths == recovered.config.ffn_widths != {}
    changed = [name for name, value in pruned.state_dict().items() if not (value == recovered.state_dict()[name]).all()]
    assert "text.blocks.0.mlp.fc2.weight" in changed
    assert (settings.out / "metrics.jsonl").read_text()
    monkeypatch.setattr("export.compress.prune_ffn", None)
    monkeypatch.setattr("distill.train.train", None)
    assert compress(settings) == json.loads(json.dumps(report))


def test_interrupted_recovery_goes_on_from_the_pruned_checkpoint(settings, store, monkeypatch):
    settings = dataclasses.replace(settings, store=store)

    def interrupt(config):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("distill.train.train", interrupt)
        with pytest.raises(KeyboardInterrupt):
            compress(settings)
    assert load_checkpoint(settings.out / "pruned").config.ffn_widths
    assert not (settings.out / "receipt.json").exists()
    monkeypatch.setattr("export.compress.prune_ffn", None)  # pruning is not done twice
    assert compress(settings)["prune"]["ratio"] == 0.25


def test_other_settings_do_not_overwrite_a_finished_run(settings, store):
    settings = dataclasses.replace(settings, store=store, validation=None)
    compress(settings)
    kept = (settings.out / "model.safetensors").read_bytes()
    with pytest.raises(TrainingError):
        compress(dataclasses.replace(settings, ratio=0.5))
    assert (settings.out / "model.safetensors").read_bytes() == kept


def test_bad_input(settings, tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint at"):
        compress(dataclasses.replace(settings, checkpoint=tmp_path / "nothing"))
    with pytest.raises(RecipeError, match="would overwrite the one that it is made from"):
        compress(dataclasses.replace(settings, out=settings.checkpoint))
    with pytest.raises(RecipeError, match="ratio is 1.5"):
        compress(dataclasses.replace(settings, ratio=1.5, validation=None))


def test_command_line(settings, capsys):
    assert main([str(settings.checkpoint), str(settings.out), "--calibrate", str(settings.calibrate), "--calibration", "16", "--json"]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["prune"]["ratio"] == 0.25
    assert output.out.count("\n") == 1


def test_what_precision_json_does_not_name_is_not_restricted():
    """A target that was added after the compression."""
    allowed = {tower: {"onnx": ["fp32"], "coreml": ["fp16"]} for tower in ("image", "text")}
    nothing: Any = None
    targets = {"onnx": ("fp32", "int8"), "coreml": ("fp32", "fp16"), "coreml-image": ("fp32", "fp16")}
    maker = Maker(
        model=nothing, samples=nothing, reference=nothing, calibration=nothing, folder=nothing, targets=targets, say=lambda line: None, precisions=Precisions(allowed=allowed)
    )
    assert {target: maker._precisions("image", target) for target in targets} == {"onnx": ("fp32",), "coreml": ("fp16",), "coreml-image": ("fp32", "fp16")}
