"""mclip import-datacompdr: DataCompDR as it is published, joined by uid with the pictures that one has, into a store.

    mclip import-datacompdr SHARDS PAIRS STORE

The published shards hold neither pictures nor captions of their own, and many pictures are gone from the web: what has no partner is
counted and told, never fatal. The same shards, pairs and settings give the same bytes of every part, whatever the number of workers and
however often the command was killed; `index.json` is written last. Memory is bounded by --part-rows. Guide: docs/guides/datacompdr.md.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from distill.augment import VERSION
from distill.datacompdr_index import Reinforcements, cut_shards, find_shards, index_shard, join_indices
from distill.datacompdr_join import CAPTIONER, REASONS, ImportTask, PartDone, ShardSurvey, import_part, survey_shard, tables_of
from distill.datacompdr_samples import DamagedSampleError, read_sample
from distill.engines import Engine, EngineName, open_engine, run
from distill.progress import progress
from distill.reinforce_state import SETTINGS, WORK, claim, finished, hash_of, locked
from distill.store import TeacherFacts, read_index
from distill.store_writing import write_index
from runtime.errors import PairsError, RecipeError, StoreError
from runtime.pairs import shard_paths

PUBLISHED = ("ViT-L-14/openai:768:100:CC-BY-NC-ND-4.0", "ViT-L-14/datacomp_xl_s13b_b90k:768:100:CC-BY-NC-ND-4.0")
"""The teachers of DataCompDR-12M and -1B with the logit scale they are followed at (apple/ml-mobileclip, training/configs)."""
PREPROCESSING = {
    "image_size": 224, "mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711], "interpolation": "bicubic", "crop_pct": 1.0,
}  # fmt: skip
LICENCE = "CC-BY-NC-ND-4.0"
AUGMENTATION = {
    "version": VERSION, "drawn_by": "torchvision", "random_resized_crop": {"scale": [0.08, 1.0], "ratio": [3 / 4, 4 / 3], "interpolation": "bicubic", "size": 224},
    "rand_augment": {"operations": 2, "magnitude": 9, "bins": 31},
}  # fmt: skip
"""How the published views were drawn (apple/ml-mobileclip, training/configs/datacompdr12m.json, torchvision's defaults for the rest)."""
LISTED = 1000
"""Left-out pairs that index.json names; all are counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportConfig:
    """Import the published SHARDS of DataCompDR for PAIRS into STORE."""

    shards: tyro.conf.Positional[str]
    """Folder with the published *.tar files, also in sub-folders."""
    pairs: tyro.conf.Positional[str]
    """Folder of tar shards with pictures and captions; KEY.json names the uid, or the key is the uid."""
    store: tyro.conf.Positional[str]
    """Folder to write; one that was interrupted is continued."""
    teachers: tuple[str, ...] = PUBLISHED
    """NAME:DIM:SCALE:LICENCE of each teacher, in the order of its values in a published vector."""
    captioner: str = CAPTIONER
    """What wrote the published synthetic captions."""
    augmentations: int = 0
    """Views of each sample that are kept, the first ones; 0 = as many as are published."""
    captions: int = 0
    """Synthetic captions of each sample that are kept, the first ones; 0 = all."""
    dtype: Literal["int8", "float32", "float16", "bfloat16", "int4"] = "int8"
    changed: Literal["drop", "keep"] = "drop"
    """What becomes of a picture whose sha256 is not the published one."""
    language: str = "en"
    """BCP-47 language of the captions."""
    engine: EngineName = "local"
    """local: processes of this machine; ray: a Ray cluster whose nodes see the same folders."""
    workers: int = 2
    """Processes; 0: this one. The result does not depend on it."""
    part_rows: int = 1024
    """Pairs a part: what a kill can lose per worker, and what a worker holds in memory."""
    json: bool = False
    """Print one JSON object at the end."""

    def __post_init__(self) -> None:
        if self.workers < 0 or self.part_rows < 1 or self.augmentations < 0 or self.captions < 0:
            raise RecipeError(
                f"part_rows {self.part_rows} must be at least 1, workers {self.workers}, augmentations {self.augmentations} and captions {self.captions} at least 0"
            )
        parse_teachers(self.teachers)


def main(argv: list[str]) -> int:
    """Entry point of `mclip import-datacompdr`; returns the exit code."""
    config = tyro.cli(ImportConfig, args=argv, prog="mclip import-datacompdr")
    index = import_datacompdr(config)
    coverage, figures = index["coverage"], index["figures"]
    if config.json:
        sys.stdout.write(json.dumps({"store": config.store, **coverage, **figures}) + "\n")
        return 0
    left_out = ", ".join(f"{count} {reason}" for reason, count in coverage["reasons"].items()) or "none"
    sys.stdout.write(
        f"{config.store}: {coverage['rows']} of {coverage['pairs']} pairs x {index['augmentations']} views, {len(index['teachers'])} teachers; "
        f"{figures['seconds']:.0f} s, {figures['bytes_per_sample']:.0f} bytes a pair\n"
        f"left out: {left_out}\n"
        f"published samples: {coverage['reinforcements']}, without a picture here: {coverage['reinforcements_without_picture']}\n"
    )
    for warning in index["import"]["warnings"]:
        sys.stderr.write(f"warning: {warning}\n")
    return 0


def parse_teachers(given: tuple[str, ...]) -> list[TeacherFacts]:
    """NAME:DIM:SCALE:LICENCE -> facts. The name may hold colons. Raises RecipeError."""
    out = []
    for text in given:
        parts = text.rsplit(":", 3)
        try:
            name, dim, scale, licence = parts[0], int(parts[1]), float(parts[2]), parts[3]
            out.append(TeacherFacts(name=name, dim=dim, logit_scale=scale, licence=licence, source="DataCompDR", preprocessing=PREPROCESSING))
        except (IndexError, ValueError, StoreError):
            raise RecipeError(f"teacher '{text}' is not NAME:DIM:SCALE:LICENCE, as in {PUBLISHED[0]}") from None
    if not out or len({fact.name for fact in out}) != len(out):
        raise RecipeError(f"an import needs teachers of different names, found {', '.join(fact.name for fact in out) or 'none'}")
    return out


def import_datacompdr(config: ImportConfig) -> dict[str, Any]:
    """Fill the store and return its index.

    Raises:
        StoreError: no published shard, no usable sample in them, the folder holds something else or a store of other settings.
        PairsError: the pairs cannot be read, or none of them has a usable reinforcement.
    """
    try:
        return _import(config)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        raise StoreError(f"the import into '{config.store}' stopped ({error.strerror or error}{where}); mend that and run the same command again, it continues") from None


def _import(config: ImportConfig) -> dict[str, Any]:
    started = time.monotonic()
    published, shards, folder = find_shards(config.shards), shard_paths(Path(config.pairs)), Path(config.store)
    teachers = parse_teachers(config.teachers)
    _refuse_strangers(folder)
    with locked(folder), open_engine(config.engine, config.workers, _nothing) as engine:
        work = folder / WORK
        work.mkdir(exist_ok=True)
        indices = _in_order(engine, "published shards", functools.partial(index_shard, work=work.absolute()), published)
        reinforcements, fingerprint = join_indices(published, indices, work.absolute())
        look_up = functools.partial(survey_shard, reinforcements=reinforcements)
        surveys = _in_order(engine, "pairs shards", look_up, [(path, work.absolute() / f"found-{n:08d}.npy") for n, path in enumerate(shards)])
        _refuse_repeated_keys(surveys)
        views = config.augmentations or published_views(reinforcements, teachers)
        settings = _settings(config, teachers, views, fingerprint, surveys)
        claim(folder, settings)
        if finished(folder, hash_of(settings)) is None:
            tasks = _plan(config, surveys, reinforcements, teachers, views, hash_of(settings))
            parts = _in_order(engine, "import", import_part, tasks, [task.stop - task.first for task in tasks])
            _refuse_strays(folder, tasks)
            index = _index(config, settings, teachers, views, surveys, parts, reinforcements, cut_shards(indices))
            index["figures"] = _figures(index, parts, time.monotonic() - started, config)
            write_index(folder, index)
        reinforcements.close()
    shutil.rmtree(folder / WORK, ignore_errors=True)
    return read_index(folder)


def _nothing() -> None:
    """What a worker needs before its first task."""


def _in_order(engine: Engine, title: str, function: Callable[[Any], Any], tasks: list[Any], sizes: list[int] | None = None) -> list[Any]:
    """The answer of each task, in the order of the tasks, with progress in `sizes` (pairs) or tasks."""
    place = {id(task): n for n, task in enumerate(tasks)}
    answers: list[Any] = [None] * len(tasks)
    sizes, done = sizes or [1] * len(tasks), 0
    with progress(title, sum(sizes)) as advance:
        for task, answer in run(engine, function, tasks):
            n = place[id(task)]
            answers[n], done = answer, done + sizes[n]
            advance(done, "")
    return answers


def _refuse_strangers(folder: Path) -> None:
    strangers = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith(".")) if folder.is_dir() else []
    if strangers and SETTINGS not in strangers:
        raise StoreError(f"'{folder}' is no store but holds {', '.join(strangers[:3])}; give a new or an empty folder")


def published_views(reinforcements: Reinforcements, teachers: list[TeacherFacts], asked: int = 16) -> int:
    """How many views most of the first samples have. Raises StoreError when none of them can be read."""
    found: Counter[int] = Counter()
    damaged = "they are empty"
    for number in range(min(asked, len(reinforcements))):
        try:
            sample = read_sample(reinforcements.members(number), [fact.dim for fact in teachers], [fact.name for fact in teachers])
            found[len(sample.boxes)] += 1
        except DamagedSampleError as error:
            damaged = str(error)
    if not found:
        raise StoreError(f"none of {min(asked, len(reinforcements))} published samples that were tried can be used: {damaged}")
    return max(found, key=lambda views: (found[views], views))


# ---------------------------------------------------------------- plan


def _settings(config: ImportConfig, teachers: list[TeacherFacts], views: int, fingerprint: str, surveys: list[ShardSurvey]) -> dict[str, Any]:
    """Everything that decides the bytes of the store."""
    return json.loads(json.dumps({
        "import": "DataCompDR", "published": fingerprint, "augmentations": views, "augmentation": AUGMENTATION, "captions": config.captions,
        "captioner": config.captioner, "changed": config.changed, "language": config.language, "dtype": config.dtype, "part_rows": config.part_rows,
        "teachers": [dataclasses.asdict(fact) for fact in teachers], "pairs": {survey.name: survey.sha256 for survey in surveys},
    }))  # fmt: skip


def _plan(
    config: ImportConfig, surveys: list[ShardSurvey], reinforcements: Reinforcements, teachers: list[TeacherFacts], views: int, fingerprint: str
) -> list[ImportTask]:
    """One task a run of `part_rows` rows inside one shard; an empty shard has none."""
    tasks: list[ImportTask] = []
    start = 0
    for survey in surveys:
        for n, first in enumerate(range(0, survey.samples, config.part_rows)):
            tasks.append(ImportTask(
                path=str(Path(config.store) / f"{survey.name}.{n:04d}.safetensors"), shard=survey.path, first=first,
                stop=min(first + config.part_rows, survey.samples), row=start + first, found=survey.found, reinforcements=reinforcements,
                dims=tuple(fact.dim for fact in teachers), teachers=tuple(fact.name for fact in teachers), views=views, captions=config.captions,
                captioner=config.captioner, language=config.language, keep_changed=config.changed == "keep", dtype=config.dtype,
                metadata={"settings_sha256": fingerprint, "shard": survey.name, "part": str(n), "input_sha256": survey.sha256, "format": "mclip-store"},
            ))  # fmt: skip
        start += survey.samples
    return tasks


def _refuse_repeated_keys(surveys: list[ShardSurvey]) -> None:
    hashes = np.concatenate([survey.key_hashes for survey in surveys])
    values, counts = np.unique(hashes, return_counts=True)
    for value in values[counts > 1][:1]:
        homes = [survey.path.name for survey in surveys if value in survey.key_hashes]
        raise PairsError(f"the pairs shards {' and '.join(homes[:2])} hold a sample of the same key; keys must be unique in a pairs folder: rename or remove one")


def _refuse_strays(folder: Path, tasks: list[ImportTask]) -> None:
    strays = {path.name for path in folder.glob("*.safetensors")} - {Path(task.path).name for task in tasks}
    if strays:
        raise StoreError(f"store '{folder}' holds the part '{min(strays)}', which these pairs do not explain; remove it or give another folder")


# ---------------------------------------------------------------- index


def _index(
    config: ImportConfig, settings: dict[str, Any], teachers: list[TeacherFacts], views: int, surveys: list[ShardSurvey], parts: list[PartDone],
    reinforcements: Reinforcements, cuts: list[str],
) -> dict[str, Any]:  # fmt: skip
    rows, pairs = sum(part.entry["rows"] for part in parts), sum(survey.samples for survey in surveys)
    counts: Counter[str] = Counter()
    for part in parts:
        counts.update(part.counts)
    skipped = [entry for part in parts for entry in part.skipped]
    if not rows:
        raise PairsError(
            f"none of the {pairs} pairs of '{config.pairs}' has a usable reinforcement; "
            + (f"the first: '{skipped[0]['key']}', {skipped[0]['reason']}" if skipped else "they are empty")
            + ("; if they were resized after the download, import with --changed keep" if counts["changed image"] else "")
        )
    seen = np.zeros(len(reinforcements), bool)
    for survey in surveys:
        found = np.load(survey.found)
        seen[found[found >= 0]] = True
    used = int(seen.sum())
    reach = counts.pop("reach", 0.0) / rows
    tables, fingerprint = tables_of(config.captioner, config.language), hash_of(settings)
    captioner = {"name": config.captioner, "source": "DataCompDR", "licence": LICENCE}
    layer = {
        "number": 0, "kind": "rows", "views": [0, views], "teachers": list(range(len(teachers))), "settings_sha256": fingerprint, "augmentation": AUGMENTATION,
        "augmentations": views, "seed": None, "captioner": captioner,
    }  # fmt: skip
    entries = iter(parts)
    listed = [
        {**next(entries).entry, "shard": survey.name, "part": n, "input_sha256": survey.sha256}
        for survey in surveys for n in range(-(-survey.samples // config.part_rows))
    ]  # fmt: skip
    coverage = {
        "pairs": pairs, "rows": rows, "skipped": pairs - rows, "reasons": {reason: int(counts[reason]) for reason in REASONS if counts[reason]},
        "changed_image_kept": int(counts["changed image, kept"]), "unusable_members": sum(survey.rejected for survey in surveys), "reinforcements": reinforcements.different,
        "reinforcements_without_picture": reinforcements.different - used, "boxes_reach": round(float(reach), 4),
    }  # fmt: skip
    return {
        "rows": rows, "dtype": config.dtype, "seed": None, "teachers": [dataclasses.asdict(fact) for fact in teachers], "captioner": captioner,
        "augmentation": AUGMENTATION, "augmentations": views, **tables, "layers": [layer],
        "columns": {"similarity": {"version": 1, "dtype": "float32", "about": "mean over teachers of the cosine between the mean view and caption 0"}},
        "coverage": coverage, "skipped": skipped[:LISTED], "shards": settings["pairs"], "parts": listed, "settings_sha256": fingerprint,
        "import": {"from": "DataCompDR", "licence": LICENCE, "published": settings["published"], "warnings": _warnings(coverage, cuts)}, "figures": {},
    }  # fmt: skip


def _warnings(coverage: dict[str, Any], cuts: list[str]) -> list[str]:
    out = [f"a published shard ends early, what lies before is imported: {cut}" for cut in cuts[:LISTED]]
    if coverage["boxes_reach"] < 0.75:
        out.append(
            f"the published boxes reach over {100 * coverage['boxes_reach']:.0f} % of the pictures only; they are likely smaller or larger copies of what the "
            "teachers saw, and KEY.json does not tell the original size"
        )
    if coverage["reasons"].get("changed image", 0) > coverage["rows"]:
        out.append(
            "more pictures have another sha256 than the published one than not; when they were resized after the download and KEY.json has no sha256, "
            "import into another folder with --changed keep"
        )
    return out


def _figures(index: dict[str, Any], parts: list[PartDone], seconds: float, config: ImportConfig) -> dict[str, Any]:
    fresh = sum(part.entry["rows"] for part in parts if part.fresh)
    size = sum(part.entry["bytes"] for part in parts)
    return {
        "seconds": round(seconds, 2), "workers": config.workers, "pairs_imported": fresh, "pairs_found_done": index["rows"] - fresh,
        "samples_per_second": round(fresh / seconds, 2), "bytes": size, "bytes_per_sample": round(size / index["rows"], 1),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
