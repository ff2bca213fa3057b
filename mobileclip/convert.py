"""State dicts from one layout to another. The names stand in `mobileclip.key_maps`; here tensors follow them, every one accounted for.

Before anything is converted, all names and shapes are compared with what the model of the config has in that layout; one
error lists every difference, in the names of the file that the user gave.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from mobileclip.config import ModelConfig
from mobileclip.key_maps import Rule, their_name
from mobileclip.layouts import TITLES, check_layout, strip_prefix
from runtime.errors import CheckpointError


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
    from mobileclip.checkpoint import outline

    for name, tensor in outline(config).state_dict().items():
        shape = tuple(tensor.shape)
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
