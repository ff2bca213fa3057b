"""How much each weight matters, looked up on calibration pairs: what structured pruning chooses channels, heads and layers by.

"fisher": half the squared weight times the Fisher information of the affinity distribution, sampled from the model itself: the second-order Taylor term of the
distillation loss between the model and one without that weight (Theis et al. 2018, section 2.2). The first-order term says nothing here: at the model itself the
loss of its own distillation has no slope. "activation": squared weight times the mean square of what it multiplies (Wanda, Sun et al. 2024, section 3).
"norm": squared weight; needs no data.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.towers import Samples
from mobileclip.inherit import effective_weight
from mobileclip.model import ImageTextModel
from runtime.errors import RecipeError

BATCH = 16
FEWEST = 2 * BATCH

Importance = dict[str, Tensor]
"""Name of a parameter to a non-negative tensor of its shape, float64."""


def importance(model: ImageTextModel, samples: Samples, method: str = "fisher", *, seed: int = 0) -> Importance:
    """Importance of every parameter.

    Args:
        model: not folded; left alone.
        samples: calibration pairs, at least 32 ("norm" looks at none).
        method: one of `METHODS`.

    Raises:
        RecipeError: an unknown method, or too few pairs.
    """
    if method not in METHODS:
        raise RecipeError(f"importance is '{method}', expected {', '.join(METHODS)}")
    if method != "norm" and len(samples) < FEWEST:
        raise RecipeError(f"importance by {method} was given {len(samples)} calibration pairs, expected at least {FEWEST}")
    return METHODS[method](model, samples, seed)


def _norm(model: ImageTextModel, samples: Samples, seed: int) -> Importance:
    state = model.state_dict()
    return {name: effective_weight(state, name).detach().double().square() for name, _ in model.named_parameters()}


def _fisher(model: ImageTextModel, samples: Samples, seed: int) -> Importance:
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters())
    found = {name: torch.zeros(parameter.shape, dtype=torch.float64) for name, parameter in parameters.items()}
    was = model.training
    model.eval()
    try:
        for start in range(0, len(samples) - BATCH + 1, BATCH):
            image, text, scale = model(torch.from_numpy(samples.pixels[start : start + BATCH]), torch.from_numpy(samples.tokens[start : start + BATCH]))
            logits = scale * image @ text.T
            loss = torch.zeros(())
            for rows in (logits, logits.T):
                drawn = torch.multinomial(rows.detach().softmax(1), 1, generator=generator)[:, 0]
                loss = loss + F.cross_entropy(rows, drawn)
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
                if gradient is not None:
                    found[name] += (parameter.detach() * gradient).double().square()
    finally:
        model.train(was)
    return {name: value / 2 for name, value in found.items()}


def _activation(model: ImageTextModel, samples: Samples, seed: int) -> Importance:
    squares: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watch(path: str, module: nn.Module) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            values = inputs[0].detach().double()
            axis = 1 if isinstance(module, nn.Conv2d | nn.Conv1d) else -1
            rows = values.movedim(axis, -1).reshape(-1, values.shape[axis])
            squares[path] = squares.get(path, torch.zeros(rows.shape[1], dtype=torch.float64)) + rows.square().sum(0)
            counts[path] = counts.get(path, 0) + len(rows)

        return hook

    layers = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv1d)}
    handles = [module.register_forward_pre_hook(watch(path, module)) for path, module in layers.items()]
    was = model.training
    model.eval()
    try:
        with torch.no_grad():
            for start in range(0, len(samples), BATCH):
                model(torch.from_numpy(samples.pixels[start : start + BATCH]), torch.from_numpy(samples.tokens[start : start + BATCH]))
    finally:
        model.train(was)
        for handle in handles:
            handle.remove()
    found = _norm(model, samples, seed)
    for path in squares:
        weight, mean = found[f"{path}.weight"], squares[path] / counts[path]
        inside = weight.shape[1]
        groups = len(mean) // inside
        per_output = mean.reshape(groups, inside).repeat_interleave(weight.shape[0] // groups, dim=0)  # (out, in / groups)
        found[f"{path}.weight"] = weight * per_output.reshape(*per_output.shape, *[1] * (weight.ndim - 2))
    return found


METHODS: dict[str, Callable[[ImageTextModel, Samples, int], Importance]] = {"fisher": _fisher, "activation": _activation, "norm": _norm}
