"""The tokenizer against open_clip's `SimpleTokenizer`: both in one run, interleaved, on texts that neither has seen before.

    python -m benchmarks.suites.tokenizer --out out/tokenizer.json          (make bench-tokenizer)

Real lines are the one-line descriptions of Debian packages that this machine knows of, and emoji labels in several languages; odd texts
are those of `benchmarks.odd_texts`. A round is one batch of texts. *Cold*: both tokenizers are made anew for each round (outside the
clock). *Warm*: both have met other texts of the kind; the batch itself is new in every round. Rows are compared before anything is timed.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from benchmarks.environment import PACKAGES, environment, packages
from benchmarks.measure import Plan, interleave, summarise
from benchmarks.odd_texts import SHAPES, odd_texts
from benchmarks.ratios import Ratio, compare
from distill.fetch import EMOJIBASE, fetch, read_members
from runtime.errors import ClipError
from runtime.files import write_json
from runtime.tokenizer import Tokenizer, build_clip_tokenizer

Side = Callable[[list[str]], Any]
STATUS = Path("/var/lib/dpkg/status")
TARGETS = {"real lines, cold": 5.0, "real lines, warm": 5.0, "odd texts, cold": 1.0, "odd texts, warm": 1.0}


class TokenizerBenchError(ClipError):
    """There is nothing to measure on, or the two sides disagree."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerBench:
    """What is measured."""

    out: str = "out/tokenizer.json"
    batch: int = 256
    """Texts a round."""
    cold_rounds: int = 100
    warm_rounds: int = 150
    shape_rounds: int = 80
    """For each shape of odd texts."""
    warm_up: int = 8192
    """Texts that both sides meet before the warm rounds."""
    languages: tuple[str, ...] = ("en", "de", "fr", "es", "pl", "ru", "uk", "ja", "ko", "zh", "hi", "th")
    """Of the emoji labels."""
    context_length: int = 77
    seed: int = 0


def package_lines() -> list[str]:
    """The distinct one-line descriptions of Debian packages: of all that the package lists know, else of the installed ones.

    Raises:
        TokenizerBenchError: this machine knows of none.
    """
    try:
        text = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, check=True).stdout.decode("utf-8", "replace")
    except (OSError, subprocess.CalledProcessError):
        text = ""
    found = _descriptions(text)
    if not found and STATUS.is_file():
        found = _descriptions(STATUS.read_text(encoding="utf-8", errors="replace"))
    if not found:
        raise TokenizerBenchError("found no Debian package descriptions (neither `apt-cache dumpavail` nor the list of installed packages has any); run on Debian or Ubuntu")
    return found


def _descriptions(text: str) -> list[str]:
    return sorted(set(re.findall(r"^Description(?:-en)?: *(\S.*)$", text, flags=re.MULTILINE)))


def label_lines(languages: Sequence[str], cache: Path | None = None) -> dict[str, list[str]]:
    """The distinct emoji labels of each language, from the sample's cache (filled when it is not)."""
    read = read_members(fetch(cache)[EMOJIBASE.name], [f"{language}/data.json" for language in languages])
    return {language: sorted({row["label"] for row in read[f"{language}/data.json"]}) for language in languages}


class Sides:
    """Both tokenizers, and how each is made anew."""

    def __init__(self, folder: Path, context_length: int) -> None:
        import open_clip.tokenizer
        import torch

        torch.set_num_threads(1)
        self._theirs = open_clip.tokenizer.SimpleTokenizer
        self._length = context_length
        self._file = build_clip_tokenizer(open_clip.tokenizer.default_bpe(), out=folder / "tokenizer.json")

    def fresh(self) -> dict[str, Side]:
        """Two tokenizers that have met no text yet."""
        return {"theirs": self._theirs(context_length=self._length), "ours": Tokenizer.open(self._file, self._length)}


def differing(sides: dict[str, Side], texts: list[str]) -> int:
    """Texts whose padded rows differ."""
    count = 0
    for start in range(0, len(texts), 1024):
        some = texts[start : start + 1024]
        count += int((sides["ours"](some) != sides["theirs"](some).numpy()).any(axis=1).sum())
    return count


def time_cold(sides: Sides, batches: list[list[str]], seed: int) -> dict[str, Any]:
    """One batch a round, both tokenizers new in every round."""
    now = sides.fresh()
    for side in now.values():
        side(["a cat", "caf\u00c3\u00a9 &eacute; <b>"])  # whatever is imported on first use
    now = sides.fresh()

    def renew(_turn: int, _elapsed: float) -> None:
        now.clear()
        now.update(sides.fresh())

    samples = interleave({name: lambda turn, name=name: now[name](batches[turn]) for name in ("theirs", "ours")}, _plan(len(batches), seed), renew)  # type: ignore[misc]
    return _figures(samples, batches)


def time_warm(now: dict[str, Side], batches: list[list[str]], seed: int) -> dict[str, Any]:
    """One new batch a round, with the tokenizers as they are."""
    samples = interleave({name: lambda turn, side=side: side(batches[turn]) for name, side in now.items()}, _plan(len(batches), seed))  # type: ignore[misc]
    return _figures(samples, batches)


def _plan(rounds: int, seed: int) -> Plan:
    return Plan(warmup=0, min_samples=rounds, max_samples=rounds, few_samples=rounds, seconds=0, max_seconds=0, seed=seed)


def _figures(samples: dict[str, Any], batches: list[list[str]]) -> dict[str, Any]:
    ratio = compare(samples["theirs"], samples["ours"])
    texts = sum(map(len, batches))
    return {
        "times_faster": _inverse(ratio),
        "ratio": ratio.as_dict(),
        "microseconds_a_text": {name: float(np.median(values)) / 1000 / len(batches[0]) for name, values in samples.items()},
        "texts": texts,
        "mean_characters": sum(len(text) for batch in batches for text in batch) / texts,
        "batch": {name: summarise(values).as_dict() for name, values in samples.items()},
    }


def _inverse(ratio: Ratio) -> dict[str, float]:
    """How many times faster ours is, with its interval."""
    return {"value": 1 / ratio.value, "low": 1 / ratio.high, "high": 1 / ratio.low, "level": ratio.level}


def run_bench(config: TokenizerBench, say: Callable[[str], object]) -> dict[str, Any]:
    """Measure, and write everything to `config.out`.

    Raises:
        TokenizerBenchError: no lines, too few of them, or a real line whose rows differ.
    """
    facts = environment(threads=1) | {"packages": packages((*PACKAGES, "open_clip_torch", "regex"))}
    descriptions, labels = package_lines(), label_lines(config.languages)
    lines = list(dict.fromkeys([*descriptions, *(label for some in labels.values() for label in some)]))
    Random(config.seed).shuffle(lines)
    needed = config.batch * (config.cold_rounds + config.warm_rounds) + config.warm_up
    if len(lines) < needed:
        raise TokenizerBenchError(f"found {len(lines)} distinct lines, but {needed} are needed (a batch for every round, and the warm-up); ask for fewer rounds")
    odd = list(dict.fromkeys(odd_texts(2 * needed, config.seed)))[:needed]
    counts = {"descriptions": len(descriptions), "labels": {language: len(some) for language, some in labels.items()}, "lines": len(lines), "odd": len(odd)}
    say(f"{len(lines)} distinct lines: {counts['descriptions']} package descriptions, labels {counts['labels']}; {len(odd)} distinct odd texts of {len(SHAPES)} shapes")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        sides = Sides(Path(folder), config.context_length)
        for kind, texts in (("real lines", lines), ("odd texts", odd)):
            checked = sides.fresh()
            wrong = differing(checked, texts)
            counts[f"{kind}, rows that differ"] = wrong
            # Odd texts hold characters that only the newer Unicode of the two sides knows as letters; the tests tell them from real differences.
            say(f"{kind}: {wrong} of {len(texts)} rows differ" + (", by characters that one side's Unicode does not know" if wrong else ""))
            if wrong and kind == "real lines":
                raise TokenizerBenchError(f"{wrong} of {len(texts)} real lines have other rows than open_clip's; a faster way to something else is no use")
            del checked
            batches = [texts[start : start + config.batch] for start in range(0, needed, config.batch)]
            cold, rest = batches[: config.cold_rounds], texts[config.cold_rounds * config.batch :]
            results[f"{kind}, cold"] = time_cold(sides, cold, config.seed)
            now = sides.fresh()
            for start in range(0, config.warm_up, config.batch):
                for side in now.values():
                    side(rest[start : start + config.batch])
            rest = rest[config.warm_up :]
            results[f"{kind}, warm"] = time_warm(now, [rest[n * config.batch : (n + 1) * config.batch] for n in range(config.warm_rounds)], config.seed)
            for name in (f"{kind}, cold", f"{kind}, warm"):
                say(sentence(name, results[name]))
        shapes = {}
        now = sides.fresh()
        for number, shape in enumerate(SHAPES):
            texts = odd_texts((config.shape_rounds + 10) * 64, config.seed + 1 + number, (shape,))
            batches = [texts[start : start + 64] for start in range(0, len(texts), 64)]
            for batch in batches[:10]:
                for side in now.values():
                    side(batch)
            shapes[shape] = time_warm(now, batches[10:], config.seed)
            say(sentence(f"  {shape}", shapes[shape]))
    result = {
        "environment": facts,
        "settings": {"batch": config.batch, "context_length": config.context_length, "warm_up": config.warm_up, "seed": config.seed},
        "counts": counts,
        "results": results,
        "shapes, warm": shapes,
        "targets": {name: {"at_least": target, "reached": results[name]["times_faster"]["low"] >= target} for name, target in TARGETS.items()},
    }
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    write_json(config.out, result)
    return result


def sentence(name: str, found: dict[str, Any]) -> str:
    """One line for a person."""
    faster, each = found["times_faster"], found["microseconds_a_text"]
    return (
        f"{name}: {faster['value']:.2f} times as fast ({faster['level']:.0%} interval {faster['low']:.2f} to {faster['high']:.2f}, {found['ratio']['n']} pairs); "
        f"{each['ours']:.1f} against {each['theirs']:.1f} µs a text"
    )


def main(argv: list[str]) -> int:
    import tyro

    config = tyro.cli(TokenizerBench, args=argv, prog="python -m benchmarks.suites.tokenizer", description=__doc__)
    try:
        result = run_bench(config, lambda line: sys.stdout.write(line + "\n"))
    except ClipError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    for name, target in result["targets"].items():
        sys.stdout.write(f"target for {name}, at least {target['at_least']:g} times as fast: {'reached' if target['reached'] else 'not reached'}\n")
    sys.stdout.write(f"written to {config.out}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
