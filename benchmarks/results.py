"""Results on disk: JSON lines, one measured phase each (docs/results-format.md is normative)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from runtime.errors import ClipError
from runtime.files import write_whole

SCHEMA = 1
KINDS = ("latency", "latency_summary", "cold_start", "load", "memory", "peak", "profile", "comparison", "accuracy", "accuracy_comparison", "not_measured")
SAMPLED = {"latency": "ns", "cold_start": "ns", "load": "ns", "memory": "bytes"}
"""Kinds that keep raw samples, and their unit."""


class ResultsError(ClipError):
    """A results file cannot be read or a line breaks its schema."""


Line = dict[str, Any]


def line(
    kind: str,
    phase: str,
    *,
    bundle: dict[str, str] | None,
    artefact: str | None = None,
    settings: dict[str, Any] | None = None,
    samples: Sequence[int] | None = None,
    summary: dict[str, Any] | None = None,
    figures: dict[str, Any] | None = None,
    environment: dict[str, Any] | None = None,
    device: dict[str, Any] | None = None,
    created: str | None = None,
) -> Line:
    """One line, checked. `bundle` is {"name", "sha256"}; `samples` in the unit of the kind, in the order of measuring; `device` is None for this machine,
    else {"kind", "label", …}; `created` is now unless the measurement is older."""
    made: Line = {
        "schema": SCHEMA,
        "kind": kind,
        "phase": phase,
        "artefact": artefact,
        "bundle": bundle,
        "settings": settings or {},
        "unit": SAMPLED.get(kind),
        "summary": summary or {},
        "figures": figures or {},
        "samples": [int(value) for value in samples] if samples is not None else None,
        "environment": environment,
        "device": device,
        "created": created or datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "tool": {"name": "mobileclip-edge", "version": version()},
    }
    return check(made, "a new result")


def check(found: Any, where: str) -> Line:
    """Return `found` when it is a line of this schema; raise ResultsError naming `where` otherwise. Unknown members are allowed."""
    if not isinstance(found, dict):
        raise ResultsError(f"{where} is {type(found).__name__}, expected a JSON object")
    if found.get("schema") != SCHEMA:
        raise ResultsError(f"{where} has schema {found.get('schema')!r}, this program reads schema {SCHEMA}; measure again or use the matching version")
    if found.get("kind") not in KINDS:
        raise ResultsError(f"{where} has kind {found.get('kind')!r}, expected one of {', '.join(KINDS)}")
    if not isinstance(found.get("phase"), str) or not found["phase"]:
        raise ResultsError(f"{where} has no phase")
    bundle = found.get("bundle")
    if bundle is not None and not (isinstance(bundle, dict) and isinstance(bundle.get("sha256"), str) and isinstance(bundle.get("name"), str)):
        raise ResultsError(f"{where} has bundle {bundle!r}, expected null or an object with name and sha256")
    device = found.get("device")
    if device is not None and not (isinstance(device, dict) and isinstance(device.get("kind"), str)):
        raise ResultsError(f"{where} has device {device!r}, expected null or an object with kind")
    for name in ("settings", "summary", "figures"):
        if not isinstance(found.get(name), dict):
            raise ResultsError(f"{where} has {name} {found.get(name)!r}, expected an object")
    for name, value in found["summary"].items():
        if not (value is None or isinstance(value, (bool, int, float)) or (name == "reason" and isinstance(value, str))):
            raise ResultsError(f"{where} has {name} {str(value)[:60]!r} in its summary, expected a number")
    if found["kind"] in SAMPLED:
        samples = found.get("samples")
        if not isinstance(samples, list) or not samples or any(type(value) is not int or value <= 0 for value in samples):
            raise ResultsError(f"{where} ({found['kind']}) must keep its raw samples as positive whole numbers of {SAMPLED[found['kind']]}")
        if found.get("unit") != SAMPLED[found["kind"]]:
            raise ResultsError(f"{where} ({found['kind']}) has unit {found.get('unit')!r}, expected {SAMPLED[found['kind']]!r}")
    return found


def read_results(paths: Iterable[str | Path]) -> list[Line]:
    """All lines of the files, in order. Raises ResultsError for a missing file, a line that is not JSON, or one that breaks the schema."""
    lines: list[Line] = []
    for path in map(Path, paths):
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ResultsError(f"there is no results file {path.name}; write one with: mclip bench BUNDLE --out {path.name}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ResultsError(f"{path.name} cannot be read as text: {type(error).__name__}") from error
        for number, row in enumerate(text.splitlines(), 1):
            if not row.strip():
                continue
            where = f"line {number} of {path.name}"
            try:
                found = json.loads(row)
            except json.JSONDecodeError as error:
                raise ResultsError(f"{where} is not JSON ({error.msg} at column {error.colno}); remove that line and measure again") from error
            except (ValueError, RecursionError) as error:
                raise ResultsError(f"{where} is nested too deep, or holds a number of thousands of digits; remove that line and measure again") from error
            lines.append(check(found, where))
    return lines


def append_results(path: str | Path, lines: Sequence[Line]) -> None:
    """Add lines all or none: the whole file is written beside and renamed, so a killed run leaves no torn line."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_bytes() if path.exists() else b""
    if before and not before.endswith(b"\n"):
        before += b"\n"
    added = b"".join(json.dumps(check(row, "a new result"), allow_nan=False, separators=(",", ":"), ensure_ascii=False).encode() + b"\n" for row in lines)
    write_whole(path, before + added)


def identity(row: Line) -> tuple[str, ...]:
    """What makes two lines the same measurement: a rerun skips those whose identity is already in the file.

    Another processor, device or version of the inference runtime is another measurement, and so is another mode or batch.
    """
    settings, machine, device = row["settings"], row.get("environment") or {}, row.get("device") or {}
    return (
        row["kind"],
        row["phase"],
        row.get("artefact") or "",
        (row.get("bundle") or {}).get("sha256", ""),
        str(settings.get("threads", "")),
        str(settings.get("input_sha256", "")),
        str(settings.get("reference_sha256", "")),
        str((machine.get("processor") or {}).get("model", "")),
        str((machine.get("packages") or {}).get("onnxruntime", "")),
        str(settings.get("mode", "")),
        str(settings.get("batch", 1)),
        str(settings.get("tool", "")),
        f"{device.get('kind', '')} {device.get('label', '')} {device.get('cores', '')}".strip(),
    )


def newest(lines: Iterable[Line]) -> list[Line]:
    """Of lines with one identity only the last, in the order of first appearance."""
    kept: dict[tuple[str, ...], Line] = {}
    for row in lines:
        kept[identity(row)] = row
    return list(kept.values())


def version() -> str:
    try:
        return metadata.version("mobileclip-edge")
    except metadata.PackageNotFoundError:
        return "0"
