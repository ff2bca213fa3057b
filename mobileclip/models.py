"""Making models by name or from a checkpoint, and the table of presets."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mobileclip.config import PRESETS, ModelConfig, config_to_dict, preset


def create_model(name: str | os.PathLike[str] | ModelConfig, pretrained: str | os.PathLike[str] | None = None) -> Any:
    """An `ImageTextModel` in eval mode.

    Args:
        name: a preset's name, a checkpoint folder, or a config.
        pretrained: a checkpoint folder, or an open_clip state dict (.safetensors or .pt) for a preset. None: random weights.

    Raises:
        CheckpointError: unknown name, or weights that do not fit.
    """
    from mobileclip.checkpoint import load_checkpoint, load_state
    from mobileclip.model import ImageTextModel

    if not isinstance(name, ModelConfig) and os.path.isdir(name):
        return load_checkpoint(name)
    config = name if isinstance(name, ModelConfig) else preset(str(name))
    if pretrained is None:
        return ImageTextModel(config).eval()
    if os.path.isdir(pretrained):
        return load_checkpoint(pretrained)
    model = ImageTextModel(config)
    load_state(model, _foreign_state(Path(pretrained)), where=str(pretrained))
    return model.eval()


def _foreign_state(path: Path) -> dict[str, Any]:
    import torch
    from safetensors.torch import load_file

    from mobileclip.convert import from_open_clip
    from runtime.errors import CheckpointError

    if not path.is_file():
        raise CheckpointError(f"pretrained '{path}' does not exist; give a checkpoint folder or an open_clip .safetensors or .pt file")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"'{path}' cannot be read as weights ({error}); expected safetensors or a state dict that loads with weights_only=True") from None
    return from_open_clip(state.get("state_dict", state))


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


def main(argv: list[str]) -> int:
    """`mclip models`: the presets with their sizes, preprocessing and licence. Needs no torch."""
    parser = argparse.ArgumentParser(prog="mclip models", description="List the model presets.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    if args.json:
        sys.stdout.write(json.dumps({name: config_to_dict(config) for name, config in PRESETS.items()}) + "\n")
        return 0
    rows = [("model", "image tower", "pixels", "mean / std", "text", "tokens", "mask", "dim", "licence of the weights")]
    for name, config in PRESETS.items():
        image, text = config.image, config.text
        rows.append((
            name, image.backbone, str(image.image_size), f"{image.mean[0]:g} / {image.std[0]:g}", f"{text.layers}x{text.width}",
            str(text.context_length), text.mask, str(config.embed_dim), config.licence,
        ))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        sys.stdout.write("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n")
    return 0

