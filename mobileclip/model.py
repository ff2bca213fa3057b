"""The two-tower image-text model.

Shapes: B = batch, T = tokens, D = embed_dim. The parameter `logit_scale` holds a logarithm, as checkpoints of the field
expect; everywhere outside this file `logit_scale` means the multiplicative value.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobileclip.config import ModelConfig
from mobileclip.image_tower import ImageTower
from mobileclip.text_tower import TextTower
from runtime.errors import CheckpointError


class ImageTextModel(nn.Module):
    """Two towers into one space of `config.embed_dim` dimensions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.image = ImageTower(config.image, config.embed_dim)
        self.text = TextTower(config.text, config.embed_dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(config.logit_scale)))
        self.logit_bias = nn.Parameter(torch.tensor(config.logit_bias)) if config.logit_bias is not None else None
        for path, width in config.ffn_widths.items():
            resize_ffn(self, path, width)

    def encode_image(self, pixels: Tensor, normalize: bool = True) -> Tensor:
        """pixels (B, 3, H, W) float32, normalised by the config's mean and std -> (B, D), unit norm unless told otherwise."""
        features = self.image(pixels)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, tokens: Tensor, normalize: bool = True) -> Tensor:
        """tokens (B, T) int32 -> (B, D), unit norm unless told otherwise."""
        features = self.text(tokens)
        return F.normalize(features, dim=-1) if normalize else features

    def forward(self, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> image features (B, D), text features (B, D), logit_scale (multiplicative, scalar)."""
        return self.encode_image(pixels), self.encode_text(tokens), self.logit_scale.exp()


def resize_ffn(model: nn.Module, path: str, width: int) -> None:
    """Give the feed-forward module at `path` (with layers fc1 and fc2) a hidden width; its weights are new.

    Used to rebuild a pruned model before its weights are loaded.

    Raises:
        CheckpointError: there is no such module.
    """
    try:
        mlp = model.get_submodule(path)
        fc1, fc2 = mlp.fc1, mlp.fc2
    except AttributeError:
        raise CheckpointError(f"ffn_widths names '{path}', where this model has no feed-forward layer with fc1 and fc2") from None
    if isinstance(fc1, nn.Linear):
        mlp.fc1 = nn.Linear(fc1.in_features, width, bias=fc1.bias is not None)
        mlp.fc2 = nn.Linear(width, fc2.out_features, bias=fc2.bias is not None)
    else:
        mlp.fc1 = nn.Conv2d(fc1.in_channels, width, kernel_size=1, bias=fc1.bias is not None)
        mlp.fc2 = nn.Conv2d(width, fc2.out_channels, kernel_size=1, bias=fc2.bias is not None)


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters of the whole model and of its parts."""
    parts = {"image": model.image, "text": model.text, "token_embedding": model.text.token_embedding}
    return {"total": sum(p.numel() for p in model.parameters()), **{name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}}
