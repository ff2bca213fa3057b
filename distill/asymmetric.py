"""Search with one model's texts among pictures that another model has embedded: `mclip eval --query A --gallery B --data PAIRS`.

A server may embed its pictures once with large teachers, and a phone asks with a small student. For that both must speak of one space: a student that
followed its teachers' features has the directions of their space that it learned (`ensemble_basis.safetensors` in its folder), and the teachers'
embeddings are seen along them. Otherwise the two must have the same number of dimensions, and be meant for each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill.basis_file import BASIS, read_basis
from distill.evaluate import open_encoder
from runtime.errors import CheckpointError
from runtime.evaluation import Encoder, retrieval
from runtime.pairs import Pairs


class Projected:
    """Teachers in the space of a student: their unit vectors side by side, seen along the student's basis (distill/losses.py, `ensemble_target`)."""

    def __init__(self, members: Sequence[Encoder], basis: np.ndarray) -> None:
        """basis: (sum of E_k, D)."""
        self.members, self.basis = list(members), basis

    def encode_image(self, images: list[Any]) -> np.ndarray:
        return self._seen([member.encode_image(images) for member in self.members])

    def encode_text(self, texts: list[str]) -> np.ndarray:
        return self._seen([member.encode_text(texts) for member in self.members])

    def _seen(self, parts: list[np.ndarray]) -> np.ndarray:
        stacked = np.concatenate([part / np.linalg.norm(part, axis=1, keepdims=True) for part in parts], axis=1)
        if stacked.shape[1] != len(self.basis):
            raise CheckpointError(
                f"the {len(self.members)} teachers have {stacked.shape[1]} dimensions together, the student's basis was made of {len(self.basis)}; "
                "give those that it followed, in their order"
            )
        seen = stacked @ self.basis
        return seen / np.linalg.norm(seen, axis=1, keepdims=True)


class Mixed:
    """Texts by one encoder, pictures by another."""

    def __init__(self, texts: Encoder, images: Encoder) -> None:
        self.encode_text, self.encode_image = texts.encode_text, images.encode_image


def open_sides(query: Sequence[str], gallery: Sequence[str], threads: int | None = None) -> tuple[Encoder, Encoder]:
    """Both sides as encoders of one space. A side of several models, or one of another width than the other's basis, is a student's teachers."""
    sides = [[open_encoder(path, threads) for path in side] for side in (query, gallery)]
    found: list[Encoder] = []
    for own, other in ((0, 1), (1, 0)):
        student = (query, gallery)[other][0]
        if len(sides[own]) > 1 or (len(sides[other]) == 1 and (Path(student) / BASIS).is_file() and not (Path((query, gallery)[own][0]) / BASIS).is_file()):
            if len(sides[other]) > 1:
                raise CheckpointError("both sides are several models; one of them must be the student whose teachers the other names")
            found.append(Projected(sides[own], read_basis(Path(student))[0]))
        else:
            found.append(sides[own][0])
    return found[0], found[1]


def matrix(query: Sequence[str], gallery: Sequence[str], pairs: Pairs, k: int = 5, seed: int = 0, threads: int | None = None) -> dict[str, Any]:
    """Recall@k, text to image, of every combination of who embeds the texts and who the pictures.

    Returns:
        JSON-ready {"k", "cells": [{"query": "A" or "B", "gallery": "A" or "B", "splits": {split: {"n", "value", "low", "high"}}}]}.

    Raises:
        CheckpointError: the two do not share a space.
    """
    one, other = open_sides(query, gallery, threads)
    widths = [np.asarray(side.encode_text(["a"])).shape[1] for side in (one, other)]
    if widths[0] != widths[1]:
        raise CheckpointError(f"the sides have {widths[0]} and {widths[1]} dimensions; they must share a space: a student, and the teachers that it followed")
    cells = []
    for text_name, texts in (("A", one), ("B", other)):
        for image_name, images in (("A", one), ("B", other)):
            found = retrieval(Mixed(texts, images), pairs, ks=(k,), seed=seed)["text_to_image"]
            cells.append({"query": text_name, "gallery": image_name, "splits": {split: {"n": row["n"], **row[f"recall@{k}"]} for split, row in found.items()}})
    return {"k": k, "cells": cells}


def format_matrix(result: dict[str, Any], query: Sequence[str], gallery: Sequence[str]) -> str:
    """A few lines for a person."""
    lines = [f"A: {', '.join(query)}   B: {', '.join(gallery)}   recall@{result['k']}, text to image"]
    for cell in result["cells"]:
        splits = "   ".join(f"{split} {row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]" for split, row in cell["splits"].items())
        lines.append(f"texts by {cell['query']}, pictures by {cell['gallery']}:   {splits}")
    return "\n".join(lines) + "\n"
