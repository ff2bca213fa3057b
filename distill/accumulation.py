"""The gradient of a large batch in the memory of a small one, to rounding, for losses that compare every sample with every other.

First all pieces are encoded without a gradient; the loss of the whole batch gives the gradient of every embedding; then each piece is encoded
again and handed its embeddings' gradient (GradCache, Gao et al. 2021, arXiv 2101.06983). What is random in a tower (dropout, stochastic depth)
is drawn from (seed, step, number of the piece), so that the second time equals the first, on any number of processes.

Shapes: B = whole batch, b = this process's share of it, D = embed_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

Encode = Callable[[int, slice], tuple[Tensor, ...]]
"""Number of a piece in the whole batch and its rows in this process's share -> its embeddings, each (rows, D)."""


class Exchange(Protocol):
    """What several processes need of each other; distill/processes.py has it for torch.distributed."""

    def gather(self, embeddings: list[Tensor]) -> list[Tensor]:
        """(b, D) each -> (B, D) each, all processes' in order of rank; gradients flow to this process's own rows."""
        ...


def accumulate(
    encode: Encode, pieces: Sequence[tuple[int, slice]], loss: Callable[..., Tensor], *, seed: int = 0, step: int = 0, exchange: Exchange | None = None
) -> Tensor:
    """Add the gradient of `loss` over the whole batch to the parameters' `.grad`. Returns the loss, detached.

    With several processes the gradients of the towers are this process's part: they are summed over processes. What the loss itself has as
    parameters (a temperature, a bias) gets the whole gradient in each process.

    Args:
        encode: runs the towers on one piece, with a gradient where that is enabled.
        pieces: this process's, as `ghost_batches` gives them: they follow each other and cover its share.
        loss: the embeddings of the whole batch -> a scalar.

    Example:
        >>> pieces = ghost_batches(len(pixels), 64)
        >>> accumulate(lambda n, rows: (model.encode_image(pixels[rows]), model.encode_text(tokens[rows])), pieces,
        ...            lambda image, text: clip_loss(image, text, model.logit_scale.exp()))
    """
    if len(pieces) == 1 and exchange is None:
        with drawn_from(seed, step, pieces[0][0]):
            embeddings = encode(*pieces[0])
        value = loss(*embeddings)
        value.backward()
        return value.detach()
    parts = []
    with torch.no_grad():
        for number, rows in pieces:
            with drawn_from(seed, step, number):
                parts.append(encode(number, rows))
    whole = [torch.cat(pieces_of_one).requires_grad_() for pieces_of_one in zip(*parts, strict=True)]
    value = loss(*(whole if exchange is None else exchange.gather(whole)))
    value.backward()
    gradients = [torch.zeros_like(embedding) if embedding.grad is None else embedding.grad for embedding in whole]
    del parts, whole
    for number, rows in pieces:
        with drawn_from(seed, step, number):
            embeddings = encode(number, rows)
        wanted = [(embedding, gradient[rows]) for embedding, gradient in zip(embeddings, gradients, strict=True) if embedding.requires_grad]
        torch.autograd.backward([embedding for embedding, _ in wanted], [gradient for _, gradient in wanted])
    return value.detach()


@contextmanager
def drawn_from(seed: int, step: int, number: int) -> Iterator[None]:
    """Inside, torch's random numbers are a function of the three; outside they go on as if nothing had been drawn."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int(np.random.SeedSequence([seed, step, number]).generate_state(1, np.uint64)[0] >> np.uint64(1)))
        yield
