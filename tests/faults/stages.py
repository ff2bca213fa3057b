"""The stages that faults are put into: small worlds made by code, the command of each, and what its result is."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEACHERS = "tests.distill.tiny_teachers:red", "tests.distill.tiny_teachers:blue"


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One command.

    Attributes:
        world: makes its inputs in a folder, once.
        before: puts what was finished earlier into the folder of results (a copy of the world's), or nothing.
        command: arguments of `mclip`, by world and folder of results.
        result: what a finished result is, comparable; raises when it is not finished or damaged.
        kept: checks after a fault that what was finished earlier is there; raises when not.
        megabytes: of the small file system for "disk full", from almost nothing to enough.
    """

    world: Callable[[Path], None]
    before: Callable[[Path, Path], None] = lambda world, out: None
    command: Callable[[Path, Path], list[str]]
    result: Callable[[Path, Path], Any]
    kept: Callable[[Path, Path], None] = lambda world, out: None


def tree(folder: Path, pattern: str = "*") -> dict[str, str]:
    """sha256 of all files."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob(pattern)) if path.is_file() and not path.is_symlink()}


def must(good: bool, what: str) -> None:
    if not good:
        raise AssertionError(what)


# ------------------------------------------------------------------ reinforce


def _pairs(world: Path) -> None:
    from tests.distill.test_reinforce import make_pairs

    make_pairs(world / "pairs", (7, 5), damage=True)


def _reinforced(world: Path, out: Path) -> Any:
    from distill.store import open_store

    store = open_store(out / "store", verify=True)
    return len(store), tree(out / "store", "*.safetensors")


def _reinforce(world: Path, out: Path) -> list[str]:
    more = ["--augmentations", "2", "--part-rows", "3", "--workers", "1"]
    return ["reinforce", str(world / "pairs"), str(out / "store"), "--teachers", *TEACHERS, *more]


# ------------------------------------------------------------------ train


def _trainable(world: Path) -> None:
    from distill.recipes import RECIPES
    from tests.distill.world import make_pairs, make_store

    make_pairs(world / "pairs")
    make_store(world / "store", world / "pairs")
    recipe = dataclasses.replace(RECIPES["reinforced"](), batch_size=8, text_samples=0)
    (world / "recipe.json").write_text(json.dumps(dataclasses.asdict(recipe)))


def _train(world: Path, out: Path) -> list[str]:
    more = ["--recipe", str(world / "recipe.json"), "--samples", "48", "--prefetch-threads", "0", "--save-seconds", "0.05"]
    return ["train", "--pairs", str(world / "pairs"), "--store", str(world / "store"), "--out", str(out / "ckpt"), *more]


def _trained(world: Path, out: Path) -> Any:
    from mobileclip.checkpoint import verify_receipt

    verify_receipt(out / "ckpt")
    return hashlib.sha256((out / "ckpt/model.safetensors").read_bytes()).hexdigest()


# ------------------------------------------------------------------ compress, export


def _checkpoint(world: Path) -> None:
    from mobileclip.checkpoint import save_checkpoint
    from mobileclip.presets import preset
    from tests.export.conftest import calibrated, write_pairs

    save_checkpoint(calibrated(preset("pocket_s")), world / "ckpt")
    write_pairs(world / "pairs", 24)


def _compress(world: Path, out: Path) -> list[str]:
    return ["compress", str(world / "ckpt"), str(out / "small"), "--calibrate", str(world / "pairs"), "--ratio", "0.25", "--calibration", "16", "--importance", "norm"]


def _compressed(world: Path, out: Path) -> Any:
    from mobileclip.checkpoint import load_checkpoint

    load_checkpoint(out / "small")
    return hashlib.sha256((out / "small/model.safetensors").read_bytes()).hexdigest()


def _export(world: Path, out: Path) -> list[str]:
    more = ["--pairs", str(world / "pairs"), "--target", "onnx", "--precision", "fp32", "--samples", "12", "--golden", "2", "--calibration", "4"]
    return ["export", str(world / "ckpt"), str(out / "bundle"), "--force", *more]


def _exported(world: Path, out: Path) -> Any:
    """Graphs, tokenizer and golden inputs; times and dates of the manifest differ from run to run."""
    from runtime.manifest import read_manifest

    manifest = read_manifest(out / "bundle")
    return {name: facts.sha256 for name, facts in manifest.files.items() if name.endswith((".onnx", "tokenizer.json", ".png", ".safetensors"))}


def _earlier_bundle(world: Path, out: Path) -> None:
    from tests.runtime import toy

    if not (world / "earlier").is_dir():
        toy.build(world / "earlier")
    shutil.copytree(world / "earlier", out / "bundle")


def _bundle_kept(world: Path, out: Path) -> None:
    """The earlier bundle, or the new one, whole."""
    from runtime.manifest import read_manifest

    must(read_manifest(out / "bundle").name in ("toy", "pocket_s"), "another bundle")


# ------------------------------------------------------------------ index, bench


def _photos(world: Path) -> None:
    from runtime.encoder import load
    from runtime.index import Index
    from tests.runtime import toy

    toy.build(world / "bundle")
    for n in range(40):
        place = world / ("old" if n < 12 else "new")
        place.mkdir(exist_ok=True)
        toy.picture(list(toy.COLOURS)[n % 4], n).save(place / f"{n}.png")
        os.utime(place / f"{n}.png", (1_000_000_000,) * 2)
    with Index.open(world / "earlier.idx", load(world / "bundle", threads=1, measure=False)) as index:
        index.add(world / "old")


def _earlier_index(world: Path, out: Path) -> None:
    shutil.copytree(world / "earlier.idx", out / "p.idx")


def _index(world: Path, out: Path) -> list[str]:
    return ["index", str(world / "old"), str(world / "new"), "--out", str(out / "p.idx"), "--bundle", str(world / "bundle"), "--threads", "1"]


def _hits(out: Path) -> dict[str, float]:
    import numpy as np

    from runtime.index import Index

    with Index.open(out / "p.idx", create=False) as index:
        index.verify()
        query = np.linspace(-1, 1, 12, dtype=np.float32)
        return {hit.path: round(hit.score, 4) for hit in index.search_vector(query / np.linalg.norm(query), k=100)}


def _indexed(world: Path, out: Path) -> Any:
    found = _hits(out)
    must(len(found) == 40, f"{len(found)} of 40 pictures")
    return found


def _index_kept(world: Path, out: Path) -> None:
    must({str(path) for path in (world / "old").iterdir()} <= set(_hits(out)), "pictures that were indexed before are gone")


def _bundle(world: Path) -> None:
    from tests.runtime import toy

    toy.build(world / "bundle")
    toy.build(world / "other", name="other")


def _earlier_results(world: Path, out: Path) -> None:
    from benchmarks.results import append_results, line

    bundle = {"name": "earlier", "sha256": "0" * 64}
    append_results(out / "r.jsonl", [line("latency", f"phase {n}", bundle=bundle, samples=[1, 2, 3]) for n in range(3)])


def _bench(world: Path, out: Path) -> list[str]:
    return ["bench", str(world / "bundle"), "--out", str(out / "r.jsonl"), "--seconds", "0.02", "--starts", "1", "--phases", "decode,tokenise,text_tower,image_tower"]


def _benched(world: Path, out: Path) -> Any:
    """Which measurements there are; their times are their own."""
    from benchmarks.results import identity, read_results

    _results_kept(world, out)
    return sorted({identity(row)[:4] for row in read_results([out / "r.jsonl"])})


def _results_kept(world: Path, out: Path) -> None:
    from benchmarks.results import read_results

    rows = read_results([out / "r.jsonl"])
    must([row["phase"] for row in rows[:3]] == [f"phase {n}" for n in range(3)] and rows[0]["samples"] == [1, 2, 3], "earlier results are gone")


STAGES: dict[str, Stage] = {
    "reinforce": Stage(world=_pairs, command=_reinforce, result=_reinforced),
    "train": Stage(world=_trainable, command=_train, result=_trained),
    "compress": Stage(world=_checkpoint, command=_compress, result=_compressed),
    "export": Stage(world=_checkpoint, before=_earlier_bundle, command=_export, result=_exported, kept=_bundle_kept),
    "index": Stage(world=_photos, before=_earlier_index, command=_index, result=_indexed, kept=_index_kept),
    "bench": Stage(world=_bundle, before=_earlier_results, command=_bench, result=_benched, kept=_results_kept),
}
