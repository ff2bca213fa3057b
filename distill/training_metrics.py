"""What a run writes about itself: a line of metrics.jsonl, recall on validation pairs, the best checkpoint by it."""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from distill.recipes import Recipe
from distill.schedule import Plan, learning_rate
from distill.training_state import Run
from mobileclip.checkpoint import save_checkpoint
from runtime.errors import MissingExtraError, TrainingError

logger = logging.getLogger(__name__)

BEST = "best"
CHOSEN_BY = "recall@5_all"


class Clock:
    """Where the time of a run goes: waiting for data, forward passes with the loss, backward passes, the optimiser with the average; "other" is the rest
    (logging, saved states), validation left out. On a GPU a step's parts are when they were asked for, not when they were done."""

    PARTS = ("data", "forward", "backward", "optimizer")

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(self.PARTS, 0.0)
        self.began = time.perf_counter()
        self.left_out = 0.0

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Inside, time counts as `part`; what is measured inside that counts for itself alone."""
        began, inner = time.perf_counter(), sum(self.seconds.values())
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - began - (sum(self.seconds.values()) - inner)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Inside, time counts for nothing."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.left_out += time.perf_counter() - began

    def elapsed(self) -> float:
        """Seconds of the run so far, without pauses."""
        return time.perf_counter() - self.began - self.left_out

    def shares(self) -> dict[str, float]:
        """Share of every part, and of the rest."""
        whole = max(self.elapsed(), 1e-9)
        found = {name: round(seconds / whole, 3) for name, seconds in self.seconds.items()}
        return {**found, "other": round(max(0.0, 1 - sum(self.seconds.values()) / whole), 3)}


def metrics_line(run: Run, plan: Plan, recipe: Recipe, terms: dict[str, Tensor], clock: Clock, marks: dict[str, float]) -> dict[str, Any]:
    """One line of metrics.jsonl. `samples_per_second` counts pairs (captions in the text-only steps) since the line before."""
    values = {name: float(value) for name, value in terms.items()}
    text_only = run.step <= plan.text_steps
    items = (run.step - marks.get("step", 0)) * plan.batch_size * (2 if text_only else 1)
    now = clock.elapsed()
    elapsed = now - marks.get("clock", 0.0)
    marks.update(step=run.step, clock=now)
    return {
        "step": run.step,
        "phase": "text" if text_only else "pairs",
        "samples": plan.samples(run.step),
        "loss": total_of(values, recipe),
        "loss_terms": values,
        "lr": learning_rate(run.step - 1, plan.steps, recipe),
        "logit_scale": float(run.model.logit_scale.detach().exp()),
        "samples_per_second": round(items / max(elapsed, 1e-9), 1),
        "seconds": round(run.seconds, 2),
        "time_share": clock.shares(),
    }


def total_of(terms: Mapping[str, float], recipe: Recipe) -> float:
    """The loss: the recipe's weights times its terms."""
    return sum(getattr(recipe, name) * value for name, value in terms.items())


def live_line(line: dict[str, Any]) -> str:
    """What a person reads beside the bar: the loss and its parts, the rate, and how long steps waited for data."""
    parts = " ".join(f"{name} {value:.3f}" for name, value in line["loss_terms"].items()) if len(line["loss_terms"]) > 1 else ""
    waited = f"  waited for data {line['time_share']['data']:.0%}" if line["time_share"]["data"] >= 0.005 else ""
    return f"loss {line['loss']:.3f}{f' ({parts})' if parts else ''}  {line['samples_per_second']:.0f} samples/s{waited}"


def limit_of(shares: Mapping[str, float]) -> str:
    """What a faster run would have to make faster, in words."""
    advice = {
        "data": "reading and decoding pictures (more --prefetch-threads, smaller pictures, a faster disk)",
        "forward": "the forward passes (a smaller student, --compile, --precision bf16 where the processor has it)",
        "backward": "the backward passes (a smaller student, --compile, --precision bf16 where the processor has it)",
        "optimizer": "the optimiser (larger batches: fewer steps for as many samples)",
        "other": "work between steps (saved states, logging: longer --save-seconds)",
    }
    return advice[max(shares, key=lambda name: shares[name])]


def time_figures(out: Path) -> dict[str, Any]:
    """Where the time went, from the last line of the metrics, and the median rate on pairs."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rates = [line["samples_per_second"] for line in lines if line["phase"] == "pairs"]
    return {"samples_per_second": float(np.median(rates)), "time_share": lines[-1]["time_share"]}


class Divergence:
    """Notices a loss that runs away: the mean of the last WINDOW steps is above three times that of the first WINDOW, plus one. A change of phase begins
    anew."""

    WINDOW = 50

    def __init__(self) -> None:
        self.phase: str | None = None
        self.first: list[float] = []
        self.last: deque[float] = deque(maxlen=self.WINDOW)

    def note(self, loss: float, phase: str, step: int) -> None:
        """Raises TrainingError when it has run away. step: steps done."""
        if phase != self.phase:
            self.phase, self.first = phase, []
            self.last.clear()
        if len(self.first) < self.WINDOW:
            self.first.append(loss)
            return
        self.last.append(loss)
        before, now = sum(self.first) / self.WINDOW, sum(self.last) / self.WINDOW
        if len(self.last) == self.WINDOW and now > 3 * abs(before) + 1:
            raise TrainingError(f"the loss diverges: over the {self.WINDOW} steps up to step {step} it is {now:.3g} on average, at the beginning it was {before:.3g}")


class Validation:
    """Retrieval of the averaged weights on the validation pairs, a few times over the run; the best of them is kept in OUT/best. Its time counts for no
    step."""

    def __init__(self, pairs: str | None, times: int, out: Path, plan: Plan, step: int = 0, fingerprint: str = "") -> None:
        """step: steps done when the run begins or goes on."""
        self.pairs, self.times, self.out, self.plan, self.fingerprint = pairs, times, out, plan, fingerprint
        self.done = int(times * step / plan.steps)
        self.best = self._found(step)

    def _found(self, step: int) -> dict[str, Any] | None:
        """What an earlier part of the same run kept."""
        try:
            facts = json.loads((self.out / BEST / "receipt.json").read_text(encoding="utf-8"))
            return dict(facts["best"]) if facts["fingerprint"] == self.fingerprint and facts["best"]["step"] <= step else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def maybe(self, run: Run) -> dict[str, Any]:
        """{"validation": recalls} when it is time, else {}."""
        wanted = int(self.times * run.step / self.plan.steps)
        if self.pairs is None or wanted <= self.done:
            return {}
        self.done = wanted
        from distill.evaluate import quick_recall

        recalls = quick_recall(run.average, self.pairs, self.out)
        if self.best is None or recalls[CHOSEN_BY] > self.best[CHOSEN_BY]:
            self.best = {"step": run.step, "samples": self.plan.samples(run.step), CHOSEN_BY: recalls[CHOSEN_BY]}
            training = run.average.training
            extra = {"stage": "train", "fingerprint": self.fingerprint, "best": self.best}
            save_checkpoint(run.average.eval(), self.out / BEST, tokenizer=self.out / "tokenizer.json", extra=extra)
            run.average.train(training)
        return {"validation": recalls}


@contextmanager
def tensorboard(folder: Path | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that writes lines of `metrics_line` as scalars over samples; it does nothing without a folder.

    Raises:
        MissingExtraError: the package is not installed.
    """
    if folder is None:
        yield lambda line: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtraError("tensorboard", "tensorboard", "mclip train --tensorboard") from error

    with SummaryWriter(str(folder)) as writer:

        def write(line: dict[str, Any]) -> None:
            for name, value in scalars(line):
                writer.add_scalar(name, value, line["samples"])

        yield write


def scalars(line: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a line, those inside objects as "loss_terms/feature"."""
    for name, value in line.items():
        if isinstance(value, dict):
            yield from scalars(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield prefix + name, float(value)
