"""The directions of its teachers' space that a student learned, in a file beside its weights: teachers can be seen in the student's space by it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from runtime.errors import CheckpointError

BASIS = "ensemble_basis.safetensors"


def write_basis(folder: Path, basis: Tensor, teachers: Sequence[str]) -> None:
    """basis: (sum of E_k, D), as `distill.objective.basis_of` makes it. teachers: their names, in order."""
    save_file({"basis": basis.cpu().contiguous()}, folder / BASIS, metadata={"teachers": json.dumps(list(teachers))})


def read_basis(folder: Path) -> tuple[np.ndarray, tuple[str, ...]]:
    """The basis of a student, (sum of E_k, D), and the names of its teachers, in order.

    Raises:
        CheckpointError: it has none, or it is damaged.
    """
    path = folder / BASIS
    if not path.is_file():
        raise CheckpointError(f"'{folder}' has no {BASIS}: it followed no teachers' features, so teachers cannot be seen in its space; train with a recipe that has a feature loss")
    try:
        with safe_open(path, framework="np") as file:
            return file.get_tensor("basis"), tuple(json.loads((file.metadata() or {})["teachers"]))
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise CheckpointError(f"'{path}' cannot be read ({error}); train again") from None
