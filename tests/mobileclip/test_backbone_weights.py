"""A student starts from a pretrained backbone: the trunk computes what timm's model computes, and what does not fit is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from distill.projectors import backbone_state
from mobileclip.backbone_weights import load_backbone
from mobileclip.models import create_model
from mobileclip.students import student_config
from runtime.errors import CheckpointError


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ImageNet weights from inside a Python package, with the classifier that timm's file would have."""
    path = tmp_path_factory.mktemp("weights") / "lite0.safetensors"
    state = {name: tensor.contiguous() for name, tensor in backbone_state("tf_efficientnet_lite0").items()}
    save_file({**state, "classifier.weight": torch.zeros(1000, 1280), "classifier.bias": torch.zeros(1000)}, path)
    return path


def student(backbone: str = "tf_efficientnet_lite0"):
    torch.manual_seed(0)
    return create_model(student_config("pocket_s", backbone=backbone, image_size=96))


def test_the_trunk_computes_what_timms_model_computes(weights: Path) -> None:
    model = student()
    before = model.image.projection.state_dict()["weight"].clone()
    report = load_backbone(model, str(weights))
    assert (report.loaded, report.left_out) == (len(backbone_state("tf_efficientnet_lite0")), 2)
    peer = timm.create_model("tf_efficientnet_lite0", num_classes=0)
    peer.load_state_dict(backbone_state("tf_efficientnet_lite0"), strict=True)
    pixels = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(model.image.eval().trunk(pixels), peer.eval()(pixels))
    assert torch.equal(model.image.projection.state_dict()["weight"], before)  # ours, random as it was


@pytest.mark.parametrize("backbone", ["tf_efficientnet_lite1", "mobilenetv4_conv_small"])
def test_weights_of_another_backbone_are_refused_and_nothing_is_changed(weights: Path, backbone: str) -> None:
    model = student(backbone)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="do not fit the model"):
        load_backbone(model, str(weights))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_cannot_be_had_is_one_sentence() -> None:
    with pytest.raises(CheckpointError, match="are no file"):
        load_backbone(student(), "nowhere.pth")
    with pytest.raises(CheckpointError, match="has no pretrained weights called 'tf_efficientnet_lite0.none'; it has tf_efficientnet_lite0"):
        load_backbone(student(), "timm:none")
    with pytest.raises(CheckpointError, match="a backbone of ours"):
        load_backbone(create_model(student_config("pocket_s")), "timm")


def test_timms_own_weights_are_asked_for_and_their_absence_is_one_sentence(tmp_path: Path) -> None:
    """A process of its own: the hub's client decides when it is imported whether it may use the network."""
    code = (
        "from mobileclip.backbone_weights import load_backbone\nfrom mobileclip.models import create_model\nfrom mobileclip.students import student_config\n"
        "load_backbone(create_model(student_config('pocket_s', backbone='tf_efficientnet_lite0', image_size=96)), 'timm')"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "TORCH_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("runtime.errors.CheckpointError: the weights of 'tf_efficientnet_lite0' cannot be had from timm ("), last
    assert "check the network, or give the path of a file" in last
