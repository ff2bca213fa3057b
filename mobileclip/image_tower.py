"""The image tower: a timm backbone and a projection.

Shapes: B = batch, C = 3, H = W = image_size, D = embed_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
from timm.models.fastvit import FastVit, RepConditionalPosEnc
from torch import Tensor, nn

from mobileclip.config import ImageConfig
from mobileclip.pocket import PocketTrunk
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
            else make_projection(config.projection, pooled_width(self.trunk, config.image_size), config.projection_hidden, embed_dim)
        )

    def forward(self, pixels: Tensor) -> Tensor:
        return self.projection(self.trunk(pixels))  # (B, D)


FETCHES = frozenset(("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "checkpoint_path", "cache_dir", "num_classes"))


def build_backbone(name: str, args: dict[str, Any], num_classes: int) -> nn.Module:
    """A backbone of ours (`OWN_BACKBONES`) or of timm, with random weights.

    Raises:
        CheckpointError: nobody knows the name, or the arguments are refused.
    """
    args = {key: tuple(value) if isinstance(value, list) else value for key, value in args.items()}
    if forbidden := sorted(FETCHES & set(args)):
        raise CheckpointError(f"image backbone '{name}' is given {', '.join(forbidden)}, by which timm would read or fetch another file; leave that out of backbone_args")
    if name not in OWN_BACKBONES and not timm.is_model(name):
        raise CheckpointError(f"image backbone '{name}' is unknown to timm {timm.__version__}; take a name from timm.list_models(), or one of {sorted(OWN_BACKBONES)}")
    try:
        if name in OWN_BACKBONES:
            return OWN_BACKBONES[name](args, num_classes)
        return timm.create_model(name, pretrained=False, num_classes=num_classes, **args)
    except Exception as error:  # arguments from a file reach constructors that were not written for that
        raise CheckpointError(f"image backbone '{name}' refuses its arguments {str(args)[:200]}: {type(error).__name__}: {str(error)[:200]}") from None


def _build_fastvit(args: dict[str, Any], num_classes: int) -> FastVit:
    """timm's FastViT with JSON-ready arguments; an integer in `pos_embs` is the kernel of a conditional position encoding."""
    args["pos_embs"] = tuple(
        None if size is None else partial(RepConditionalPosEnc, spatial_shape=(size, size)) for size in args.get("pos_embs", (None,) * 4)
    )
    return FastVit(num_classes=num_classes, **args)


OWN_BACKBONES: dict[str, Callable[[dict[str, Any], int], nn.Module]] = {
    "fastvit": _build_fastvit,
    "pocket": lambda args, num_classes: PocketTrunk(num_classes=num_classes, **args),
}


def pooled_width(trunk: nn.Module, image_size: int) -> int:
    """Width of the pooled features, measured on a picture: for some backbones timm's `num_features` is the width before the last expansion."""
    training = trunk.training
    trunk.eval()
    with torch.no_grad():
        width = int(trunk(torch.zeros(1, 3, image_size, image_size)).shape[-1])
    trunk.train(training)
    return width
