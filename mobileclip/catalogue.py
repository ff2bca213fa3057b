"""`mclip models`: what the presets are, as a table. No torch, so that it answers at once and on a device."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

from mobileclip.config import OPENAI_MEAN, ModelConfig, config_to_dict
from mobileclip.layouts import LAYOUTS, check_layout
from mobileclip.presets import PRESETS
from runtime.errors import CheckpointError

PARAMETERS: dict[str, tuple[int, int]] = {
    "mobileclip_s0": (11_357_504, 42_435_072),
    "mobileclip_s1": (21_461_056, 63_428_096),
    "mobileclip_s2": (35_702_992, 63_428_096),
    "mobileclip_b": (86_349_056, 63_428_096),
    "mobileclip_b_lt": (86_349_056, 63_428_096),
    "mobileclip_s3": (125_074_272, 123_650_304),
    "mobileclip_s4": (321_569_664, 123_650_304),
    "mobileclip_l_14": (303_966_976, 123_650_304),
    "mobileclip2_s0": (11_357_504, 63_428_096),
    "mobileclip2_s2": (35_702_992, 63_428_096),
    "mobileclip2_b": (86_349_056, 63_428_096),
    "mobileclip2_s3": (125_074_272, 123_650_304),
    "mobileclip2_s4": (321_569_664, 123_650_304),
    "mobileclip2_l_14": (303_966_976, 123_650_304),
    "pocket_s": (242_256, 1_480_704),
    "pocket_m": (1_362_976, 2_961_600),
    "pocket_l": (2_045_152, 2_981_568),
    "pocket_xl": (5_214_744, 4_834_816),
    "pocket_xxl": (10_795_696, 9_416_960),
}
"""Parameters of the image and the text tower, folded as they are deployed. Counting takes torch and seconds: the tests do it."""


def rows() -> list[dict[str, Any]]:
    """Facts of every preset, JSON-ready."""
    found = []
    for name, config in PRESETS.items():
        image, text = config.image, config.text
        found.append({
            "name": name, "image_parameters": PARAMETERS[name][0], "text_parameters": PARAMETERS[name][1], "image_tower": image.backbone,
            "image_size": image.image_size, "mean": list(image.mean), "std": list(image.std), "interpolation": image.interpolation,
            "text_tower": f"{text.kind} {text.layers}x{text.width}", "context_length": text.context_length, "vocab_size": text.vocab_size, "mask": text.mask,
            "embed_dim": config.embed_dim, "layouts": [layout for layout in LAYOUTS if _holds(layout, config)], "licence": config.licence,
        })  # fmt: skip
    return found


def _holds(layout: str, config: ModelConfig) -> bool:
    try:
        check_layout(layout, config)
    except CheckpointError:
        return False
    return True


def _pixels(row: dict[str, Any]) -> str:
    if row["mean"] == list(OPENAI_MEAN):
        return "OpenAI's"
    return f"{row['mean'][0]:g} / {row['std'][0]:g}"


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "model": lambda row: row["name"],
    "params M img + txt": lambda row: f"{row['image_parameters'] / 1e6:.1f} + {row['text_parameters'] / 1e6:.1f}",
    "image tower": lambda row: row["image_tower"],
    "pixels": lambda row: f"{row['image_size']} {row['interpolation']}",
    "mean / std": _pixels,
    "text tower": lambda row: row["text_tower"],
    "tokens": lambda row: str(row["context_length"]),
    "vocabulary": lambda row: str(row["vocab_size"]),
    "mask": lambda row: row["mask"],
    "dim": lambda row: str(row["embed_dim"]),
    "layouts": lambda row: ", ".join(row["layouts"]),
    "licence of the weights": lambda row: row["licence"].partition(" (")[0],
}


def table(markdown: bool = False) -> str:
    """The presets as aligned text, or as the table of docs/models.md."""
    found = rows()
    cells = [list(COLUMNS), *([show(row) for show in COLUMNS.values()] for row in found)]
    if markdown:
        lines = [f"| {' | '.join(row)} |" for row in cells]
        return "\n".join([lines[0], "|" + "---|" * len(COLUMNS), *lines[1:]]) + "\n"
    widths = [max(len(row[column]) for row in cells) for column in range(len(COLUMNS))]
    return "".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n" for row in cells)


def main(argv: list[str]) -> int:
    """`mclip models`."""
    parser = argparse.ArgumentParser(prog="mclip models", description="List the model presets: sizes as deployed, preprocessing, layouts of checkpoints, licence.")
    parser.add_argument("--json", action="store_true", help="print one JSON object, configs included")
    parser.add_argument("--markdown", action="store_true", help="print the table of docs/models.md")
    args = parser.parse_args(argv)
    if args.json:
        sys.stdout.write(json.dumps({row["name"]: {**row, "config": config_to_dict(PRESETS[row["name"]])} for row in rows()}) + "\n")
    else:
        sys.stdout.write(table(args.markdown))
    return 0
