"""The gradient from pieces is the gradient of the whole: with BatchNorm, dropout, several processes, in fp64."""

from __future__ import annotations

import copy
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from distill.accumulation import accumulate, drawn_from
from distill.ghost_norm import ghost_batches, one_update
from distill.losses import affinity_loss, clip_loss
from distill.processes import Processes
from mobileclip.config import ModelConfig
from mobileclip.models import create_model
from mobileclip.students import student_config
from runtime.errors import RecipeError

from .test_losses import unit

BATCH, GHOST = 12, 2


class Towers(nn.Module):
    """Convolutions with BatchNorm and dropout beside a text tower, small enough for fp64."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        # A bias before BatchNorm has no gradient but rounding, which Adam would make as large as any other.
        first, second = nn.Conv2d(3, 8, 3, stride=2, bias=not norm), nn.Conv2d(8, 8, 3, bias=not norm)
        layers = [first, nn.BatchNorm2d(8) if norm else nn.GroupNorm(2, 8), nn.GELU(), nn.Dropout(0.3), second, nn.BatchNorm2d(8, momentum=None)]
        self.image = nn.Sequential(*(layers if norm else layers[:5]), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6))
        self.text = nn.Sequential(nn.Embedding(20, 8), nn.Flatten(), nn.Dropout(0.1), nn.Linear(32, 6))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.double()

    def encode_image(self, pixels: Tensor) -> Tensor:
        return nn.functional.normalize(self.image(pixels), dim=-1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        return nn.functional.normalize(self.text(tokens), dim=-1)


def batch(step: int = 0, size: int = BATCH) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(100 + step)
    pixels = torch.randn(size, 3, 9, 9, generator=generator).double()
    tokens = torch.randint(0, 20, (size, 4), generator=generator)
    return pixels, tokens, [unit(size, 5, seed=step).double()], [unit(size, 5, seed=step + 1).double()]


def loss_of(model: Towers | nn.Module, images: list[Tensor], texts: list[Tensor], calls: list[int] | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(image: Tensor, text: Tensor) -> Tensor:
        if calls is not None:
            calls.append(len(image))
        scale = model.logit_scale.exp()
        return clip_loss(image, text, scale) + affinity_loss(image, text, scale, images, texts, [20.0])

    return loss


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def close(one: dict[str, Tensor], other: dict[str, Tensor], relative: float = 1e-12) -> None:
    assert one.keys() == other.keys()
    assert len(one) > 4
    for name in one:
        assert float((one[name] - other[name]).norm()) <= relative * max(float(other[name].norm()), 1e-3), name


@pytest.mark.parametrize("pieces", [2, 3, 6, 12])
def test_pieces_give_the_gradient_of_the_large_batch(pieces: int) -> None:
    model = Towers(norm=False).eval()  # no BatchNorm, no dropout: the large batch goes through in one piece
    pixels, tokens, images, texts = batch()
    loss_of(model, images, texts)(model.encode_image(pixels), model.encode_text(tokens)).backward()
    wanted, calls = gradients(model), []
    model.zero_grad()
    accumulate(
        lambda _, rows: (model.encode_image(pixels[rows]), model.encode_text(tokens[rows])), ghost_batches(BATCH, BATCH // pieces), loss_of(model, images, texts, calls)
    )  # fmt: skip
    close(gradients(model), wanted)
    assert calls == [BATCH]


def test_without_the_cache_the_pieces_would_not() -> None:
    model = Towers(norm=False).eval()
    pixels, tokens, images, texts = batch()
    loss_of(model, images, texts)(model.encode_image(pixels), model.encode_text(tokens)).backward()
    wanted = gradients(model)
    model.zero_grad()
    for _, rows in ghost_batches(BATCH, 4):
        (loss_of(model, [images[0][rows]], [texts[0][rows]])(model.encode_image(pixels[rows]), model.encode_text(tokens[rows])) / 3).backward()
    with pytest.raises(AssertionError):
        close(gradients(model), wanted, 1e-2)


def test_batch_norm_and_dropout_are_those_of_one_graph_over_all_ghost_batches() -> None:
    pixels, tokens, images, texts = batch()
    whole, cached = Towers().train(), Towers().train()
    pieces = ghost_batches(BATCH, GHOST)
    with one_update(whole):
        parts = []
        for number, rows in pieces:
            with drawn_from(5, 3, number):
                parts.append((whole.encode_image(pixels[rows]), whole.encode_text(tokens[rows])))
        loss_of(whole, images, texts)(*(torch.cat(part) for part in zip(*parts, strict=True))).backward()
    with one_update(cached):
        accumulate(lambda _, rows: (cached.encode_image(pixels[rows]), cached.encode_text(tokens[rows])), pieces, loss_of(cached, images, texts), seed=5, step=3)
    close(gradients(cached), gradients(whole))
    for name, value in cached.state_dict().items():
        assert torch.allclose(value.double(), whole.state_dict()[name].double(), rtol=1e-13), name


def test_the_order_in_which_pieces_run_and_what_was_drawn_before_change_nothing() -> None:
    pixels, tokens, images, texts = batch()
    found = []
    for noise in (0, 3):
        torch.manual_seed(noise)
        model = Towers().train()
        torch.rand(noise)
        before = torch.get_rng_state()
        with one_update(model):
            accumulate(lambda _, rows, model=model: (model.encode_image(pixels[rows]), model.encode_text(tokens[rows])), ghost_batches(BATCH, GHOST), loss_of(model, images, texts))
        assert torch.equal(before, torch.get_rng_state())
        found.append(gradients(model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_step_moves_the_statistics_once_toward_the_mean_over_ghost_batches() -> None:
    norm = nn.BatchNorm1d(3, momentum=0.25).double().train()
    norm.running_mean.fill_(2.0)
    values = torch.randn(8, 3).double()
    with one_update(norm):
        for _, rows in ghost_batches(8, 4):
            norm(values[rows])
    assert torch.allclose(norm.running_mean, 0.75 * 2.0 + 0.25 * values.mean(0), rtol=1e-12)
    assert torch.allclose(norm.running_var, 0.75 + 0.25 * (values[:4].var(0) + values[4:].var(0)) / 2, rtol=1e-12)
    assert int(norm.num_batches_tracked) == 1
    assert norm.momentum == 0.25


def test_an_error_or_an_unused_layer_leaves_the_statistics_as_they_were() -> None:
    model = Towers().train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="expected 4D input"), one_update(model):
        model.image[1](model.image[:5](batch()[0]).flatten(1))  # the first BatchNorm sees a batch and then refuses another
    with one_update(model):
        model.encode_text(batch()[1])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [module.momentum for module in model.modules() if isinstance(module, nn.BatchNorm2d)] == [0.1, None]


@pytest.mark.parametrize(("size", "ghost", "world", "message"), [(10, 2, 3, "cannot be shared by 3"), (12, 5, 1, "do not fill"), (12, 4, 2, "do not fill"), (1, 1, 2, "cannot")])
def test_shares_that_do_not_fit_are_refused(size: int, ghost: int, world: int, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        ghost_batches(size, ghost, 0, world)


def test_ghost_batches_are_the_same_for_any_number_of_processes() -> None:
    alone = [(number, range(BATCH)[rows]) for number, rows in ghost_batches(BATCH, GHOST)]
    for world in (2, 3):
        shared = [(number, range(BATCH)[rank * BATCH // world :][rows]) for rank in range(world) for number, rows in ghost_batches(BATCH, GHOST, rank, world)]
        assert shared == alone


def train(steps: int, processes: Processes) -> Towers:
    model = Towers().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    share = BATCH // processes.world
    own = slice(processes.rank * share, (processes.rank + 1) * share)
    for step in range(steps):
        pixels, tokens, images, texts = batch(step)
        pixels, tokens = pixels[own], tokens[own]
        optimizer.zero_grad()
        with one_update(model, processes.mean):
            accumulate(
                lambda _, rows, pixels=pixels, tokens=tokens: (model.encode_image(pixels[rows]), model.encode_text(tokens[rows])),
                ghost_batches(BATCH, GHOST, processes.rank, processes.world), loss_of(model, images, texts), seed=1, step=step, exchange=processes,
            )  # fmt: skip
        processes.sum_gradients(model.parameters(), whole=[model.logit_scale])
        optimizer.step()
    return model


def one_of(rank: int, world: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        torch.save(train(20, Processes.joined()).state_dict(), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3])
def test_several_processes_train_what_one_trains(world: int, tmp_path: Path) -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    mp.spawn(one_of, args=(world, port, str(tmp_path)), nprocs=world)
    alone = train(20, Processes()).state_dict()
    shared = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world)]
    for name, value in alone.items():
        assert all(torch.equal(shared[0][name], other[name]) for other in shared[1:]), name
        assert torch.allclose(shared[0][name].double(), value.double(), rtol=1e-10, atol=1e-10), name
    start = Towers().state_dict()
    assert float((alone["image.0.weight"] - start["image.0.weight"]).norm()) > 0.1  # it has learned


def test_a_student_of_ours_in_pieces() -> None:
    config: ModelConfig = student_config("pocket_s", image_size=32, vocab_size=600)
    torch.manual_seed(0)
    model = create_model(config).double().train()
    twin = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(8, 3, 32, 32, generator=generator).double()
    tokens = torch.randint(1, 598, (8, config.text.context_length), generator=generator, dtype=torch.int32)
    tokens[:, 7] = 599
    images, texts = [unit(8, 5).double()], [unit(8, 5, seed=1).double()]
    pieces = ghost_batches(8, 4)
    with one_update(model):
        parts = [(model.encode_image(pixels[rows]), model.encode_text(tokens[rows])) for _, rows in pieces]
        loss_of(model, images, texts)(*(torch.cat(part) for part in zip(*parts, strict=True))).backward()
    with one_update(twin):
        accumulate(lambda _, rows: (twin.encode_image(pixels[rows]), twin.encode_text(tokens[rows])), pieces, loss_of(twin, images, texts))
    close(gradients(twin), gradients(model))
