"""What a worker of `mclip reinforce` does: load the teachers once, then embed chunks of texts and parts of shards.

Everything that could change a float is fixed by the task (which rows, in which order, how many at once), never by the worker.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

import numpy as np

from distill import augment
from distill.augment import AugmentSpec
from distill.captions import Caption
from distill.ensemble import encode_texts, encode_views, open_teacher
from distill.store import Part, TeacherFacts
from distill.store_writing import PartRows, unit, write_part, write_safetensors
from runtime.errors import ClipError, ImageError, MissingExtraError
from runtime.pairs import Pairs, open_pairs

PICTURES_AT_ONCE = 16
"""Pictures whose views lie in memory together; fixed, because teachers see them in this grouping."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextTask:
    """Embed these texts into this file."""

    path: str
    texts: list[str]
    metadata: dict[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class PartTask:
    """Embed these rows of a shard into this part. `texts` are numbers into the text files, one list per row, like `captions`."""

    path: str
    work: str
    rows: list[int]
    first: int
    count: int
    skipped: list[dict[str, str]]
    captions: list[list[Caption]]
    texts: list[list[int]]
    augmentations: int
    spec: AugmentSpec
    seed: int
    dtype: str
    tables: dict[str, list[str]]
    metadata: dict[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class PartDone:
    """A part's entry for the index, what it left out, and the processor seconds of each phase (empty for a part found done)."""

    entry: dict[str, Any]
    skipped: list[dict[str, str]]
    seconds: dict[str, float]


_STATE: dict[str, Any] = {}


def start_worker(teachers: tuple[str, ...], pairs: str) -> None:
    """Runs once in every worker. Teachers are loaded at the first task, where an error can be reported."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_leave_with, args=(parent.sentinel,), daemon=True).start()
    _STATE.update(specs=teachers, folder=pairs)


def _leave_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)  # the parent was killed: nobody waits for the answer


def _teachers() -> list[Any]:
    if "teachers" not in _STATE:
        try:
            _STATE["teachers"] = [open_teacher(spec) for spec in _STATE["specs"]]
            if "torch" in sys.modules:
                sys.modules["torch"].set_num_threads(1)
        except MissingExtraError as error:
            raise ClipError(str(error)) from None  # its constructor takes three arguments, so it cannot be pickled
    return _STATE["teachers"]


def _pairs() -> Pairs:
    if "pairs" not in _STATE:
        _STATE["pairs"] = open_pairs(_STATE["folder"])
    return _STATE["pairs"]


def describe_teachers() -> list[TeacherFacts]:
    """Facts of every teacher; equal names get a number, so that a store can tell them apart."""
    seen: Counter[str] = Counter()
    out = []
    for teacher in _teachers():
        fact = teacher.facts
        seen[fact.name] += 1
        out.append(fact if seen[fact.name] == 1 else TeacherFacts(**{**_fields(fact), "name": f"{fact.name}-{seen[fact.name]}"}))
    return out


def _fields(fact: TeacherFacts) -> dict[str, Any]:
    return {name: getattr(fact, name) for name in TeacherFacts.__dataclass_fields__}


def embed_texts(task: TextTask) -> float:
    """Write one safetensors file of float32 (n, D) per teacher, and return the processor seconds it took."""
    started = time.process_time()
    vectors = encode_texts(_teachers(), task.texts)
    write_safetensors(Path(task.path), {str(t): ("F32", vector.astype("<f4")) for t, vector in enumerate(vectors)}, task.metadata)
    return time.process_time() - started


def view_parameters(seed: int, key: str, view: int, spec: AugmentSpec, size: tuple[int, int]) -> bytes:
    """Parameters of one view: a function of seed, key and number alone. size: (height, width) of the picture."""
    digest = hashlib.sha256(key.encode()).digest()
    return augment.sample_parameters(np.random.default_rng([seed, view, *np.frombuffer(digest[:16], "<u4").tolist()]), spec, size)


def embed_part(task: PartTask) -> PartDone:
    """Decode, augment and embed the rows of a part, and write it."""
    teachers, pairs = _teachers(), _pairs()
    seconds: Counter[str] = Counter()
    skipped, kept = list(task.skipped), []
    packed: list[np.ndarray] = []
    vectors: list[list[np.ndarray]] = [[] for _ in teachers]
    sizes = sorted({teacher.image_size for teacher in teachers})
    for start in range(0, len(task.rows), PICTURES_AT_ONCE):
        views: dict[int, list[np.ndarray]] = {size: [] for size in sizes}
        for place in range(start, min(start + PICTURES_AT_ONCE, len(task.rows))):
            row, clock = task.rows[place], time.process_time()
            try:
                image = pairs.image(row)
            except ImageError as error:
                skipped.append({"key": pairs.keys[row], "shard": task.metadata["shard"], "reason": str(error)})
                continue
            finally:
                seconds["decode"] += time.process_time() - clock
            clock = time.process_time()
            drawn = [view_parameters(task.seed, pairs.keys[row], n, task.spec, (image.height, image.width)) for n in range(task.augmentations)]
            for size in sizes:
                views[size] += [np.asarray(augment.apply(image, parameters, size)) for parameters in drawn]
            packed.append(np.frombuffer(b"".join(drawn), np.uint8).reshape(task.augmentations, augment.PACKED_BYTES))
            kept.append(place)
            seconds["augment"] += time.process_time() - clock
        if not views[sizes[0]]:
            continue
        clock = time.process_time()
        for t, found in enumerate(encode_views(teachers, {size: np.stack(made) for size, made in views.items()})):
            vectors[t].append(found.reshape(-1, task.augmentations, found.shape[1]))
        seconds["teachers"] += time.process_time() - clock
    clock = time.process_time()
    entry = _write(task, kept, packed, vectors, skipped, [teacher.facts.dim for teacher in teachers], pairs)
    seconds["write"] += time.process_time() - clock
    return PartDone(entry=entry, skipped=skipped, seconds=dict(seconds))


def _write(
    task: PartTask, kept: list[int], packed: list[np.ndarray], vectors: list[list[np.ndarray]], skipped: list[dict[str, str]], dims: list[int], pairs: Pairs
) -> dict[str, Any]:
    captions = [task.captions[place] for place in kept]
    width = max((len(made) for made in captions), default=0)
    images = [np.concatenate(found) if found else np.zeros((0, task.augmentations, dim), np.float32) for found, dim in zip(vectors, dims, strict=True)]
    texts = [_gather_texts(task, kept, width, t, dim) for t, dim in enumerate(dims)]
    similarity = np.zeros(len(kept), np.float32)
    for image, text in zip(images, texts, strict=True):
        if len(kept):
            similarity += (unit(image.mean(axis=1)) * text[:, 0]).sum(axis=1, dtype=np.float32) / len(dims)
    rows = PartRows(
        keys=[pairs.keys[task.rows[place]] for place in kept], pair_rows=[task.rows[place] for place in kept], captions=captions,
        augmentations=np.stack(packed) if packed else np.zeros((0, task.augmentations, augment.PACKED_BYTES), np.uint8),
        image_embeddings=images, text_embeddings=texts, columns={"similarity": similarity},
    )  # fmt: skip
    metadata = {**task.metadata, "skipped": json.dumps(skipped)}
    return write_part(Path(task.path), rows, dtype=task.dtype, tables=task.tables, metadata=metadata)


def _gather_texts(task: PartTask, kept: list[int], width: int, teacher: int, dim: int) -> np.ndarray:
    """(n, C, D) float32 from the text files; rows with fewer captions are padded with zeros."""
    out = np.zeros((len(kept), width, dim), np.float32)
    for row, place in enumerate(kept):
        for j, number in enumerate(task.texts[place]):
            file, local = divmod(number, TEXTS_PER_FILE)
            out[row, j] = _text_file(task.work, file).get(str(teacher))[local]
    return out


TEXTS_PER_FILE = 128
"""Texts a file of the work folder."""


def text_path(work: Path, number: int) -> Path:
    """Where the texts number*TEXTS_PER_FILE and on are kept."""
    return work / f"texts-{number:06d}.safetensors"


def _text_file(work: str, number: int) -> Part:
    key = ("texts", work, number)
    if key not in _STATE:
        _STATE[key] = Part(text_path(Path(work), number))
    return _STATE[key]
