"""Changes that get past the first check of a format: values in a JSON document, records in lines, fields of a tar header with its checksum made right."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any

Mutate = Callable[[bytes, int], bytes]
"""Bytes and the largest size -> other bytes; libFuzzer's own."""

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**53, 2**63, 2**64, -(2**63), 10**30, 1e308, 0.5, float("nan"), float("inf"), "", "a", "../x", "/etc/passwd", "\0", "\ud800", "é" * 40,
    "9" * 400, [], {}, [[]], [0], [""], {"": None}, [1] * 300, "0" * 64,
)  # fmt: skip


def _places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Every (container, key) below a value."""
    for key, below in list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()):
        found.append((value, key))
        _places(below, found)
    return found


def change_json(document: Any, rng: random.Random) -> Any:
    """One to three places get another value, go, move or are doubled."""
    for _ in range(rng.randint(1, 3)):
        places = _places(document, [])
        if not places:
            return rng.choice(ODD)
        holder, key = rng.choice(places)
        kind = rng.randrange(6)
        if kind == 0:
            holder.pop(key)
        elif kind == 1:
            other, from_ = rng.choice(places)
            if isinstance(holder, dict) and from_ in (other if isinstance(other, dict) else range(len(other))):
                holder[key] = json.loads(json.dumps(other[from_]))
        elif kind == 2 and isinstance(holder, list):
            holder.insert(key, json.loads(json.dumps(holder[key])))
        elif kind == 2 and isinstance(holder, dict):
            holder[f"{key}x"] = holder[key]
        elif kind == 3 and isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
            holder[key] = rng.choice([holder[key] + 1, -holder[key], holder[key] * 2, float(holder[key]), str(holder[key])])
        elif kind == 4 and isinstance(holder[key], str):
            text = holder[key]
            at = rng.randint(0, len(text))
            holder[key] = rng.choice([text[:at], text[at:], text + text, text[:at] + rng.choice(["/", "..", "\0", "é", "%s", "\n"]) + text[at:]])
        else:
            holder[key] = json.loads(json.dumps(rng.choice(ODD)))
    return document


def of_json(data: bytes, size: int, seed: int, mutate: Mutate) -> bytes:
    """A document changed as a document, one time in eight as bytes."""
    rng = random.Random(seed)
    if rng.randrange(8):
        try:
            return json.dumps(change_json(json.loads(data), rng)).encode()[:size]
        except (ValueError, RecursionError, TypeError, OverflowError, AttributeError, IndexError, KeyError):
            pass
    return mutate(data, size)


def of_lines(data: bytes, size: int, seed: int, mutate: Mutate) -> bytes:
    """One line of a JSON-lines file changed."""
    rows = data.split(b"\n")
    rng = random.Random(seed)
    at = rng.randrange(len(rows))
    rows[at] = of_json(rows[at], size, rng.getrandbits(30), mutate)
    return b"\n".join(rows)[:size]


def of_tensors(data: bytes, size: int, seed: int, mutate: Mutate) -> bytes:
    """A safetensors header changed as the document it is, and its length made right; or the file as bytes."""
    rng = random.Random(seed)
    (length,) = struct.unpack("<Q", data[:8].ljust(8, b"\0"))
    if not rng.randrange(4) or not 0 < length <= len(data) - 8:
        return mutate(data, size)
    header = of_json(data[8 : 8 + length], size, rng.getrandbits(30), mutate)
    return (struct.pack("<Q", len(header)) + header + data[8 + length :])[:size]


def of_tar(data: bytes, size: int, seed: int, mutate: Mutate) -> bytes:
    """Bytes changed, then the checksum of whatever still looks like a header made right."""
    changed = bytearray(mutate(data, size))
    for start in range(0, len(changed) - 511, 512):
        header = changed[start : start + 512]
        if header[257:262] == b"ustar":
            header[148:156] = b" " * 8
            changed[start + 148 : start + 156] = b"%06o\0 " % sum(header)
    return bytes(changed)


def of_bytes(data: bytes, size: int, seed: int, mutate: Mutate) -> bytes:
    """As libFuzzer does it."""
    return mutate(data, size)
