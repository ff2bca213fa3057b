"""mclip reinforce: embed augmented views and captions of a pairs folder with an ensemble of teachers, once, into a store.

    mclip reinforce PAIRS STORE --teachers CKPT [CKPT …] --augmentations 5

The same settings, pairs and teachers give the same bytes of every part, however many workers run and however often the command was
killed: what is done is found again by the hashes that it carries. `index.json` is written last; without it a folder is no store.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import tyro

from distill import augment
from distill.augment import AugmentSpec
from distill.captions import Caption, captions_of, check_templates
from distill.progress import progress
from distill.reinforce_worker import TEXTS_PER_FILE, PartDone, PartTask, TextTask, describe_teachers, embed_part, embed_texts, start_worker, text_path
from distill.store import Part, TeacherFacts, open_store, read_index
from distill.store_writing import INDEX, hash_shards, part_entry, write_index
from runtime.errors import PairsError, RecipeError, StoreError
from runtime.files import write_json
from runtime.pairs import Pairs, open_pairs

logger = logging.getLogger(__name__)

SETTINGS = "settings.json"
WORK = ".work"


@dataclass(frozen=True, kw_only=True, slots=True)
class ReinforceConfig:
    """Embed augmented views and captions of PAIRS with every teacher, into STORE."""

    pairs: tyro.conf.Positional[str]
    """Folder of tar shards."""
    store: tyro.conf.Positional[str]
    """Folder to write; one that was interrupted is continued."""
    teachers: tuple[str, ...]
    """Checkpoint folders, open_clip:NAME[/PRETRAINED], or module:function."""
    augmentations: int = 5
    """Views a picture."""
    templates: tuple[str, ...] = ("emoji", "drawing")
    """Phrases around the pair's own caption that are stored beside it (names in distill/captions.py)."""
    language: str = "en"
    """BCP-47 language of the captions."""
    dtype: Literal["int8", "float32", "float16", "bfloat16"] = "int8"
    seed: int = 0
    workers: int = 2
    """Processes, one torch thread each. The result does not depend on it."""
    part_rows: int = 128
    """Pairs a part: what a kill can lose per worker."""
    engine: Literal["local"] = "local"
    augment: AugmentSpec = field(default_factory=AugmentSpec)
    json: bool = False
    """Print one JSON object at the end."""

    def __post_init__(self) -> None:
        if not self.teachers:
            raise RecipeError("reinforcement needs at least one teacher: --teachers CHECKPOINT, open_clip:NAME/PRETRAINED or module:function")
        if not 1 <= self.augmentations <= 65535 or self.workers < 1 or self.part_rows < 1 or self.seed < 0:
            raise RecipeError(
                f"augmentations {self.augmentations}, workers {self.workers} and part_rows {self.part_rows} must be at least 1, seed {self.seed} at least 0"
            )
        check_templates(self.templates)


def main(argv: list[str]) -> int:
    """Entry point of `mclip reinforce`; returns the exit code."""
    config = tyro.cli(ReinforceConfig, args=argv, prog="mclip reinforce")
    index = reinforce(config)
    figures = index["figures"]
    if config.json:
        sys.stdout.write(json.dumps({"store": config.store, "rows": index["rows"], "skipped": len(index["skipped"]), **figures}) + "\n")
    else:
        sys.stdout.write(
            f"{config.store}: {index['rows']} pairs x {config.augmentations} views, {len(index['teachers'])} teachers, {len(index['skipped'])} skipped; "
            f"{figures['seconds']:.0f} s, {figures['views_per_second']:.0f} views/s, {figures['bytes_per_sample']:.0f} bytes a pair\n"
        )
    return 0


def reinforce(config: ReinforceConfig) -> dict[str, Any]:
    """Fill the store and return its index.

    Raises:
        StoreError: the folder holds something else, a store of other settings or pairs, or another process writes it.
        PairsError: the pairs cannot be read, or none of them is usable.
    """
    started = time.monotonic()
    pairs = open_pairs(config.pairs)
    folder = Path(config.store)
    shards = hash_shards(pairs)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # inherited by the workers, before they import torch
        os.environ[name] = "1"
    if (done := _finished_quickly(config, folder, shards)) is not None:
        return done
    with _locked(folder), _pool(config) as submit:
        facts: list[TeacherFacts] = submit(describe_teachers).result()
        settings = _settings(config, facts, shards)
        _claim(folder, settings)
        fingerprint = _hash(settings)
        if (done := _finished(folder, fingerprint)) is not None:
            return done
        captions, unreadable = _read_captions(pairs, config)
        texts = sorted({caption.text for made in captions.values() for caption in made}, key=lambda text: (len(text), text))
        text_seconds = _embed_texts(folder, texts, fingerprint, submit)
        number = {text: n for n, text in enumerate(texts)}
        tasks = _plan(pairs, captions, unreadable, number, shards, fingerprint, config)
        finished = _embed_parts(folder, tasks, len(pairs), submit)
    index = _index(config, settings, fingerprint, facts, pairs, finished)
    index["figures"] |= _figures(index, finished, text_seconds, len(texts), time.monotonic() - started, config)
    write_index(folder, index)
    shutil.rmtree(folder / WORK, ignore_errors=True)
    return read_index(folder)


# ---------------------------------------------------------------- settings, and what is there already


def _settings(config: ReinforceConfig, facts: list[TeacherFacts], shards: dict[str, str]) -> dict[str, Any]:
    """Everything that decides the bytes of the store."""
    return json.loads(json.dumps({
        "seed": config.seed, "augmentations": config.augmentations, "augmentation": {"version": augment.VERSION, **dataclasses.asdict(config.augment)},
        "templates": config.templates, "language": config.language, "dtype": config.dtype, "part_rows": config.part_rows,
        "teachers": [dataclasses.asdict(fact) for fact in facts], "pairs": shards,
    }))  # fmt: skip


def _hash(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Write settings.json into a fresh folder, or compare with the one that is there."""
    path = folder / SETTINGS
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise StoreError(f"'{path}' cannot be read ({error}); remove the store '{folder}' and run again") from None
        different = [name for name in settings if found.get(name) != settings[name]]
        if different:
            shown = {name: f"{name} ({_short(found.get(name))} there, {_short(settings[name])} now)" for name in different}
            raise StoreError(f"store '{folder}' was begun with other {', '.join(shown.values())}; give another folder, or remove this one to start anew")
        return
    strangers = [entry.name for entry in folder.iterdir() if entry.name != ".lock"]
    if strangers:
        raise StoreError(f"'{folder}' is no store but holds {', '.join(sorted(strangers)[:3])}; give a new or an empty folder")
    write_json(path, settings)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _finished(folder: Path, fingerprint: str) -> dict[str, Any] | None:
    """The index of a store that is complete and unchanged; None when there is work to do."""
    if not (folder / INDEX).is_file():
        return None
    try:
        store = open_store(folder, verify=True)
    except StoreError as error:
        logger.warning("the store is repaired: %s", error)
        return None
    return store.index if store.index.get("settings_sha256") == fingerprint else None


def _finished_quickly(config: ReinforceConfig, folder: Path, shards: dict[str, str]) -> dict[str, Any] | None:
    """The index of a store that is complete, found without loading a teacher: when every one is a checkpoint folder with a receipt."""
    try:
        index = read_index(folder)
        receipts = [json.loads((Path(spec) / "receipt.json").read_text(encoding="utf-8")) for spec in config.teachers]
        given = [(Path(spec).name, receipt["files"]["model.safetensors"]["sha256"]) for spec, receipt in zip(config.teachers, receipts, strict=True)]
    except (OSError, ValueError, KeyError, StoreError):
        return None
    facts = [TeacherFacts(**fact) for fact in index["teachers"]]
    if given != [(fact.name, fact.sha256) for fact in facts]:
        return None
    return _finished(folder, _hash(_settings(config, facts, shards)))


def _reusable(path: Path, metadata: dict[str, str]) -> Part | None:
    """A part that a former run wrote for the same task, proven by the hash that it carries."""
    try:
        part = Part(path)
    except StoreError:
        return None
    same = all(part.metadata.get(name) == value for name, value in metadata.items())
    return part if same and part.intact() else None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"store folder '{folder}' cannot be made ({error.strerror}); give another path") from None
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StoreError(f"another process is writing the store '{folder}'; wait for it or stop it") from None
        for half in folder.glob(".*.safetensors.*"):  # of a worker that was killed while it wrote
            half.unlink()
        yield


# ---------------------------------------------------------------- work


@contextmanager
def _pool(config: ReinforceConfig) -> Iterator[Callable[..., Future[Any]]]:
    """Worker processes that load the teachers once. An interrupt or error stops them at once."""
    pool = ProcessPoolExecutor(config.workers, mp_context=get_context("forkserver"), initializer=start_worker, initargs=(config.teachers, config.pairs))
    try:
        yield pool.submit
    except BrokenProcessPool:
        raise StoreError("a worker process died, most likely for want of memory; run the same command again (it continues), with fewer --workers") from None
    except BaseException:
        workers = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.kill()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _read_captions(pairs: Pairs, config: ReinforceConfig) -> tuple[dict[int, list[Caption]], dict[int, str]]:
    """Typed captions by row, and the reason for rows whose caption is unusable."""
    captions: dict[int, list[Caption]] = {}
    unreadable: dict[int, str] = {}
    for row in range(len(pairs)):
        try:
            captions[row] = captions_of(pairs.caption(row), config.templates, config.language)
        except PairsError as error:
            unreadable[row] = str(error)
    return captions, unreadable


def _embed_texts(folder: Path, texts: list[str], fingerprint: str, submit: Callable[..., Future[Any]]) -> float:
    """Embed every different text once, into numbered files of the work folder. Returns the workers' processor seconds."""
    work = folder / WORK
    work.mkdir(exist_ok=True)
    waiting = []
    for n, start in enumerate(range(0, len(texts), TEXTS_PER_FILE)):
        chunk = texts[start : start + TEXTS_PER_FILE]
        task = TextTask(path=str(text_path(work, n)), texts=chunk, metadata={"settings_sha256": fingerprint, "texts_sha256": _hash({"texts": chunk})})
        if _reusable(Path(task.path), task.metadata) is None:
            waiting.append(submit(embed_texts, task))
    seconds = 0.0
    with progress("texts", len(waiting)) as advance:
        for n, future in enumerate(as_completed(waiting), 1):
            seconds += future.result()
            advance(n, f"{len(texts)} different texts")
    return seconds


def _plan(
    pairs: Pairs, captions: dict[int, list[Caption]], unreadable: dict[int, str], number: dict[str, int], shards: dict[str, str], fingerprint: str,
    config: ReinforceConfig,
) -> list[PartTask]:  # fmt: skip
    """One task a run of `part_rows` rows inside one shard."""
    sources, languages = ["pairs", *config.templates], [config.language]
    tasks = []
    for shard in pairs.shards:
        for n, start in enumerate(range(shard.start, shard.stop, config.part_rows)):
            rows = list(range(start, min(start + config.part_rows, shard.stop)))
            path = Path(config.store) / f"{shard.name}.{n:04d}.safetensors"
            tasks.append(PartTask(
                path=str(path), work=str(Path(config.store) / WORK), rows=[row for row in rows if row in captions], first=start, count=len(rows),
                skipped=[{"key": pairs.keys[row], "shard": shard.name, "reason": unreadable[row]} for row in rows if row in unreadable],
                captions=[captions[row] for row in rows if row in captions],
                texts=[[number[caption.text] for caption in captions[row]] for row in rows if row in captions],
                augmentations=config.augmentations, spec=config.augment, seed=config.seed, dtype=config.dtype, tables={"sources": sources, "languages": languages},
                metadata={"settings_sha256": fingerprint, "shard": shard.name, "part": str(n), "input_sha256": shards[shard.name], "format": "mclip-store"},
            ))  # fmt: skip
    return tasks


def _embed_parts(folder: Path, tasks: list[PartTask], total: int, submit: Callable[..., Future[Any]]) -> list[PartDone]:
    """Run every task that a former run has not finished. The order of the answer is the order of the tasks."""
    done: dict[str, PartDone] = {}
    waiting: dict[Future[PartDone], PartTask] = {}
    for task in tasks:
        if (part := _reusable(Path(task.path), task.metadata)) is not None:
            entry = part_entry(Path(task.path).name, hashlib.sha256(Path(task.path).read_bytes()).hexdigest(), part.bytes, part.read_keys())
            done[task.path] = PartDone(entry=entry, skipped=json.loads(part.metadata["skipped"]), seconds={})
        else:
            waiting[submit(embed_part, task)] = task
    pairs_done = total - sum(task.count for task in waiting.values())
    if waiting and done:
        logger.info("%d of %d parts are there already", len(done), len(tasks))
    with progress("reinforce", total, done=pairs_done) as advance:
        for future in as_completed(waiting):
            task = waiting[future]
            done[task.path] = future.result()
            pairs_done += task.count
            advance(pairs_done, "pairs")
    expected = {Path(task.path).name for task in tasks}
    for stray in folder.glob("*.safetensors"):
        if stray.name not in expected:
            raise StoreError(f"store '{folder}' holds the part '{stray.name}', which these pairs do not explain; remove it or give another folder")
    return [done[task.path] for task in tasks]


# ---------------------------------------------------------------- index


def _index(
    config: ReinforceConfig, settings: dict[str, Any], fingerprint: str, facts: list[TeacherFacts], pairs: Pairs, finished: list[PartDone]
) -> dict[str, Any]:
    skipped = [entry for part in finished for entry in part.skipped]
    rows = sum(part.entry["rows"] for part in finished)
    if not rows:
        raise PairsError(f"none of the {len(pairs)} pairs of '{pairs.folder}' is usable; the first: {skipped[0]['reason']}")
    tasks = [(shard, n) for shard in pairs.shards for n in range(-(-(shard.stop - shard.start) // config.part_rows))]
    parts = [
        {"kind": "rows", "shard": shard.name, "part": n, "input_sha256": settings["pairs"][shard.name], **part.entry}
        for (shard, n), part in zip(tasks, finished, strict=True)
    ]
    for entry in skipped:
        logger.warning("skipped '%s' of shard %s: %s", entry["key"], entry["shard"], entry["reason"])
    return {
        "rows": rows, "dtype": config.dtype, "seed": config.seed, "teachers": [dataclasses.asdict(fact) for fact in facts], "captioner": None,
        "augmentation": settings["augmentation"], "augmentations": config.augmentations, "sources": ["pairs", *config.templates], "languages": [config.language],
        "columns": {"similarity": {"version": 1, "dtype": "float32", "about": "mean over teachers of the cosine between the mean view and caption 0"}},
        "coverage": {"pairs": len(pairs), "rows": rows, "skipped": len(skipped)}, "skipped": skipped, "shards": settings["pairs"], "parts": parts,
        "settings_sha256": fingerprint, "figures": {},
    }  # fmt: skip


def _figures(
    index: dict[str, Any], finished: list[PartDone], text_seconds: float, texts: int, seconds: float, config: ReinforceConfig
) -> dict[str, Any]:
    """Where the time went. Processor seconds are summed over workers and leave out parts that were there already."""
    worker = {name: round(sum(part.seconds.get(name, 0.0) for part in finished), 2) for name in ("decode", "augment", "teachers", "write")}
    fresh = sum(part.entry["rows"] for part in finished if part.seconds)
    size = sum(part.entry["bytes"] for part in finished)
    return {
        "seconds": round(seconds, 2), "workers": config.workers,
        "images_per_second": round(fresh / seconds, 2), "views_per_second": round(fresh * config.augmentations / seconds, 2),
        "bytes": size, "bytes_per_sample": round(size / index["rows"], 1), "different_texts": texts, "worker_cpu_seconds": {**worker, "texts": round(text_seconds, 2)},
        "pairs_embedded": fresh, "pairs_found_done": index["rows"] - fresh,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
