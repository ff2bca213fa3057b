"""What the runs of the learning-efficiency experiment say: figures, a table for a terminal, and a page with the curves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.report import write_report
from benchmarks.suites.efficiency_arms import ARMS
from benchmarks.suites.efficiency_curves import ratio_over_seeds
from distill.comparison import difference
from distill.schedule import Plan
from runtime.evaluation import split_rows
from runtime.files import write_json
from runtime.pairs import open_pairs

if TYPE_CHECKING:
    from benchmarks.suites.efficiency import Experiment, Job

SPLITS = ("held_out", "trained")
AGAINST: dict[str, tuple[str, str]] = {
    "captions": ("plain_weak", "+ synthetic captions"), "distillation": ("captions", "+ distillation, one teacher"),
    "augmentation": ("distillation", "+ strong augmentation, matched"), "reinforced": ("augmentation", "+ a second teacher"),
    "unmatched": ("reinforced", "control: augmentation not matched"),
    "gated": ("plain", "a noise gate of its own"), "right_half": ("plain", "the right half alone"),
    "shuffled_10": ("clean", "10 % of captions shuffled"), "shuffled_50": ("clean", "50 % of captions shuffled"),
}  # fmt: skip
"""Arm to the arm that it is compared with."""
RATIOS = {"web50": ("plain", "reinforced"), "web25": ("plain_25", "reinforced_25"), "web0": ("clean", "reinforced_0"), "apart": ("plain_apart", "reinforced_apart")}
"""World to the plain and the reinforced arm whose curves are set against each other."""


def figures_of(experiment: Experiment, jobs: Sequence[Job], tuned: dict[Any, Any]) -> dict[str, Any]:
    """All figures of the finished jobs, JSON-ready."""
    figures: dict[str, Any] = {"k": 5, "tuned": {family: {str(samples): list(setting) for samples, setting in found.items()} for family, found in tuned.items()}}
    known = {(job.arm, job.samples) for job in jobs if job.seed < 100}
    hits = {(arm, samples, split): experiment.hits(arm, samples, jobs, split=split) for arm, samples in known for split in SPLITS}
    if any(arm.endswith("_apart") for arm, _ in known):
        hits = {key: _asked(experiment, found) if key[0].endswith("_apart") and key[2] == "trained" else found for key, found in hits.items()}
    figures["arms"] = [_row(experiment, arm, samples, jobs, hits) for arm, samples in sorted(known, key=lambda key: (list(ARMS).index(key[0]), key[1]))]
    figures["ratios"] = {}
    for world, (plain, other) in RATIOS.items():
        for split in SPLITS:
            curves = [{samples: hits[arm, samples, split] for arm, samples in sorted(known) if arm == name} for name in (plain, other)]
            if all(len(curve) >= 2 for curve in curves):
                figures["ratios"].setdefault(world, {})[split] = ratio_over_seeds(*curves)
    figures["steps"] = []
    for arm, (reference, title) in AGAINST.items():
        for samples in sorted({samples for name, samples in known if name == arm} & {samples for name, samples in known if name == reference}):
            if arm == "reinforced" and samples != experiment.config.ladder_samples:
                continue
            seeds = min(len(hits[name, samples, "trained"]) for name in (reference, arm))
            a, b = (hits[name, samples, "trained"][:seeds] for name in (reference, arm))
            figures["steps"].append({"arm": arm, "title": title, "against": reference, "samples": samples, **difference(a, b, paired=True), "not_paired": difference(a, b)})
    same = hits.get(("reinforced", experiment.config.tuning[0], "trained"))
    if same is not None and len(same) >= 2 * experiment.config.seeds:
        count = experiment.config.seeds
        figures["same_twice"] = {"arm": "reinforced", "samples": experiment.config.tuning[0], **difference(same[:count], same[count : 2 * count])}
    if any(arm == "nested" for arm, _ in known):
        figures["nested"] = _nested(experiment, jobs)
    if "web50" in figures["ratios"]:
        found = figures["ratios"]["web50"]["trained"]
        most = max(samples for arm, samples in known if arm == "reinforced")
        figures |= {"samples_ratio_plain_over_reinforced": found["median"], "samples_ratio_low": found["low"], "samples_ratio_high": found["high"],
                    "seeds": len(found["seeds"]), "recall5_reinforced": round(float(hits["reinforced", most, "trained"].mean()), 4)}  # fmt: skip
    return figures


def _nested(experiment: Experiment, jobs: Sequence[Job]) -> dict[str, Any]:
    """Recall@5 of the embeddings cut to each length, and the share that 128 of 512 dimensions keep."""
    found = [json.loads((experiment.out / "runs" / job.name / "ranks.json").read_text(encoding="utf-8"))["cuts"] for job in jobs if job.arm == "nested"]
    recalls = {dim: round(float(np.mean([np.array(one[dim]["trained"]) <= 5 for one in found])), 4) for dim in found[0]}
    kept = [np.mean(np.array(one["128"]["trained"]) <= 5) / max(np.mean(np.array(one["512"]["trained"]) <= 5), 1e-9) for one in found]
    return {"recall5": recalls, "kept_128_of_512": round(recalls["128"] / max(recalls["512"], 1e-9), 4), "kept_of_each_seed": [round(float(one), 4) for one in kept]}


def _asked(experiment: Experiment, found: np.ndarray) -> np.ndarray:
    """Of the trained concepts' queries those whose concept is one of the students' in the world apart."""
    concepts, pairs = experiment.world("apart").concepts or frozenset(), open_pairs(experiment.test)
    meta = [pairs.meta(row) for row in range(len(pairs))]
    labels = {str(meta[row]["label"]): meta[row]["concept"] in concepts for row in reversed(split_rows(meta)["trained"])}
    order = list(dict.fromkeys(str(meta[row]["label"]) for row in split_rows(meta)["trained"]))
    return found[:, np.array([labels[text] for text in order])]


def _row(experiment: Experiment, arm: str, samples: int, jobs: Sequence[Job], hits: dict[Any, np.ndarray]) -> dict[str, Any]:
    found = experiment.of(arm, samples, [job for job in jobs if job.seed < 100])
    plan = Plan.of(samples, ARMS[arm].recipe(found[0].setting))
    row: dict[str, Any] = {"arm": arm, "title": ARMS[arm].title, "samples": samples, "setting": list(found[0].setting), "seeds": len(found),
                           "text_only_samples": plan.text_steps * 2 * plan.batch_size}  # fmt: skip
    for split in SPLITS:
        per_seed = hits[arm, samples, split].mean(axis=1)
        row |= {f"recall5_{split}": round(float(per_seed.mean()), 4), f"recall5_{split}_seeds": [round(float(value), 4) for value in per_seed]}
    return row


def as_text(figures: dict[str, Any]) -> str:
    """The table for a terminal."""
    lines = ["recall@5, unseen drawing style, text to image (mean over seeds; held-out concepts first)"]
    lines.append(f"{'arm':72} {'samples':>8} {'texts':>6} {'seeds':>5} {'held out':>9} {'trained':>8}")
    for row in figures["arms"]:
        recalls = f"{row['recall5_held_out']:9.3f} {row['recall5_trained']:8.3f}"
        lines.append(f"{row['title']:72} {row['samples']:8,} {row['text_only_samples']:6,} {row['seeds']:5} {recalls}")
    lines.append("\nsamples at which plain is best over samples at which reinforced is as good (median over seeds, range)")
    for world, splits in figures["ratios"].items():
        for split, row in splits.items():
            bounds = {one["bound"] for one in row["seeds"]} - {""}
            note = f"  ({', '.join(sorted(bounds))} for some seeds)" if bounds else ""
            lines.append(f"{world:8} {split:9} {row['median']:6.2f} [{row['low']:.2f}, {row['high']:.2f}], of the mean curves {row['of_means']['ratio']:.2f}{note}")
    if figures["steps"]:
        lines.append("\nstep by step (difference of recall@5 with its 95 % interval over queries and seeds; students of one seed began alike and are paired)")
        lines += [_verdict(f"{row['title']} against {row['against']}, {row['samples']:,} samples", row) for row in figures["steps"]]
    if "nested" in figures:
        cut = ", ".join(f"{dim}: {value:.3f}" for dim, value in figures["nested"]["recall5"].items())
        lines.append(f"\nnested dimensions, recall@5 of embeddings cut to {cut}; 128 of 512 keep {figures['nested']['kept_128_of_512']:.1%}")
    if "same_twice" in figures:
        lines.append(_verdict("the same training with other seeds (A/A)", figures["same_twice"]))
    return "\n".join(lines)


def _verdict(title: str, row: dict[str, Any]) -> str:
    return f"{title:72} {row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]  {row['verdict']}"


def write_pages(out: Path, figures: dict[str, Any], table: str) -> None:
    """summary.json, table.txt and report.html."""
    write_json(out / "summary.json", figures)
    (out / "table.txt").write_text(table + "\n", encoding="utf-8")
    write_report([], out / "report.html", efficiency=out, title="Learning efficiency")
