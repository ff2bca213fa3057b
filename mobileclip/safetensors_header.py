"""The header of a safetensors file, read and checked without tensors and without torch.

Format: 8 bytes little-endian header length, a JSON object of name -> {dtype, shape, data_offsets}, then the tensors' bytes
without gaps (safetensors, format description 0.4). A header is data from elsewhere: every number in it is checked against the
file before anything is read by it.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from runtime.errors import CheckpointError

DTYPES = {
    "BOOL": ("bool", 1), "U8": ("uint8", 1), "I8": ("int8", 1), "U16": ("uint16", 2), "I16": ("int16", 2), "U32": ("uint32", 4), "I32": ("int32", 4),
    "U64": ("uint64", 8), "I64": ("int64", 8), "F16": ("float16", 2), "BF16": ("bfloat16", 2), "F32": ("float32", 4), "F64": ("float64", 8),
    "F8_E4M3": ("float8_e4m3fn", 1), "F8_E5M2": ("float8_e5m2", 1), "C64": ("complex64", 8),
}  # fmt: skip
"""Name in the file -> torch's name, bytes of one value."""

MAX_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library."""

_AGAIN = "download it again, or ask its author for a whole one"


@dataclass(frozen=True, slots=True)
class Entry:
    """What a weights file says about one tensor."""

    dtype: str
    """torch's name: "float32", "float16", "int64" …"""
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, Entry]:
    """Names, dtypes and shapes of a safetensors file, in the order of their bytes.

    Raises:
        CheckpointError: the header is not one, or does not fit the file: cut off, gaps, overlaps, a length that no dtype and
            shape explain.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(
                f"'{path}' is cut off or no safetensors file: its header should take {length:,} bytes after the first 8, the file has {size:,}; {_AGAIN}"
            )
        if length > MAX_HEADER:
            raise CheckpointError(f"'{path}' has a safetensors header of {length:,} bytes, at most {MAX_HEADER:,} are read; {_AGAIN}")
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"'{path}' has a safetensors header that is not JSON ({_first_line(error)}); {_AGAIN}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"'{path}' has a safetensors header that is a {type(header).__name__}, expected an object of tensors; {_AGAIN}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"'{path}' has a safetensors header whose __metadata__ is not an object of strings; {_AGAIN}")
    spans = sorted((*_span(path, name, facts), name) for name, facts in header.items())
    _check_spans(path, spans, size - 8 - length)
    return {name: Entry(DTYPES[header[name]["dtype"]][0], tuple(header[name]["shape"])) for _, _, name in spans}


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands in it twice")
    return found


def _span(path: Path, name: str, facts: Any) -> tuple[int, int]:
    """First byte and end of one tensor, checked against its dtype and shape."""
    dtype, shape, offsets = (facts.get(key) for key in ("dtype", "shape", "data_offsets")) if isinstance(facts, dict) else (None, None, None)
    if not isinstance(dtype, str) or not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise CheckpointError(f"'{path}' has a safetensors header without dtype, shape and two data_offsets for '{name}'; {_AGAIN}")
    if dtype not in DTYPES:
        raise CheckpointError(f"'{path}' holds '{name}' as {dtype}, a dtype that is not read here; known are {', '.join(DTYPES)}; convert it to F32")
    begin, end = offsets
    expected = math.prod(shape) * DTYPES[dtype][1]
    if end - begin != expected:
        raise CheckpointError(
            f"'{path}' has a safetensors header that contradicts itself: '{name}' is {dtype} {tuple(shape)}, which takes {expected:,} bytes, "
            f"and its data_offsets span {end - begin:,}; {_AGAIN}"
        )
    return begin, end


def _counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_spans(path: Path, spans: list[tuple[int, int, str]], available: int) -> None:
    """Tensors lie one behind the other and end where the file ends."""
    reached, before = 0, ""
    for begin, end, name in spans:
        if begin != reached:
            what = f"'{name}' overlaps '{before}'" if begin < reached else f"there is a gap of {begin - reached:,} bytes before '{name}'"
            raise CheckpointError(f"'{path}' has a safetensors header that lies: {what}, expected tensors one behind the other; {_AGAIN}")
        reached, before = end, name
    if reached > available:
        raise CheckpointError(f"'{path}' is cut off: its tensors take {reached:,} bytes after the header, {available:,} are there; {_AGAIN}")
    if reached < available:
        raise CheckpointError(
            f"'{path}' has {available - reached:,} bytes behind its last tensor, which the safetensors header does not mention; {_AGAIN}"
        )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
