"""Convolution over tokens: the RepMixer block of the hybrid "mct" text tower.

MobileCLIP (Vasu et al. 2024), section 4.2: FastViT's block with kernels of 1 x `kernel`, the tokens being the row. While
training it has branches; `reparameterize` folds them into one convolution. Layers are 2-D, as in Apple's checkpoints.

Shapes: B = batch, T = tokens, W = width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

LAYER_SCALE = 1e-5


class TokenMixer(nn.Module):
    """(B, W, 1, T) -> the same: x + gamma * (skip(x) + norm(conv(x)) - base(x)), three BatchNorms and a depthwise convolution."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.skip = nn.BatchNorm2d(width)
        self.conv = nn.Conv2d(width, width, (1, kernel), padding=(0, kernel // 2), groups=width, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.base = nn.BatchNorm2d(width)
        self.gamma = nn.Parameter(torch.full((width, 1, 1), LAYER_SCALE))

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "reparam_conv"):
            return self.reparam_conv(x)
        return x + self.gamma * (self.skip(x) + self.norm(self.conv(x)) - self.base(x))

    def reparameterize(self) -> None:
        """Put one convolution in the place of the branches (inference statistics)."""
        if hasattr(self, "reparam_conv"):
            return
        scale_skip, shift_skip = _affine(self.skip)
        scale_norm, shift_norm = _affine(self.norm)
        scale_base, shift_base = _affine(self.base)
        gamma = self.gamma.detach().reshape(-1)
        weight = (gamma * scale_norm).reshape(-1, 1, 1, 1) * self.conv.weight.detach()
        weight[..., self.conv.kernel_size[1] // 2] += (1 + gamma * (scale_skip - scale_base)).reshape(-1, 1, 1)
        folded = nn.Conv2d(
            self.conv.in_channels, self.conv.out_channels, self.conv.kernel_size, padding=self.conv.padding, groups=self.conv.groups,
            device=weight.device, dtype=weight.dtype,
        )  # fmt: skip
        folded.weight = nn.Parameter(weight)
        folded.bias = nn.Parameter(gamma * (shift_skip + shift_norm - shift_base))
        for name in ("skip", "conv", "norm", "base", "gamma"):
            delattr(self, name)
        self.reparam_conv = folded


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """What a BatchNorm does in eval mode, as scale and shift (W,)."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight.detach() / torch.sqrt(norm.running_var + norm.eps)
    return scale, norm.bias.detach() - norm.running_mean * scale


class ConvFeedForward(nn.Module):
    """(B, W, 1, T) -> the same: a depthwise convolution over the tokens, then a feed-forward layer at each."""

    def __init__(self, width: int, hidden: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, (1, kernel), padding=(0, kernel // 2), groups=width, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.fc1 = nn.Conv2d(width, hidden, 1)
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(hidden, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(self.norm(self.conv(x)))))


class RepMixerBlock(nn.Module):
    """x_BTW -> x_BTW. There is no mask: padding takes part."""

    def __init__(self, width: int, mlp_ratio: float, kernel: int) -> None:
        super().__init__()
        self.token_mixer = TokenMixer(width, kernel)
        self.mlp = ConvFeedForward(width, int(width * mlp_ratio), kernel)
        self.gamma = nn.Parameter(torch.full((width, 1, 1), LAYER_SCALE))

    def forward(self, x_BTW: Tensor, bias: Tensor | None) -> Tensor:
        x = self.token_mixer(x_BTW.transpose(1, 2).unsqueeze(2))  # (B, W, 1, T)
        x = x + self.gamma * self.mlp(x)
        return x.squeeze(2).transpose(1, 2)

    def reset_parameters(self) -> None:
        """FastViT's initialisation: truncated normal, zero biases."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
