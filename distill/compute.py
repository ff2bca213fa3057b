"""How the towers are computed while training: on which device, in which precision, compiled, with or without kept activations.

None of this changes what a step asks for; with float32 on a CPU nothing changes at all. Weights, optimiser, losses and the average stay float32.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distill.ghost_norm import one_update
from distill.objective import encode_texts
from mobileclip.model import ImageTextModel
from runtime.errors import RecipeError

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Compute:
    """Settings of a run, as `TrainConfig` has them."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: Precision = "fp32"
    grad_checkpointing: bool = False

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext()

    def tensor(self, array: np.ndarray) -> Tensor:
        """On the device; on the CPU it shares the array's memory."""
        tensor = torch.from_numpy(array)
        return tensor if self.device.type == "cpu" else tensor.to(self.device, non_blocking=True)

    def encode_image(self, model: ImageTextModel, pixels: np.ndarray) -> Tensor:
        """pixels (B, 3, S, S) -> (B, D) float32 of unit norm."""
        with self.autocast():
            features = model.encode_image(self.tensor(pixels), normalize=False)
        return F.normalize(features.float(), dim=-1)

    def encode_text(self, model: ImageTextModel, tokens: np.ndarray) -> Tensor:
        """tokens (B, T) int32 -> (B, D) float32 of unit norm."""
        with self.autocast():
            return encode_texts(model, tokens)

    def step(self, model: ImageTextModel) -> AbstractContextManager[Any]:
        """Around the passes of a step. Activations that are computed twice must move BatchNorm's statistics once."""
        return one_update(model) if self.grad_checkpointing else nullcontext()


def device_of(name: str) -> torch.device:
    """cpu, cuda, cuda:N, or auto: the GPU of this process where there is one (LOCAL_RANK, as torchrun numbers them).

    Raises:
        RecipeError: torch does not know the name, or there is no such device.
    """
    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RecipeError(f"device '{name}' is unknown to torch; give auto, cpu, cuda or cuda:0") from None
    if device.type not in ("cpu", "cuda"):
        raise RecipeError(f"device '{name}' is not one that training was made for; give auto, cpu, cuda or cuda:0")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise RecipeError(f"device '{name}' is not there (torch {torch.__version__} sees {torch.cuda.device_count()} GPUs); give cpu, or auto")
    return device


def compile_towers(model: ImageTextModel) -> None:
    """torch.compile both towers in place; names of weights stay. Pictures have one shape, so has all but the text's length.

    The first steps take minutes. On a CPU it needs a C++ compiler.
    """
    model.image.compile(dynamic=False)
    model.text.compile(dynamic=True)


def checkpoint_blocks(model: ImageTextModel) -> int:
    """Keep only what goes into a block; what happens inside is computed again for the gradient. Returns the number of blocks.

    Blocks are those of the text tower and, in the image tower, what timm checkpoints itself, or else the stages of its trunk.

    Raises:
        RecipeError: the image backbone has no blocks to be seen.
    """
    found = sum(_checkpointed(block) for block in model.text.blocks)
    trunk = model.image.trunk
    stages = [stage for stage in _stages(trunk) if any(True for _ in stage.parameters())]
    if not stages and not hasattr(trunk, "set_grad_checkpointing"):
        raise RecipeError(f"image backbone '{model.config.image.backbone}' has no stages that could be checkpointed; leave --grad-checkpointing out, or use --ghost-batch")
    if not stages:
        trunk.set_grad_checkpointing(True)
        return found + 1
    return found + sum(_checkpointed(stage) for stage in stages)


def _stages(trunk: nn.Module) -> list[nn.Module]:
    """The trunk's stages, or the blocks of those that are plain sequences of them."""
    holder = next((getattr(trunk, name) for name in ("stages", "blocks", "layers") if isinstance(getattr(trunk, name, None), (nn.Sequential, nn.ModuleList))), [])
    found: list[nn.Module] = []
    for stage in holder:
        inner = stage.blocks if isinstance(getattr(stage, "blocks", None), (nn.Sequential, nn.ModuleList)) else stage
        found.extend(inner if isinstance(inner, (nn.Sequential, nn.ModuleList)) else [inner])
    return found


def _checkpointed(module: nn.Module) -> int:
    forward: Callable[..., Any] = module.forward

    def again(*args: Any) -> Any:
        if not (module.training and torch.is_grad_enabled()):
            return forward(*args)
        return checkpoint(forward, *args, use_reentrant=False)

    module.forward = again  # type: ignore[method-assign]
    return 1
