"""Several processes that train one model: embeddings are gathered, gradients summed, statistics averaged (torch.distributed; gloo or NCCL).

Each process computes the loss of the whole batch from everybody's embeddings and the gradient of its own; no gradient of an embedding travels.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
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
        """Replace each gradient by its sum over processes. A parameter has one in every process or in none.

        Args:
            whole: parameters whose gradient each process has whole already.
        """
        if self.world == 1:
            return
        complete = {id(parameter) for parameter in whole}
        gradients = []
        for parameter in parameters:
            if parameter.grad is not None:
                gradients.append(parameter.grad)
                if id(parameter) in complete:
                    parameter.grad /= self.world
        for bucket in _buckets(gradients):
            self._sum(bucket)

    def gather_array(self, values: np.ndarray, device: torch.device | str = "cpu") -> np.ndarray:
        """(b, …) -> (world * b, …) in order of rank, sent from the memory of `device` (NCCL sends a GPU's only)."""
        return values if self.world == 1 else self.gather([torch.from_numpy(np.ascontiguousarray(values)).to(device)])[0].cpu().numpy()

    def any(self, answer: bool) -> bool:
        """Whether any process says yes."""
        return answer if self.world == 1 else self.total(int(answer)) > 0

    def total(self, count: int) -> int:
        """The sum over processes."""
        if self.world == 1:
            return count
        tensor = torch.tensor([count], device=self._device())
        dist.all_reduce(tensor)
        return int(tensor)

    def agree(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by that of the first process."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def wait(self) -> None:
        """Until every process has come here."""
        if self.world > 1:
            dist.barrier()

    def _device(self) -> str:
        return "cuda" if dist.get_backend() == "nccl" else "cpu"

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


ALONE = Processes()


def join() -> bool:
    """Join the processes that torchrun started, if it did (it sets RANK and WORLD_SIZE): NCCL where there is a GPU, else gloo.

    Returns:
        Whether this process has joined now, and is to leave at its end.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ or dist.is_initialized():
        return False
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return True


def start_processes(count: int, arguments: list[str]) -> int:
    """`mclip ARGUMENTS` in each of `count` processes of this machine, by torchrun. Returns the exit status: that of the first that failed.

    A signal goes on to the processes, which have half a minute to save what they have.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    # Parsed without the command's own arguments: torchrun would read some of them as abbreviations of its own.
    launch = get_args_parser().parse_args(["--standalone", "--nproc-per-node", str(count), "-m", "mobileclip.cli"])
    launch.training_script_args = arguments
    try:
        run(launch)
    except ChildFailedError as error:
        return max(1, error.get_first_failure()[1].exitcode)
    except SignalException:
        return 130
    return 0


def leave() -> None:
    """Leave them again."""
    if dist.is_initialized():
        dist.destroy_process_group()


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
