"""The two towers as exportable modules, and the samples that exports are calibrated and judged with.

Shapes: N = samples, B = batch, H = W = image_size, T = context_length, D = embed_dim.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from runtime.errors import PairsError, ParityError

Tower = Literal["image", "text"]
TOWERS: tuple[Tower, Tower] = ("image", "text")
INPUT_NAMES: dict[str, str] = {"image": "image", "text": "tokens"}
# Never "embedding": the ONNX exporter names the lookup's own value so, and the graph would define it twice.
OUTPUT_NAMES: dict[str, str] = {"image": "image_embedding", "text": "text_embedding"}


class Encoder(nn.Module):
    """One tower followed by the L2 norm: what every artefact computes.

    Args:
        tower: features before the norm.
        kind: "image" takes pixels (B, 3, H, W) float32, "text" takes tokens (B, T) int32; the result is (B, D) float32 of unit norm.
        half: the tower computes in float16 with explicit casts at its border; norms and the final L2 norm stay in float32.
        rescale: divide by the largest component first, so that squares stay in range where the target runs the norm in float16.
    """

    def __init__(self, tower: nn.Module, kind: Tower, *, half: bool = False, rescale: bool = False) -> None:
        super().__init__()
        self.tower = _halved(tower) if half else tower
        self.kind = kind
        self.half_inside = half
        self.rescale = rescale
        self.eval()

    @property
    def input_name(self) -> str:
        return INPUT_NAMES[self.kind]

    @property
    def output_name(self) -> str:
        return OUTPUT_NAMES[self.kind]

    def forward(self, x: Tensor) -> Tensor:
        if self.half_inside and self.kind == "image":
            x = x.to(torch.float16)
        features = self.tower(x)
        return self.normalise(features.to(torch.float32) if self.half_inside else features)

    def normalise(self, features: Tensor) -> Tensor:
        """(B, D) to unit norm."""
        if self.rescale:
            features = features / features.abs().amax(dim=-1, keepdim=True).clamp_min(1e-4)
        # Not F.normalize: its expand would drag shape arithmetic into graphs of dynamic batch.
        return features / torch.linalg.vector_norm(features, dim=-1, keepdim=True).clamp_min(1e-4 if self.rescale else 1e-12)


class _SinglePrecisionNorm(nn.Module):
    """A norm in float32 between explicit casts: squares of a few hundred already leave float16, and small variances lose their digits there."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm.float()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.to(torch.float32)).to(torch.float16)


def _halved(tower: nn.Module) -> nn.Module:
    """A float16 copy whose norms stay in float32."""
    copied = copy.deepcopy(tower).half()
    for name, module in list(copied.named_modules()):
        if isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
            replace(copied, name, _SinglePrecisionNorm(module))
    return copied


@torch.no_grad()
def fold_norms(tower: nn.Module, example: Tensor) -> nn.Module:
    """A copy in which each batch norm that takes the output of its own block's convolution is part of that convolution, the same to float32's rounding.

    Converters fold them too, but only after a half-precision export has rounded the running variances by themselves: one picture of an
    EfficientNet-lite0 went from a cosine of 0.99993 to 0.99926 that way.

    Args:
        example: input rows of the tower; one forward pass shows which norm follows which convolution.
    """
    folded = copy.deepcopy(tower).eval()
    made: dict[int, nn.Conv2d] = {}
    kept: list[Tensor] = []  # alive as long as their ids are asked for
    pairs: dict[str, nn.Conv2d] = {}
    names = {module: name for name, module in folded.named_modules() if isinstance(module, nn.BatchNorm2d | nn.Conv2d)}
    norms = [module for module in names if isinstance(module, nn.BatchNorm2d)]

    def after(module: nn.Module, _: object, out: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        made[id(out)] = module
        kept.append(out)

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.BatchNorm2d)
        conv = made.get(id(args[0]))
        # Of one block: a convolution whose output others read too (a residual past an attention block's norm) lies in another.
        if conv is not None and names[conv].rpartition(".")[0] == names[module].rpartition(".")[0]:
            pairs[names[module]] = conv

    handles = [module.register_forward_hook(after) for module in folded.modules() if isinstance(module, nn.Conv2d)]
    handles += [module.register_forward_pre_hook(before) for module in norms]
    try:
        expected = folded(example)
    finally:
        for handle in handles:
            handle.remove()
    for name, conv in pairs.items():
        norm = folded.get_submodule(name)
        assert isinstance(norm, nn.BatchNorm2d)
        _fold(conv, norm)
        replace(folded, name, nn.Sequential(*after_norm(norm)))
    difference = float((folded(example) - expected).abs().max())
    if not difference <= 1e-3 * float(expected.abs().max()):
        raise ParityError(f"folding the batch norms changed the tower's output by {difference:g} of {float(expected.abs().max()):g}; export in fp32 and report the backbone")
    return folded


def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """In place, in float64."""
    factor, shift = scale_and_shift(norm)
    bias = shift if conv.bias is None else shift + conv.bias.double() * factor
    conv.weight.data = (conv.weight.double() * factor[:, None, None, None]).to(conv.weight.dtype)
    conv.bias = nn.Parameter(bias.to(conv.weight.dtype))


def scale_and_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """What a batch norm does to each channel at inference: times a factor (C,), plus a shift (C,), float64."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    factor = (norm.weight.detach().double() if norm.affine else 1.0) / torch.sqrt(norm.running_var.double() + norm.eps)
    return factor, (norm.bias.detach().double() if norm.affine else 0.0) - norm.running_mean.double() * factor


def after_norm(norm: nn.BatchNorm2d) -> list[nn.Module]:
    """What timm's norms with an activation run after the norm itself."""
    return [module for module in (getattr(norm, "drop", None), getattr(norm, "act", None)) if module is not None]


def replace(module: nn.Module, name: str, new: nn.Module) -> None:
    """Put another module in the place of the submodule of that name."""
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, new)


def image_encoder(model: Any, **options: bool) -> Encoder:
    """The image tower of an `ImageTextModel`, ending in unit norm."""
    return Encoder(model.image, "image", **options)


def text_encoder(model: Any, **options: bool) -> Encoder:
    """The text tower of an `ImageTextModel`, ending in unit norm."""
    return Encoder(model.text, "text", **options)


def encoder_of(model: Any, tower: Tower, **options: bool) -> Encoder:
    return image_encoder(model, **options) if tower == "image" else text_encoder(model, **options)


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """Pictures and captions in the form that the towers take; row i of `pixels` belongs to row i of `tokens`."""

    keys: tuple[str, ...]
    captions: tuple[str, ...]
    pixels: np.ndarray
    """(N, 3, H, W) float32, normalised."""
    tokens: np.ndarray
    """(N, T) int32."""

    def __len__(self) -> int:
        return len(self.keys)

    def inputs(self, tower: Tower) -> np.ndarray:
        return self.pixels if tower == "image" else self.tokens

    def head(self, count: int) -> Samples:
        """The first `count` rows."""
        return self._cut(slice(0, count))

    def tail(self, count: int) -> Samples:
        """The last `count` rows."""
        return self._cut(slice(len(self) - count, len(self)))

    def _cut(self, rows: slice) -> Samples:
        return Samples(keys=self.keys[rows], captions=self.captions[rows], pixels=self.pixels[rows], tokens=self.tokens[rows])


def choose_rows(count: int, wanted: Sequence[int], seed: int) -> list[np.ndarray]:
    """Disjoint random row sets of the wanted sizes; where there are too few rows, the later sets are cut short and then wrap around.

    Rows of one set are in ascending order, so that shards are read front to back.
    """
    order = np.random.default_rng(seed).permutation(count)
    sets, start = [], 0
    for size in wanted:
        rows = order[start : start + size]
        if len(rows) == 0:  # everything is used up: share the first rows rather than have none
            rows = order[:size]
        sets.append(np.sort(rows))
        start += len(rows)
    return sets


def read_samples(pairs: Any, rows: Sequence[int] | np.ndarray, preprocess_config: Any, tokenizer: Any) -> tuple[Samples, list[str]]:
    """Read, preprocess and tokenise rows of a pairs folder (`runtime.pairs`).

    Returns:
        The samples, and one sentence for each row left out because its picture does not decode or it has no caption.
    """
    from runtime.preprocess import preprocess

    keys, captions, pixels, skipped = [], [], [], []
    for row in rows:
        try:
            caption = pairs.caption(int(row))
            pixels.append(preprocess([pairs.image(int(row))], preprocess_config))
        except PairsError as error:
            skipped.append(str(error))
            continue
        keys.append(pairs.keys[int(row)])
        captions.append(caption)
    if not pixels:
        raise PairsError(f"none of the {len(rows)} pairs chosen can be used; the first problem: {skipped[0] if skipped else 'there are no pairs'}")
    return Samples(keys=tuple(keys), captions=tuple(captions), pixels=np.concatenate(pixels), tokens=tokenizer(captions)), skipped


@torch.no_grad()
def embed(encoder: nn.Module, inputs: np.ndarray, batch: int = 32) -> np.ndarray:
    """Run an encoder in torch over the rows of `inputs`: (N, …) -> (N, D) float32."""
    parts = [encoder(torch.from_numpy(inputs[i : i + batch])).numpy() for i in range(0, len(inputs), batch)]
    return np.concatenate(parts)
