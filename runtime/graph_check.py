"""What an ONNX file asks for, read before ONNX Runtime opens it: operators of foreign domains, functions, weights in other files.

Bundles come from strangers. A graph needs nothing but ONNX's own operators, ONNX Runtime's, and weights in its own file or in files of its own folder; the rest is
refused here. Only the structure is walked, by offsets: weights are stepped over, whatever their size, and nothing is believed about a length before it is compared
with what is left.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from runtime.errors import BundleError

DOMAINS = (b"", b"ai.onnx", b"com.microsoft")
FORBIDDEN = (b"EPContext",)
"""Operators that open files of their own."""
MOST_FIELDS = 500_000
MOST_DEPTH = 16
_GRAPH, _FUNCTIONS, _TRAINING = 7, 25, 20
_Field = tuple[int, int, int]
_Buffer = mmap.mmap | bytes


class _Walk:
    """A file that is walked: how many fields are left, and where external weights may lie."""

    def __init__(self, data: _Buffer, path: Path) -> None:
        self.data, self.path, self.left = data, path, MOST_FIELDS

    def fields(self, start: int, end: int) -> Iterator[_Field]:
        """Fields between two offsets: (number, start, end) of those with a length, (-number, value, value) of numbers; those of fixed width are stepped over."""
        at = start
        while at < end:
            self.left -= 1
            if self.left < 0:
                raise self.wrong(f"it has more than {MOST_FIELDS:,} fields")
            key, at = self._varint(at, end)
            kind = key & 7
            if kind == 2:
                size, at = self._varint(at, end)
                if size > end - at:
                    raise self.wrong(f"a field says {size} bytes where {end - at} are left")
                yield key >> 3, at, at + size
                at += size
            elif kind == 0:
                value, at = self._varint(at, end)
                yield -(key >> 3), value, value
            elif kind in (1, 5):
                at += 8 if kind == 1 else 4
            else:
                raise self.wrong(f"it has a field of wire type {kind}")
            if at > end:
                raise self.wrong("a field ends beyond its message")

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        value = shift = 0
        while at < end and shift < 70:
            byte = self.data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, at
            shift += 7
        raise self.wrong("a number is cut short")

    def text(self, start: int, end: int) -> bytes:
        return bytes(self.data[start : min(end, start + 4096)])

    def wrong(self, what: str) -> BundleError:
        return BundleError(f"{self.path} is refused: {what}; a bundle's graph is made of ONNX's own operators, with its weights beside it: export it again")


def check_graph(path: Path) -> None:
    """Refuse a graph that asks for more than a bundle may.

    Args:
        path: an ONNX file; weights in other files must lie in its own folder.

    Raises:
        BundleError: no ONNX file, a foreign operator, a function, or weights outside.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _model(_Walk(data, path), len(data))
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise BundleError(f"{path} cannot be read as an ONNX graph ({error}); fetch or export the bundle again") from error


def _model(walk: _Walk, end: int) -> None:
    graphs = 0
    for number, start, stop in walk.fields(0, end):
        if number == _GRAPH:
            graphs += 1
            _graph(walk, start, stop, 0)
        elif number == _FUNCTIONS:
            raise walk.wrong("it has functions of its own")
        elif number == _TRAINING:
            raise walk.wrong("it carries a training graph")
    if graphs != 1:
        raise walk.wrong(f"it holds {graphs} graphs")


def _graph(walk: _Walk, start: int, end: int, depth: int) -> None:
    if depth > MOST_DEPTH:
        raise walk.wrong(f"its graphs are nested more than {MOST_DEPTH} deep")
    for number, at, stop in walk.fields(start, end):
        if number == 1:
            _node(walk, at, stop, depth)
        elif number == 5:
            _tensor(walk, at, stop)
        elif number == 15:
            _sparse(walk, at, stop)


def _node(walk: _Walk, start: int, end: int, depth: int) -> None:
    for number, at, stop in walk.fields(start, end):
        if number == 7 and walk.text(at, stop) not in DOMAINS:
            raise walk.wrong(f"it has an operator of the domain '{_shown(walk.text(at, stop))}'")
        if number == 4 and walk.text(at, stop) in FORBIDDEN:
            raise walk.wrong(f"it has the operator {_shown(walk.text(at, stop))}")
        if number == 5:
            _attribute(walk, at, stop, depth)


def _attribute(walk: _Walk, start: int, end: int, depth: int) -> None:
    for number, at, stop in walk.fields(start, end):
        if number in (5, 10):
            _tensor(walk, at, stop)
        elif number in (6, 11):
            _graph(walk, at, stop, depth + 1)
        elif number in (22, 23):
            _sparse(walk, at, stop)


def _sparse(walk: _Walk, start: int, end: int) -> None:
    for number, at, stop in walk.fields(start, end):
        if number in (1, 2):
            _tensor(walk, at, stop)


def _tensor(walk: _Walk, start: int, end: int) -> None:
    facts: dict[bytes, bytes] = {}
    outside = False
    for number, at, stop in walk.fields(start, end):
        if number == -14:
            outside = at == 1
        elif number == 13:
            entry = {key: walk.text(first, last) for key, first, last in walk.fields(at, stop)}
            facts[entry.get(1, b"")] = entry.get(2, b"")
    if not outside and not facts:
        return
    place = facts.get(b"location", b"").decode("utf-8", "replace")
    if not place or place in (".", "..") or set(place) & set("/\\\0"):
        raise walk.wrong(f"its weights lie in '{_shown(place.encode())}', outside of its folder")
    file = walk.path.with_name(place)
    try:
        offset, length = int(facts.get(b"offset", b"0") or 0), int(facts.get(b"length", b"0") or 0)
    except ValueError:
        raise walk.wrong(f"it does not say where in '{_shown(place.encode())}' its weights lie") from None
    if file.is_symlink() or not file.is_file() or min(offset, length) < 0 or offset + length > file.stat().st_size:
        raise walk.wrong(f"its weights in '{_shown(place.encode())}' are not there, or lie beyond the end of that file")


def _shown(text: bytes) -> str:
    return "".join(c if c.isprintable() else "?" for c in text.decode("utf-8", "replace"))[:80]
