"""A small share of a pairs folder, chosen by the hash of the key, written as a pairs folder of its own.

The choice depends on the keys alone: not on shards, order, or machine. A larger share contains the smaller one, so a pilot can be
repeated with more pairs and still speaks of the same ones.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from runtime.errors import PairsError
from runtime.files import write_json
from runtime.pairs import Pairs, write_shard

SHARD_ROWS = 2048
FACTS = "subset.json"


def key_order(key: str) -> bytes:
    """Where a key stands among all keys: 16 bytes, compared as they are."""
    return hashlib.sha256(b"mclip pilot\0" + key.encode()).digest()[:16]


def choose(keys: Sequence[str], count: int) -> list[int]:
    """Rows of the `count` keys of smallest hash, in rising order.

    >>> set(choose(["a", "b", "c", "d"], 2)) <= set(choose(["a", "b", "c", "d"], 3))
    True
    """
    ranked = sorted(range(len(keys)), key=lambda row: key_order(keys[row]))
    return sorted(ranked[:count])


def subset_size(total: int, fraction: float, count: int | None, least: int) -> int:
    """How many pairs the pilot reads: `count` where it is given, else the share, rounded up.

    Raises:
        PairsError: more than there are, or less than `least`, with which nothing can be learnt.
    """
    size = count if count is not None else math.ceil(fraction * total - 1e-9)
    if size > total:
        raise PairsError(f"--pairs asks for {size} pairs and the folder holds {total}; ask for fewer")
    if size < least:
        asked = f"{size} pairs" if count is not None else f"{100 * fraction:g} % of {total} pairs are {size}"
        room = f"give --pairs {least} or more" if total >= least else f"the folder has only {total}: a pilot is not for data of this size, train on all of it"
        raise PairsError(f"{asked}, too few for a pilot, which needs {least} (four batches); {room}")
    return size


def refuse_overlap(pairs: Pairs, validation: Pairs) -> None:
    """Raises PairsError when a key of the validation pairs is also one of the training pairs."""
    known = set(pairs.keys)
    shared = [key for key in validation.keys if key in known]
    if shared:
        raise PairsError(
            f"the validation pairs share {len(shared)} of their {len(validation)} keys with the training pairs, the first '{shared[0]}'; "
            "recall on pairs that were trained on decides nothing: give pairs that are held out"
        )


def write_subset(pairs: Pairs, rows: Sequence[int], folder: Path) -> dict[str, Any]:
    """Write these rows as shards of a new pairs folder, unless they are there already. Pairs without a usable caption are left out.

    Returns:
        JSON-ready {"pairs", "of", "left_out": [{"key", "reason"}], "bytes", "keys_sha256"}.
    """
    path = folder / FACTS
    keys_sha256 = hashlib.sha256("".join(f"{pairs.keys[row]}\n" for row in rows).encode()).hexdigest()
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if found["keys_sha256"] == keys_sha256:
            return found
    folder.mkdir(parents=True, exist_ok=True)
    left_out: list[dict[str, str]] = []
    bytes_written = 0
    for number, start in enumerate(range(0, len(rows), SHARD_ROWS)):
        bytes_written += write_shard(folder / f"pilot-{number:05}.tar", _samples(pairs, rows[start : start + SHARD_ROWS], left_out)).bytes
    facts = {"pairs": len(rows) - len(left_out), "of": len(pairs), "left_out": left_out, "bytes": bytes_written, "keys_sha256": keys_sha256}
    write_json(path, facts)
    return facts


def _samples(pairs: Pairs, rows: Sequence[int], left_out: list[dict[str, str]]) -> Iterator[tuple[str, dict[str, bytes]]]:
    for row in rows:
        try:
            members = {_extension(pairs.image_bytes(row)): pairs.image_bytes(row), "txt": pairs.caption(row).encode()}
            if meta := pairs.meta(row):
                members["json"] = json.dumps(meta, ensure_ascii=False).encode()
        except PairsError as error:
            left_out.append({"key": pairs.keys[row], "reason": str(error)})
            continue
        yield pairs.keys[row], members


def _extension(data: bytes) -> str:
    """By the first bytes; a picture of another kind keeps the name jpg, which readers do not take at its word."""
    if data.startswith(b"\x89PNG"):
        return "png"
    return "webp" if data[8:12] == b"WEBP" else "jpg"


