"""What a model is made of, as plain data: everything that a checkpoint's config.json holds (presets: `mobileclip.presets`)."""

from __future__ import annotations

import ast
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from runtime.errors import CheckpointError

SCHEMA = 1
MOST, LAYERS = 1 << 22, 256
"""Above every width, size and number of layers that there is a model of: a file that asks for more is not one of ours."""

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageConfig:
    """The image tower and the pixels that it expects."""

    backbone: str
    """A timm model name, or "fastvit" (timm's FastViT of free dimensions) or "pocket" (`mobileclip.pocket`)."""
    backbone_args: dict[str, Any] = field(default_factory=dict)
    image_size: int = 256
    """Side of the square input, in pixels."""
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    crop_pct: float = 1.0
    """The shorter side is resized to floor(image_size / crop_pct) before the centre crop."""
    projection: Literal["head", "linear", "mlp"] = "head"
    """"head": the backbone's own classifier projects to embed_dim; otherwise a layer of ours on the pooled features."""
    projection_hidden: int = 0
    """Hidden width of an "mlp" projection; 0 means the width of its input."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextConfig:
    """The text tower and the tokens that it expects."""

    context_length: int = 77
    vocab_size: int = 49408
    width: int = 512
    heads: int = 8
    layers: int = 12
    """Attention blocks. An "mct" tower has two convolutional ones beside."""
    kind: Literal["transformer", "mct"] = "transformer"
    """"mct": a RepMixer block over the tokens before and after the attention blocks (MobileCLIP, section 4.2; v1 S0 only)."""
    conv_kernel: int = 11
    """Tokens that a RepMixer block of an "mct" tower looks at."""
    embedding_dim: int = 0
    """Width of the token embedding; 0 means `width`. A smaller one is followed by a linear map to `width` (ALBERT, section 3.1)."""
    mlp_ratio: float = 4.0
    mask: Literal["causal", "pad", "none"] = "none"
    """"none" lets padding take part (Apple's S models: always pad to context_length)."""
    pool: Literal["eot", "mean"] = "eot"
    """"eot": the position of the largest token id; "mean": the mean over tokens that are not padding."""
    norm: Literal["pre", "post"] = "pre"
    """"post" with `embedding_norm` is a BERT encoder."""
    embedding_norm: bool = False
    layer_norm_eps: float = 1e-5
    pad_id: int = 0
    tokenizer: Literal["clip", "wordpiece"] = "clip"
    cleaning: Literal["clip", "none"] = "clip"
    projection: Literal["linear", "mlp"] = "linear"
    projection_hidden: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A two-tower model. `ffn_widths` overrides the hidden width of single feed-forward layers (after pruning)."""

    name: str
    embed_dim: int
    image: ImageConfig
    text: TextConfig
    logit_scale: float = 1 / 0.07
    """Multiplicative initial value; the parameter holds its logarithm."""
    logit_bias: float | None = None
    """Initial value of what is added to every logit, for a model of the sigmoid loss (SigLIP: -10); None: a softmax model, which has none."""
    ffn_widths: dict[str, int] = field(default_factory=dict)
    """Module path of an FFN ("image.trunk.stages.0.blocks.0.mlp") to its hidden width."""
    folded: bool = False
    """True when training-time branches have been folded into plain convolutions."""
    licence: str = "unknown"
    """Licence of the weights, to be printed wherever they are used."""
    sources: tuple[str, ...] = ()
    """Where the weights come from, one sentence each."""

    def __post_init__(self) -> None:
        if not self.text.heads or self.text.width % self.text.heads:
            raise CheckpointError(
                f"model '{self.name}': text width {self.text.width} is not a multiple of its {self.text.heads} heads; change one of them"
            )
        if self.text.kind == "mct" and (self.text.mask != "none" or self.text.conv_kernel % 2 == 0):
            raise CheckpointError(
                f"model '{self.name}': an mct text tower has no mask and an odd conv_kernel, found mask '{self.text.mask}' and conv_kernel {self.text.conv_kernel}"
            )
        if self.embed_dim < 1 or self.image.image_size < 16 or self.text.context_length < 4:
            raise CheckpointError(
                f"model '{self.name}': embed_dim {self.embed_dim}, image_size {self.image.image_size} and context_length "
                f"{self.text.context_length} must be at least 1, 16 and 4"
            )


_NUMBER = (int, float)
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "str": (lambda value: isinstance(value, str), "a text"),
    "int": (lambda value: type(value) is int and 0 <= value <= MOST, f"a whole number from 0 to {MOST:,}"),
    "float": (lambda value: type(value) in _NUMBER and math.isfinite(value), "a finite number"),
    "float | None": (lambda value: value is None or (type(value) in _NUMBER and math.isfinite(value)), "a finite number or null"),
    "bool": (lambda value: isinstance(value, bool), "true or false"),
    "dict[str, Any]": (lambda value: isinstance(value, dict), "an object"),
    "dict[str, int]": (
        lambda value: isinstance(value, dict) and all(type(width) is int and 0 < width <= MOST for width in value.values()), f"an object of whole numbers up to {MOST:,}",
    ),
    "tuple[float, float, float]": (
        lambda value: isinstance(value, list | tuple) and len(value) == 3 and all(type(part) in _NUMBER and math.isfinite(part) for part in value), "three finite numbers",
    ),
    "tuple[str, ...]": (lambda value: isinstance(value, list | tuple) and all(isinstance(part, str) for part in value), "a list of texts"),
}  # fmt: skip
"""Annotation of a field -> what its value in a file must be."""


def _wrong(kind: type, key: str, value: Any) -> str | None:
    """What a field's value should have been; None where it is well, or where there is no such field (the constructor says so)."""
    annotation = next((field.type for field in dataclasses.fields(kind) if field.name == key), None)
    if not isinstance(annotation, str):
        return None
    if annotation.startswith("Literal["):
        choices = ast.literal_eval(f"({annotation[8:-1]},)")
        return None if value in choices else f"one of {', '.join(choices)}"
    if annotation not in _KINDS:
        return None
    sound, expected = _KINDS[annotation]
    if sound(value) and value <= LAYERS if key == "layers" and type(value) is int else sound(value):
        return None
    return expected if key != "layers" else f"a whole number from 0 to {LAYERS}"


def config_to_dict(config: ModelConfig) -> dict[str, Any]:
    """JSON-ready form of a config, with its schema number."""
    found = {"schema": SCHEMA, **dataclasses.asdict(config)}
    if config.logit_bias is None:
        del found["logit_bias"]  # as before there were sigmoid models
    return found


def config_from_dict(data: dict[str, Any], where: str = "config.json") -> ModelConfig:
    """Build a config from what `config_to_dict` wrote.

    Raises:
        CheckpointError: unknown schema, unknown or missing fields (all of them are listed).
    """
    if not isinstance(data, dict):
        raise CheckpointError(f"{where}: holds a {type(data).__name__}, expected an object with image and text; the file is not a model config")
    data = dict(data)
    schema = data.pop("schema", None)
    if schema != SCHEMA:
        raise CheckpointError(f"{where}: schema is {schema!r}, this version reads {SCHEMA}; convert the checkpoint or update the toolkit")
    image, text = data.pop("image", None), data.pop("text", None)
    if not isinstance(image, dict) or not isinstance(text, dict):
        raise CheckpointError(f"{where}: the sections 'image' and 'text' must both be objects; the file is not a model config")
    for kind, section, name in ((ImageConfig, image, "image."), (TextConfig, text, "text."), (ModelConfig, data, "")):
        for key, value in section.items():
            if problem := _wrong(kind, key, value):
                raise CheckpointError(f"{where}: {name}{key} is {str(value)[:60]!r}, expected {problem}; the file was written by another version or by hand")
    image = {**image, **{key: tuple(image[key]) for key in ("mean", "std") if key in image}}
    if "sources" in data:
        data["sources"] = tuple(data["sources"])
    try:
        return ModelConfig(image=ImageConfig(**image), text=TextConfig(**text), **data)
    except TypeError as error:
        raise CheckpointError(f"{where}: {error}; the file was written by another version or by hand") from None
