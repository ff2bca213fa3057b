"""Writing a sample folder: shard by shard, resumable, the same bytes for the same plan, the receipt last."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runtime.errors import SampleError
from runtime.files import file_sha256, write_json, write_whole
from runtime.pairs import write_shard

logger = logging.getLogger(__name__)

SCHEMA = 1
RECEIPT = "sample.json"
PROGRESS = ".sample-progress.json"

# (shards, advance) -> for each shard the encoded pictures of its samples, in order
Drawer = Callable[[Sequence["PlannedShard"], Callable[[int], None]], Iterator[list[bytes]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedShard:
    """One shard before it is drawn: ``samples`` are (key, {extension: bytes}) without the picture."""

    name: str
    samples: tuple[tuple[str, Mapping[str, bytes]], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Everything that a sample will hold, decided before the first picture is drawn."""

    kind: str
    arguments: dict[str, Any]
    facts: dict[str, Any]
    packages: list[dict[str, Any]]
    tools: dict[str, str]
    shards: list[PlannedShard]
    files: dict[str, bytes] = field(default_factory=dict)
    image_extension: str = "jpg"

    def head(self) -> dict[str, Any]:
        """What a folder must agree with to be this sample."""
        return {"schema": SCHEMA, "kind": self.kind, "arguments": self.arguments, "packages": self.packages}


def write_sample(folder: Path, plan: Plan, draw: Drawer, advance: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Write what is missing of a planned sample and return the receipt, with ``already_complete`` added.

    A shard counts as done when its sha256 is the recorded one; a damaged or missing one is written again. Raises SampleError
    when the folder belongs to another sample or to something else.
    """
    recorded, complete = _recorded(folder, plan)
    done = {name: facts for name, facts in recorded.items() if _sha256(folder / name) == facts["sha256"]}
    todo = [shard for shard in plan.shards if shard.name not in done]
    stale = [name for name, data in plan.files.items() if _sha256(folder / name) != hashlib.sha256(data).hexdigest()]
    if complete and not todo and not stale:
        return {**_read(folder / RECEIPT), "already_complete": True}
    try:
        for inner in {Path(name).parent for name in (*(shard.name for shard in plan.shards), *plan.files)}:
            (folder / inner).mkdir(parents=True, exist_ok=True)
        (folder / RECEIPT).unlink(missing_ok=True)
        write_json(folder / PROGRESS, {**plan.head(), "shards": done})
        _write_shards(folder, plan, todo, done, draw, advance)
        for name, data in plan.files.items():
            write_whole(folder / name, data)
        receipt = {
            **plan.head(),
            **plan.facts,
            "tools": plan.tools,
            "shards": {shard.name: done[shard.name] for shard in plan.shards},
            "files": {name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)} for name, data in plan.files.items()},
        }
        write_json(folder / RECEIPT, receipt)
        (folder / PROGRESS).unlink(missing_ok=True)
    except OSError as error:
        raise SampleError(f"the sample cannot be written to {folder} ({error.strerror or error}); free some space or choose another folder") from error
    return {**receipt, "already_complete": False}


def _write_shards(
    folder: Path,
    plan: Plan,
    todo: Sequence[PlannedShard],
    done: dict[str, Any],
    draw: Drawer,
    advance: Callable[[int, int], None] | None,
) -> None:
    if not todo:
        return
    total = sum(len(shard.samples) for shard in todo)
    drawn = 0

    def count(pictures: int) -> None:
        nonlocal drawn
        drawn += pictures
        if advance is not None:
            advance(drawn, total)

    pictures = draw(todo, count)
    try:
        for shard, images in zip(todo, pictures, strict=True):
            samples = ((key, {**members, plan.image_extension: image}) for (key, members), image in zip(shard.samples, images, strict=True))
            facts = write_shard(folder / shard.name, samples)
            done[shard.name] = {"sha256": facts.sha256, "bytes": facts.bytes, "pairs": facts.samples}
            write_json(folder / PROGRESS, {**plan.head(), "shards": done})
    finally:
        close = getattr(pictures, "close", None)
        if close is not None:
            close()  # stops the drawing processes at once when writing failed or was interrupted


def _recorded(folder: Path, plan: Plan) -> tuple[dict[str, Any], bool]:
    """The shards that the folder's receipt or progress file claims, and whether it claims to be complete."""
    if folder.exists() and not folder.is_dir():
        raise SampleError(f"{folder} is a file, expected a folder to write the sample to; choose another name")
    for name, complete in ((RECEIPT, True), (PROGRESS, False)):
        if not (folder / name).exists():
            continue
        found = _read(folder / name)
        for part, wanted in plan.head().items():
            if found.get(part) != json.loads(json.dumps(wanted)):
                raise SampleError(
                    f"{folder} already holds another sample: its {part} {_differs(found.get(part), wanted)}; choose another folder or remove this one"
                )
        planned = {shard.name for shard in plan.shards}
        return {name: facts for name, facts in found.get("shards", {}).items() if name in planned}, complete
    if folder.exists() and any(not entry.name.endswith(".part") for entry in folder.iterdir()):
        raise SampleError(f"{folder} is not empty and holds no {RECEIPT}; choose an empty or new folder for the sample")
    return {}, False


def _differs(found: Any, wanted: Any) -> str:
    if isinstance(found, dict) and isinstance(wanted, dict):
        parts = [f"{name} is {found.get(name)}, asked for {value}" for name, value in wanted.items() if found.get(name) != value]
        return "differ (" + "; ".join(parts) + ")" if parts else "differ"
    if isinstance(found, list):
        return "differ from the pinned ones of this version"
    return f"is {found}, expected {wanted}"


def _read(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise SampleError(f"{path} cannot be read ({error}); remove the folder and make the sample again") from error
    if not isinstance(facts, dict):
        raise SampleError(f"{path} is not one JSON object; remove the folder and make the sample again")
    return facts


def _sha256(path: Path) -> str | None:
    try:
        return file_sha256(path)
    except OSError:
        return None
