"""Pictures to evaluate on that are no pairs folder of ours: a folder of class folders, and CLIP_benchmark's webdatasets.

    DATA/<class>/*.jpg                                   a folder a class; its name is the class's, "_" read as a space
    DATA/classnames.txt                                  class names instead, in the order of the sorted folder names
    DATA/test/nshards.txt, DATA/test/0.tar, 1.tar, …     CLIP_benchmark: KEY.jpg|png|webp with KEY.cls (a number), or with KEY.txt (a caption a line)
    DATA/classnames.txt, DATA/zeroshot_classification_templates.txt, DATA/dataset_type.txt

Templates are one a line and hold "{}" or "{c}" where the class's name goes.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from runtime.errors import ImageError, PairsError
from runtime.evaluation import Encoder, class_vector, interval
from runtime.metrics import ranks
from runtime.pairs import decode_image

TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "an image of a {}.")
"""Where a data set brings none."""
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
_BATCH = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Labelled:
    """Pictures with classes.

    classes: their names; templates: each with "{}"; names, labels: of every picture; read: number of a picture -> its bytes.
    """

    classes: tuple[str, ...]
    templates: tuple[str, ...]
    names: list[str]
    labels: np.ndarray
    """(N,) int64."""
    read: Callable[[int], bytes]


@dataclass(frozen=True, kw_only=True, slots=True)
class Captioned:
    """Pictures with one or more captions each."""

    names: list[str]
    captions: list[list[str]]
    read: Callable[[int], bytes]


def is_webdataset(folder: Path, split: str = "test") -> bool:
    """Whether a folder is laid out as CLIP_benchmark's are."""
    return (folder / split / "nshards.txt").is_file()


def is_class_folder(folder: Path) -> bool:
    """Whether a folder holds folders with pictures in them, and no shards."""
    return folder.is_dir() and not any(folder.glob("*.tar")) and any(_pictures(inner) for inner in _inner(folder))


def open_labelled(folder: Path, split: str = "test", classnames: Path | None = None, templates: Path | None = None) -> Labelled:
    """A class folder or a CLIP_benchmark classification set.

    Args:
        classnames, templates: files that are read instead of the set's own.

    Raises:
        PairsError: it is neither; a label without a class; names and folders that do not agree; a template without a place for the name.
    """
    return _labelled_tars(folder, split, classnames, templates) if is_webdataset(folder, split) else _labelled_folders(folder, classnames, templates)


def _labelled_folders(folder: Path, classnames: Path | None, templates: Path | None) -> Labelled:
    folders = [inner for inner in _inner(folder) if _pictures(inner)]
    if len(folders) < 2:
        raise PairsError(f"'{folder}' has {len(folders)} folders with pictures ({', '.join(EXTENSIONS)}); expected one for each of at least two classes")
    given = classnames or folder / "classnames.txt"
    names = read_lines(given) if given.is_file() or classnames is not None else [inner.name.replace("_", " ") for inner in folders]
    if len(names) != len(folders):
        raise PairsError(f"'{given}' names {len(names)} classes and '{folder}' has {len(folders)} class folders; give one name for each, in the order of the sorted folder names")
    paths = [(path, n) for n, inner in enumerate(folders) for path in _pictures(inner)]
    return Labelled(
        classes=tuple(names), templates=_templates(folder, templates), names=[str(path.relative_to(folder)) for path, _ in paths],
        labels=np.array([n for _, n in paths]), read=lambda n: paths[n][0].read_bytes(),
    )  # fmt: skip


def _labelled_tars(folder: Path, split: str, classnames: Path | None, templates: Path | None) -> Labelled:
    if (folder / "dataset_type.txt").is_file() and (kind := (folder / "dataset_type.txt").read_text(encoding="utf-8").strip()) not in ("classification", ""):
        raise PairsError(f"'{folder}' is a {kind} set (dataset_type.txt), not one of classes; use --task retrieval for a retrieval set")
    given = classnames or folder / "classnames.txt"
    names = read_lines(given)
    samples = _samples(folder / split, "cls")
    labels = []
    for name, _, value in samples:
        text = value.decode("utf-8", "replace").strip()
        if not text.isdigit() or int(text) >= len(names):
            raise PairsError(f"'{name}.cls' of '{folder / split}' holds {text[:20]!r}; expected the number of one of the {len(names)} classes of '{given}', from 0 on")
        labels.append(int(text))
    return Labelled(
        classes=tuple(names), templates=_templates(folder, templates), names=[name for name, _, _ in samples], labels=np.array(labels), read=lambda n: _bytes(*samples[n][1])
    )


def open_captioned(folder: Path, split: str = "test") -> Captioned:
    """A CLIP_benchmark retrieval set: a caption a line.

    Raises:
        PairsError: it is none, or a picture has no caption.
    """
    samples = _samples(folder / split, "txt")
    captions = [[line.strip() for line in value.decode("utf-8", "replace").splitlines() if line.strip()] for _, _, value in samples]
    for (name, _, _), found in zip(samples, captions, strict=True):
        if not found:
            raise PairsError(f"'{name}' of '{folder / split}' has no caption; drop the sample")
    return Captioned(names=[name for name, _, _ in samples], captions=captions, read=lambda n: _bytes(*samples[n][1]))


Place = tuple[Path, int, int]
"""A file, and where in it a picture begins and how long it is."""


def _samples(folder: Path, extension: str) -> list[tuple[str, Place, bytes]]:
    """(key, place of its picture, content of KEY.extension) of every sample of a split, in order of shards."""
    try:
        count = int((folder / "nshards.txt").read_text(encoding="utf-8").strip())
    except (OSError, ValueError) as error:
        raise PairsError(f"'{folder / 'nshards.txt'}' cannot be read ({error}); expected the number of shards, as clip_benchmark_export_wds writes it") from None
    found = []
    for number in range(count):
        path = folder / f"{number}.tar"
        pictures: dict[str, Place] = {}
        others: dict[str, bytes] = {}
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    key, _, kind = member.name.rpartition("/")[2].partition(".")
                    if member.isreg() and f".{kind.lower()}" in EXTENSIONS:
                        pictures[key] = (path, member.offset_data, member.size)
                    elif member.isreg() and kind == extension:
                        file = archive.extractfile(member)
                        others[key] = file.read() if file is not None else b""
        except (OSError, tarfile.TarError) as error:
            raise PairsError(f"shard '{path}' cannot be read ({error}); nshards.txt promises {count} uncompressed shards, 0.tar to {count - 1}.tar") from None
        if missing := sorted(pictures.keys() - others.keys()):
            other = "retrieval" if extension == "cls" else "classification"
            raise PairsError(f"'{missing[0]}' of '{path}' and {len(missing) - 1} more have no .{extension}; this is a set for {other}")
        found += [(key, place, others[key]) for key, place in pictures.items()]
    if not found:
        raise PairsError(f"the shards of '{folder}' hold no pictures; expected members like 0.jpg and 0.{extension}")
    return found


def _bytes(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def _inner(folder: Path) -> list[Path]:
    return sorted(inner for inner in folder.iterdir() if inner.is_dir()) if folder.is_dir() else []


def _pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS)


def read_lines(path: Path) -> list[str]:
    """Class names or templates, one a line; PairsError where there are none."""
    try:
        found = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise PairsError(f"'{path}' cannot be read ({error}); expected one class name or template a line, UTF-8") from None
    if not found:
        raise PairsError(f"'{path}' is empty; expected one class name or template a line")
    return found


def _templates(folder: Path, given: Path | None) -> tuple[str, ...]:
    path = given or folder / "zeroshot_classification_templates.txt"
    return TEMPLATES if given is None and not path.is_file() else read_templates(path)


def read_templates(path: Path) -> tuple[str, ...]:
    """Prompt templates, one a line, the place of the class's name as {}; PairsError for one without."""
    found = [line.replace("{c}", "{}") for line in read_lines(path)]
    if bad := [line for line in found if line.count("{}") != 1]:
        raise PairsError(f"the template {bad[0]!r} of '{path}' has no place for the class's name; expected one {{}} or {{c}} in each")
    return tuple(found)


# ---------------------------------------------------------------- figures


def classify(encoder: Encoder, data: Labelled, seed: int = 0) -> dict[str, Any]:
    """Zero-shot accuracy: a class's vector is the mean of its unit prompt embeddings, a picture belongs to the classes of the greatest cosines.

    Returns:
        JSON-ready {"n", "classes", "templates", "accuracy@1", "accuracy@5": {"value", "low", "high"}, "mean_per_class", "majority", "skipped",
        "ranks": [of every picture's class]}. Ties count against the encoder.
    """
    vectors = np.stack([class_vector(encoder, name, data.templates) for name in data.classes])
    pictures, kept, skipped = _embed(encoder, data.read, data.names)
    labels = data.labels[kept]
    found = ranks(pictures, vectors, labels)
    per_class = [float((found[labels == label] == 1).mean()) for label in np.unique(labels)]
    return {
        "n": len(kept), "classes": len(data.classes), "templates": list(data.templates), "accuracy@1": interval(found <= 1, seed), "accuracy@5": interval(found <= 5, seed),
        "mean_per_class": float(np.mean(per_class)), "majority": float(np.bincount(labels).max() / len(labels)), "skipped": skipped, "ranks": found.tolist(),
    }  # fmt: skip


def retrieve(encoder: Encoder, data: Captioned, ks: Sequence[int] = (1, 5, 10), seed: int = 0) -> dict[str, Any]:
    """Recall@k where a picture has several captions: each caption asks for its picture, and a picture is found when any of its captions is (as
    CLIP_benchmark counts).

    Returns:
        JSON-ready {"pictures", "captions", "text_to_image", "image_to_text": {"recall@K": {"value", "low", "high"}}, "skipped"}.
    """
    pictures, kept, skipped = _embed(encoder, data.read, data.names)
    texts = [caption for n in kept for caption in data.captions[n]]
    owner = np.array([place for place, n in enumerate(kept) for _ in data.captions[n]])
    embedded = np.concatenate([np.asarray(encoder.encode_text(texts[n : n + 256])) for n in range(0, len(texts), 256)])
    to_image, to_text = ranks(embedded, pictures, owner), ranks(pictures, embedded, [np.flatnonzero(owner == place) for place in range(len(kept))])
    return {
        "pictures": len(kept), "captions": len(texts), "skipped": skipped,
        "text_to_image": {f"recall@{k}": interval(to_image <= k, seed) for k in ks}, "image_to_text": {f"recall@{k}": interval(to_text <= k, seed) for k in ks},
    }  # fmt: skip


def _embed(encoder: Encoder, read: Callable[[int], bytes], names: Sequence[str]) -> tuple[np.ndarray, list[int], list[str]]:
    """(embeddings of the pictures that decode, their numbers, names of the others)."""
    parts, kept, skipped = [], list[int](), list[str]()
    for numbers, pictures in _batches(read, names, skipped):
        parts.append(np.asarray(encoder.encode_image(pictures), np.float64))
        kept += numbers
    if not kept:
        raise ImageError(f"none of the {len(names)} pictures decodes; check the files, the first is '{names[0]}'")
    return np.concatenate(parts), kept, skipped


def _batches(read: Callable[[int], bytes], names: Sequence[str], skipped: list[str]) -> Iterator[tuple[list[int], list[Image.Image]]]:
    numbers: list[int] = []
    pictures: list[Image.Image] = []
    for n, name in enumerate(names):
        try:
            pictures.append(decode_image(read(n)))
            numbers.append(n)
        except Exception:  # Pillow's plugins raise nearly anything on damaged bytes
            skipped.append(name)
        if len(pictures) == _BATCH:
            yield numbers, pictures
            numbers, pictures = [], []
    if pictures:
        yield numbers, pictures
