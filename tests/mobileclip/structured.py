"""Models whose embeddings really differ, so that a comparison of them proves something."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def calibrate(model: nn.Module, images: Tensor) -> None:
    """Give BatchNorm real statistics and layer scales a visible size: a fresh model maps every picture to one embedding."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_scale" in name or name.endswith("gamma"):
                parameter.fill_(0.2)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    model.train()
    with torch.no_grad():
        model.encode_image(images)
    model.eval()


def stir(model: nn.Module, seed: int = 0) -> None:
    """Random BatchNorm parameters and statistics everywhere, of the size that training leaves."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(1 + 0.2 * torch.randn(module.weight.shape, generator=generator))
                module.bias.copy_(0.2 * torch.randn(module.bias.shape, generator=generator))
                module.running_mean.copy_(0.2 * torch.randn(module.running_mean.shape, generator=generator))
                module.running_var.copy_(0.5 + torch.rand(module.running_var.shape, generator=generator))
        for name, parameter in model.named_parameters():
            if "layer_scale" in name or name.endswith("gamma"):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def spread(embeddings: Tensor) -> float:
    """Mean cosine between different rows of unit norm; near 1 a comparison of them proves nothing."""
    cosines = embeddings @ embeddings.T
    n = len(embeddings)
    return float((cosines.sum() - cosines.diagonal().sum()) / (n * n - n))
