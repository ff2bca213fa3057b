"""The text tower: a transformer over token ids.

Shapes: B = batch, T = tokens (at most context_length), W = width, N = heads, D = embed_dim.
Pre-norm with EOT pooling is CLIP's text encoder (Radford et al. 2021, section 2.4); post-norm with mean pooling is BERT;
"mct" adds convolutional blocks (`mobileclip.token_mixer`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobileclip.config import TextConfig
from mobileclip.projection import make_projection
from mobileclip.token_mixer import RepMixerBlock

MASKED = -1e4  # finite, so that the mask survives fp16 and compilers that fold infinities into NaN


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_BTW: Tensor, bias: Tensor | None) -> Tensor:
        B, T, W = x_BTW.shape
        q, k, v = self.qkv(x_BTW).reshape(B, T, 3, self.heads, W // self.heads).permute(2, 0, 3, 1, 4).unbind(0)  # (B, N, T, W/N)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.out(mixed.transpose(1, 2).reshape(B, T, W))


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x_BTW: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x_BTW)))


class Block(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.pre = config.norm == "pre"
        self.ln_1 = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.attn = Attention(config.width, config.heads)
        self.ln_2 = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.mlp = FeedForward(config.width, int(config.width * config.mlp_ratio))

    def forward(self, x_BTW: Tensor, bias: Tensor | None) -> Tensor:
        if self.pre:
            x_BTW = x_BTW + self.attn(self.ln_1(x_BTW), bias)
            return x_BTW + self.mlp(self.ln_2(x_BTW))
        x_BTW = self.ln_1(x_BTW + self.attn(x_BTW, bias))
        return self.ln_2(x_BTW + self.mlp(x_BTW))


class TextTower(nn.Module):
    """tokens (B, T) int32 -> features (B, D), not of unit norm. Causal and pad-masked towers give the same for any T that holds the text."""

    def __init__(self, config: TextConfig, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        narrow = config.embedding_dim or config.width
        self.token_embedding = nn.Embedding(config.vocab_size, narrow)
        self.embedding_projection: nn.Module = nn.Linear(narrow, config.width, bias=False) if narrow != config.width else nn.Identity()
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, config.width))
        self.ln_embedding: nn.Module = nn.LayerNorm(config.width, eps=config.layer_norm_eps) if config.embedding_norm else nn.Identity()
        blocks: list[nn.Module] = [Block(config) for _ in range(config.layers)]
        if config.kind == "mct":
            blocks = [RepMixerBlock(config.width, config.mlp_ratio, config.conv_kernel), *blocks, RepMixerBlock(config.width, config.mlp_ratio, config.conv_kernel)]
        self.blocks = nn.ModuleList(blocks)
        self.ln_final: nn.Module = nn.LayerNorm(config.width, eps=config.layer_norm_eps) if config.norm == "pre" else nn.Identity()
        self.projection = make_projection(config.projection, config.width, config.projection_hidden, embed_dim)
        self.init_non_persistent_buffers()
        self.reset_parameters()

    def init_non_persistent_buffers(self) -> None:
        """The mask, which follows from the config; named as timm's modules name this act."""
        length = self.config.context_length
        causal = torch.full((length, length), MASKED).triu(1) if self.config.mask == "causal" else None
        self.register_buffer("causal_bias", causal, persistent=False)

    def reset_parameters(self) -> None:
        """CLIP's initialisation (openai/CLIP model.py): output layers shrink with depth."""
        width, layers = self.config.width, self.config.layers
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        out_std = width**-0.5 * (2 * layers) ** -0.5
        if isinstance(self.embedding_projection, nn.Linear):
            nn.init.normal_(self.embedding_projection.weight, std=self.embedding_projection.in_features**-0.5)
        for block in self.blocks:
            if isinstance(block, RepMixerBlock):
                block.reset_parameters()
                continue
            nn.init.normal_(block.attn.qkv.weight, std=width**-0.5)
            nn.init.normal_(block.attn.out.weight, std=out_std)
            nn.init.normal_(block.mlp.fc1.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.fc2.weight, std=out_std)
            for layer in (block.attn.qkv, block.attn.out, block.mlp.fc1, block.mlp.fc2):
                nn.init.zeros_(layer.bias)

    def valid_tokens(self, tokens: Tensor) -> Tensor:
        """(B, T) bool, False where padding. CLIP's padding id 0 is also the token "!", so with EOT pooling the end marks the border."""
        if self.config.pool == "eot":
            positions = torch.arange(tokens.shape[1], device=tokens.device)
            return positions[None] <= tokens.argmax(dim=1, keepdim=True)
        return tokens != self.config.pad_id

    def forward(self, tokens: Tensor) -> Tensor:
        T = tokens.shape[1]
        x_BTW = self.ln_embedding(self.embedding_projection(self.token_embedding(tokens)) + self.positional_embedding[:T])
        bias: Tensor | None = None
        if self.config.mask == "causal":
            bias = self.causal_bias[:T, :T].to(x_BTW.dtype)
        elif self.config.mask == "pad":
            bias = (~self.valid_tokens(tokens)).to(x_BTW.dtype)[:, None, None, :] * MASKED  # (B, 1, 1, T)
        for block in self.blocks:
            x_BTW = block(x_BTW, bias)
        x_BTW = self.ln_final(x_BTW)
        return self.projection(self.pool(x_BTW, tokens))

    def pool(self, x_BTW: Tensor, tokens: Tensor) -> Tensor:
        if self.config.pool == "eot":
            return x_BTW[torch.arange(x_BTW.shape[0], device=x_BTW.device), tokens.argmax(dim=1)]  # (B, W)
        valid = self.valid_tokens(tokens).to(x_BTW.dtype)[:, :, None]
        return (x_BTW * valid).sum(1) / valid.sum(1).clamp(min=1)
