"""Key maps between open_clip's layout and ours, both ways, every key accounted for.

The image trunk is timm's in both. Text: open_clip keeps attention as `in_proj_weight` and the projection as a matrix
(width, embed_dim); ours are Linear layers, so the projection is transposed.
"""

from __future__ import annotations

import re

from torch import Tensor

_TEXT_RULES = (
    (r"^text\.transformer\.resblocks\.(\d+)\.ln_([12])\.", r"text.blocks.\1.ln_\2."),
    (r"^text\.transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)$", r"text.blocks.\1.attn.qkv.\2"),
    (r"^text\.transformer\.resblocks\.(\d+)\.attn\.out_proj\.", r"text.blocks.\1.attn.out."),
    (r"^text\.transformer\.resblocks\.(\d+)\.mlp\.c_fc\.", r"text.blocks.\1.mlp.fc1."),
    (r"^text\.transformer\.resblocks\.(\d+)\.mlp\.c_proj\.", r"text.blocks.\1.mlp.fc2."),
    (r"^visual\.trunk\.", "image.trunk."),
)
_BACK_RULES = (
    (r"^text\.blocks\.(\d+)\.ln_([12])\.", r"text.transformer.resblocks.\1.ln_\2."),
    (r"^text\.blocks\.(\d+)\.attn\.qkv\.(weight|bias)$", r"text.transformer.resblocks.\1.attn.in_proj_\2"),
    (r"^text\.blocks\.(\d+)\.attn\.out\.", r"text.transformer.resblocks.\1.attn.out_proj."),
    (r"^text\.blocks\.(\d+)\.mlp\.fc1\.", r"text.transformer.resblocks.\1.mlp.c_fc."),
    (r"^text\.blocks\.(\d+)\.mlp\.fc2\.", r"text.transformer.resblocks.\1.mlp.c_proj."),
    (r"^image\.trunk\.", "visual.trunk."),
)


def _rename(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    return name


def from_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's state dict of a MobileCLIP model -> ours. Keys that the model does not have show up as unexpected on loading."""
    ours = {_rename(name, _TEXT_RULES): tensor for name, tensor in state.items() if name != "text.attn_mask"}
    if "text.text_projection" in ours:
        ours["text.projection.weight"] = ours.pop("text.text_projection").T.contiguous()
    return ours


def to_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict -> open_clip's; the inverse of `from_open_clip`."""
    theirs = {_rename(name, _BACK_RULES): tensor for name, tensor in state.items()}
    if "text.projection.weight" in theirs:
        theirs["text.text_projection"] = theirs.pop("text.projection.weight").T.contiguous()
    return theirs
