"""mclip reinforce: embed augmented views and captions of pairs with an ensemble of teachers, once, into a store.

    mclip reinforce PAIRS STORE --teachers CKPT [CKPT …] --augmentations 5
    mclip reinforce PAIRS STORE --teachers CKPT --engine ray --workers 64
    mclip reinforce PAIRS STORE --add-augmentations 5          # later, onto a finished store; also --add-captions, --add-teachers

The same settings, pairs and teachers give the same bytes of every part, whatever engine and number of workers ran and however often the
command was killed: what is done is found again by the hashes that it carries. `index.json` is written last; without it a folder is no
store. PAIRS and STORE may be addresses (`s3://…`, distill/remote.py).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from distill import augment, remote
from distill.augment import AugmentSpec
from distill.captions import check_templates
from distill.engines import Engine, EngineName, open_engine, run
from distill.progress import progress
from distill.reinforce_captions import CaptionPlan, caption_facts
from distill.reinforce_plan import POOLED_PAIRS, PooledTexts, part_tasks, scan, tables_of, usable
from distill.reinforce_state import INDEX, WORK, claim, finished, hash_of, known_teachers, locked
from distill.reinforce_tasks import PartDone, ShardScan
from distill.reinforce_worker import describe_teachers, embed_part, said_plainly, start_worker
from distill.remote import is_remote, list_shards, staging_folder
from distill.store import TeacherFacts
from distill.store_writing import base_layer, write_index
from runtime.errors import PairsError, RecipeError, StoreError
from runtime.store_index import read_index

logger = logging.getLogger(__name__)

SKIPS_TOLD = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class ReinforceConfig:
    """Embed augmented views and captions of PAIRS with every teacher, into STORE."""

    pairs: tyro.conf.Positional[str]
    """Folder of tar shards, or its address (s3://, gs://, hf://, file://)."""
    store: tyro.conf.Positional[str]
    """Folder or address to write; one that was interrupted is continued."""
    teachers: tuple[str, ...] = ()
    """Checkpoint folders, open_clip:NAME[/PRETRAINED], or module:function. When adding to a store: where its teachers lie now."""
    augmentations: int = 5
    """Views a picture."""
    templates: tuple[str, ...] = ("emoji", "drawing")
    """Phrases around the pair's own caption that are stored beside it (names in distill/captions.py)."""
    captions: str = ""
    """Further captions by key: a folder that mclip caption wrote, a .jsonl or a .parquet."""
    language: str = "en"
    """BCP-47 language of the pairs' captions."""
    dtype: Literal["int8", "int4", "float32", "float16", "bfloat16"] = "int8"
    seed: int = 0
    workers: int = 2
    """Processes, one torch thread each; 0 works in this one. The result does not depend on it."""
    part_rows: int = 128
    """Pairs a part: what a kill can lose per worker. Take some thousands for millions of pairs."""
    engine: EngineName = "local"
    """Where workers run: processes here, or actors of a Ray cluster (one that runs already, else one started here)."""
    device: str = "auto"
    """cpu, cuda, or auto: the GPU where there is one (bfloat16; the embeddings differ from a CPU's in the third digit)."""
    decode_threads: int = -1
    """Threads a worker that decode and augment ahead of the teachers; -1: 4 beside a GPU, else none."""
    texts: Literal["auto", "pooled", "part"] = "auto"
    """Embed each different text once for all pairs, or once a part; auto: pooled up to 200,000 pairs. The result does not depend on it."""
    add_augmentations: int = 0
    """Add so many views a picture to a finished store; everything else is taken from the store."""
    add_captions: str = ""
    """Add the captions of this folder or file to a finished store."""
    add_teachers: tuple[str, ...] = ()
    """Add teachers to a finished store, for all its views and captions."""
    augment: AugmentSpec = field(default_factory=AugmentSpec)
    json: bool = False
    """Print one JSON object at the end."""

    @property
    def adds(self) -> bool:
        """Whether something is added to a finished store."""
        return bool(self.add_augmentations or self.add_captions or self.add_teachers)

    def __post_init__(self) -> None:
        if not self.teachers and not self.adds:
            raise RecipeError("reinforcement needs at least one teacher: --teachers CHECKPOINT, open_clip:NAME/PRETRAINED or module:function")
        if (self.add_augmentations != 0) + bool(self.add_captions) + bool(self.add_teachers) > 1:
            raise RecipeError("one thing is added at a time: --add-augmentations, --add-captions or --add-teachers; run the command once for each")
        if not 1 <= self.augmentations <= 65535 or self.workers < 0 or self.part_rows < 1 or self.seed < 0 or not 0 <= self.add_augmentations <= 65535:
            raise RecipeError(
                f"augmentations {self.augmentations} and part_rows {self.part_rows} must be at least 1, workers {self.workers}, seed {self.seed} and "
                f"add_augmentations {self.add_augmentations} at least 0"
            )
        if self.decode_threads < -1 or self.device.split(":")[0] not in ("auto", "cpu", "cuda"):
            raise RecipeError(f"decode_threads {self.decode_threads} must be -1 or more, and device '{self.device}' one of auto, cpu, cuda")
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
            f"{config.store}: {index['rows']} pairs x {index['augmentations']} views, {len(index['teachers'])} teachers, {len(index['skipped'])} skipped; "
            f"{figures['seconds']:.0f} s, {figures['views_per_second']:.0f} views/s, {figures['bytes_per_sample']:.0f} bytes a pair\n"
        )
    return 0


def reinforce(config: ReinforceConfig) -> dict[str, Any]:
    """Fill the store, or add to it, and return its index.

    Raises:
        StoreError: the folder holds something else, a store of other settings or pairs, or another process writes it; the disk is full.
        PairsError: the pairs cannot be read, or none of them is usable.
        MissingExtraError: --engine ray without Ray.
    """
    places = list_shards(config.pairs)
    address = config.store.rstrip("/") if is_remote(config.store) else ""
    folder = staging_folder(address) if address else Path(config.store)
    workers = (start_worker, specs_of(config, folder), config.device, config.decode_threads)
    with locked(folder):
        with open_engine(config.engine, config.workers, *workers) as engine:
            if config.adds:
                from distill.appending import append

                return append(config, folder, places, engine)
            index, was_whole = _fill(config, folder, address, places, engine)
        if was_whole or len(index["layers"]) == 1:
            return index
        from distill.appending import repair

        with open_engine(config.engine, config.workers, start_worker, tuple(index["given"]["teachers"]), config.device, config.decode_threads) as engine:
            return repair(config, folder, places, engine)


def specs_of(config: ReinforceConfig, folder: Path) -> tuple[str, ...]:
    """The teachers that workers load: those of the command line; to add views or captions, by default those of the store."""
    if config.add_teachers:
        return config.add_teachers
    if config.teachers or not config.adds:
        return config.teachers
    return tuple(read_index(folder).get("given", {}).get("teachers", ()))


def _fill(config: ReinforceConfig, folder: Path, address: str, places: list[remote.ShardPlace], engine: Engine) -> tuple[dict[str, Any], bool]:
    """The index, and whether there was nothing to do."""
    started = time.monotonic()
    plan = CaptionPlan(templates=config.templates, language=config.language, given=config.captions)
    given = caption_facts(config.captions) if config.captions else None
    scans = scan(places, folder / WORK, config.captions, engine)
    known = None if address else known_teachers(config.teachers, config.device, folder)
    if known is not None and (done := finished(folder, hash_of(_settings(config, known, scans, given)))) is not None:
        return done, True
    facts: list[TeacherFacts] = engine.submit(describe_teachers).result()
    settings = _settings(config, facts, scans, given)
    claim(folder, settings, address)
    fingerprint = hash_of(settings)
    if (done := finished(folder, fingerprint, address)) is not None:
        return done, True
    total = sum(usable(one) for one in scans)
    local = not address and not any(is_remote(place.url) for place in places)
    pooled = PooledTexts(places, scans, plan) if config.texts == "pooled" or (config.texts == "auto" and local and total <= POOLED_PAIRS) else None
    tables = tables_of(plan, scans)
    with said_plainly(folder / WORK):
        (folder / WORK).mkdir(exist_ok=True)
        text_seconds = pooled.embed(folder / WORK, fingerprint, engine, hash_of) if pooled else 0.0
    common = {
        "captions": plan, "work": str(folder / WORK), "augmentations": config.augmentations, "spec": config.augment, "seed": config.seed, "dtype": config.dtype,
        "tables": tables, "remote": address,
    }  # fmt: skip
    tasks = part_tasks(places, scans, pooled.numbers if pooled else None, folder, config.part_rows, common, fingerprint)
    parts, skipped, spent = embed_parts(embed_part, tasks, total, engine)
    _refuse_strangers(folder, parts)
    skipped = [entry for one in scans for entry in one.rejected] + skipped
    index = _index(config, settings, fingerprint, facts, tables, scans, parts, skipped, given)
    spent["texts"] += text_seconds
    index["figures"] = figures(index, spent, time.monotonic() - started, engine, config.augmentations) | {"texts_embedded": "pooled" if pooled else "a part"}
    with said_plainly(folder / INDEX):
        return _publish(folder, address, index), False


def _settings(config: ReinforceConfig, facts: list[TeacherFacts], scans: list[ShardScan], given: dict[str, Any] | None) -> dict[str, Any]:
    """Everything that decides the bytes of the store."""
    return json.loads(json.dumps({
        "seed": config.seed, "augmentations": config.augmentations, "augmentation": {"version": augment.VERSION, **dataclasses.asdict(config.augment)},
        "templates": config.templates, "language": config.language, "captions": given and given["sha256"], "dtype": config.dtype, "part_rows": config.part_rows,
        "teachers": [dataclasses.asdict(fact) for fact in facts], "pairs": {one.name: one.sha256 for one in scans},
    }))  # fmt: skip


def embed_parts(function: Any, tasks: Iterable[Any], total: int, engine: Engine) -> tuple[list[dict[str, Any]], list[dict[str, str]], Counter[str]]:
    """Run every task. Returns the parts' entries and what they left out, both in the order of the tasks, and figures of the work."""
    order: dict[str, int] = {}
    done: dict[str, PartDone] = {}
    facts: dict[str, dict[str, Any]] = {}
    spent: Counter[str] = Counter()

    def numbered() -> Iterable[Any]:
        for n, task in enumerate(tasks):
            order[task.path] = n
            yield task

    rows = 0
    with progress("reinforce", total) as advance:
        for task, answer in run(engine, function, numbered()):
            done[task.path] = answer
            facts[task.path] = {"shard": task.metadata["shard"], "part": int(task.metadata["part"]), "input_sha256": task.metadata["input_sha256"]}
            rows += getattr(task, "count", answer.entry["rows"])
            spent.update(answer.seconds)
            spent["rows_embedded"] += answer.entry["rows"] if answer.seconds else 0
            advance(rows, "pairs")
    paths = sorted(order, key=order.__getitem__)
    return [{**facts[path], **done[path].entry} for path in paths], [entry for path in paths for entry in done[path].skipped], spent


def _refuse_strangers(folder: Path, parts: list[dict[str, Any]]) -> None:
    expected = {entry["path"] for entry in parts}
    if (folder / INDEX).is_file():
        try:
            expected |= {entry["path"] for entry in read_index(folder)["parts"]}
        except StoreError:
            logger.warning("the index of '%s' cannot be read and is written anew", folder)
    for stray in folder.glob("*.safetensors"):
        begun = re.fullmatch(r".+\.\d{4,}\.(\d+)\.safetensors", stray.name)  # of an addition that did not finish
        if stray.name not in expected and not (begun and (folder / f"settings.{begun[1]}.json").is_file()):
            raise StoreError(f"store '{folder}' holds the part '{stray.name}', which these pairs do not explain; remove it or give another folder")


def _index(
    config: ReinforceConfig, settings: dict[str, Any], fingerprint: str, facts: list[TeacherFacts], tables: dict[str, list[str]], scans: list[ShardScan],
    parts: list[dict[str, Any]], skipped: list[dict[str, str]], given: dict[str, Any] | None,
) -> dict[str, Any]:  # fmt: skip
    rows, pairs = sum(entry["rows"] for entry in parts), len({(entry["shard"], entry["key"]) for entry in skipped})
    if not rows:
        raise PairsError(f"none of the {pairs} pairs of '{config.pairs}' is usable; the first: {skipped[0]['reason']}")
    for entry in skipped[:SKIPS_TOLD]:
        logger.warning("skipped '%s' of shard %s: %s", entry["key"], entry["shard"], entry["reason"])
    if len(skipped) > SKIPS_TOLD:
        logger.warning("and %d more, all listed in %s", len(skipped) - SKIPS_TOLD, INDEX)
    layer = base_layer(
        config.augmentations, len(facts), settings_sha256=fingerprint, augmentation=settings["augmentation"], augmentations=config.augmentations, seed=config.seed,
        captioner=given,
    )  # fmt: skip
    return {
        "rows": rows, "dtype": config.dtype, "seed": config.seed, "teachers": [dataclasses.asdict(fact) for fact in facts], "captioner": given,
        "augmentation": settings["augmentation"], "augmentations": config.augmentations, **tables,
        "columns": {"similarity": {"version": 1, "dtype": "float32", "about": "mean over teachers of the cosine between the mean view and caption 0"}},
        "coverage": {"pairs": rows + pairs, "rows": rows, "skipped": pairs}, "skipped": skipped, "shards": settings["pairs"], "layers": [layer], "parts": parts,
        "settings_sha256": fingerprint, "given": {"teachers": list(config.teachers), "captions": config.captions}, "figures": {},
    }  # fmt: skip


def figures(index: dict[str, Any], spent: Counter[str], seconds: float, engine: Engine, views: int) -> dict[str, Any]:
    """Where the time went. Processor seconds are summed over workers and leave out parts that were there already."""
    fresh = spent["rows_embedded"]
    size = sum(entry["bytes"] for entry in index["parts"])
    return {
        "seconds": round(seconds, 2), "engine": engine.name, "workers": engine.workers,
        "images_per_second": round(fresh / seconds, 2), "views_per_second": round(fresh * views / seconds, 2),
        "bytes": size, "bytes_per_sample": round(size / index["rows"], 1),
        "worker_cpu_seconds": {name: round(spent[name], 2) for name in ("views", "teachers", "texts", "write")},
        "pairs_embedded": fresh, "pairs_found_done": index["rows"] - fresh,
    }  # fmt: skip


def _publish(folder: Path, address: str, index: dict[str, Any]) -> dict[str, Any]:
    """Write the index, last of all; what was only needed on the way is removed."""
    write_index(folder, index if address else _keep_layers(folder, index))
    done = read_index(folder)
    if address:
        remote.upload(folder / INDEX, f"{address}/{INDEX}")
        (folder / INDEX).unlink()
    shutil.rmtree(folder / WORK, ignore_errors=True)
    return done


def _keep_layers(folder: Path, index: dict[str, Any]) -> dict[str, Any]:
    """A repaired store keeps the layers that were added to it: parts of layer 0 have the bytes that they had."""
    try:
        before = read_index(folder)
    except StoreError:
        return index
    if before.get("settings_sha256") != index["settings_sha256"] or len(before["layers"]) == 1:
        return index
    return {**before, "figures": index["figures"]}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
