"""Classes to tell pictures apart by: a table of names and embeddings, made from texts, from a few photographs, or both; nothing is trained.

    table = clip.classes(["cat", "dog"], templates=["a photo of a {}", "a drawing of a {}"])
    table = table.add("my mug", images=["mug1.jpg", "mug2.jpg", "mug3.jpg"])
    table.best(["somewhere.jpg"])                     # [("my mug", 0.93)]
    table.save("kitchen.classes")                     # later: runtime.ClassTable.open("kitchen.classes", clip)

A table that is stored in a bundle needs no text tower there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from runtime.bundle_files import read_file
from runtime.errors import BundleError
from runtime.files import write_whole

if TYPE_CHECKING:
    from runtime.encoder import Clip
    from runtime.preprocess import ImageSource

SCHEMA = "1"
PHOTOS = 2.0
"""Photographs count as much as the texts when there are this many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassTable:
    """Names and embeddings, row by row. Adding gives a new table.

    Attributes:
        names: C of them, each once.
        vectors: float32 (C, D), unit norm.
    """

    clip: Clip
    names: tuple[str, ...]
    vectors: np.ndarray

    def add(self, name: str, *, texts: Sequence[str] = (), images: Sequence[ImageSource] = ()) -> ClassTable:
        """A table with one class more, or with this one made anew.

        Args:
            texts: that name it. images: that show it, three will do; the bundle's score calibration says what they are worth as texts.

        Raises:
            ValueError: neither texts nor images.
            BundleError: images, but the bundle carries no score calibration; texts, but it has no text tower.
        """
        if isinstance(texts, str):
            texts = [texts]
        if not len(texts) and not len(images):
            raise ValueError(f"the class '{name}' needs texts or images")
        vector = np.zeros(self.clip.embed_dim, np.float32)
        if len(texts):
            vector += _mean(self.clip.encode_text(texts))
        if len(images):
            from runtime.matching import read_calibration

            shown = read_calibration(self.clip).as_text(self.clip.encode_image(list(images)))
            vector = (PHOTOS * vector + len(images) * shown) / (PHOTOS + len(images)) if len(texts) else shown
        vector = _mean(vector[None])
        rest = [n for n, other in enumerate(self.names) if other != name]
        return replace(self, names=(*(self.names[n] for n in rest), name), vectors=np.concatenate([self.vectors[rest], vector[None]]))

    def probabilities(self, images: Sequence[ImageSource] | ImageSource) -> np.ndarray:
        """float32 (B, C): as `Clip.classify`, softmax over the classes or the sigmoid of each, by the model's loss."""
        from runtime.encoder import probabilities

        manifest = self.clip.manifest
        return probabilities(self.clip.encode_image(images) @ self.vectors.T, manifest.loss, manifest.logit_scale, manifest.logit_bias)

    def match(self, images: Sequence[ImageSource] | ImageSource) -> np.ndarray:
        """float32 (B, C): how probable each class is for itself; low for all: none of them (`Clip.match`)."""
        from runtime.matching import read_calibration

        return read_calibration(self.clip).probability(self.clip.encode_image(images), self.vectors)

    def best(self, images: Sequence[ImageSource] | ImageSource, least: float = 0.0) -> list[tuple[str | None, float]]:
        """The most probable class of each picture and its probability; None for the name where `match` gives no class at least `least`."""
        found = self.probabilities(images)
        sure = self.match(images).max(axis=1) >= least if least > 0 else np.ones(len(found), bool)
        return [(self.names[row.argmax()] if good else None, float(row.max())) for row, good in zip(found, sure, strict=True)]

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the table as safetensors, whole or not at all."""
        from safetensors.numpy import save

        facts = {"schema": SCHEMA, "names": json.dumps(self.names, ensure_ascii=False), "model": model_identity(self.clip)}
        return write_whole(path, save({"vectors": np.ascontiguousarray(self.vectors, np.float32)}, metadata=facts))

    @classmethod
    def open(cls, path: str | os.PathLike[str], clip: Clip) -> ClassTable:
        """A table that was saved.

        Raises:
            BundleError: missing, damaged, or made with another model.
        """
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise BundleError(f"{path}: the class table cannot be read ({error.strerror or error}); make it again") from error
        return from_bytes(data, str(path), clip)


def from_bytes(data: bytes, name: str, clip: Clip) -> ClassTable:
    """The table in these bytes; `name` serves messages. Raises BundleError."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        size = int.from_bytes(data[:8], "little")
        facts = json.loads(data[8 : 8 + size])["__metadata__"]
        vectors, names, model = load(data)["vectors"], [str(item) for item in json.loads(facts["names"])], str(facts["model"])
    except (ValueError, KeyError, TypeError, SafetensorError, RecursionError) as error:
        raise BundleError(f"{name}: not a class table ({type(error).__name__}); expected what ClassTable.save writes") from error
    if model != model_identity(clip):
        raise BundleError(f"{name} was made with another model than '{clip.manifest.name}'; its embeddings mean nothing here: make it again with this bundle")
    if vectors.shape != (len(names), clip.embed_dim) or vectors.dtype != np.float32 or len(set(names)) != len(names) or not np.isfinite(vectors).all():
        raise BundleError(f"{name}: has {len(names)} names and vectors {vectors.dtype} {vectors.shape}, expected as many rows of {clip.embed_dim} finite values")
    return ClassTable(clip=clip, names=tuple(names), vectors=vectors)


def make_table(clip: Clip, names: Sequence[str] | Mapping[str, Sequence[str]], templates: Sequence[str] = ("{}",)) -> ClassTable:
    """See `Clip.classes`. Raises ValueError for no names, a name twice, or a template without {}."""
    if isinstance(names, str) or not len(names):
        raise ValueError("names must be a list of at least one class name, or a dict of names to texts")
    if not templates or not all("{}" in template for template in templates):
        raise ValueError(f"templates are {list(templates)}, each needs {{}} where the name goes")
    if len(set(names)) != len(names):
        raise ValueError("a class name comes twice")
    texts = {name: list(names[name]) if isinstance(names, Mapping) else [name] for name in names}
    filled = {name: [template.replace("{}", text) for text in own for template in templates] for name, own in texts.items()}
    if not all(filled.values()):
        raise ValueError("a class has no texts")
    rows = clip.encode_text([text for own in filled.values() for text in own])
    ends = np.cumsum([len(own) for own in filled.values()])
    return ClassTable(clip=clip, names=tuple(filled), vectors=np.stack([_mean(part) for part in np.split(rows, ends[:-1])]))


def stored_table(clip: Clip, name: str | None = None) -> ClassTable:
    """A table that travels with the bundle.

    Args:
        name: None: the only one.

    Raises:
        BundleError: no such table, or a damaged one.
    """
    entries = {str(entry.get("name")): str(entry.get("path")) for entry in clip.manifest.classes if isinstance(entry, dict)}
    if name is None and len(entries) == 1:
        name = next(iter(entries))
    if name is None or name not in entries:
        raise BundleError(f"the bundle '{clip.manifest.name}' has {'no class table' if not entries else 'the class tables ' + ', '.join(entries)}; name one of them")
    return from_bytes(read_file(clip.folder, clip.manifest, entries[name]), entries[name], clip)


def model_identity(clip: Clip) -> str:
    """What says that two bundles hold the same model: the hash of the checkpoint they were made from, else the name."""
    return str(clip.manifest.provenance.get("checkpoint_sha256") or f"{clip.manifest.name} of {clip.embed_dim} values")


def _mean(rows: np.ndarray) -> np.ndarray:
    """(n, D) -> float32 (D,), unit norm."""
    mean = rows.astype(np.float64).mean(axis=0)
    return (mean / max(float(np.linalg.norm(mean)), 1e-12)).astype(np.float32)
