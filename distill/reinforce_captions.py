"""Which captions a pair enters the store with: its own, phrases around it, and those that a captions file gives for its key."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from distill.captions import Caption, captions_of, open_captions
from runtime.errors import PairsError
from runtime.pairs import Pairs


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionPlan:
    """templates: phrases around the pair's own caption; language: of that caption; given: captions made elsewhere ("" for none)."""

    templates: tuple[str, ...] = ()
    language: str = "en"
    given: str = ""


def captions_for(pairs: Pairs, row: int, shard: str, plan: CaptionPlan) -> list[Caption]:
    """The captions of one pair, at least one; caption 0 is its own or, where it has none, the first given one.

    Raises:
        PairsError: it has neither, or its own is not UTF-8. The sentence is the reason for which the pair is left out.
    """
    text = pairs.caption(row) if pairs.has_caption(row) else ""
    own = captions_of(text, plan.templates, plan.language) if text.strip() else []
    more = given_captions(plan.given, shard, pairs.keys[row], len(own)) if plan.given else []
    if not own and not more:
        what = "its caption is empty" if pairs.has_caption(row) else f"it has no caption ({pairs.keys[row].rpartition('/')[2]}.txt)"
        raise PairsError(f"sample '{pairs.keys[row]}' of {shard}.tar: {what}, and none is given for it; add one, or give --captions")
    return own + more


def given_captions(path: str, shard: str, key: str, before: int) -> list[Caption]:
    """What a captions file says of a key, parents renumbered for a list in which `before` captions stand first."""
    from distill.caption_files import renumbered

    found = _open(path, shard).get(key)
    if not before:  # the pair's own caption, parent 0 of the file, is not there
        found = [dataclasses.replace(caption, parent=-1) if caption.parent == 0 else caption for caption in found]
    return renumbered(found, before)


def names_in(path: str, shard: str, keys: list[str]) -> tuple[set[str], set[str]]:
    """Sources and languages of the captions that a file gives for these keys."""
    found = [caption for key in keys for caption in _open(path, shard).get(key)]
    return {caption.source for caption in found}, {caption.language for caption in found}


def caption_facts(path: str) -> dict[str, Any]:
    """What a store says of a captions file: captioner, licence, sha256. Of a folder only the receipt is read.

    Raises:
        PairsError: it is none, or it did not become finished.
    """
    folder = Path(path)
    if not folder.is_dir():
        facts = open_captions(path).facts
        return {name: facts[name] for name in ("captioner", "licence", "captioner_sha256", "sha256") if name in facts}
    try:
        receipt = json.loads((folder / "receipt.json").read_text(encoding="utf-8"))
        files = {name: facts["sha256"] for name, facts in receipt["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        open_captions(path)  # says what is wrong with it
        raise PairsError(f"the captions folder '{path}' has a receipt without hashes; run mclip caption again") from None
    listed = "".join(f"{name} {digest}\n" for name, digest in sorted(files.items()))
    told = receipt.get("captioner")
    captioner: dict[str, Any] = told if isinstance(told, dict) else {}
    return {
        "captioner": str(captioner.get("name", folder.name)), "licence": str(captioner.get("licence", "unknown")),
        "captioner_sha256": str(captioner.get("sha256", "")), "sha256": hashlib.sha256(listed.encode()).hexdigest(),
    }  # fmt: skip


@lru_cache(maxsize=4)
def _open_part(path: str, state: int) -> Any:
    return open_captions(path)


def _state(path: Path) -> int:
    """Changes when the file does, so that a process does not answer from what it read before."""
    file = path / "receipt.json" if path.is_dir() else path
    return file.stat().st_mtime_ns if file.exists() else 0


def _open(path: str, shard: str) -> Any:
    """The file of this shard where a folder has one (its hash checked against the receipt), else all of it."""
    own = Path(path) / f"{shard}.jsonl"
    if not own.is_file():
        return _open_part(path, _state(Path(path)))
    receipt = _receipt(path, _state(Path(path)))
    found = _open_part(str(own), _state(own))
    if (expected := receipt.get(own.name)) != found.facts["sha256"]:
        raise PairsError(f"{own} has changed since it was written: its sha256 is {found.facts['sha256'][:16]}…, the receipt says {str(expected)[:16]}…; caption again")
    return found


@lru_cache(maxsize=4)
def _receipt(path: str, state: int) -> dict[str, str]:
    data = json.loads((Path(path) / "receipt.json").read_text(encoding="utf-8"))
    return {name: facts["sha256"] for name, facts in data["files"].items()}
