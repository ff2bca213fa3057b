"""mclip curate: which pairs to use, decided by rules, written as a keep-list. The pairs and the store are only read.

    mclip curate PAIRS clean.keep --exact --near --min-caption-words 2                       (before reinforcement)
    mclip curate PAIRS good.keep --store STORE --embedding-duplicates 0.96 --keep-fraction 0.7   (after it)
    mclip train --pairs PAIRS --store STORE --keep good.keep --out CKPT

Rules run in the order of their options here, each on what the ones before left. Beside the list, good.keep.json says what each dropped,
and for duplicates which one was kept and why. docs/guides/curation.md says which paper each follows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from distill.curation_rules import CAP, Selection, apply_rules
from distill.keep_list import read_keep_list, write_keep_list
from distill.remote import fetch_shard, list_shards, local_pairs, local_store
from runtime.errors import PairsError, RecipeError
from runtime.files import file_sha256, write_json

NO_SETTINGS = ("pairs", "out", "store", "within", "apart_from", "workers", "json")
"""Fields that do not decide which keys are kept, or are named by their hashes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CurateConfig:
    """Choose pairs of PAIRS by rules, and write their keys to OUT."""

    pairs: tyro.conf.Positional[str]
    """Folder of tar shards, or its address (s3://, gs://, hf://, file://)."""
    out: tyro.conf.Positional[str]
    """Keep-list to write; the report goes beside it, with .json appended."""
    store: str | None = None
    """Their reinforcement: needed by the rules on embeddings and similarity; elsewhere the better pair of two duplicates is the one that fits its caption better."""
    within: str | None = None
    """A keep-list to begin with, instead of all pairs."""
    min_caption_chars: int | None = None
    """Drop captions with fewer characters (1: empty ones); a missing caption counts as empty."""
    min_caption_words: int | None = None
    """Drop captions with fewer words."""
    max_caption_words: int | None = None
    """Drop captions with more words."""
    min_side: int | None = None
    """Drop pictures whose shorter side has fewer pixels."""
    max_aspect: float | None = None
    """Drop pictures whose longer side is more than so many times the shorter one."""
    exact: bool = False
    """Of pictures with the same file or the same pixels keep one."""
    near: bool = False
    """Of pictures that look alike keep one."""
    near_distance: int = 4
    """Bits of 64 in which their perceptual hashes may differ."""
    near_colour: int = 16
    """Steps of 255 by which each of their 4 x 4 mean colours may differ."""
    apart_from: str | None = None
    """Pairs folder, a test set for instance: drop pictures that look like one of its pictures (same distances as --near)."""
    max_shared_caption: int | None = None
    """Drop all pairs of a caption that more than so many of the pictures left have."""
    embedding_duplicates: float | None = None
    """Of pictures whose stored embeddings have at least this cosine keep one."""
    cells: int | None = None
    """Cells of k-means for that search; 1 compares all with all, by itself it is 1 up to 20,000 pairs and one for each 5,000 beyond."""
    min_similarity: float | None = None
    """Drop pairs with a lower stored similarity of picture and caption."""
    keep_fraction: float | None = None
    """Keep this share of what is left, those of the highest similarity."""
    similarity_of: Literal["own", "best"] = "own"
    """Whose similarity: the pair's own caption (the store's column), or the best of its stored captions."""
    workers: int = 1
    """Processes that decode pictures. The result does not depend on it."""
    seed: int = 0
    """Of k-means."""
    json: bool = False
    """Print one JSON object instead of lines."""

    def __post_init__(self) -> None:
        rules = ("min_caption_chars", "min_caption_words", "max_caption_words", "min_side", "max_aspect", "apart_from", "max_shared_caption",
                 "embedding_duplicates", "min_similarity", "keep_fraction")  # fmt: skip
        if not (self.exact or self.near or any(getattr(self, name) is not None for name in rules)):
            raise RecipeError(f"no rule was chosen; give at least one of --exact, --near, {', '.join('--' + name.replace('_', '-') for name in rules)}")
        if self.min_similarity is not None and self.keep_fraction is not None:
            raise RecipeError("--min-similarity and --keep-fraction both cut by similarity; give one of them")
        for name in ("embedding_duplicates", "min_similarity", "keep_fraction"):
            if getattr(self, name) is not None and self.store is None:
                raise RecipeError(f"--{name.replace('_', '-')} reads what teachers said of the pairs; give --store, as mclip reinforce wrote it")
        at_least = {"min_caption_chars": 1, "min_caption_words": 1, "max_caption_words": 1, "min_side": 1, "max_aspect": 1, "max_shared_caption": 1,
                    "near_distance": 0, "near_colour": 0, "cells": 1, "workers": 1, "seed": 0}  # fmt: skip
        at_most = {"near_distance": 31, "near_colour": 255, "embedding_duplicates": 1.0, "min_similarity": 1.0, "keep_fraction": 1.0}
        at_least |= {"embedding_duplicates": -1, "min_similarity": -1, "keep_fraction": 0}
        for name, low in at_least.items():
            value, high = getattr(self, name), at_most.get(name, math.inf)
            if value is not None and not (low <= value <= high and math.isfinite(value)):
                raise RecipeError(f"--{name.replace('_', '-')} is {value}, expected {low} to {high}")
        if self.keep_fraction == 0:
            raise RecipeError("--keep-fraction is 0, which keeps nothing; give a share above 0")


def main(argv: list[str]) -> int:
    """Entry point of `mclip curate`; returns the exit code."""
    config = tyro.cli(CurateConfig, args=argv, prog="mclip curate", description=__doc__)
    report = curate(config)
    if config.json:
        sys.stdout.write(json.dumps({"out": config.out, **{name: report[name] for name in ("pairs_in", "pairs_kept", "dropped")}}) + "\n")
        return 0
    if report["unusable_samples"]:
        sys.stdout.write(f"{report['unusable_samples']} samples of the shards cannot be used at all; the first: {report['unusable'][0]['reason']}\n")
    width = max(len(step["rule"]) for step in report["rules"])
    for step in report["rules"]:
        reasons = ", ".join(f"{count} {why}" for why, count in step["why"].items())
        sys.stdout.write(f"{step['rule'].ljust(width)}  dropped {step['dropped']:>8}  left {step['left']:>8}{'  (' + reasons + ')' if reasons else ''}\n")
    sys.stdout.write(f"{config.out}: keeps {report['pairs_kept']} of {report['pairs_in']} pairs; {config.out}.json says which and why\n")
    return 0


def curate(config: CurateConfig) -> dict[str, Any]:
    """Apply the rules, write the keep-list and its report, and return the report.

    Raises:
        PairsError: the pairs cannot be read, every pair is dropped, or the output cannot be written.
        StoreError: the store is unsound, has no column `similarity`, or belongs to other pairs.
    """
    out = Path(config.out)
    if out.is_dir() or not out.parent.is_dir():
        raise PairsError(f"the keep-list '{out}' cannot be written: {'it is a folder' if out.is_dir() else f'there is no folder {out.parent}'}; give a file name")
    pairs, shards = local_pairs(config.pairs, strict=False), _hashes(config.pairs)
    selection = Selection(pairs, local_store(config.store) if config.store is not None else None, shards, config)
    if config.within is not None:
        selection.begin_with(read_keep_list(config.within), config.within)
    apply_rules(selection)
    if not selection.alive.any():
        counts = ", ".join(f"{step['rule']} {step['dropped']}" for step in selection.steps if step["dropped"])
        raise PairsError(f"every one of the {len(pairs)} pairs was dropped ({counts}), and nothing was written; loosen the rules")
    settings = {name: value for name, value in dataclasses.asdict(config).items() if value is not None and name not in NO_SETTINGS}
    facts: dict[str, Any] = {
        "settings": settings,
        "inputs": {"pairs": _digest(shards)},
        "pairs_in": len(pairs), "pairs_kept": int(selection.alive.sum()), "dropped": {step["rule"]: step["dropped"] for step in selection.steps},
    }  # fmt: skip
    if selection.store is not None:
        facts["inputs"]["store"] = _digest([entry["sha256"] for entry in selection.store.index["parts"]])
    if config.within is not None:
        facts["inputs"]["within"] = file_sha256(config.within)
    if config.apart_from is not None:
        facts["inputs"]["apart_from"] = _digest(_hashes(config.apart_from))
    unusable = [dataclasses.asdict(sample) for sample in pairs.rejected]
    report = {"kind": "curation", "schema": 1, **facts, "unusable_samples": len(unusable), "unusable": unusable[:CAP], "rules": selection.steps}
    write_json(out.with_name(out.name + ".json"), report)
    write_keep_list(out, (key for key, alive in zip(pairs.keys, selection.alive, strict=True) if alive), facts)
    return report


def _hashes(address: str) -> dict[str, str]:
    """sha256 of every shard, by name."""
    return {place.name: file_sha256(fetch_shard(place)) for place in list_shards(address)}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
