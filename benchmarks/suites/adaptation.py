"""What a finished student can be taught afterwards, on the demo's: a domain without forgetting the rest, and more languages.

    python -m benchmarks.suites.adaptation --run out/demo --out out/adaptation        (make bench-adaptation)

The domain is a drawing style that the student has never seen, clean captions, half of its concepts (benchmarks/suites/efficiency_worlds.py says
which); asked are the domain's other concepts, and the test style for what is kept. The languages are learned from the labels of trained concepts
alone; asked are all concepts of the test style, those that no language has named apart.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks.suites.demo import Layout
from benchmarks.suites.efficiency_worlds import copy_pairs, in_first_half
from benchmarks.suites.stages import StageError, Stages
from distill.evaluate import asked_in, open_encoder
from distill.languages import read_texts
from distill.recipes import RECIPES
from distill.weight_average import sweep
from mobileclip.checkpoint import load_checkpoint
from runtime.evaluation import Encoder, Gallery, embed_gallery, retrieval
from runtime.files import write_json
from runtime.pairs import Pairs, open_pairs

SHARES = ("0", "0.25", "0.5", "0.75", "1")
PIVOT = "en"


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptationConfig:
    run: str = "out/demo"
    """A finished demo run."""
    out: str = "out/adaptation"
    samples: int = 20_000
    """Of a fine-tuning."""
    steps: int = 2000
    """Of the languages."""
    seed: int = 0


def run_adaptation(config: AdaptationConfig) -> dict[str, Any]:
    """Run what is not done. Returns the flat figures (also in OUT/summary.json).

    Raises:
        StageError: there is no finished demo run, or a stage failed.
    """
    place, out = Layout(Path(config.run)), Path(config.out)
    if not (place.student / "receipt.json").is_file():
        raise StageError(f"'{config.run}' has no trained student; run mclip demo --out {config.run} first")
    out.mkdir(parents=True, exist_ok=True)
    stages = Stages(out, _say)
    figures = {**_domain(config, place, out, stages), **_languages(config, place, out, stages)}
    write_json(out / "summary.json", figures)
    return figures


def _domain(config: AdaptationConfig, place: Layout, out: Path, stages: Stages) -> dict[str, Any]:
    source = open_pairs(place.validation)
    read, asked = out / "domain/train", out / "domain/test"
    for folder, first in ((read, True), (asked, False)):
        copy_pairs(source, [row for row in range(len(source)) if in_first_half(str(source.meta(row)["concept"])) is first], folder)
    store, reference = out / "domain/store", str(place.student)
    stages.run(
        "reinforce", [["mobileclip.cli", "reinforce", str(read), str(store), "--teachers", reference, "--workers", "2", "--seed", str(config.seed)]],
        inputs=[read / "pairs-00000.tar", place.student / "receipt.json"], outputs=[store / "index.json"],
    )  # fmt: skip
    arms = {"tuned_alone": ["--recipe", str(_alone(out))], "tuned_held": ["--recipe", "finetune"]}
    common = ["--pairs", str(read), "--store", str(store), "--init", reference, "--samples", str(config.samples), "--seed", str(config.seed)]
    stages.run(
        "finetune", [["mobileclip.cli", "train", *common, *options, "--out", str(out / arm)] for arm, options in arms.items()],
        inputs=[store / "index.json"], outputs=[out / arm / "receipt.json" for arm in arms],
    )  # fmt: skip
    found: dict[str, Any] = {"domain_pairs": len(open_pairs(read)), "domain_queries": len(open_pairs(asked))}
    for arm in arms:
        folders = (str(asked), str(place.test))
        rows = sweep(load_checkpoint(reference), load_checkpoint(out / arm), tuple(float(share) for share in SHARES), folders, reference)
        for row in rows:
            for name, folder in zip(("domain", "general"), folders, strict=True):
                found[f"{arm}_{row['share']:g}_{name}"] = row["recall@5"][folder]
    return found


def _alone(out: Path) -> Path:
    """The recipe `finetune` without its reference."""
    return write_json(out / "alone.json", dataclasses.asdict(dataclasses.replace(RECIPES["finetune"](), affinity=0.0)))


def _languages(config: AdaptationConfig, place: Layout, out: Path, stages: Stages) -> dict[str, Any]:
    files = {path.stem: path for path in sorted((place.out / "pairs/captions").glob("*.jsonl"))}
    pivot, student = files.pop(PIVOT), out / "languages"
    texts = [word for language, path in files.items() for word in (language, str(path))]
    stages.run(
        "languages",
        [["mobileclip.cli", "train-languages", str(place.student), str(student), "--texts", *texts, "--pivot", str(pivot), "--concepts", str(place.train),
          "--steps", str(config.steps), "--threads", "2", "--seed", str(config.seed)]],
        inputs=[place.student / "receipt.json", pivot, *files.values()], outputs=[student / "receipt.json"],
    )  # fmt: skip
    pairs = open_pairs(place.test)
    labels = {language: read_texts(path) for language, path in {PIVOT: pivot, **files}.items()}
    named = set.intersection(*map(set, labels.values()))
    found: dict[str, Any] = {}
    for name, folder in (("before", place.student), ("after", student)):
        encoder = open_encoder(folder)
        gallery = _only(embed_gallery(encoder, pairs), named)
        found["language_pictures"] = len(gallery.keys)
        for language, texts in labels.items():
            found |= {f"{language}_{name}_{key}": value for key, value in _asked(encoder, pairs, asked_in(gallery, texts, language)).items()}
    return found


def _only(gallery: Gallery, concepts: set[str]) -> Gallery:
    """The pictures of these concepts: every language is asked about the same ones."""
    kept = [place for place, group in enumerate(gallery.groups) if group in concepts]
    lists = {name: [getattr(gallery, name)[place] for place in kept] for name in ("rows", "keys", "texts", "groups", "meta")}
    return dataclasses.replace(gallery, embeddings=gallery.embeddings[kept], **lists)


def _asked(encoder: Encoder, pairs: Pairs, gallery: Gallery) -> dict[str, float]:
    """Recall@5 of texts among pictures on trained and on held-out concepts, and zero-shot accuracy among all labels of the language."""
    result = retrieval(encoder, pairs, ks=(1, 5), gallery=gallery)
    to_image = result["text_to_image"]
    return {
        **{split: round(to_image[split]["recall@5"]["value"], 4) for split in ("trained", "held_out") if split in to_image},
        "zero_shot": round(result["image_to_text"]["all"]["recall@1"]["value"], 4),
    }


def as_text(figures: dict[str, Any]) -> str:
    """The tables for a terminal."""
    lines = [f"a domain of {figures['domain_pairs']} pairs: recall@5 on its {figures['domain_queries']} other pictures, and on the test style"]
    lines.append(f"{'share of the tuned model':28}" + "".join(f"{share:>16}" for share in SHARES))
    for arm, title in (("tuned_alone", "contrastive loss alone"), ("tuned_held", "held to its own affinities")):
        cells = [f"{figures[f'{arm}_{float(share):g}_domain']:.3f} / {figures[f'{arm}_{float(share):g}_general']:.3f}" for share in SHARES]
        lines.append(f"{title:28}" + "".join(f"{cell:>16}" for cell in cells))
    languages = sorted({key.split("_")[0] for key in figures if key.endswith("_after_trained")}, key=lambda language: (language != PIVOT, language))
    lines.append(f"\nlanguages, asked about the {figures['language_pictures']} pictures whose concepts have a name in all of them:")
    lines.append("recall@5 on trained concepts, on held-out ones, zero-shot among all labels; before -> after")
    for language in languages:
        cells = [f"{figures.get(f'{language}_before_{key}', 0):.3f} -> {figures.get(f'{language}_after_{key}', 0):.3f}" for key in ("trained", "held_out", "zero_shot")]
        lines.append(f"{language:4}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> int:
    config = tyro.cli(AdaptationConfig, prog="python -m benchmarks.suites.adaptation", description=__doc__)
    figures = run_adaptation(config)
    _say(as_text(figures))
    _say(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
