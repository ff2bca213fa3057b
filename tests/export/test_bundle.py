"""`mclip export` as a whole, on a pocket-size model: what lies in the bundle, what is refused, what survives a failure."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest

import export.artefacts
import export.to_onnx
import export.to_tensorrt
import runtime
from export.artefacts import TARGETS, parse_targets
from export.bundle import ExportConfig, export_bundle, main
from export.latency_gate import Ratio
from runtime.bundle_zip import folder_of
from runtime.choice import unfit
from runtime.errors import BundleError, CheckpointError, PairsError, ParityError, RecipeError
from runtime.files import file_sha256
from runtime.manifest import read_manifest
from runtime.selfcheck import selfcheck

ROOT = Path(__file__).parents[2]


def snapshot(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): file_sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def settings(pocket_checkpoint, pairs_folder, tmp_path) -> ExportConfig:
    return ExportConfig(checkpoint=pocket_checkpoint, bundle=tmp_path / "bundle", pairs=pairs_folder, samples=12, calibration=8, golden=2, force=True)


def bent(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with its largest kernel half as large again."""
    kernel = max((i for i in model.graph.initializer if len(i.dims) == 4), key=lambda i: np.prod(i.dims))
    kernel.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(kernel) * np.float32(1.5), kernel.name))
    return model


@pytest.fixture
def quick(monkeypatch):
    """Exports that make no graph: what is tested happens around them."""
    monkeypatch.setattr(export.artefacts.Maker, "make", lambda self, tower: [])


def test_manifest_says_what_is_there(pocket_bundle, pocket):
    manifest = read_manifest(pocket_bundle)  # verifies every hash
    assert manifest.embed_dim == pocket.config.embed_dim
    assert manifest.image.image_size == pocket.config.image.image_size
    assert manifest.text.context_length == pocket.config.text.context_length
    assert manifest.text.mask == pocket.config.text.mask
    assert manifest.logit_scale == pytest.approx(float(pocket.logit_scale.detach().exp()))
    assert pocket.config.licence in [entry["licence"] for entry in manifest.licences]
    ids = {artefact.id for artefact in manifest.artefacts}
    for tower in ("image", "text"):
        assert {f"{tower}-onnx-fp32", f"{tower}-onnx-fp32-static", f"{tower}-onnx-fp16", f"{tower}-onnx-int8", f"{tower}-onnx-int8-static"} <= ids
        assert {f"{tower}-{target}-{precision}" for target in ("coreml", "tensorrt") for precision in ("fp32", "fp16", "int8")} <= ids


def test_float_artefacts_are_proven(pocket_bundle):
    least = {"fp32": 0.99999, "fp16": 0.9995}
    floats = [artefact for artefact in read_manifest(pocket_bundle).artefacts if artefact.precision in least]
    assert len(floats) == 14
    for artefact in floats:
        assert artefact.status == "proven", artefact.id
        assert artefact.parity["cosine_min"] >= least[artefact.precision], artefact.id
        assert (pocket_bundle / artefact.path).exists()
        assert artefact.bytes > 10_000
        assert artefact.parity["n"] >= 32


def test_int8_of_untrained_towers_is_there_and_not_called_proven(pocket_bundle):
    """Random weights: what int8 loses cannot be seen in what the checkpoint finds, which is chance."""
    manifest = read_manifest(pocket_bundle)
    found = [artefact for artefact in manifest.artefacts if artefact.precision == "int8"]
    assert len(found) == 8
    for artefact in found:
        assert artefact.status == "unproven"
        assert re.search(r"^untrained\. .* recall@1 is \d of 32, which is chance", artefact.reason)
        assert (pocket_bundle / artefact.path).exists()
        assert artefact.parity["centred_p1"] < 1
        assert "untrained" in unfit(artefact)
    assert {runtime.load(pocket_bundle).choice[tower].id for tower in ("image", "text")} <= {f"{tower}-onnx-fp32{more}" for tower in ("image", "text") for more in ("", "-static")}


def test_latency_names_processor_and_runtime(pocket_bundle):
    for artefact in read_manifest(pocket_bundle).artefacts:
        if artefact.target == "onnx" and artefact.precision != "fp16":
            assert artefact.latency["p50_ms"] > 0
            assert artefact.latency["n"] >= 30
            assert artefact.latency["threads"] == 1
            assert artefact.latency["cpu"]
            assert artefact.latency["runtime"].startswith("onnxruntime ")


def test_bundle_passes_its_self_check(pocket_bundle):
    report = selfcheck(pocket_bundle)
    assert report["ok"], report
    assert report["n"] == 4


def test_files_hold_nothing_of_this_machine(pocket_bundle):
    traces = [str(ROOT).encode(), b"site-packages", os.path.expanduser("~").encode() + b"/", b"class_hierarchy"]
    for path in pocket_bundle.rglob("*"):
        if path.is_file() and path.suffix in (".onnx", ".mlmodel", ".json") and path.name != "tokenizer.json":
            data = path.read_bytes()
            assert [trace for trace in traces if trace in data] == [], path.name
            found = set(re.findall(rb"[a-z_]{4,}\.py\b", data))
            assert found <= ({b"selfcheck.py", b"check.py"} if path.name == "manifest.json" else set()), path.name  # of the kits


def test_graphs_are_whole_and_take_int32(pocket_bundle):
    text = onnx.load(pocket_bundle / "onnx/text.fp32.onnx")
    kinds = {node.op_type for node in text.graph.node}
    assert {"Gelu", "LayerNormalization"} <= kinds
    assert "Erf" not in kinds
    assert text.opset_import[0].version >= 20
    (tokens,) = text.graph.input
    assert tokens.name == "tokens"
    assert tokens.type.tensor_type.elem_type == onnx.TensorProto.INT32
    assert [output.name for output in text.graph.output] == ["text_embedding"]
    static = onnx.load(pocket_bundle / "onnx/image.fp32.static.onnx")
    assert static.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1
    assert onnx.load(pocket_bundle / "onnx/image.fp32.onnx").graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_tensorrt_facts_claim_no_run(pocket_bundle):
    pytest.importorskip("tensorrt_rtx")
    built = [artefact for artefact in read_manifest(pocket_bundle).artefacts if artefact.target == "tensorrt"]
    assert len(built) == 6
    for artefact in built:
        facts = artefact.facts
        assert facts["parsed"]
        assert facts["built"]
        assert facts["ran"] is False
        assert facts["layers"] > 50
        assert facts["engine_bytes"] > 100_000
        assert facts["compute_capability"] == "SM89"
    assert not list(pocket_bundle.rglob("*.engine"))


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("target", "precision", "message"),
    [
        ("onnx,tflite", "fp32", "unknown target 'tflite'; expected some of onnx, onnx-pixels, .*, coreml, .*, or all"),
        ("onnx", "fp32,int3", "unknown precision 'int3'"),
        ("tensorrt", "palette6", "target tensorrt is made in fp32, fp16, int8, but the precisions are palette6"),
        ("", "fp32", "unknown target"),
    ],
)
def test_targets_that_do_not_exist_or_fit(target, precision, message):
    with pytest.raises(RecipeError, match=message):
        parse_targets(target, precision)


def test_all_targets():
    found = parse_targets("all", "fp32, fp16,int8")
    assert list(found) == [name for name in TARGETS if name != "coreml-classifier"]
    assert found["onnx"] == found["coreml"] == found["tensorrt"] == ("fp32", "fp16", "int8")
    assert parse_targets("onnx", "int8") == {"onnx": ("fp32", "int8")}


def test_missing_checkpoint(settings, tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint at"):
        export_bundle(dataclasses.replace(settings, checkpoint=tmp_path / "nothing"))
    assert not settings.bundle.exists()


def test_damaged_checkpoint(settings, pocket_checkpoint, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(pocket_checkpoint, damaged)
    data = bytearray((damaged / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (damaged / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="has changed since it was written"):
        export_bundle(dataclasses.replace(settings, checkpoint=damaged))


def test_missing_pairs(settings, tmp_path):
    with pytest.raises(PairsError):
        export_bundle(dataclasses.replace(settings, pairs=tmp_path / "nothing"))


def test_too_few_samples(settings):
    with pytest.raises(RecipeError, match="--samples is 2, expected at least 4"):
        export_bundle(dataclasses.replace(settings, samples=2))


def test_a_folder_that_is_no_bundle_is_left_alone(settings):
    settings.bundle.mkdir()
    (settings.bundle / "thesis.txt").write_text("years of work")
    with pytest.raises(BundleError, match="exists and is not a bundle"):
        export_bundle(settings)
    assert (settings.bundle / "thesis.txt").read_text() == "years of work"


def test_a_bundle_that_exists_is_replaced_only_by_force(settings, quick):
    careful = dataclasses.replace(settings, force=False)
    export_bundle(careful)
    before = snapshot(settings.bundle)
    with pytest.raises(BundleError, match="the bundle 'bundle' exists; give another place, or --force"):
        export_bundle(dataclasses.replace(careful, seed=1))
    assert snapshot(settings.bundle) == before
    export_bundle(dataclasses.replace(settings, name="other"))
    assert read_manifest(settings.bundle).name == "other"


def test_one_file_holds_the_same_bundle(settings, quick, monkeypatch, tmp_path):
    monkeypatch.setenv("MOBILECLIP_CACHE", str(tmp_path / "cache"))
    export_bundle(settings)
    one = dataclasses.replace(settings, bundle=tmp_path / "bundle.zip", force=False)
    export_bundle(one)
    assert snapshot(folder_of(one.bundle)) == snapshot(settings.bundle)
    first = one.bundle.read_bytes()
    with pytest.raises(BundleError, match="--force"):
        export_bundle(one)
    export_bundle(dataclasses.replace(one, force=True))
    assert one.bundle.read_bytes() == first
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    one.bundle.write_bytes(b"thesis")
    with pytest.raises(BundleError, match="exists and is not a bundle"):
        export_bundle(dataclasses.replace(one, force=True))


def test_damaged_precision_file(settings, pocket_checkpoint, tmp_path):
    copy = tmp_path / "checkpoint"
    shutil.copytree(pocket_checkpoint, copy)
    (copy / "precision.json").write_text('{"towers": 3}')
    with pytest.raises(CheckpointError, match=r"precision\.json' cannot be read"):
        export_bundle(dataclasses.replace(settings, checkpoint=copy))


# -------------------------------------------------------------------------------- failure and interruption


def test_parity_failure_leaves_the_old_bundle(settings, pocket_bundle, monkeypatch):
    shutil.copytree(pocket_bundle, settings.bundle)
    before = snapshot(settings.bundle)

    monkeypatch.setattr(export.to_onnx, "export_onnx", lambda encoder, example: bent(onnx.load(pocket_bundle / "onnx/image.fp32.onnx")))
    with pytest.raises(ParityError, match="artefact image-onnx-fp32: cosine_min"):
        export_bundle(settings)
    assert snapshot(settings.bundle) == before
    assert [path.name for path in settings.bundle.parent.iterdir() if path.name.startswith(".")] == []


@pytest.fixture
def trained(monkeypatch, pocket_bundle):
    """The pocket graphs, not made again, under a gate that takes the checkpoint for trained."""
    monkeypatch.setattr(export.to_onnx, "export_onnx", lambda encoder, example, **options: onnx.load(pocket_bundle / f"tensorrt/{encoder.kind}.fp32.onnx"))
    monkeypatch.setattr(export.artefacts, "at_chance", lambda reference: None)


def test_int8_that_is_not_faster_is_refused(settings, trained, monkeypatch):
    monkeypatch.setattr(export.artefacts, "failure", lambda *arguments: None)
    monkeypatch.setattr(export.artefacts, "ratio", lambda candidate, base: Ratio(median=1.42, low=1.38, high=1.47))
    manifest = export_bundle(dataclasses.replace(settings, precision="int8"))
    for artefact in manifest.artefacts:
        if artefact.precision == "int8":
            assert artefact.status == "refused"
            assert "1.42 times as long" in artefact.reason
    assert sorted(path.name for path in (settings.bundle / "onnx").iterdir()) == [
        "image.fp32.onnx", "image.fp32.static.onnx", "text.fp32.onnx", "text.fp32.static.onnx",
    ]  # fmt: skip
    monkeypatch.setattr(export.artefacts, "ratio", lambda candidate, base: Ratio(median=0.5, low=0.48, high=0.52))
    manifest = export_bundle(dataclasses.replace(settings, precision="int8"))
    assert {a.status for a in manifest.artefacts} == {"proven"}
    assert (settings.bundle / "onnx/text.int8.onnx").stat().st_size < 0.5 * (settings.bundle / "onnx/text.fp32.onnx").stat().st_size
    read_manifest(settings.bundle)


def test_precision_that_loses_too_much_is_refused_or_kept_and_marked(settings, trained):
    strict = dataclasses.replace(settings, precision="int8", centred_p1=0.9999999)
    manifest = export_bundle(strict)
    lossy = [artefact for artefact in manifest.artefacts if artefact.precision == "int8"]
    assert {(artefact.status, artefact.path) for artefact in lossy} == {("refused", None)}
    assert all(re.search(r"centred_p1 0\.9\d+ is below 1, the least for int8", artefact.reason) for artefact in lossy)
    assert not list(settings.bundle.rglob("*int8*"))
    kept = export_bundle(dataclasses.replace(strict, keep_failed=True))
    lossy = [artefact for artefact in kept.artefacts if artefact.precision == "int8"]
    assert {artefact.status for artefact in lossy} == {"failed"}
    assert all((settings.bundle / artefact.path).is_file() for artefact in lossy)
    read_manifest(settings.bundle)
    assert all(entry["ok"] for entry in selfcheck(settings.bundle)["artefacts"])  # marked, never picked


def test_int8_that_a_converter_cannot_make_is_refused_with_what_it_said(settings, trained, monkeypatch):
    def half_done(job, precision):
        model = typed(job, precision)
        if (precision, job.tower) == ("int8", "text"):
            (job.folder / "tensorrt/text.int8.onnx").write_bytes(b"half")
            raise ParityError("the operation Odd has no int8 form")
        return model

    typed = export.to_tensorrt.typed_onnx
    monkeypatch.setattr(export.to_tensorrt, "typed_onnx", half_done)
    manifest = export_bundle(dataclasses.replace(settings, target="onnx,tensorrt", precision="fp32,int8"))
    refused = manifest.artefact("text-tensorrt-int8")
    assert (refused.status, refused.path, refused.reason) == ("refused", None, "the operation Odd has no int8 form")
    assert sorted(path.name for path in (settings.bundle / "tensorrt").glob("text*")) == ["text.fp32.onnx"]
    assert {artefact.status for artefact in manifest.artefacts if artefact.precision == "fp32"} == {"proven"}
    read_manifest(settings.bundle)


def test_a_broken_float_artefact_costs_the_exit_code_and_not_the_others(settings, trained, monkeypatch, capsys):
    """One converter is wrong: its artefact is refused, the others are shipped, the command says so and ends with 1."""
    whole = export.to_onnx.export_onnx

    def crooked(encoder, example, **options):
        model = whole(encoder, example)
        return bent(model) if encoder.half_inside and encoder.kind == "image" else model

    monkeypatch.setattr(export.to_onnx, "export_onnx", crooked)
    numbers = ["--pairs", str(settings.pairs), "--samples", "12", "--calibration", "8", "--golden", "2"]
    assert main([str(settings.checkpoint), str(settings.bundle), *numbers, "--precision", "fp32,fp16"]) == 1
    assert "error: image-onnx-fp16: not what the checkpoint computes, and not shipped" in capsys.readouterr().err
    status = {artefact.id: artefact.status for artefact in read_manifest(settings.bundle).artefacts}
    assert status.pop("image-onnx-fp16") == "refused"
    assert set(status.values()) == {"proven"}


def test_interrupted_export_keeps_the_old_bundle(settings, quick, monkeypatch):
    first = export_bundle(settings)
    before = snapshot(settings.bundle)

    def interrupt(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr("export.bundle.write_manifest", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_bundle(dataclasses.replace(settings, seed=1))
    assert snapshot(settings.bundle) == before
    assert first.name == read_manifest(settings.bundle).name


def test_a_file_system_that_fills_up(settings, pocket_checkpoint, pairs_folder, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system is not permitted here")
    command = [sys.executable, "-m", "mobileclip.cli", "export", str(pocket_checkpoint), str(disk / "bundle"), "--pairs", str(pairs_folder)]
    numbers = ["--samples", "8", "--calibration", "4", "--golden", "2", "--precision", "fp32"]
    try:
        done = subprocess.run([*command, *numbers], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "error: the bundle 'bundle' cannot be written (No space left on device); nothing was left behind; make room" in done.stderr
        assert "Traceback" not in done.stderr
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_kill_during_export_keeps_the_old_bundle_and_a_rerun_replaces_it(settings, quick, monkeypatch):
    export_bundle(settings)
    before = snapshot(settings.bundle)
    command = [sys.executable, "-c", "import sys; from export.bundle import main; sys.exit(main(sys.argv[1:]))", str(settings.checkpoint), str(settings.bundle)]
    child = subprocess.Popen([*command, "--pairs", str(settings.pairs), "--samples", "12", "--force"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    work = settings.bundle.parent / f".{settings.bundle.name}.partial"
    deadline = time.monotonic() + 60
    while not work.is_dir() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert work.is_dir()
    assert snapshot(settings.bundle) == before
    export_bundle(dataclasses.replace(settings, name="second"))
    assert read_manifest(settings.bundle).name == "second"
    assert not work.exists()


def test_move_that_was_killed_half_way_is_undone(settings, quick):
    export_bundle(settings)
    old = settings.bundle.parent / f".{settings.bundle.name}.old"
    settings.bundle.rename(old)  # as a kill between the two renames leaves it
    with pytest.raises(CheckpointError):
        export_bundle(dataclasses.replace(settings, checkpoint=settings.bundle.parent / "nothing"))
    assert old.is_dir()
    export_bundle(dataclasses.replace(settings, name="again"))
    assert read_manifest(settings.bundle).name == "again"
    assert not old.exists()


def test_command_line(settings, quick, capsys):
    arguments = [str(settings.checkpoint), str(settings.bundle), "--pairs", str(settings.pairs), "--samples", "12", "--golden", "2", "--licence", "CC0-1.0", "--json"]
    assert main([*arguments, "--force"]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["name"] == "pocket_s"
    assert output.out.count("\n") == 1
    assert "reparameterised" in output.err
    assert "CC0-1.0" in [entry["licence"] for entry in read_manifest(settings.bundle).licences]
