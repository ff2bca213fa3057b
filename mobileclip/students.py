"""Students of our own: the pocket ladder, and variations of any preset.

A rung says what it spends where. The image tower runs once a picture, over thousands of pictures; the text tower once a
query, while somebody waits; the token table costs no time and is shipped all the same. From rung to rung both towers
double, and the table does not: more merges are paid for by a narrow embedding, not by more parameters.

The first two rungs have three stages and attention over 16 to 36 positions. The others have four, as FastViT has: at 112
to 160 pixels attention over a sixteenth of the side costs more than it carries, over a thirty-second it is cheap.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from mobileclip.config import ImageConfig, ModelConfig, TextConfig
from runtime.errors import CheckpointError

LICENCE = "MIT (weights trained here; the data's licences are in the receipt)"
SMALLEST_VOCABULARY, CLIP_VOCABULARY = 514, 49408
"""Bytes, word-final bytes and the two specials; all of CLIP's merges."""


def _pocket(name: str, image_size: int, dims: list[int], depths: list[int], mlp_ratio: float, text: TextConfig, embed_dim: int = 256) -> ModelConfig:
    args: dict[str, Any] = {"dims": dims, "depths": depths, "mlp_ratio": mlp_ratio}
    if len(dims) == 4:
        args["mixers"] = ["repmixer", "repmixer", "repmixer", "attention"]
    image = ImageConfig(backbone="pocket", backbone_args=args, image_size=image_size)
    return ModelConfig(name=name, embed_dim=embed_dim, licence=LICENCE, image=image, text=text)


STUDENTS: dict[str, ModelConfig] = {
    config.name: config
    for config in (
        # 1.7 M: emoji, icons, one domain. More than half is the token table; the pictures are thumbnails.
        _pocket("pocket_s", 64, [16, 48, 128], [0, 1, 1], 2.0, TextConfig(context_length=20, vocab_size=8192, width=128, heads=4, layers=2, mask="causal")),
        # 4 M: thumbnails of 96 pixels.
        _pocket("pocket_m", 96, [32, 64, 192], [1, 2, 3], 3.0, TextConfig(context_length=24, vocab_size=8192, width=192, heads=6, layers=3, mask="causal")),
        # 5 M: about the time of pocket_m, half as large an image tower again, and twice the merges in a table of the same size.
        _pocket(
            "pocket_l", 112, [32, 64, 128, 256], [1, 2, 2, 2], 3.0,
            TextConfig(context_length=32, vocab_size=16384, embedding_dim=96, width=192, heads=6, layers=3, mask="causal"),
        ),
        # 10 M, as much for pictures as for texts.
        _pocket(
            "pocket_xl", 128, [40, 80, 160, 352], [1, 2, 4, 3], 3.0,
            TextConfig(context_length=48, vocab_size=16384, embedding_dim=96, width=256, heads=8, layers=4, mask="causal"),
        ),
        # 20 M, the image tower nearly as large as MobileCLIP2-S0's, a seventh of its text tower; a wider space for finer differences.
        _pocket(
            "pocket_xxl", 160, [48, 96, 192, 448], [2, 3, 6, 4], 3.0,
            TextConfig(context_length=64, vocab_size=16384, embedding_dim=128, width=384, heads=12, layers=4, mask="causal"), embed_dim=384,
        ),
    )
}  # fmt: skip
"""Students of our own, from random weights. Longer contexts cost no time: texts are cut to their length, exactly (causal mask)."""


def student_config(
    base: str | ModelConfig = "pocket_s",
    *,
    backbone: str | None = None,
    image_size: int | None = None,
    mask: str | None = None,
    vocab_size: int | None = None,
    context_length: int | None = None,
    embedding_dim: int | None = None,
    embed_dim: int | None = None,
) -> ModelConfig:
    """A student like `base`, varied in what is given; its name says in what ("pocket_s+mobilenetv4_conv_small+96px").

    Args:
        base: a preset's name or a config, neither folded nor pruned.
        backbone: any name of `timm.list_models()`. The pixels' mean, std, interpolation and crop stay those of `base`.
        image_size: side of the pictures.
        mask: "causal" or "pad": both make the text tower exact at any length that holds the text.
        vocab_size: bytes, the first merges of CLIP's vocabulary and the two specials, 514 to 49408 ids.
        context_length: longest text in tokens, the two specials included.
        embedding_dim: width of the token table, followed by a linear map to the tower's width; 0 or that width: no such map.
        embed_dim: dimensions of the shared space.

    Returns:
        A config that builds; `base` itself where nothing differs from it.

    Raises:
        CheckpointError: unknown name, a value out of range, or a backbone that does not take pictures of this size.
    """
    if isinstance(base, str):
        from mobileclip.presets import preset

        base = preset(base)
    changes: dict[str, Any] = {}
    image, parts = _image(base, backbone, image_size)
    text, text_parts = _text(base, mask, vocab_size, context_length, embedding_dim)
    parts += text_parts
    if embed_dim is not None and embed_dim != base.embed_dim:
        changes["embed_dim"] = embed_dim
        parts.append(f"{embed_dim}d")
    if not parts:
        return base
    if base.folded or base.ffn_widths:
        state = "folded" if base.folded else "pruned"
        raise CheckpointError(f"model '{base.name}' has been {state}; a student is varied from what it was before: give its preset's name")
    # Random weights are ours, whoever drew the architecture.
    config = dataclasses.replace(base, name="+".join([base.name, *parts]), image=image, text=text, licence=LICENCE, sources=(), **changes)
    return config if image == base.image else dataclasses.replace(config, image=_buildable(config))


def _image(base: ModelConfig, backbone: str | None, image_size: int | None) -> tuple[ImageConfig, list[str]]:
    image, parts = base.image, []
    if backbone is not None and backbone != image.backbone:
        image = dataclasses.replace(image, backbone=_timm_name(backbone), backbone_args={}, projection=_projection(backbone), projection_hidden=0)
        parts.append(backbone)
    if image_size is not None and image_size != image.image_size:
        args = {key: value for key, value in image.backbone_args.items() if key != "img_size"}
        image = dataclasses.replace(image, image_size=image_size, backbone_args=args)
        parts.append(f"{image_size}px")
    return image, parts


def _timm_name(name: str) -> str:
    import difflib

    import timm

    from mobileclip.image_tower import OWN_BACKBONES

    if name in OWN_BACKBONES:
        raise CheckpointError(f"backbone '{name}' has no dimensions of its own; take a preset that is built on it, or write an ImageConfig with its backbone_args")
    if timm.is_model(name) and "." in name:
        raise CheckpointError(f"backbone '{name}' names pretrained weights, and a student starts from random ones; give '{name.split('.')[0]}'")
    if not timm.is_model(name):
        near = ", ".join(difflib.get_close_matches(name, timm.list_models(), 3))
        raise CheckpointError(f"image backbone '{name}' is unknown to timm {timm.__version__}; take a name from timm.list_models(){f' (near it: {near})' if near else ''}")
    return name


def _projection(backbone: str) -> Literal["head", "linear"]:
    """MobileCLIP's towers project with FastViT's own classifier; every other backbone gives pooled features to a layer of ours."""
    return "head" if backbone.startswith("fastvit") else "linear"


def _text(base: ModelConfig, mask: str | None, vocab_size: int | None, context_length: int | None, embedding_dim: int | None) -> tuple[TextConfig, list[str]]:
    text, parts = base.text, list[str]()
    changes: dict[str, Any] = {}
    if mask is not None and mask != text.mask:
        if mask not in ("causal", "pad"):
            raise CheckpointError(f"mask is '{mask}', expected 'causal' or 'pad': with any other, padding would take part and texts could not be cut to their length")
        changes["mask"] = mask
        parts.append(mask)
    if vocab_size is not None and vocab_size != text.vocab_size:
        if text.tokenizer != "clip":
            raise CheckpointError(f"model '{base.name}' has a {text.tokenizer} tokenizer; only CLIP's vocabulary can be cut to its first merges: leave vocab_size out")
        if not SMALLEST_VOCABULARY <= vocab_size <= CLIP_VOCABULARY:
            raise CheckpointError(f"vocab_size is {vocab_size}; a CLIP vocabulary has {SMALLEST_VOCABULARY} (bytes only) to {CLIP_VOCABULARY} entries")
        changes["vocab_size"] = vocab_size
        parts.append(f"{vocab_size}tokens")
    if context_length is not None and context_length != text.context_length:
        changes["context_length"] = context_length
        parts.append(f"{context_length}long")
    if embedding_dim is not None and (embedding_dim or text.width) != (text.embedding_dim or text.width):
        changes["embedding_dim"] = _embedding_dim(base.name, embedding_dim, text.width, changes.get("vocab_size", text.vocab_size))
        parts.append(f"{embedding_dim or text.width}wide")
    return dataclasses.replace(text, **changes), parts


def _embedding_dim(name: str, narrow: int, width: int, vocab_size: int) -> int:
    if narrow in (0, width):
        return 0
    if narrow < 0 or narrow * (vocab_size + width) >= vocab_size * width:
        raise CheckpointError(
            f"embedding_dim is {narrow}; a table of {vocab_size} tokens for the width {width} of '{name}' gets smaller only with 1 to "
            f"{(vocab_size * width - 1) // (vocab_size + width)}, or leave it out"
        )
    return narrow


def _buildable(config: ModelConfig) -> ImageConfig:
    """The image config, with `img_size` where the backbone fixes its size when it is built; tried on the meta device, where it costs next to nothing."""
    import torch

    from mobileclip.image_tower import ImageTower

    image, problems = config.image, []
    for sized in (image, dataclasses.replace(image, backbone_args={**image.backbone_args, "img_size": image.image_size})):
        try:
            with torch.device("meta"), torch.no_grad():
                found = ImageTower(sized, config.embed_dim).eval()(torch.zeros(1, 3, image.image_size, image.image_size)).shape
        except Exception as error:  # each backbone refuses a size in its own way
            problems.append(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}")
            continue
        if found == (1, config.embed_dim):
            return sized
        problems.append(f"it gives {tuple(found)} instead of (1, {config.embed_dim})")
    problem = problems[0] if "img_size" in problems[1] else problems[1]  # most backbones know no such argument
    raise CheckpointError(
        f"image backbone '{image.backbone}' does not take pictures of {image.image_size} x {image.image_size} pixels ({problem}); choose another image_size or backbone"
    )
