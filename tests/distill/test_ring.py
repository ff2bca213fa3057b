"""Losses of embeddings that go round in a ring are the losses of the whole batch: value and gradient, in fp64, for one, two and three processes."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from distill.losses import affinity_loss, clip_loss
from distill.processes import Processes
from distill.ring import Share, ring_losses

from .test_losses import unit

BATCH, SCALES = 12, (20.0, 7.0)


def data() -> dict[str, Tensor]:
    same = torch.tensor([0, 1, 2, 1, 4, 5, 6, 1, 8, 9, 6, 11])
    weight = torch.rand(BATCH, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.1
    found = {"image": unit(BATCH, 8, seed=0), "text": unit(BATCH, 8, seed=1), "i0": unit(BATCH, 5, seed=2), "t0": unit(BATCH, 5, seed=3), "i1": unit(BATCH, 9, seed=4)}
    return {**{name: value.double() for name, value in found.items()}, "t1": unit(BATCH, 9, seed=5).double(), "same": same, "weight": weight}


def whole() -> dict[str, Tensor]:
    """Values and gradients of the losses over the whole batch."""
    d, found = data(), {}
    for name in ("contrastive", "affinity"):
        image, text, scale = d["image"].clone().requires_grad_(), d["text"].clone().requires_grad_(), torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
        if name == "contrastive":
            loss = clip_loss(image, text, scale, d["same"], d["weight"])
        else:
            loss = affinity_loss(image, text, scale, [d["i0"], d["i1"]], [d["t0"], d["t1"]], SCALES)
        loss.backward()
        found |= {f"{name}.value": loss.detach(), f"{name}.image": image.grad, f"{name}.text": text.grad, f"{name}.scale": scale.grad}
    return found


def ringed(processes: Processes) -> dict[str, Tensor]:
    d, found = data(), {}
    share = BATCH // processes.world
    own = slice(processes.rank * share, (processes.rank + 1) * share)
    d = {name: value[own] for name, value in d.items()}
    for name in ("contrastive", "affinity"):
        image, text, scale = d["image"].clone().requires_grad_(), d["text"].clone().requires_grad_(), torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
        one = Share(image=image, text=text, teacher_images=[d["i0"], d["i1"]], teacher_texts=[d["t0"], d["t1"]], same=d["same"], weight=d["weight"])
        loss = ring_losses(one, scale, SCALES, processes)[name]
        loss.backward()
        found |= {f"{name}.value": loss.detach(), f"{name}.image": image.grad, f"{name}.text": text.grad, f"{name}.scale": scale.grad}
    return found


def one_of(rank: int, world: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        torch.save(ringed(Processes.joined()), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_ring_has_the_value_and_the_gradient_of_the_whole_batch(world: int, tmp_path: Path) -> None:
    if world == 1:
        parts = [ringed(Processes())]
    else:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        mp.spawn(one_of, args=(world, port, str(tmp_path)), nprocs=world)
        parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    for name, value in whole().items():
        if name.endswith((".image", ".text")):
            found = torch.cat([part[name] for part in parts])
            assert float((found - value).norm() / value.norm()) < 1e-12, name
        else:
            assert all(abs(float(part[name] - value)) <= 1e-12 * abs(float(value)) for part in parts), name


def test_without_teachers_there_is_no_affinity() -> None:
    d = data()
    share = Share(image=d["image"], text=d["text"], teacher_images=[], teacher_texts=[], same=torch.arange(BATCH), weight=torch.ones(BATCH, dtype=torch.float64))
    found = ring_losses(share, torch.tensor(9.0, dtype=torch.float64), (), Processes())
    assert set(found) == {"contrastive"}
    torch.testing.assert_close(found["contrastive"], clip_loss(d["image"], d["text"], 9.0), rtol=1e-12, atol=0)
