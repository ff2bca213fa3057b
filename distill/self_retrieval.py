"""How well captions find their own picture: as text-to-image queries for the teachers, against labels that belong to other pictures.

    python -m distill.self_retrieval PAIRS --captions CAPTIONS --teachers CKPT [CKPT …] --out figures.json

What the teachers judge well is what their students learn from; but the teachers also chose the captions (they see the picture for a prefix
captioner, and `--best-of` keeps what they like), so that this figure says that captions fit, not that a person would agree. `label_share`
is the share of captions that are word for word the clean label, where the pairs know it; no captioner is told.

Shapes: G = pictures, D = sum of the teachers' dimensions.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tyro

from distill.caption_files import CaptionFile
from distill.captions import open_captions
from distill.ensemble import Teacher, encode_texts, open_teacher
from distill.progress import progress
from runtime.errors import ImageError, PairsError
from runtime.files import write_json
from runtime.metrics import bootstrap_interval, ranks, recall_at_k
from runtime.pairs import Pairs, open_pairs

PICTURES_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class SelfRetrievalConfig:
    """What is asked."""

    pairs: tyro.conf.Positional[str]
    """Pairs folder, better one that the captioner never saw."""
    captions: str
    """Their captions: a folder that mclip caption wrote, a .jsonl or a .parquet."""
    teachers: tuple[str, ...]
    """Checkpoint folders, open_clip:NAME[/PRETRAINED], or module:function."""
    seed: int = 0
    """Of the random labels and the bootstrap."""
    out: str = ""
    """File to write the figures to."""


def main(argv: list[str]) -> int:
    """Prints the figures, one object."""
    config = tyro.cli(SelfRetrievalConfig, args=argv, prog="python -m distill.self_retrieval", description=__doc__)
    figures = self_retrieval(open_pairs(config.pairs), open_captions(config.captions), [open_teacher(spec) for spec in config.teachers], config.seed)
    if config.out:
        write_json(config.out, figures)
    sys.stdout.write(json.dumps(figures, indent=1) + "\n")
    return 0


def self_retrieval(pairs: Pairs, captions: CaptionFile, teachers: Sequence[Teacher], seed: int = 0) -> dict[str, Any]:
    """Recall@1 and @5 of three kinds of queries among all G pictures that have captions and decode.

    Returns:
        "pictures"; "self_retrieval_recall1" and "…recall5" of each picture's first caption, with "…recall1_low" and "…high" (95 %, bootstrap over
        pictures); "own_label_recall1" and "…recall5" of the pairs' own captions;
        "random_label_recall1" and "…recall5" of the caption of another picture drawn at random; "captions_per_picture"; "different_captions";
        "label_share".

    Raises:
        PairsError: fewer than two pictures have captions.
    """
    rows = [row for row in range(len(pairs)) if captions.get(pairs.keys[row]) and pairs.has_caption(row)]
    gallery, rows = _pictures(pairs, rows, teachers)
    if len(rows) < 2:
        raise PairsError(f"{len(rows)} of the {len(pairs)} pairs of '{pairs.folder}' have captions in '{captions.path}'; expected at least two")
    made = [[caption.text for caption in captions.get(pairs.keys[row])] for row in rows]
    own = [pairs.caption(row) for row in rows]
    labels = [str(pairs.meta(row).get("label", own[n])) for n, row in enumerate(rows)]
    vector = _embedded(teachers, sorted({text for texts in (*made, own) for text in texts}))
    targets = np.arange(len(rows))

    def rank(texts: Sequence[str]) -> np.ndarray:
        return ranks(np.stack([vector(text) for text in texts]), gallery, targets)

    # A shift keeps every picture from its own label; labels that occur twice are nobody's fault.
    shuffled = np.random.default_rng(seed).permutation(len(rows))
    other = np.empty(len(rows), np.int64)
    other[shuffled] = np.roll(shuffled, 1)
    found = {"self_retrieval": rank([texts[0] for texts in made]), "own_label": rank(own), "random_label": rank([own[n] for n in other])}
    figures: dict[str, Any] = {"pictures": len(rows)}
    for name, places in found.items():
        figures |= {f"{name}_recall{k}": round(recall_at_k(places, k), 4) for k in (1, 5)}
    low, high = bootstrap_interval((found["self_retrieval"] == 1).astype(np.float64), 0.95, seed)
    return {
        **figures, "self_retrieval_recall1_low": round(low, 4), "self_retrieval_recall1_high": round(high, 4),
        "captions_per_picture": round(float(np.mean([len(texts) for texts in made])), 2), "different_captions": len({text for texts in made for text in texts}),
        "label_share": round(float(np.mean([_plain(texts[0]) == _plain(label) for texts, label in zip(made, labels, strict=True)])), 4),
    }  # fmt: skip


def _pictures(pairs: Pairs, rows: list[int], teachers: Sequence[Teacher]) -> tuple[np.ndarray, list[int]]:
    """(G, D) of the rows whose picture decodes, and these rows."""
    vectors, kept = [], []
    with progress("pictures", len(rows)) as advance:
        for start in range(0, len(rows), PICTURES_AT_ONCE):
            pictures = []
            for row in rows[start : start + PICTURES_AT_ONCE]:
                try:
                    pictures.append(pairs.image(row))
                    kept.append(row)
                except ImageError:
                    continue
            if pictures:
                vectors.append(np.concatenate([teacher.encode_image(pictures) for teacher in teachers], axis=1))
            advance(min(start + PICTURES_AT_ONCE, len(rows)), "embedded")
    return (np.concatenate(vectors) if vectors else np.zeros((0, 1), np.float32)), kept


def _embedded(teachers: Sequence[Teacher], texts: list[str]) -> Callable[[str], np.ndarray]:
    """The (D,) vector of each of these texts."""
    vectors = np.concatenate(encode_texts(teachers, texts), axis=1)
    place = {text: n for n, text in enumerate(texts)}
    return lambda text: vectors[place[text]]


def _plain(text: str) -> str:
    """Letters and digits alone: a byte-pair decoder sets spaces around marks."""
    return "".join(character for character in text.casefold() if character.isalnum())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
