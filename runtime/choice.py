"""Which artefact of a tower runs on this machine, and why."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from runtime.backends import missing
from runtime.errors import BundleError
from runtime.manifest import RECALL1_CHANGE_MIN, Artefact, Manifest

# Medians closer than this are the same speed, and then the more precise artefact wins.
SAME_SPEED = 0.02
_PRECISIONS = ("fp32", "fp16", "mixed", "bf16", "int8")


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """Which artefact of a tower runs, why, and why not the others (id -> reason)."""

    id: str
    why: str
    passed_over: dict[str, str]

    def __str__(self) -> str:
        return f"{self.id}: {self.why}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """What this machine showed about the artefacts of a tower.

    Attributes:
        milliseconds: id to median of one input. Where there are any, nothing else counts as fast.
        failed: id to the reason why it may not run here.
    """

    milliseconds: Mapping[str, float]
    failed: Mapping[str, str]


NOTHING = Findings(milliseconds={}, failed={})


def candidates(manifest: Manifest, tower: str, prefer: str | None = None, found: Findings = NOTHING) -> tuple[list[Artefact], dict[str, str]]:
    """The artefacts that may run here, and why the others may not.

    Args:
        prefer: an id, a precision or a target, that narrows the field.

    Raises:
        BundleError: none is left.
    """
    passed_over: dict[str, str] = {}
    field: list[Artefact] = []
    for artefact in manifest.artefacts:
        if artefact.tower == tower:
            reason = unfit(artefact) or found.failed.get(artefact.id)
            if reason:
                passed_over[artefact.id] = reason
            else:
                field.append(artefact)
    if prefer is not None:
        wanted = [a for a in field if prefer in (a.id, a.precision, a.target)]
        if not wanted:
            known = ", ".join(f"{a.id} ({a.precision})" for a in field) or "none"
            raise BundleError(f"bundle '{manifest.name}' has no usable {tower} artefact '{prefer}'{_said(passed_over, prefer)}; usable: {known}")
        passed_over.update({a.id: f"'{prefer}' was asked for" for a in field if a not in wanted})
        field = wanted
    if not field:
        reasons = "; ".join(f"{id}: {reason}" for id, reason in passed_over.items()) or "the manifest lists none"
        raise BundleError(f"bundle '{manifest.name}' has no {tower} artefact that runs here ({reasons})")
    return field, passed_over


def choose(manifest: Manifest, tower: str, prefer: str | None = None, found: Findings = NOTHING) -> Choice:
    """The artefact of a tower that should run here.

    Among those that are proven, runnable and near enough to the checkpoint: the fastest by what this machine measured, or where it measured nothing by the
    manifest's `p50_ms`; within 2 % of it (or where nothing was timed) the more precise, then a dynamic batch.

    Args:
        prefer: an id, a precision or a target, that narrows the field.
        found: what this machine showed.

    Raises:
        BundleError: none is left.
    """
    field, passed_over = candidates(manifest, tower, prefer, found)
    here = {a.id: found.milliseconds[a.id] for a in field if a.id in found.milliseconds}
    if here:
        passed_over.update({a.id: f"not measured here, {_speed(a.p50_ms)} where it was exported" for a in field if a.id not in here})
        field = [a for a in field if a.id in here]
    times = here or {a.id: a.p50_ms for a in field}
    quickest = min(times.values())
    even = [a for a in field if times[a.id] <= quickest * (1 + SAME_SPEED) or math.isinf(quickest)]
    best = min(even, key=lambda a: (_PRECISIONS.index(a.precision) if a.precision in _PRECISIONS else 9, a.batch != "dynamic", times[a.id], a.id))
    for artefact in field:
        if artefact is not best:
            passed_over[artefact.id] = f"{_speed(times[artefact.id])}, {artefact.precision}"
    return Choice(id=best.id, why=_why(times[best.id], len(field), len(even), prefer, bool(here)), passed_over=passed_over)


def unfit(artefact: Artefact) -> str | None:
    """Why an artefact may not be picked; None when it may."""
    if artefact.status != "proven":
        return f"{artefact.status}: {artefact.reason}"
    absent = missing(artefact.target)
    if absent:
        return absent
    parity = artefact.parity or {}
    if not parity.get("cosine_min", -1.0) >= artefact.cosine_threshold:
        return f"cosine_min {parity.get('cosine_min')} is below {artefact.cosine_threshold}"
    change = parity.get("recall1_clear", parity.get("recall1_change"))
    if change is not None and change < RECALL1_CHANGE_MIN:
        return f"recall@1 changes by {change:+.3f}, at most {RECALL1_CHANGE_MIN:+.2f} is let through"
    return None


def _why(time: float, field: int, even: int, prefer: str | None, here: bool) -> str:
    asked = f"'{prefer}' was asked for; " if prefer is not None else ""
    where = " on this machine" if here else ""
    if field == 1:
        return f"{asked}the only proven artefact that runs here ({_speed(time)}{where})"
    if math.isinf(time):
        return f"{asked}nothing was timed, so the most precise"
    tie = " and the most precise of equally fast ones" if even > 1 else ""
    return f"{asked}fastest of {field} proven artefacts{tie} ({_speed(time)}{where})"


def _speed(time: float) -> str:
    return "not timed" if math.isinf(time) else f"{time:.2f} ms"


def _said(passed_over: dict[str, str], wanted: str) -> str:
    return f" ({passed_over[wanted]})" if wanted in passed_over else ""
