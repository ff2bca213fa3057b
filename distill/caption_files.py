"""Captions that were made elsewhere: a folder of JSON lines, one .jsonl or one .parquet, found by key without holding them in memory.

One line a sample, as `mclip caption` and any other program may write it; only `key` and each caption's `text` are required:

    {"key": "00000123", "captions": [{"text": "a dog on a beach", "type": "synthetic", "language": "en", "source": "coca", "parent": -1, "sentence": -1}]}

`parent` says what a caption was made from: -1 the picture, 0 the pair's own caption, n >= 1 the n-th caption of the same line (from 1).
`renumbered` turns that into numbers of a store. A Parquet file has the columns `key` and `captions` (lists of strings), or `key` and
`caption` with one caption a row, where `type`, `language` and `source` may stand beside it.

A file is read once when it is opened: everything that makes it unusable is said then, with file and line. Captions that are empty,
too long or not encodable are left out, counted and told; the rest of their sample is used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from distill.captions import TYPES, Caption
from runtime.errors import MissingExtraError, PairsError

logger = logging.getLogger(__name__)

RECEIPT = "receipt.json"
MAX_CHARACTERS = 8192
"""A longer caption is a runaway: no text tower reads a twentieth of it."""
MAX_CAPTIONS = 4096
MAX_LINE = 64 << 20
KEPT_NOTES = 100
_OPEN_FILES = 8
_OPEN_GROUPS = 4
_INT16 = 32767


class CaptionFile:
    """Captions by key. In memory: 20 bytes a sample, whatever its captions are. Can be pickled.

    facts: {"captioner", "licence", "sha256" of the captions, "captioner_sha256" of its weights, "samples", "captions", "left_out"} and
    what the receipt says of the captioner. notes: one sentence for each caption that was left out, the first hundred.
    """

    def __init__(self, path: Path, source: _Lines | _Rows, notes: _Notes, receipt: dict[str, Any]) -> None:
        self.path, self._source, self.notes = path, source, notes.sentences
        hashes, order = source.hashes(), np.argsort(source.hashes(), kind="stable")
        self._hashes, self._order = hashes[order], order
        told = receipt.get("captioner")
        captioner: dict[str, Any] = told if isinstance(told, dict) else {}
        self.facts: dict[str, Any] = {
            **captioner, "captioner": str(captioner.get("name", path.name)), "licence": str(captioner.get("licence", "unknown")),
            "captioner_sha256": str(captioner.get("sha256", "")), "sha256": source.sha256, "samples": self._samples(), "captions": source.captions,
            "left_out": dict(sorted(notes.counts.items())),
        }  # fmt: skip
        if notes.counts:
            logger.warning("%s: %d captions are left out; the first: %s", path, sum(notes.counts.values()), notes.sentences[0])

    def __len__(self) -> int:
        """Samples."""
        return int(self.facts["samples"])

    def __contains__(self, key: str) -> bool:
        return bool(self._places(key))

    def get(self, key: str) -> list[Caption]:
        """The captions of a sample in the order of the file; none for a key that the file does not hold."""
        return self._source.read(self._places(key))

    def _places(self, key: str) -> list[int]:
        wanted = np.uint64(_hash(key))
        start, stop = np.searchsorted(self._hashes, wanted, "left"), np.searchsorted(self._hashes, wanted, "right")
        return [int(place) for place in self._order[start:stop] if self._source.key(int(place)) == key]

    def _samples(self) -> int:
        """Different keys. Raises PairsError where a line repeats one."""
        edges = np.flatnonzero(np.diff(self._hashes)) + 1
        starts = np.concatenate([[0], edges]) if len(self._hashes) else np.zeros(0, np.int64)
        stops = np.concatenate([edges, [len(self._hashes)]]) if len(self._hashes) else starts
        samples = len(starts)
        for start, stop in zip(starts[stops - starts > 1], stops[stops - starts > 1], strict=True):
            first: dict[str, int] = {}
            for place in self._order[start:stop]:
                key = self._source.key(int(place))
                if key in first and not self._source.keys_repeat:
                    here, there = self._source.where(int(place)), self._source.where(first[key])
                    raise PairsError(f"{here}: the key '{_short(key)}' stands already in {there}; expected one line a sample, join or remove one")
                first.setdefault(key, int(place))
            samples += len(first) - 1
        return samples


def renumbered(captions: list[Caption], first: int) -> list[Caption]:
    """Captions of a file as they stand in a list where `first` captions come before them: a parent n >= 1 becomes first + n - 1."""
    return [dataclasses.replace(caption, parent=first + caption.parent - 1) if caption.parent > 0 else caption for caption in captions]


def open_captions(path: str | Path) -> CaptionFile:
    """Captions of a folder that `mclip caption` wrote, of a .jsonl or of a .parquet.

    Raises:
        PairsError: not one of the three, unfinished, changed since it was written, or a line that cannot be used; the sentence names
            file and line.
        MissingExtraError: a .parquet without pyarrow.
    """
    path, notes = Path(path), _Notes()
    if path.is_dir():
        receipt = _read_receipt(path)
        lines = _Lines([path / name for name in sorted(receipt["files"])], notes)
        for name, found in zip(sorted(receipt["files"]), lines.digests, strict=True):
            if found != receipt["files"][name].get("sha256"):
                raise PairsError(f"{path / name} has changed since it was written: its sha256 is {found[:16]}…, {RECEIPT} says otherwise; caption again")
        return CaptionFile(path, lines, notes, receipt)
    if not path.is_file():
        raise PairsError(f"captions '{path}' do not exist; expected a folder that mclip caption wrote, a .jsonl or a .parquet")
    if path.suffix == ".jsonl":
        return CaptionFile(path, _Lines([path], notes), notes, {})
    if path.suffix == ".parquet":
        return CaptionFile(path, _Rows(path, notes), notes, {})
    raise PairsError(f"captions '{path}' end in '{path.suffix}'; expected a folder that mclip caption wrote, a .jsonl or a .parquet")


def _read_receipt(folder: Path) -> dict[str, Any]:
    path = folder / RECEIPT
    if not path.is_file():
        raise PairsError(f"the captions folder '{folder}' has no {RECEIPT}: mclip caption did not finish; run it again (it continues), or give one .jsonl")
    try:
        receipt = json.loads(path.read_text(encoding="utf-8"))
        files = receipt["files"]
        sound = receipt["kind"] == "captions" and all(isinstance(facts, dict) and Path(name).name == name and name.endswith(".jsonl") for name, facts in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PairsError(f"'{path}' cannot be read ({error!r}); run mclip caption again") from None
    if not sound:
        raise PairsError(f"'{path}' is not the receipt of a captions folder; give a folder that mclip caption wrote")
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise PairsError(f"the captions folder '{folder}' lacks {missing[0]}, which its receipt lists; run mclip caption again")
    return receipt


class _Notes:
    """What was left out."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.sentences: list[str] = []

    def add(self, kind: str, sentence: str) -> None:
        self.counts[kind] += 1
        if len(self.sentences) < KEPT_NOTES:
            self.sentences.append(sentence)


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:59] + "…"


# ---------------------------------------------------------------- JSON lines


class _Lines:
    """The lines of one or several files, known by where they start."""

    keys_repeat = False

    def __init__(self, paths: list[Path], notes: _Notes) -> None:
        self.paths, self.captions, self.digests = paths, 0, [""] * len(paths)
        hashes, offsets, files = array("Q"), array("Q"), array("I")
        for number, path in enumerate(paths):
            for offset, line, content in self._scan(number, path):
                key, captions = _parse(content, f"{path}:{line}", notes)
                hashes.append(_hash(key))
                offsets.append(offset)
                files.append(number)
                self.captions += len(captions)
        self._hashes, self._offsets, self._files = np.array(hashes, np.uint64), np.array(offsets, np.uint64), np.array(files, np.uint32)
        listed = "".join(f"{path.name} {digest}\n" for path, digest in zip(paths, self.digests, strict=True))
        self.sha256 = self.digests[0] if len(paths) == 1 else hashlib.sha256(listed.encode()).hexdigest()
        self._handles: OrderedDict[int, BinaryIO] = OrderedDict()

    def __del__(self) -> None:
        for stream in getattr(self, "_handles", {}).values():
            stream.close()

    def _scan(self, number: int, path: Path) -> Iterator[tuple[int, int, bytes]]:
        """Offset, number (from 1) and content of every line that is not blank; hashes the file on the way."""
        digest, offset, line = hashlib.sha256(), 0, 0
        try:
            with path.open("rb") as stream:
                while content := stream.readline(MAX_LINE + 1):
                    line += 1
                    digest.update(content)
                    if len(content) > MAX_LINE:
                        raise PairsError(f"{path}:{line}: the line is longer than {MAX_LINE >> 20} MiB; expected one JSON object a line")
                    if content.strip():
                        yield offset, line, content
                    offset += len(content)
        except OSError as error:
            raise PairsError(f"captions '{path}' cannot be read ({error.strerror or error})") from None
        self.digests[number] = digest.hexdigest()

    def hashes(self) -> np.ndarray:
        return self._hashes

    def _content(self, place: int) -> bytes:
        number = int(self._files[place])
        if number not in self._handles:
            while len(self._handles) >= _OPEN_FILES:
                self._handles.popitem(last=False)[1].close()
            try:
                self._handles[number] = self.paths[number].open("rb")
            except OSError as error:
                raise PairsError(f"captions '{self.paths[number]}' cannot be read any more ({error.strerror or error})") from None
        self._handles.move_to_end(number)
        stream = self._handles[number]
        stream.seek(int(self._offsets[place]))
        return stream.readline(MAX_LINE)

    def _line(self, place: int) -> tuple[str, list[Caption]]:
        return _parse(self._content(place), "", _Notes(), where=lambda: self.where(place))

    def key(self, place: int) -> str:
        return self._line(place)[0]

    def read(self, places: list[int]) -> list[Caption]:
        return [caption for place in places for caption in self._line(place)[1]]

    def where(self, place: int) -> str:
        """File and line, for a message: lines are counted only now."""
        path, left, line = self.paths[int(self._files[place])], int(self._offsets[place]), 1
        with path.open("rb") as stream:
            while left > 0 and (block := stream.read(min(left, 1 << 20))):
                left, line = left - len(block), line + block.count(b"\n")
        return f"{path}:{line}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": OrderedDict()}


def _parse(content: bytes, place: str, notes: _Notes, where: Callable[[], str] | None = None) -> tuple[str, list[Caption]]:
    """Key and captions of one line. `where` names the place when that is only worth finding for an error."""
    try:
        return _parsed(content, place, notes)
    except _LineError as error:
        raise PairsError(f"{where() if where else place}: {error}") from None


class _LineError(Exception):
    pass


def _parsed(content: bytes, place: str, notes: _Notes) -> tuple[str, list[Caption]]:
    try:
        data = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _LineError(f"the line is not UTF-8 (byte {error.start} is 0x{error.object[error.start]:02x}); convert it to UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise _LineError(f"the line is not JSON ({_short(str(error))}); expected one object with key and captions a line") from None
    if not isinstance(data, dict) or not isinstance(data.get("key"), str) or not data["key"] or not isinstance(data.get("captions"), list):
        found = type(data).__name__ if not isinstance(data, dict) else f"an object with {_short(', '.join(map(str, data)) or 'no fields')}"
        raise _LineError(f'the line holds {found}; expected {{"key": "…", "captions": [{{"text": "…"}}, …]}}')
    if len(data["captions"]) > MAX_CAPTIONS:
        raise _LineError(f"the sample has {len(data['captions'])} captions; expected at most {MAX_CAPTIONS}")
    return data["key"], _usable([_caption(entry, n) for n, entry in enumerate(data["captions"], 1)], place, notes)


_TEXT_FIELDS = {"text": "", "type": "synthetic", "language": "en", "source": "captions"}


def _caption(entry: Any, n: int) -> Caption:
    """Caption n (from 1) of a line. Raises _LineError for anything that is not one."""
    if isinstance(entry, str):
        entry = {"text": entry}
    if not isinstance(entry, dict) or "text" not in entry:
        raise _LineError(f"caption {n} is {_short(json.dumps(entry))}; expected an object with a text")
    values: dict[str, Any] = {name: entry.get(name, default) for name, default in _TEXT_FIELDS.items()}
    values |= {name: entry.get(name, -1) for name in ("parent", "sentence")}
    for name in _TEXT_FIELDS:
        if not isinstance(values[name], str):
            raise _LineError(f"caption {n} has the {name} {_short(json.dumps(values[name]))}; expected a string")
    for name in ("parent", "sentence"):
        if type(values[name]) is not int or not -1 <= values[name] <= _INT16:
            raise _LineError(f"caption {n} has the {name} {_short(json.dumps(values[name]))}; expected a whole number from -1")
    if values["type"] not in TYPES:
        raise _LineError(f"caption {n} has the unknown type '{_short(values['type'])}'; known are {', '.join(TYPES)}")
    if values["parent"] >= n:
        earlier = f" or a caption before it (1 to {n - 1})" if n > 1 else ""
        raise _LineError(f"caption {n} has the parent {values['parent']}, which is not there; expected -1 (the picture), 0 (the pair's own caption){earlier}")
    return Caption(**{**values, "text": " ".join(values["text"].split())})


def _usable(captions: list[Caption], place: str, notes: _Notes) -> list[Caption]:
    """Those that a store can hold; parents follow, and lead to the picture (-1) where the parent is left out."""
    faults = [_fault(caption.text) for caption in captions]
    if not any(faults):
        return captions
    number = {0: 0, -1: -1}
    for n, fault in enumerate(faults, 1):
        if not fault:
            number[n] = len(number) - 1
        else:
            notes.add(fault[0], f"{place}: caption {n} {fault[1]}; it is left out")
    return [dataclasses.replace(caption, parent=number.get(caption.parent, -1)) for caption, fault in zip(captions, faults, strict=True) if not fault]


def _fault(text: str) -> tuple[str, str] | None:
    if not text:
        return "empty", "is empty"
    if len(text) > MAX_CHARACTERS:
        return "too long", f"has {len(text)} characters, more than {MAX_CHARACTERS}"
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            return "not encodable", "holds half a surrogate pair, which UTF-8 cannot hold"
    return None


# ---------------------------------------------------------------- Parquet


class _Rows:
    """The rows of one Parquet file; a few row groups are held at a time."""

    keys_repeat = False

    def __init__(self, path: Path, notes: _Notes) -> None:
        self.path, self.captions, self._groups = path, 0, OrderedDict[int, dict[str, list[Any]]]()
        with path.open("rb") as stream:
            self.sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        file = self._open()
        names = set(file.schema_arrow.names)
        if "key" not in names or not names & {"captions", "caption"}:
            raise PairsError(f"{path} has the columns {_short(', '.join(sorted(names)))}; expected key and captions (lists of strings), or key and caption")
        self.keys_repeat = "captions" not in names
        self._columns = ["key", "captions"] if not self.keys_repeat else ["key", "caption", *sorted(names & {"type", "language", "source"})]
        self._starts = np.cumsum([0, *(file.metadata.row_group(n).num_rows for n in range(file.num_row_groups))])
        hashes = array("Q")
        for group in range(file.num_row_groups):
            rows = self._group(group, file)
            for local in range(len(rows["key"])):
                key, captions = self._row(rows, local, int(self._starts[group]) + local, notes)
                hashes.append(_hash(key))
                self.captions += len(captions)
        self._hashes = np.array(hashes, np.uint64)

    def _open(self) -> Any:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise MissingExtraError("pyarrow", "captions", f"reading '{self.path.name}'") from None
        try:
            return pyarrow.parquet.ParquetFile(self.path)
        except (pyarrow.ArrowException, OSError) as error:
            raise PairsError(f"{self.path} is not a Parquet file ({_short(str(error))}); expected the columns key and captions, or key and caption") from None

    def _group(self, number: int, file: Any = None) -> dict[str, list[Any]]:
        if number not in self._groups:
            while len(self._groups) >= _OPEN_GROUPS:
                self._groups.popitem(last=False)
            table = (file or self._open()).read_row_group(number, columns=self._columns)
            columns = {}
            for name in self._columns:
                try:
                    columns[name] = table.column(name).to_pylist()
                except UnicodeDecodeError as error:
                    raise PairsError(f"{self.path}: column {name} of row group {number} is not UTF-8 ({error.reason}); write it again as UTF-8") from None
            self._groups[number] = columns
        self._groups.move_to_end(number)
        return self._groups[number]

    def _row(self, rows: dict[str, list[Any]], local: int, place: int, notes: _Notes) -> tuple[str, list[Caption]]:
        key = rows["key"][local]
        texts = rows["captions"][local] if not self.keys_repeat else [rows["caption"][local]]
        if not isinstance(key, str) or not key or not isinstance(texts, list) or any(not isinstance(text, str) for text in texts):
            raise PairsError(f"{self.where(place)}: the key is {_short(repr(key))} and the captions are {_short(repr(texts))}; expected a string and strings")
        extra = {name: rows[name][local] for name in self._columns[2:] if rows[name][local] is not None}
        try:
            return key, _usable([_caption({"text": text, **extra}, n) for n, text in enumerate(texts, 1)], self.where(place), notes)
        except _LineError as error:
            raise PairsError(f"{self.where(place)}: {error}") from None

    def hashes(self) -> np.ndarray:
        return self._hashes

    def _find(self, place: int) -> tuple[dict[str, list[Any]], int]:
        group = int(np.searchsorted(self._starts, place, side="right")) - 1
        return self._group(group), place - int(self._starts[group])

    def key(self, place: int) -> str:
        rows, local = self._find(place)
        return str(rows["key"][local])

    def read(self, places: list[int]) -> list[Caption]:
        return [caption for place in places for caption in self._row(*self._find(place), place, _Notes())[1]]

    def where(self, place: int) -> str:
        return f"{self.path}: row {place + 1}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_groups": OrderedDict()}
