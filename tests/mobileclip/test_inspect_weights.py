"""`mclip inspect` on weights: every layout and container is told by itself, without torch wherever there is no pickle."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import mobileclip
from mobileclip.checkpoint import build, save_checkpoint
from mobileclip.convert import layout_shapes
from mobileclip.folding import reparameterize
from mobileclip.inspection import facts_of, main
from mobileclip.model import ImageTextModel, count_parameters
from mobileclip.presets import PRESETS
from runtime.errors import CheckpointError, ClipError
from runtime.files import write_json

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def s0() -> ImageTextModel:
    return build(PRESETS["mobileclip2_s0"])


@pytest.fixture(scope="module")
def pocket() -> ImageTextModel:
    torch.manual_seed(0)
    return mobileclip.create_model("pocket_s")


def hollow(path: Path, name: str, layout: str) -> Path:
    """A safetensors file with every tensor of a model, all zeros, that takes no room on the disk."""
    path.parent.mkdir(exist_ok=True)
    header, end = {}, 0
    for tensor, shape in layout_shapes(PRESETS[name], layout).items():
        dtype, size = ("I64", 8) if tensor.endswith("num_batches_tracked") else ("F32", 4)
        begin, end = end, end + size * math.prod(shape)
        header[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


@pytest.fixture(scope="module")
def files(pocket, tmp_path_factory) -> dict[str, Path]:
    """Weights in every layout and container, named as they are where such files come from."""
    folder = tmp_path_factory.mktemp("weights")
    hollow(folder / "open_clip" / "open_clip_model.safetensors", "mobileclip2_s0", "open_clip")
    hollow(folder / "timm" / "model.safetensors", "mobileclip2_s0", "timm")
    write_json(folder / "timm" / "config.json", {"architecture": "fastvit_mci0", "pretrained_cfg": {"tag": "apple_mclip2_dfndr2b"}})
    state = {f"module.{name}": tensor.half() if tensor.is_floating_point() else tensor for name, tensor in pocket.state_dict().items()}
    torch.save({"epoch": 1, "state_dict": state}, folder / "epoch_1.pt")
    return {
        "apple": hollow(folder / "mobileclip2_s0.pt", "mobileclip2_s0", "apple"),
        "ours": hollow(folder / "ours.safetensors", "mobileclip2_s0", "ours"),
        "open_clip": folder / "open_clip",
        "timm": folder / "timm",
        "pickle": folder / "epoch_1.pt",
    }


@pytest.mark.parametrize("layout", ["apple", "open_clip", "ours"])
def test_model_and_layout_are_told_by_the_file_itself(layout, files, s0):
    facts = facts_of(str(files[layout]))
    expected = count_parameters(s0)
    assert (facts["kind"], facts["layout"], facts["model"]) == ("weights", layout, "mobileclip2_s0")
    assert facts["names"] == ["mobileclip2_s0"]
    assert facts["folded"] is False
    assert facts["dtypes"].keys() == {"float32", "int64"}
    assert facts["parameters"]["text"] == expected["text"]
    # Apple's projections have no bias, which is zeros elsewhere.
    assert facts["parameters"]["image"] == expected["image"] - (512 if layout == "apple" else 0)
    assert facts["parameters"]["total"] == facts["parameters"]["image"] + facts["parameters"]["text"] + 1
    preprocessing = facts["preprocessing"]
    assert preprocessing == {"image_size": 256, "mean": [0.0] * 3, "std": [1.0] * 3, "interpolation": "bilinear", "crop_pct": 1.0}
    assert (facts["context_length"], facts["text_mask"], facts["embed_dim"]) == (77, "none", 512)
    assert "research only" in facts["licence"]
    json.dumps(facts, allow_nan=False)


def test_a_pickle_of_training_is_told_too(files, pocket):
    facts = facts_of(str(files["pickle"]))
    assert (facts["layout"], facts["model"], facts["text_mask"]) == ("ours", "pocket_s", "causal")
    assert facts["dtypes"].keys() == {"float16", "int64"}
    assert facts["parameters"]["total"] == count_parameters(pocket)["total"]


@pytest.mark.parametrize("name", ["mobileclip_s0", "mobileclip_b_lt", "mobileclip2_l_14"])
def test_preprocessing_and_mask_are_those_of_the_variant(name, tmp_path):
    facts = facts_of(str(hollow(tmp_path / name / "model.safetensors", name, "ours")))
    assert facts["model"] == name
    image, text = PRESETS[name].image, PRESETS[name].text
    assert facts["preprocessing"]["image_size"] == image.image_size
    assert facts["preprocessing"]["mean"] == list(image.mean)
    assert facts["preprocessing"]["interpolation"] == image.interpolation
    assert facts["text_mask"] == text.mask


def test_an_image_tower_alone_has_no_text_facts(files):
    facts = facts_of(str(files["timm"]))
    assert facts["layout"] == "timm"
    assert facts["file"] == "model.safetensors"
    assert (facts["names"], facts["model"]) == (["mobileclip_s0", "mobileclip2_s0"], "mobileclip2_s0")  # by timm's tag
    assert facts["parameters"]["image"] == facts["parameters"]["total"]
    assert not {"context_length", "text_mask"} & set(facts)
    assert "only names tell them apart" in facts["note"]


def test_the_place_tells_models_of_one_architecture_apart(files, tmp_path):
    for place, expected in (
        ("mobileclip2_s0_image.safetensors", "mobileclip2_s0"),
        ("apple_mclip2_s0/x.safetensors", "mobileclip2_s0"),
        ("models--timm--MobileCLIP2-S0-image/snapshots/0123/model.safetensors", "mobileclip2_s0"),
        ("MobileCLIP-S0/model.safetensors", "mobileclip_s0"),
        ("x.safetensors", "mobileclip_s0"),
    ):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).symlink_to(files["timm"] / "model.safetensors")
        assert facts_of(str(tmp_path / place))["model"] == expected, place


def test_what_convert_writes_is_inspected_as_what_it_is(tmp_path):
    from mobileclip.conversion import convert

    model = build(PRESETS["mobileclip2_s0"])
    for tensor in model.state_dict().values():
        tensor.zero_()
    save_file(model.state_dict(), tmp_path / "mobileclip2_s0.safetensors")
    convert(tmp_path / "mobileclip2_s0.safetensors", tmp_path / "timm", to="timm")  # like a checkpoint of ours: config.json, model.safetensors, receipt.json
    facts = facts_of(str(tmp_path / "timm"))
    assert (facts["kind"], facts["layout"], facts["model"], facts["verified"]) == ("weights", "timm", "mobileclip2_s0", 2)


def test_a_folder_that_convert_wrote_is_verified(pocket, tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    save_file(pocket.state_dict(), path)
    data = path.read_bytes()
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    listed = {path.name: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size} for path in tmp_path.iterdir()}
    write_json(tmp_path / "receipt.json", {"schema": 1, "kind": "weights", "files": listed, "model": "pocket_s", "source": "a.pt"})
    assert main([str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "2 files match their hashes" in shown
    assert "  layout: ours\n  model: pocket_s\n" in shown
    assert '"source": "a.pt"' in shown
    path.write_bytes(data[:-1] + b"\1")
    with pytest.raises(CheckpointError, match="was changed: its sha256 is"):
        main([str(tmp_path)])
    path.unlink()
    with pytest.raises(CheckpointError, match="is listed in receipt.json but missing"):
        main([str(tmp_path)])
    (tmp_path / "receipt.json").write_text('{"kind": "weights"', encoding="utf-8")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        main([str(tmp_path)])
    write_json(tmp_path / "receipt.json", {"kind": "weights", "files": 3})
    with pytest.raises(CheckpointError, match="lists no files"):
        main([str(tmp_path)])


def test_our_checkpoints_stay_checkpoints(pocket, tmp_path):
    folder = save_checkpoint(pocket, tmp_path / "ckpt")
    assert facts_of(str(folder))["kind"] == "checkpoint"
    facts = facts_of(str(folder / "model.safetensors"))
    assert (facts["layout"], facts["model"]) == ("ours", "pocket_s")
    assert (facts["context_length"], facts["text_mask"]) == (PRESETS["pocket_s"].text.context_length, "causal")
    (folder / "receipt.json").unlink()
    with pytest.raises(CheckpointError, match="interrupted"):
        facts_of(str(folder))


def test_folded_weights_are_said_to_be(pocket, tmp_path):
    folded = reparameterize(pocket, images=2)[0]
    save_file({name: tensor.contiguous() for name, tensor in folded.state_dict().items()}, tmp_path / "a.safetensors")
    facts = facts_of(str(tmp_path / "a.safetensors"))
    assert (facts["folded"], facts["model"]) == (True, "pocket_s")
    assert facts["parameters"]["total"] == count_parameters(folded)["total"]


def test_weights_of_another_model_are_described_and_said_to_be_unknown(tmp_path, capsys):
    save_file({"encoder.layer.0.weight": torch.zeros(3, 4)}, tmp_path / "a.safetensors")
    assert main([str(tmp_path / "a.safetensors"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["layout"], facts["model"], facts["tensors"], facts["parameters"]) == (None, None, 1, {"total": 12})
    assert "is no MobileCLIP" in facts["unrecognised"]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda folder: (folder / "a.pt").write_bytes(b"PK\x03\x04" + bytes(99)), "cut off"),
        (lambda folder: torch.save({"a": Path("x")}, folder / "a.pt"), "would run code"),
        (lambda folder: (folder / "a.pt").write_text("hello, this is text", encoding="utf-8"), "of no known kind"),
        (lambda folder: (folder / "b.pt").write_bytes(b"x") and (folder / "a.pt").write_bytes(b"x"), "2 files that may be the weights"),
    ],
)
def test_damaged_weights_end_in_one_sentence(make, expected, tmp_path):
    make(tmp_path)
    with pytest.raises(ClipError, match=expected):
        facts_of(str(tmp_path))
    with pytest.raises(ClipError, match="of no known kind|does not exist|cut off|would run code|known"):
        facts_of(str(tmp_path / "a.pt"))


def test_the_base_install_inspects_safetensors_and_names_the_extra_for_pickles(files, tmp_path):
    code = """
import sys
for name in ("torch", "timm", "open_clip", "torchvision", "huggingface_hub"):
    sys.modules[name] = None
from mobileclip.cli import main
print(main(["inspect", sys.argv[1]]), main(["inspect", sys.argv[2]]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(files["open_clip"]), str(files["pickle"])], capture_output=True, text=True, cwd=ROOT, timeout=60,
    )  # fmt: skip
    assert "model: mobileclip2_s0" in done.stdout
    assert done.stdout.splitlines()[-1] == "0 1"
    assert done.stderr.startswith(f"error: reading '{files['pickle']}', a torch pickle, needs the package 'torch'")
    assert len(done.stderr.splitlines()) == 1
