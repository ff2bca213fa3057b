"""Losses as functions of tensors.

Shapes: B = batch, D = student's embed_dim, K = teachers, E_k = dimension of teacher k. All embeddings are of unit norm and
float32; `logit_scale` is multiplicative. Every function returns a scalar: the mean over the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def clip_loss(image: Tensor, text: Tensor, logit_scale: Tensor | float, same: Tensor | None = None) -> Tensor:
    """Symmetric contrastive loss (Radford et al. 2021, figure 3).

    Args:
        image, text: (B, D).
        same: (B,) integers; pairs with equal numbers carry the same caption. Such a caption fits all their pictures, so the
            target is spread evenly over them instead of calling true matches negatives. None: each pair is its own.
    """
    logits = logit_scale * image @ text.T  # (B, B)
    if same is None:
        target = torch.arange(len(image), device=image.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    shared = (same[:, None] == same[None, :]).to(logits.dtype)
    shared = shared / shared.sum(1, keepdim=True)  # symmetric: rows and columns of one group have the same count
    return (F.cross_entropy(logits, shared) + F.cross_entropy(logits.T, shared)) / 2


def affinity_loss(
    image: Tensor, text: Tensor, logit_scale: Tensor | float,
    teacher_images: Sequence[Tensor], teacher_texts: Sequence[Tensor], teacher_scales: Sequence[float],
) -> Tensor:  # fmt: skip
    """Contrastive relational distillation (MobileCLIP, equation 3): the student's rows of softmaxed similarities follow each teacher's.

    Mean over teachers and over both directions of KL(teacher || student); zero when the similarities agree, whatever the
    teachers' dimensions are.

    Args:
        image, text: the student's (B, D).
        teacher_images, teacher_texts: K tensors (B, E_k).
        teacher_scales: K multiplicative logit scales, one per teacher.
    """
    logits = logit_scale * image @ text.T
    student = (F.log_softmax(logits, dim=1), F.log_softmax(logits.T, dim=1))
    total = logits.new_zeros(())
    for teacher_image, teacher_text, scale in zip(teacher_images, teacher_texts, teacher_scales, strict=True):
        teacher_logits = scale * teacher_image @ teacher_text.T
        for row, direction in zip(student, (teacher_logits, teacher_logits.T), strict=True):
            total = total + F.kl_div(row, F.log_softmax(direction, dim=1), reduction="batchmean", log_target=True)
    return total / (2 * len(teacher_images))


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
