"""A captioner that needs no hub: a small causal decoder that reads a frozen teacher's image embedding as its first tokens.

After ClipCap (Mokady, Hertz & Bermano 2021, arXiv 2111.09734): the embedding becomes a few prefix tokens, the text follows. Here the
decoder is small, trained from nothing, with the first merges of CLIP's vocabulary, so that minutes on one core are enough.
`mclip train-captioner` (distill/prefix_training.py) makes it; `prefix:CHECKPOINT` names it.

Shapes: B = captions, D = sum of the teachers' dimensions, P = prefix tokens, T = text tokens, W = width, V = vocabulary.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobileclip.config import TextConfig
from mobileclip.text_tower import Block
from runtime.errors import CheckpointError


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderConfig:
    """Sizes of a prefix captioner."""

    dims: tuple[int, ...]
    """Dimension of each teacher; their unit vectors are concatenated."""
    vocab_size: int = 2048
    """Ids of the tokenizer: CLIP's bytes and first merges."""
    width: int = 192
    heads: int = 6
    layers: int = 2
    prefix: int = 4
    """Tokens that the embedding becomes."""
    context_length: int = 24
    """Text tokens at most, start and end included."""
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if not self.dims or min(self.dims) < 1 or min(self.layers, self.prefix) < 1 or self.context_length < 3 or self.width % self.heads:
            raise CheckpointError(f"a captioner cannot have the sizes {dataclasses.asdict(self)}; width must be a multiple of heads, context_length at least 3")


class PrefixDecoder(nn.Module):
    """Next-token logits of a caption, given an embedding."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        text = TextConfig(context_length=config.prefix + config.context_length, vocab_size=config.vocab_size, width=config.width, heads=config.heads, layers=config.layers)
        self.prefix = nn.Sequential(nn.Linear(sum(config.dims), 2 * config.width), nn.GELU(), nn.Linear(2 * config.width, config.prefix * config.width))
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.positional_embedding = nn.Parameter(torch.randn(config.prefix + config.context_length, config.width) * 0.02)
        self.blocks = nn.ModuleList(Block(text) for _ in range(config.layers))
        self.ln_final = nn.LayerNorm(config.width)
        self.dropout = nn.Dropout(config.dropout)
        nn.init.normal_(self.token_embedding.weight, std=0.04)

    def forward(self, condition: Tensor, tokens: Tensor) -> Tensor:
        """condition (B, D), tokens (B, T) with the start first -> logits (B, T, V); those at t are for token t + 1."""
        x_BTW, P = self._embed(condition, tokens), self.config.prefix
        x_BTW = self.dropout(x_BTW)
        T = x_BTW.shape[1]
        bias = torch.full((T, T), -1e4).triu(1)
        bias[:P, :P] = 0.0  # the prefix is known as a whole
        for block in self._blocks():
            x_BTW = x_BTW + self.dropout(block.attn(block.ln_1(x_BTW), bias))
            x_BTW = x_BTW + self.dropout(block.mlp(block.ln_2(x_BTW)))
        return self._logits(x_BTW[:, P:])

    def _blocks(self) -> list[Any]:
        return list(self.blocks)

    def _embed(self, condition: Tensor, tokens: Tensor) -> Tensor:
        prefix = self.prefix(condition).reshape(len(condition), self.config.prefix, self.config.width)
        x_BTW = torch.cat([prefix, self.token_embedding(tokens)], dim=1)
        return x_BTW + self.positional_embedding[: x_BTW.shape[1]]

    def _logits(self, x_BTW: Tensor) -> Tensor:
        return self.ln_final(x_BTW) @ self.token_embedding.weight.T


class Writer:
    """Captions of a batch in the making: keys and values of what was read are kept, so that a token costs one token's work."""

    def __init__(self, model: PrefixDecoder, condition: Tensor, repeats: int) -> None:
        """condition (N, D); B = N * repeats captions, those of one embedding side by side."""
        self.model, self.length = model, model.config.prefix
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        x_BTW = model._embed(condition, torch.zeros(len(condition), 0, dtype=torch.int64))
        for block in model._blocks():
            q, k, v = self._split(block, block.ln_1(x_BTW))
            x_BTW = self._finish(block, x_BTW, F.scaled_dot_product_attention(q, k, v))
            self.keys.append(k.repeat_interleave(repeats, dim=0))
            self.values.append(v.repeat_interleave(repeats, dim=0))
        self.rows = torch.arange(len(condition) * repeats)

    def __call__(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """tokens (b,), rows (b,) of the batch -> logits (b, V). Rows that are no longer asked for are forgotten."""
        if len(rows) < len(self.rows):
            kept = torch.isin(self.rows, rows)
            self.keys, self.values, self.rows = [k[kept] for k in self.keys], [v[kept] for v in self.values], rows
        x_BTW = self.model.token_embedding(tokens)[:, None] + self.model.positional_embedding[self.length]
        for n, block in enumerate(self.model._blocks()):
            q, k, v = self._split(block, block.ln_1(x_BTW))
            self.keys[n], self.values[n] = torch.cat([self.keys[n], k], dim=2), torch.cat([self.values[n], v], dim=2)
            x_BTW = self._finish(block, x_BTW, F.scaled_dot_product_attention(q, self.keys[n], self.values[n]))
        self.length += 1
        return self.model._logits(x_BTW[:, 0])

    def _split(self, block: Any, x_BTW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        B, T, W = x_BTW.shape
        q, k, v = block.attn.qkv(x_BTW).reshape(B, T, 3, block.attn.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def _finish(self, block: Any, x_BTW: Tensor, mixed: Tensor) -> Tensor:
        x_BTW = x_BTW + block.attn.out(mixed.transpose(1, 2).reshape(x_BTW.shape))
        return x_BTW + block.mlp(block.ln_2(x_BTW))
