"""Losses as functions of tensors.

Shapes: B = batch, M = texts, D = student's embed_dim, K = teachers, E_k = dimension of teacher k. All embeddings are of unit norm;
`logit_scale` is multiplicative. Every loss is a scalar: the mean over the batch.

`block`: how many rows of the B x B matrix of similarities are held at a time, 0 for all. Value and gradient are the same (to rounding);
each block is computed a second time for the gradient, so that memory grows with block * B instead of B * B.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def clip_loss(
    image: Tensor, text: Tensor, logit_scale: Tensor | float, same: Tensor | None = None, weight: Tensor | None = None, block: int = 0
) -> Tensor:  # fmt: skip
    """Symmetric contrastive loss (Radford et al. 2021, figure 3).

    Args:
        image, text: (B, D).
        same: (B,) integers; pairs with equal numbers carry the same caption. Such a caption fits all their pictures, so the
            target is spread evenly over them instead of calling true matches negatives. None: each pair is its own.
        weight: (B,) not negative; how much the rows of a pair count, in both directions. The mean is over the weights.
    """
    if weight is not None or block:
        found = _both_ways(lambda logits, rows: F.cross_entropy(logits, _targets(logits, rows, same), reduction="none"), image, text, logit_scale, block)
        return found.mean() if weight is None else (weight * found).sum() / weight.sum()
    logits = logit_scale * image @ text.T  # (B, B)
    if same is None:
        target = torch.arange(len(image), device=image.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    shared = (same[:, None] == same[None, :]).to(logits.dtype)
    shared = shared / shared.sum(1, keepdim=True)  # symmetric: rows and columns of one group have the same count
    return (F.cross_entropy(logits, shared) + F.cross_entropy(logits.T, shared)) / 2


def affinity_loss(
    image: Tensor, text: Tensor, logit_scale: Tensor | float,
    teacher_images: Sequence[Tensor], teacher_texts: Sequence[Tensor], teacher_scales: Sequence[float], block: int = 0,
) -> Tensor:  # fmt: skip
    """Contrastive relational distillation (MobileCLIP, equation 3): the student's rows of softmaxed similarities follow each teacher's.

    Mean over teachers and over both directions of KL(teacher || student); zero when the similarities agree, whatever the
    teachers' dimensions are.

    Args:
        image, text: the student's (B, D).
        teacher_images, teacher_texts: K tensors (B, E_k).
        teacher_scales: K multiplicative logit scales, one per teacher.
    """
    if block:
        return _affinity_in_blocks(image, text, logit_scale, teacher_images, teacher_texts, teacher_scales, block)
    logits = logit_scale * image @ text.T
    student = (F.log_softmax(logits, dim=1), F.log_softmax(logits.T, dim=1))
    total = logits.new_zeros(())
    for teacher_image, teacher_text, scale in zip(teacher_images, teacher_texts, teacher_scales, strict=True):
        teacher_logits = scale * teacher_image @ teacher_text.T
        for row, direction in zip(student, (teacher_logits, teacher_logits.T), strict=True):
            total = total + F.kl_div(row, F.log_softmax(direction, dim=1), reduction="batchmean", log_target=True)
    return total / (2 * len(teacher_images))


def _affinity_in_blocks(
    image: Tensor, text: Tensor, logit_scale: Tensor | float,
    teacher_images: Sequence[Tensor], teacher_texts: Sequence[Tensor], teacher_scales: Sequence[float], block: int,
) -> Tensor:  # fmt: skip
    total = image.new_zeros(())
    for query, keys, teacher_queries, teacher_keys in ((image, text, teacher_images, teacher_texts), (text, image, teacher_texts, teacher_images)):

        def divergence(logits: Tensor, rows: slice, of: Sequence[Tensor] = teacher_queries, to: Sequence[Tensor] = teacher_keys) -> Tensor:
            student = F.log_softmax(logits, dim=1)
            targets = [F.log_softmax(scale * one[rows] @ other.T, dim=1) for one, other, scale in zip(of, to, teacher_scales, strict=True)]
            return torch.stack([F.kl_div(student, target, reduction="none", log_target=True).sum(1) for target in targets]).sum(0)

        total = total + _per_row(divergence, query, keys, logit_scale, 0.0, block).mean()
    return total / (2 * len(teacher_images))


def sigmoid_loss(
    image: Tensor, text: Tensor, logit_scale: Tensor | float, logit_bias: Tensor | float,
    same: Tensor | None = None, weight: Tensor | None = None, block: int = 0,
) -> Tensor:  # fmt: skip
    """Each of the B x B pairs alone, a match or none (SigLIP, Zhai et al. 2023, arXiv 2303.15343, equation 1), summed over texts.

    Args:
        image, text: (B, D).
        logit_bias: added to every logit; SigLIP starts at -10 with a scale of 10.
        same: (B,) integers; pairs with equal numbers carry the same caption, and all of these are matches.
        weight: (B,) not negative; how much the match of a pair counts. That other captions do not fit a picture holds whatever its own is worth.
    """

    def row_loss(logits: Tensor, rows: slice) -> Tensor:
        match = _matches(len(text), rows, same, logits.device)
        terms = F.softplus(torch.where(match, -logits, logits))
        return terms.sum(1) if weight is None else torch.where(match, weight[rows, None] * terms, terms).sum(1)

    return _per_row(row_loss, image, text, logit_scale, logit_bias, block).mean()


def sigmoid_affinity_loss(
    image: Tensor, text: Tensor, logit_scale: Tensor | float, logit_bias: Tensor | float, teacher_images: Sequence[Tensor], teacher_texts: Sequence[Tensor],
    teacher_scales: Sequence[float], teacher_biases: Sequence[float], block: int = 0,
) -> Tensor:  # fmt: skip
    """Affinity distillation for a student of `sigmoid_loss`: for each of the B x B pairs the student's probability of a match follows each
    teacher's.

    Mean over teachers and rows of the sum over texts of KL(teacher || student) between two yes-or-no distributions; zero when all agree.

    Args:
        teacher_scales, teacher_biases: K each. A teacher that was trained with a softmax has no bias: one that makes its own matches as likely
            as not, minus scale times the mean cosine of a match, keeps its order and says where it doubts.
    """

    def row_loss(logits: Tensor, rows: slice) -> Tensor:
        total = torch.zeros_like(logits[:, 0])
        for teacher_image, teacher_text, scale, bias in zip(teacher_images, teacher_texts, teacher_scales, teacher_biases, strict=True):
            target = scale * teacher_image[rows] @ teacher_text.T + bias
            yes, no = target.sigmoid(), (-target).sigmoid()
            total = total + (yes * (F.logsigmoid(target) - F.logsigmoid(logits)) + no * (F.logsigmoid(-target) - F.logsigmoid(-logits))).sum(1)
        return total / len(teacher_images)

    return _per_row(row_loss, image, text, logit_scale, logit_bias, block).mean()


def captions_loss(image: Tensor, text: Tensor, owner: Tensor, logit_scale: Tensor | float) -> Tensor:
    """`clip_loss` where a picture has several captions in the batch: its target is spread evenly over them, and each of them finds it.

    Args:
        image: (B, D). text: (M, D). owner: (M,) int64, the picture that a text belongs to; every picture has at least one.
    """
    logits = logit_scale * image @ text.T  # (B, M)
    own = (owner[None, :] == torch.arange(len(image), device=image.device)[:, None]).to(logits.dtype)
    found = F.cross_entropy(logits, own / own.sum(1, keepdim=True))
    return (found + F.cross_entropy(logits.T, owner)) / 2


def nested_loss(loss: Callable[[Tensor, Tensor], Tensor], image: Tensor, text: Tensor, dims: Sequence[int]) -> Tensor:
    """The mean of a loss over the first 64, 128, … coordinates of the embeddings, each cut brought to unit norm (Matryoshka representation
    learning, Kusupati et al. 2022, arXiv 2205.13147): one model serves every length of vector.

    Args:
        loss: takes image and text, (B, d) each. dims: each at most D.

    Raises:
        ValueError: a length that the embeddings do not have.
    """
    if not dims or min(dims) < 1 or max(dims) > image.shape[1]:
        raise ValueError(f"dims are {list(dims)}; expected lengths from 1 to the embeddings' {image.shape[1]}")
    return torch.stack([loss(F.normalize(image[:, :dim], dim=-1), F.normalize(text[:, :dim], dim=-1)) for dim in dims]).mean()


def gate(similarity: Tensor, typical: float, sharpness: float = 2.0) -> Tensor:
    """Weights of samples or captions from how well picture and text agree in the teachers' space: 1 from the typical similarity on, falling
    as exp(sharpness * (similarity - typical)) below it (the gates of ALIP, Yang et al. 2023, arXiv 2308.08428, section 3; its running mean is
    the store's mean here, since stored similarities do not change). similarity: any shape.
    """
    return torch.exp(sharpness * (similarity - typical)).clamp(max=1.0)


def feature_loss(student: Tensor, target: Tensor) -> Tensor:
    """Mean of 1 - cosine between the student's embeddings and the targets, both (B, D): 0 equal, 2 opposite."""
    return (1 - F.cosine_similarity(student, target, dim=-1)).mean()


def ensemble_basis(teacher_embeddings: Sequence[Tensor], dim: int) -> Tensor:
    """Directions that keep most of an ensemble's geometry: (sum of E_k, dim), orthonormal columns.

    The concatenation of K unit vectors has as inner product the sum of the K teachers' cosines; its first `dim` principal
    directions about the origin keep these inner products best in the least-squares sense (Eckart-Young). The student's
    space is the ensemble's, seen along them: feature distillation needs no heads that are thrown away later.

    Args:
        teacher_embeddings: K tensors (N, E_k), rows of the same N things (pictures and texts together).
        dim: at most the sum of E_k; a smaller space than asked for is padded with zeros.
    """
    stacked = torch.cat(list(teacher_embeddings), dim=1).double()
    values, vectors = torch.linalg.eigh(stacked.T @ stacked)
    order = values.argsort(descending=True)[:dim]
    basis = vectors[:, order]
    # The sign of an eigenvector is arbitrary: fix it, so that two runs agree.
    basis = basis * basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()
    return F.pad(basis, (0, dim - basis.shape[1])).float()


def ensemble_target(teacher_embeddings: Sequence[Tensor], basis: Tensor) -> Tensor:
    """K tensors (B, E_k) -> (B, dim) of unit norm: the ensemble's embedding in the student's space."""
    return F.normalize(torch.cat(list(teacher_embeddings), dim=1) @ basis, dim=-1)


def _matches(count: int, rows: slice, same: Tensor | None, device: torch.device) -> Tensor:
    """(rows, count) booleans: which texts fit which of these pictures."""
    numbers = torch.arange(count, device=device) if same is None else same
    return numbers[rows, None] == numbers[None, :]


def _targets(logits: Tensor, rows: slice, same: Tensor | None) -> Tensor:
    if same is None:
        return torch.arange(logits.shape[1], device=logits.device)[rows]
    shared = _matches(logits.shape[1], rows, same, logits.device).to(logits.dtype)
    return shared / shared.sum(1, keepdim=True)


RowLoss = Callable[[Tensor, slice], Tensor]
"""Logits (b, B) of some rows, and which rows -> their losses (b,)."""


def _both_ways(row_loss: RowLoss, image: Tensor, text: Tensor, logit_scale: Tensor | float, block: int) -> Tensor:
    """(B,): mean of a pair's losses as picture among texts and as text among pictures."""
    return (_per_row(row_loss, image, text, logit_scale, 0.0, block) + _per_row(row_loss, text, image, logit_scale, 0.0, block)) / 2


def _per_row(row_loss: RowLoss, query: Tensor, keys: Tensor, logit_scale: Tensor | float, logit_bias: Tensor | float, block: int) -> Tensor:
    """(B,): the losses of all rows, `block` rows of logits at a time."""

    def of(queries: Tensor, keys: Tensor, scale: Tensor | float, bias: Tensor | float, rows: slice) -> Tensor:
        return row_loss(scale * queries @ keys.T + bias, rows)

    count = len(query)
    if not 0 < block < count:
        return of(query, keys, logit_scale, logit_bias, slice(0, count))
    slices = [slice(start, min(start + block, count)) for start in range(0, count, block)]
    return torch.cat([checkpoint(of, query[rows], keys, logit_scale, logit_bias, rows, use_reentrant=False, preserve_rng_state=False) for rows in slices])
