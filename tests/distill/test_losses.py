"""Losses: hand-computed values, invariances, and gradients that point where they should."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.losses import affinity_loss, clip_loss, ensemble_basis, ensemble_target, feature_loss


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_clip_loss_equals_open_clip():
    from open_clip.loss import ClipLoss

    image, text = unit(9, 16, seed=1), unit(9, 16, seed=2)
    assert torch.allclose(clip_loss(image, text, 17.0), ClipLoss()(image, text, torch.tensor(17.0)), atol=1e-6)


def test_clip_loss_by_hand():
    eye = torch.eye(2)
    # Logits are [[2, 0], [0, 2]]: each row's loss is log(1 + e^-2).
    assert clip_loss(eye, eye, 2.0).item() == pytest.approx(np.log1p(np.exp(-2)), abs=1e-6)
    # Both pairs carry one caption: the target is one half each, the loss log(1 + e^-2) + 1.
    assert clip_loss(eye, eye, 2.0, torch.tensor([5, 5])).item() == pytest.approx(np.log1p(np.exp(-2)) + 1, abs=1e-6)


@given(st.integers(2, 12), st.integers(0, 1000))
@settings(max_examples=15, deadline=None, derandomize=True)
def test_different_captions_are_the_plain_loss_and_order_does_not_matter(n, seed):
    image, text = unit(n, 8, seed=seed), unit(n, 8, seed=seed + 1)
    plain = clip_loss(image, text, 10.0)
    assert torch.allclose(plain, clip_loss(image, text, 10.0, torch.arange(n)), atol=1e-5)
    shuffle = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    same = torch.arange(n) // 2
    assert torch.allclose(clip_loss(image, text, 10.0, same), clip_loss(image[shuffle], text[shuffle], 10.0, same[shuffle]), atol=1e-5)


def test_affinity_is_zero_for_a_student_that_agrees_and_positive_otherwise():
    image, text = unit(8, 12, seed=3), unit(8, 12, seed=4)
    assert affinity_loss(image, text, 20.0, [image], [text], [20.0]).item() == pytest.approx(0, abs=1e-6)
    rotation = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(0)))[0]
    assert affinity_loss(image @ rotation, text @ rotation, 20.0, [image], [text], [20.0]).item() == pytest.approx(0, abs=1e-5)
    assert affinity_loss(unit(8, 12, seed=9), text, 20.0, [image], [text], [20.0]).item() > 0.1


def test_affinity_does_not_depend_on_the_order_of_teachers_of_unequal_dims():
    image, text = unit(6, 10), unit(6, 10, seed=1)
    images, texts, scales = [unit(6, 5, seed=2), unit(6, 33, seed=3)], [unit(6, 5, seed=4), unit(6, 33, seed=5)], [10.0, 50.0]
    one = affinity_loss(image, text, 7.0, images, texts, scales)
    other = affinity_loss(image, text, 7.0, images[::-1], texts[::-1], scales[::-1])
    assert torch.allclose(one, other, atol=1e-6)
    swapped = affinity_loss(image, text, 7.0, images, texts, scales[::-1])
    assert (one - swapped).abs() > 1e-3  # each teacher has its own temperature


def test_affinity_equals_its_definition():
    image, text, teacher_image, teacher_text = unit(5, 7), unit(5, 7, seed=1), unit(5, 9, seed=2), unit(5, 9, seed=3)
    student = (3.0 * image @ text.T).double().numpy()
    teacher = (8.0 * teacher_image @ teacher_text.T).double().numpy()

    def rows(logits: np.ndarray) -> np.ndarray:
        powers = np.exp(logits - logits.max(1, keepdims=True))
        return powers / powers.sum(1, keepdims=True)

    divergence = sum((p * np.log(p / q)).sum(1).mean() for p, q in ((rows(teacher), rows(student)), (rows(teacher.T), rows(student.T)))) / 2
    assert affinity_loss(image, text, 3.0, [teacher_image], [teacher_text], [8.0]).item() == pytest.approx(divergence, rel=1e-4)


def test_the_basis_keeps_the_ensembles_similarities():
    embeddings = [unit(40, 6, seed=1), unit(40, 4, seed=2)]
    stacked = torch.cat(embeddings, 1)
    full = ensemble_basis(embeddings, 10)
    assert torch.allclose(full.T @ full, torch.eye(10), atol=1e-5)
    assert torch.allclose((stacked @ full) @ (stacked @ full).T, stacked @ stacked.T, atol=1e-4)
    small = ensemble_basis(embeddings, 5)
    other = torch.linalg.qr(torch.randn(10, 5, generator=torch.Generator().manual_seed(1)))[0]

    def error(basis: torch.Tensor) -> float:
        return float(((stacked @ basis) @ (stacked @ basis).T - stacked @ stacked.T).norm())

    assert error(small) < error(other)
    assert torch.equal(small, ensemble_basis(embeddings, 5))
    assert ensemble_basis(embeddings, 16).shape == (10, 16)


def test_targets_and_feature_loss():
    embeddings = [unit(5, 6, seed=1), unit(5, 4, seed=2)]
    target = ensemble_target(embeddings, ensemble_basis(embeddings, 7))
    assert torch.allclose(target.norm(dim=1), torch.ones(5), atol=1e-6)
    assert feature_loss(target, target).item() == pytest.approx(0, abs=1e-6)
    assert feature_loss(-target, target).item() == pytest.approx(2, abs=1e-6)
    student = unit(5, 7, seed=8).requires_grad_()
    before = feature_loss(student, target)
    before.backward()
    assert feature_loss(student.detach() - 0.1 * student.grad, target) < before
