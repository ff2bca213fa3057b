"""One optimiser step on one batch: the losses of a recipe, their gradient, the update.

Shapes: B = batch, D = student's embed_dim, K = followed teachers, E_k = dimension of teacher k.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distill.accumulation import accumulate
from distill.dataset import Batch
from distill.ghost_norm import ghost_batches, one_update
from distill.losses import affinity_loss, clip_loss, ensemble_basis, ensemble_target, feature_loss
from distill.processes import ALONE, Processes
from distill.recipes import Recipe
from distill.schedule import Plan, learning_rate
from distill.store import Store
from distill.training_state import Run
from mobileclip.model import ImageTextModel
from runtime.errors import RecipeError, TrainingError

MAX_LOGIT_SCALE = 100.0
BASIS_ROWS = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Followed:
    """The teachers that a recipe follows: their numbers in the store and their multiplicative logit scales, (K,) each."""

    numbers: tuple[int, ...]
    logit_scales: tuple[float, ...]


def follow(store: Store, recipe: Recipe) -> Followed:
    """Whom the recipe follows; nobody where its losses read no teacher.

    Raises:
        RecipeError: the store lacks a teacher, or there are more or fewer logit scales than teachers.
    """
    if not recipe.reinforced:
        return Followed(numbers=(), logit_scales=())
    names = [facts.name for facts in store.teachers]
    unknown = [name for name in recipe.teachers if name not in names]
    if unknown:
        raise RecipeError(f"the recipe follows the teacher {', '.join(unknown)}; the store has {', '.join(names)}")
    numbers = tuple(names.index(name) for name in recipe.teachers) or tuple(range(len(names)))
    scales = recipe.logit_scales or tuple(store.teachers[k].logit_scale for k in numbers)
    if len(scales) != len(numbers):
        raise RecipeError(f"the recipe has {len(scales)} logit_scales for {len(numbers)} teachers ({', '.join(names[k] for k in numbers)}); give one for each")
    return Followed(numbers=numbers, logit_scales=tuple(float(scale) for scale in scales))


def training_step(
    run: Run, plan: Plan, recipe: Recipe, batch: Batch, logit_scales: tuple[float, ...], basis: Tensor | None, processes: Processes = ALONE, seed: int = 0
) -> dict[str, Tensor]:
    """Returns the loss terms, detached. A batch without pictures trains the text tower alone.

    With several processes `batch` is this one's share; loss and gradient are those of the whole batch.

    Raises:
        TrainingError: the loss is not finite; nothing has been changed.
    """
    run.model.train()
    text_only = run.step < plan.text_steps
    if recipe.ghost_batch or processes.world > 1:
        return _step_in_pieces(run, recipe, batch, logit_scales, basis, text_only, processes, seed)
    terms = text_loss(run.model, batch, basis) if text_only else pair_losses(run.model, batch, recipe, logit_scales, basis)
    loss = _total(terms, recipe, run.step)
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    return {name: value.detach() for name, value in terms.items()}


def _total(terms: dict[str, Tensor], recipe: Recipe, step: int) -> Tensor:
    loss = torch.stack([getattr(recipe, name) * value for name, value in terms.items()]).sum()
    if not torch.isfinite(loss):
        raise TrainingError(f"the loss is {loss.item()} at step {step + 1}")
    return loss


def _step_in_pieces(
    run: Run, recipe: Recipe, batch: Batch, logit_scales: tuple[float, ...], basis: Tensor | None, text_only: bool, processes: Processes, seed: int
) -> dict[str, Tensor]:
    """The same for ghost batches and several processes: what the loss compares is gathered, what the towers compute is not."""
    model, found = run.model, {}
    images, texts = ([torch.from_numpy(processes.gather_array(array)) for array in arrays] for arrays in (batch.teacher_images, batch.teacher_texts))
    same = np.unique(processes.gather_array(batch.texts), return_inverse=True)[1] if processes.world > 1 else batch.same

    def encode(_: int, rows: slice) -> tuple[Tensor, ...]:
        text = encode_texts(model, batch.tokens[rows])
        return (text,) if text_only else (model.encode_image(torch.from_numpy(batch.pixels[rows])), text)

    def loss(*embeddings: Tensor) -> Tensor:
        if text_only:
            terms = _text_terms(embeddings[0], texts, basis)
        else:
            terms = _pair_terms(*embeddings, model.logit_scale.exp(), torch.from_numpy(same), images, texts, recipe, logit_scales, basis)
        found.update({name: value.detach() for name, value in terms.items()})
        return _total(terms, recipe, run.step)

    pieces = ghost_batches(len(batch.tokens) * processes.world, recipe.ghost_batch, processes.rank, processes.world)
    run.optimizer.zero_grad(set_to_none=True)
    with one_update(model, processes.mean if processes.world > 1 else None):
        accumulate(encode, pieces, loss, seed=seed, step=run.step, exchange=processes if processes.world > 1 else None)
    processes.sum_gradients(model.parameters(), whole=[model.logit_scale])
    return found


def update(run: Run, plan: Plan, recipe: Recipe) -> None:
    """Apply the gradient that `training_step` left, and move the average."""
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(run.step, plan.steps, recipe)
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), recipe.clip_norm)
    run.optimizer.step()
    with torch.no_grad():
        run.model.logit_scale.clamp_(0, math.log(MAX_LOGIT_SCALE))
    run.averaging.update(min(recipe.ema_decay, (1 + run.step) / (10 + run.step)))


def pair_losses(model: ImageTextModel, batch: Batch, recipe: Recipe, logit_scales: tuple[float, ...], basis: Tensor | None) -> dict[str, Tensor]:
    """The recipe's loss terms on B pairs, unweighted."""
    image, text, scale = model.encode_image(torch.from_numpy(batch.pixels)), encode_texts(model, batch.tokens), model.logit_scale.exp()
    images, texts = _tensors(batch.teacher_images), _tensors(batch.teacher_texts)
    return _pair_terms(image, text, scale, torch.from_numpy(batch.same), images, texts, recipe, logit_scales, basis)


def _pair_terms(
    image: Tensor, text: Tensor, scale: Tensor, same: Tensor, images: list[Tensor], texts: list[Tensor],
    recipe: Recipe, logit_scales: tuple[float, ...], basis: Tensor | None,
) -> dict[str, Tensor]:  # fmt: skip
    terms: dict[str, Tensor] = {}
    if recipe.contrastive:
        terms["contrastive"] = clip_loss(image, text, scale, same)
    if recipe.affinity:
        terms["affinity"] = affinity_loss(image, text, scale, images, texts, logit_scales)
    if recipe.feature:
        assert basis is not None
        # Each tower follows its own teacher embedding: a picture whose caption is wrong still teaches the image tower what it shows.
        terms["feature"] = (feature_loss(image, ensemble_target(images, basis)) + feature_loss(text, ensemble_target(texts, basis))) / 2
    return terms


def text_loss(model: ImageTextModel, batch: Batch, basis: Tensor | None) -> dict[str, Tensor]:
    """The text tower alone: its embeddings follow the ensemble's text embeddings."""
    return _text_terms(encode_texts(model, batch.tokens), _tensors(batch.teacher_texts), basis)


def _text_terms(text: Tensor, texts: list[Tensor], basis: Tensor | None) -> dict[str, Tensor]:
    assert basis is not None
    return {"feature": feature_loss(text, ensemble_target(texts, basis))}


def encode_texts(model: ImageTextModel, tokens: np.ndarray, groups: int = 4) -> Tensor:
    """tokens (B, T) int32 -> (B, D), unit norm, in groups of like length: most captions are a third as long as a batch's longest.

    Exact for the causal and pad-masked towers that are trained here, whose embedding does not depend on the padding.
    """
    lengths = tokens.argmax(axis=1) + 1
    order = np.argsort(lengths, kind="stable")
    parts = [model.encode_text(torch.from_numpy(np.ascontiguousarray(tokens[rows, : lengths[rows].max()]))) for rows in np.array_split(order, groups) if len(rows)]
    return torch.cat(parts)[torch.from_numpy(np.argsort(order))]


def basis_of(store: Store, rows: np.ndarray, teachers: tuple[int, ...], dim: int) -> Tensor:
    """Directions of the followed teachers' space, (sum of E_k, dim), from up to BASIS_ROWS of the rows: first view and own caption."""
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), BASIS_ROWS)).astype(np.int64)]
    zeros = np.zeros_like(rows)
    both = [
        torch.cat([torch.from_numpy(store.image_embeddings(k, rows, zeros)), torch.from_numpy(store.text_embeddings(k, rows, zeros))]) for k in teachers
    ]
    return ensemble_basis(both, dim)


def _tensors(arrays: tuple[np.ndarray, ...]) -> list[Tensor]:
    return [torch.from_numpy(array) for array in arrays]
