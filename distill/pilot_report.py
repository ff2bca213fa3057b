"""What a pilot found: the object of OUT/pilot.json, the commands that follow from it, and the table for a terminal."""

from __future__ import annotations

import dataclasses
import io
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.pilot_arms import Arm, Measure
from distill.pilot_costs import FORMULA_BYTES, FORMULA_SECONDS, Setting, cost
from distill.pilot_decisions import crossed_interval
from distill.pilot_search import CONTROL, Search
from distill.store import Store

if TYPE_CHECKING:
    from distill.pilot import PilotConfig

SCHEMA = 1
WIDTH = 160
LEARNT = 0.05
"""Of what lies between chance and 1: students that reach less have not learnt enough to be told apart."""


def report(
    config: PilotConfig, subset: dict[str, Any], store: Store, index: dict[str, Any], seconds: dict[str, Any], sizes: dict[str, Any], search: Search,
    start: Arm, chosen: Arm, by_type: Mapping[str, float], total: int,
) -> dict[str, Any]:  # fmt: skip
    """JSON-ready: every arm with its seeds, every decision with its reason, costs, recipe and commands."""
    from distill.pilot import captions_stored

    full = config.full_pairs or total
    captions = captions_stored(chosen.captions, dict(by_type))
    largest = cost(Setting(teachers=start.teachers, augmentations=start.augmentations, captions=sum(by_type.values())), seconds, sizes, full)
    smallest = cost(Setting(teachers=chosen.teachers, augmentations=chosen.augmentations, captions=captions), seconds, sizes, full)
    measure = search.measure
    runs = [run for _, found in search.arms.values() for run in found]
    own = {
        "reinforcement_seconds": index["figures"].get("seconds"), "training_seconds": round(sum(run["train_seconds"] for run in runs), 1),
        "evaluation_seconds": round(sum(run["evaluate_seconds"] for run in runs), 1), "runs": len(runs), "samples_seen": len(runs) * search.ground.samples,
        "bytes": subset["bytes"] + sum(entry["bytes"] for entry in store.index["parts"]),
    }  # fmt: skip
    reinforcing = index["figures"].get("worker_cpu_seconds", {})
    own["core_seconds"] = round(sum(reinforcing.values()) + sum(run["core_seconds"] for run in runs), 1)
    own["seconds"] = round(sum(float(own[name] or 0) for name in ("reinforcement_seconds", "training_seconds", "evaluation_seconds")), 1)
    return {
        "schema": SCHEMA, "kind": "pilot", "complete": not search.exhausted,
        "measure": f"{config.direction} recall@{config.k}, split {config.split}", "confidence": config.confidence,
        "subset": subset,
        "queries": len(measure.hits(runs[0])) if runs else 0, "chance": measure.chance(runs[0]) if runs else None,
        "model": search.ground.model, "samples": search.ground.samples, "seeds": config.seeds,
        "decisions": search.decisions, "arms": {name: _arm(arm, found, measure, config.confidence) for name, (arm, found) in search.arms.items()},
        "start": start.identity, "chosen": chosen.identity, "setting": {**dataclasses.asdict(chosen), "captions": dict(chosen.captions)},
        "costs": {
            "measured": {"seconds": seconds, "bytes": sizes}, "formula_seconds": FORMULA_SECONDS, "formula_bytes": FORMULA_BYTES,
            "largest": largest, "chosen": smallest, "saved": {name: largest[name] - smallest[name] for name in ("seconds", "hours", "bytes")}, "pilot": own,
        },
        "recipe": dataclasses.asdict(_recipe(chosen, search, store)), "commands": commands(config, store, chosen),
    }  # fmt: skip


def _arm(arm: Arm, runs: Sequence[dict[str, Any]], measure: Measure, confidence: float) -> dict[str, Any]:
    hits = np.stack([measure.hits(run) for run in runs])
    low, high = crossed_interval(hits, confidence)
    kept = ("seed", "recalls", "cosine", "train_seconds", "evaluate_seconds", "core_seconds")
    return {
        **dataclasses.asdict(arm), "captions": dict(arm.captions), "recall": {"value": float(hits.mean()), "low": max(low, 0.0), "high": min(high, 1.0)},
        "seeds": [{**{name: run[name] for name in kept}, "recall": float(measure.hits(run).mean())} for run in runs],
    }  # fmt: skip


def _recipe(chosen: Arm, search: Search, store: Store) -> Any:
    """For training on the full store. Teachers of equal names are numbered in a store: their names say nothing in another one."""
    recipe = chosen.recipe(search.ground.base)
    return recipe if _plain_names(store) else dataclasses.replace(recipe, teachers=())


def _plain_names(store: Store) -> bool:
    sources = Counter(facts.name.rpartition("-")[0] for facts in store.teachers)
    names = {facts.name for facts in store.teachers}
    return not any(name in names for name in sources)


def commands(config: PilotConfig, store: Store, chosen: Arm) -> dict[str, str]:
    """What to run on all pairs. STORE and CKPT stand for folders to write."""
    specs = [spec for spec, facts in zip(config.teachers, store.teachers, strict=True) if facts.name in chosen.teachers]
    kinds = dict(chosen.captions)
    reinforce = ["mclip", "reinforce", config.source, "STORE", "--teachers", *specs, "--augmentations", str(chosen.augmentations)]
    reinforce += ["--templates", *(config.templates if not kinds or "template" in kinds else ())]
    if config.captions is not None and (not kinds or set(kinds) - {"raw", "template"}):
        reinforce += ["--captions", config.captions]
    reinforce += ["--language", config.language, "--dtype", config.dtype, "--seed", str(config.seed)]
    recipe = str(Path(config.out) / "recipe.json")
    train = ["mclip", "train", "--pairs", config.source, "--store", "STORE", "--out", "CKPT", "--recipe", recipe, "--model", config.model]
    return {"reinforce": shlex.join(reinforce), "train": shlex.join(train)}


# ---------------------------------------------------------------- for people


def table(found: dict[str, Any]) -> str:
    """The report as text: a row a candidate, the decisions, the costs, the commands."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    out = io.StringIO()
    console = Console(file=out, width=WIDTH, highlight=False, markup=False)
    arms = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("factor", "candidate", "recall", "interval", "behind the best", "interval", "seeds", "cosine", ""):
        arms.add_column(name, justify="right" if name in ("recall", "behind the best", "seeds", "cosine") else "left")
    for decision in found["decisions"]:
        for n, row in enumerate(decision["candidates"]):
            arms.add_row(decision["factor"] if n == 0 else "", *_cells(row), _mark(row["name"], decision))
    subset, costs = found["subset"], found["costs"]
    console.print(
        f"{subset['pairs']:,} of {subset['of']:,} pairs, student {found['model']}, {found['samples']:,} samples a run, {found['seeds']} seeds; "
        f"{found['measure']} of {found['queries']:,} queries, by chance {found['chance'] or 0:.4f}"
    )
    console.print(arms)
    for decision in found["decisions"]:
        console.print(f"{decision['factor']}: " + (f"{decision['chosen']}; " if decision["candidates"] else "") + decision["reason"])
        if decision.get("smallest_visible") is not None:
            console.print(f"    a loss of recall below {decision['smallest_visible']:.4f} would not have been seen")
        if (wrong := _cosine_note(decision)) is not None:
            console.print(wrong)
    console.print()
    console.print(_costs(costs, Table(box=box.SIMPLE_HEAD, pad_edge=False)))
    device = costs["measured"]["seconds"]["device"]
    for line in (f"seconds of {device}: {costs['formula_seconds']}", f"bytes: {costs['formula_bytes']}", _own(costs), "", *_next(found)):
        console.print(line, soft_wrap=True)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def _cells(row: Mapping[str, Any]) -> list[str]:
    recall, behind = row["recall"], row["behind_by"]
    best = behind["low"] == behind["high"] == 0
    return [
        row["name"], f"{recall['value']:.4f}", f"[{recall['low']:.4f}, {recall['high']:.4f}]", "" if best else f"{behind['value']:+.4f}",
        "" if best else f"[{behind['low']:+.4f}, {behind['high']:+.4f}]", str(row["seeds"]), "" if row["cosine"] is None else f"{row['cosine']:.3f}",
    ]  # fmt: skip


def _mark(name: str, decision: Mapping[str, Any]) -> str:
    marks = ["chosen"] if name == decision["chosen"] else []
    row = next(row for row in decision["candidates"] if row["name"] == name)
    marks += ["best"] if name == decision["best"] else []
    return ", ".join([*marks, *(state for state in ("behind", "open") if row[state])])


def _cosine_note(decision: Mapping[str, Any]) -> str | None:
    """Where the highest cosine stands elsewhere than the highest recall, and that is shown to be worse."""
    name = decision.get("highest_cosine")
    row = next((row for row in decision["candidates"] if row["name"] == name), None)
    if row is None or not row["behind"]:
        return None
    gap = row["behind_by"]
    return f"    cosine to the teacher would have chosen {name}: recall {gap['value']:.4f} [{gap['low']:.4f}, {gap['high']:.4f}] lower than the best"


def _costs(costs: Mapping[str, Any], grid: Any) -> Any:
    for name in ("reinforcing", "teachers", "views", "captions", "seconds a pair", "hours", "bytes a pair", "GB"):
        grid.add_column(name, justify="left" if name in ("reinforcing", "teachers") else "right")
    for name in ("largest", "chosen"):
        row = costs[name]
        grid.add_row(
            f"{row['pairs']:,} pairs, {name}", "+".join(row["teachers"]), str(row["augmentations"]), f"{row['captions']:g}", f"{row['seconds_per_pair']:.4f}",
            f"{row['hours']:,.2f}", f"{row['bytes_per_pair']:,.0f}", f"{row['bytes'] / 1e9:,.3f}",
        )  # fmt: skip
    saved = costs["saved"]
    grid.add_row("saved", "", "", "", "", f"{saved['hours']:,.2f}", "", f"{saved['bytes'] / 1e9:,.3f}")
    return grid


def _own(costs: Mapping[str, Any]) -> str:
    own = costs["pilot"]
    return (
        f"this pilot: {own['seconds'] / 3600:.2f} hours ({own['reinforcement_seconds'] or 0:.0f} s reinforcing, {own['training_seconds']:.0f} s in {own['runs']} training runs, "
        f"{own['evaluation_seconds']:.0f} s evaluating), {own['core_seconds'] / 3600:.2f} core hours, {own['bytes'] / 1e9:.3f} GB"
    )


def _next(found: Mapping[str, Any]) -> list[str]:
    lines = [found["commands"]["reinforce"], found["commands"]["train"]]
    if not found["complete"]:
        lines.insert(0, "the budget ended before all was decided: the same command with a larger --budget-minutes goes on")
    best = max((arm["recall"]["value"] for arm in found["arms"].values()), default=1.0)
    if found["chance"] is not None and best - found["chance"] < LEARNT * (1 - found["chance"]):
        lines.insert(0, f"warning: the best student's recall is {best:.4f}, by chance {found['chance']:.4f}: too near to tell arms apart; more --samples or a larger --k")
    control = next((decision for decision in found["decisions"] if decision["factor"] == CONTROL and decision["decided"]), None)
    if control is not None and control["gain"]["low"] <= 0:
        lines.insert(0, "warning: " + control["reason"] + "; give more --pairs, --samples or --seeds before you spend the rest")
    return lines
