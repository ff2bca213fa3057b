"""The image tower: a timm backbone and a projection.

Shapes: B = batch, C = 3, H = W = image_size, D = embed_dim.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import timm
import torch
from timm.models.fastvit import FastVit, RepConditionalPosEnc
from torch import Tensor, nn

from mobileclip.config import ImageConfig
from mobileclip.projection import make_projection
from runtime.errors import CheckpointError


class ImageTower(nn.Module):
    """pixels (B, 3, H, W) float32, already normalised -> features (B, D), not of unit norm."""

    def __init__(self, config: ImageConfig, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        own_head = config.projection == "head"
        self.trunk = build_backbone(config.backbone, config.backbone_args, num_classes=embed_dim if own_head else 0)
        self.projection: nn.Module = (
            nn.Identity()
            if own_head
            else make_projection(config.projection, pooled_width(self.trunk), config.projection_hidden, embed_dim)
        )

    def forward(self, pixels: Tensor) -> Tensor:
        return self.projection(self.trunk(pixels))  # (B, D)


def build_backbone(name: str, args: dict[str, Any], num_classes: int) -> nn.Module:
    """A timm backbone by name, or a FastViT of free dimensions for the name "fastvit".

    Raises:
        CheckpointError: timm does not know the name or refuses the arguments.
    """
    if name == "fastvit":
        return _build_fastvit(dict(args), num_classes)
    if not timm.is_model(name):
        raise CheckpointError(f"image backbone '{name}' is unknown to timm {timm.__version__}; take a name from timm.list_models() or 'fastvit'")
    try:
        return timm.create_model(name, pretrained=False, num_classes=num_classes, **args)
    except TypeError as error:
        raise CheckpointError(f"image backbone '{name}' refuses its arguments {args}: {error}") from None


def _build_fastvit(args: dict[str, Any], num_classes: int) -> FastVit:
    """timm's FastViT with JSON-ready arguments; an integer in `pos_embs` is the kernel of a conditional position encoding.

    `mlp_kernel_size` replaces the 7x7 depthwise convolution of every feed-forward layer: at 64 px, feature maps are
    16 to 2 pixels wide, where a kernel of 3 sees as much and trains several times faster on a CPU.
    """
    kernel = args.pop("mlp_kernel_size", 7)
    args["pos_embs"] = tuple(
        None if size is None else partial(RepConditionalPosEnc, spatial_shape=(size, size)) for size in args.get("pos_embs", (None,) * 4)
    )
    unknown = set(args) - set(inspect.signature(FastVit.__init__).parameters)
    if unknown:
        raise CheckpointError(f"image backbone 'fastvit' has no arguments {sorted(unknown)}; see timm.models.fastvit.FastVit")
    trunk = FastVit(num_classes=num_classes, **{key: tuple(value) if isinstance(value, list) else value for key, value in args.items()})
    if kernel != 7:
        for module in list(trunk.modules()):
            mlp = getattr(module, "mlp", None)
            if mlp is not None and hasattr(mlp, "conv") and hasattr(mlp, "fc1"):
                old = mlp.conv.conv
                fresh = nn.Conv2d(old.in_channels, old.out_channels, kernel, padding=kernel // 2, groups=old.groups, bias=old.bias is not None)
                nn.init.trunc_normal_(fresh.weight, std=0.1)
                mlp.conv.conv = fresh
    return trunk


def pooled_width(trunk: nn.Module) -> int:
    """Width of the pooled features, measured: for some backbones timm's `num_features` is the width before the last expansion."""
    size = 64
    if hasattr(trunk, "patch_embed") and hasattr(trunk.patch_embed, "img_size") and trunk.patch_embed.img_size:
        size = trunk.patch_embed.img_size[0]
    training = trunk.training
    trunk.eval()
    with torch.no_grad():
        width = int(trunk(torch.zeros(1, 3, size, size)).shape[-1])
    trunk.train(training)
    return width
