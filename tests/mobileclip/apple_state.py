"""Synthetic state dicts as Apple's package saves them, written down from its module definitions and from nothing of ours.

Values are random, so that a transposed, swapped or forgotten tensor shows; running variances are positive.
"""

from __future__ import annotations

from typing import Any

import torch

MCI: dict[str, dict[str, Any]] = {
    "mci0": {"layers": [2, 6, 10, 2], "dims": [64, 128, 256, 512]},
    "mci1": {"layers": [4, 12, 20, 4], "dims": [64, 128, 256, 512]},
    "mci2": {"layers": [4, 12, 24, 4], "dims": [80, 160, 320, 640]},
}
VARIANTS: dict[str, tuple[str, str]] = {
    "mobileclip_s0": ("mci0", "mct"),
    "mobileclip_s1": ("mci1", "base"),
    "mobileclip_s2": ("mci2", "base"),
    "mobileclip_b": ("vit_b16", "base"),
    "mobileclip_b_lt": ("vit_b16", "base"),
    "mobileclip2_s0": ("mci0", "base"),
    "mobileclip2_s2": ("mci2", "base"),
    "mobileclip2_b": ("vit_b16", "base"),
}
"""The variants that Apple's package can build: image tower, text tower."""


class Shapes(dict[str, tuple[int, ...]]):
    """Name -> shape, filled module by module."""

    def conv(self, name: str, out: int, per_group: int, *kernel: int, bias: bool = True) -> None:
        self[f"{name}.weight"] = (out, per_group, *kernel)
        if bias:
            self[f"{name}.bias"] = (out,)

    def linear(self, name: str, out: int, in_dim: int, bias: bool = True) -> None:
        self.conv(name, out, in_dim, bias=bias)

    def layer_norm(self, name: str, dim: int) -> None:
        self[f"{name}.weight"] = self[f"{name}.bias"] = (dim,)

    def batch_norm(self, name: str, dim: int) -> None:
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            self[f"{name}.{leaf}"] = (dim,)
        self[f"{name}.num_batches_tracked"] = ()

    def conv_bn(self, name: str, out: int, per_group: int, *kernel: int) -> None:
        self.conv(f"{name}.conv", out, per_group, *kernel, bias=False)
        self.batch_norm(f"{name}.bn", out)

    def mobileone(
        self, name: str, in_dim: int, out: int, kernel: int, *, groups: int = 1, stride: int = 1, conv: bool = True, scale: bool = True, se: bool = False, folded: bool
    ) -> None:
        if se:
            self.conv(f"{name}.se.reduce", out // 16, out, 1, 1)
            self.conv(f"{name}.se.expand", out, out // 16, 1, 1)
        if folded:
            return self.conv(f"{name}.reparam_conv", out, in_dim // groups, kernel, kernel)
        if in_dim == out and stride == 1:
            self.batch_norm(f"{name}.rbr_skip", out)
        if conv:
            self.conv_bn(f"{name}.rbr_conv.0", out, in_dim // groups, kernel, kernel)
        if scale and kernel > 1:
            self.conv_bn(f"{name}.rbr_scale", out, in_dim // groups, 1, 1)

    def conv_ffn(self, name: str, dim: int, hidden: int, *kernel: int) -> None:
        self.conv_bn(f"{name}.conv", dim, 1, *kernel)
        self.conv(f"{name}.fc1", hidden, dim, 1, 1)
        self.conv(f"{name}.fc2", dim, hidden, 1, 1)

    def encoder(self, name: str, dim: int) -> None:
        """A pre-norm transformer block."""
        self.layer_norm(f"{name}.pre_norm_mha.0", dim)
        self.linear(f"{name}.pre_norm_mha.1.qkv_proj", 3 * dim, dim)
        self.linear(f"{name}.pre_norm_mha.1.out_proj", dim, dim)
        self.layer_norm(f"{name}.pre_norm_ffn.0", dim)
        self.linear(f"{name}.pre_norm_ffn.1", 4 * dim, dim)
        self.linear(f"{name}.pre_norm_ffn.4", dim, 4 * dim)


def _mci(shapes: Shapes, layers: list[int], dims: list[int], embed_dim: int, folded: bool) -> None:
    root = "image_encoder.model"
    shapes.mobileone(f"{root}.patch_embed.0", 3, dims[0], 3, stride=2, folded=folded)
    shapes.mobileone(f"{root}.patch_embed.1", dims[0], dims[0], 3, groups=dims[0], stride=2, folded=folded)
    shapes.mobileone(f"{root}.patch_embed.2", dims[0], dims[0], 1, folded=folded)
    at = 0
    for stage, (depth, dim) in enumerate(zip(layers, dims, strict=True)):
        attention = stage == 3
        if attention:
            shapes.conv(f"{root}.network.{at}.{'reparam_conv' if folded else 'pe'}", dim, 1, 7, 7)
            at += 1
        for index in range(depth):
            block = f"{root}.network.{at}.{index}"
            if attention:
                shapes.batch_norm(f"{block}.norm", dim)
                shapes.linear(f"{block}.token_mixer.qkv", 3 * dim, dim, bias=False)
                shapes.linear(f"{block}.token_mixer.proj", dim, dim)
                shapes[f"{block}.layer_scale_1"] = shapes[f"{block}.layer_scale_2"] = (dim, 1, 1)
            elif folded:
                shapes.conv(f"{block}.token_mixer.reparam_conv", dim, 1, 3, 3)
            else:
                shapes[f"{block}.token_mixer.layer_scale"] = (dim, 1, 1)
                shapes.mobileone(f"{block}.token_mixer.norm", dim, dim, 3, groups=dim, conv=False, scale=False, folded=False)
                shapes.mobileone(f"{block}.token_mixer.mixer", dim, dim, 3, groups=dim, folded=False)
            if not attention:
                shapes[f"{block}.layer_scale"] = (dim, 1, 1)
            shapes.conv_ffn(f"{block}.convffn", dim, 3 * dim, 7, 7)
        at += 1
        if stage < 3:
            step, wide = f"{root}.network.{at}.proj", dims[stage + 1]
            if stage >= 1:
                shapes.conv(f"{step}.0.se.fc1", wide // 4, wide, 1, 1)
                shapes.conv(f"{step}.0.se.fc2", wide, wide // 4, 1, 1)
            if folded:
                shapes.conv(f"{step}.0.lkb_reparam", wide, 1, 7, 7)
            else:
                shapes.conv_bn(f"{step}.0.lkb_origin", wide, 1, 7, 7)
                shapes.conv_bn(f"{step}.0.small_conv", wide, 1, 3, 3)
            shapes.mobileone(f"{step}.1", wide, wide, 1, folded=folded)
            at += 1
    shapes.mobileone(f"{root}.conv_exp", dims[-1], 2 * dims[-1], 3, groups=dims[-1], se=True, folded=folded)
    shapes[f"{root}.head.proj"] = (2 * dims[-1], embed_dim)


def _vit(shapes: Shapes, embed_dim: int) -> None:
    root = "image_encoder.model"
    shapes[f"{root}.cls_token"] = (1, 1, 768)
    for index, (in_dim, out, kernel) in enumerate(((3, 192, 4), (192, 192, 2), (192, 768, 2))):
        shapes.conv(f"{root}.patch_emb.{index}.block.conv", out, in_dim, kernel, kernel, bias=index == 2)
        if index < 2:
            shapes.batch_norm(f"{root}.patch_emb.{index}.block.norm", out)
    shapes.layer_norm(f"{root}.post_transformer_norm", 768)
    for index in range(12):
        shapes.encoder(f"{root}.transformer.{index}", 768)
    shapes[f"{root}.classifier.proj"] = (768, embed_dim)
    shapes[f"{root}.pos_embed.pos_embed.pos_embed"] = (1, 1, 196, 768)


def _mct_block(shapes: Shapes, name: str, dim: int, folded: bool) -> None:
    shapes[f"{name}.layer_scale"] = (dim, 1, 1)
    if folded:
        shapes.conv(f"{name}.token_mixer.reparam_conv", dim, 1, 1, 11)
    else:
        shapes[f"{name}.token_mixer.layer_scale"] = (dim, 1, 1)
        shapes.batch_norm(f"{name}.token_mixer.norm.rbr_skip", dim)
        shapes.batch_norm(f"{name}.token_mixer.mixer.rbr_skip", dim)
        shapes.conv_bn(f"{name}.token_mixer.mixer.rbr_conv.0", dim, 1, 1, 11)
    shapes.conv_ffn(f"{name}.convffn", dim, 4 * dim, 1, 11)


def apple_shapes(name: str, *, folded: bool = False, vocabulary: int = 49408, layers: int = 12) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in Apple's file of a variant; `folded`: after its reparameterize_model.

    Args:
        vocabulary, layers: of a smaller text tower than Apple's "base", for cheap tests.
    """
    dim = 512
    image, text = VARIANTS[name]
    shapes = Shapes({"logit_scale": ()})
    if image == "vit_b16":
        _vit(shapes, dim)
    else:
        _mci(shapes, **MCI[image], embed_dim=dim, folded=folded)
    shapes["text_encoder.projection_layer"] = (dim, dim)
    shapes["text_encoder.embedding_layer.weight"] = (vocabulary, dim)
    shapes["text_encoder.positional_embedding.pos_embed.pos_embed"] = (1, 1, 77, dim)
    for index in range(6 if text == "mct" else layers):
        block = f"text_encoder.transformer.{index}"
        if text == "mct" and index in (0, 5):
            _mct_block(shapes, block, dim, folded)
        else:
            shapes.encoder(block, dim)
    shapes.layer_norm("text_encoder.final_layer_norm", dim)
    return dict(shapes)


def apple_state(name: str, *, seed: int = 0, **sizes: Any) -> dict[str, torch.Tensor]:
    """Random values in `apple_shapes(name, **sizes)`."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in apple_shapes(name, **sizes).items():
        if key.endswith("num_batches_tracked"):
            state[key] = torch.randint(1, 10**6, shape, generator=generator)
        else:
            state[key] = torch.rand(shape, generator=generator) * 0.1 + (0.5 if key.endswith("running_var") else -0.05)
    return state
