"""Making models by name, from a checkpoint or from a file in any layout."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mobileclip.config import ModelConfig
from mobileclip.presets import FAMILY, preset
from runtime.errors import CheckpointError


def create_model(name: str | os.PathLike[str] | ModelConfig, pretrained: str | os.PathLike[str] | None = None, *, allow_nonfinite: bool = False) -> Any:
    """An `ImageTextModel` in eval mode.

    Args:
        name: a preset in any spelling ("mobileclip2_s0", "MobileCLIP2-S0", "apple/MobileCLIP2-S0"), a config, or simply what
            holds the weights: a checkpoint folder, a file in any layout, "hf-hub:owner/name". Which model and layout a file
            is in is found out.
        pretrained: where the weights are, when `name` names the model. None: random weights.
        allow_nonfinite: take weights with NaN or infinite values as they are.

    Raises:
        CheckpointError: unknown name, weights of another model, damaged or unreachable ones; the message says what to do.

    Example:
        >>> model = create_model("mobileclip2_s0")                                # random weights
        >>> model = create_model("MobileCLIP-S2", "mobileclip_s2.pt")             # doctest: +SKIP
        >>> model = create_model("hf-hub:apple/MobileCLIP2-S0")                   # doctest: +SKIP
    """
    from mobileclip.model import ImageTextModel

    if isinstance(name, ModelConfig):
        config = name
    elif is_place(name):
        if pretrained is not None:
            raise CheckpointError(f"'{name}' holds weights and pretrained is '{pretrained}'; give one of the two, or a model's name first")
        return load_pretrained(name, allow_nonfinite=allow_nonfinite)
    else:
        config = preset(str(name))
    if pretrained is None:
        return ImageTextModel(config).eval()
    return load_pretrained(pretrained, config, allow_nonfinite=allow_nonfinite)


def is_place(name: str | os.PathLike[str]) -> bool:
    """Whether this says where weights are, and not which model."""
    text = os.fspath(name)
    return text.startswith(("hf-hub:", "hf_hub:", "http://", "https://")) or os.path.isdir(text) or Path(text).suffix in (".pt", ".pth", ".bin", ".ckpt", ".safetensors")


def load_pretrained(place: str | os.PathLike[str], config: ModelConfig | None = None, *, allow_nonfinite: bool = False) -> Any:
    """The model that a checkpoint folder, weights file or hub id holds, in eval mode; folded if it was written folded.

    Args:
        config: what it is expected to be; None takes what is found.

    Raises:
        CheckpointError: as `create_model`.
    """
    from mobileclip.checkpoint import build, load_checkpoint, load_state
    from mobileclip.convert import to_ours
    from mobileclip.hub import resolve
    from mobileclip.layouts import best_name, recognise
    from mobileclip.weights import find_weights, read_weights

    path = resolve(place)
    if _is_checkpoint(path):
        model = load_checkpoint(path)
        if config is not None and (model.config.image.backbone, model.config.embed_dim) != (config.image.backbone, config.embed_dim):
            raise CheckpointError(f"'{place}' holds '{model.config.name}', not '{config.name}'; leave the name out, or give that model's weights")
        return model
    file = find_weights(path) if path.is_dir() else path
    state = read_weights(file, allow_nonfinite=allow_nonfinite)
    found = recognise({key: tuple(tensor.shape) for key, tensor in state.items()}, str(file), loose=True)
    if found.layout == "timm":
        raise CheckpointError(f"'{file}' holds an image tower alone; make a model and give it to load_image_tower(model, path)")
    if found.layout == "ours" and not found.names and config is None:
        raise CheckpointError(f"'{file}' is in our layout but of no preset; give its checkpoint folder, whose config.json says what it is")
    if config is None:
        config = preset(best_name(found, (str(place), file.name)))
    elif config.name in FAMILY and config.name not in found.names:
        raise CheckpointError(f"'{file}' holds {' or '.join(found.names)}, not '{config.name}'; give that name, or the file of '{config.name}'")
    config = dataclasses.replace(config, folded=found.folded)
    model = build(config)
    load_state(model, state if found.layout == "ours" else to_ours(state, found.layout, config, str(file)), where=str(file))
    return model.eval()


def _is_checkpoint(path: Path) -> bool:
    """Whether this is a folder in our layout; one that `mclip convert` wrote for others has a receipt of another kind."""
    if not (path / "config.json").is_file() or not (path / "receipt.json").is_file():
        return False
    try:
        return bool(json.loads((path / "receipt.json").read_text(encoding="utf-8")).get("kind") == "checkpoint")
    except (OSError, ValueError, AttributeError):
        return True  # damaged: loading it says how


def load_image_tower(model: Any, place: str | os.PathLike[str]) -> Any:
    """`model` with the image tower of a timm file (the projection included), which must be of the model's own architecture.

    Raises:
        CheckpointError: the file holds something else; the model is untouched.
    """
    from mobileclip.checkpoint import load_state
    from mobileclip.convert import to_ours
    from mobileclip.hub import resolve
    from mobileclip.weights import find_weights, read_weights

    path = resolve(place)
    file = find_weights(path) if path.is_dir() else path
    tower = to_ours(read_weights(file), "timm", model.config, str(file))
    load_state(model, {**model.state_dict(), **tower}, where=str(file))
    return model


def create_model_and_transforms(
    name: str, pretrained: str | os.PathLike[str] | None = None
) -> tuple[Any, Callable[[Any], Any], Callable[[Any], Any]]:
    """The model and its picture transform, in the order that open_clip's function of this name returns them.

    The transform takes a PIL picture and gives a float32 tensor (3, image_size, image_size); there is one transform, for
    training and evaluation alike, because augmentation is stored with the data.
    """
    import torch

    from mobileclip.checkpoint import preprocess_config
    from runtime.preprocess import preprocess

    model = create_model(name, pretrained)
    config = preprocess_config(model.config)

    def transform(picture: Any) -> torch.Tensor:
        return torch.from_numpy(preprocess([picture], config)[0])

    return model, transform, transform


def get_tokenizer(name: str | os.PathLike[str]) -> Callable[[str | list[str]], Any]:
    """texts -> int32 tensor (B, context_length), for a preset or a checkpoint folder."""
    import torch

    from mobileclip.checkpoint import build_tokenizer, open_tokenizer
    from runtime.tokenizer import Tokenizer

    if os.path.isdir(name):
        tokenizer = open_tokenizer(name)
    else:
        text = preset(str(name)).text
        with tempfile.TemporaryDirectory() as folder:
            path = build_tokenizer(text.vocab_size, Path(folder) / "tokenizer.json")
            tokenizer = Tokenizer.open(path, context_length=text.context_length, cleaning=text.cleaning, pad_id=text.pad_id)

    def tokenize(texts: str | list[str]) -> torch.Tensor:
        return torch.from_numpy(tokenizer([texts] if isinstance(texts, str) else texts))

    return tokenize
