"""Pretrained weights for a student's image backbone: timm's, or a file of them.

What the student does not have (a classifier for other classes) stays behind; everything else must fit, by name and shape.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
from torch import Tensor

from mobileclip.checkpoint import load_state
from mobileclip.image_tower import OWN_BACKBONES
from mobileclip.model import ImageTextModel
from mobileclip.weights import read_weights
from runtime.errors import CheckpointError


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """source: what was asked for; loaded, left_out: numbers of tensors; licence: as timm states it, "" where nothing is known."""

    source: str
    loaded: int
    left_out: int
    licence: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def load_backbone(model: ImageTextModel, source: str) -> Report:
    """Copy pretrained weights into the trunk of the image tower, in place.

    Args:
        source: "timm" for the weights that timm publishes for this backbone (downloaded once), "timm:TAG" for one of several, or the path of a
            .safetensors or torch file whose names are timm's.

    Raises:
        CheckpointError: the weights cannot be had or do not fit; the model is untouched.
    """
    trunk, backbone = model.image.trunk, model.config.image.backbone
    licence = ""
    if source == "timm" or source.startswith("timm:"):
        state, licence = _from_timm(model, backbone, source.removeprefix("timm").removeprefix(":"))
    elif Path(source).is_file():
        state = read_weights(source)
    else:
        raise CheckpointError(f"backbone weights '{source}' are no file; give the path of a .safetensors or .pth file with timm's names, or 'timm' to download them")
    classifier = tuple(f"{name}." for name in _classifiers(trunk))
    wanted = trunk.state_dict()
    kept = {name: tensor for name, tensor in state.items() if name in wanted or not name.startswith(classifier)}
    own_head = {name: tensor for name, tensor in wanted.items() if name.startswith(classifier) and (name not in kept or kept[name].shape != tensor.shape)}
    kept = {name: tensor for name, tensor in kept.items() if name not in own_head} | own_head
    load_state(trunk, kept, where=f"backbone weights '{source}' for {backbone}")
    return Report(source=source, loaded=len(kept) - len(own_head), left_out=len(state) - (len(kept) - len(own_head)), licence=licence)


def _from_timm(model: ImageTextModel, backbone: str, tag: str) -> tuple[dict[str, Tensor], str]:
    name = f"{backbone}.{tag}" if tag else backbone
    if backbone in OWN_BACKBONES:
        raise CheckpointError(f"timm has no weights for '{backbone}', which is a backbone of ours; give a file, or another --backbone")
    if not timm.is_model_pretrained(name):
        known = ", ".join(timm.list_pretrained(f"{backbone}.*")) or "none"
        raise CheckpointError(f"timm {timm.__version__} has no pretrained weights called '{name}'; it has {known}")
    args = {key: tuple(value) if isinstance(value, list) else value for key, value in model.config.image.backbone_args.items()}
    try:
        made = timm.create_model(name, pretrained=True, **args)
    except Exception as error:  # hub, network and cache errors of a dozen types
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"the weights of '{name}' cannot be had from timm ({said}); check the network, or give the path of a file that you have downloaded") from None
    return made.state_dict(), str(made.pretrained_cfg.get("license") or "")


def _classifiers(trunk: Any) -> list[str]:
    found = getattr(trunk, "default_cfg", {}).get("classifier") or "head.fc"
    return [found] if isinstance(found, str) else list(found)
