"""Batch normalisation whose statistics depend neither on how a batch is cut for memory nor on how many processes share it.

BatchNorm of a large batch cannot be had from its pieces: the statistics need all of it at every layer. So a batch of B samples is B / G *ghost
batches* of G samples that follow each other (Hoffer et al. 2017, arXiv 1705.08741), a ghost batch goes through a tower alone and is never cut,
and the running statistics move once a step, toward the mean over all ghost batches of the step, of all processes. What a process computes is
then a function of its ghost batches, and the whole a function of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from runtime.errors import RecipeError


def ghost_batches(size: int, ghost: int, rank: int = 0, world: int = 1) -> list[tuple[int, slice]]:
    """The ghost batches of this process: their numbers in the whole batch, and their rows in this process's share of it.

    Args:
        size: samples of the whole batch. ghost: samples of a ghost batch; 0: one for each process, which is exact without BatchNorm.
        rank, world: this process has the rank-th of `world` equal shares.

    Raises:
        RecipeError: the shares are not equal, or a ghost batch would lie in two of them.
    """
    share, left = divmod(size, world)
    if left or share == 0:
        raise RecipeError(f"a batch of {size} cannot be shared by {world} processes; choose a batch_size that is a multiple of it")
    ghost = ghost or share
    if ghost < 1 or share % ghost:
        raise RecipeError(f"ghost batches of {ghost} do not fill a process's {share} samples of a batch of {size}; choose a ghost_size that divides {share}")
    first = rank * share // ghost
    return [(first + n, slice(n * ghost, (n + 1) * ghost)) for n in range(share // ghost)]


@contextmanager
def one_update(model: nn.Module, mean_over_processes: Callable[[list[Tensor]], None] | None = None) -> Iterator[None]:
    """A step: however many ghost batches (each any number of times alike) go through `model` inside, its running statistics move once.

    After an exception they are as they were.

    Args:
        mean_over_processes: replaces tensors by their mean over all processes, in place; each must have as many ghost batches as the others.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats and module.training]
    before = [(module.running_mean.clone(), module.running_var.clone(), module.num_batches_tracked.clone(), module.momentum) for module in norms]
    for module in norms:
        module.momentum = None  # the plain mean of what is seen from now on
        module.num_batches_tracked.zero_()
    done = False
    try:
        yield
        seen = [module for module in norms if int(module.num_batches_tracked)]
        if mean_over_processes is not None:
            mean_over_processes([tensor for module in seen for tensor in (module.running_mean, module.running_var)])
        done = True
    finally:
        for module, (mean, variance, count, momentum) in zip(norms, before, strict=True):
            moved = done and int(module.num_batches_tracked) > 0
            share = (1 / (int(count) + 1) if momentum is None else momentum) if moved else 0.0
            with torch.no_grad():
                for now, then in ((module.running_mean, mean), (module.running_var, variance)):
                    now.copy_(torch.lerp(then, now, share) if moved else then)
            module.num_batches_tracked.copy_(count + 1 if moved else count)
            module.momentum = momentum
