"""Whether a reinforcement store is what was written: every byte, or a sample of its rows. Format: docs/store-format.md (normative).

A part's sha256 tells that something changed, the checksum of each row what.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from runtime.errors import StoreError
from runtime.files import file_sha256
from runtime.store_index import Layer, layers_of, parts_by_layer, read_index
from runtime.store_parts import CHECKSUMS, Part, array_checksums, check_part, row_checksums

_NAMED = 3
"""Damaged rows that a message names; it counts the others."""


@dataclass(kw_only=True, slots=True)
class Verified:
    """What was compared: whole files by their sha256, or rows by their checksums."""

    files: int = 0
    rows: int = 0
    bytes: int = 0
    damage: list[str] = field(default_factory=list)
    """One sentence a damaged part."""


def verify_store(path: Path, sample: float | None = None, seed: int = 0) -> Verified:
    """Compare every part with its sha256, or a share of the rows of every part with their checksums.

    Args:
        sample: None for all bytes, or the share of rows, 0 to 1 (at least one row a part), drawn with `seed`.

    Raises:
        StoreError: something changed. The message names the first damaged part with its shard and rows (number and key), and how many more.
    """
    found = find_damage(path, sample, seed)
    if found.damage:
        more = f"; {len(found.damage) - 1} more parts are damaged" if len(found.damage) > 1 else ""
        raise StoreError(f"{found.damage[0]}{more}; run the same mclip reinforce again, which replaces them")
    return found


def find_damage(path: Path, sample: float | None = None, seed: int = 0) -> Verified:
    """`verify_store` that goes on after damage and lists all of it. Raises StoreError only when the index is unusable."""
    if sample is not None and not 0 < sample <= 1:
        raise StoreError(f"a sample of {sample} of the rows cannot be drawn; expected a share above 0, at most 1")
    index = read_index(path)
    layers, found, rng = layers_of(index), Verified(), np.random.default_rng(seed)
    for entries in parts_by_layer(index):
        for entry, layer in zip(entries, layers, strict=True):
            wanted = None if sample is None else np.sort(rng.choice(entry["rows"], math.ceil(sample * entry["rows"]), replace=False))
            try:
                _verify_part(path, entry, layer, index, wanted, found)
            except StoreError as error:
                found.damage.append(str(error).split("; ")[0])
                continue
            found.files += sample is None
    return found


def _verify_part(folder: Path, entry: dict[str, Any], layer: Layer, index: dict[str, Any], wanted: np.ndarray | None, found: Verified) -> None:
    part = Part(folder / entry["path"])
    if wanted is not None:
        check_part(part, entry, layer, index)
        found.rows += len(wanted)
        found.bytes += int(part.bytes * len(wanted) / entry["rows"]) if entry["rows"] else 0
        bad = wanted[row_checksums(part.arrays, entry["rows"], wanted) != part.get(CHECKSUMS)[wanted]]
        if len(bad):
            raise StoreError(_say(folder, part, entry, bad))
        return
    found.rows += entry["rows"]
    found.bytes += part.bytes
    if file_sha256(part.path) != entry["sha256"]:
        raise StoreError(locate_damage(folder, part, entry))
    check_part(part, entry, layer, index)


def locate_damage(folder: Path, part: Part, entry: dict[str, Any]) -> str:
    """What has changed in a part whose sha256 is another than the index says: header, an array that is no row's, or rows with their keys."""
    shard = _shard(entry)
    if hashlib.sha256(part.payload).hexdigest() == part.metadata.get("payload_sha256"):
        return f"store part '{entry['path']}' has changed in its header (shard {shard}), its rows are as they were written"
    try:
        said = json.loads(part.metadata.get("array_crc32", "{}"))
        wrong = [name for name, crc in array_checksums(part.arrays).items() if said.get(name) != crc]
        if wrong:
            return f"store part '{entry['path']}' has changed in {' and '.join(wrong)}, outside its rows (shard {shard})"
        bad = np.flatnonzero(row_checksums(part.arrays, entry["rows"]) != part.get(CHECKSUMS))
    except (ValueError, KeyError, IndexError, AttributeError) as error:
        return f"store part '{entry['path']}' has changed in its header (shard {shard}): its checksums cannot be read ({error})"
    if len(bad):
        return _say(folder, part, entry, bad)
    return f"store part '{entry['path']}' has changed in its header (shard {shard}): all rows have their checksums, but not the hash of the whole"


def _say(folder: Path, part: Part, entry: dict[str, Any], rows: np.ndarray) -> str:
    keys = _keys(folder, part, entry)
    named = ", ".join(f"{row} (key '{keys[row]}')" if row < len(keys) else str(row) for row in rows[:_NAMED].tolist())
    more = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
    return f"store part '{entry['path']}' has changed: shard {_shard(entry)}, row{'s' if len(rows) > 1 else ''} {named}{more} of {entry['rows']}"


def _shard(entry: dict[str, Any]) -> str:
    shard = entry.get("shard")
    return shard if isinstance(shard, str) else entry["path"].rsplit(".", 2 if entry["layer"] == 0 else 3)[0]


def _keys(folder: Path, part: Part, entry: dict[str, Any]) -> list[str]:
    """Keys of a part's rows; a later layer's stand in its base part. None where they cannot be read."""
    try:
        if entry["layer"]:
            part = Part(folder / f"{entry['path'].rsplit('.', 2)[0]}.safetensors")
        data, offsets = part.get("keys.bytes").tobytes(), part.get("keys.offsets").tolist()
        return [data[a:b].decode(errors="replace") for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
    except StoreError:
        return []
