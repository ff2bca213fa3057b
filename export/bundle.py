"""`mclip export`: a checkpoint becomes a bundle whose every artefact was compared with it.

The bundle is made in a hidden folder beside its place and moved there as the last step, so an interrupted or failed export
leaves the bundle that stood there as it was; running the same command again starts over.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from distill.evaluate import TorchEncoder
from distill.progress import stamped_lines
from export.artefacts import Maker, converter, parse_targets
from export.golden import write_golden_inputs
from export.latency_gate import processor
from export.licences import require_commercial, third_party, works
from export.model_card import model_card, read_evaluation
from export.precision_file import read_precisions
from export.score_calibration import calibrate_scores
from export.to_coreml_classifier import read_classes
from export.towers import TOWERS, choose_rows, embed, read_samples, text_encoder
from export.verify import FLOATS, THRESHOLDS, Thresholds, reference_of, spread
from mobileclip.checkpoint import load_checkpoint, open_tokenizer, preprocess_config, verify_receipt
from mobileclip.config import ModelConfig
from mobileclip.folding import reparameterize
from runtime.bundle_zip import is_zip, pack
from runtime.errors import BundleError, CheckpointError, RecipeError
from runtime.manifest import Artefact, ImageSpec, Manifest, TextSpec, write_manifest
from runtime.pairs import Pairs, open_pairs
from runtime.preprocess import PreprocessConfig

_PACKAGES = (
    "torch", "timm", "onnx", "onnxscript", "onnxslim", "onnxruntime", "coremltools", "tensorrt-rtx-cu13", "openvino", "nncf", "litert-torch", "ai-edge-litert",
    "ai-edge-quantizer", "executorch", "torchao", "coreai-torch", "coreai-core", "coreai-opt", "onnxruntime-qnn", "numpy",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """Settings of `mclip export`."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """Checkpoint folder."""
    bundle: Annotated[Path, tyro.conf.Positional]
    """Bundle folder to make, or one file of the same content when the name ends in .zip."""
    pairs: Annotated[Path, tyro.conf.arg(aliases=["--calibrate"])]
    """Pairs folder: golden pictures, calibration and comparison come from it. Not the test split."""
    target: str = "onnx"
    """Comma-separated: onnx, coreml, coreai, tensorrt, openvino, litert, executorch, qnn, hf (transformers.js), or all. Each is an extra of the same name,
    but for onnx and hf (export). Other forms: onnx-pixels (from a picture's bytes on), onnx-eot (text without ArgMax), ort (ONNX Runtime's own format),
    coreml-image (takes a picture), coreml-classifier (of --classnames)."""
    precision: str = "fp32,fp16,int8"
    """Comma-separated, fp32, fp16, mixed, int8, palette8, palette6, palette4, sparse, a16w8: each target is made in those of them that it knows, onnx always in fp32
    too."""
    samples: int = 256
    """Pairs that artefacts are compared on."""
    calibration: int = 64
    """Pairs that static int8 takes its ranges from."""
    golden: int = 16
    """Pairs that travel with the bundle for self-checks."""
    seed: int = 0
    """Which pairs are chosen."""
    centred_p1: float = 0.98
    """Precisions that cost accuracy: least first percentile of the cosines to the checkpoint, mean embedding removed."""
    recall_loss: float = 0.005
    """Precisions that cost accuracy: most recall@1 that may be lost."""
    ios: Literal[16, 17, 18] = 17
    """Core ML: the oldest iOS that the packages are for."""
    batches: tuple[int, ...] = ()
    """Core ML: further sizes of batches that the packages take (enumerated shapes), beside 1."""
    text_layout: Literal["rows", "channels"] = "rows"
    """Core ML: "channels" computes the text tower as (batch, width, 1, tokens) with 1x1 convolutions, the Neural Engine's favourite."""
    features: bool = False
    """Core ML: the image tower also gives its last feature map, before pooling."""
    multifunction: bool = False
    """Core ML: also both towers in one package of two functions, sharing what they can (iOS 18)."""
    classnames: Path | None = None
    """Core ML classifier: file of the names of its classes, one a line."""
    templates: Path | None = None
    """Core ML classifier: file of prompt templates, one a line with {} or {c}."""
    keep_failed: bool = False
    """Leave the files of artefacts that do not pass, marked as failed; no reader picks them."""
    name: str | None = None
    """Name of the bundle; the model's when left out."""
    force: bool = False
    """Replace a bundle that stands there, when the new one is complete."""
    licence: tuple[str, ...] = ()
    """What is known of licences, "WHAT: LICENCE": weights, teachers, training data, tokenizer, golden (the pictures that travel with the bundle), or anything
    else."""
    commercial: bool = False
    """Refuse to make a bundle with a part that may not be sold, or whose licence is not known."""
    intended_use: str | None = None
    """What the model is meant for: a sentence for MODELCARD.md."""
    known_failure: tuple[str, ...] = ()
    """What it is known to do badly: sentences for MODELCARD.md."""
    evaluation: tuple[Path, ...] = ()
    """Files that mclip eval --json wrote: their figures by slice go into MODELCARD.md."""
    languages: tuple[str, ...] = ("en",)
    """BCP-47 tags of the captions that the model was trained on."""
    json: bool = False
    """Print one JSON object at the end."""


def export_bundle(config: ExportConfig, say: Callable[[str], None] = lambda line: None) -> Manifest:
    """Make a bundle and return its manifest.

    Raises:
        RecipeError: a target or precision that does not exist, or two that do not fit.
        CheckpointError, PairsError: an input is missing or damaged.
        ParityError: a float artefact does not compute what the checkpoint computes, or the comparison would be empty.
        BundleError: the place of the bundle is taken, by something else or without `force`.
    """
    targets = parse_targets(config.target, config.precision)
    _check_numbers(config)
    if ("coreml-classifier" in targets) != (config.classnames is not None):
        raise RecipeError("--target coreml-classifier and --classnames, a file with the name of a class on each line, need each other; give both or none")
    for target in targets:
        converter(target).require()
    place = Path(os.path.abspath(config.bundle))
    _check_place(place, config.force)
    evaluations = {path.stem: read_evaluation(path) for path in config.evaluation}
    receipt = verify_receipt(config.checkpoint) if config.checkpoint.is_dir() else None
    if receipt is None:
        raise CheckpointError(f"there is no checkpoint at '{config.checkpoint}'; expected a folder written by mclip train or mclip compress")
    model = load_checkpoint(config.checkpoint, verify=False)
    parties = works(receipt, model.config, config.pairs, config.licence)
    if config.commercial:
        require_commercial(parties)
    tokenizer = open_tokenizer(config.checkpoint, model.config)
    classes = None if config.classnames is None else read_classes(config.classnames, config.templates, TorchEncoder(model, tokenizer))
    pixels = preprocess_config(model.config)
    pairs = open_pairs(config.pairs)
    compared, calibrated, golden = choose_rows(len(pairs), (config.samples, config.calibration, config.golden), config.seed)
    samples, skipped = read_samples(pairs, compared, pixels, tokenizer)
    calibration, more = read_samples(pairs, calibrated, pixels, tokenizer)
    for line in (*skipped, *more):
        say(f"left out: {line}")
    say(f"checkpoint {model.config.name}: comparing on {len(samples)} pairs, calibrating on {len(calibration)}")
    reference = reference_of(model, samples)
    folded, report = (model, None) if model.config.folded else reparameterize(model)
    if report is not None:
        say(f"reparameterised: {report.parameters_before:,} to {report.parameters_after:,} parameters, largest difference {report.max_abs:.1e}")

    settings = {name: getattr(config, name) for name in ("ios", "batches", "text_layout", "features", "multifunction")} | {"classes": classes}
    with _whole_bundle(place) as work:
        maker = Maker(
            model=folded, samples=samples, reference=reference, calibration=calibration, folder=work, targets=targets,
            precisions=read_precisions(config.checkpoint), say=say, keep_failed=config.keep_failed, convert=settings,
            thresholds={**THRESHOLDS, "lossy": Thresholds(centred_p1=config.centred_p1, recall1_change=-config.recall_loss)},
        )  # fmt: skip
        artefacts = [artefact for tower in TOWERS for artefact in maker.make(tower)]
        shutil.copyfile(config.checkpoint / "tokenizer.json", work / "tokenizer.json")
        facts = write_golden_inputs(work, model, pairs, golden, pixels, tokenizer)
        calibrated_scores = calibrate_scores(reference, lambda texts: embed(text_encoder(model), tokenizer(texts)), work)
        say(_said_of_scores(calibrated_scores))
        manifest = Manifest(
            name=config.name or model.config.name,
            embed_dim=model.config.embed_dim,
            image=_image_spec(pixels),
            text=_text_spec(model.config),
            loss="softmax" if model.logit_bias is None else "sigmoid",
            logit_scale=float(model.logit_scale.detach().exp()),
            logit_bias=None if model.logit_bias is None else float(model.logit_bias.detach()),
            languages=config.languages,
            artefacts=tuple(artefacts),
            golden=facts,
            calibration=calibrated_scores,
            licences=tuple({"what": party.what, "name": party.name, "licence": party.licence, "standing": party.standing} for party in parties),
            provenance={
                "checkpoint_sha256": receipt["files"]["model.safetensors"]["sha256"],
                "parameters": sum(p.numel() for p in folded.parameters()),
                "reparameterised": None if report is None else dataclasses.asdict(report),
                "samples": _provenance(pairs, compared, config.seed, spread={tower: spread(reference.of(tower)) for tower in TOWERS}),
                "calibration": _provenance(pairs, calibrated, config.seed),
                "tools": _versions(),
                "cpu": processor(),
            },
        )
        for target in targets:
            if any(artefact.target == target and artefact.path for artefact in artefacts):
                more = getattr(converter(target), "finish", _nothing)(work, manifest, model, settings)
                manifest = dataclasses.replace(manifest, artefacts=(*manifest.artefacts, *more))
        (work / "THIRD_PARTY.md").write_text(third_party(parties), encoding="utf-8")
        card = model_card(manifest, receipt, parties, evaluations, config.intended_use, config.known_failure)
        (work / "MODELCARD.md").write_text(card, encoding="utf-8")
        manifest = write_manifest(work, manifest)
    return manifest


def _said_of_scores(found: dict[str, Any] | None) -> str:
    if found is None:
        return "scores: no probabilities of a match were fitted: too few pairs, or the checkpoint finds no more than chance would"
    counts = ", ".join(f"{100 * at['false_accept']:.3g} % at {least} ({100 * at['missed']:.0f} % of the right ones missed)" for least, at in found["at"].items())
    return f"scores: a wrong pair is accepted in {counts}; counted on {found['counted_on']} pairs that the fit did not see"


def _check_numbers(config: ExportConfig) -> None:
    for name, least in (("samples", 4), ("calibration", 1), ("golden", 1)):
        if getattr(config, name) < least:
            raise RecipeError(f"--{name} is {getattr(config, name)}, expected at least {least}")
    if any(not 1 <= size <= 128 for size in config.batches):
        raise RecipeError(f"--batches are {', '.join(map(str, config.batches))}, expected sizes from 1 to 128")


def _check_place(place: Path, force: bool) -> None:
    """Never replace a folder or file that is no bundle, and a bundle only where that was asked for."""
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        return
    if not (place / "manifest.json").is_file() and not (place.is_file() and is_zip(place)):
        raise BundleError(f"'{place.name}' exists and is not a bundle; give another place or remove it")
    if not force:
        raise BundleError(f"the bundle '{place.name}' exists; give another place, or --force to replace it when the new one is complete")


def _image_spec(config: PreprocessConfig) -> ImageSpec:
    return ImageSpec(image_size=config.image_size, mean=config.mean, std=config.std, interpolation=config.interpolation, crop_pct=config.crop_pct)


def _text_spec(config: ModelConfig) -> TextSpec:
    text = config.text
    return TextSpec(context_length=text.context_length, vocab_size=text.vocab_size, pad_id=text.pad_id, mask=text.mask, cleaning=text.cleaning)


def _provenance(pairs: Pairs, rows: np.ndarray, seed: int, **more: Any) -> dict[str, Any]:
    keys = "\n".join(pairs.keys[int(row)] for row in rows)
    return {"n": len(rows), "seed": seed, "keys_sha256": hashlib.sha256(keys.encode()).hexdigest(), **more}


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _nothing(work: Path, manifest: Manifest, model: Any, settings: dict[str, Any]) -> tuple[Artefact, ...]:
    """Of targets whose artefacts stand alone."""
    return ()


def _old(place: Path) -> Path:
    return place.parent / f".{place.name}.old"


@contextlib.contextmanager
def _whole_bundle(place: Path) -> Iterator[Path]:
    """A hidden folder beside `place` that takes its place, packed where that is a .zip, when the block ends well, and goes otherwise."""
    work = place.parent / f".{place.name}.partial"
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        _recover(place)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        yield work
        _move(pack(work) if place.suffix == ".zip" else work, place)
    except OSError as error:
        left = "the one that stands there is as it was" if place.exists() else "nothing was left behind"
        raise BundleError(f"the bundle '{place.name}' cannot be written ({error.strerror or error}); {left}; make room or choose another place, then run it again") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
        work.with_name(work.name + ".zip").unlink(missing_ok=True)


def _recover(place: Path) -> None:
    """Undo a move that was killed between its two renames."""
    old = _old(place)
    if old.exists() and not place.exists():
        os.replace(old, place)
    _remove(old)


def _move(work: Path, place: Path) -> None:
    """Put the finished bundle in its place; the old one exists whole until the new one stands."""
    old = _old(place)
    if place.exists():
        os.replace(place, old)
    os.replace(work, place)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def main(argv: list[str]) -> int:
    """`mclip export CHECKPOINT BUNDLE --pairs PAIRS`."""
    config = tyro.cli(ExportConfig, args=argv, prog="mclip export", description="Export a checkpoint to a proven bundle.")
    say, started = stamped_lines(), time.perf_counter()
    manifest = export_bundle(config, say)
    total = sum(facts.bytes for facts in manifest.files.values())
    broken = [a.id for a in manifest.artefacts if a.precision in FLOATS and a.status in ("refused", "failed")]
    say(f"bundle {config.bundle}: {sum(a.status == 'proven' for a in manifest.artefacts)} artefacts proven, {total / 1e6:.1f} MB")
    if config.json:
        sys.stdout.write(json.dumps({"bundle": str(config.bundle), "seconds": time.perf_counter() - started, **_summary(manifest)}) + "\n")
    if broken:
        sys.stderr.write(f"error: {', '.join(broken)}: not what the checkpoint computes, and not shipped; the bundle holds the others\n")
    return 1 if broken else 0


def _summary(manifest: Manifest) -> dict[str, Any]:
    return {"name": manifest.name, "artefacts": [dataclasses.asdict(artefact) for artefact in manifest.artefacts]}
