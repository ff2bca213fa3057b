"""The text tower in the layout that Apple's Neural Engine computes fastest: channels second, tokens last, (B, W, 1, T), every linear layer a 1x1 convolution.

The layout and the attention one head at a time follow Apple's "Deploying Transformers on the Apple Neural Engine" (2022). Layer norms divide by the largest
deviation before they square, so that half precision does not overflow. The function is the same to float32's rounding.

Shapes: B = batch, T = tokens, W = width, N = heads, d = W / N, D = embed_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mobileclip.projection import MlpProjection
from mobileclip.text_tower import MASKED, Block
from runtime.errors import RecipeError


class ChannelNorm(nn.Module):
    """A layer norm over the second dimension."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        width = norm.normalized_shape[0]
        self.eps = norm.eps
        self.weight = nn.Parameter(norm.weight.detach().clone().view(1, width, 1, 1))
        self.bias = nn.Parameter(norm.bias.detach().clone().view(1, width, 1, 1))

    def forward(self, x_BW1T: Tensor) -> Tensor:
        centred = x_BW1T - x_BW1T.mean(dim=1, keepdim=True)
        largest = centred.abs().amax(dim=1, keepdim=True).clamp_min(1e-4)
        centred = centred / largest
        # eps belongs to the variance as it was.
        variance = (centred * centred).mean(dim=1, keepdim=True) + self.eps / largest / largest
        return centred / torch.sqrt(variance) * self.weight + self.bias


def convolution(linear: nn.Linear) -> nn.Conv2d:
    """The same map over the second dimension."""
    made = nn.Conv2d(linear.in_features, linear.out_features, 1, bias=linear.bias is not None)
    made.weight.data = linear.weight.detach().clone()[:, :, None, None]
    if linear.bias is not None and made.bias is not None:
        made.bias.data = linear.bias.detach().clone()
    return made


class ChannelBlock(nn.Module):
    def __init__(self, block: Block) -> None:
        super().__init__()
        attention = block.attn
        self.pre, self.heads = block.pre, attention.heads
        width = attention.out.in_features
        self.depth = width // self.heads
        self.ln_1, self.ln_2 = ChannelNorm(block.ln_1), ChannelNorm(block.ln_2)
        weights, biases = attention.qkv.weight.detach().chunk(3), attention.qkv.bias.detach().chunk(3)
        parts = []
        for weight, bias in zip(weights, biases, strict=True):
            part = nn.Linear(width, width)
            part.weight.data, part.bias.data = weight.clone(), bias.clone()
            parts.append(convolution(part))
        self.q, self.k, self.v = parts
        self.out = convolution(attention.out)
        self.fc1, self.act, self.fc2 = convolution(block.mlp.fc1), block.mlp.act, convolution(block.mlp.fc2)

    def attention(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """bias: (…, Tk, Tq), added to the scores of one head."""
        mixed = []
        for q, k, v in zip(*(part(x).split(self.depth, dim=1) for part in (self.q, self.k, self.v)), strict=True):  # (B, d, 1, T) each
            scores = k.permute(0, 2, 3, 1) @ q.permute(0, 2, 1, 3) * self.depth**-0.5  # (B, 1, Tk, Tq)
            weights = torch.softmax(scores if bias is None else scores + bias, dim=2)
            mixed.append((v.permute(0, 2, 1, 3) @ weights).permute(0, 2, 1, 3))  # (B, d, 1, Tq)
        return self.out(torch.cat(mixed, dim=1))

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.pre:
            x = x + self.attention(self.ln_1(x), bias)
            return x + self.fc2(self.act(self.fc1(self.ln_2(x))))
        x = self.ln_1(x + self.attention(x, bias))
        return self.ln_2(x + self.fc2(self.act(self.fc1(x))))


class ChannelText(nn.Module):
    """tokens (B, T) int32 -> features (B, D): what the `TextTower` that it is made from computes.

    Raises:
        RecipeError: the tower has blocks other than transformer blocks.
    """

    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.config = tower.config
        if not all(isinstance(block, Block) for block in tower.blocks):
            raise RecipeError(f"the layout with channels first is there for transformer text towers; this one is '{tower.config.kind}'; leave --text-layout out")
        self.token_embedding, self.embedding_projection = tower.token_embedding, tower.embedding_projection
        self.positional_embedding = tower.positional_embedding
        self.ln_embedding: nn.Module = ChannelNorm(tower.ln_embedding) if isinstance(tower.ln_embedding, nn.LayerNorm) else nn.Identity()
        self.blocks = nn.ModuleList(ChannelBlock(block) for block in tower.blocks)
        self.ln_final: nn.Module = ChannelNorm(tower.ln_final) if isinstance(tower.ln_final, nn.LayerNorm) else nn.Identity()
        self.projection = ChannelProjection(tower.projection)
        self.register_buffer("causal_bias", None if tower.causal_bias is None else tower.causal_bias.T.contiguous(), persistent=False)
        self.eval()

    def forward(self, tokens: Tensor) -> Tensor:
        T = tokens.shape[1]
        x = self.embedding_projection(self.token_embedding(tokens)) + self.positional_embedding[:T]
        x = self.ln_embedding(x.transpose(1, 2)[:, :, None, :])
        bias: Tensor | None = None
        if self.config.mask == "causal":
            bias = self.causal_bias[:T, :T].to(x.dtype)
        elif self.config.mask == "pad":
            bias = (1 - self.valid(tokens).to(x.dtype))[:, None, :, None] * MASKED  # over the keys
        for block in self.blocks:
            x = block(x, bias)
        return self.projection(self.pool(self.ln_final(x), tokens))

    def valid(self, tokens: Tensor) -> Tensor:
        if self.config.pool == "eot":
            return torch.arange(tokens.shape[1], device=tokens.device)[None] <= tokens.argmax(dim=1, keepdim=True)
        return tokens != self.config.pad_id

    def pool(self, x: Tensor, tokens: Tensor) -> Tensor:
        """(B, W, 1, T) -> (B, W, 1, 1)"""
        if self.config.pool == "eot":
            here = (tokens == tokens.amax(dim=1, keepdim=True)).to(x.dtype)[:, None, None, :]
            return (x * here).sum(dim=3, keepdim=True)
        here = self.valid(tokens).to(x.dtype)[:, None, None, :]
        return (x * here).sum(dim=3, keepdim=True) / here.sum(dim=3, keepdim=True).clamp_min(1)


class ChannelProjection(nn.Module):
    """(B, W, 1, 1) -> (B, D)"""

    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        mlp = isinstance(projection, MlpProjection)
        self.linear = convolution(projection.linear if mlp else projection)  # type: ignore[arg-type]
        self.fc1 = convolution(projection.fc1) if mlp else None  # type: ignore[arg-type]
        self.fc2 = convolution(projection.fc2) if mlp else None  # type: ignore[arg-type]
        self.act = projection.act if mlp else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        made = self.linear(x)
        if self.fc1 is not None and self.fc2 is not None:
            made = made + self.fc2(self.act(self.fc1(x)))
        return made.flatten(1)
