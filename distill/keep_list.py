"""Keep-lists: which pairs of a folder are used. Plain text that any tool can write and read.

The first line is ``# `` and one JSON object of facts; then follows one key a line, in rising order of its UTF-8 bytes, each once. Keys that
are not in it are left out by whoever honours the list; the pairs themselves are never rewritten.

A list that `write_keep_list` wrote carries the number of its keys and the sha256 of the lines after the first, and is checked against both.
One made by hand may begin with ``# {}``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from runtime.errors import PairsError
from runtime.files import write_whole

FORMAT = "mclip-keep-list"
VERSION = 1
_MAKE = "make it again with mclip curate"


class KeepList:
    """The keys of a keep-list: ``key in keep``, ``len(keep)``, iteration in order, and `mask` for many keys at once.

    Holds the text and 20 bytes a key (less than half of a Python set of the same keys). A key is found by its hash and then compared, so
    that the answer is exact. Pickles as its text.

    Attributes:
        facts: what the first line says: the command's settings, hashes of its inputs, counts.
    """

    def __init__(self, body: bytes, facts: dict[str, Any]) -> None:
        """body: the keys, each followed by a line feed, rising and different (`read_keep_list` checks it)."""
        self._body, self.facts = body, facts
        ends = np.flatnonzero(np.frombuffer(body, np.uint8) == 0x0A)
        self._starts = np.concatenate([[0], ends + 1]).astype(np.int64)
        hashes = np.fromiter((hash(key) for key in self), np.int64, len(ends))
        self._order = np.argsort(hashes, kind="stable").astype(np.int32 if len(ends) < 2**31 else np.int64)
        self._hashes = hashes[self._order]

    def __reduce__(self) -> tuple[Callable[..., KeepList], tuple[bytes, dict[str, Any]]]:
        return (KeepList, (self._body, self.facts))  # Python's string hashes differ between processes: sorted again there

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __iter__(self) -> Iterator[str]:
        for start, stop in zip(self._starts[:-1], self._starts[1:], strict=True):
            yield self._body[start : stop - 1].decode()

    def __contains__(self, key: object) -> bool:
        if not isinstance(key, str):
            return False
        wanted, line = hash(key), key.encode()
        place = int(self._hashes.searchsorted(wanted))
        while place < len(self) and self._hashes[place] == wanted:
            if self._line(int(self._order[place])) == line:
                return True
            place += 1
        return False

    @property
    def keys(self) -> KeepList:
        """The list itself, which answers like a set of its keys."""
        return self

    def mask(self, keys: Iterable[str]) -> np.ndarray:
        """(n,) bool: whether each key is kept."""
        keys = keys if isinstance(keys, list) else list(keys)
        wanted = np.fromiter((hash(key) for key in keys), np.int64, len(keys))
        first, last = np.searchsorted(self._hashes, wanted, side="left"), np.searchsorted(self._hashes, wanted, side="right")
        found = np.zeros(len(keys), bool)
        for n in np.flatnonzero(first < last):
            found[n] = any(self._line(int(place)) == keys[n].encode() for place in self._order[first[n] : last[n]])
        return found

    def _line(self, n: int) -> bytes:
        return self._body[self._starts[n] : self._starts[n + 1] - 1]


def write_keep_list(path: str | os.PathLike[str], keys: Iterable[str], facts: dict[str, Any]) -> Path:
    """Write keys (any order) and facts. The same keys and facts give the same bytes; the file appears whole or not at all.

    Raises:
        PairsError: no key, a key twice, or one that no line can hold.
    """
    lines = sorted(key.encode() for key in keys)
    if not lines:
        raise PairsError(f"the keep-list '{path}' would keep nothing: every pair was dropped; loosen the rules")
    for before, line in zip(lines, lines[1:], strict=False):
        if before == line:
            raise PairsError(f"the keep-list '{path}' was given the key '{line.decode()}' twice; keys must be unique")
    for line in lines:
        if not line or b"\n" in line:
            raise PairsError(f"the key {line.decode()!r} cannot stand on a line of the keep-list '{path}'; rename the sample")
    body = b"\n".join(lines) + b"\n"
    header = {"format": FORMAT, "version": VERSION, "keys": len(lines), "sha256": hashlib.sha256(body).hexdigest(), **facts}
    return write_whole(path, b"# " + json.dumps(header, ensure_ascii=True).encode() + b"\n" + body)


def read_keep_list(path: str | os.PathLike[str]) -> KeepList:
    """Read and check a keep-list.

    Raises:
        PairsError: no such file, no header, no key, keys that are unsorted, doubled, empty or not UTF-8, or a number or hash that
            disagrees with the header.
    """
    try:
        header, _, body = Path(path).read_bytes().partition(b"\n")
    except OSError as error:
        raise PairsError(f"the keep-list '{path}' cannot be read ({error.strerror or error}); make one with mclip curate") from None
    facts = _facts(path, header)
    if not body:
        raise PairsError(f"the keep-list '{path}' holds no key, so nothing would be left; {_MAKE}")
    if not body.endswith(b"\n"):
        raise PairsError(f"the keep-list '{path}' is cut off: its last line has no line feed; {_MAKE}")
    if "sha256" in facts and hashlib.sha256(body).hexdigest() != facts["sha256"]:
        raise PairsError(f"the keep-list '{path}' was changed or cut: its keys do not have the sha256 of its first line; {_MAKE}")
    lines = body[:-1].split(b"\n")
    if "keys" in facts and len(lines) != facts["keys"]:
        raise PairsError(f"the keep-list '{path}' holds {len(lines)} keys, its first line says {facts['keys']}; {_MAKE}")
    try:
        body.decode()
    except UnicodeDecodeError as error:
        raise PairsError(f"the keep-list '{path}' is not UTF-8 (byte {error.start} after the first line); write it as UTF-8") from None
    previous = b""
    for n, line in enumerate(lines):
        if line <= previous:
            what = "is empty" if not line else "comes twice" if line == previous else f"comes after '{previous.decode()}'"
            raise PairsError(f"the keep-list '{path}' must be sorted, each key once: '{line.decode()}' on line {n + 2} {what}; sort it with LC_ALL=C sort -u")
        previous = line
    return KeepList(body, facts)


def _facts(path: str | os.PathLike[str], header: bytes) -> dict[str, Any]:
    what = f"the keep-list '{path}' must begin with '# ' and one JSON object (at least '# {{}}')"
    if not header.startswith(b"# "):
        raise PairsError(f"{what}, found {header[:40]!r}; {_MAKE}")
    try:
        facts = json.loads(header[2:])
    except (ValueError, RecursionError) as error:
        raise PairsError(f"{what}, which cannot be read ({str(error)[:80]}); {_MAKE}") from None
    if not isinstance(facts, dict) or facts.get("format", FORMAT) != FORMAT:
        raise PairsError(f"{what} with the format '{FORMAT}', found {str(facts)[:60]}; give a keep-list")
    if facts.get("version", VERSION) != VERSION:
        raise PairsError(f"the keep-list '{path}' has version {facts['version']!r}, this release reads {VERSION}; update it or make the list again")
    return facts
