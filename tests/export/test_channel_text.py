"""The text tower with channels first computes what the tower computes, for every kind of mask, norm, pool and projection."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from export.channel_text import ChannelNorm, ChannelText
from mobileclip.config import TextConfig
from mobileclip.text_tower import TextTower
from runtime.errors import RecipeError

CONFIG = TextConfig(context_length=12, vocab_size=300, width=32, heads=4, layers=2)


def rows(count: int = 6) -> torch.Tensor:
    rng = np.random.default_rng(0)
    tokens = np.zeros((count, 12), np.int32)
    for row, length in zip(tokens, itertools.cycle((3, 7, 12)), strict=False):
        row[: length - 1] = rng.integers(1, 298, length - 1)
        row[0], row[length - 1] = 298, 299
    return torch.from_numpy(tokens)


@pytest.mark.parametrize("mask", ["causal", "pad", "none"])
@pytest.mark.parametrize(("norm", "pool"), [("pre", "eot"), ("post", "mean"), ("pre", "mean"), ("post", "eot")])
@pytest.mark.parametrize("projection", ["linear", "mlp"])
def test_the_same_function(mask, norm, pool, projection):
    torch.manual_seed(3)
    config = dataclasses.replace(CONFIG, mask=mask, norm=norm, pool=pool, projection=projection, embedding_norm=norm == "post", embedding_dim=16 if pool == "mean" else 0)
    tower = TextTower(config, 24).eval()
    for parameter in tower.parameters():
        parameter.data.normal_(std=0.3) if parameter.ndim > 1 else parameter.data.add_(0.1 * torch.randn_like(parameter))
    tokens = rows()
    with torch.no_grad():
        expected, found = tower(tokens), ChannelText(tower)(tokens)
    assert expected.std() > 0.05
    torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


def test_the_norm_survives_half_precision():
    norm = torch.nn.LayerNorm(64)
    x = 40 * torch.randn(2, 64, 1, 5)
    x[:, 3] = 3000
    expected = norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    found = ChannelNorm(norm).half()(x.half()).float()
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)


def test_other_blocks_are_refused():
    with pytest.raises(RecipeError, match="this one is 'mct'; leave --text-layout out"):
        ChannelText(TextTower(dataclasses.replace(CONFIG, kind="mct", mask="none"), 24))
