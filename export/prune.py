"""Structured pruning of feed-forward layers: fewer hidden units, everything else untouched.

Which units go is decided on data: a unit's worth is the variance that it contributes to the layer's output, and the second
linear map is then refitted by ridge regression, so that the units that stay take over what those that went had in common
with them (the reconstruction step of "Channel Pruning for Accelerating Very Deep Neural Networks", He et al. 2017,
section 3.1). The cut itself is made through torch-pruning's dependency graph.

Only hidden widths of modules with `fc1` and `fc2` are cut. Whole-network width pruning fails on FastViT: its depthwise
convolutions with multiplier 2 are not what torch-pruning takes for depthwise.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from export.to_onnx import plain_attention
from export.towers import TOWERS, Samples, Tower, embed, image_encoder, text_encoder
from mobileclip.model import ImageTextModel, count_parameters
from runtime.errors import MissingExtraError, RecipeError

MULTIPLE = 8  # hidden widths stay multiples of this: vector units and int8 kernels like it
RIDGE = 1e-2  # relative to the mean variance of the kept units; pulls towards the weights as they were
ROWS_PER_BATCH = 4096  # positions of a batch that enter the statistics of one layer


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What pruning did, before any recovery. Cosines are to the unpruned model, on calibration samples that were kept aside."""

    ratio: float
    parameters_before: int
    parameters_after: int
    widths: dict[str, tuple[int, int]]
    """Module path to hidden width before and after."""
    image_cosine_mean: float
    text_cosine_mean: float

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(slots=True)
class _Moments:
    """Running sums of a layer's hidden activations."""

    count: int
    total: Tensor  # (hidden,) float64
    products: Tensor  # (hidden, hidden) float64

    def mean(self) -> Tensor:
        return self.total / self.count

    def covariance(self) -> Tensor:
        mean = self.mean()
        return self.products / self.count - torch.outer(mean, mean)


def feed_forwards(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of every feed-forward layer of the towers; projections to the shared space are not among them."""
    for path, module in model.named_modules():
        fc1, fc2 = getattr(module, "fc1", None), getattr(module, "fc2", None)
        same = isinstance(fc1, nn.Linear) and isinstance(fc2, nn.Linear)
        pointwise = isinstance(fc1, nn.Conv2d) and isinstance(fc2, nn.Conv2d) and fc1.kernel_size == fc2.kernel_size == (1, 1)
        if path.rpartition(".")[2] == "mlp" and (same or pointwise):
            yield path, module


def kept_width(hidden: int, ratio: float) -> int:
    """How many of `hidden` units stay: the nearest multiple of 8 to hidden * (1 - ratio), at least 8, never more than there are."""
    return min(hidden, max(MULTIPLE, round(hidden * (1 - ratio) / MULTIPLE) * MULTIPLE))


def prune_ffn(model: ImageTextModel, ratio: float, calibration: Samples, *, towers: tuple[Tower, ...] = TOWERS) -> tuple[ImageTextModel, Report]:
    """Cut `ratio` of the hidden units of every feed-forward layer.

    Args:
        model: left alone. Best unfolded, so that training can go on; a folded one works too.
        ratio: share of hidden units that go, inside [0, 1).
        calibration: real pictures and captions, at least 8. The first three quarters decide which, the rest judges.

    Returns:
        A pruned copy in eval mode whose config says the new widths, and the report.

    Raises:
        RecipeError: the ratio is out of range, or there is no feed-forward layer.
        MissingExtraError: torch-pruning is not installed.
    """
    if not 0 <= ratio < 1:
        raise RecipeError(f"ratio is {ratio}, expected at least 0 and below 1")
    if len(calibration) < 8:
        raise RecipeError(f"pruning was given {len(calibration)} calibration samples, expected at least 8")
    fitted, judge = calibration.head(3 * len(calibration) // 4), calibration.tail(len(calibration) - 3 * len(calibration) // 4)
    pruned: ImageTextModel = copy.deepcopy(model).eval()
    layers = {path: module for path, module in feed_forwards(pruned) if path.split(".")[0] in towers}
    if not layers:
        raise RecipeError(f"model '{model.config.name}' has no feed-forward layers with fc1 and fc2 in {' and '.join(towers)}; there is nothing to prune")
    with plain_attention():
        moments = _hidden_moments(pruned, layers, fitted)
        widths = {}
        for tower in towers:
            inside = {path: module for path, module in layers.items() if path.split(".")[0] == tower}
            if inside:
                widths.update(_cut_tower(pruned, tower, inside, moments, ratio, calibration))
    after = {path: new for path, (_, new) in widths.items()}
    pruned.config = dataclasses.replace(model.config, ffn_widths={**model.config.ffn_widths, **after})
    report = Report(
        ratio=ratio,
        parameters_before=count_parameters(model)["total"],
        parameters_after=count_parameters(pruned)["total"],
        widths=widths,
        image_cosine_mean=_agreement(embed(image_encoder(model), judge.pixels), embed(image_encoder(pruned), judge.pixels)),
        text_cosine_mean=_agreement(embed(text_encoder(model), judge.tokens), embed(text_encoder(pruned), judge.tokens)),
    )
    return pruned, report


def _agreement(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum(1).mean())


@torch.no_grad()
def _hidden_moments(model: ImageTextModel, layers: dict[str, nn.Module], calibration: Samples) -> dict[str, _Moments]:
    """Moments of what enters each fc2, over the calibration samples; padding that a text tower ignores does not count."""
    moments: dict[str, _Moments] = {}
    valid: Tensor | None = None

    def watch(path: str, module: nn.Module) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            hidden = inputs[0]
            if hidden.ndim == 4 and isinstance(module, nn.Conv2d):
                hidden = hidden.movedim(1, -1)
            elif valid is not None and hidden.ndim == 3:
                hidden = hidden[valid]
            rows = hidden.reshape(-1, hidden.shape[-1])
            rows = rows[:: max(1, len(rows) // ROWS_PER_BATCH)].double()
            found = moments.setdefault(path, _Moments(0, torch.zeros(rows.shape[1]).double(), torch.zeros(rows.shape[1], rows.shape[1]).double()))
            found.count += len(rows)
            found.total += rows.sum(0)
            found.products += rows.T @ rows

        return module.register_forward_pre_hook(hook)

    handles = [watch(path, module.fc2) for path, module in layers.items()]
    try:
        for start in range(0, len(calibration), 32):
            valid = None
            model.image(torch.from_numpy(calibration.pixels[start : start + 32]))
            tokens = torch.from_numpy(calibration.tokens[start : start + 32])
            valid = None if model.config.text.mask == "none" else model.text.valid_tokens(tokens)
            model.text(tokens)
    finally:
        for handle in handles:
            handle.remove()
    return moments


def _cut_tower(
    model: ImageTextModel, tower: Tower, layers: dict[str, nn.Module], moments: dict[str, _Moments], ratio: float, calibration: Samples
) -> dict[str, tuple[int, int]]:
    try:
        import torch_pruning as tp
    except ImportError as error:
        raise MissingExtraError("torch-pruning", "export", "pruning") from error
    root = getattr(model, tower)
    # Parameters that belong to no layer that torch-pruning knows; their sizes do not change.
    loose = [(p, p.ndim - 1) for name, p in root.named_parameters() if name.rpartition(".")[2] in ("gamma", "positional_embedding", "cls_token", "pos_embed")]
    example = torch.from_numpy(calibration.inputs(tower)[:1])
    graph = tp.DependencyGraph().build_dependency(root, example_inputs=example, unwrapped_parameters=loose)
    widths = {}
    for path, mlp in layers.items():
        fc1, fc2 = mlp.fc1, mlp.fc2
        hidden = fc1.weight.shape[0]
        keep_count = kept_width(hidden, ratio)
        widths[path] = (hidden, keep_count)
        if keep_count == hidden:
            continue
        outgoing = fc2.weight.detach().flatten(1).double().clone()  # (out, hidden)
        covariance, mean = moments[path].covariance(), moments[path].mean()
        worth = covariance.diagonal() * outgoing.square().sum(0)
        keep = torch.topk(worth, keep_count).indices.sort().values
        gone = sorted(set(range(hidden)) - set(keep.tolist()))
        cut = tp.prune_conv_out_channels if isinstance(fc1, nn.Conv2d) else tp.prune_linear_out_channels
        group = graph.get_pruning_group(fc1, cut, idxs=gone)
        reached = {item.dep.target.module for item in group if isinstance(item.dep.target.module, nn.Conv2d | nn.Linear)}
        if reached != {fc1, fc2}:
            raise RecipeError(f"cutting {path} would change {len(reached)} layers, expected its own two; leave its tower out")
        group.prune()
        _refit(mlp, outgoing, covariance, mean, keep)
    return widths


@torch.no_grad()
def _refit(mlp: nn.Module, outgoing: Tensor, covariance: Tensor, mean: Tensor, keep: Tensor) -> None:
    """Choose fc2 of the kept units so that the layer's output changes least over the calibration data.

    With outputs y = W h, minimise E|W h - W' h_keep|^2 + ridge |W' - W_keep|^2; the biases absorb the means.
    """
    gone = torch.ones(outgoing.shape[1], dtype=torch.bool)
    gone[keep] = False
    inner = covariance[keep][:, keep]
    inner = inner + torch.eye(len(keep), dtype=inner.dtype) * (RIDGE * inner.diagonal().mean().clamp_min(1e-12))
    shared = outgoing[:, gone] @ covariance[gone][:, keep]  # (out, kept): what the units that go have in common with those that stay
    refitted = outgoing[:, keep] + torch.linalg.solve(inner, shared.T).T
    fc2 = mlp.fc2
    fc2.weight.copy_(refitted.reshape(fc2.weight.shape).to(fc2.weight.dtype))
    if fc2.bias is not None:
        fc2.bias.add_((outgoing @ mean - refitted @ mean[keep]).to(fc2.bias.dtype))
