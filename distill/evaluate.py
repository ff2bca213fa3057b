"""Retrieval and zero-shot figures of a checkpoint (torch) or a bundle (the runtime), by the same code and on the same pairs.

    mclip eval CKPT --data PAIRS/test
    mclip eval BUNDLE --data PAIRS/test --task zero-shot --json
    mclip eval --compare A B --data PAIRS/test            which is better (distill/comparison.py)
    mclip eval --query STUDENT --gallery TEACHER TEACHER --data PAIRS/test          texts by one, pictures by the other (distill/asymmetric.py)
    mclip eval CKPT --data IMAGENET --task zero-shot      class folders, or a webdataset of CLIP_benchmark (distill/evaluation_sets.py)
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro

from distill.evaluation_sets import classify, is_class_folder, is_webdataset, open_captioned, open_labelled, retrieve
from distill.languages import read_texts
from mobileclip.checkpoint import load_checkpoint, open_tokenizer, preprocess_config
from mobileclip.model import ImageTextModel
from runtime.errors import CheckpointError, PairsError, RecipeError
from runtime.evaluation import Encoder, Gallery, embed_gallery, retrieval, zero_shot
from runtime.metrics import ranks, recall_at_k
from runtime.pairs import Pairs, open_pairs
from runtime.preprocess import PreprocessConfig, preprocess
from runtime.tokenizer import Tokenizer

BATCH = 64


class TorchEncoder:
    """A checkpoint's model as an encoder of pictures and texts: float32 (B, D), unit norm."""

    def __init__(self, model: ImageTextModel, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.config: PreprocessConfig = preprocess_config(model.config)

    @torch.inference_mode()
    def encode_pixels(self, pixels: np.ndarray) -> np.ndarray:
        """float32 (B, 3, S, S), normalised -> (B, D)."""
        parts = [self.model.encode_image(torch.from_numpy(pixels[n : n + BATCH])).numpy() for n in range(0, len(pixels), BATCH)]
        return np.concatenate(parts) if parts else np.zeros((0, self.model.config.embed_dim), np.float32)

    def encode_image(self, images: Sequence[Any]) -> np.ndarray:
        return self.encode_pixels(preprocess(list(images), self.config))

    @torch.inference_mode()
    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        tokens = self.tokenizer(list(texts))
        parts = [self.model.encode_text(torch.from_numpy(tokens[n : n + BATCH])).numpy() for n in range(0, len(tokens), BATCH)]
        return np.concatenate(parts) if parts else np.zeros((0, self.model.config.embed_dim), np.float32)


class EnsembleEncoder:
    """Several encoders as one: the concatenation of their unit vectors, so that similarities are the members' mean."""

    def __init__(self, members: Sequence[Encoder]) -> None:
        self.members = list(members)

    def encode_image(self, images: Sequence[Any]) -> np.ndarray:
        return np.concatenate([member.encode_image(list(images)) for member in self.members], axis=1) / len(self.members) ** 0.5

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        return np.concatenate([member.encode_text(list(texts)) for member in self.members], axis=1) / len(self.members) ** 0.5


class Cut:
    """The first `dim` coordinates of an encoder's embeddings, brought to unit norm: what a model with nested dimensions offers (Matryoshka).

    Raises:
        RecipeError: at the first use, where the embeddings are shorter.
    """

    def __init__(self, encoder: Encoder, dim: int) -> None:
        self.encoder, self.dim = encoder, dim

    def encode_image(self, images: list[Any]) -> np.ndarray:
        return self._cut(self.encoder.encode_image(images))

    def encode_text(self, texts: list[str]) -> np.ndarray:
        return self._cut(self.encoder.encode_text(texts))

    def _cut(self, embeddings: np.ndarray) -> np.ndarray:
        if not 1 <= self.dim <= embeddings.shape[1]:
            raise RecipeError(f"--dim is {self.dim}, and the embeddings have {embeddings.shape[1]} dimensions; choose 1 to {embeddings.shape[1]}")
        cut = embeddings[:, : self.dim]
        return cut / np.maximum(np.linalg.norm(cut, axis=1, keepdims=True), 1e-12)


def open_encoder(path: str | os.PathLike[str], threads: int | None = None) -> Encoder:
    """A checkpoint folder or a bundle folder as an encoder.

    Raises:
        CheckpointError: the folder is neither.
        BundleError: it is a bundle, but not a sound one.
    """
    folder = Path(path)
    if (folder / "manifest.json").is_file():
        import runtime

        return runtime.load(folder, threads=threads)
    if (folder / "config.json").is_file():
        return TorchEncoder(load_checkpoint(folder), open_tokenizer(folder))
    raise CheckpointError(f"'{path}' is neither a checkpoint (config.json) nor a bundle (manifest.json); give a folder that mclip train or mclip export wrote")


@lru_cache(maxsize=4)
def _quick_set(pairs_folder: str, config: PreprocessConfig) -> tuple[np.ndarray, list[str], list[dict[str, Any]]]:
    pairs: Pairs = open_pairs(pairs_folder)
    rows = range(len(pairs))
    pixels = np.concatenate([preprocess([pairs.image(row)], config) for row in rows])
    return pixels, [pairs.caption(row) for row in rows], [pairs.meta(row) for row in rows]


def quick_recall(model: ImageTextModel, pairs_folder: str, tokenizer_folder: str | os.PathLike[str]) -> dict[str, float]:
    """Text-to-image recall@5 and @1 without intervals, for a look while training; pixels are prepared once a process.

    Where the pairs say which concepts were held out, these and the trained ones of the main slice stand apart.
    """
    encoder = TorchEncoder(model, _tokenizer(str(tokenizer_folder), model.config.text.context_length))
    pixels, captions, meta = _quick_set(str(pairs_folder), encoder.config)
    gallery, queries = encoder.encode_pixels(pixels), encoder.encode_text(captions)
    right = ranks(queries, gallery, [[n for n in same] for same in _same(captions)])
    splits: dict[str, list[int]] = {"all": list(range(len(captions)))}
    for row, facts in enumerate(meta):
        if facts.get("slice") == "main" and "held_out" in facts:
            splits.setdefault("held_out" if facts["held_out"] else "trained", []).append(row)
    return {f"recall@{k}_{name}": round(float(recall_at_k(right[rows], k)), 4) for name, rows in splits.items() for k in (1, 5)}


def _same(captions: list[str]) -> list[list[int]]:
    places: dict[str, list[int]] = {}
    for row, caption in enumerate(captions):
        places.setdefault(caption, []).append(row)
    return [places[caption] for caption in captions]


@lru_cache(maxsize=4)
def _tokenizer(folder: str, context_length: int) -> Tokenizer:
    return Tokenizer.open(Path(folder) / "tokenizer.json", context_length=context_length, cleaning="clip", pad_id=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """What to evaluate."""

    model: tyro.conf.Positional[str] = ""
    """Checkpoint or bundle folder."""
    data: str
    """Pairs folder."""
    compare: tuple[str, str] | None = None
    """Two checkpoints or bundles, or folders of several seeds of each: says whether the second is better, worse, or not significantly different."""
    query: str | None = None
    """Checkpoint or bundle that embeds the texts, for search in a gallery that another model embedded."""
    gallery: tuple[str, ...] = ()
    """Checkpoint or bundle that embeds the pictures; several: the teachers that the query's student followed, in their order."""
    split: str = "test"
    """Of a CLIP_benchmark webdataset."""
    classnames: str | None = None
    """File of class names, one a line, instead of the data's own."""
    templates: str | None = None
    """File of prompt templates, one a line with {} or {c}, instead of the data's own."""
    splits: tuple[str, ...] = ()
    """Splits of the pairs to compare on; empty: all that there are."""
    k: int = 5
    """Of the recall that is compared."""
    direction: Literal["text_to_image", "image_to_text"] = "text_to_image"
    """What is compared."""
    labels: str | None = None
    """File of texts by concept (.jsonl with "concept" and "label"), for instance in another language, that ask instead of the samples' own."""
    dim: int | None = None
    """Use the first so many dimensions of the embeddings only."""
    task: Literal["retrieval", "zero-shot"] = "retrieval"
    seed: int = 0
    """Of the bootstrap."""
    threads: int = 2
    json: bool = False
    """Print one JSON object."""


def main(argv: list[str]) -> int:
    """`mclip eval CKPT|BUNDLE --data PAIRS`."""
    config = tyro.cli(EvalConfig, args=argv, prog="mclip eval", description=__doc__)
    torch.set_num_threads(config.threads)
    asked = [bool(config.model), config.compare is not None, config.query is not None or bool(config.gallery)]
    if sum(asked) != 1:
        raise RecipeError("mclip eval takes one model, or --compare A B, or --query A --gallery B; give one of the three")
    if asked[2]:
        return _asymmetric(config)
    if config.compare is not None:
        from distill.comparison import compare_sides, format_comparison

        compared = compare_sides(
            config.compare, open_pairs(config.data), k=config.k, direction=config.direction, splits=config.splits, seed=config.seed, threads=config.threads
        )
        said = json.dumps({"compare": list(config.compare), **compared}) + "\n" if config.json else format_comparison(compared, config.compare)
        sys.stdout.write(said)
        return 0
    if is_webdataset(Path(config.data), config.split) or is_class_folder(Path(config.data)):
        return _foreign_set(config)
    if config.classnames is not None or config.templates is not None:
        raise RecipeError(f"--classnames and --templates are for class folders and CLIP_benchmark sets, and '{config.data}' is neither; leave them out")
    encoder, pairs = _encoder(config), open_pairs(config.data)
    gallery = embed_gallery(encoder, pairs)
    if config.labels is not None:
        gallery = asked_in(gallery, read_texts(config.labels), config.labels)
    result = retrieval(encoder, pairs, seed=config.seed, gallery=gallery) if config.task == "retrieval" else zero_shot(encoder, pairs, gallery=gallery)
    if config.json:
        sys.stdout.write(json.dumps({"model": config.model, "config": dataclasses.asdict(config), **result}) + "\n")
    elif config.task == "retrieval":
        sys.stdout.write(format_retrieval(result))
    else:
        sys.stdout.write(json.dumps({key: value for key, value in result.items() if not isinstance(value, list)}, indent=1) + "\n")
    return 0


def asked_in(gallery: Gallery, texts: Mapping[str, str], name: str) -> Gallery:
    """The gallery, asked with other texts: concept to text.

    Raises:
        PairsError: a concept of the gallery has none.
    """
    missing = [group for group in gallery.groups if group not in texts]
    if missing:
        raise PairsError(f"'{name}' has no text for {len(set(missing))} of the pairs' concepts, the first is '{missing[0]}'; give texts of these concepts")
    return dataclasses.replace(gallery, texts=[texts[group] for group in gallery.groups])


def _encoder(config: EvalConfig) -> Encoder:
    encoder = open_encoder(config.model, config.threads)
    return encoder if config.dim is None else Cut(encoder, config.dim)


def _asymmetric(config: EvalConfig) -> int:
    from distill.asymmetric import format_matrix, matrix

    if config.query is None or not config.gallery:
        raise RecipeError("--query and --gallery belong together: who embeds the texts, and who the pictures")
    result = matrix((config.query,), config.gallery, open_pairs(config.data), k=config.k, seed=config.seed, threads=config.threads)
    facts = {"query": config.query, "gallery": list(config.gallery), **result}
    sys.stdout.write(json.dumps(facts) + "\n" if config.json else format_matrix(result, (config.query,), config.gallery))
    return 0


def _foreign_set(config: EvalConfig) -> int:
    """Class folders and CLIP_benchmark's webdatasets."""
    folder, encoder = Path(config.data), _encoder(config)
    if config.task == "retrieval":
        if not is_webdataset(folder, config.split):
            raise RecipeError(f"'{folder}' holds class folders, which have no captions to retrieve by; use --task zero-shot")
        result = retrieve(encoder, open_captioned(folder, config.split), seed=config.seed)
        lines = [f"{result['pictures']} pictures, {result['captions']} captions"]
        for direction in ("text_to_image", "image_to_text"):
            lines.append(f"{direction:14} " + "  ".join(f"{name} {row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]" for name, row in result[direction].items()))
    else:
        names, templates = (Path(given) if given is not None else None for given in (config.classnames, config.templates))
        result = classify(encoder, open_labelled(folder, config.split, names, templates), seed=config.seed)
        top = "  ".join(f"{name} {result[name]['value']:.3f} [{result[name]['low']:.3f}, {result[name]['high']:.3f}]" for name in ("accuracy@1", "accuracy@5"))
        lines = [f"{result['n']} pictures of {result['classes']} classes, {len(result['templates'])} templates", f"{top}  mean per class {result['mean_per_class']:.3f}"]
        lines.append(f"always the largest class: {result['majority']:.3f}")
    if result["skipped"]:
        lines.append(f"{len(result['skipped'])} pictures did not decode and are left out, the first is {result['skipped'][0]}")
    sys.stdout.write(json.dumps({"model": config.model, "config": dataclasses.asdict(config), **result}) + "\n" if config.json else "\n".join(lines) + "\n")
    return 0


def format_retrieval(result: dict[str, Any]) -> str:
    """The recalls of `runtime.evaluation.retrieval` as lines of text."""
    lines = [f"gallery: {result['gallery']['count']} pictures, sha256 {result['gallery']['sha256'][:16]}"]
    for direction in ("text_to_image", "image_to_text"):
        for split, row in result[direction].items():
            cells = [f"{name} {row[name]['value']:.3f} [{row[name]['low']:.3f}, {row[name]['high']:.3f}]" for name in row if name.startswith("recall@")]
            lines.append(f"{direction:14} {split:9} n {row['n']:5}  " + "  ".join(cells))
    return "\n".join(lines) + "\n"


