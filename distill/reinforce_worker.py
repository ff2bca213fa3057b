"""What a worker of `mclip reinforce` does: load the teachers once, then scan shards, embed texts and embed parts of shards.

Everything that could change a float is fixed by the task (which rows, in which order) and by the teacher (its micro-batch), never by the
worker.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import sys
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from distill import augment, remote
from distill.augment import AugmentSpec
from distill.captions import Caption
from distill.ensemble import encode_texts, open_teacher, probe
from distill.reinforce_captions import captions_for, names_in
from distill.reinforce_tasks import PartDone, PartTask, ScanTask, ShardScan, TextTask
from distill.remote import ShardPlace, fetch_shard, open_shards
from distill.store import TeacherFacts
from distill.store_writing import PartRows, entry_of, unit, write_part, write_safetensors
from distill.view_embedding import embed_views
from runtime.errors import ClipError, MissingExtraError, PairsError, StoreError
from runtime.files import file_sha256, write_json
from runtime.pairs import Pairs
from runtime.store_parts import Part
from runtime.tar_index import index_shard

_STATE: dict[str, Any] = {}
_KEPT_SHARDS, OPEN_TEXTS = 2, 64
"""Files that a worker holds open: shards, and texts of the work folder."""


def start_worker(teachers: tuple[str, ...], device: str, decode_threads: int) -> None:
    """Runs once in every worker. Teachers are loaded at the first task that needs them, where an error can be reported."""
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = "1"
    _STATE.clear()
    _STATE.update(specs=teachers, device=device, threads=decode_threads, shards=OrderedDict(), texts=OrderedDict())


def loaded_teachers() -> list[Any]:
    """The teachers of this worker."""
    if "teachers" not in _STATE:
        try:
            _STATE["teachers"] = [open_teacher(spec, _STATE["device"]) for spec in _STATE["specs"]]
            if "torch" in sys.modules:
                sys.modules["torch"].set_num_threads(1)
        except MissingExtraError as error:
            raise ClipError(str(error)) from None  # its constructor takes three arguments, so it cannot be pickled
    return _STATE["teachers"]


def decode_threads() -> int:
    """Threads that decode ahead; where it was left open, none beside a teacher on the CPU (the core is taken) and four beside a GPU."""
    if _STATE["threads"] >= 0:
        return int(_STATE["threads"])
    on_gpu = any(teacher.facts.preprocessing.get("precision") == "bfloat16" for teacher in loaded_teachers())
    return 4 if on_gpu else 0


def shard_pairs(place: ShardPlace) -> Pairs:
    """One shard as pairs of its own; the last few stay open."""
    kept: OrderedDict[ShardPlace, Pairs] = _STATE["shards"]
    if place not in kept:
        while len(kept) >= _KEPT_SHARDS:
            kept.popitem(last=False)
        kept[place] = open_shards([place], "", strict=False)
    kept.move_to_end(place)
    return kept[place]


def describe_teachers() -> list[TeacherFacts]:
    """Facts of every teacher, each asked for one picture and one text; equal names get a number, so that a store can tell them apart.

    Raises:
        StoreError: a teacher's answer is not finite or has another shape.
    """
    seen: Counter[str] = Counter()
    out = []
    for teacher in loaded_teachers():
        probe(teacher)
        fact = teacher.facts
        seen[fact.name] += 1
        out.append(fact if seen[fact.name] == 1 else dataclasses.replace(fact, name=f"{fact.name}-{seen[fact.name]}"))
    return out


# ---------------------------------------------------------------- shards and texts


def scan_shard(task: ScanTask) -> ShardScan:
    """Index and hash a shard, or take what a former run found when the shard has not changed since. Raises PairsError."""
    stamp = {"bytes": str(task.place.bytes), "state": task.place.state, "given": task.given}
    if task.stash and (known := _stashed(Path(task.stash), stamp)) is not None:
        return known
    path = fetch_shard(task.place)
    samples, rejected, _ = index_shard(path, strict=False, name=task.place.name)
    hashes = np.array([key_hash(key) for key in samples], np.uint64)
    sources, languages = names_in(task.given, task.place.name, list(samples)) if task.given else (set(), set())
    found = ShardScan(
        name=task.place.name, sha256=file_sha256(path), key_hashes=hashes, rejected=[dataclasses.asdict(entry) for entry in rejected],
        sources=sorted(sources), languages=sorted(languages),
    )  # fmt: skip
    if task.stash:
        with said_plainly(Path(task.stash)):
            facts = {"name": found.name, "sha256": found.sha256, "rejected": found.rejected, "sources": found.sources, "languages": found.languages}
            write_safetensors(Path(task.stash), {"key_hashes": ("I64", hashes.view("<i8"))}, {**stamp, "facts": json.dumps(facts)})
    return found


def key_hash(key: str) -> int:
    """Eight bytes of a key's hash."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def _stashed(path: Path, stamp: dict[str, str]) -> ShardScan | None:
    part = _intact(path, stamp)
    return None if part is None else ShardScan(**json.loads(part.metadata["facts"]), key_hashes=part.get("key_hashes").view(np.uint64).copy())


TEXTS_PER_FILE = 512
"""Texts a file of the work folder."""


def text_path(work: Path, number: int) -> Path:
    """Where the texts number*TEXTS_PER_FILE and on are kept."""
    return work / f"texts-{number:06d}.safetensors"


def embed_texts(task: TextTask) -> float:
    """Write one safetensors file of float32 (n, D) per teacher, unless it is there. Returns the processor seconds."""
    if _intact(Path(task.path), task.metadata) is not None:
        return 0.0
    started = time.process_time()
    vectors = encode_texts(loaded_teachers(), task.texts, finite=False)
    with said_plainly(Path(task.path)):
        write_safetensors(Path(task.path), {str(t): ("F32", vector.astype("<f4")) for t, vector in enumerate(vectors)}, task.metadata)
    return time.process_time() - started


# ---------------------------------------------------------------- parts


def view_parameters(seed: int, key: str, view: int, spec: AugmentSpec, size: tuple[int, int]) -> bytes:
    """Parameters of one view: a function of seed, key and number alone. size: (height, width) of the picture."""
    digest = hashlib.sha256(key.encode()).digest()
    return augment.sample_parameters(np.random.default_rng([seed, view, *np.frombuffer(digest[:16], "<u4").tolist()]), spec, size)


def draw_views(seed: int, key: str, numbers: range, spec: AugmentSpec, size: tuple[int, int]) -> np.ndarray:
    """`view_parameters` of several views, uint8 (A, 16)."""
    drawn = b"".join(view_parameters(seed, key, n, spec, size) for n in numbers)
    return np.frombuffer(drawn, np.uint8).reshape(len(numbers), augment.PACKED_BYTES)


def embed_part(task: PartTask) -> PartDone:
    """Decode, augment and embed the rows of a part, and write it; or find that a former run did."""
    if (done := found_done(task)) is not None:
        return done
    teachers, pairs, seconds = loaded_teachers(), shard_pairs(task.place), Counter[str]()
    dropped = set(task.drop)
    rows = [row for row in range(len(pairs)) if row not in dropped][task.first : task.first + task.count]
    reasons: dict[int, str] = {}
    captions: dict[int, list[Caption]] = {}
    for place, row in enumerate(rows):
        try:
            captions[place] = captions_for(pairs, row, task.place.name, task.captions)
        except PairsError as error:
            reasons[place] = str(error)
    clock = time.thread_time()
    texts = _embed_captions(task, captions)
    for place, vectors in enumerate_nan(texts):
        reasons[place] = f"teacher '{teachers[vectors].facts.name}' gave no finite embedding for a caption of this pair"
        del captions[place], texts[place]
    seconds["texts"] += time.thread_time() - clock
    found = embed_views(
        teachers, ((place, pairs.image_bytes(rows[place])) for place in captions),
        lambda place, size: draw_views(task.seed, pairs.keys[rows[place]], range(task.augmentations), task.spec, size), task.augmentations,
        threads=decode_threads(), seconds=seconds,
    )  # fmt: skip
    reasons |= found.failures
    clock = time.thread_time()
    dims = [teacher.facts.dim for teacher in teachers]
    rows_of_part = PartRows(
        keys=[pairs.keys[rows[place]] for place in found.places], pair_rows=[task.base + place for place in found.places],
        captions=[captions[place] for place in found.places], augmentations=found.packed, image_embeddings=found.vectors,
        text_embeddings=[padded_texts([texts[place][t] for place in found.places], dim) for t, dim in enumerate(dims)],
    )  # fmt: skip
    rows_of_part.columns["similarity"] = _similarity(rows_of_part)
    skipped = [{"key": pairs.keys[rows[place]], "shard": task.place.name, "reason": stable(reasons[place], task.place)} for place in sorted(reasons)]
    with said_plainly(Path(task.path)):
        metadata = {**task.metadata, "skipped": json.dumps(skipped)}
        entry = write_part(Path(task.path), rows_of_part, dtype=task.dtype, tables=task.tables, metadata=metadata)
        if task.remote:
            _deliver(task, entry, skipped)
    seconds["write"] += time.thread_time() - clock
    return PartDone(entry=entry, skipped=skipped, seconds=dict(seconds))


def stable(reason: str, place: ShardPlace) -> str:
    """A reason that says the same in every run, for it is part of the part's bytes: without addresses in memory and where the pairs lie."""
    return re.sub(r" ?<[^<>]* object at 0x[0-9a-fA-F]+>", "", reason).replace(str(Path(place.url)), f"{place.name}.tar")


def enumerate_nan(texts: dict[int, list[np.ndarray]]) -> list[tuple[int, int]]:
    """(place, teacher) of every place where a teacher's text vectors are not all finite."""
    bad: dict[int, int] = {}
    for place, vectors in texts.items():
        for t, vector in enumerate(vectors):
            if not np.isfinite(vector).all():
                bad.setdefault(place, t)
    return list(bad.items())


def padded_texts(vectors: list[np.ndarray], dim: int) -> np.ndarray:
    """Per row (C_r, D) -> (n, largest C_r, D), filled up with zeros."""
    out = np.zeros((len(vectors), max((len(made) for made in vectors), default=0), dim), np.float32)
    for row, made in enumerate(vectors):
        out[row, : len(made)] = made
    return out


def embed_distinct(texts: list[str]) -> dict[str, list[np.ndarray]]:
    """Per text its embedding (D,) by each of the worker's teachers; each different text is embedded once."""
    unique = sorted(set(texts), key=lambda text: (len(text), text))
    vectors = encode_texts(loaded_teachers(), unique, finite=False)
    return {text: [found[n] for found in vectors] for n, text in enumerate(unique)}


def _embed_captions(task: PartTask, captions: dict[int, list[Caption]]) -> dict[int, list[np.ndarray]]:
    """Per place and teacher the vectors of its captions (C, D), read from the pooled files or made now."""
    teachers = range(len(loaded_teachers()))
    if task.texts is None:
        known = embed_distinct([caption.text for made in captions.values() for caption in made])
        return {place: [np.stack([known[caption.text][t] for caption in made]) for t in teachers] for place, made in captions.items()}
    out = {}
    for place in captions:
        files = [divmod(number, TEXTS_PER_FILE) for number in task.texts[place]]
        out[place] = [np.stack([_text_file(task.work, file).get(str(t))[local] for file, local in files]) for t in teachers]
    return out


def _text_file(work: str, number: int) -> Part:
    kept: OrderedDict[tuple[str, int], Part] = _STATE["texts"]
    part = kept.pop((work, number), None) or Part(text_path(Path(work), number))
    kept[work, number] = part
    if len(kept) > OPEN_TEXTS:  # every one holds a file open; a long run would otherwise hold them all
        kept.popitem(last=False)
    return part


def _similarity(rows: PartRows) -> np.ndarray:
    """Column `similarity`, version 1 (docs/store-format.md, section 4)."""
    out = np.zeros(len(rows.keys), np.float32)
    for image, text in zip(rows.image_embeddings, rows.text_embeddings, strict=True):
        if len(out):
            out += (unit(image.mean(axis=1)) * text[:, 0]).sum(axis=1, dtype=np.float32) / len(rows.image_embeddings)
    return out


# ---------------------------------------------------------------- what is done already, and writing


def found_done(task: Any) -> PartDone | None:
    """What a former run wrote for the same task, proven by the hashes that it carries."""
    if getattr(task, "remote", ""):
        return _found_delivered(task)
    path = Path(task.path)
    part = _intact(path, task.metadata)
    return None if part is None else PartDone(entry=entry_of(path), skipped=json.loads(part.metadata.get("skipped", "[]")), seconds={})


def _intact(path: Path, metadata: dict[str, str]) -> Part | None:
    if not path.is_file():
        return None
    try:
        part = Part(path)
    except StoreError:
        return None
    same = all(part.metadata.get(name) == value for name, value in metadata.items())
    return part if same and part.intact() else None


def _deliver(task: PartTask, entry: dict[str, Any], skipped: list[dict[str, str]]) -> None:
    """Upload a part, then the note that says so; what lies here is removed."""
    path = Path(task.path)
    note = path.with_suffix(".json")
    remote.upload(path, f"{task.remote}/{path.name}")
    write_json(note, {"metadata": task.metadata, "entry": entry, "skipped": skipped})
    remote.upload(note, f"{task.remote}/.work/{note.name}")
    path.unlink()
    note.unlink()


def _found_delivered(task: PartTask) -> PartDone | None:
    fs, root = remote.filesystem(task.remote, StoreError)
    name = Path(task.path).name
    try:
        note = json.loads(fs.cat_file(f"{root}/.work/{Path(name).with_suffix('.json').name}"))
        there = int(fs.info(f"{root}/{name}")["size"])
    except (OSError, ValueError):
        return None
    if note.get("metadata") != task.metadata or there != note["entry"]["bytes"]:
        return None
    return PartDone(entry=note["entry"], skipped=note["skipped"], seconds={})


@contextmanager
def said_plainly(path: Path) -> Iterator[None]:
    """A full disk, or one that cannot be written, as one sentence. What was written before stays as it is."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"'{path.name}' cannot be written to '{path.parent}' ({error.strerror or error}); nothing stored is lost: make room, then run the same command again, it continues"
        ) from None
