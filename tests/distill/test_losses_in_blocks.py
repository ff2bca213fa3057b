"""Sigmoid, weighted, nested and several-caption losses: against open_clip, by definition, and block by block equal to the whole in value and gradient."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distill.losses import affinity_loss, captions_loss, clip_loss, gate, nested_loss, sigmoid_affinity_loss, sigmoid_loss

from .test_losses import unit

B, D = 7, 12
TEACHERS = ([unit(B, 5, seed=2).double(), unit(B, 9, seed=3).double()], [unit(B, 5, seed=4).double(), unit(B, 9, seed=5).double()], [10.0, 50.0])
SAME = torch.tensor([0, 1, 1, 2, 3, 0, 4])
WEIGHT = torch.tensor([1.0, 0.2, 0.0, 1.0, 0.7, 0.9, 1.0], dtype=torch.float64)

LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]] = {
    "clip": lambda image, text, scale, bias, block: clip_loss(image, text, scale, block=block),
    "clip, equal captions": lambda image, text, scale, bias, block: clip_loss(image, text, scale, SAME, block=block),
    "clip, weighted": lambda image, text, scale, bias, block: clip_loss(image, text, scale, SAME, WEIGHT, block),
    "sigmoid": lambda image, text, scale, bias, block: sigmoid_loss(image, text, scale, bias, block=block),
    "sigmoid, weighted": lambda image, text, scale, bias, block: sigmoid_loss(image, text, scale, bias, SAME, WEIGHT, block),
    "affinity": lambda image, text, scale, bias, block: affinity_loss(image, text, scale, *TEACHERS, block=block),
    "sigmoid affinity": lambda image, text, scale, bias, block: sigmoid_affinity_loss(image, text, scale, bias, *TEACHERS, [-5.0, -30.0], block),
}


def value_and_gradient(loss: Callable[..., Tensor], block: int) -> list[Tensor]:
    leaves = [unit(B, D, seed=0).double(), unit(B, D, seed=1).double(), torch.tensor(8.0).double(), torch.tensor(-3.0).double()]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    value = loss(*leaves, block)
    return [value.detach(), *(gradient for gradient in torch.autograd.grad(value, leaves, allow_unused=True) if gradient is not None)]


@pytest.mark.parametrize("block", [1, 3, 4, 7, 100])
@pytest.mark.parametrize("name", LOSSES)
def test_blocks_give_the_value_and_the_gradient_of_the_whole(name: str, block: int) -> None:
    whole, blocks = (value_and_gradient(LOSSES[name], size) for size in (0, block))
    assert len(whole) == len(blocks) >= 4
    for one, other in zip(whole, blocks, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_is_the_values_slope(name: str) -> None:
    inputs = [unit(B, D, seed=6).double(), unit(B, D, seed=7).double(), torch.tensor(3.0).double(), torch.tensor(-2.0).double()]
    assert torch.autograd.gradcheck(lambda *values: LOSSES[name](*values, 3), [value.requires_grad_() for value in inputs])


def test_a_block_holds_no_more_than_its_rows() -> None:
    widest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
            out = function(*args, **(kwargs or {}))
            widest.append(out.numel() if isinstance(out, Tensor) else 0)
            return out

    image, text = unit(64, 4), unit(64, 4, seed=1)
    with Watch():
        clip_loss(image.requires_grad_(), text.requires_grad_(), 5.0, block=4).backward()
    assert max(widest) == 4 * 64


def test_the_sigmoid_loss_equals_open_clips() -> None:
    from open_clip.loss import SigLipLoss

    image, text = unit(9, 16, seed=1), unit(9, 16, seed=2)
    assert torch.allclose(sigmoid_loss(image, text, 10.0, -10.0), SigLipLoss()(image, text, torch.tensor(10.0), torch.tensor(-10.0)), atol=1e-6)


def test_affinity_equals_open_clips_distillation_but_for_the_teachers_entropy() -> None:
    from open_clip.loss import DistillClipLoss

    image, text, teacher_image, teacher_text = (unit(6, 16, seed=n) for n in range(4))
    _, cross = DistillClipLoss()(image, text, torch.tensor(9.0), teacher_image, teacher_text, torch.tensor(20.0))
    logits = 20.0 * teacher_image @ teacher_text.T
    entropy = sum(-(row.softmax(1) * row.log_softmax(1)).sum(1).mean() for row in (logits, logits.T)) / 2
    for block in (0, 2):
        assert torch.allclose(affinity_loss(image, text, 9.0, [teacher_image], [teacher_text], [20.0], block), cross - entropy, atol=1e-5)


@given(st.permutations(range(3)), st.integers(0, 3))
@settings(max_examples=12, deadline=None, derandomize=True)
def test_the_order_of_teachers_does_not_matter(order: list[int], block: int) -> None:
    image, text = unit(B, D).double(), unit(B, D, seed=1).double()
    images, texts = ([unit(B, 3 + 4 * k, seed=base + k).double() for k in range(3)] for base in (10, 20))
    scales, biases = [5.0, 20.0, 60.0], [-1.0, -9.0, -40.0]
    shuffled = [[values[k] for k in order] for values in (images, texts, scales, biases)]
    assert torch.allclose(affinity_loss(image, text, 7.0, images, texts, scales, block), affinity_loss(image, text, 7.0, *shuffled[:3], block), rtol=1e-12)
    one, other = (sigmoid_affinity_loss(image, text, 7.0, -3.0, *values, block) for values in ((images, texts, scales, biases), shuffled))
    assert torch.allclose(one, other, rtol=1e-12)


def test_sigmoid_affinity_is_zero_for_a_student_that_agrees_and_grows_with_what_it_doubts() -> None:
    image, text = unit(8, 12, seed=3), unit(8, 12, seed=4)
    assert sigmoid_affinity_loss(image, text, 20.0, -9.0, [image], [text], [20.0], [-9.0]).item() == pytest.approx(0, abs=1e-6)
    near, far = (sigmoid_affinity_loss(image, text, 20.0, bias, [image], [text], [20.0], [-9.0]).item() for bias in (-8.0, -4.0))
    assert 0 < near < far


def test_a_pair_without_weight_teaches_nothing_of_its_own_match() -> None:
    image, text = unit(4, 6).double().requires_grad_(), unit(4, 6, seed=1).double()
    weight = torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    rows = [F.cross_entropy((9.0 * one @ other.T), torch.arange(4), reduction="none") for one, other in ((image, text), (text, image))]
    kept = (sum(rows) / 2)[[0, 1, 3]].mean()
    assert torch.allclose(clip_loss(image, text, 9.0, weight=weight), kept)
    with_it, without = (sigmoid_loss(image, text, 9.0, -4.0, weight=value) for value in (torch.ones(4, dtype=torch.float64), weight))
    match = F.softplus(-(9.0 * image[2] @ text[2] - 4.0)) / 4
    assert torch.allclose(with_it - without, match)


def test_equal_weights_are_no_weights() -> None:
    image, text = unit(5, 6).double(), unit(5, 6, seed=1).double()
    assert torch.allclose(clip_loss(image, text, 9.0), clip_loss(image, text, 9.0, weight=torch.full((5,), 0.3).double()), rtol=1e-12)


def test_one_caption_a_picture_is_the_clip_loss_and_several_share_the_target() -> None:
    image, text = unit(5, 6), unit(5, 6, seed=1)
    assert torch.allclose(captions_loss(image, text, torch.arange(5), 9.0), clip_loss(image, text, 9.0), atol=1e-6)
    twice = torch.cat([text, text])
    # Each picture's target is one half on either copy: log 2 more from pictures to texts, nothing more the other way.
    assert captions_loss(image, twice, torch.arange(10) % 5, 9.0).item() == pytest.approx(clip_loss(image, text, 9.0).item() + math.log(2) / 2, abs=1e-5)


def test_nested_is_the_mean_over_cuts() -> None:
    image, text = unit(6, 16), unit(6, 16, seed=1)

    def loss(one: Tensor, other: Tensor) -> Tensor:
        return clip_loss(one, other, 10.0)

    parts = [clip_loss(F.normalize(image[:, :dim], dim=-1), F.normalize(text[:, :dim], dim=-1), 10.0) for dim in (4, 8, 16)]
    assert torch.allclose(nested_loss(loss, image, text, (4, 8, 16)), torch.stack(parts).mean(), atol=1e-6)
    with pytest.raises(ValueError, match="from 1 to the embeddings' 16"):
        nested_loss(loss, image, text, (4, 32))


def test_the_gate_is_one_from_the_typical_similarity_on() -> None:
    weights = gate(torch.tensor([0.9, 0.3, 0.25, -0.1]), typical=0.3)
    assert weights.tolist() == pytest.approx([1.0, 1.0, math.exp(-0.1), math.exp(-0.8)])
