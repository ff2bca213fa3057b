"""How long a run is, and its learning rate, as functions of the step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from distill.loader import Request
from distill.recipes import Recipe
from runtime.errors import RecipeError


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Steps of a run: `text_steps` on captions alone, then steps on pairs up to `steps`."""

    text_steps: int
    steps: int
    batch_size: int
    sets: int = 1
    """Captions that a picture shows at once: a batch of texts alone has so many times fewer rows."""

    @classmethod
    def of(cls, samples: int, recipe: Recipe) -> Plan:
        """A caption read alone counts as a sample: two recipes given the same number of samples have read as much."""
        text_steps = round(min(recipe.text_samples, samples // 10) / (2 * recipe.batch_size))
        pair_steps = math.ceil((samples - 2 * text_steps * recipe.batch_size) / recipe.batch_size)
        if samples < recipe.batch_size:
            raise RecipeError(f"samples is {samples}, less than one batch of {recipe.batch_size}; ask for more samples or a smaller batch")
        return cls(text_steps=text_steps, steps=text_steps + pair_steps, batch_size=recipe.batch_size, sets=max(1, len(recipe.caption_sets)))

    def pairs(self, step: int) -> int:
        """Pairs seen after `step` steps."""
        return max(0, step - self.text_steps) * self.batch_size

    def samples(self, step: int) -> int:
        """Pairs and captions alone seen after `step` steps."""
        return self.pairs(step) + min(step, self.text_steps) * 2 * self.batch_size

    def requests(self, step: int) -> Iterator[Request]:
        """The batches of the steps after `step`, to the end."""
        for n in range(step, self.steps):
            if n < self.text_steps:
                rows = max(1, 2 * self.batch_size // self.sets)
                yield Request(first=n * rows, size=rows, pictures=False)
            else:
                yield Request(first=self.pairs(n), size=self.batch_size)


def learning_rate(step: int, steps: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine to zero at the last step."""
    warmup = max(1, round(recipe.warmup * steps))
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
