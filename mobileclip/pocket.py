"""The trunk of the pocket students: a hybrid for pictures of 64 to 96 pixels.

Built from FastViT's blocks as timm has them, so that folding, pruning and export treat it as they treat the large
models; what differs is what a tiny picture and a CPU ask for:

- the stem goes to a quarter of the resolution in two narrow steps;
- stages are joined by dense 3x3 MobileOne convolutions, not by large-kernel depthwise ones with a channel multiplier,
  whose gradient runs at one fiftieth of the dense ones' arithmetic rate on a CPU;
- feed-forward layers mix over 3x3 pixels, not 7x7: the maps are 16, 8 and 4 pixels wide;
- attention only in the last stage, where 16 to 36 positions remain.
"""

from __future__ import annotations

import torch
from timm.models.fastvit import AttentionBlock, MobileOneBlock, RepConditionalPosEnc, RepMixerBlock
from torch import Tensor, nn

BLOCKS = {"repmixer": RepMixerBlock, "attention": AttentionBlock}


class PocketStage(nn.Module):
    """[downsample by 2] -> [position encoding] -> blocks. (B, C_in, H, W) -> (B, C, H/2, W/2)"""

    def __init__(self, in_dim: int, dim: int, depth: int, mixer: str, mlp_ratio: float, layer_scale: float, downsample: bool) -> None:
        super().__init__()
        self.downsample: nn.Module = (
            MobileOneBlock(in_dim, dim, kernel_size=3, stride=2, use_scale_branch=False) if downsample else nn.Identity()
        )
        self.pos_emb: nn.Module = RepConditionalPosEnc(dim, spatial_shape=(3, 3)) if mixer == "attention" and depth else nn.Identity()
        self.blocks = nn.Sequential(*(BLOCKS[mixer](dim, mlp_ratio=mlp_ratio, layer_scale_init_value=layer_scale) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.pos_emb(self.downsample(x)))


class PocketTrunk(nn.Module):
    """pixels (B, 3, H, W) -> pooled features (B, dims[-1]), or (B, num_classes) when that is not 0."""

    def __init__(
        self,
        *,
        dims: tuple[int, ...] = (32, 64, 160),
        depths: tuple[int, ...] = (0, 2, 2),
        mixers: tuple[str, ...] = ("repmixer", "repmixer", "attention"),
        mlp_ratio: float = 3.0,
        mlp_kernel_size: int = 3,
        layer_scale: float = 0.1,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        self.num_features = dims[-1]
        self.stem = nn.Sequential(
            MobileOneBlock(3, dims[0] // 2, kernel_size=3, stride=2, use_scale_branch=False),
            MobileOneBlock(dims[0] // 2, dims[0], kernel_size=3, stride=2, use_scale_branch=False),
        )
        self.stages = nn.Sequential(
            *(
                PocketStage(dims[max(i - 1, 0)], dims[i], depths[i], mixers[i], mlp_ratio, layer_scale, downsample=i > 0)
                for i in range(len(dims))
            )
        )
        self.norm = nn.BatchNorm2d(dims[-1])
        self.fc: nn.Module = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()
        shrink_mlp_kernels(self, mlp_kernel_size)

    def forward_features(self, pixels: Tensor) -> Tensor:
        """-> (B, dims[-1], H/16, W/16)"""
        return self.norm(self.stages(self.stem(pixels)))

    def forward_head(self, features: Tensor) -> Tensor:
        return self.fc(features.mean(dim=(2, 3)))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(pixels))


def shrink_mlp_kernels(trunk: nn.Module, kernel_size: int) -> None:
    """Replace the 7x7 depthwise convolution inside every feed-forward layer by one of `kernel_size`, newly initialised."""
    for module in list(trunk.modules()):
        mlp = getattr(module, "mlp", None)
        if mlp is None or not hasattr(mlp, "conv") or mlp.conv.conv.kernel_size[0] == kernel_size:
            continue
        old = mlp.conv.conv
        mlp.conv.conv = nn.Conv2d(
            old.in_channels, old.out_channels, kernel_size, padding=kernel_size // 2, groups=old.groups, bias=old.bias is not None
        )
        with torch.no_grad():
            nn.init.trunc_normal_(mlp.conv.conv.weight, std=1 / kernel_size)
