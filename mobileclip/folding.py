"""Fold training-time branches into single convolutions, with a report of the difference that it makes."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

from mobileclip.model import ImageTextModel, count_parameters


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What folding did. Differences are of unit-norm embeddings, of structured random pictures and of random token rows."""

    parameters_before: int
    parameters_after: int
    folded: dict[str, int]
    """Kind of block ("RepMixer", "MobileOneBlock" …) to how many were folded."""
    max_abs: float
    """Of the image embeddings."""
    cosine_min: float
    embedding_spread: float
    """Mean cosine between embeddings of different pictures; near 1 the comparison proves nothing."""
    text_max_abs: float
    """Of the text embeddings; 0 where the text tower has nothing to fold."""


def structured_images(count: int, image_size: int, seed: int = 0) -> Tensor:
    """Random pictures (count, 3, image_size, image_size) in [0, 1] with structure at several scales.

    White noise drives every picture to the same embedding; blobs of several sizes do not.
    """
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(count, 3, image_size, image_size)
    for cells in (2, 4, 8, 16):
        coarse = torch.rand(count, 3, cells, cells, generator=generator)
        total += F.interpolate(coarse, size=(image_size, image_size), mode="nearest") / cells**0.5
    low, high = total.amin(dim=(1, 2, 3), keepdim=True), total.amax(dim=(1, 2, 3), keepdim=True)
    return (total - low) / (high - low)


FOLDS = ("fuse", "reparameterize", "switch_to_deploy")
"""What timm's blocks call the act; `mobileclip.token_mixer` follows them."""


def foldable(module: nn.Module) -> Counter[str]:
    """How many blocks of each kind `fold` would fold. A block that folds its own parts, as RepMixer does, counts once."""
    found: Counter[str] = Counter()
    for child in module.children():
        if any(hasattr(child, name) for name in FOLDS):
            found[type(child).__name__] += 1
        else:
            found += foldable(child)
    return found


def fold(module: nn.Module) -> Counter[str]:
    """Fold every training-time branch of `module` in place, of the module itself too. Returns how many blocks of each kind."""
    holder = nn.Sequential(module)
    found = foldable(holder)
    reparameterize_model(holder, inplace=True)
    return found


def folded_copy(model: ImageTextModel) -> tuple[ImageTextModel, Counter[str]]:
    """A folded copy of `model` in eval mode, without the proof that `reparameterize` gives."""
    folded: ImageTextModel = copy.deepcopy(model).eval()
    done = fold(folded)
    folded.config = dataclasses.replace(model.config, folded=True)
    return folded, done


def reparameterize(model: ImageTextModel, images: int = 8) -> tuple[ImageTextModel, Report]:
    """A folded copy of `model` in eval mode, and the report. The model itself is left alone.

    MobileOne, RepMixer, large-kernel and position-encoding branches become one convolution each (FastViT, sections 3.1
    and 3.2), in the image tower and in an "mct" text tower; the two networks compute the same function up to
    floating-point rounding.
    """
    folded, done = folded_copy(model)
    like = next(model.parameters())
    pixels = structured_images(images, model.config.image.image_size).to(like)
    generator = torch.Generator().manual_seed(0)
    text = model.config.text
    tokens = torch.randint(1, text.vocab_size, (images, text.context_length), generator=generator, dtype=torch.int32).to(like.device)
    training = model.training
    model.eval()
    with torch.inference_mode():
        before, after = model.encode_image(pixels), folded.encode_image(pixels)
        text_before, text_after = (model.encode_text(tokens), folded.encode_text(tokens)) if text.kind == "mct" else (tokens, tokens)
    model.train(training)
    cosines = before @ before.T
    report = Report(
        parameters_before=count_parameters(model)["total"],
        parameters_after=count_parameters(folded)["total"],
        folded=dict(done),
        max_abs=float((before - after).abs().max()),
        cosine_min=float((before * after).sum(-1).min()),
        embedding_spread=float((cosines.sum() - cosines.diagonal().sum()) / (images * (images - 1))),
        text_max_abs=float((text_before - text_after).abs().max()),
    )
    return folded, report
