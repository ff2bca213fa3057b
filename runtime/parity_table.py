"""The report of a self-check as lines: one for what all artefacts share, then a table with a line for every artefact."""

from __future__ import annotations

from collections import Counter
from typing import Any

HEAD = ("", "artefact", "MB", "cosine", "centred", "rank", "recall@1 change", "here", "verdict")


def lines(report: dict[str, Any]) -> list[str]:
    """What `mclip verify` prints of `runtime.selfcheck.selfcheck`'s report.

    Columns: size; the export's least cosine, first percentile of the centred cosines, share of texts with the same first picture and change of
    recall@1 with its interval; the least cosine of the golden inputs run here; the verdict.
    """
    shared = [
        f"{mark(report['preprocess'])}  preprocessing  largest difference {report['preprocess']['max_abs']:.2g}",
        f"{mark(report['tokenizer'])}  tokenizer      {report['tokenizer']['rows_different']} rows different",
    ]
    logits = report.get("logits")
    if logits is not None:
        wrong = "" if logits["ok"] else f": a logit is {logits['found']:.4f}, the checkpoint's {logits['expected']:.4f}; logit_scale or logit_bias is wrong"
        shared.append(f"{mark(logits)}  logits         largest difference {logits['max_abs']:.2g}{wrong}")
    notes = _notes(report["artefacts"])
    rows = [HEAD, *(_row(entry, notes) for entry in report["artefacts"])]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD) - 1)]
    for row in rows:
        cells = [cell.ljust(width) if column in (0, 1) else cell.rjust(width) for column, (cell, width) in enumerate(zip(row, widths, strict=False))]
        shared.append("  ".join([*cells, row[-1]]))
    return shared + [f"[{number}] {reason}" for reason, number in notes.items()]


def mark(entry: dict[str, Any]) -> str:
    """ "ok" or "FAIL", of the same width."""
    return "ok  " if entry["ok"] else "FAIL"


def _notes(entries: list[dict[str, Any]]) -> dict[str, int]:
    """Numbers for the reasons that several artefacts share."""
    counts = Counter(str(entry["reason"]) for entry in entries if entry["reason"])
    return {reason: number for number, reason in enumerate((reason for reason, count in counts.items() if count > 1), 1)}


def _row(entry: dict[str, Any], notes: dict[str, int]) -> tuple[str, ...]:
    parity = entry.get("parity") or {}
    judged = entry["how"] in ("run", "recorded")
    here = entry["cosine_min"] if entry["how"] == "run" else None
    reason = str(entry["reason"])
    reason = f"[{notes[reason]}]" if reason in notes else reason
    if not judged:
        verdict = f"{entry['how']}: {reason}"
    elif not entry["ok"]:
        verdict = reason
    else:
        verdict = f"proven (here at least {entry['threshold']:g})" if entry["how"] == "run" else "proven at export, does not run here"
    return (
        mark(entry) if judged else "--  ",
        entry["id"],
        "" if entry.get("bytes") is None else f"{entry['bytes'] / 1e6:.2f}",
        _figure(parity.get("cosine_min"), ".6f"),
        _figure(parity.get("centred_p1"), ".4f"),
        _figure(parity.get("rank_agreement"), ".3f"),
        _change(parity),
        _figure(here, ".6f"),
        verdict,
    )


def _change(parity: dict[str, Any]) -> str:
    change, low, high = (parity.get(name) for name in ("recall1_change", "recall1_low", "recall1_high"))
    between = f" [{low:+.3f}, {high:+.3f}]" if isinstance(low, float) and isinstance(high, float) else ""
    return _figure(change, "+.3f") + between


def _figure(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else ""
