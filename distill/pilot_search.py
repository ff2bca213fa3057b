"""The pilot's search: one factor after the other from a base arm, several seeds an arm, each decision by `distill.pilot_decisions.decide`.

    teachers → logit scale of each → λ → augmentations → captions, and at the end the same student without any teacher

A factor starts from what the factors before it chose. Seeds are added one after the other to all candidates of a factor; from the second
seed on, a candidate that is shown to be behind the best gets no more (a race, Birattari et al. 2002).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from distill.pilot_arms import Arm, Ground, Measure
from distill.pilot_decisions import Candidate, Verdict, behind, crossed_interval, decide, smallest_visible

Option = tuple[Candidate, Arm]
CONTROL = "no teacher"


class BudgetSpent(Exception):  # noqa: N818 (no error: the search ends early)
    """The next run would go beyond the budget."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Factors:
    """What is tried. scales: factors of each teacher's own logit scale; captions: name to share per type; costs: by teacher, relative."""

    scales: tuple[float, ...]
    distillation: tuple[float, ...]
    augmentations: tuple[int, ...]
    captions: Mapping[str, tuple[tuple[str, float], ...]]
    caption_costs: Mapping[str, float]
    teacher_seconds: Mapping[str, float]


@dataclass(kw_only=True, slots=True)
class Search:
    """A search that is going on."""

    ground: Ground
    measure: Measure
    factors: Factors
    seeds: int
    confidence: float
    tolerance: float
    budget_seconds: float | None
    spent: float
    """Seconds of what came before the runs, and of all runs so far, in this call or an earlier one."""
    say: Callable[[str], None]
    decisions: list[dict[str, Any]] = field(default_factory=list)
    arms: dict[str, tuple[Arm, list[dict[str, Any]]]] = field(default_factory=dict)
    """By identity: the arm and its runs, seed after seed."""
    waiting: dict[str, int] = field(default_factory=dict)
    """Factor to the most runs that it may still need."""
    exhausted: bool = False
    _counted: set[tuple[str, int]] = field(default_factory=set)

    def run(self, base: Arm) -> Arm:
        """Decide every factor, from this arm. Returns the arm that was chosen."""
        count = len(base.teachers)
        self.waiting = {
            "teachers": count * (count + 1) // 2, "logit scale": count * len(self.factors.scales), "λ": len(self.factors.distillation),
            "augmentations": len(self.factors.augmentations) - 1, "captions": len(self.factors.captions) - 1, CONTROL: 1,
        }  # fmt: skip
        arm = self._teachers(base)
        arm = self._scales(arm)
        arm = self._distillation(arm)
        arm = self._augmentations(arm)
        arm = self._captions(arm)
        self._control(arm)
        return arm

    # ------------------------------------------------------------ factors, in the order in which they are decided

    def _teachers(self, arm: Arm) -> Arm:
        """Drop one teacher after the other as long as nothing speaks against it. The best arm of all rounds stays in every comparison, so
        that small losses do not add up over the rounds."""
        best: Option | None = None
        while True:
            options = [(self._named(arm, kept=True), arm)] + [(self._named(one), one) for one in without_one(arm)]
            if best is not None and best[1] not in [one for _, one in options]:
                options.append((self._named(best[1]), best[1]))
            verdict = self._decide("teachers", options)
            if verdict is None:
                return arm
            chosen, best = _pick(options, verdict.chosen), next(option for option in options if option[0].name == verdict.best)
            if len(chosen.teachers) == 1 or len(chosen.teachers) >= len(arm.teachers):
                return chosen
            arm = chosen

    def _named(self, arm: Arm, kept: bool = False) -> Candidate:
        """Fewer teachers are cheaper; of as many, those that take half the seconds."""
        seconds = sum(self.factors.teacher_seconds[name] for name in arm.teachers)
        least = min(self.factors.teacher_seconds.values())
        step = float(np.floor(np.log2(max(1.0, seconds / least)))) if least > 0 else 0.0
        return Candidate(name="+".join(arm.teachers), cost=len(arm.teachers) + step / 100, kept=kept)

    def _scales(self, arm: Arm) -> Arm:
        if self.ground.base.affinity <= 0:
            self._skip("logit scale", "the recipe has no affinity loss, the only one that reads it")
            return arm
        for n, name in enumerate(arm.teachers):
            own = arm.logit_scales[n]
            tried = [own, *(round(own * factor, 4) for factor in self.factors.scales)]
            options = [
                (Candidate(name=f"{scale:g}", kept=scale == own), dataclasses.replace(arm, logit_scales=(*arm.logit_scales[:n], scale, *arm.logit_scales[n + 1 :])))
                for scale in dict.fromkeys(tried)
            ]
            arm = self._choose(f"logit scale of {name}", options, arm, "logit scale")
        return arm

    def _distillation(self, arm: Arm) -> Arm:
        values = dict.fromkeys([arm.distillation, *self.factors.distillation])
        options = [(Candidate(name=f"{value:g}", kept=value == arm.distillation), dataclasses.replace(arm, distillation=value)) for value in values]
        return self._choose("λ", options, arm)

    def _augmentations(self, arm: Arm) -> Arm:
        counts = sorted({arm.augmentations, *self.factors.augmentations}, reverse=True)
        options = [(Candidate(name=f"{n}", cost=n, kept=n == arm.augmentations), dataclasses.replace(arm, augmentations=n)) for n in counts]
        return self._choose("augmentations", options, arm)

    def _captions(self, arm: Arm) -> Arm:
        options = [
            (Candidate(name=name, cost=self.factors.caption_costs[name], kept=mix == arm.captions), dataclasses.replace(arm, captions=mix))
            for name, mix in self.factors.captions.items()
        ]
        return self._choose("captions", options, arm)

    def _control(self, arm: Arm) -> None:
        """The chosen arm against the same student without a teacher: reported, never chosen."""
        plain = dataclasses.replace(arm, distillation=0.0)
        options = [(Candidate(name="chosen", kept=True), arm), (Candidate(name=CONTROL), plain)]
        hits = self._race(CONTROL, options)
        if hits is None:
            return
        common = min(len(found) for found in hits.values())
        chosen, without = hits["chosen"][:common].astype(float), hits[CONTROL][:common].astype(float)
        gain = chosen - without
        low, high = crossed_interval(gain, self.confidence)
        shown = "the teachers help" if low > 0 else "the teachers do harm" if high < 0 else "this pilot does not show that the teachers help"
        figures = f"recall {chosen.mean():.4f} with them, {without.mean():.4f} without, difference {gain.mean():+.4f} [{low:+.4f}, {high:+.4f}]"
        self.decisions.append({
            "factor": CONTROL, "decided": True, "chosen": "chosen", "reason": f"{shown}: {figures}",
            "gain": {"value": float(gain.mean()), "low": low, "high": high}, "candidates": [], "arms": {name: one.identity for name, one in _arms(options).items()},
        })  # fmt: skip

    # ------------------------------------------------------------ deciding one factor

    def _choose(self, factor: str, options: Sequence[Option], arm: Arm, planned: str | None = None) -> Arm:
        verdict = self._decide(factor, options, planned)
        return arm if verdict is None else _pick(options, verdict.chosen)

    def _decide(self, factor: str, options: Sequence[Option], planned: str | None = None) -> Verdict | None:
        """None where the budget ended, or there is nothing to choose from."""
        if len(options) == 1:
            self._skip(factor, "there is one candidate")
            return None
        hits = self._race(factor, options, planned)
        if hits is None:
            return None
        verdict = decide([candidate for candidate, _ in options], hits, self.confidence, self.tolerance)
        cosines = {candidate.name: self._mean_cosine(one) for candidate, one in options}
        known = {name: value for name, value in cosines.items() if value is not None}
        by_cosine = max(known, key=lambda name: known[name]) if len(known) == len(options) else None
        rows = [{**row, "arm": _arms(options)[row["name"]].identity, "cosine": cosines[row["name"]]} for row in verdict.rows]
        self.decisions.append({
            "factor": factor, "decided": True, "chosen": verdict.chosen, "best": verdict.best, "reason": verdict.reason, "level": verdict.level,
            "smallest_visible": smallest_visible(verdict.rows), "highest_cosine": by_cosine, "candidates": rows,
        })  # fmt: skip
        self.say(f"{factor}: {verdict.chosen} ({verdict.reason})")
        return verdict

    def _skip(self, factor: str, reason: str) -> None:
        self.waiting.pop(factor, None)
        self.decisions.append({"factor": factor, "decided": False, "reason": f"not tried: {reason}", "candidates": []})

    def _race(self, factor: str, options: Sequence[Option], planned: str | None = None) -> dict[str, np.ndarray] | None:
        """Candidate to (S, Q) booleans; None when the budget ended before all had run."""
        self.waiting.pop(planned or factor, None)
        running, hits = list(options), dict[str, np.ndarray]()
        level = 1 - (1 - self.confidence) / max(1, len(options) - 1)
        for number in range(self.seeds):
            for place, (candidate, arm) in enumerate(running):
                rest = len(running) - place + (self.seeds - number - 1) * len(running)
                try:
                    self._run(factor, candidate, arm, number, rest + self.seeds * sum(self.waiting.values()))
                except BudgetSpent:
                    self.exhausted = True
                    self.decisions.append({"factor": factor, "decided": False, "reason": "not decided: the budget ended; what was set is kept", "candidates": []})
                    return None
            hits = {candidate.name: self._hits(arm) for candidate, arm in options}
            if number >= 1 and number + 1 < self.seeds:
                best = max(running, key=lambda option: float(hits[option[0].name].mean()))[0].name
                running = [option for option in running if option[0].name == best or not behind(hits[best], hits[option[0].name], level)]
        return hits

    def _run(self, factor: str, candidate: Candidate, arm: Arm, number: int, at_most: int) -> None:
        done = self.ground.result(arm, number)
        if done is None:
            self._check_budget()
        started = time.monotonic()
        found = done or self.ground.run(arm, number)
        _, runs = self.arms.setdefault(arm.identity, (arm, []))
        if (arm.identity, number) in self._counted:
            return
        self._counted.add((arm.identity, number))
        runs.append(found)
        self.spent += found["train_seconds"] + found["evaluate_seconds"]
        if done is None:
            left = (at_most - 1) * self._typical_seconds()
            self.say(
                f"{factor}: {candidate.name}, seed {found['seed']}: recall@{self.measure.k} {self.measure.hits(found).mean():.4f} in {time.monotonic() - started:.0f} s; "
                f"at most {at_most - 1} runs and {left:.0f} s to go"
            )

    def _typical_seconds(self) -> float:
        """Of a run, the median so far."""
        seconds = [one["train_seconds"] + one["evaluate_seconds"] for _, runs in self.arms.values() for one in runs]
        return float(np.median(seconds)) if seconds else 0.0

    def _check_budget(self) -> None:
        if self.exhausted or (self.budget_seconds is not None and self.spent + self._typical_seconds() > self.budget_seconds):
            raise BudgetSpent

    def _hits(self, arm: Arm) -> np.ndarray:
        return np.stack([self.measure.hits(one) for one in self.arms[arm.identity][1]])

    def _mean_cosine(self, arm: Arm) -> float | None:
        known = [one["cosine"] for one in self.arms[arm.identity][1] if one["cosine"] is not None]
        return round(float(np.mean(known)), 4) if known else None


def without_one(arm: Arm) -> list[Arm]:
    """The arms with one teacher fewer."""
    if len(arm.teachers) == 1:
        return []
    return [
        dataclasses.replace(arm, teachers=arm.teachers[:n] + arm.teachers[n + 1 :], logit_scales=arm.logit_scales[:n] + arm.logit_scales[n + 1 :])
        for n in range(len(arm.teachers))
    ]


def _arms(options: Sequence[Option]) -> dict[str, Arm]:
    return {candidate.name: arm for candidate, arm in options}


def _pick(options: Sequence[Option], name: str) -> Arm:
    return _arms(options)[name]
