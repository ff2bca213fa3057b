"""Folding: each kind of block and whole models compute the same after it, and the report says what was done."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from timm.models.fastvit import MobileOneBlock, ReparamLargeKernelConv, RepConditionalPosEnc, RepMixer
from torch import nn

from mobileclip.checkpoint import load_checkpoint, save_checkpoint
from mobileclip.config import TextConfig
from mobileclip.folding import fold, foldable, folded_copy, reparameterize, structured_images
from mobileclip.model import ImageTextModel
from mobileclip.presets import PRESETS
from mobileclip.token_mixer import RepMixerBlock, TokenMixer

from .structured import calibrate, stir

BLOCKS = {
    "mobileone, all branches": lambda: MobileOneBlock(12, 12, kernel_size=3),
    "mobileone, depthwise": lambda: MobileOneBlock(12, 12, kernel_size=3, group_size=1),
    "mobileone, strided": lambda: MobileOneBlock(12, 20, kernel_size=3, stride=2),
    "mobileone, without scale branch": lambda: MobileOneBlock(12, 12, kernel_size=3, use_scale_branch=False),
    "mobileone, pointwise": lambda: MobileOneBlock(12, 24, kernel_size=1),
    "mobileone, squeeze and excite": lambda: MobileOneBlock(16, 16, kernel_size=3, group_size=1, use_se=True),
    "mobileone, three convolutions": lambda: MobileOneBlock(12, 12, kernel_size=3, num_conv_branches=3),
    "repmixer": lambda: RepMixer(12, kernel_size=3, layer_scale_init_value=0.5),
    "repmixer, no layer scale": lambda: RepMixer(12, kernel_size=3, layer_scale_init_value=None),
    "position encoding": lambda: RepConditionalPosEnc(12, spatial_shape=(7, 7)),
    "large kernel": lambda: ReparamLargeKernelConv(12, 24, kernel_size=7, stride=2, group_size=1, small_kernel=3),
    "large kernel, squeeze and excite": lambda: ReparamLargeKernelConv(16, 16, kernel_size=7, stride=1, group_size=1, small_kernel=3, use_se=True),
}
LIMITS = {torch.float32: 1e-5, torch.float64: 1e-12}


def same(module: nn.Module, folded: nn.Module, *inputs: torch.Tensor) -> float:
    """Largest difference, in parts of the largest output."""
    with torch.inference_mode():
        before, after = module(*inputs), folded(*inputs)
    assert before.std() > 0.05
    return float((before - after).abs().max() / before.abs().max().clamp(min=1))


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("kind", BLOCKS)
def test_block(kind, dtype):
    torch.manual_seed(0)
    block = BLOCKS[kind]().to(dtype).eval()
    stir(block)
    folded = copy.deepcopy(block)
    assert sum(fold(folded).values()) == 1
    assert not any(isinstance(part, nn.BatchNorm2d) for part in folded.modules())
    assert sum(p.numel() for p in folded.parameters()) < sum(p.numel() for p in block.parameters()) or "position" in kind
    assert same(block, folded, torch.randn(3, block.in_chs if hasattr(block, "in_chs") else next(block.parameters()).shape[0], 16, 16, dtype=dtype)) <= LIMITS[dtype]


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_token_mixer(dtype):
    torch.manual_seed(0)
    mixer = TokenMixer(24, 11).to(dtype).eval()
    stir(mixer)
    folded = copy.deepcopy(mixer)
    assert fold(folded) == {"TokenMixer": 1}
    assert [*folded.state_dict()] == ["reparam_conv.weight", "reparam_conv.bias"]
    assert same(mixer, folded, torch.randn(3, 24, 1, 20, dtype=dtype)) <= LIMITS[dtype]
    again = copy.deepcopy(folded)
    fold(again)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), folded.state_dict().values(), strict=True))


def test_token_mixer_as_the_paper_writes_it():
    """x + gamma * (mixer(x) - norm(x)) with BatchNorm in training mode, written out."""
    torch.manual_seed(0)
    mixer = TokenMixer(8, 5).train()
    x = torch.randn(4, 8, 1, 12)
    mixer.gamma.data.fill_(0.7)

    def norm(values: torch.Tensor) -> torch.Tensor:
        return (values - values.mean((0, 2, 3), keepdim=True)) / torch.sqrt(values.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5)

    convolved = torch.stack([nn.functional.conv1d(x[:, c : c + 1, 0], mixer.conv.weight[c, :, 0][None], padding=2)[:, 0] for c in range(8)], dim=1)[:, :, None]
    assert torch.allclose(mixer(x), x + 0.7 * (norm(x) + norm(convolved) - norm(x)), atol=1e-5)
    block = RepMixerBlock(8, 2.0, 5).eval()
    rows = torch.randn(2, 12, 8)
    assert block(rows, None).shape == rows.shape


WHOLE = ["pocket_s", "pocket_m", "mobileclip_s0", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mobileclip_s1", "mobileclip_s2", "mobileclip_b", "mobileclip_s3"))]


@pytest.mark.parametrize("name", WHOLE)
def test_whole_model(name):
    torch.manual_seed(0)
    model = ImageTextModel(PRESETS[name])
    stir(model.text)
    calibrate(model, structured_images(4, model.config.image.image_size))
    folded, report = reparameterize(model, images=3)
    assert report.max_abs <= 1e-5
    assert report.text_max_abs <= 1e-5
    assert report.embedding_spread < 0.99
    assert (report.text_max_abs > 0) == (model.config.text.kind == "mct")
    assert report.folded == dict(foldable(model))
    assert set(report.folded) <= {"MobileOneBlock", "RepMixer", "RepConditionalPosEnc", "ReparamLargeKernelConv", "TokenMixer"}
    assert folded.config == dataclasses.replace(model.config, folded=True)
    assert report.parameters_after <= report.parameters_before
    assert not model.config.folded


@pytest.mark.parametrize("name", ["pocket_s", pytest.param("mobileclip_s0", marks=pytest.mark.slow)])
def test_whole_model_in_double_precision(name):
    torch.manual_seed(0)
    model = ImageTextModel(PRESETS[name])
    stir(model.text)
    calibrate(model, structured_images(4, model.config.image.image_size))
    model = model.double()
    _, report = reparameterize(model, images=3)
    assert report.max_abs <= 1e-12
    assert report.text_max_abs <= 1e-12


def test_a_folded_hybrid_text_tower_is_saved_and_loaded(tmp_path):
    config = dataclasses.replace(
        PRESETS["pocket_s"], name="hybrid", text=TextConfig(context_length=20, vocab_size=600, width=64, heads=4, layers=1, kind="mct", mask="none")
    )
    torch.manual_seed(0)
    model = ImageTextModel(config).eval()
    stir(model)
    folded, done = folded_copy(model)
    assert done["TokenMixer"] == 2
    loaded = load_checkpoint(save_checkpoint(folded, tmp_path / "folded"))
    tokens = torch.randint(1, 600, (3, 20), dtype=torch.int32)
    with torch.inference_mode():
        assert torch.equal(loaded.encode_text(tokens), folded.encode_text(tokens))
        assert (loaded.encode_text(tokens) - model.encode_text(tokens)).abs().max() <= 1e-5
