"""The contrastive and the affinity loss of a batch that no process holds: embeddings go round in a ring, a neighbour's share at a time.

Gathering costs every process the embeddings of the whole batch and a B x B matrix of similarities. Here a process holds its own b rows and one
neighbour's, and b x b similarities. Two rounds: in the first each process finds the normalisers of its own rows; in the second the shares carry their
normalisers along, so that the gradient of a row is known where the row is, and no gradient travels (the exchange of SigLIP, Zhai et al. 2023,
section 3.3, carried over to losses with a softmax). Value and gradient are those of `distill.losses`.

Shapes: B = whole batch, b = a process's share, D = embed_dim, K = teachers, E_k = dimension of teacher k, W = processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from distill.objective import Taught, feature_term, gate_weights
from distill.processes import Processes
from distill.recipes import Recipe
from runtime.errors import RecipeError


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """One process's rows. Row sums are logarithms of sums of exponentials: 1 + K columns (student, teachers) for pictures among all texts, and for
    texts among all pictures."""

    image: Tensor
    """(b, D)."""
    text: Tensor
    """(b, D)."""
    teacher_images: Sequence[Tensor]
    """K tensors (b, E_k)."""
    teacher_texts: Sequence[Tensor]
    """K tensors (b, E_k)."""
    same: Tensor
    """(b,) int64, equal where the caption's text is."""
    weight: Tensor
    """(b,), how much a pair counts in the contrastive loss."""


def ring_losses(share: Share, logit_scale: Tensor, teacher_scales: Sequence[float], processes: Processes) -> dict[str, Tensor]:
    """{"contrastive", "affinity"} of the whole batch, both as `clip_loss` (with `same` and `weight`) and `affinity_loss` have them.

    Gradients flow to this process's own rows, and to `logit_scale` (its whole gradient, in every process).
    """
    with torch.no_grad():
        sums = _row_sums(share, float(logit_scale), teacher_scales, processes)
        found = _values_and_gradients(share, sums, float(logit_scale), teacher_scales, processes)
    terms = {}
    for name, (value, to_image, to_text, to_scale) in found.items():
        # A number whose value is the loss and whose gradient is the one that was computed.
        linear = ((share.image - share.image.detach()) * to_image).sum() + ((share.text - share.text.detach()) * to_text).sum()
        terms[name] = value + linear + (logit_scale - logit_scale.detach()) * to_scale
    return terms


def ring_pair_terms(
    image: Tensor, text: Tensor, scale: Tensor, same: Tensor, taught: Taught, recipe: Recipe, basis: Tensor | None, processes: Processes
) -> dict[str, Tensor]:
    """`distill.objective.pair_terms` where each process has its own b rows of everything: the terms of the whole batch, and the gradient of own rows."""
    size = len(image)
    parts = []
    for n in range(len(text) // size):
        rows = slice(n * size, (n + 1) * size)
        said, own = taught.of_set(n, size), text[rows]
        weight = gate_weights(image, own, said, recipe)
        parts.append(_nested(image, own, scale, same[rows], said, image.new_ones(size) if weight is None else weight, recipe, processes))
        if recipe.feature:
            assert basis is not None
            local = feature_term(image, own, said, recipe, basis) / processes.world
            parts[-1]["feature"] = local + (_total(local.detach(), processes) - local.detach())
    return {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}


def check_ring(recipe: Recipe) -> None:
    """Raises RecipeError where a recipe needs the whole batch in one place."""
    if recipe.form != "softmax" or recipe.multi_positive or recipe.gate == "own":
        raise RecipeError("--exchange ring has the softmax form without multi_positive and without the student's own gate; use --exchange gather for this recipe")


def _nested(
    image: Tensor, text: Tensor, scale: Tensor, same: Tensor, said: Taught, weight: Tensor, recipe: Recipe, processes: Processes
) -> dict[str, Tensor]:
    wanted = [name for name in ("contrastive", "affinity") if getattr(recipe, name)]
    found: dict[str, list[Tensor]] = {name: [] for name in wanted}
    for dim in recipe.nested_dims or (image.shape[1],) if wanted else ():
        cut = (image, text) if dim == image.shape[1] else (F.normalize(image[:, :dim], dim=-1), F.normalize(text[:, :dim], dim=-1))
        teachers = (said.images, said.texts, said.logit_scales) if recipe.affinity else ((), (), ())
        share = Share(image=cut[0], text=cut[1], teacher_images=teachers[0], teacher_texts=teachers[1], same=same, weight=weight)
        terms = ring_losses(share, scale, teachers[2], processes)
        for name in wanted:
            found[name].append(terms[name])
    return {name: torch.stack(values).mean() for name, values in found.items()}


def _row_sums(share: Share, scale: float, teacher_scales: Sequence[float], processes: Processes) -> Tensor:
    """(b, 2, 2 + K): normalisers of student and teachers and the number of a row's matches; for pictures, then for texts."""
    b, k = len(share.image), len(teacher_scales)
    sums = share.image.new_full((b, 2, 1 + k), -torch.inf)
    matches = share.image.new_zeros(b)
    for other, _ in _around(share, None, processes):
        for n, (queries, keys) in enumerate(_both_ways(share, other)):
            for m, logits in enumerate(_logits(queries, keys, scale, teacher_scales)):
                sums[:, n, m] = torch.logaddexp(sums[:, n, m], logits.logsumexp(dim=1))
        matches += (share.same[:, None] == other.same[None, :]).sum(1)
    return torch.cat([sums, matches[:, None, None].expand(b, 2, 1)], dim=2)


def _values_and_gradients(
    share: Share, sums: Tensor, scale: float, teacher_scales: Sequence[float], processes: Processes
) -> dict[str, tuple[Tensor, Tensor, Tensor, Tensor]]:
    k = len(teacher_scales)
    names = ["contrastive", *(["affinity"] if k else [])]
    value = {name: share.image.new_zeros(()) for name in names}
    grads = {name: [torch.zeros_like(share.image), torch.zeros_like(share.text), share.image.new_zeros(())] for name in names}
    all_weight = _total(share.weight.sum(), processes)
    size = len(share.image) * processes.world
    for other, theirs in _around(share, sums, processes):
        assert theirs is not None
        match = (share.same[:, None] == other.same[None, :]).to(share.image.dtype)
        for n, (queries, keys) in enumerate(_both_ways(share, other)):
            student, *teachers = _logits(queries, keys, scale, teacher_scales)
            # logarithms of probabilities: of the keys for own rows, and of own rows for the keys (a column is a row of the other side)
            row, column = student - sums[:, n, 0, None], student - theirs[None, :, 1 - n, 0]
            target = match / sums[:, n, -1, None]  # a match has as many matches as the row: the same in both directions
            own, others = share.weight[:, None] / (2 * all_weight), other.weight[None, :] / (2 * all_weight)
            value["contrastive"] -= (own * target * row).sum()
            pull = {"contrastive": own * (row.exp() - target) + others * (column.exp() - target)}
            if k:
                pull["affinity"] = torch.zeros_like(student)
                for m, logits in enumerate(teachers, start=1):
                    said, said_of = logits - sums[:, n, m, None], logits - theirs[None, :, 1 - n, m]
                    value["affinity"] += (said.exp() * (said - row)).sum() / (2 * k * size)
                    pull["affinity"] += (row.exp() - said.exp() + column.exp() - said_of.exp()) / (2 * k * size)
            for name, pulled in pull.items():
                grads[name][n] += scale * pulled @ keys[0]
                if n == 0:  # every pair of a picture and a text is seen once so
                    grads[name][2] += (pulled * student).sum() / scale
    return {name: (_total(value[name], processes), grads[name][0], grads[name][1], _total(grads[name][2], processes)) for name in names}


def _both_ways(share: Share, other: Share) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Own rows and the other's: pictures among texts, texts among pictures; the student's embeddings first, then the teachers'."""
    images, texts = [share.image, *share.teacher_images], [share.text, *share.teacher_texts]
    return [(images, [other.text, *other.teacher_texts]), (texts, [other.image, *other.teacher_images])]


def _logits(queries: Sequence[Tensor], keys: Sequence[Tensor], scale: float, teacher_scales: Sequence[float]) -> list[Tensor]:
    return [factor * query @ key.T for query, key, factor in zip(queries, keys, (scale, *teacher_scales), strict=True)]


def _around(share: Share, sums: Tensor | None, processes: Processes) -> Iterator[tuple[Share, Tensor | None]]:
    """This process's share, then each other one's, with its row sums where they are given: passed on to the next process, taken from the one before."""
    yield share, sums
    if processes.world == 1:
        return
    floats, shapes = _pack(share, sums)
    numbers = share.same.clone()
    after, before = (processes.rank + 1) % processes.world, (processes.rank - 1) % processes.world
    for _ in range(processes.world - 1):
        taken, numbers_taken = torch.empty_like(floats), torch.empty_like(numbers)
        requests = dist.batch_isend_irecv([
            dist.P2POp(dist.isend, floats, after), dist.P2POp(dist.irecv, taken, before), dist.P2POp(dist.isend, numbers, after), dist.P2POp(dist.irecv, numbers_taken, before)
        ])  # fmt: skip
        for request in requests:
            request.wait()
        floats, numbers = taken, numbers_taken
        yield _unpack(floats, shapes, numbers, len(share.teacher_images), sums is not None)


def _pack(share: Share, sums: Tensor | None) -> tuple[Tensor, list[torch.Size]]:
    parts = [share.image, share.text, *share.teacher_images, *share.teacher_texts, share.weight, *([] if sums is None else [sums])]
    return torch.cat([part.detach().reshape(-1) for part in parts]).contiguous(), [part.shape for part in parts]


def _unpack(floats: Tensor, shapes: Sequence[torch.Size], same: Tensor, k: int, with_sums: bool) -> tuple[Share, Tensor | None]:
    parts = [part.view(shape) for part, shape in zip(floats.split([shape.numel() for shape in shapes]), shapes, strict=True)]
    share = Share(image=parts[0], text=parts[1], teacher_images=parts[2 : 2 + k], teacher_texts=parts[2 + k : 2 + 2 * k], weight=parts[2 + 2 * k], same=same)
    return share, parts[-1] if with_sums else None


def _total(value: Tensor, processes: Processes) -> Tensor:
    value = value.clone()
    if processes.world > 1:
        dist.all_reduce(value)
    return value
