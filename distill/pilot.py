"""mclip pilot: spend a small share of the pairs to choose how all of them are reinforced, by the student's recall.

    mclip pilot PAIRS OUT --teachers A B C --validation PAIRS

The share is reinforced once, with every candidate teacher and the most augmentations; every arm is then a training run on that one store.
Teachers, their logit scales, the weight of distillation, the number of augmentations and the captions are decided one after the other, each
by the paired difference of the student's recall on pairs it has not seen. A cosine to the teacher is shown beside it and decides nothing.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from distill.pilot_arms import Arm, Ground, Measure, distillation_of
from distill.pilot_costs import measure_bytes, measure_seconds, teacher_seconds
from distill.pilot_report import report, table
from distill.pilot_search import Factors, Search
from distill.pilot_subset import choose, refuse_overlap, subset_size, write_subset
from distill.recipes import Recipe, load_recipe
from distill.reinforce import ReinforceConfig, reinforce
from distill.store import Store, open_store
from mobileclip.presets import preset
from runtime.errors import RecipeError, StoreError
from runtime.evaluation import split_rows
from runtime.files import write_json
from runtime.pairs import open_pairs

SETTINGS, RESULT, RECIPE = "settings.json", "pilot.json", "recipe.json"
BATCHES = 4
"""Of the recipe's size: the fewest pairs that a pilot reads."""
COUNTED_CAPTIONS = 2000
"""Rows whose captions are counted by type."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PilotConfig:
    """Choose teachers, logit scales, λ, augmentations and captions on a share of PAIRS; write OUT/pilot.json and OUT/recipe.json."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PAIRS")]
    """Folder of tar shards: the data that will be reinforced."""
    out: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")]
    """Folder to write; one that was interrupted is continued."""
    teachers: tuple[str, ...]
    """Candidates: checkpoint folders, open_clip:NAME[/PRETRAINED], or module:function."""
    validation: str
    """Pairs folder for the decisions. None of its keys may be in PAIRS."""
    fraction: float = 0.01
    """Share of the pairs that the pilot reads, those of the smallest key hash."""
    pairs: int | None = None
    """That many pairs instead of a share."""
    captions: str | None = None
    """Captions made elsewhere or by mclip caption; with them, caption mixtures are tried."""
    templates: tuple[str, ...] = ("emoji", "drawing")
    """Phrases around the pair's own caption that are stored beside it."""
    language: str = "en"
    model: str = "pocket_s"
    """The student: a preset."""
    recipe: str = "reinforced"
    """What the arms vary: a name in distill/recipes.py or a JSON file."""
    samples: int | None = None
    """Pairs that a run sees, the same one again counted again; eight times the pilot's pairs where nothing is given."""
    seeds: int = 3
    """Training runs an arm."""
    augmentations: tuple[int, ...] = (1, 2, 5)
    """Views a picture to try. The store is made with the largest number."""
    scales: tuple[float, ...] = (0.5, 2.0)
    """Factors of each teacher's own logit scale to try beside 1; none: the scales are not searched."""
    distillation: tuple[float, ...] = (0.5, 0.75, 1.0)
    """Values of λ, the teachers' share of the loss weights, to try beside the recipe's own."""
    direction: Literal["text_to_image", "image_to_text"] = "text_to_image"
    """Of the recall that decides."""
    split: str = "all"
    """Of the validation pairs: all, or held_out, trained … where their facts say so."""
    k: int = 5
    """recall@k decides."""
    confidence: float = 0.95
    """Of the intervals of one factor together."""
    tolerance: float = 0.05
    """Share of the best recall that a cheaper choice may be seen to lose, where the interval holds zero."""
    dtype: Literal["int8", "int4", "float32", "float16", "bfloat16"] = "int8"
    """Of the store."""
    full_pairs: int | None = None
    """Pairs that the cost table speaks of; those of PAIRS where nothing is given."""
    budget_minutes: float | None = None
    """No run is begun that would end later, all calls together; factors that are left keep what was set."""
    workers: int = 2
    """Processes of the reinforcement."""
    device: str = "auto"
    """Where teachers of torch run: cpu, cuda, cuda:1 …, or auto: the GPU where there is one."""
    threads: int = 1
    """Torch threads of a training run."""
    seed: int = 0
    """Of the views and of the first run."""
    keep_weights: bool = False
    """Keep every student's weights."""
    json: bool = False
    """Print one JSON object."""

    def __post_init__(self) -> None:
        if not self.teachers:
            raise RecipeError("a pilot needs at least one teacher to choose from: --teachers CHECKPOINT, open_clip:NAME/PRETRAINED or module:function")
        if len(set(self.teachers)) != len(self.teachers):
            raise RecipeError(f"--teachers names {[name for name, n in Counter(self.teachers).items() if n > 1][0]} twice; give each candidate once")
        if not 0 < self.fraction <= 1 or (self.pairs is not None and self.pairs < 1):
            raise RecipeError(f"--fraction {self.fraction:g} must be above 0 and at most 1, --pairs {self.pairs} at least 1")
        if self.seeds < 1 or self.k < 1 or not 0.5 <= self.confidence < 1 or self.seed < 0 or self.threads < 1 or self.workers < 1:
            raise RecipeError(
                f"seeds {self.seeds}, k {self.k}, threads {self.threads} and workers {self.workers} must be at least 1, seed {self.seed} at least 0, "
                f"confidence {self.confidence:g} from 0.5 to below 1"
            )
        if not self.augmentations or min(self.augmentations) < 1 or any(scale <= 0 for scale in self.scales) or not all(0 < value <= 1 for value in self.distillation):
            raise RecipeError(
                f"augmentations {self.augmentations} must be at least one number from 1, scales {self.scales} above 0, distillation {self.distillation} above 0 and at most 1"
            )
        if not 0 <= self.tolerance < 1:
            raise RecipeError(f"--tolerance {self.tolerance:g} must be at least 0 and below 1: it is a share of the best recall")
        if (self.full_pairs is not None and self.full_pairs < 1) or (self.budget_minutes is not None and self.budget_minutes <= 0):
            raise RecipeError(f"--full-pairs {self.full_pairs} and --budget-minutes {self.budget_minutes} must be above 0")


def pilot(config: PilotConfig) -> dict[str, Any]:
    """Run to the end or to the end of the budget, from where an earlier call stopped. Returns what OUT/pilot.json holds.

    Raises:
        PairsError: the pairs cannot be read, are too few, or share keys with the validation pairs.
        RecipeError, StoreError, CheckpointError: a setting, teacher or preset that does not work, or OUT holds something else.
    """
    base, model = load_recipe(config.recipe), preset(config.model)
    own = distillation_of(base)
    pairs, validation = open_pairs(config.source), open_pairs(config.validation)
    refuse_overlap(pairs, validation)
    rows = choose(pairs.keys, subset_size(len(pairs), config.fraction, config.pairs, BATCHES * base.batch_size))
    samples = config.samples if config.samples is not None else 8 * len(rows)
    if samples < base.batch_size:
        raise RecipeError(f"--samples {samples} is less than one batch of {base.batch_size}; ask for more")
    splits = split_rows([validation.meta(row) for row in range(len(validation))])
    if config.split not in splits:
        raise RecipeError(f"the validation pairs have no split '{config.split}'; they have {', '.join(splits)}")
    out = Path(config.out)
    with _locked(out):
        _claim(out, _settings(config, base, [pairs.keys[row] for row in rows], validation.keys, samples))
        say = _printer()
        subset = write_subset(pairs, rows, out / "pairs")
        say(f"{subset['pairs']} of {subset['of']} pairs; reinforcing them with {len(config.teachers)} teachers and {max(config.augmentations)} views")
        index = reinforce(_reinforcement(config, out))
        store, chosen_pairs = open_store(out / "store"), open_pairs(out / "pairs")
        names = [facts.name for facts in store.teachers]
        say("measuring the teachers")
        seconds, sizes = measure_seconds(config.teachers, names, chosen_pairs, out / "costs.json", config.device), measure_bytes(out / "store")
        ground = Ground(
            out=out, base=base, validation=validation, model=model.name, samples=samples, first_seed=config.seed, threads=config.threads,
            keep_weights=config.keep_weights,
        )  # fmt: skip
        factors, by_type = _factors(config, base, store, {name: teacher_seconds(name, seconds) for name in names})
        search = Search(
            ground=ground, factors=factors, measure=Measure(direction=config.direction, split=config.split, k=config.k),
            seeds=config.seeds, confidence=config.confidence, tolerance=config.tolerance, say=say,
            spent=float(index["figures"].get("seconds", 0.0)), budget_seconds=None if config.budget_minutes is None else 60 * config.budget_minutes,
        )  # fmt: skip
        start = Arm(
            teachers=tuple(names), logit_scales=tuple(round(facts.logit_scale, 4) for facts in store.teachers), distillation=own,
            augmentations=max(config.augmentations), captions=tuple(base.caption_mix.items()),
        )  # fmt: skip
        chosen = search.run(start)
        found = report(config, subset, store, index, seconds, sizes, search, start, chosen, by_type, len(pairs))
        write_json(out / RECIPE, found["recipe"])
        write_json(out / RESULT, found)
    return found


def _factors(config: PilotConfig, base: Recipe, store: Store, seconds: dict[str, float]) -> tuple[Factors, dict[str, float]]:
    """What is tried, and the captions of each type that a pair has in the mean."""
    counts = Counter[str]()
    rows = range(min(len(store), COUNTED_CAPTIONS))
    for row in rows:
        counts.update(store.caption(row, j).type for j in range(int(store.caption_counts[row])))
    by_type = {name: count / len(rows) for name, count in counts.items()}
    mixes: dict[str, tuple[tuple[str, float], ...]] = {"any stored": ()}
    if base.caption_mix:
        mixes = {"the recipe's": tuple(base.caption_mix.items()), **mixes}
    if len(by_type) > 1:
        mixes |= {f"half raw, half {kind}": (("raw", 0.5), (kind, 0.5)) for kind in by_type if kind != "raw"}
        mixes["raw"] = (("raw", 1.0),)
    factors = Factors(
        scales=config.scales, distillation=config.distillation, augmentations=tuple(sorted(set(config.augmentations))), captions=mixes,
        caption_costs={name: captions_stored(mix, by_type) for name, mix in mixes.items()}, teacher_seconds=seconds,
    )  # fmt: skip
    return factors, by_type


def captions_stored(mix: tuple[tuple[str, float], ...], by_type: dict[str, float]) -> float:
    """Captions a pair that a mixture needs in the store; an empty mixture needs all."""
    return round(sum(count for kind, count in by_type.items() if not mix or kind in dict(mix) or kind == "raw"), 4)


def _reinforcement(config: PilotConfig, out: Path) -> ReinforceConfig:
    more: dict[str, Any] = {} if config.captions is None else {"captions": config.captions}
    return ReinforceConfig(
        pairs=str(out / "pairs"), store=str(out / "store"), teachers=config.teachers, augmentations=max(config.augmentations), templates=config.templates,
        language=config.language, dtype=config.dtype, seed=config.seed, workers=config.workers, device=config.device, **more,
    )  # fmt: skip


# ---------------------------------------------------------------- one pilot a folder


def _settings(config: PilotConfig, base: Recipe, keys: list[str], validation_keys: list[str], samples: int) -> dict[str, Any]:
    """Everything that decides what a run finds. What is tried, and by which measure it is decided, may change from call to call: a pilot can
    be given more seeds, values or time."""
    deciding = ("source", "teachers", "validation", "captions", "templates", "language", "model", "dtype", "seed")
    facts: dict[str, Any] = {name: getattr(config, name) for name in deciding}
    facts |= {"augmentations": max(config.augmentations), "recipe": dataclasses.asdict(base), "samples": samples}
    facts["keys_sha256"], facts["validation_keys_sha256"] = _hash(keys), _hash(validation_keys)
    settings: dict[str, Any] = json.loads(json.dumps(facts))
    return settings


def _hash(keys: list[str]) -> str:
    return hashlib.sha256("".join(f"{key}\n" for key in keys).encode()).hexdigest()


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Write settings.json into a fresh folder, or compare with the one that is there.

    Raises:
        StoreError: the folder holds a pilot with other settings, or something else.
    """
    path = out / SETTINGS
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise StoreError(f"'{path}' cannot be read ({error}); remove the folder '{out}' and run again") from None
        different = [name for name in settings if found.get(name) != settings[name]]
        if different:
            raise StoreError(f"'{out}' holds a pilot with other {', '.join(different)}; give another folder, or remove this one to start anew")
        return
    strangers = sorted(entry.name for entry in out.iterdir() if entry.name != ".lock")
    if strangers:
        raise StoreError(f"'{out}' is no pilot but holds {', '.join(strangers[:3])}; give a new or an empty folder")
    write_json(path, settings)


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"folder '{out}' cannot be made ({error.strerror or error}); give another path") from None
    with open(out / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StoreError(f"another pilot is writing '{out}'; wait for it or stop it") from None
        yield


def _printer() -> Any:
    """A line of progress to standard error, with the seconds since the start; silence with MCLIP_PROGRESS=0."""
    started = time.monotonic()

    def say(line: str) -> None:
        if os.environ.get("MCLIP_PROGRESS") != "0":
            sys.stderr.write(f"[{time.monotonic() - started:6.1f} s] pilot: {line}\n")
            sys.stderr.flush()

    return say


def main(argv: list[str]) -> int:
    """`mclip pilot`."""
    config = tyro.cli(PilotConfig, args=argv, prog="mclip pilot", description=__doc__)
    found = pilot(config)
    sys.stdout.write(json.dumps(found, ensure_ascii=False) + "\n" if config.json else table(found))
    return 0

