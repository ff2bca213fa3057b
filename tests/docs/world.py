"""The folder that a page's commands are run in: everything that a page calls PAIRS, CKPT, BUNDLE … is there under that very name, small."""

from __future__ import annotations

import shutil
from pathlib import Path

SHARED = ("THEIRS", "PAIRS", "CKPT", "BUNDLE", "A", "B", "C", "DOMAIN", "HELD_OUT", "P", "out", "home", "photo.jpg", "a.jpg", "b.png", "dog.jpg", "bundle", "Pictures")
GIVEN: dict[str, dict[str, str]] = {
    "README.md": {"STORE": "STORE", "TUNED": "TUNED", "S": "STORE", "clean.keep": "clean.keep"},
    "docs/guides/adaptation.md": {"TUNED": "TUNED", "DOMAIN-TEST": "PAIRS", "GENERAL": "PAIRS"},
    "docs/guides/training.md": {"STORE": "STORE"},
    "docs/guides/compression.md": {"STORE": "STORE"},
    "docs/guides/scale.md": {"STORE": "STORE"},
    "docs/guides/evaluation.md": {"STUDENT": "A", "TEACHER1": "A", "TEACHER2": "B", "IMAGENET": "classes"},
    "docs/guides/datacompdr.md": {"published": "published", "pairs": "downloaded"},
    "docs/guides/latency.md": {
        "A": "BUNDLE", "B": "BUNDLE2", "before.jsonl": "before.jsonl", "after.jsonl": "after.jsonl", "times.json": "times.json", "trtexec.log": "trtexec.log",
        "result.json": "result.json", "result.csv": "result.csv", "profile.json": "profile.json",
    },
}  # fmt: skip
"""What a page's commands find there besides or under another meaning, because another page makes it."""


def make_world(folder: Path) -> None:
    """All inputs, once."""
    from distill.curate import CurateConfig, curate
    from distill.reinforce import ReinforceConfig, reinforce
    from mobileclip.checkpoint import save_checkpoint
    from mobileclip.conversion import convert
    from mobileclip.presets import preset
    from tests.distill.datacompdr_world import make_samples, write_downloaded, write_published
    from tests.distill.world import make_pairs
    from tests.export.conftest import calibrated
    from tests.runtime import toy

    folder.mkdir(parents=True)
    make_pairs(folder / "PAIRS", copies=6)
    for name in ("DOMAIN", "HELD_OUT", "P"):
        (folder / name).symlink_to("PAIRS")
    for name, seed in (("CKPT", 0), ("A", 1), ("B", 2)):
        save_checkpoint(calibrated(preset("pocket_s"), seed), folder / name)
    (folder / "C").symlink_to("A")
    shutil.copytree(folder / "B", folder / "TUNED")
    save_checkpoint(calibrated(preset("mobileclip2_s0")), folder / "theirs-ours")
    convert(folder / "theirs-ours", folder / "THEIRS", to="open_clip")
    shutil.rmtree(folder / "theirs-ours")
    toy.build(folder / "BUNDLE")
    toy.build(folder / "BUNDLE2", name="other")
    (folder / "bundle").symlink_to("BUNDLE")
    (folder / "classes/cat").mkdir(parents=True)
    (folder / "classes/dog").mkdir()
    _results(folder)
    samples = make_samples(80, dims=(768, 768))
    write_published(folder / "published", samples)
    write_downloaded(folder / "downloaded", samples)
    place = folder / "out/demo"
    place.mkdir(parents=True)
    for name, target in (("bundle", "BUNDLE"), ("ckpt", "CKPT")):
        (place / name).symlink_to(folder / target)
    (place / "pairs").mkdir()
    for name in ("train", "validation", "test"):
        (place / "pairs" / name).symlink_to(folder / "PAIRS")
    for number, colour in enumerate(toy.COLOURS):
        where = folder / "home/Pictures" / ("2024" if number % 2 else "2023")
        where.mkdir(parents=True, exist_ok=True)
        toy.picture(colour, number, (60, 40)).save(where / f"{colour}.jpg")
    for name in ("photo.jpg", "a.jpg", "dog.jpg", "b.png", "classes/cat/1.jpg", "classes/dog/1.jpg"):
        toy.picture("red", 5, (60, 40)).save(folder / name)
    (folder / "Pictures").symlink_to("home/Pictures")
    reinforce(ReinforceConfig(pairs=str(folder / "PAIRS"), store=str(folder / "STORE"), teachers=("tests.distill.tiny_teachers:red",), augmentations=2, workers=1))
    curate(CurateConfig(pairs=str(folder / "PAIRS"), out=str(folder / "clean.keep"), exact=True))


def _results(folder: Path) -> None:
    """What other tools leave, as far as the documents read it, and two finished results files."""
    import json

    import numpy as np

    from benchmarks.measure import summarise
    from benchmarks.results import append_results, line
    from tests.benchmarks.test_importers import BENCHMARK_MODEL, TEN, trace

    (folder / "times.json").write_text(json.dumps(trace(0.2)))
    (folder / "trtexec.log").write_text(TEN)
    (folder / "result.json").write_text(BENCHMARK_MODEL)
    (folder / "result.csv").write_text("".join(f"image,{0.004 + n % 7 / 1e5},123456789,97,{n}\n" for n in range(80)))
    (folder / "profile.json").write_text(json.dumps({"execution_summary": {"estimated_inference_time": 1402, "all_inference_times": [1400 + n % 9 for n in range(80)]}}))
    rng = np.random.default_rng(0)
    for name, slower in (("before", 1.0), ("after", 1.2)):
        samples = (1e6 * slower * (1 + 0.02 * rng.random(100))).astype(int)
        about = {"bundle": {"name": "b", "sha256": "0" * 64}, "artefact": "a", "settings": {"threads": 1}}
        append_results(folder / f"{name}.jsonl", [line("latency", "image_tower", **about, samples=samples.tolist(), summary=summarise(samples).as_dict())])  # type: ignore[arg-type]


def page_folder(world: Path, page: str, place: Path) -> Path:
    """A folder for one page: the shared inputs as links, what its commands change as copies."""
    place.mkdir(parents=True)
    for name in SHARED:
        if name in ("home", "out"):
            shutil.copytree(world / name, place / name, symlinks=True)
        else:
            (place / name).symlink_to(world / name)
    for name, source in GIVEN.get(page, {}).items():
        (place / name).unlink(missing_ok=True)
        (shutil.copytree if (world / source).is_dir() else shutil.copyfile)(world / source, place / name)
    return place
