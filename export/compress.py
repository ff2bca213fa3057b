"""`mclip compress`: prune a checkpoint, recover it from the store, search for its int8 form, and say what each of that cost.

    mclip compress CKPT OUT --calibrate PAIRS --store STORE --validation PAIRS          # prune feed-forward layers and recover
    mclip compress CKPT OUT --calibrate PAIRS --store STORE --prune-latency 0.5         # whole towers, to half of their time
    mclip compress CKPT OUT --calibrate PAIRS --latency 0.5 --max-recall-loss 0.5       # int8 of each tower, within a budget
    mclip compress CKPT OUT --calibrate PAIRS --max-recall-loss 0.5 --front             # and every other way beside it, for mclip report --front OUT

`OUT/pruned` is the checkpoint as it left the knife; `OUT` itself is the one after recovery. Recovery is training
(`distill.train`), so it goes on where it was interrupted when the same command is run again; so does the search.
`OUT/precision.json` says in which precisions each tower may be exported, and how int8 is made.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from distill.evaluate import TorchEncoder
from distill.progress import stamped_lines
from distill.store import open_store
from export import narrow
from export.artefacts import allowed_pairs
from export.four_bit import finetune_four_bit
from export.precision_file import read_precisions
from export.prune import Report, prune_ffn
from export.search_towers import search_towers
from export.towers import TOWERS, choose_rows, embed, image_encoder, read_samples
from mobileclip.checkpoint import load_checkpoint, open_tokenizer, preprocess_config, save_checkpoint, verify_receipt
from mobileclip.model import ImageTextModel, count_parameters
from runtime.errors import CheckpointError, RecipeError
from runtime.evaluation import retrieval
from runtime.files import file_sha256, write_json
from runtime.pairs import open_pairs

SCHEMA = 1
FRONT = "front.json"
DECIDING = ("calibration", "recover_samples", "recipe", "seed", "latency", "max_recall_loss", "judge", "prune_latency", "importance", "four_bit_steps")


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressConfig:
    """Settings of `mclip compress`."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """Checkpoint folder; not reparameterised, so that recovery can train it."""
    out: Annotated[Path, tyro.conf.Positional]
    """Checkpoint folder to write."""
    calibrate: Path
    """Pairs that decide which units go; with a store, the pairs that it belongs to."""
    store: Path | None = None
    """Reinforcement store to recover from. Left out: pruning only."""
    validation: Path | None = None
    """Pairs that retrieval is reported on, before and after. Not the test split."""
    ratio: float | None = None
    """Share of the hidden units of every feed-forward layer that go. Left out: a quarter, but none where int8 is searched for."""
    prune_latency: float | None = None
    """Cut whole towers instead: stages, streams, heads, layers, hidden units, to this share of their measured time together (export/narrow.py)."""
    importance: str = "fisher"
    """What such a cut goes by: fisher, activation or norm."""
    four_bit_steps: int | None = None
    """Train the text tower's weights onto a 4-bit grid for this many steps of 64 texts (`mclip export --precision int4`); 0 rounds alone."""
    latency: float | None = None
    """Search for int8: most time of a tower beside its float32 under ONNX Runtime, one thread."""
    max_recall_loss: float | None = None
    """Search for int8: most points (hundredths) of recall@1 that may be lost. 0.5 where only a latency is given."""
    judge: int = 512
    """Pairs that int8 forms are judged on."""
    calibration: int = 512
    """Pairs that are read for the decision."""
    recover_samples: int = 20_000
    """Pairs seen in recovery."""
    recipe: str | None = None
    """Recipe of the recovery. Left out: recovery, narrowed where whole towers are cut."""
    seed: int = 0
    threads: int = 1
    """Torch threads of the recovery."""
    front: bool = False
    """Write OUT/front.json: every way to make the towers smaller or faster, measured beside each other (`mclip report --front OUT`)."""
    json: bool = False
    """Print the report as one JSON object."""


def compress(config: CompressConfig, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Prune, recover, report; returns the report that also stands in the receipt under "compress".

    Raises:
        RecipeError: a setting makes no sense.
        CheckpointError, PairsError, StoreError: an input is missing or damaged.
        TrainingError: recovery failed, or `out` holds a run with other settings.
    """
    if not config.checkpoint.is_dir():
        raise CheckpointError(f"there is no checkpoint at '{config.checkpoint}'; expected a folder written by mclip train")
    if config.out.resolve() == config.checkpoint.resolve():
        raise RecipeError("the compressed checkpoint would overwrite the one that it is made from; give another OUT")
    if config.prune_latency is not None and config.ratio is not None:
        raise RecipeError("--ratio cuts feed-forward layers and --prune-latency whole towers; give one of them")
    if config.four_bit_steps is not None and _prunes(config):
        raise RecipeError("--four-bit-steps trains weights that stay; prune first, and give the pruned checkpoint to a second mclip compress")
    receipt = verify_receipt(config.checkpoint)
    source = receipt["files"]["model.safetensors"]["sha256"]
    fingerprint = _fingerprint(config, source)
    done = _finished(config.out, fingerprint)
    if done is not None and not (config.front and not (config.out / FRONT).is_file()):
        say(f"{config.out} is complete")
        return done
    if _searches(config) and read_precisions(config.checkpoint).int8:
        raise RecipeError(f"'{config.checkpoint}' is compressed already: its precision.json says how int8 is made; give the checkpoint that it was made from, or remove that file")
    _refuse_foreign(config.out, source)
    model = load_checkpoint(config.checkpoint, verify=False)
    report: dict[str, Any] = {"fingerprint": fingerprint, "source_sha256": source, "before": _facts(config, config.checkpoint, model)}
    say(f"before: {_line(report['before'])}")
    found = None
    if not _prunes(config):
        if config.four_bit_steps is not None:
            model, report["four_bit"], report["calibration"] = _four_bit(config, model, say)
        if _searches(config):
            found = search_towers(config, config.checkpoint, model, say)
            report |= {"calibration": found["calibration"], "int8": found["report"]}
        config.out.mkdir(parents=True, exist_ok=True)
        save_checkpoint(model, config.out, tokenizer=config.checkpoint / "tokenizer.json", extra={"stage": "compress"})
        _finish(config, report, found)
        return report
    report |= _prune(config, model, fingerprint, say)
    if config.store is not None:
        from distill.recipes import load_recipe
        from distill.train import TrainConfig, train

        wanted, there = load_recipe(_recipe(config)).batch_size, len(open_pairs(config.calibrate))
        if there < wanted:
            say(f"the recipe's batches of {wanted} are more than the {there} pairs; recovering in batches of {max(2, there)}")
        say(f"recovering from the store: {config.recover_samples:,} samples")
        train(
            TrainConfig(
                pairs=str(config.calibrate), store=str(config.store), out=str(config.out), init=str(config.out / "pruned"),
                samples=config.recover_samples, recipe=_recipe(config), seed=config.seed, threads=config.threads,
                batch_size=max(2, there) if there < wanted else None,
            )
        )  # fmt: skip
    else:
        save_checkpoint(load_checkpoint(config.out / "pruned"), config.out, tokenizer=config.checkpoint / "tokenizer.json", extra={"stage": "compress"})
    report["after"] = _facts(config, config.out, load_checkpoint(config.out))
    say(f"after: {_line(report['after'])}")
    if _searches(config):
        found = search_towers(config, config.out, load_checkpoint(config.out), say)
        report["int8"] = found["report"]
    _finish(config, report, found)
    return report


def _searches(config: CompressConfig) -> bool:
    return config.latency is not None or config.max_recall_loss is not None or config.front


def _recipe(config: CompressConfig) -> str:
    return config.recipe or ("recovery" if config.prune_latency is None else "narrowed")


def _prunes(config: CompressConfig) -> bool:
    return bool(_ratio(config)) or config.prune_latency is not None


def _ratio(config: CompressConfig) -> float:
    if config.ratio is not None:
        return config.ratio
    if config.prune_latency is not None or config.four_bit_steps is not None:
        return 0.0
    return 0.0 if _searches(config) and config.store is None else 0.25


def _prune(config: CompressConfig, model: ImageTextModel, fingerprint: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Write OUT/pruned unless it is there already, and return its part of the report."""
    folder = config.out / "pruned"
    try:
        kept = verify_receipt(folder).get("prune")
        if kept and kept["fingerprint"] == fingerprint:
            return kept["report"]
    except CheckpointError:
        pass
    pairs = open_pairs(config.calibrate)
    (rows,) = choose_rows(len(pairs), (config.calibration,), config.seed)
    samples, skipped = read_samples(pairs, rows, preprocess_config(model.config), open_tokenizer(config.checkpoint, model.config))
    for line in skipped:
        say(f"left out: {line}")
    facts: Report | narrow.Report
    if config.prune_latency is not None:
        cache = _notes(config) / "times.json"
        cache.parent.mkdir(parents=True, exist_ok=True)
        pruned, facts = narrow.narrow(model, config.prune_latency, samples, cache=cache, method=config.importance, seed=config.seed, say=say)
        line = f"narrowed (image: {facts.image}; text: {facts.text}) to {facts.time_share:.2f} of the time"
    else:
        pruned, facts = prune_ffn(model, _ratio(config), samples)
        line = f"pruned {_ratio(config):.0%} of the hidden units"
    save_checkpoint(pruned, folder, tokenizer=config.checkpoint / "tokenizer.json")
    found = {
        "prune": facts.as_dict(),
        "calibration": {"n": len(samples), "seed": config.seed, "keys_sha256": hashlib.sha256("\n".join(samples.keys).encode()).hexdigest()},
        "pruned": _facts(config, folder, pruned),
    }
    receipt = json.loads((folder / "receipt.json").read_text(encoding="utf-8"))
    write_json(folder / "receipt.json", {**receipt, "prune": {"fingerprint": fingerprint, "report": found}})
    agreement = "" if isinstance(facts, narrow.Report) else f"; cosine to before {facts.image_cosine_mean:.4f} / {facts.text_cosine_mean:.4f}"
    say(f"{line}: {_line(found['pruned'])}{agreement}")
    return found


def _notes(config: CompressConfig) -> Path:
    """What was measured on the way, beside OUT: a run that was interrupted goes on from it."""
    return config.out.with_name(f"{config.out.name}.search")


def _four_bit(config: CompressConfig, model: ImageTextModel, say: Callable[[str], None]) -> tuple[ImageTextModel, dict[str, Any], dict[str, Any]]:
    """The model with its text weights on the 4-bit grid, what that did, and what it was trained on: the store's captions where there is a store, else the pairs'."""
    pairs, tokenizer = open_pairs(config.calibrate), open_tokenizer(config.checkpoint, model.config)
    (rows,) = choose_rows(len(pairs), (config.calibration,), config.seed)
    samples, _ = read_samples(pairs, rows, preprocess_config(model.config), tokenizer)
    texts = list(samples.captions)
    if config.store is not None:
        store = open_store(config.store)
        texts = [store.caption(row, j).text for row in range(len(store)) for j in range(int(store.caption_counts[row]))]
    texts = sorted(set(texts))
    found, facts = finetune_four_bit(model, tokenizer(texts), embed(image_encoder(model), samples.pixels), steps=config.four_bit_steps or 0, seed=config.seed, say=say)
    say(
        f"4-bit text weights: centred cosine p1 {facts.rounded_p1:.4f} rounded, {facts.trained_p1:.4f} trained (mean {facts.rounded_mean:.4f}, {facts.trained_mean:.4f}), "
        f"{len(texts):,} texts"
    )
    return found, facts.as_dict(), {"n": len(samples), "seed": config.seed, "keys_sha256": hashlib.sha256("\n".join(samples.keys).encode()).hexdigest()}


def _facts(config: CompressConfig, folder: Path, model: ImageTextModel) -> dict[str, Any]:
    """Size, and retrieval on the validation pairs where there are any."""
    facts: dict[str, Any] = {"parameters": count_parameters(model), "bytes": (folder / "model.safetensors").stat().st_size, "retrieval": None}
    if config.validation is not None:
        found = retrieval(TorchEncoder(model, open_tokenizer(folder, model.config)), open_pairs(config.validation), seed=config.seed)
        facts["retrieval"] = {name: found[name] for name in ("text_to_image", "image_to_text", "gallery")}
    return facts


def _line(facts: dict[str, Any]) -> str:
    line = f"{facts['parameters']['total']:,} parameters, {facts['bytes'] / 1e6:.1f} MB"
    if facts["retrieval"]:
        recalls = [f"{split} {values['recall@5']['value']:.3f}" for split, values in facts["retrieval"]["text_to_image"].items()]
        line += f", recall@5 text to image: {', '.join(recalls)}"
    return line


def _finish(config: CompressConfig, report: dict[str, Any], found: dict[str, Any] | None) -> None:
    """precision.json, then the receipt that names it: only now is the folder a finished compression."""
    path = config.out / "precision.json"
    towers = {tower: {target: list(names) for target, names in allowed_pairs().items()} for tower in TOWERS}
    decided: dict[str, Any] = {"schema": SCHEMA, "calibration": report["calibration"], "towers": towers}
    if found is not None:
        for tower, refused in found["refused"].items():
            for target in refused:
                towers[tower][target] = [name for name in towers[tower][target] if name != "int8"]
        decided |= {name: found[name] for name in ("int8", "chosen", "refused")}
    write_json(path, decided)
    written = [path]
    if found is not None and found["front"] is not None:
        write_json(config.out / FRONT, found["front"])
        written.append(config.out / FRONT)
    receipt = json.loads((config.out / "receipt.json").read_text(encoding="utf-8"))
    receipt["files"] |= {path.name: {"sha256": file_sha256(path), "bytes": path.stat().st_size} for path in written}
    write_json(config.out / "receipt.json", {**receipt, "compress": report})


def _refuse_foreign(out: Path, source: str) -> None:
    """Raises RecipeError where OUT is a checkpoint that was not made from this one."""
    try:
        receipt = json.loads((out / "receipt.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if "compress" in receipt and receipt["compress"].get("source_sha256") != source:
        raise RecipeError(f"'{out}' holds the compression of another checkpoint; give another OUT, or remove that folder")


def _fingerprint(config: CompressConfig, source: str) -> str:
    settings = {name: str(getattr(config, name)) for name in DECIDING}
    facts = {**settings, "ratio": _ratio(config), "source": source, "store": config.store is not None}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _finished(out: Path, fingerprint: str) -> dict[str, Any] | None:
    """The report of a finished compression with these settings."""
    try:
        report = json.loads((out / "receipt.json").read_text(encoding="utf-8")).get("compress")
    except (OSError, ValueError):
        return None
    return report if report and report.get("fingerprint") == fingerprint else None


def main(argv: list[str]) -> int:
    """`mclip compress CKPT OUT --calibrate PAIRS --store STORE`."""
    config = tyro.cli(CompressConfig, args=argv, prog="mclip compress", description="Prune a checkpoint, recover it from the store, search for its int8 form.")
    report = compress(config, stamped_lines())
    if config.json:
        sys.stdout.write(json.dumps({"checkpoint": str(config.out), **report}) + "\n")
    return 0
