"""Retrieval of a bundle's artefacts, each combination against the fp32 one on the same queries.

    python -m benchmarks.accuracy BUNDLE --data PAIRS --out results.jsonl
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import runtime
from runtime.errors import DeviceError
from runtime.evaluation import Gallery, embed_gallery, retrieval
from runtime.metrics import paired_recall_test
from runtime.pairs import Pairs, open_pairs

from .environment import environment
from .inputs import draw_inputs
from .phases import Subject
from .results import Line, append_results, identity, line, newest, read_results

KS = (1, 5, 10)


@dataclass(frozen=True, kw_only=True, slots=True)
class AccuracyConfig:
    """Settings of a retrieval measurement."""

    bundle: Path
    data: Path
    """A pairs folder."""
    out: Path = Path("results.jsonl")
    threads: int = 1
    seed: int = 0


def measure_accuracy(config: AccuracyConfig) -> list[Line]:
    """Recall of every combination of proven artefacts that runs here, and its paired test against the fp32 pair.

    Combinations: the fp32 towers (dynamic batch), then each other artefact with the other tower left at fp32. Lines that the file has already,
    for the same bundle, pairs and machine, are not measured again.

    Returns:
        The lines, old and new: `accuracy` (figures as of `runtime.evaluation.retrieval`, ranks kept) and `accuracy_comparison`.

    Raises:
        BundleError, PairsError: an input is unusable. DeviceError: a tower has no artefact that runs here.
    """
    subject, pairs = Subject(config.bundle, config.threads, draw_inputs(1)), open_pairs(config.data)
    facts, digest = environment(config.threads), pairs_sha256(pairs)
    settings = {"threads": config.threads, "input_sha256": digest, "seed": config.seed, "ks": list(KS)}
    common: dict[str, Any] = {"bundle": subject.label, "settings": settings, "environment": facts}
    before = newest(read_results([config.out])) if config.out.exists() else []
    known = {identity(row): row for row in before}
    galleries: dict[str, Gallery] = {}
    rows: list[Line] = []
    for image, text in combinations(subject):
        name = f"{image}+{text}"
        wanted = identity({"kind": "accuracy", "phase": "retrieval", "artefact": name, **common})
        found = known.get(wanted)
        made: list[Line] = []
        if found is None:
            clip = runtime.load(config.bundle, threads=config.threads, prefer={"image": image, "text": text})
            if image not in galleries:
                galleries[image] = embed_gallery(clip, pairs)
            figures = retrieval(clip, pairs, ks=KS, seed=config.seed, gallery=galleries[image])
            found = line("accuracy", "retrieval", artefact=name, figures={"image": image, "text": text, **figures}, **common)
            made.append(found)
            if rows:
                tests = paired(rows[0]["figures"], found["figures"], config.seed)
                more = {"candidate": name, "reference": rows[0]["artefact"], "tests": tests}
                made.append(line("accuracy_comparison", "retrieval", artefact=name, figures=more, **common))
            append_results(config.out, made)
        else:
            made.append(found)
            other = known.get(identity({"kind": "accuracy_comparison", "phase": "retrieval", "artefact": name, **common}))
            made += [other] if other else []
        rows += made
    return rows


def combinations(subject: Subject) -> list[tuple[str, str]]:
    """(image artefact, text artefact), the fp32 pair first. Raises DeviceError when a tower has none that runs here."""
    images, texts = ([artefact.id for artefact in subject.runnable(tower)] for tower in ("image", "text"))
    if not images or not texts:
        raise DeviceError(f"bundle '{subject.clip.manifest.name}' has {len(images)} image and {len(texts)} text artefacts that run here; both are needed")
    return [(images[0], texts[0]), *((image, texts[0]) for image in images[1:]), *((images[0], text) for text in texts[1:])]


def paired(reference: dict[str, Any], candidate: dict[str, Any], seed: int = 0, ks: Iterable[int] = KS) -> list[dict[str, Any]]:
    """Paired tests of two results of `runtime.evaluation.retrieval` on the same pairs, for each direction, split and k.

    Returns:
        [{"direction", "split", "k", "n", "difference" (candidate - reference), "low", "high" (95 %), "p", "verdict"}]; the verdict is "better",
        "worse" or "no difference": a difference is called when the interval excludes 0 and the exact McNemar p is below 0.05. `kept` is the
        candidate's recall over the reference's.

    Raises:
        ValueError: the two were not asked the same queries.
    """
    if reference["queries"] != candidate["queries"]:
        raise ValueError("the two results answer different queries; evaluate both on the same pairs")
    made = []
    for direction in ("text_to_image", "image_to_text"):
        for split, ranks in reference["ranks"][direction].items():
            first, second = np.asarray(ranks), np.asarray(candidate["ranks"][direction][split])
            for k in ks:
                test = paired_recall_test(second, first, k, seed=seed)
                low, high = test.interval
                called = (low > 0 or high < 0) and test.p < 0.05
                base = float((first <= k).mean())
                made.append(
                    {
                        "direction": direction,
                        "split": split,
                        "k": k,
                        "n": len(first),
                        "difference": test.difference,
                        "low": low,
                        "high": high,
                        "p": test.p,
                        "kept": float((second <= k).mean()) / base if base else None,
                        "verdict": "no difference" if not called else "better" if test.difference > 0 else "worse",
                    }
                )
    return made


def pairs_sha256(pairs: Pairs) -> str:
    """Of the shards' bytes, in the order of their names."""
    known = hashlib.sha256()
    for shard in pairs.shards:
        known.update(hashlib.sha256(shard.path.read_bytes()).digest())
    return known.hexdigest()


def _print(rows: Sequence[Line]) -> None:
    for row in rows:
        if row["kind"] == "accuracy":
            for split, figures in row["figures"]["text_to_image"].items():
                found = figures["recall@5"]
                sys.stdout.write(f"{row['artefact']:44} {split:10} recall@5 {found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]  n {figures['n']}\n")
        else:
            test = next(t for t in row["figures"]["tests"] if t["direction"] == "text_to_image" and t["split"] == "all" and t["k"] == 5)
            text = f"{test['verdict']}: {test['difference']:+.4f} [{test['low']:+.4f}, {test['high']:+.4f}], p {test['p']:.3g}"
            sys.stdout.write(f"{row['artefact']:44} against {row['figures']['reference']}: {text}\n")


def main(argv: list[str]) -> int:
    """`python -m benchmarks.accuracy`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description="Retrieval of a bundle's artefacts with paired tests.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="a pairs folder")
    parser.add_argument("--out", type=Path, default=Path("results.jsonl"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    config = AccuracyConfig(bundle=options.bundle, data=options.data, out=options.out, threads=options.threads, seed=options.seed)
    rows = measure_accuracy(config)
    if options.json:
        figures = {row["artefact"]: row["figures"]["text_to_image"] for row in rows if row["kind"] == "accuracy"}
        tests = {row["artefact"]: row["figures"]["tests"] for row in rows if row["kind"] == "accuracy_comparison"}
        sys.stdout.write(json.dumps({"out": config.out.name, "text_to_image": figures, "tests": tests}) + "\n")
    else:
        _print(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
