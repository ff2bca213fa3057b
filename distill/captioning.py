"""mclip caption: run a captioner over a pairs folder, shard by shard, into a captions folder.

    mclip caption PAIRS OUT --captioner prefix:CAPTIONER --captions-per-image 5
    mclip reinforce PAIRS STORE --captions OUT …

The same pairs, captioner and settings give the same bytes of every shard's file, however often the command was killed: what is done is
kept, and the randomness of a caption is a function of (seed, key, caption number). `receipt.json` is written last.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import importlib.metadata
import json
import logging
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from distill.caption_cleaning import cleaned
from distill.caption_files import RECEIPT
from distill.captioners import Captioner, CaptionerOptions, Draft, Request, check_drafts, open_captioner
from distill.nucleus import Sampling, uniforms
from distill.progress import progress
from distill.store_writing import hash_shards
from runtime.errors import PairsError, RecipeError, StoreError
from runtime.files import file_sha256, write_json, write_whole
from runtime.pairs import Pairs, Shard, open_pairs
from runtime.store_index import read_index

logger = logging.getLogger(__name__)

SETTINGS = "settings.json"
WORK = ".work"
KEPT_REASONS = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionConfig:
    """Write captions of PAIRS into the folder OUT."""

    pairs: tyro.conf.Positional[str]
    """Folder of tar shards."""
    out: tyro.conf.Positional[str]
    """Folder to write; one that was interrupted is continued."""
    captioner: str
    """coca:NAME[/PRETRAINED], transformers:NAME_OR_PATH, prefix:CHECKPOINT, rewrite:NAME_OR_PATH, or module:function."""
    captions_per_image: int = 5
    """Captions that are drawn; those that say the same are kept once."""
    top_p: float = 0.9
    """Tokens are drawn from the smallest set with this probability."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token, and every caption of a picture is the same."""
    min_tokens: int = 1
    """A caption does not end before."""
    max_tokens: int = 22
    """Tokens of a caption at most, its end included."""
    first_sentence: bool = False
    """Cut captions after their first sentence."""
    best_of: int = 1
    """Candidates a caption, of which the captioner's teacher keeps those that fit the picture best (prefix captioner only)."""
    store: str = ""
    """Read the pictures' stored embeddings from this store instead of the pictures (prefix captioner only): no teacher sees a picture again."""
    prompt: str | None = None
    """What a model with instructions is told; for rewrite: with {caption} where the caption belongs."""
    language: str = "en"
    """BCP-47 language of the captions."""
    seed: int = 0
    batch: int = 16
    """Pairs at once. Part of the settings: features differ in their last digits between batch sizes."""
    part_rows: int = 256
    """Pairs that a kill can lose."""
    device: str = "cpu"
    """Where transformers' models run."""
    json: bool = False
    """Print one JSON object at the end."""

    def __post_init__(self) -> None:
        if not 1 <= self.captions_per_image <= 64 or not 1 <= self.best_of <= 64 or self.batch < 1 or self.part_rows < 1 or self.seed < 0:
            raise RecipeError(
                f"captions_per_image is {self.captions_per_image}, best_of {self.best_of}, batch {self.batch}, part_rows {self.part_rows}, seed {self.seed}; "
                "expected 1 to 64, 1 to 64, at least 1, at least 1, at least 0"
            )
        self.sampling()

    def sampling(self) -> Sampling:
        return Sampling(top_p=self.top_p, temperature=self.temperature, min_tokens=self.min_tokens, max_tokens=self.max_tokens)


def main(argv: list[str]) -> int:
    """Entry point of `mclip caption`; returns the exit code."""
    config = tyro.cli(CaptionConfig, args=argv, prog="mclip caption", description=__doc__)
    receipt = caption(config)
    counts, figures = receipt["counts"], receipt["figures"]
    if config.json:
        sys.stdout.write(json.dumps({"out": config.out, **counts, **figures}) + "\n")
    else:
        sys.stdout.write(
            f"{config.out}: {counts['captions']} captions of {counts['samples']} pairs by {receipt['captioner']['name']}, {counts['skipped']} pairs skipped, "
            f"{counts['duplicate']} duplicates and {counts['empty']} empty ones dropped; {figures['seconds']:.0f} s, {figures['captions_per_second']:.1f} captions/s\n"
        )
    return 0


def caption(config: CaptionConfig) -> dict[str, Any]:
    """Fill the folder and return its receipt.

    Raises:
        PairsError: the pairs or what lies in the folder cannot be used, or another process writes it.
        RecipeError, CheckpointError, MissingExtraError: the captioner cannot be opened.
    """
    started = time.monotonic()
    pairs = open_pairs(config.pairs)
    folder = Path(config.out)
    inputs = hash_shards(pairs)
    captioner = open_captioner(config.captioner, CaptionerOptions(sampling=config.sampling(), prompt=config.prompt, best_of=config.best_of, device=config.device))
    stored = _stored(config, captioner)
    settings = _settings(config, captioner, inputs)
    fingerprint = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    with _locked(folder):
        _claim(folder, settings)
        done = _finished_shards(folder, fingerprint)
        if len(done) == len(pairs.shards) and (folder / RECEIPT).is_file():
            return json.loads((folder / RECEIPT).read_text(encoding="utf-8"))
        (folder / RECEIPT).unlink(missing_ok=True)
        (folder / WORK).mkdir(exist_ok=True)
        fresh = 0
        with progress("caption", len(pairs), sum(len(pairs.keys[shard.start : shard.stop]) for shard in pairs.shards if shard.name in done)) as advance:
            for shard in pairs.shards:
                if shard.name not in done:
                    done[shard.name] = _caption_shard(config, captioner, pairs, shard, fingerprint, stored, advance)
                    fresh += done[shard.name]["counts"]["captions"]
        receipt = _receipt(config, captioner, pairs, done, fingerprint, time.monotonic() - started, fresh)
        write_json(folder / RECEIPT, receipt)
        shutil.rmtree(folder / WORK, ignore_errors=True)
    return receipt


def _stored(config: CaptionConfig, captioner: Captioner) -> Callable[[str], np.ndarray] | None:
    """What gives a picture's stored vector by key; None where pictures are read."""
    if not config.store:
        return None
    from distill.prefix_writing import PrefixCaptioner, StoredPictures

    if not isinstance(captioner, PrefixCaptioner):
        raise RecipeError(f"captioner '{config.captioner}' looks at pictures; --store goes with prefix:CHECKPOINT alone")
    return StoredPictures(config.store, captioner).vector


def _settings(config: CaptionConfig, captioner: Captioner, inputs: dict[str, str]) -> dict[str, Any]:
    """Everything that decides the bytes of the captions. The device is not among them: identity is promised for one kind of processor."""
    free = {"pairs", "out", "captioner", "json", "part_rows", "device", "store"}
    chosen = {name: value for name, value in dataclasses.asdict(config).items() if name not in free}
    if config.store:
        chosen["store"] = [entry["sha256"] for entry in read_index(Path(config.store))["parts"]]
    return json.loads(json.dumps({**chosen, "captioner": dataclasses.asdict(captioner.facts), "pairs": inputs}))


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Write settings.json into a fresh folder, or compare with the one that is there."""
    path = folder / SETTINGS
    if not path.is_file():
        strangers = sorted(entry.name for entry in folder.iterdir() if entry.name != ".lock" and not entry.name.startswith(f".{SETTINGS}"))
        if strangers:
            raise PairsError(f"'{folder}' is no captions folder but holds {', '.join(strangers[:3])}; give a new or an empty folder")
        write_json(path, settings)
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PairsError(f"'{path}' cannot be read ({error}); remove the folder '{folder}' and run again") from None
    different = [name for name in settings if found.get(name) != settings[name]]
    if different:
        raise PairsError(f"captions '{folder}' were begun with other {', '.join(different)}; give another folder, or remove this one to start anew")


def _finished_shards(folder: Path, fingerprint: str) -> dict[str, dict[str, Any]]:
    """Facts of the shards whose file is there, whole and unchanged."""
    known: dict[str, dict[str, Any]] = {}
    for path in (folder / RECEIPT, *sorted((folder / WORK).glob("*.done.json"))):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if data.get("fingerprint") == fingerprint:
            known |= data["shards"]
    whole = {}
    for name, facts in known.items():
        path = folder / f"{name}.jsonl"
        if path.is_file() and file_sha256(path) == facts["sha256"]:
            whole[name] = facts
        else:
            logger.warning("%s has changed or is gone; its shard is captioned again", path)
    return whole


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".lock").touch()
    except OSError as error:
        raise PairsError(f"captions folder '{folder}' cannot be written ({error.strerror or error}); give another path") from None
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise PairsError(f"another process is writing the captions '{folder}'; wait for it or stop it") from None
        for half in (*folder.glob(".*.part"), *(folder / WORK).glob(".*.part")):  # of a run that was killed while it wrote
            half.unlink()
        yield


# ---------------------------------------------------------------- one shard


Stored = Callable[[str], np.ndarray] | None


def _caption_shard(
    config: CaptionConfig, captioner: Captioner, pairs: Pairs, shard: Shard, fingerprint: str, stored: Stored, advance: Callable[[int, str], None]
) -> dict[str, Any]:
    """Write SHARD.jsonl from parts of `part_rows` rows, and what is said of it beside it."""
    folder = Path(config.out)
    lines: list[str] = []
    counts: Counter[str] = Counter({"samples": 0, "captions": 0})
    skipped: list[dict[str, str]] = []
    # Batches are cut within the shard, whatever the parts: a part is a whole number of batches.
    rows_a_part = -(-config.part_rows // config.batch) * config.batch
    for n, start in enumerate(range(shard.start, shard.stop, rows_a_part)):
        path = folder / WORK / f"{shard.name}.{n:06d}.json"
        part = _read_part(path, fingerprint, rows_a_part)
        if part is None:
            part = _caption_rows(config, captioner, pairs, range(start, min(start + rows_a_part, shard.stop)), stored)
            write_json(path, {"fingerprint": fingerprint, "rows": rows_a_part, **part})
        lines += part["lines"]
        counts.update(part["counts"])
        skipped += [{"shard": shard.name, **entry} for entry in part["skipped"]]
        advance(min(start + rows_a_part, shard.stop), f"{counts['captions']} captions")
    data = "".join(line + "\n" for line in lines).encode()
    write_whole(folder / f"{shard.name}.jsonl", data)
    facts = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data), "counts": dict(sorted(counts.items())), "skipped": skipped}
    write_json(folder / WORK / f"{shard.name}.done.json", {"fingerprint": fingerprint, "shards": {shard.name: facts}})
    for path in (folder / WORK).glob(f"{shard.name}.??????.json"):
        path.unlink()
    return facts


def _read_part(path: Path, fingerprint: str, rows: int) -> dict[str, Any] | None:
    try:
        part = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return part if part.get("fingerprint") == fingerprint and part.get("rows") == rows else None


def _caption_rows(config: CaptionConfig, captioner: Captioner, pairs: Pairs, rows: range, stored: Stored) -> dict[str, Any]:
    """Lines, counts and skipped pairs of some rows."""
    lines, skipped = [], []
    counts: Counter[str] = Counter()
    for start in range(rows.start, rows.stop, config.batch):
        requests = []
        for row in range(start, min(start + config.batch, rows.stop)):
            try:
                requests.append(_request(config, captioner, pairs, row, stored))
            except (PairsError, StoreError) as error:
                skipped.append({"key": pairs.keys[row], "reason": str(error)})
        for request, drafts, reason in _written(captioner, requests):
            if reason is not None:
                skipped.append({"key": request.key, "reason": reason})
                continue
            made, dropped = cleaned(
                drafts, captioner.facts, first_sentence=config.first_sentence, language=config.language, own=request.text
            )
            counts.update(dropped)
            counts["samples"] += 1
            counts["captions"] += len(made)
            entries = [{name: value for name, value in dataclasses.asdict(item).items()} for item in made]
            lines.append(json.dumps({"key": request.key, "captions": entries}, ensure_ascii=False))
    counts["skipped"] = len(skipped)
    return {"lines": lines, "counts": dict(counts), "skipped": skipped}


def _request(config: CaptionConfig, captioner: Captioner, pairs: Pairs, row: int, stored: Stored) -> Request:
    key, reads = pairs.keys[row], captioner.facts.reads
    count = config.captions_per_image * config.best_of
    text = pairs.caption(row) if reads != "picture" else None
    if text == "":
        raise PairsError(f"sample '{key}': its caption is empty, and the captioner reads it")
    return Request(
        key=key, picture=pairs.image(row) if reads != "text" and stored is None else None, text=text, count=config.captions_per_image,
        uniforms=np.stack([uniforms(config.seed, key, number, captioner.most_uniforms) for number in range(count)]), vector=None if stored is None else stored(key),
    )  # fmt: skip


def _written(captioner: Captioner, requests: list[Request]) -> Iterator[tuple[Request, list[Draft], str | None]]:
    """Each request with its drafts, or with the reason why it has none. A picture that breaks the captioner does not take its neighbours along."""
    if not requests:
        return
    try:
        drafts = check_drafts(captioner, requests, captioner.caption(requests))
    except FloatingPointError as error:
        if len(requests) == 1:
            yield requests[0], [], f"sample '{requests[0].key}': {error}"
            return
        for request in requests:
            yield from _written(captioner, [request])
        return
    for request, made in zip(requests, drafts, strict=True):
        yield request, made, None


def _receipt(
    config: CaptionConfig, captioner: Captioner, pairs: Pairs, done: dict[str, dict[str, Any]], fingerprint: str, seconds: float, fresh: int
) -> dict[str, Any]:
    counts: Counter[str] = Counter({"samples": 0, "captions": 0, "skipped": 0, "duplicate": 0, "empty": 0})
    for shard in pairs.shards:
        counts.update(done[shard.name]["counts"])
    if not counts["samples"]:
        first = next(entry["reason"] for shard in pairs.shards for entry in done[shard.name]["skipped"])
        raise PairsError(f"none of the {len(pairs)} pairs of '{pairs.folder}' could be captioned; the first: {first}")
    skipped = [entry for shard in pairs.shards for entry in done[shard.name]["skipped"]]
    for entry in skipped[:KEPT_REASONS]:
        logger.warning("skipped '%s' of shard %s: %s", entry["key"], entry["shard"], entry["reason"])
    facts = dataclasses.asdict(captioner.facts)
    return {
        "schema": 1, "kind": "captions", "stage": "caption", "fingerprint": fingerprint, "captioner": {**facts, **facts.pop("settings"), **dataclasses.asdict(config.sampling()),
        "best_of": config.best_of, "first_sentence": config.first_sentence, "captions_per_image": config.captions_per_image, "seed": config.seed},
        "counts": dict(sorted(counts.items())), "files": {f"{name}.jsonl": {"sha256": facts["sha256"], "bytes": facts["bytes"]} for name, facts in sorted(done.items())},
        "shards": dict(sorted(done.items())), "tools": {package: importlib.metadata.version(package) for package in ("numpy", "tokenizers")},
        "figures": {"seconds": round(seconds, 2), "captions_per_second": round(fresh / max(seconds, 1e-9), 2), "device": config.device},
    }  # fmt: skip
