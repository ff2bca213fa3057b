"""`mclip compare`: two finished results files, phase by phase. They were measured apart, so the comparison is unpaired, and says so."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .latency import gated
from .ratios import compare_unpaired
from .results import Line, ResultsError, append_results, line, read_results

CAVEAT = "measured apart, so what differs between the two sittings (clock, heat, neighbours) counts as a difference too; mclip bench A B --compare pairs them"


def compare_results(reference: Sequence[Line], candidate: Sequence[Line], *, seed: int = 0) -> list[Line]:
    """Every measurement that both have, with the sentence. Several lines of one measurement count as its runs.

    Raises ResultsError when they have none in common.
    """
    sides = [_runs(lines) for lines in (reference, candidate)]
    made = []
    for key in [key for key in sides[0] if key in sides[1]]:
        first, second = (side[key] for side in sides)
        if min(len(row["samples"]) for row in (*first, *second)) < 10:
            continue
        ratio = compare_unpaired(*([np.array(row["samples"]) for row in rows] for rows in (first, second)), seed=seed)
        names = [f"{_name(rows[0])}" for rows in (first, second)]
        if names[0] == names[1]:
            names = [f"{name} ({which})" for name, which in zip(names, ("before", "after"), strict=True)]
        notes = differences(first[0], second[0])
        figures: dict[str, Any] = {"candidate": names[1], "reference": names[0], **ratio.as_dict(), "sentence": f"{_title(key)}: {ratio.sentence(names[1], names[0])}"}
        figures |= {"runs": [len(first), len(second)], "differences": notes, "comparable": not any(note.startswith("not comparable") for note in notes)}
        settings = {**second[0]["settings"], "reference_sha256": (first[0]["bundle"] or {}).get("sha256", ""), "tool": "unpaired"}
        made.append(
            line("comparison", second[0]["phase"], bundle=second[0]["bundle"], artefact=second[0]["artefact"], settings=settings, figures=figures,
                 environment=second[0]["environment"], device=second[0].get("device"))
        )  # fmt: skip
    if not made:
        raise ResultsError("the two files have no measurement in common (same phase, artefact, threads, batch and mode, with at least 10 samples); measure both alike")
    return made


def differences(first: Line, second: Line) -> list[str]:
    """What differs between the circumstances of two lines, in words; "not comparable: …" where a ratio of times says nothing."""
    found = []
    for what, path in (("processor", ("processor", "model")), ("governor", ("processor", "governor")), ("system", ("system", "release")), ("Python", ("python",))):
        values = [_at(row["environment"], path) for row in (first, second)]
        if values[0] != values[1]:
            found.append(f"{'not comparable: ' if what == 'processor' else ''}{what} {values[0]} and {values[1]}")
    devices = [(row.get("device") or {}) for row in (first, second)]
    if [found_device.get("kind", "local") for found_device in devices] not in (["local", "local"],) and devices[0].get("label") != devices[1].get("label"):
        found.append("not comparable: different devices")
    packages = [(row["environment"] or {}).get("packages") or {} for row in (first, second)]
    for name in sorted(set(packages[0]) | set(packages[1])):
        if packages[0].get(name) != packages[1].get(name):
            found.append(f"{name} {packages[0].get(name)} and {packages[1].get(name)}")
    if first["settings"].get("input_sha256") != second["settings"].get("input_sha256"):
        found.append("not comparable: different inputs")
    for which, row in (("first", first), ("second", second)):
        if not row["summary"].get("valid", True):
            found.append(f"the {which} should not be quoted: {row['summary']['reason']}")
        load = (row["environment"] or {}).get("load_average")
        if load and load[0] > 0.5 * ((row["environment"].get("processor") or {}).get("usable_cores") or 1):
            found.append(f"the machine was busy before the {which} (load {load[0]})")
    return found


def _runs(lines: Sequence[Line]) -> dict[tuple[str, ...], list[Line]]:
    """Timed lines by what they measure; the bundle is not part of that, two versions of it are what is compared."""
    found: dict[tuple[str, ...], list[Line]] = {}
    for row in lines:
        if row["kind"] in ("latency", "load", "cold_start"):
            settings = row["settings"]
            found.setdefault((row["kind"], row["phase"], row["artefact"] or "", *(str(settings.get(name, default)) for name, default in
                             (("threads", ""), ("batch", 1), ("mode", ""), ("tool", "")))), []).append(row)  # fmt: skip
    return found


def _at(environment: dict[str, Any] | None, path: tuple[str, ...]) -> Any:
    value: Any = environment or {}
    for name in path:
        value = (value or {}).get(name)
    return value


def _name(row: Line) -> str:
    return str((row["bundle"] or {}).get("name", "?"))


def _title(key: tuple[str, ...]) -> str:
    _, phase, artefact, threads, batch, mode, tool = key
    more = [artefact, f"{threads} threads" if threads not in ("1", "") else "", f"batch {batch}" if batch != "1" else "", mode, tool]
    return ", ".join([phase.replace("_", " "), *filter(None, more)])


def main(argv: list[str]) -> int:
    """Command line of `mclip compare`."""
    parser = argparse.ArgumentParser(prog="mclip compare", description="Compare two finished results files, unpaired. For a paired comparison: mclip bench A B --compare.")
    parser.add_argument("reference", type=Path, help="results file of the reference (mclip bench)")
    parser.add_argument("candidate", type=Path, help="results file of the candidate")
    parser.add_argument("--gate", type=float, metavar="RATIO", help="exit code 1 when a phase is called slower and takes more than RATIO times the reference (1.05)")
    parser.add_argument("--out", type=Path, help="add the comparisons to this results file, for mclip report")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    rows = compare_results(read_results([options.reference]), read_results([options.candidate]), seed=options.seed)
    if options.out:
        append_results(options.out, rows)
    found: dict[str, Any] = {"paired": False, "caveat": CAVEAT, "comparisons": [{"phase": row["phase"], "artefact": row["artefact"], **row["figures"]} for row in rows]}
    code = gated(found, options.gate) if options.gate is not None else 0
    if options.json:
        sys.stdout.write(json.dumps(found) + "\n")
        return code
    for row in rows:
        sys.stdout.write(row["figures"]["sentence"] + "\n")
    for note in dict.fromkeys(note for row in rows for note in row["figures"]["differences"]):
        sys.stdout.write(f"note: {note}\n")
    sys.stdout.write(f"unpaired: {CAVEAT}\n")
    if "gate" in found:
        sys.stdout.write(f"gate {found['gate']['verdict']}: {found['gate']['sentence']}\n")
    return code
