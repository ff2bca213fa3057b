"""From a list of shards to the tasks of a reinforcement: scans first, then keys that come twice, then one task a part."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from distill.engines import Engine, run
from distill.progress import progress
from distill.reinforce_captions import CaptionPlan, captions_for
from distill.reinforce_tasks import PartTask, ScanTask, ShardScan, TextTask
from distill.reinforce_worker import TEXTS_PER_FILE, embed_texts, key_hash, scan_shard, text_path
from distill.remote import ShardPlace, fetch_shard, is_remote, open_shards
from runtime.errors import PairsError
from runtime.pairs import duplicate
from runtime.tar_index import index_shard

logger = logging.getLogger(__name__)

SCANNED_HERE = 256 << 20
"""Bytes of pairs up to which they are hashed in this process: starting workers would take longer."""
POOLED_PAIRS = 200_000
"""Pairs up to which each different text is embedded once for all of them; beyond, once a part. The bytes do not depend on it."""


def scan(places: list[ShardPlace], work: Path, given: str, engine: Engine) -> list[ShardScan]:
    """Index and hash every shard, and find keys that stand in two of them. In the order of `places`. Raises PairsError."""
    here = sum(place.bytes for place in places) <= SCANNED_HERE and not any(is_remote(place.url) for place in places)
    if here:
        found = {place.name: scan_shard(ScanTask(place=place, given=given)) for place in places}
    else:
        (work / "scans").mkdir(parents=True, exist_ok=True)
        tasks = [ScanTask(place=place, given=given, stash=str(work / "scans" / f"{place.name}.safetensors")) for place in places]
        found = {}
        with progress("shards", len(places)) as advance:
            for task, answer in run(engine, scan_shard, tasks):
                found[task.place.name] = answer
                advance(len(found), "shards indexed and hashed")
    scans = [found[place.name] for place in places]
    drop_duplicates(scans, places)
    if not any(len(one.key_hashes) for one in scans):
        raise PairsError(f"the shards of {Path(places[0].url).parent} hold no usable samples; expected members like KEY.jpg and KEY.txt")
    return scans


def drop_duplicates(scans: list[ShardScan], places: list[ShardPlace]) -> None:
    """Mark rows whose key stands in an earlier shard. Only shards in which a hash comes twice are read again."""
    hashes = np.concatenate([one.key_hashes for one in scans])
    hashes.sort()
    twice = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
    if not len(twice):
        return
    home: dict[str, str] = {}
    wanted = set(twice.tolist())
    for one, place in zip(scans, places, strict=True):
        if not np.isin(one.key_hashes, twice).any():
            continue
        samples, _, _ = index_shard(fetch_shard(place), strict=False, name=place.name)
        drop = []
        for row, key in enumerate(samples):
            if key_hash(key) in wanted and home.setdefault(key, one.name) != one.name:
                drop.append(row)
                said = duplicate(key, one.name, home[key])
                one.rejected.append({"key": said.key, "shard": said.shard, "reason": said.reason})
        one.drop = tuple(drop)


def usable(one: ShardScan) -> int:
    """Rows of a shard that are numbered: those that are not dropped."""
    return len(one.key_hashes) - len(one.drop)


def tables_of(plan: CaptionPlan, scans: list[ShardScan]) -> dict[str, list[str]]:
    """Names that captions are stored as numbers of: ours first, then those of the given captions by name."""
    sources, languages = ["pairs", *plan.templates], [plan.language]
    sources += sorted({name for one in scans for name in one.sources} - set(sources))
    languages += sorted({name for one in scans for name in one.languages} - set(languages))
    return {"sources": sources, "languages": languages}


class PooledTexts:
    """Every different text of the pairs, embedded once. numbers: per shard and usable row the numbers of its captions' texts."""

    def __init__(self, places: list[ShardPlace], scans: list[ShardScan], plan: CaptionPlan) -> None:
        captions: list[list[list[str]]] = []
        for one, place in zip(scans, places, strict=True):
            dropped = set(one.drop)
            pairs = open_shards([place], place.url, strict=False) if usable(one) else None
            captions.append([_texts(pairs, row, place.name, plan) for row in range(len(one.key_hashes)) if row not in dropped])
        self.texts = sorted({text for shard in captions for row in shard for text in row}, key=lambda text: (len(text), text))
        number = {text: n for n, text in enumerate(self.texts)}
        self.numbers = [[[number[text] for text in row] for row in shard] for shard in captions]

    def embed(self, work: Path, fingerprint: str, engine: Engine, digest: Any) -> float:
        """Embed them into numbered files of the work folder. Returns the workers' processor seconds."""
        work.mkdir(exist_ok=True)
        tasks = []
        for n, start in enumerate(range(0, len(self.texts), TEXTS_PER_FILE)):
            chunk = self.texts[start : start + TEXTS_PER_FILE]
            tasks.append(TextTask(path=str(text_path(work, n)), texts=chunk, metadata={"settings_sha256": fingerprint, "texts_sha256": digest({"texts": chunk})}))
        seconds = 0.0
        with progress("texts", len(tasks)) as advance:
            for n, (_, spent) in enumerate(run(engine, embed_texts, tasks), 1):
                seconds += spent
                advance(n, f"{len(self.texts)} different texts")
        return seconds


def _texts(pairs: Any, row: int, shard: str, plan: CaptionPlan) -> list[str]:
    try:
        return [caption.text for caption in captions_for(pairs, row, shard, plan)]
    except PairsError:
        return []  # the worker meets the same error and says it


def part_tasks(
    places: list[ShardPlace], scans: list[ShardScan], numbers: list[list[list[int]]] | None, folder: Path, part_rows: int, common: dict[str, Any], fingerprint: str
) -> Iterator[PartTask]:
    """One task a run of `part_rows` usable rows inside one shard, in pairs order. common: fields of PartTask that all share."""
    base = 0
    for shard, (one, place) in enumerate(zip(scans, places, strict=True)):
        for n, first in enumerate(range(0, usable(one), part_rows)):
            count = min(part_rows, usable(one) - first)
            yield PartTask(
                place=place, path=str(folder / f"{place.name}.{n:04d}.safetensors"), first=first, count=count, base=base + first, drop=one.drop,
                texts=None if numbers is None else numbers[shard][first : first + count],
                metadata={"settings_sha256": fingerprint, "shard": place.name, "part": str(n), "input_sha256": one.sha256, "format": "mclip-store"}, **common,
            )  # fmt: skip
        base += usable(one)
