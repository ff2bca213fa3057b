"""precision.json beside a compressed checkpoint: in which precisions each tower may be exported, how int8 is made, and why some are refused."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from export.int8_recipe import Int8Recipe
from export.towers import TOWERS
from runtime.errors import CheckpointError, RecipeError

NAME = "precision.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Precisions:
    """What `mclip compress` decided; empty where it was not asked.

    Attributes:
        allowed: tower to target to precisions; None, or a target that is not there, allows all.
        int8: tower to the recipe of its int8 graph.
        refused: tower to target to the reason why it gets no int8.
    """

    allowed: dict[str, dict[str, list[str]]] | None = None
    int8: dict[str, Int8Recipe] = field(default_factory=dict)
    refused: dict[str, dict[str, str]] = field(default_factory=dict)


def read_precisions(checkpoint: Path) -> Precisions:
    """The decisions beside a checkpoint.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = checkpoint / NAME
    if not path.is_file():
        return Precisions()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        towers = found["towers"]
        return Precisions(
            allowed={tower: {target: [str(p) for p in towers[tower][target]] for target in towers[tower]} for tower in TOWERS},
            int8={tower: Int8Recipe.from_dict(recipe) for tower, recipe in found.get("int8", {}).items()},
            refused={tower: {target: str(reason) for target, reason in reasons.items()} for tower, reasons in found.get("refused", {}).items()},
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecipeError) as error:
        raise CheckpointError(f"'{path}' cannot be read ({error!r}); run mclip compress again, or remove the file to export in any precision") from None
