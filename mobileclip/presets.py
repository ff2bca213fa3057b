"""The models that have a name: Apple's fourteen MobileCLIP variants and the pocket students.

A variant differs from its neighbours in one or two settings, and the wrong one loads without an error: normalisation, text
mask, interpolation. They stand here once. Sources: Apple's model cards and package configs, open_clip's and timm's configs.
"""

from __future__ import annotations

import dataclasses

from mobileclip.config import OPENAI_MEAN, OPENAI_STD, ImageConfig, ModelConfig, TextConfig
from mobileclip.students import STUDENTS
from runtime.errors import CheckpointError

_APPLE = "Apple ML Research Model Terms of Use (research only, derivatives included)"

_MCI = {f"mci{n}": ImageConfig(backbone=f"fastvit_mci{n}") for n in range(3)}
# The larger towers were trained on pictures normalised as OpenAI's CLIP does it.
_MCI |= {f"mci{n}": ImageConfig(backbone=f"fastvit_mci{n}", mean=OPENAI_MEAN, std=OPENAI_STD) for n in (3, 4)}
_VIT_B = ImageConfig(backbone="vit_base_mci_224", backbone_args={"global_pool": "token"}, image_size=224)
_VIT_L = ImageConfig(
    backbone="vit_large_patch14_clip_224", backbone_args={"global_pool": "token"}, image_size=224,
    mean=OPENAI_MEAN, std=OPENAI_STD, interpolation="bicubic",
)  # fmt: skip
_BASE = TextConfig(mask="none")
_LARGE = TextConfig(mask="none", width=768, heads=12)


def _apple(name: str, image: ImageConfig, text: TextConfig = _BASE) -> ModelConfig:
    return ModelConfig(name=name, embed_dim=text.width, image=image, text=text, licence=_APPLE)


FAMILY: dict[str, ModelConfig] = {
    config.name: config
    for config in (
        _apple("mobileclip_s0", _MCI["mci0"], TextConfig(mask="none", kind="mct", layers=4)),
        _apple("mobileclip_s1", _MCI["mci1"]),
        _apple("mobileclip_s2", _MCI["mci2"]),
        _apple("mobileclip_b", _VIT_B, dataclasses.replace(_BASE, mask="causal")),
        _apple("mobileclip_b_lt", _VIT_B, dataclasses.replace(_BASE, mask="causal")),
        _apple("mobileclip_s3", _MCI["mci3"], _LARGE),
        _apple("mobileclip_s4", _MCI["mci4"], _LARGE),
        _apple("mobileclip_l_14", _VIT_L, _LARGE),
        _apple("mobileclip2_s0", _MCI["mci0"]),
        _apple("mobileclip2_s2", _MCI["mci2"]),
        _apple("mobileclip2_b", _VIT_B, dataclasses.replace(_BASE, mask="causal")),
        _apple("mobileclip2_s3", _MCI["mci3"], _LARGE),
        _apple("mobileclip2_s4", _MCI["mci4"], _LARGE),
        _apple("mobileclip2_l_14", _VIT_L, _LARGE),
    )
}
"""Apple's variants, weights not included."""

PRESETS: dict[str, ModelConfig] = FAMILY | STUDENTS


def canonical_name(name: str) -> str:
    """The preset that a name of the field means: "apple/MobileCLIP2-S0", "MobileCLIP-B(LT)", "mobileclip_blt" … -> ours.

    A name that nobody knows comes back as it was.

    >>> canonical_name("apple/MobileCLIP2-L-14")
    'mobileclip2_l_14'
    >>> canonical_name("timm/MobileCLIP2-S0-OpenCLIP")
    'mobileclip2_s0'
    """
    if name in PRESETS:
        return name
    bare = name.lower().replace("l/14", "l-14").rpartition("/")[2].replace("-", "_").replace("(", "_").replace(")", "").replace("__", "_")
    bare = bare.removesuffix("_openclip")
    for short, full in (("_blt", "_b_lt"), ("_l14", "_l_14")):
        if bare.endswith(short):
            bare = bare.removesuffix(short) + full
    return bare if bare in PRESETS else name


def preset(name: str) -> ModelConfig:
    """The preset of this name, or of a spelling that `canonical_name` knows.

    Raises:
        CheckpointError: unknown name; the known ones are listed.
    """
    found = PRESETS.get(canonical_name(name))
    if found is None:
        raise CheckpointError(f"unknown model '{name}'; known presets are {', '.join(PRESETS)}, or give a checkpoint folder")
    return found
