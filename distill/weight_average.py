"""A model between two: `mclip average BASE TUNED OUT --share 0.5`.

A fine-tuned model knows its domain and has forgotten some of the rest; the straight line between its weights and those that it began with holds models
that know nearly all of both (Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", arXiv 2109.01903). It works because the two lie in
one basin: TUNED must come from BASE (`mclip train --init BASE`).

    mclip average BASE TUNED OUT --share 0.5
    mclip average BASE TUNED --sweep 0 0.25 0.5 0.75 1 --data DOMAIN GENERAL         recalls along the line, nothing is written
"""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from mobileclip.checkpoint import load_checkpoint, save_checkpoint, verify_receipt
from mobileclip.model import ImageTextModel
from runtime.errors import CheckpointError, RecipeError


@dataclass(frozen=True, kw_only=True, slots=True)
class AverageConfig:
    """Which two models, and where between them."""

    base: tyro.conf.Positional[str]
    """The checkpoint that the other one began with."""
    tuned: tyro.conf.Positional[str]
    """The checkpoint that was trained from it."""
    out: tyro.conf.Positional[str] = ""
    """Checkpoint folder to write."""
    share: float = 0.5
    """Of the tuned model: 0 is the base, 1 the tuned one."""
    sweep: tuple[float, ...] = ()
    """Shares to evaluate on --data instead of writing one."""
    data: tuple[str, ...] = ()
    """Pairs folders of a sweep."""
    json: bool = False
    """Print one JSON object."""


def average(base: ImageTextModel, tuned: ImageTextModel, share: float) -> ImageTextModel:
    """A new model: (1 - share) * base + share * tuned of every weight and BatchNorm statistic.

    Raises:
        CheckpointError: the two are not the same architecture. RecipeError: a share outside 0 to 1.
    """
    if not 0 <= share <= 1:
        raise RecipeError(f"the share of the tuned model is {share}; expected 0 (the base) to 1 (the tuned model)")
    ours, theirs = (dataclasses.replace(model.config, licence="", sources=(), name="") for model in (base, tuned))
    if ours != theirs:
        parts = [field.name for field in dataclasses.fields(ours) if getattr(ours, field.name) != getattr(theirs, field.name)]
        raise CheckpointError(f"'{base.config.name}' and '{tuned.config.name}' differ in {', '.join(parts)}; only models of one architecture lie on a line")
    result, other = copy.deepcopy(base), tuned.state_dict()
    with torch.no_grad():
        for name, tensor in result.state_dict().items():
            if tensor.is_floating_point():
                tensor.lerp_(other[name].to(tensor.dtype), share)
            else:
                tensor.copy_(other[name])
    return result.eval()


def sweep(base: ImageTextModel, tuned: ImageTextModel, shares: tuple[float, ...], data: tuple[str, ...], tokenizer_folder: str) -> list[dict[str, Any]]:
    """Per share {"share", "recall@5": {folder: recall@5 of all its queries, text to image}}."""
    from distill.evaluate import quick_recall

    rows = []
    for share in shares:
        model = average(base, tuned, share)
        rows.append({"share": share, "recall@5": {name: quick_recall(model, name, tokenizer_folder)["recall@5_all"] for name in data}})
    return rows


def main(argv: list[str]) -> int:
    """`mclip average`."""
    config = tyro.cli(AverageConfig, args=argv, prog="mclip average", description=__doc__)
    if bool(config.sweep) == bool(config.out) or bool(config.sweep) != bool(config.data):
        raise RecipeError("mclip average writes one model (OUT and --share) or evaluates several (--sweep and --data); give one of the two")
    base, tuned = load_checkpoint(config.base), load_checkpoint(config.tuned)
    if config.sweep:
        rows = sweep(base, tuned, config.sweep, config.data, config.base)
        said = json.dumps({"base": config.base, "tuned": config.tuned, "rows": rows}) + "\n"
        lines = ["share of the tuned model   recall@5 on " + ", ".join(config.data)]
        lines += [f"{row['share']:24.2f}   " + "  ".join(f"{row['recall@5'][name]:.3f}" for name in config.data) for row in rows]
        sys.stdout.write(said if config.json else "\n".join(lines) + "\n")
        return 0
    if Path(config.out).exists() and Path(config.out).resolve() in (Path(config.base).resolve(), Path(config.tuned).resolve()):
        raise RecipeError(f"'{config.out}' is one of the two models; choose another folder to write")
    result = average(base, tuned, config.share)
    receipts = {name: verify_receipt(folder)["files"]["model.safetensors"]["sha256"] for name, folder in (("base", config.base), ("tuned", config.tuned))}
    out = save_checkpoint(result, config.out, tokenizer=Path(config.base) / "tokenizer.json", extra={"stage": "average", "share": config.share, "inputs": receipts})
    line = f"{out}: {config.share:.0%} of {config.tuned}, the rest of {config.base}"
    sys.stdout.write((json.dumps({"out": str(out), "share": config.share, **receipts}) if config.json else line) + "\n")
    return 0
