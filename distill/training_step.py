"""One optimiser step on one batch: the losses of a recipe, their gradient, the update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from distill.accumulation import accumulate
from distill.compute import Compute
from distill.dataset import Batch
from distill.ghost_norm import ghost_batches, one_update
from distill.objective import Taught, pair_terms, text_terms
from distill.processes import ALONE, Processes
from distill.recipes import Recipe
from distill.ring import ring_pair_terms
from distill.schedule import Plan, learning_rate
from distill.store import Store
from distill.training_metrics import Clock
from distill.training_state import Run
from runtime.errors import RecipeError, TrainingError

MAX_LOGIT_SCALE = 100.0


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Guide:
    """What a run knows before its first step."""

    followed: Followed
    basis: Tensor | None = None
    """As `distill.objective.basis_of` makes it; None where no feature is followed."""
    typical: tuple[float, ...] = ()
    """`distill.objective.typical_similarities`, where the teachers gate or the form is sigmoid."""
    compute: Compute = field(default_factory=Compute)
    ring: bool = False
    """Embeddings go round (distill/ring.py) instead of being gathered."""

    def taught(self, images: Sequence[np.ndarray], texts: Sequence[np.ndarray]) -> Taught:
        """The teachers' embeddings of a batch, on the device."""
        tensors = ([self.compute.tensor(array) for array in arrays] for arrays in (images, texts))
        return Taught(images=next(tensors), texts=next(tensors), logit_scales=self.followed.logit_scales, typical=self.typical)


def training_step(
    run: Run, plan: Plan, recipe: Recipe, batch: Batch, guide: Guide, processes: Processes = ALONE, seed: int = 0, clock: Clock | None = None
) -> dict[str, Tensor]:  # fmt: skip
    """Returns the loss terms, detached. A batch without pictures trains the text tower alone.

    With several processes `batch` is this one's share; loss and gradient are those of the whole batch.

    Raises:
        TrainingError: the loss is not finite; nothing has been changed.
    """
    run.model.train()
    text_only = run.step < plan.text_steps
    if recipe.ghost_batch or processes.world > 1:
        return _step_in_pieces(run, recipe, batch, guide, text_only, processes, seed, clock)
    clock = clock or Clock()
    compute, taught = guide.compute, guide.taught(batch.teacher_images, batch.teacher_texts)
    with compute.step(run.model):
        with clock.measure("forward"):
            if text_only:
                terms = text_terms(compute.encode_text(run.model, batch.tokens), taught, recipe, guide.basis)
            else:
                image, text = compute.encode_image(run.model, batch.pixels), compute.encode_text(run.model, batch.tokens)
                terms = pair_terms(image, text, run.model.logit_scale.exp(), run.model.logit_bias, compute.tensor(batch.same), taught, recipe, guide.basis)
            loss = _total(terms, recipe, run.step)
        with clock.measure("backward"):
            run.optimizer.zero_grad(set_to_none=True)
            loss.backward()
    return {name: value.detach() for name, value in terms.items()}


def _total(terms: dict[str, Tensor], recipe: Recipe, step: int) -> Tensor:
    loss = torch.stack([getattr(recipe, name) * value for name, value in terms.items()]).sum()
    if not torch.isfinite(loss):
        raise TrainingError(f"the loss is {loss.item()} at step {step + 1}")
    return loss


def _step_in_pieces(
    run: Run, recipe: Recipe, batch: Batch, guide: Guide, text_only: bool, processes: Processes, seed: int, clock: Clock | None = None
) -> dict[str, Tensor]:  # fmt: skip
    """The same for ghost batches and several processes: what the loss compares is gathered, what the towers compute is not."""
    model, compute, found, timer = run.model, guide.compute, {}, clock or Clock()
    share = len(batch.rows)
    starts = range(0, len(batch.tokens), share)  # of the sets of captions

    ring = guide.ring and processes.world > 1 and not text_only

    def whole(array: np.ndarray) -> np.ndarray:
        return array if ring else np.concatenate([processes.gather_array(array[start : start + share], compute.device) for start in starts])

    images = [array if ring else processes.gather_array(array, compute.device) for array in batch.teacher_images]
    taught = guide.taught(images, [whole(array) for array in batch.teacher_texts])
    same = batch.texts if ring else np.unique(whole(batch.texts), return_inverse=True)[1] if processes.world > 1 else batch.same

    def encode(_: int, rows: slice) -> tuple[Tensor, ...]:
        with timer.measure("forward"):
            images = () if text_only else (compute.encode_image(model, batch.pixels[rows]),)
            text = compute.encode_text(model, np.concatenate([batch.tokens[start + rows.start : start + rows.stop] for start in starts]))
            return (*images, *text.chunk(len(starts)))

    def loss(*embeddings: Tensor) -> Tensor:
        text = torch.cat(embeddings if text_only else embeddings[1:])
        if text_only:
            terms = text_terms(text, taught, recipe, guide.basis)
        elif ring:
            terms = ring_pair_terms(embeddings[0], text, model.logit_scale.exp(), compute.tensor(same), taught, recipe, guide.basis, processes)
        else:
            terms = pair_terms(embeddings[0], text, model.logit_scale.exp(), model.logit_bias, compute.tensor(same), taught, recipe, guide.basis)
        found.update({name: value.detach() for name, value in terms.items()})
        return _total(terms, recipe, run.step)

    pieces = ghost_batches(share * processes.world, recipe.ghost_batch, processes.rank, processes.world)
    run.optimizer.zero_grad(set_to_none=True)
    with timer.measure("backward"), one_update(model, processes.mean if processes.world > 1 else None):
        accumulate(encode, pieces, loss, seed=seed, step=run.step, exchange=processes if processes.world > 1 and not ring else None)
    with timer.measure("backward"):
        processes.sum_gradients(model.parameters(), whole=[model.logit_scale, *([] if model.logit_bias is None else [model.logit_bias])])
    return found


def update(run: Run, plan: Plan, recipe: Recipe) -> None:
    """Apply the gradient that `training_step` left, and move the average.

    Raises:
        TrainingError: the gradient is not finite; nothing has been changed.
    """
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(run.step, plan.steps, recipe)
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), recipe.clip_norm)
    if not torch.isfinite(norm):
        raise TrainingError(f"the gradient's norm is {float(norm)} at step {run.step + 1}")
    run.optimizer.step()
    with torch.no_grad():
        run.model.logit_scale.clamp_(0, math.log(MAX_LOGIT_SCALE))
    run.averaging.update(min(recipe.ema_decay, (1 + run.step) / (10 + run.step)))
