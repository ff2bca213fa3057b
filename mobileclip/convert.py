"""State dicts from one layout to another. The names stand in `mobileclip.key_maps`; here tensors follow them, every one accounted for.

Before anything is converted, all names and shapes are compared with what the model of the config has in that layout; one
error lists every difference, in the names of the file that the user gave.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from functools import lru_cache

import torch
from torch import Tensor

from mobileclip.config import ModelConfig, TextConfig, config_from_dict, config_to_dict
from mobileclip.key_maps import Rule, their_name
from mobileclip.layouts import LAYOUTS, TITLES, TRUNKS, strip_prefix
from runtime.errors import CheckpointError

APPLE_TRUNKS = {"fastvit_mci0": "none", "fastvit_mci1": "none", "fastvit_mci2": "none", "vit_base_mci_224": "causal"}
"""The image towers that Apple's package has, and the text mask that goes with each there."""


def to_ours(state: Mapping[str, Tensor], layout: str, config: ModelConfig, where: str = "the state dict") -> dict[str, Tensor]:
    """A state dict in `layout` -> ours, values untouched. From "timm" it is the image tower alone.

    Args:
        config: the model that the state dict is of; its `folded` says which names are expected.
        where: the file, for messages.

    Raises:
        CheckpointError: the layout cannot hold this model, or tensors are missing, unexpected or of the wrong shape; all
            are listed.
    """
    state = strip_prefix(state)
    check_layout(layout, config)
    compare(state, layout_shapes(config, layout), where)
    like = next(tensor for tensor in state.values() if tensor.is_floating_point())
    ours: dict[str, Tensor] = {}
    for name, theirs, rule, shape in _pairs(config, layout):
        if not theirs:
            ours[name] = like.new_zeros(shape)
            continue
        tensor = state[theirs].reshape(rule.shape_of_theirs(shape)[rule.ones :])
        ours[name] = tensor.T.contiguous() if rule.turned else tensor
    return ours


def from_ours(state: Mapping[str, Tensor], layout: str, config: ModelConfig, where: str = "the state dict") -> dict[str, Tensor]:
    """Our state dict -> `layout`, values untouched; the inverse of `to_ours`. To "timm" goes the image tower alone.

    Raises:
        CheckpointError: as in `to_ours`; or a tensor holds values where the layout knows only zeros (the bias of an image
            projection in Apple's).
    """
    state = {name: tensor for name, tensor in strip_prefix(state).items() if layout != "timm" or not _is_text(name)}
    check_layout(layout, config)
    pairs = list(_pairs(config, layout))
    compare(state, {name: shape for name, _, _, shape in pairs}, where)
    theirs: dict[str, Tensor] = {}
    for name, renamed, rule, shape in pairs:
        tensor = state[name]
        if not renamed:
            if count := int(torch.count_nonzero(tensor)):
                raise CheckpointError(
                    f"{where}: {name} is not zero ({count} of {tensor.numel()} values), and {TITLES[layout]} has no tensor for it; "
                    "convert to open_clip or timm, or train without that bias"
                )
            continue
        turned = tensor.T.contiguous() if rule.turned else tensor
        theirs[renamed] = turned.reshape(rule.shape_of_theirs(shape))
    return theirs


def layout_shapes(config: ModelConfig, layout: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that the model of this config has in a layout."""
    return {theirs: rule.shape_of_theirs(shape) for _, theirs, rule, shape in _pairs(config, layout) if theirs}


def _pairs(config: ModelConfig, layout: str) -> Iterator[tuple[str, str, Rule, tuple[int, ...]]]:
    """Our name, their name ("" where theirs is zeros), the rule and our shape, of every tensor that the layout holds."""
    alike = dataclasses.replace(config, name="", licence="", sources=())
    for name, shape in _shapes(json.dumps(config_to_dict(alike))):
        pair = their_name(name, layout, config.text.kind)
        if pair is not None:
            yield name, *pair, shape
        elif not (layout == "timm" and _is_text(name)):
            raise CheckpointError(f"{TITLES[layout]} has no name for {name} of model '{config.name}'; keep the model in ours")


def _is_text(name: str) -> bool:
    """Whether a tensor of ours belongs to what timm's layout does not have."""
    return name.startswith("text.") or name == "logit_scale"


def compare(state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Refuse tensors that are missing, unexpected or of the wrong shape, all of them in one error."""
    problems = [f"missing {name} {shape}" for name, shape in expected.items() if name not in state]
    problems += [f"unexpected {name} {tuple(tensor.shape)}" for name, tensor in state.items() if name not in expected]
    problems += [
        f"shape of {name} is {tuple(state[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    if problems:
        raise CheckpointError(f"{where}: {len(problems)} of {len(expected)} tensors do not fit the model: {'; '.join(sorted(problems))}")


def check_layout(layout: str, config: ModelConfig) -> None:
    """Refuse a model that a layout has no names for, and say why.

    Raises:
        CheckpointError: unknown layout, or the layout cannot hold this model.
    """
    if layout not in LAYOUTS:
        raise CheckpointError(f"unknown layout '{layout}'; known are {', '.join(LAYOUTS)}")
    if layout == "ours":
        return
    image, text, title = config.image, config.text, f"{TITLES[layout]} cannot hold model '{config.name}'"
    if image.backbone not in TRUNKS or image.projection != "head" or (image.backbone_args.keys() - {"global_pool"}):
        raise CheckpointError(f"{title}: its image tower '{image.backbone}' is not one of MobileCLIP's ({', '.join(TRUNKS)}); keep it in ours")
    if config.ffn_widths:
        raise CheckpointError(f"{title}: {len(config.ffn_widths)} of its feed-forward layers have been pruned; keep it in ours, or convert the model before pruning")
    if layout == "timm":
        return
    if layout == "apple" and image.backbone not in APPLE_TRUNKS:
        raise CheckpointError(
            f"{title}: Apple's package has no image tower '{image.backbone}', and Apple gives S3, S4 and L-14 away in open_clip's layout; convert to open_clip"
        )
    if layout == "open_clip" and text.kind == "mct":
        raise CheckpointError(f"{title}: open_clip has no convolutional text tower (kind 'mct'), which only MobileCLIP-S0 has; convert to apple or ours")
    if text.kind == "mct" and text.layers != 4:
        raise CheckpointError(f"{title}: its convolutional text tower has {text.layers} attention blocks, Apple's has 4; keep it in ours")
    odd = {name: value for name, value in _clip_settings(text).items() if value != _clip_settings(TextConfig())[name]}
    if layout == "apple" and text.mask != APPLE_TRUNKS[image.backbone]:
        odd["mask"] = f"{text.mask} (Apple's has {APPLE_TRUNKS[image.backbone]} beside this image tower)"
    elif text.mask == "pad":
        odd["mask"] = "pad"
    if odd:
        raise CheckpointError(f"{title}: its text tower is no CLIP encoder ({', '.join(f'{name} {value}' for name, value in odd.items())}); keep it in ours")


def _clip_settings(text: TextConfig) -> dict[str, object]:
    """The settings of a text tower that the other layouts take for granted."""
    return {
        "norm": text.norm, "pool": text.pool, "embedding_norm": text.embedding_norm, "projection": text.projection,
        "embedding_dim": 0 if text.embedding_dim == text.width else text.embedding_dim, "layer_norm_eps": text.layer_norm_eps,
        "tokenizer": text.tokenizer,
    }  # fmt: skip


@lru_cache(maxsize=16)
def _shapes(config: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Names and shapes of a model of ours (a config as JSON, which unlike the config can be hashed), without its memory."""
    from mobileclip.checkpoint import build

    with torch.device("meta"):
        model = build(config_from_dict(json.loads(config)))
    return tuple((name, tuple(tensor.shape)) for name, tensor in model.state_dict().items())
