"""Fold training-time branches into single convolutions, with a report of the difference that it makes."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.utils.model import reparameterize_model
from torch import Tensor

from mobileclip.model import ImageTextModel, count_parameters


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What folding did. Differences are of unit-norm image embeddings, on structured random pictures."""

    parameters_before: int
    parameters_after: int
    max_abs: float
    cosine_min: float
    embedding_spread: float
    """Mean cosine between embeddings of different pictures; near 1 the comparison proves nothing."""


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


def reparameterize(model: ImageTextModel, images: int = 8) -> tuple[ImageTextModel, Report]:
    """A folded copy of `model` in eval mode, and the report. The model itself is left alone.

    MobileOne, RepMixer, large-kernel and position-encoding branches become one convolution each (FastViT, sections 3.1
    and 3.2); the two networks compute the same function up to floating-point rounding.
    """
    folded: ImageTextModel = copy.deepcopy(model).eval()
    folded.image.trunk = reparameterize_model(folded.image.trunk)
    folded.config = dataclasses.replace(model.config, folded=True)
    pixels = structured_images(images, model.config.image.image_size)
    training = model.training
    model.eval()
    with torch.inference_mode():
        before, after = model.encode_image(pixels), folded.encode_image(pixels)
    model.train(training)
    cosines = before @ before.T
    report = Report(
        parameters_before=count_parameters(model)["total"],
        parameters_after=count_parameters(folded)["total"],
        max_abs=float((before - after).abs().max()),
        cosine_min=float((before * after).sum(-1).min()),
        embedding_spread=float((cosines.sum() - cosines.diagonal().sum()) / (images * (images - 1))),
    )
    return folded, report
