"""The text tower's weights in four bits, trained onto their grid: a short distillation of the model into itself with rounded weights.

Rounding alone (`quantize_blocks` with 4 bits) takes most of what four bits cost; weights that know that they will be rounded make up for each other. The forward
pass sees rounded weights, the gradient passes straight through the rounding (Bengio et al. 2013), the target is what the float model computes. What comes out is an
ordinary checkpoint whose weights lie on the grid, so that `mclip export --precision int4` rounds nothing any more.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from distill.losses import affinity_loss
from export.quantize import BLOCK_4
from export.verify import centred_cosines
from mobileclip.model import ImageTextModel
from runtime.errors import RecipeError

LEVELS = 15
FEWEST = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What the training changed; centred cosines to the float model are over texts that it did not see."""

    steps: int
    texts: int
    rounded_p1: float
    """First percentile with the weights merely rounded."""
    trained_p1: float
    rounded_mean: float
    trained_mean: float

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def on_grid(weight: Tensor, block: int = BLOCK_4) -> Tensor:
    """A weight (out, in) in four bits and back: blocks of inputs with a scale and a zero point each, zero on the grid, as ONNX Runtime's MatMulNBits has them.

    Rounding twice changes nothing.
    """
    rows, inside = weight.shape
    padded = F.pad(weight, (0, -inside % block)).reshape(rows, -1, block)
    low, high = padded.amin(-1, keepdim=True).clamp(max=0), padded.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / LEVELS
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = (-low / safe).round().clamp(0, LEVELS)
    rounded = ((padded / safe).round() + zero).clamp(0, LEVELS)
    return ((rounded - zero) * scale).reshape(rows, -1)[:, :inside]


class _Grid(nn.Module):
    """Rounded forward, straight through backward."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (on_grid(weight) - weight).detach()


def gridded(model: ImageTextModel) -> list[nn.Module]:
    """The layers of the text tower whose weights are kept in four bits: the token table and the products of the blocks."""
    inner = [module for module in model.text.blocks.modules() if isinstance(module, nn.Linear)]
    return [model.text.token_embedding, *inner]


def finetune_four_bit(
    model: ImageTextModel, tokens: np.ndarray, image: np.ndarray, *, steps: int = 200, batch: int = 64, learning_rate: float = 1e-4, seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[ImageTextModel, Report]:  # fmt: skip
    """A copy whose text weights lie on the 4-bit grid and compute nearly what the model computes.

    Args:
        model: left alone.
        tokens: (N, T) int32 of captions, at least 64; a tenth is kept aside and judges.
        image: (M, D) float32 embeddings of pictures, unit norm: texts are to see them as the float model's texts do.
        steps: of `batch` texts each; 0 rounds alone.

    Raises:
        RecipeError: too few texts, or settings that make no sense.
    """
    if len(tokens) < FEWEST or len(image) < 2:
        raise RecipeError(f"training on the 4-bit grid was given {len(tokens)} texts and {len(image)} pictures, expected at least {FEWEST} and 2")
    if steps < 0 or batch < 2 or learning_rate <= 0:
        raise RecipeError(f"steps is {steps}, batch {batch}, learning_rate {learning_rate:g}; expected at least 0, at least 2 and above 0")
    aside = len(tokens) // 10 + 1
    judged, seen = tokens[:aside], tokens[aside:]
    teacher = copy.deepcopy(model).eval()
    student = copy.deepcopy(model).eval()
    layers = gridded(student)
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", _Grid())
    exact, rounded = _embed(teacher, judged), _embed(student, judged)
    pictures = torch.from_numpy(image)
    scale = float(model.logit_scale.detach().exp())
    parameters = [parameter for name, parameter in student.text.named_parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, learning_rate, total_steps=max(1, steps), pct_start=0.1)
    rng = np.random.default_rng(seed)
    for step in range(steps):
        rows = torch.from_numpy(seen[rng.integers(0, len(seen), batch)])
        some = pictures[torch.from_numpy(rng.integers(0, len(pictures), batch))]
        with torch.no_grad():
            target = teacher.encode_text(rows)
        found = student.encode_text(rows)
        loss = (1 - (found * target).sum(1)).mean() + affinity_loss(some, found, scale, [some], [target], [scale])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 50 == 0:
            say(f"4 bits: step {step} of {steps}, loss {float(loss.detach()):.4f}")
    trained = _embed(student, judged)
    for layer in layers:
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    before, after = centred_cosines(rounded, exact), centred_cosines(trained, exact)
    report = Report(
        steps=steps, texts=len(tokens), rounded_p1=float(np.percentile(before, 1)), trained_p1=float(np.percentile(after, 1)), rounded_mean=float(before.mean()),
        trained_mean=float(after.mean()),
    )  # fmt: skip
    return student, report


@torch.no_grad()
def _embed(model: ImageTextModel, tokens: np.ndarray) -> np.ndarray:
    parts: Sequence[Tensor] = [model.encode_text(torch.from_numpy(tokens[start : start + 64])) for start in range(0, len(tokens), 64)]
    return torch.cat(list(parts)).numpy()
