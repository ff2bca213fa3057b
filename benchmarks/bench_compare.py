"""Two bundles side by side: phase by phase, in the same rounds, each opened several times."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from .bench_steps import Bench, Report, Step, ticker
from .measure import Plan, Timed, interleave
from .phases import TOWERS, Subject
from .ratios import compare
from .results import Line

OPENINGS, MOST_OPENINGS = 12, 36
"""How often both sides are opened anew: where a model's weights happen to lie in memory is worth a percent or more, and is neither model's merit. While the
interval is wider than ±`WIDE`, further openings follow, at most three times as many: a restless machine is asked for longer."""
WIDE = 0.02
COMPARED = ("preprocess", "tokenise", "image_tower", "text_tower", "end_to_end_image", "end_to_end_text")


def compare_steps(first: Bench, second: Bench) -> Iterator[Step]:
    """Phase by phase, both bundles with the artefacts that the SDK would choose here; `second` is the candidate."""
    names = {bench.subject.clip.manifest.name for bench in (first, second)}
    labels = [bench.subject.clip.manifest.name + ("" if len(names) == 2 else f" ({bench.subject.sha256[:8]})") for bench in (first, second)]
    for phase in COMPARED:

        def work(report: Report, phase: str = phase) -> list[Line]:
            if phase == "image_tower":
                first.subject.check()
                second.subject.check()
            return [_compare(first, second, phase, labels, report)]

        key = f"{first.subject.sha256}>{second.subject.sha256}"
        yield Step(f"compare {phase.replace('_', ' ')}", (("comparison", phase, key, ""),), work)


def _compare(first: Bench, second: Bench, phase: str, labels: list[str], report: Report) -> Line:
    plan = first.config.plan
    openers = {name: functools.partial(_function, bench.subject, phase) for name, bench in (("first", first), ("second", second))}
    samples, groups = opened_anew(openers, plan, OPENINGS if any(tower in phase for tower in TOWERS) else 1, report)
    ratio = compare(samples["first"], samples["second"], groups=groups, seed=first.config.seed)
    figures: dict[str, Any] = {"candidate": labels[1], "reference": labels[0], **ratio.as_dict(), "sentence": f"{phase.replace('_', ' ')}: {ratio.sentence(labels[1], labels[0])}"}
    figures |= {"reference_p50_ns": float(np.median(samples["first"])), "candidate_p50_ns": float(np.median(samples["second"]))}
    figures |= {"reference_samples": samples["first"].tolist(), "candidate_samples": samples["second"].tolist(), "openings": groups}
    settings = first.settings(reference_sha256=first.subject.sha256, seconds=plan.seconds, warmup=plan.warmup)
    return second.line("comparison", phase, settings=settings, figures=figures)


def opened_anew(
    openers: Mapping[str, Callable[[], Timed]], plan: Plan, openings: int, report: Report = lambda share: None, most: int = MOST_OPENINGS
) -> tuple[dict[str, np.ndarray], list[int]]:
    """Interleave what two openers open, the plan's rounds shared by `openings` parts, each with its own opening (in alternating order) and warm-up.
    When their ratio is not known to ±2 % then, more parts follow, `most` at most, none begun after the plan's `max_seconds`.

    Returns:
        The samples of each, joined, and the number of rounds of each part.
    """
    part = replace(
        plan, seconds=plan.seconds / openings, max_seconds=plan.max_seconds / openings, min_samples=max(plan.few_samples, -(-plan.min_samples // openings)),
        max_samples=max(plan.few_samples, -(-plan.min_samples // openings), plan.max_samples // openings),
    )  # fmt: skip
    parts: dict[str, list[np.ndarray]] = {name: [] for name in openers}
    started = time.perf_counter()
    for opening in range(max(openings, most)):
        late = time.perf_counter() - started > plan.max_seconds
        if opening >= openings and (openings == 1 or late or (opening % 3 == 0 and narrow(*parts.values()))):
            break
        names = list(openers) if opening % 2 == 0 else list(reversed(openers))
        opened = {name: openers[name]() for name in names}
        tick = ticker(part, lambda done, opening=opening: report(min(1.0, (opening + done) / openings)))
        for name, values in interleave(opened, replace(part, seed=plan.seed * openings + opening), tick).items():
            parts[name].append(values)
    groups = [len(values) for values in next(iter(parts.values()))]
    return {name: np.concatenate(values) for name, values in parts.items()}, groups


def narrow(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> bool:
    """Whether the ratio of openings (samples of each) is known to ±2 %."""
    ratio = compare(np.concatenate(first), np.concatenate(second), groups=[len(part) for part in first], resamples=1000)
    return ratio.high / ratio.value <= 1 + WIDE and ratio.value / ratio.low <= 1 + WIDE


def _function(subject: Subject, phase: str) -> Timed:
    """The phase, opened anew."""
    tower = next((tower for tower in TOWERS if tower in phase), None)
    if tower is None:
        return subject.host()[phase]
    artefact = subject.clip.manifest.artefact(subject.clip.choice[tower].id)
    return subject.tower(tower, artefact) if phase.endswith("_tower") else subject.end_to_end(tower, artefact)
