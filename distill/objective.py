"""What a recipe asks of embeddings: its loss terms on a batch, unweighted.

Shapes: B = batch, D = student's embed_dim, K = followed teachers, E_k = dimension of teacher k.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.losses import (
    affinity_loss,
    captions_loss,
    clip_loss,
    ensemble_basis,
    ensemble_target,
    feature_loss,
    gate,
    nested_loss,
    sigmoid_affinity_loss,
    sigmoid_loss,
)  # fmt: skip
from distill.recipes import Recipe
from distill.store import Store
from mobileclip.model import ImageTextModel

BASIS_ROWS = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Taught:
    """What the followed teachers say of B samples: K tensors (B, E_k) of unit norm each, and their K multiplicative logit scales."""

    images: Sequence[Tensor] = ()
    texts: Sequence[Tensor] = ()
    logit_scales: tuple[float, ...] = ()
    typical: tuple[float, ...] = ()
    """Per teacher the store's mean cosine of picture and caption: what its gate measures a sample against, and where its sigmoid says "as likely as not"."""

    def of_set(self, number: int, size: int) -> Taught:
        """What they say of one set of captions: rows number * size to (number + 1) * size of the texts."""
        return replace(self, texts=[text[number * size : (number + 1) * size] for text in self.texts])


def pair_terms(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, same: Tensor, taught: Taught, recipe: Recipe, basis: Tensor | None
) -> dict[str, Tensor]:
    """The loss terms of B pictures with C captions each: the mean over the C sets of captions.

    Args:
        image: (B, D) of unit norm. text: (C * B, D), set after set. scale: multiplicative. bias: of a sigmoid model, else None.
        same: (C * B,) integers, equal where the caption's text is.
        basis: as `basis_of` makes it; needed for the feature term.
    """
    size = len(image)
    sets = range(len(text) // size)
    parts = [_set_terms(image, text[n * size : (n + 1) * size], scale, bias, same[n * size : (n + 1) * size], taught.of_set(n, size), recipe, basis) for n in sets]
    terms = {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]} if len(parts) > 1 else parts[0]
    if recipe.contrastive and recipe.multi_positive:
        owner = torch.arange(size, device=image.device).repeat(len(parts))
        terms["contrastive"] = nested_over(recipe)(lambda i, t: captions_loss(i, t, owner, scale), image, text)
    return terms


def _set_terms(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, same: Tensor, taught: Taught, recipe: Recipe, basis: Tensor | None
) -> dict[str, Tensor]:
    weight = gate_weights(image, text, taught, recipe)
    nested = nested_over(recipe)
    terms: dict[str, Tensor] = {}
    if recipe.contrastive and not recipe.multi_positive:
        terms["contrastive"] = nested(
            (lambda i, t: clip_loss(i, t, scale, same, weight)) if bias is None else (lambda i, t: sigmoid_loss(i, t, scale, bias, same, weight)), image, text
        )
    if recipe.affinity and bias is None:
        terms["affinity"] = nested(lambda i, t: affinity_loss(i, t, scale, taught.images, taught.texts, taught.logit_scales), image, text)
    elif recipe.affinity:
        biases = [-scale * typical for scale, typical in zip(taught.logit_scales, taught.typical, strict=True)]
        terms["affinity"] = nested(lambda i, t: sigmoid_affinity_loss(i, t, scale, bias, taught.images, taught.texts, taught.logit_scales, biases), image, text)
    if recipe.feature:
        assert basis is not None
        terms["feature"] = feature_term(image, text, taught, recipe, basis)
    return terms


def feature_term(image: Tensor, text: Tensor, taught: Taught, recipe: Recipe, basis: Tensor) -> Tensor:
    """Each tower follows its own teacher embedding: a picture whose caption is wrong still teaches the image tower what it shows."""
    follow_image, follow_text = (nested_feature(one, ensemble_target(of, basis), recipe) for one, of in ((image, taught.images), (text, taught.texts)))
    return (follow_image + follow_text) / 2


def text_terms(text: Tensor, taught: Taught, recipe: Recipe, basis: Tensor | None) -> dict[str, Tensor]:
    """The text tower alone: its embeddings (B, D) follow the ensemble's text embeddings."""
    assert basis is not None
    return {"feature": nested_feature(text, ensemble_target(taught.texts, basis), recipe)}


def gate_weights(image: Tensor, text: Tensor, taught: Taught, recipe: Recipe) -> Tensor | None:
    """(B,) weights of the contrastive term, without a gradient; None where the recipe has no gate.

    By the teachers: the mean of their cosines of this view and this caption, against the store's mean. By the student itself ("own"), which needs no
    teacher: its own cosines, against the batch's mean, as small-loss selection does (Han et al. 2018, "Co-teaching").
    """
    if recipe.gate == "none":
        return None
    if recipe.gate == "own":
        similarity = (image * text).sum(1).detach()
        return gate(similarity, float(similarity.mean()), recipe.gate_sharpness)
    similarity = torch.stack([(one * other).sum(1) for one, other in zip(taught.images, taught.texts, strict=True)]).mean(0)
    return gate(similarity, sum(taught.typical) / len(taught.typical), recipe.gate_sharpness)


def nested_over(recipe: Recipe) -> Callable[[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor], Tensor]:
    """Takes a loss of image and text and both: its value on the whole embeddings, or its mean over the recipe's nested lengths."""
    if not recipe.nested_dims:
        return lambda loss, image, text: loss(image, text)
    return lambda loss, image, text: nested_loss(loss, image, text, recipe.nested_dims)


def nested_feature(student: Tensor, target: Tensor, recipe: Recipe) -> Tensor:
    """`feature_loss`, or its mean over the recipe's nested lengths: the basis is sorted by what it explains, so that the first coordinates of the target
    are the best target of that length."""
    return nested_over(recipe)(feature_loss, student, target)


def basis_of(store: Store, rows: np.ndarray, teachers: tuple[int, ...], dim: int) -> Tensor:
    """Directions of the followed teachers' space, (sum of E_k, dim), from up to BASIS_ROWS of the rows: first view and own caption."""
    both = [torch.cat(pair) for pair in zip(*_first_ones(store, rows, teachers), strict=True)]
    return ensemble_basis(both, dim)


def typical_similarities(store: Store, rows: np.ndarray, teachers: tuple[int, ...]) -> tuple[float, ...]:
    """Per teacher the mean, over up to BASIS_ROWS of the rows, of the cosine between first view and own caption."""
    images, texts = _first_ones(store, rows, teachers)
    return tuple(float(F.cosine_similarity(image, text).mean()) for image, text in zip(images, texts, strict=True))


def _first_ones(store: Store, rows: np.ndarray, teachers: tuple[int, ...]) -> tuple[list[Tensor], list[Tensor]]:
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), BASIS_ROWS)).astype(np.int64)]
    zeros = np.zeros_like(rows)
    return [torch.from_numpy(store.image_embeddings(k, rows, zeros)) for k in teachers], [torch.from_numpy(store.text_embeddings(k, rows, zeros)) for k in teachers]


def encode_texts(model: ImageTextModel, tokens: np.ndarray, groups: int = 4) -> Tensor:
    """tokens (B, T) int32 -> (B, D), unit norm, in groups of like length: most captions are a third as long as a batch's longest.

    Exact for causal and pad-masked towers, whose embedding does not depend on the padding. Towers that see it (MobileCLIP's, mask "none") get it whole.
    """
    device = model.logit_scale.device
    if model.config.text.mask == "none":
        groups, lengths = 1, np.full(len(tokens), tokens.shape[1])
    else:
        lengths = tokens.argmax(axis=1) + 1
    order = np.argsort(lengths, kind="stable")
    parts = [
        model.encode_text(torch.from_numpy(np.ascontiguousarray(tokens[rows, : lengths[rows].max()])).to(device), normalize=False)
        for rows in np.array_split(order, groups) if len(rows)
    ]  # fmt: skip
    features = torch.cat(parts)
    if features.dtype == torch.bfloat16:
        features = features.float()  # of unit norm to float32's rounding
    return F.normalize(features, dim=-1)[torch.from_numpy(np.argsort(order)).to(device)]
