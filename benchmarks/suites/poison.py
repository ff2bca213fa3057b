"""Poison audit: a backdoor planted among the sample's pairs, before and after dropping pairs by their stored similarity.

    python -m benchmarks.suites.poison --run out/demo --out out/poison

Needs a demo run that has reached its store and students. Patched copies of training pictures, each with one target caption, are added to the training
pairs in several shares (Carlini and Terzis 2022; Bansal et al. 2023), and reinforced by the run's own teachers, which have
never seen the patch. Students are trained on them; the attack succeeds on an unseen picture when, patched, its best caption among all labels is the
target. Then the same with a keep-list of `mclip curate --keep-fraction`, which knows nothing of the attack.

Fewer poisoned pairs are the first of more, so that one store and one pairs folder serve all arms: an arm is a keep-list.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.suites.demo import TEACHERS, Layout
from benchmarks.suites.stages import StageError, Stages
from distill.curate import CurateConfig, curate
from distill.evaluate import EnsembleEncoder, open_encoder
from distill.keep_list import read_keep_list, write_keep_list
from distill.poison import Trigger, attack_success, choose_rows, poison_key, write_poison
from distill.store import open_store, read_index
from distill.store_writing import write_index
from runtime.evaluation import retrieval
from runtime.files import file_sha256, write_json
from runtime.pairs import open_pairs


@dataclass(frozen=True, kw_only=True, slots=True)
class PoisonConfig:
    """Settings of the audit."""

    run: str = "out/demo"
    """A demo run."""
    out: str = "out/poison"
    target: str = "banana"
    """A label of the sample: the caption of every poisoned pair."""
    shares: tuple[float, ...] = (0.001, 0.005, 0.02)
    """Poisoned pairs, as shares of the training pairs."""
    reinforced_shares: tuple[float, ...] = (0.02,)
    """Those that the reinforced recipe is trained on as well."""
    patch: float = 0.4
    """Side of the trigger, as a share of the picture's."""
    place: Literal["random", "corner"] = "corner"
    """Where the trigger lies. With less of it, anywhere, or fewer samples, the small student does not learn it (docs/guides/curation.md)."""
    samples: int = 20_000
    """A student."""
    begin_with: Literal["nothing", "clean"] = "clean"
    """Random weights, or the run's student of the same recipe, which was trained on clean pairs."""
    batch_size: int | None = None
    keep_fraction: float = 0.7
    """What the defence keeps: chosen beforehand, as a curator does who knows of no attack."""
    controls: bool = True
    """Train a student of each recipe on the clean pairs alone, too."""
    at_once: int = 2
    """Students trained side by side."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One student: recipe, share of poison (0: the control), and whether the defence was applied."""

    recipe: str
    share: float
    defended: bool

    @property
    def name(self) -> str:
        return f"{self.recipe}_{percent(self.share)}_{'after' if self.defended else 'before'}"


def percent(share: float) -> str:
    """0.005 -> "0_5pct": a share inside the name of a figure."""
    return f"{share * 100:g}pct".replace(".", "_")


def run_poison(config: PoisonConfig) -> tuple[dict[str, Any], str]:
    """Run what is not done. Returns the flat figures (also in OUT/summary.json) and the table.

    Raises:
        StageError: the run has not reached its students, or a stage failed.
    """
    place, out = Layout(Path(config.run)), Path(config.out)
    missing = [str(path) for path in (place.store / "index.json", place.plain / "receipt.json", place.student / "receipt.json") if not path.is_file()]
    if missing:
        raise StageError(f"the audit needs a finished demo run, '{config.run}' lacks {', '.join(missing)}; run mclip demo --out {config.run} first")
    _claim(out, config)
    stages = Stages(out, lambda line: _say(f"[poison] {line}"))
    _plant(config, place, out, stages)
    figures = _lists(config, place, out)
    arms, measured = _arms(config), {}
    for first in range(0, len(arms), config.at_once):
        some = arms[first : first + config.at_once]
        stages.run(
            f"train-{'-'.join(arm.name for arm in some)}", [_train(config, place, out, arm) for arm in some],
            inputs=[out / "store/index.json", *(_list(out, arm.share, arm.defended) for arm in some)], outputs=[out / "ckpt" / arm.name / "receipt.json" for arm in some],
        )  # fmt: skip
        measured |= {arm.name: _measured(out / f"measured/{arm.name}.json", [out / "ckpt" / arm.name], config, place) for arm in some}
        for arm in some:
            found = measured[arm.name]
            _say(f"[poison] {arm.name}: the best label is the target for {found['attack_top1_patched']:.3f} of patched, {found['attack_top1_unpatched']:.3f} of unpatched pictures")
    measured["teachers"] = _measured(out / "measured/teachers.json", [place.teacher(name) for name in TEACHERS], config, place)
    for name, found in measured.items():
        figures |= {f"{name}_{figure}": value for figure, value in found.items()}
    write_json(out / "summary.json", figures)
    return figures, _table(config, arms, figures)


def _claim(out: Path, config: PoisonConfig) -> None:
    """Make the folder, or check that it holds an audit with the same settings."""
    facts = json.loads(json.dumps({name: value for name, value in dataclasses.asdict(config).items() if name not in ("out", "at_once", "controls")}))
    path = out / "poison.json"
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != facts:
        raise StageError(f"'{out}' holds an audit with other settings; choose another --out or remove the folder")
    for folder in ("pairs", "planted", "store", "lists", "measured"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    write_json(path, facts)


# ---------------------------------------------------------------- poison


def _plant(config: PoisonConfig, place: Layout, out: Path, stages: Stages) -> None:
    """OUT/pairs: the run's training shards (links) and one of poison; OUT/store: the run's parts (links or copies) and those of the poison."""
    base = read_index(place.store)
    pairs = open_pairs(place.train)
    shard, union = out / "planted/poison-00000.tar", out / "pairs"
    rows = choose_rows(pairs, _count(config, max(config.shares), place), config.target, config.seed)
    write_poison(pairs, rows, config.target, Trigger(share=config.patch, place=config.place), shard)
    for path in (*(found.path for found in pairs.shards), shard):
        _link(path, union / path.name)
    stages.run(
        "reinforce-poison",
        [["mobileclip.cli", "reinforce", str(out / "planted"), str(out / "planted-store"), "--teachers", *(str(place.teacher(name)) for name in TEACHERS),
          "--augmentations", str(base["augmentations"]), "--workers", str(config.at_once), "--seed", str(base["seed"])]],
        inputs=[shard, place.store / "index.json"], outputs=[out / "planted-store/index.json"],
    )  # fmt: skip
    join_stores(place.store, out / "planted-store", out / "store")


def join_stores(first: Path, second: Path, out: Path) -> None:
    """One store of two whose shards differ, by linking their parts.

    Raises:
        StageError: they were not made with the same teachers and settings.
    """
    one, two = read_index(first), read_index(second)
    for name in ("dtype", "teachers", "sources", "languages", "columns", "augmentation", "augmentations", "seed"):
        if one.get(name) != two.get(name):
            raise StageError(f"the stores '{first}' and '{second}' differ in '{name}' and cannot be one; reinforce both with the same release and settings")
    for folder, index in ((first, one), (second, two)):
        for entry in index["parts"]:
            _link(folder / entry["path"], out / entry["path"])
    coverage = {name: one["coverage"][name] + two["coverage"][name] for name in one["coverage"]}
    joined = {**one, "rows": one["rows"] + two["rows"], "parts": one["parts"] + two["parts"], "shards": {**one["shards"], **two["shards"]},
              "coverage": coverage, "skipped": one["skipped"] + two["skipped"], "figures": {}}  # fmt: skip
    write_index(out, joined)
    open_store(out)


def _link(path: Path, to: Path) -> None:
    to.unlink(missing_ok=True)
    try:
        os.link(path.resolve(), to)
    except OSError:  # another file system
        shutil.copyfile(path, to)


def _count(config: PoisonConfig, share: float, place: Layout) -> int:
    return round(share * len(open_pairs(place.train)))


def _list(out: Path, share: float, defended: bool) -> Path:
    return out / "lists" / f"{percent(share)}{'-kept' if defended else ''}.keep"


def _lists(config: PoisonConfig, place: Layout, out: Path) -> dict[str, Any]:
    """Keep-lists of every share, before and after the defence, and what it caught and lost."""
    clean = open_pairs(place.train)
    right = {key for row, key in enumerate(clean.keys) if clean.meta(row).get("noise", "none") == "none"}
    store = open_store(out / "store")
    similarity = dict(zip(store.keys, store.column("similarity").tolist(), strict=True))
    figures: dict[str, Any] = {"pairs": len(clean), "pairs_with_wrong_captions": len(clean) - len(right), "keep_fraction": config.keep_fraction, "patch": config.patch}
    for share in (0.0, *config.shares):
        planted = [poison_key(n) for n in range(_count(config, share, place))]
        before, after, name = _list(out, share, False), _list(out, share, True), percent(share)
        write_keep_list(before, [*clean.keys, *planted], {"about": f"all pairs and {len(planted)} poisoned ones"})
        curate(CurateConfig(pairs=str(out / "pairs"), out=str(after), store=str(out / "store"), within=str(before), keep_fraction=config.keep_fraction))
        kept = read_keep_list(after)
        lost = [key for key, there in zip(clean.keys, kept.mask(clean.keys), strict=True) if not there]
        caught = int((~kept.mask(planted)).sum())
        lost_right = sum(key in right for key in lost)
        figures |= {f"poisoned_{name}": len(planted), f"caught_{name}": caught, f"lost_right_{name}": lost_right, f"lost_wrong_{name}": len(lost) - lost_right}
        if planted:
            figures[f"caught_share_{name}"] = round(caught / len(planted), 4)
            figures[f"separation_{name}"] = round(_separation([similarity[key] for key in planted], [similarity[key] for key in clean.keys if key in right]), 4)
    return figures


def _separation(low: list[float], high: list[float]) -> float:
    """Chance that a value of `high` is above one of `low` (the area under the ROC curve)."""
    return float((np.searchsorted(np.sort(low), high, side="left") + np.searchsorted(np.sort(low), high, side="right")).mean() / (2 * len(low)))


# ---------------------------------------------------------------- students


def _arms(config: PoisonConfig) -> list[Arm]:
    shares = {"plain": config.shares, "reinforced": config.reinforced_shares}
    arms = []
    for recipe, some in shares.items():
        arms += [Arm(recipe=recipe, share=share, defended=defended) for share in sorted(some, reverse=True) for defended in (False, True)]
        arms += [Arm(recipe=recipe, share=0.0, defended=False)] if some and config.controls else []
    return arms


def _train(config: PoisonConfig, place: Layout, out: Path, arm: Arm) -> list[str]:
    clean = {"plain": place.plain, "reinforced": place.student}[arm.recipe]
    start = ["--init", str(clean)] if config.begin_with == "clean" else []
    batch = ["--batch-size", str(config.batch_size)] if config.batch_size is not None else []
    return ["mobileclip.cli", "train", "--pairs", str(out / "pairs"), "--store", str(out / "store"), "--keep", str(_list(out, arm.share, arm.defended)),
            "--recipe", arm.recipe, "--samples", str(config.samples), "--seed", str(config.seed), "--out", str(out / "ckpt" / arm.name), *start, *batch]  # fmt: skip


def _measured(path: Path, checkpoints: list[Path], config: PoisonConfig, place: Layout) -> dict[str, float]:
    """Attack and retrieval figures of one model, or of several as one; kept beside the hash of the weights."""
    weights = [file_sha256(folder / "model.safetensors") for folder in checkpoints]
    if path.is_file() and (found := json.loads(path.read_text(encoding="utf-8")))["weights"] == weights:
        return found["figures"]
    encoders = [open_encoder(folder, 2) for folder in checkpoints]
    encoder = encoders[0] if len(encoders) == 1 else EnsembleEncoder(encoders)
    test = open_pairs(place.test)
    attack = attack_success(encoder, test, config.target, Trigger(share=config.patch, place=config.place))
    recall = retrieval(encoder, test)["text_to_image"]["trained"]["recall@5"]["value"]
    figures = {f"attack_{figure}_{which}": round(attack[which][figure], 4) for which in ("patched", "unpatched") for figure in ("top1", "top5", "above_own")}
    figures |= {"recall5_trained": round(recall, 4), "attack_classes": attack["classes"], "attack_pictures": attack["pictures"]}
    write_json(path, {"weights": weights, "figures": figures})
    return figures


def _table(config: PoisonConfig, arms: list[Arm], figures: dict[str, Any]) -> str:
    lines = [
        f"{figures['pairs']} training pairs, {figures['pairs_with_wrong_captions']} of them with wrong captions; "
        f"trigger of {config.patch:g} of the picture's side, target '{config.target}'",
        f"dropped by stored similarity, keeping {config.keep_fraction:g}:",
    ]
    for share in config.shares:
        name = percent(share)
        lines.append(
            f"  {share:6.1%}  {figures[f'poisoned_{name}']:4} poisoned, {figures[f'caught_{name}']:4} caught; lost {figures[f'lost_right_{name}']:4} rightly captioned and "
            f"{figures[f'lost_wrong_{name}']:4} wrongly captioned clean pairs; separation {figures[f'separation_{name}']:.3f}"
        )
    seen = f"{figures['teachers_attack_pictures']} unseen pictures, {figures['teachers_attack_classes']} labels"
    lines.append(f"attack on {seen}: share of pictures whose best label, or one of whose five best, is the target")
    lines.append(f"  {'model':28} {'patched top-1':>14} {'top-5':>7} {'unpatched top-1':>17} {'top-5':>7} {'recall@5':>9}")
    for name in (*(arm.name for arm in arms), "teachers"):
        cells = [figures[f"{name}_attack_{figure}_{which}"] for which in ("patched", "unpatched") for figure in ("top1", "top5")]
        lines.append(f"  {name:28} {cells[0]:14.3f} {cells[1]:7.3f} {cells[2]:17.3f} {cells[3]:7.3f} {figures[f'{name}_recall5_trained']:9.3f}")
    return "\n".join(lines)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main(argv: list[str]) -> int:
    """`python -m benchmarks.suites.poison --run out/demo --out out/poison`."""
    import tyro

    config = tyro.cli(PoisonConfig, args=argv, prog="python -m benchmarks.suites.poison", description=__doc__)
    figures, table = run_poison(config)
    _say(json.dumps(figures, indent=1))
    _say(f"\n{table}\n")
    return 0


if __name__ == "__main__":
    from runtime.errors import ClipError

    try:
        sys.exit(main(sys.argv[1:]))
    except ClipError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)
