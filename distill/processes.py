"""Several processes that train one model: embeddings are gathered, gradients summed, statistics averaged (torch.distributed; gloo or NCCL).

Each process computes the loss of the whole batch from everybody's embeddings and the gradient of its own; no gradient of an embedding travels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET_BYTES = 32 << 20
"""Gradients that are sent together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Processes:
    """This process among `world`. Collective calls: every process makes the same ones in the same order."""

    rank: int = 0
    world: int = 1

    @classmethod
    def joined(cls) -> Processes:
        """The process group that has been joined, or a process of its own."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(rank=dist.get_rank(), world=dist.get_world_size())

    def gather(self, embeddings: list[Tensor]) -> list[Tensor]:
        """(b, D) each -> (world * b, D) each in order of rank. Gradients flow to this process's own rows alone."""
        if self.world == 1:
            return embeddings
        found = []
        for own in embeddings:
            all_of_them = [torch.empty_like(own) for _ in range(self.world)]
            dist.all_gather(all_of_them, own.detach().contiguous())
            all_of_them[self.rank] = own
            found.append(torch.cat(all_of_them))
        return found

    def sum_gradients(self, parameters: Iterable[nn.Parameter], whole: Iterable[nn.Parameter] = ()) -> None:
        """Replace each gradient by its sum over processes. `whole`: parameters whose gradient each process has whole already.

        A parameter without a gradient here counts as zero; without one in any process it gets a zero.
        """
        if self.world == 1:
            return
        complete = {id(parameter) for parameter in whole}
        for parameter in (parameters := list(parameters)):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if id(parameter) in complete:
                parameter.grad /= self.world
        for bucket in _buckets([parameter.grad for parameter in parameters if parameter.grad is not None]):
            self._sum(bucket)

    def mean(self, tensors: list[Tensor]) -> None:
        """Replace each tensor by its mean over processes."""
        if self.world == 1:
            return
        for bucket in _buckets(tensors):
            self._sum(bucket)
            torch._foreach_div_(bucket, float(self.world))

    def _sum(self, tensors: list[Tensor]) -> None:
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, values in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(values.view_as(tensor))


def _buckets(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Tensors of one type and device, up to BUCKET_BYTES together; the same in every process."""
    found: list[list[Tensor]] = []
    open_ones: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], int]] = {}
    for tensor in tensors:
        kind = (tensor.dtype, tensor.device)
        bucket, held = open_ones.get(kind, ([], BUCKET_BYTES))
        size = tensor.numel() * tensor.element_size()
        if held + size > BUCKET_BYTES:
            bucket, held = [], 0
            found.append(bucket)
        bucket.append(tensor)
        open_ones[kind] = (bucket, held + size)
    return found
