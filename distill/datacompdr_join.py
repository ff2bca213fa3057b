"""What a worker of `mclip import-datacompdr` does: look up the uids of one pairs shard, and write the parts of a store.

Everything that decides the bytes of a part is in its task; a worker only remembers what it has open.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from distill.augment import PACKED_BYTES
from distill.captions import Caption, captions_of
from distill.datacompdr_index import Reinforcements, digests, save_array
from distill.datacompdr_samples import DamagedSampleError, PublishedSample, read_sample
from distill.datacompdr_views import DoesNotFitError, header_of, pack_views, seen_size
from distill.store import Part
from distill.store_writing import PartRows, entry_of, unit, write_part
from runtime.errors import ImageError, PairsError, StoreError
from runtime.files import file_sha256
from runtime.pairs import Pairs, index_shards
from runtime.tar_index import index_shard

CAPTIONER = "coca_ViT-L-14"
REASONS = (
    "no reinforcement", "damaged reinforcement", "changed image", "does not fit", "turned by EXIF", "unreadable picture", "no usable caption",
)  # fmt: skip
"""Why a pair has no row."""
LISTED = 20
"""Left-out pairs that a part names for each reason."""


class LeftOutError(Exception):
    """One pair gets no row: (reason, one of REASONS; a sentence)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardSurvey:
    """A pairs shard: its sha256, how many samples it has, how many members or samples of it cannot be used at all
    (no picture, a link …), a 64 bit hash of each key, and a file that holds the number of the published
    sample that each of them found (int64, -1 for none)."""

    path: Path
    sha256: str
    samples: int
    rejected: int
    key_hashes: np.ndarray
    found: Path

    @property
    def name(self) -> str:
        return self.path.name.removesuffix(".tar")


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportTask:
    """One part: samples `first` to `stop` of one shard. `row` is the first one's row in the pairs folder; `found` as in ShardSurvey."""

    path: str
    shard: Path
    first: int
    stop: int
    row: int
    found: Path
    reinforcements: Reinforcements
    dims: tuple[int, ...]
    teachers: tuple[str, ...]
    views: int
    captions: int
    captioner: str
    language: str
    keep_changed: bool
    dtype: str
    metadata: dict[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class PartDone:
    """A part's entry for the index, its counts and the first of what it left out. `fresh`: it was written now, not found."""

    entry: dict[str, Any]
    counts: dict[str, float]
    skipped: list[dict[str, str]]
    fresh: bool


_OPEN: dict[Path, Pairs] = {}


def _pairs(shard: Path) -> Pairs:
    """One shard as pairs; the last one stays open. Raises PairsError when it is no sound tar, or holds no pair."""
    if shard not in _OPEN:
        _OPEN.clear()
        _OPEN[shard] = index_shards(shard.parent, [shard], strict=False)
    return _OPEN[shard]


def survey_shard(task: tuple[Path, Path], reinforcements: Reinforcements) -> ShardSurvey:
    """Hash a pairs shard, look up its uids and write what they found. task: the shard, the file for what is found.

    Raises:
        PairsError: it is no sound tar.
    """
    shard, found = task
    _OPEN.pop(shard, None)  # a former import of this process may have read what lay there then
    samples, rejected, _ = index_shard(shard, strict=False)
    uids = [uid_of(_pairs(shard), row) for row in range(len(samples))]
    save_array(found, reinforcements.find(uids))
    return ShardSurvey(
        path=shard, sha256=file_sha256(shard), samples=len(uids), rejected=len(rejected), key_hashes=digests(list(samples))[:, 0].copy(), found=found
    )


def uid_of(pairs: Pairs, row: int) -> str:
    """The uid that KEY.json names, else the key without its folder."""
    try:
        uid = pairs.meta(row).get("uid")
    except PairsError:
        uid = None
    return uid if isinstance(uid, str) and uid else pairs.keys[row].rpartition("/")[2]


def import_part(task: ImportTask) -> PartDone:
    """Join the rows of a part and write it; one that a former run finished for the same task is kept."""
    if (done := _finished_part(task)) is not None:
        return done
    pairs, found = _pairs(task.shard), np.load(task.found)[task.first : task.stop]
    counts: Counter[str] = Counter()
    refused = {n: ("no reinforcement", "its uid is not in the published shards") for n in np.flatnonzero(found < 0).tolist()}
    # through the tars from front to back, whatever the order of the pairs
    reading = sorted(np.flatnonzero(found >= 0).tolist(), key=lambda n: task.reinforcements.place(int(found[n])))
    images = [np.zeros((len(reading), task.views, dim), np.float32) for dim in task.dims]
    joined = {n: _Joined(slot=slot) for slot, n in enumerate(sorted(reading))}
    for n in reading:
        try:
            _join(task, pairs, task.first + n, int(found[n]), joined[n], images, counts)
        except LeftOutError as error:
            refused[n] = error.args
            del joined[n]
    entry_rows = _rows(task, pairs, joined, images)
    del images
    skipped = []
    for n in sorted(refused):
        reason, sentence = refused[n]
        counts[reason] += 1
        if counts[reason] <= LISTED:
            skipped.append({"key": pairs.keys[task.first + n], "shard": task.metadata["shard"], "reason": f"{reason}: {sentence}"})
    metadata = {**task.metadata, "skipped": json.dumps(skipped), "counts": json.dumps(counts, sort_keys=True)}
    entry = write_part(Path(task.path), entry_rows, dtype=task.dtype, tables=tables_of(task.captioner, task.language), metadata=metadata)
    return PartDone(entry=entry, counts=dict(counts), skipped=skipped, fresh=True)


def tables_of(captioner: str, language: str) -> dict[str, list[str]]:
    """Names that captions are stored as indices of."""
    return {"sources": list(dict.fromkeys(["pairs", captioner])), "languages": [language]}


@dataclass(slots=True)
class _Joined:
    """A pair and its reinforcement: `slot` is its place among the vectors, filled before the rest is known."""

    slot: int
    views: np.ndarray = field(default_factory=lambda: np.zeros((0, PACKED_BYTES), np.uint8))
    captions: list[Caption] = field(default_factory=list)
    texts: list[np.ndarray] = field(default_factory=list)


def _join(task: ImportTask, pairs: Pairs, row: int, number: int, out: _Joined, images: list[np.ndarray], counts: Counter[str]) -> None:
    """Fill `out` and its slot of `images` from the pair `row` of its shard and the published sample `number`. Raises LeftOutError."""
    sample = _sample(task, number)
    data, meta = _picture(pairs, row)
    if sample.sha256 and sample.sha256 != _sha256(meta, data):
        counts["changed image, kept"] += task.keep_changed
        if not task.keep_changed:
            raise LeftOutError("changed image", f"the sha256 of the picture is {_sha256(meta, data)[:16]}…, the published one {sample.sha256[:16]}…")
    out.views = _views(task, sample, data, meta, counts)
    try:
        raw = captions_of(pairs.caption(row), (), task.language)
    except PairsError as error:
        raise LeftOutError("no usable caption", str(error)) from None
    kept = sample.captions[: task.captions or None]
    out.captions = raw + [Caption(text=text, type="synthetic", language=task.language, source=task.captioner) for text, _ in kept]
    out.texts = [texts[: 1 + len(kept)] for texts in sample.texts]
    for t, vectors in enumerate(sample.image):
        images[t][out.slot] = vectors[: task.views]


def _sample(task: ImportTask, number: int) -> PublishedSample:
    try:
        sample = read_sample(task.reinforcements.members(number), task.dims, task.teachers)
        if len(sample.boxes) < task.views:
            raise DamagedSampleError(f"it has {len(sample.boxes)} views, {task.views} are imported")
    except DamagedSampleError as error:
        raise LeftOutError("damaged reinforcement", str(error)) from None
    return sample


def _picture(pairs: Pairs, row: int) -> tuple[bytes, dict[str, Any]]:
    try:
        meta = pairs.meta(row)
    except PairsError:
        meta = {}
    return pairs.image_bytes(row), meta


def _sha256(meta: dict[str, Any], data: bytes) -> str:
    """Of the picture as it was downloaded: what KEY.json says (img2dataset hashes before it resizes), else of the bytes themselves."""
    told = meta.get("sha256")
    return told.lower() if isinstance(told, str) and told else hashlib.sha256(data).hexdigest()


def _views(task: ImportTask, sample: PublishedSample, data: bytes, meta: dict[str, Any], counts: Counter[str]) -> np.ndarray:
    """uint8 (views, 16)."""
    try:
        found, turned = header_of(data)
        if turned:
            raise LeftOutError("turned by EXIF", "its EXIF tag turns the picture, the teachers saw it unturned")
        height, width = seen_size(meta, found)
        packed = pack_views(sample.boxes, sample.operations, (height, width), task.views)
    except ImageError as error:
        raise LeftOutError("unreadable picture", str(error)) from None
    except DoesNotFitError as error:
        raise LeftOutError("does not fit", str(error)) from None
    except DamagedSampleError as error:
        raise LeftOutError("damaged reinforcement", str(error)) from None
    reach = (sample.boxes[:, :2] + sample.boxes[:, 2:]).max(axis=0) / (height, width)
    counts["reach"] += float(reach.mean())
    return packed


def _rows(task: ImportTask, pairs: Pairs, joined: dict[int, _Joined], images: list[np.ndarray]) -> PartRows:
    order = sorted(joined)
    rows = [joined[n] for n in order]
    captions = [row.captions for row in rows]
    width = max(map(len, captions), default=0)
    texts = [np.zeros((len(rows), width, dim), np.float32) for dim in task.dims]
    for place, row in enumerate(rows):
        for t, vectors in enumerate(row.texts):
            texts[t][place, : len(vectors)] = vectors
    slots = [row.slot for row in rows]
    if len(slots) != len(images[0]):
        for t in range(len(images)):
            images[t] = images[t][slots]
    similarity = np.zeros(len(rows), np.float32)
    for image, text in zip(images, texts, strict=True):
        if len(rows):
            similarity += (unit(image.mean(axis=1)) * text[:, 0]).sum(axis=1, dtype=np.float32) / len(texts)
    return PartRows(
        keys=[pairs.keys[task.first + n] for n in order], pair_rows=[task.row + n for n in order], captions=captions, image_embeddings=list(images),
        augmentations=np.stack([row.views for row in rows]) if rows else np.zeros((0, task.views, PACKED_BYTES), np.uint8),
        text_embeddings=texts, columns={"similarity": similarity},
    )  # fmt: skip


def _finished_part(task: ImportTask) -> PartDone | None:
    """A part that a former run wrote for the same task, proven by the hash that it carries."""
    path = Path(task.path)
    if not path.is_file():
        return None
    try:
        part = Part(path)
        if any(part.metadata.get(name) != value for name, value in task.metadata.items()) or not part.intact():
            return None
        counts, skipped = json.loads(part.metadata["counts"]), json.loads(part.metadata["skipped"])
        return PartDone(entry=entry_of(path), counts=counts, skipped=skipped, fresh=False)
    except (StoreError, KeyError, ValueError):
        return None
