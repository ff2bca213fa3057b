"""What the duplicate rules find: sample pictures against worse copies of themselves, and against one another.

    python -m benchmarks.suites.curation --run out/demo --out out/curation

Needs a demo run that has reached its store. A copy is found when the rule with its default thresholds would call it a duplicate of its original;
embeddings are the teachers' of the whole picture. Pictures of the sample are all different drawings, so that what a rule drops among them are
look-alikes, not copies.
"""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from benchmarks.suites.demo import TEACHERS, Layout
from distill import duplicates
from distill.curate import CurateConfig
from distill.evaluate import EnsembleEncoder, open_encoder
from distill.perceptual_hash import HammingIndex, colour_thumbnail, perceptual_hash
from distill.picture_facts import read_pictures
from distill.store import open_store
from distill.stored_similarity import picture_vectors
from runtime.files import write_json
from runtime.pairs import Pairs, open_pairs

COSINE = 0.96
DEFAULT = CurateConfig(pairs="", out="", near=True)


def _jpeg(quality: int) -> Callable[[Image.Image], Image.Image]:
    def worse(image: Image.Image) -> Image.Image:
        out = io.BytesIO()
        image.save(out, "JPEG", quality=quality)
        return Image.open(io.BytesIO(out.getvalue())).convert("RGB")

    return worse


def _crop(share: float) -> Callable[[Image.Image], Image.Image]:
    def cut(image: Image.Image) -> Image.Image:
        edge = round(share * min(image.size))
        return image.crop((edge, edge, image.width - edge, image.height - edge))

    return cut


def _scaled(factor: float) -> Callable[[Image.Image], Image.Image]:
    return lambda image: image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "jpeg_q50": _jpeg(50),
    "jpeg_q20": _jpeg(20),
    "half_size": _scaled(0.5),
    "double_size": _scaled(2),
    "blur": lambda image: image.filter(ImageFilter.GaussianBlur(1)),
    "brighter_10pct": lambda image: ImageEnhance.Brightness(image).enhance(1.1),
    "less_contrast_15pct": lambda image: ImageEnhance.Contrast(image).enhance(0.85),
    "cropped_1pct": _crop(0.01),
    "cropped_3pct": _crop(0.03),
    "cropped_8pct": _crop(0.08),
    "mirrored": ImageOps.mirror,
    "greyscale": lambda image: image.convert("L").convert("RGB"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class CurationConfig:
    """Settings of the comparison."""

    run: str = "out/demo"
    """A demo run that has reached its store."""
    out: str = "out/curation"
    pictures: int = 200
    """Pictures that are copied, evenly over the training shards."""


def run_curation(config: CurationConfig) -> tuple[dict[str, Any], str]:
    """Returns the flat figures (also in OUT/summary.json) and the table."""
    place = Layout(Path(config.run))
    pairs = open_pairs(place.train)
    originals = [pairs.image(int(row)) for row in np.linspace(0, len(pairs) - 1, config.pictures).astype(int)]
    teacher = EnsembleEncoder([open_encoder(place.teacher(name), 1) for name in TEACHERS])
    values, colours, vectors = _describe(originals, teacher)
    figures: dict[str, Any] = {"copied_pictures": len(originals), "near_distance": DEFAULT.near_distance, "near_colour": DEFAULT.near_colour, "cosine": COSINE}
    for name, change in COPIES.items():
        bits, tint, cosine = (np.asarray(part) for part in _compare((values, colours, vectors), _describe([change(image) for image in originals], teacher)))
        near = (bits <= DEFAULT.near_distance) & (tint <= DEFAULT.near_colour)
        loose = (bits <= 2 * DEFAULT.near_distance) & (tint <= 2 * DEFAULT.near_colour)
        figures |= {f"{name}_near": _share(near), f"{name}_near_twice_as_loose": _share(loose), f"{name}_embedding": _share(cosine >= COSINE)}
    figures |= _look_alikes(pairs, place) | {f"search_us_of_{count}": _search_us(count) for count in (20_000, 200_000)}
    write_json(Path(config.out) / "summary.json", figures)
    return figures, _table(figures)


def _describe(images: list[Image.Image], teacher: EnsembleEncoder) -> tuple[list[int], np.ndarray, np.ndarray]:
    return [perceptual_hash(image) for image in images], np.stack([colour_thumbnail(image) for image in images]).astype(int), teacher.encode_image(images)


def _compare(one: tuple[Any, ...], two: tuple[Any, ...]) -> tuple[Any, ...]:
    return [(a ^ b).bit_count() for a, b in zip(one[0], two[0], strict=True)], np.abs(one[1] - two[1]).max(axis=1), (one[2] * two[2]).sum(axis=1)


def _share(which: np.ndarray) -> float:
    return round(float(which.mean()), 3)


def _look_alikes(pairs: Pairs, place: Layout) -> dict[str, Any]:
    """How many of the sample's own pictures each rule would drop, and the time a picture takes."""
    started = time.perf_counter()
    facts = read_pictures(pairs, np.arange(len(pairs)))
    reading = time.perf_counter() - started
    order, started = np.arange(len(pairs)), time.perf_counter()
    both, spared = duplicates.near(facts.hashes, facts.thumbnails, order, distance=DEFAULT.near_distance, colour=DEFAULT.near_colour)
    searching = time.perf_counter() - started
    hash_alone, _ = duplicates.near(facts.hashes, facts.thumbnails, order, distance=DEFAULT.near_distance, colour=255)
    store = open_store(place.store)
    embedded, _ = duplicates.embedded(lambda rows: picture_vectors(store, rows), np.arange(len(store)), threshold=COSINE)
    concepts = [pairs.meta(row).get("concept") for row in range(len(pairs))]
    figures: dict[str, Any] = {"pictures": len(pairs)}
    for name, kept in (("near", both), ("near_hash_alone", hash_alone), ("embedding", embedded)):
        dropped = np.flatnonzero(kept.dropped)
        figures |= {f"dropped_{name}": len(dropped), f"dropped_{name}_of_another_concept": sum(concepts[n] != concepts[kept.by[n]] for n in dropped)}
    return figures | {"read_and_hash_ms": round(1e3 * reading / len(pairs), 2), "search_us": round(1e6 * searching / len(pairs), 1)}


def _search_us(count: int) -> float:
    """Microseconds a hash, to find its neighbours among those before it and to add it: evenly spread hashes, one in ten near another."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2**64, count, dtype=np.uint64)
    values[::10] = np.roll(values, 1)[::10] ^ np.uint64(0b101)
    index, started = HammingIndex(DEFAULT.near_distance, count), time.perf_counter()
    for value in values.tolist():
        if not index.within(value):
            index.add(value)
    return round(1e6 * (time.perf_counter() - started) / count, 1)


def _table(figures: dict[str, Any]) -> str:
    bits, colour = figures["near_distance"], figures["near_colour"]
    heads = f"{f'near {bits} bits, colour {colour}':>24} {f'{2 * bits} bits, colour {2 * colour}':>22} {f'embedding {COSINE}':>16}"
    lines = [f"share of copies found, of {figures['copied_pictures']}:", f"  {'copy':20} {heads}"]
    lines += [f"  {name:20} {figures[f'{name}_near']:24.3f} {figures[f'{name}_near_twice_as_loose']:22.3f} {figures[f'{name}_embedding']:16.3f}" for name in COPIES]
    lines.append(f"of the {figures['pictures']} different drawings of the sample each drops:")
    for name in ("near", "near_hash_alone", "embedding"):
        lines.append(f"  {name:20} {figures[f'dropped_{name}']:6}, {figures[f'dropped_{name}_of_another_concept']} of them of another concept than the kept one")
    lines.append(
        f"reading and hashing {figures['read_and_hash_ms']} ms a picture of 128 px, searching {figures['search_us']} us; among 20,000 random hashes "
        f"{figures['search_us_of_20000']} us, among 200,000 {figures['search_us_of_200000']} us; one core"
    )
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """`python -m benchmarks.suites.curation --run out/demo --out out/curation`."""
    import tyro

    config = tyro.cli(CurationConfig, args=argv, prog="python -m benchmarks.suites.curation", description=__doc__)
    Path(config.out).mkdir(parents=True, exist_ok=True)
    figures, table = run_curation(config)
    sys.stdout.write(f"{json.dumps(figures, indent=1)}\n\n{table}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
