"""The training loader against the published way of reading reinforced data, what resuming costs, and what reinforcement adds to a step.

    python -m benchmarks.suites.loader --out out/loader

Each function returns one flat object of figures with their units. Both sides of a ratio run interleaved in one process tree with the same number
of threads or processes, on the same shards, and neither keeps decoded pictures.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks.environment import environment
from benchmarks.measure import Plan, interleave
from benchmarks.ratios import compare
from benchmarks.suites.loader_data import VIEW, make_data, published_batches, replay
from distill.augment import OPERATIONS
from distill.dataset import Batch, ReinforcedPairs
from distill.loader import Request, load
from distill.recipes import RECIPES
from distill.store import Store, open_store
from mobileclip.checkpoint import build_tokenizer, preprocess_config
from mobileclip.presets import PRESETS
from runtime.errors import ClipError
from runtime.files import write_json
from runtime.pairs import Pairs, decode_image, open_pairs
from runtime.preprocess import PreprocessConfig
from runtime.tokenizer import Tokenizer

RESUME_ROUNDS, TURNS = 9, 10
SETTLE_SECONDS, QUEUED = 3.0, 12
"""Longer than filling a queue takes, and more batches than one holds; a machine that has slept needs a moment besides."""
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class LoaderBenchError(ClipError):
    """The two sides do not do the same work."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderBench:
    """What is measured."""

    out: str = "out/loader"
    """Folder for the data (about 0.3 MB a sample) and summary.json."""
    samples: int = 256
    sizes: tuple[int, ...] = (224, 256)
    """Sides of the views."""
    threads: tuple[int, ...] = (0, 2)
    """Threads of ours, processes of the published side; 0: neither."""
    batch: int = 32
    rounds: int = 40
    """Batches a side and configuration."""


def ours(folder: Path, size: int, **changes: Any) -> ReinforcedPairs:
    """Our side of the data that `make_data` wrote, without a cache of views."""
    pairs, store, tokenizer = _open(folder)
    config = PreprocessConfig(image_size=size, mean=CLIP_MEAN, std=CLIP_STD)
    return ReinforcedPairs(pairs, store, config, tokenizer, **{"seed": 0, "teachers": (0, 1), "cache_bytes": 0, **changes})


def _open(folder: Path) -> tuple[Pairs, Store, Tokenizer]:
    path = folder / "tokenizer.json"
    if not path.is_file():
        build_tokenizer(49408, path)
    return open_pairs(folder / "published"), open_store(folder / "store"), Tokenizer.open(path, context_length=77, cleaning="clip", pad_id=0)


def endless(data: ReinforcedPairs, batch: int, threads: int) -> Iterator[Batch]:
    """Our batches, one after the other."""
    return load(data, (Request(first=n * batch, size=batch) for n in range(1 << 40)), threads)


def check_sides(folder: Path, size: int, samples: int = 24) -> float:
    """Largest mean difference of a view on the two sides, in grey levels.

    Raises:
        LoaderBenchError: the sides do not show the same pictures.
    """
    data, worst = ours(folder, size), 0.0
    with tarfile.open(sorted((folder / "published").glob("*.tar"))[0]) as shard:
        for row in range(samples):
            key = data.store.keys[row]
            views = json.loads(shard.extractfile(f"{key}.paug.json").read())["param_aug"]  # type: ignore[union-attr]
            picture = decode_image(data.pairs.image_bytes(int(data.store.pair_rows[row])))
            for view in range(0, len(views), 7):
                theirs = np.asarray(replay(picture, _translated_for(views[view], size), size), np.float32)
                worst = max(worst, float(np.abs(theirs - data.view(row, view).astype(np.float32)).mean()))
    if worst > 6:  # equalising and posterising make much of small differences
        raise LoaderBenchError(f"a view of the two sides differs by {worst:.1f} grey levels in the mean; they do not show the same pictures")
    return worst


def _translated_for(parameters: list[Any], size: int) -> list[Any]:
    """Published translations count pixels of a 224-pixel view. The published way leaves them so at any size, ours keeps the geometry."""
    box, operations = parameters
    return [box, [[index, int(magnitude) * size / VIEW if OPERATIONS[int(index)].startswith("Translate") else magnitude] for index, magnitude in operations]]


def loader_ratio(folder: Path, size: int = 224, threads: int = 0, batch: int = 32, rounds: int = 20) -> dict[str, float]:
    """Samples a second of ours over those of the published way; `threads` of ours against as many processes of theirs.

    With 0 both sides make a batch in turns. With more, each side runs stretches of so many batches alone, in TURNS turns, and a stretch is one
    sample: what is made ahead cannot be told apart batch by batch.
    """
    import torch

    torch.set_num_threads(1)
    name = f"_{size}px_{threads}threads"
    theirs = published_batches(folder, size, batch, CLIP_MEAN, CLIP_STD, workers=threads)
    mine = endless(ours(folder, size), batch, threads)
    next(mine), next(theirs)
    if threads == 0:
        took = interleave(
            {"published": lambda n: next(theirs), "ours": lambda n: next(mine)}, Plan(warmup=1, min_samples=rounds, max_samples=rounds, few_samples=min(10, rounds), seconds=0.0)
        )
        published, own = took["published"], took["ours"]
    else:
        published, own = _turns([lambda: next(theirs), lambda: next(mine)], rounds)
    mine.close()  # type: ignore[attr-defined]
    ratio = compare(published, own)
    rates = [batch / np.median(side) * 1e9 for side in (published, own)]
    found = {
        f"loader_samples_per_second_published{name}": rates[0], f"loader_samples_per_second_ours{name}": rates[1], f"loader_ratio{name}": rates[1] / rates[0],
        f"loader_ratio_low{name}": 1 / ratio.high, f"loader_ratio_high{name}": 1 / ratio.low,
    }  # fmt: skip
    return {key: round(value, 4) for key, value in found.items()}


def resume_cost(folder: Path, size: int = 224, threads: int = 0, batch: int = 32) -> dict[str, float]:
    """An epoch in two halves with a restart between them, against one straight through; both open pairs and store, and the batches are compared.

    `resume_cost` = (first half + second half after reopening everything) / straight - 1, the median of rounds.
    """
    count = len(ours(folder, size)) // batch
    requests = [Request(first=n * batch, size=batch) for n in range(count)]

    def run(part: list[Request]) -> tuple[float, float, list[bytes]]:
        began = time.perf_counter()
        first, found = 0.0, []
        for made in load(ours(folder, size), part, threads):
            first = first or time.perf_counter() - began
            found.append(b"".join(np.ascontiguousarray(array).tobytes() for array in (made.rows, made.pixels[::8, :, ::8, ::8], made.tokens, *made.teacher_images)))
        return time.perf_counter() - began, first, found

    straight, halves, firsts = [], [], []
    equal = True
    run(requests[:1])
    for _ in range(RESUME_ROUNDS):
        whole, first_straight, wanted = run(requests)
        one, _, ahead = run(requests[: count // 2])
        two, first_resumed, rest = run(requests[count // 2 :])
        equal = equal and ahead + rest == wanted
        straight.append(whole)
        halves.append(one + two)
        firsts.append((first_straight, first_resumed))
    return {
        "resume_cost": round(float(np.median(np.array(halves) / np.array(straight)) - 1), 4), "resume_batches_equal": float(equal),
        "resume_first_batch_seconds": round(float(np.median([pair[1] for pair in firsts])), 4),
        "straight_first_batch_seconds": round(float(np.median([pair[0] for pair in firsts])), 4),
        "resume_rounds": float(len(straight)),
    }  # fmt: skip


def step_ratio(folder: Path, preset: str = "pocket_s", batch: int = 64, rounds: int = 300, image_size: int | None = None) -> dict[str, float]:
    """A reinforced training step over a plain CLIP step, loader included: the same samples, the same number of image and text encodes.

    Both sides draw the same views and captions; the plain one reads no embedding and has the contrastive loss alone. Views come from the
    loader's memory, as in a run on few pictures: decoding, the same on both sides, would only bring the ratio nearer to 1.
    """
    import torch

    from distill.schedule import Plan as Schedule
    from distill.training_state import start
    from distill.training_step import basis_of, follow, training_step, update
    from mobileclip.models import create_model

    torch.set_num_threads(1)
    pairs, store, _ = _open(folder)
    config = PRESETS[preset] if image_size is None else dataclasses.replace(PRESETS[preset], image=dataclasses.replace(PRESETS[preset].image, image_size=image_size))
    path = folder / f"tokenizer-{config.text.vocab_size}.json"
    if not path.is_file():
        build_tokenizer(config.text.vocab_size, path)
    tokenizer = Tokenizer.open(path, context_length=config.text.context_length, cleaning="clip", pad_id=0)
    sides: dict[str, Callable[[int], object]] = {}
    recipes = {"plain": dataclasses.replace(RECIPES["plain"](), caption_mix={}), "reinforced": dataclasses.replace(RECIPES["reinforced"](), text_samples=0)}
    for name, recipe in recipes.items():
        recipe = dataclasses.replace(recipe, batch_size=batch)
        torch.manual_seed(0)
        run, followed = start(create_model(config), recipe), follow(store, recipe)
        schedule = Schedule.of(1 << 20, recipe)
        data = ReinforcedPairs(pairs, store, preprocess_config(config), tokenizer, seed=0, teachers=followed.numbers, max_augmentations=2)
        for n in range(8 * len(data) // batch):  # nearly every view has been drawn before the clock runs, as after a few epochs
            data.batch(n * batch, batch)
        basis = basis_of(store, data.rows, followed.numbers, config.embed_dim) if recipe.feature else None
        batches = load(data, schedule.requests(0))
        def step(_: int, run=run, schedule=schedule, recipe=recipe, batches=batches, followed=followed, basis=basis) -> None:  # noqa: ANN001
            training_step(run, schedule, recipe, next(batches), followed.logit_scales, basis)
            update(run, schedule, recipe)
            run.step += 1

        sides[name] = step
    took = interleave(sides, Plan(warmup=4, min_samples=rounds, max_samples=rounds, few_samples=min(10, rounds), seconds=0.0))
    ratio = compare(took["plain"], took["reinforced"])
    label = f"_{preset}_batch{batch}"
    return {
        f"step_ratio{label}": round(ratio.value, 4), f"step_ratio_low{label}": round(ratio.low, 4), f"step_ratio_high{label}": round(ratio.high, 4),
        f"step_milliseconds_plain{label}": round(float(np.median(took["plain"])) / 1e6, 2),
        f"step_milliseconds_reinforced{label}": round(float(np.median(took["reinforced"])) / 1e6, 2),
    }  # fmt: skip


def _turns(sides: list[Callable[[], object]], batches: int) -> list[np.ndarray]:
    """Nanoseconds a batch of each side, a figure for each of TURNS stretches of so many batches, the sides in turns.

    Between stretches nobody asks until the side that was just asked has filled its queue and sleeps: its workers would otherwise take the
    cores of the other. What a side has made ahead is taken out before its stretch begins.
    """
    took: list[list[int]] = [[] for _ in sides]
    for _ in range(TURNS):
        for kept, side in zip(took, sides, strict=True):
            time.sleep(SETTLE_SECONDS)
            for _ in range(QUEUED):
                side()
            began = time.perf_counter_ns()
            for _ in range(batches):
                side()
            kept.append((time.perf_counter_ns() - began) // batches)
    return [np.array(kept) for kept in took]


def measure(config: LoaderBench) -> dict[str, Any]:
    """All figures, one flat object."""
    folder = make_data(Path(config.out) / "data", config.samples)
    found: dict[str, Any] = {}
    for size in config.sizes:
        found[f"loader_view_difference_grey_levels_{size}px"] = round(check_sides(folder, size), 3)
        for threads in config.threads:
            found |= loader_ratio(folder, size, threads, config.batch, config.rounds)
    found |= resume_cost(folder) | step_ratio(folder)
    return found


def main() -> int:
    config = tyro.cli(LoaderBench, prog="python -m benchmarks.suites.loader", description=__doc__)
    Path(config.out).mkdir(parents=True, exist_ok=True)
    facts = environment()
    found = measure(config)
    write_json(Path(config.out) / "summary.json", found)
    write_json(Path(config.out) / "environment.json", facts)
    for name, value in found.items():
        sys.stdout.write(f"{name:60} {value:g}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
