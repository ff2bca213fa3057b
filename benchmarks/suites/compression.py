"""Compression, side by side: what `mclip compress` found for the sample's teacher, and what one call of a quantiser would have given.

    python -m benchmarks.suites.compression --run out/demo --out out/bench-compress        (make bench-compress)

The teacher is compressed and exported by the commands that a user would call; what is timed and asked are the exported files. Queries are the labels of all
concepts in four phrasings, asked in both galleries that the teacher was not trained on (validation style, test style); calibration has seen 64 pictures of the
validation style. Times are medians of paired ratios over rounds in turns, on 1 and on 2 threads, against float32 under ONNX Runtime on as many.
"""

from __future__ import annotations

import functools
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import tyro

from benchmarks.suites.demo import Layout
from benchmarks.suites.stages import StageError, Stages
from distill.evaluate import open_encoder
from export.front import one_call_dynamic, one_call_static
from export.int8_recipe import Int8Recipe, make_int8
from export.latency_gate import interleaved, processor, ratio
from export.quantize import quantize_four_bit
from export.search import SETTLE
from export.to_onnx import OnnxEncoder, export_onnx, serialize
from export.to_openvino import OpenVinoEncoder, import_openvino, nothing_said, save
from export.towers import TOWERS, Tower, encoder_of
from export.verify import centred_cosines
from mobileclip.checkpoint import load_checkpoint, open_tokenizer, preprocess_config, save_checkpoint
from mobileclip.folding import reparameterize
from mobileclip.model import ImageTextModel
from mobileclip.presets import preset
from runtime.evaluation import TEMPLATES, retrieval
from runtime.files import write_json
from runtime.manifest import read_manifest
from runtime.metrics import paired_recall_test
from runtime.pairs import Pairs, open_pairs
from runtime.preprocess import preprocess

THREADS = (1, 2)
DRAWS = 2000
PARTS = ("teacher", "four_bit", "shape", "student")
TEACHER = "lite0-224"
SHAPE = "mobileclip2_s0"
CALIBRATION = 64

Run = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressionConfig:
    run: str = "out/demo"
    """A finished demo run."""
    out: str = "out/bench-compress"
    max_recall_loss: float = 0.5
    """Points of recall@1 that the search may lose."""
    prune_latency: float = 0.5
    """Share of its time that the demo's student is pruned to."""
    samples: int = 400_000
    """Of its recovery, and of the training of the same form from random weights."""
    four_bit_steps: int = 150
    parts: tuple[str, ...] = PARTS
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """One form of one tower: how to open it on some threads, and its bytes."""

    runtime: str
    open: Callable[[int], Run]
    bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """What is asked: pictures of all galleries, and texts with the places of the pictures that answer them."""

    pixels: np.ndarray
    tokens: np.ndarray
    galleries: list[slice]
    texts: list[str]
    right: list[list[np.ndarray]]
    """By gallery and text: places inside the gallery; empty where the gallery has none."""
    concepts: list[str]
    """Of the texts."""


def run_compression(config: CompressionConfig) -> dict[str, Any]:
    """Run what is not done. Returns the figures (also in OUT/summary.json).

    Raises:
        StageError: there is no finished demo run, or a stage failed.
    """
    place, out = Layout(Path(config.run)), Path(config.out)
    teacher = place.teacher(TEACHER)
    if not (teacher / "receipt.json").is_file():
        raise StageError(f"'{config.run}' has no sample teacher; run mclip demo --out {config.run} first")
    out.mkdir(parents=True, exist_ok=True)
    stages = Stages(out, _say)
    figures: dict[str, Any] = {"processor": processor()}
    for part in config.parts:
        figures |= RUNS[part](config, place, out, stages)
    write_json(out / "summary.json", figures)
    return figures


def _teacher(config: CompressionConfig, place: Layout, out: Path, stages: Stages) -> dict[str, Any]:
    """Search and export by command, then the comparison of what was exported."""
    teacher, small, bundle = place.teacher(TEACHER), out / "teacher", out / "teacher-bundle"
    stages.run(
        "search",
        [["mobileclip.cli", "compress", str(teacher), str(small), "--max-recall-loss", str(config.max_recall_loss), "--calibrate", str(place.validation),
          "--seed", str(config.seed), "--front"]],
        inputs=[teacher / "receipt.json"], outputs=[small / "receipt.json", small / "front.json"],
    )  # fmt: skip
    stages.run(
        "export",
        [["mobileclip.cli", "export", str(small), str(bundle), "--target", "onnx,openvino", "--precision", "fp32,fp16,int8", "--calibrate", str(place.validation), "--force"]],
        inputs=[small / "receipt.json"], outputs=[bundle / "manifest.json"],
    )
    return {"search_minutes": round(stages.seconds()["search"] / 60, 2)} | _compared(place, teacher, bundle, out)


def _compared(place: Layout, teacher: Path, bundle: Path, out: Path) -> dict[str, Any]:
    """The arms on the sample's teacher: sizes, times, and the loss over all queries."""
    model = load_checkpoint(teacher, verify=False)
    world = read_world([open_pairs(folder) for folder in (place.validation, place.test)], model, teacher)
    calibration = world.pixels[world.galleries[0]][:CALIBRATION], world.tokens[:CALIBRATION]
    forms = {tower: _forms(tower, bundle, rows, out / "one-call") for tower, rows in zip(TOWERS, calibration, strict=True)}
    arms = {
        "float32, ONNX Runtime": ("float32", "float32"), "mclip compress": ("ours", "ours"), "bfloat16, OpenVINO": ("bfloat16", "bfloat16"),
        "one call: static image, dynamic text": ("static", "dynamic"), "one call: dynamic both": ("dynamic", "dynamic"), "one call: nncf both": ("nncf", "nncf"),
    }  # fmt: skip
    arms = {name: pair for name, pair in arms.items() if all(form in forms[tower] for form, tower in zip(pair, TOWERS, strict=True))}
    rows = {"image": world.pixels, "text": world.tokens}
    embedded: dict[Tower, dict[str, np.ndarray]] = {tower: {} for tower in TOWERS}
    ratios: dict[Tower, dict[int, dict[str, Any]]] = {tower: {} for tower in TOWERS}
    for tower in TOWERS:
        for threads in THREADS:
            opened = {name: form.open(threads) for name, form in forms[tower].items()}
            runs = {name: functools.partial(run, rows[tower][:1]) for name, run in opened.items()}
            times = interleaved(runs, settle=SETTLE, pairs=60, budget_seconds=120)
            ratios[tower][threads] = {name: ratio(times[name], times["float32"]).as_dict() | {"milliseconds": float(np.median(times[name]) * 1e3)} for name in opened}
            if threads == max(THREADS):
                for name, run in opened.items():
                    embedded[tower][name] = run(rows[tower])
                    _say(f"{tower}: {name} embedded {len(rows[tower]):,} rows")
    base = hits(world, embedded["image"]["float32"], embedded["text"]["float32"])
    figures: dict[str, Any] = {"queries": int(len(base)), "recall1_float32": round(float(base.mean()), 4), "arms": []}
    for name, (image, text) in arms.items():
        lost = base - hits(world, embedded["image"][image], embedded["text"][text])
        low, high = clustered_interval(lost, query_concepts(world))
        size = (forms["image"][image].bytes + forms["text"][text].bytes) / (forms["image"]["float32"].bytes + forms["text"]["float32"].bytes)
        row: dict[str, Any] = {"arm": name, "runtimes": [forms["image"][image].runtime, forms["text"][text].runtime], "bytes_ratio": round(size, 4)}
        row |= {"recall1_loss_points": round(100 * float(lost.mean()), 3), "recall1_loss_low": round(100 * low, 3), "recall1_loss_high": round(100 * high, 3)}
        row["overlap10"] = round(overlap(world, embedded["image"], embedded["text"], image, text), 4)
        for tower, form in (("image", image), ("text", text)):
            row[f"{tower}_centred_p1"] = round(float(np.percentile(centred_cosines(embedded[tower][form], embedded[tower]["float32"]), 1)), 4)
            row |= {f"{tower}_latency_{threads}": ratios[tower][threads][form] for threads in THREADS}
        figures["arms"].append(row)
    ours = next(row for row in figures["arms"] if row["arm"] == "mclip compress")
    for tower in TOWERS:
        figures[f"{tower}_latency_ratio"] = round(ours[f"{tower}_latency_1"]["median"], 4)
        figures[f"{tower}_latency_ratio_2_threads"] = round(ours[f"{tower}_latency_2"]["median"], 4)
    return figures | {name: ours[name] for name in ("bytes_ratio", "recall1_loss_points", "recall1_loss_low", "recall1_loss_high", "overlap10")}


def read_world(folders: list[Pairs], model: ImageTextModel, checkpoint: Path) -> World:
    """Every picture of the folders, and every label in every phrasing."""
    config = preprocess_config(model.config)
    tokenizer = open_tokenizer(checkpoint, model.config)
    pixels, galleries, concepts = [], [], []
    labels: dict[str, str] = {}
    for pairs in folders:
        start = len(pixels)
        found = []
        for row in range(len(pairs)):
            facts = pairs.meta(row)
            pixels.append(preprocess([pairs.image(row)], config)[0])
            found.append(str(facts["concept"]))
            labels[str(facts["concept"])] = str(facts["label"])
        galleries.append(slice(start, len(pixels)))
        concepts.append(np.array(found))
    asked = [(concept, template.format(label)) for concept, label in sorted(labels.items()) for template in TEMPLATES]
    right = [[np.flatnonzero(found == concept) for concept, _ in asked] for found in concepts]
    texts = [text for _, text in asked]
    return World(pixels=np.stack(pixels), tokens=tokenizer(texts), galleries=galleries, texts=texts, right=right, concepts=[concept for concept, _ in asked])


def hits(world: World, image: np.ndarray, text: np.ndarray) -> np.ndarray:
    """(Q,) float: is the first picture a right one, for every gallery and every text that has an answer there."""
    found = []
    for gallery, right in zip(world.galleries, world.right, strict=True):
        first = (text @ image[gallery].T).argmax(axis=1)
        found += [float(first[n] in places) for n, places in enumerate(right) if len(places)]
    return np.array(found)


def query_concepts(world: World) -> np.ndarray:
    """(Q,) the concept of each query, in the order of `hits`."""
    return np.array([world.concepts[n] for right in world.right for n, places in enumerate(right) if len(places)])


def clustered_interval(values: np.ndarray, clusters: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean when whole clusters are drawn: the queries of one concept go right and wrong together."""
    names, index = np.unique(clusters, return_inverse=True)
    sums, counts = np.bincount(index, weights=values), np.bincount(index)
    picked = np.random.default_rng(0).integers(0, len(names), (DRAWS, len(names)))
    means = sums[picked].sum(axis=1) / counts[picked].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def overlap(world: World, images: dict[str, np.ndarray], texts: dict[str, np.ndarray], image: str, text: str, top: int = 10) -> float:
    """Share of the ten first pictures of a query under float32 that stay among its ten first, over all galleries and texts."""
    shares = []
    for gallery in world.galleries:
        before, after = (
            np.argpartition(-(texts[one] @ images[other][gallery].T), top, axis=1)[:, :top] for one, other in (("float32", "float32"), (text, image))
        )
        shares += [len(set(a) & set(b)) / top for a, b in zip(before.tolist(), after.tolist(), strict=True)]
    return float(np.mean(shares))


def _forms(tower: Tower, bundle: Path, rows: np.ndarray, folder: Path) -> dict[str, Form]:
    """Float32, what was exported as int8, bfloat16, and what one call of each quantiser gives."""
    folder.mkdir(exist_ok=True)
    artefacts = {artefact.id: artefact for artefact in read_manifest(bundle).artefacts if artefact.tower == tower and artefact.path and artefact.status == "proven"}
    by = {(artefact.target, artefact.precision, artefact.batch): bundle / str(artefact.path) for artefact in artefacts.values()}
    base = by["onnx", "fp32", "dynamic"]
    forms = {"float32": _onnx(base)}
    choices = [_onnx(path) for (target, precision, batch), path in by.items() if (target, precision, batch) == ("onnx", "int8", "dynamic")]
    for (target, precision, _), path in by.items():
        if target == "openvino" and precision == "int8":
            choices += [_openvino(path, "f32"), _openvino(path, "bf16")]
        elif target == "openvino" and precision == "fp32":
            forms["bfloat16"] = _openvino(path, "bf16")
    if not choices:
        raise StageError(f"no int8 form of the {tower} tower was proven; {bundle.name}/manifest.json says why")
    runs = {str(n): functools.partial(choice.open(1), rows[:1]) for n, choice in enumerate(choices)}
    times = interleaved(runs, settle=SETTLE)
    forms["ours"] = choices[int(min(times, key=lambda name: float(np.median(times[name]))))]
    model = onnx.load(base)
    for name, make in (("dynamic", one_call_dynamic), ("static", one_call_static)):
        data = make(model, rows)
        if data is not None:
            path = folder / f"{tower}.{name}.onnx"
            path.write_bytes(data)
            forms[name] = _onnx(path)
    forms["nncf"] = _openvino(_nncf(model, rows, folder / f"{tower}.nncf"), "f32")
    return forms


def _onnx(path: Path) -> Form:
    return Form(runtime="onnx", open=lambda threads: OnnxEncoder(path, threads=threads), bytes=path.stat().st_size)


def _openvino(folder: Path, precision: str) -> Form:
    size = sum(path.stat().st_size for path in folder.iterdir())
    return Form(runtime="openvino" if precision == "f32" else "openvino bf16", open=lambda threads: OpenVinoEncoder(folder, threads=threads, precision=precision), bytes=size)


def _nncf(model: onnx.ModelProto, rows: np.ndarray, folder: Path) -> Path:
    import io

    ov, nncf = import_openvino("the comparison"), import_openvino("the comparison", quantiser=True)
    with nothing_said():
        made = nncf.quantize(ov.convert_model(io.BytesIO(serialize(model))), nncf.Dataset([row[None] for row in rows]), subset_size=len(rows))
    return Path(save(made, folder))


def _four_bit(config: CompressionConfig, place: Layout, out: Path, stages: Stages) -> dict[str, Any]:
    """The teacher's text weights in four bits: rounded alone, and trained onto the grid on the store's captions; asked as the other arms are."""
    teacher = place.teacher(TEACHER)
    folders = {"rounded": (out / "four-bit-rounded", 0), "trained": (out / "four-bit", config.four_bit_steps)}
    for name, (folder, steps) in folders.items():
        stages.run(
            f"four-bit-{name}",
            [["mobileclip.cli", "compress", str(teacher), str(folder), "--calibrate", str(place.validation), "--store", str(place.store), "--four-bit-steps", str(steps),
              "--seed", str(config.seed)]],
            inputs=[teacher / "receipt.json"], outputs=[folder / "receipt.json"],
        )  # fmt: skip
    model = load_checkpoint(teacher, verify=False)
    world = read_world([open_pairs(folder) for folder in (place.validation, place.test)], model, teacher)
    image = OnnxEncoder(serialize(export_onnx(encoder_of(reparameterize(model)[0], "image"), world.pixels[:2])), threads=2)(world.pixels)
    base = serialize(export_onnx(encoder_of(model, "text"), world.tokens[:2]))
    exact = OnnxEncoder(base, threads=2)(world.tokens)
    before = hits(world, image, exact)
    figures: dict[str, Any] = {}
    for name, (folder, _) in folders.items():
        data = serialize(quantize_four_bit(export_onnx(encoder_of(load_checkpoint(folder), "text"), world.tokens[:2])))
        found = OnnxEncoder(data, threads=2)(world.tokens)
        lost = before - hits(world, image, found)
        low, high = clustered_interval(lost, query_concepts(world))
        figures |= {
            f"four_bit_{name}_loss_points": round(100 * float(lost.mean()), 3), f"four_bit_{name}_loss_low": round(100 * low, 3),
            f"four_bit_{name}_loss_high": round(100 * high, 3), f"four_bit_{name}_centred_p1": round(float(np.percentile(centred_cosines(found, exact), 1)), 4),
            "four_bit_bytes_ratio": round(len(data) / len(base), 4),
        }  # fmt: skip
    return figures


def _student(config: CompressionConfig, place: Layout, out: Path, stages: Stages) -> dict[str, Any]:
    """The demo's student at half of its time, recovered from its store, beside the same form trained from random weights on as many samples."""
    narrow, scratch = out / "student", out / "scratch"
    common = ["--store", str(place.store), "--seed", str(config.seed)]
    stages.run(
        "prune",
        [["mobileclip.cli", "compress", str(place.student), str(narrow), "--calibrate", str(place.train), "--prune-latency", str(config.prune_latency),
          "--recover-samples", str(config.samples), *common]],
        inputs=[place.student / "receipt.json"], outputs=[narrow / "receipt.json"],
    )  # fmt: skip
    torch.manual_seed(config.seed)
    save_checkpoint(ImageTextModel(load_checkpoint(narrow).config), out / "random", tokenizer=narrow / "tokenizer.json")
    stages.run(
        "scratch",
        [["mobileclip.cli", "train", "--pairs", str(place.train), "--init", str(out / "random"), "--samples", str(config.samples), "--recipe", "reinforced", "--out",
          str(scratch), *common]],
        inputs=[narrow / "receipt.json"], outputs=[scratch / "receipt.json"],
    )  # fmt: skip
    pairs = open_pairs(place.test)
    found = {name: retrieval(open_encoder(str(folder)), pairs) for name, folder in (("source", place.student), ("pruned", narrow), ("scratch", scratch))}
    ranks = {name: np.array(result["ranks"]["text_to_image"]["all"]) for name, result in found.items()}
    against = paired_recall_test(ranks["pruned"], ranks["scratch"], 5)
    recalls = {name: {split: result["text_to_image"][split]["recall@5"]["value"] for split in ("all", "trained", "held_out")} for name, result in found.items()}
    report = json.loads((narrow / "receipt.json").read_text(encoding="utf-8"))["compress"]["prune"]
    return {
        "pruned_recall5_kept": round(recalls["pruned"]["all"] / recalls["source"]["all"], 4),
        "pruned_recall5_kept_trained": round(recalls["pruned"]["trained"] / recalls["source"]["trained"], 4),
        "pruned_recall5": recalls, "pruned_time_share": round(report["time_share"], 4), "pruned_image": report["image"], "pruned_text": report["text"],
        "pruned_parameters": [report["parameters_before"], report["parameters_after"]], "pruned_samples": config.samples,
        "pruned_over_scratch": [round(against.difference, 4), *(round(value, 4) for value in against.interval)],
    }  # fmt: skip


def _shape(config: CompressionConfig, place: Layout, out: Path, stages: Stages) -> dict[str, Any]:
    """Times of towers shaped like MobileCLIP2-S0 at random weights, every layer in int8; what they compute is not looked at."""
    model = reparameterize(ImageTextModel(preset(SHAPE)).eval())[0]
    rng = np.random.default_rng(0)
    size, length = model.config.image.image_size, model.config.text.context_length
    inputs: dict[Tower, np.ndarray] = {
        "image": rng.normal(size=(4, 3, size, size)).astype(np.float32), "text": rng.integers(1, model.config.text.vocab_size - 2, size=(4, length)).astype(np.int32),
    }  # fmt: skip
    recipes = {"image": Int8Recipe(form="static", ranges="minmax"), "text": Int8Recipe(form="dynamic", alpha=0.5)}
    figures: dict[str, Any] = {"shape": SHAPE}
    for tower in TOWERS:
        graph = export_onnx(encoder_of(model, tower), inputs[tower])
        data = serialize(make_int8(graph, inputs[tower], recipes[tower]))
        base = serialize(graph)
        figures[f"shape_{tower}_bytes_ratio"] = round(len(data) / len(base), 4)
        with tempfile.TemporaryDirectory() as folder:
            saved = save(import_openvino("timing").convert_model(_file(data)), Path(folder) / "int8") if tower == "image" else None
            for threads in THREADS:
                opened: dict[str, Run] = {"float32": OnnxEncoder(base, threads=threads), "onnx": OnnxEncoder(data, threads=threads)}
                if saved is not None:
                    opened |= {f"openvino {hint}": OpenVinoEncoder(saved, threads=threads, precision=hint) for hint in ("f32", "bf16")}
                times = interleaved({name: functools.partial(run, inputs[tower][:1]) for name, run in opened.items()}, settle=SETTLE, budget_seconds=60)
                found = {name: round(ratio(times[name], times["float32"]).median, 4) for name in opened if name != "float32"}
                figures[f"shape_{tower}_latency_{threads}"] = found
    return figures


def _file(data: bytes) -> Any:
    import io

    return io.BytesIO(data)


RUNS: dict[str, Callable[[CompressionConfig, Layout, Path, Stages], dict[str, Any]]] = {"teacher": _teacher, "four_bit": _four_bit, "shape": _shape, "student": _student}


def as_text(figures: dict[str, Any]) -> str:
    """The tables for a terminal."""
    lines = [*_teacher_lines(figures)] if "arms" in figures else []
    if "four_bit_bytes_ratio" in figures:
        cells = [
            f"{name} {-figures[f'four_bit_{name}_loss_points']:+.2f} [{-figures[f'four_bit_{name}_loss_high']:+.2f}, {-figures[f'four_bit_{name}_loss_low']:+.2f}] "
            f"(centred p1 {figures[f'four_bit_{name}_centred_p1']:.4f})" for name in ("rounded", "trained")
        ]  # fmt: skip
        lines.append(f"\ntext weights in four bits, {figures['four_bit_bytes_ratio']:.3f} of the bytes; points of recall@1: {', '.join(cells)}")
    if "shape" in figures:
        lines += _shape_lines(figures)
    if "pruned_recall5" in figures:
        before, after = figures["pruned_parameters"]
        lines.append(f"\nthe demo's student at {figures['pruned_time_share']:.2f} of its time (image: {figures['pruned_image']}; text: {figures['pruned_text']}), "
                     f"{before:,} to {after:,} parameters, {figures['pruned_samples']:,} samples")  # fmt: skip
        for name, recalls in figures["pruned_recall5"].items():
            lines.append(f"  {name:8} recall@5, unseen style: all {recalls['all']:.4f}, trained concepts {recalls['trained']:.4f}, held-out {recalls['held_out']:.4f}")
        low, high = figures["pruned_over_scratch"][1:]
        lines.append(f"  kept {figures['pruned_recall5_kept']:.1%}; pruned over scratch {figures['pruned_over_scratch'][0]:+.4f} [{low:+.4f}, {high:+.4f}]")
    return "\n".join(lines)


def _teacher_lines(figures: dict[str, Any]) -> list[str]:
    lines = [
        f"{figures['queries']:,} queries, recall@1 of float32 {figures['recall1_float32']:.3f}; the search took {figures['search_minutes']} minutes",
        f"{'':38} {'image 1t':>9} {'2t':>5} {'text 1t':>8} {'2t':>5} {'bytes':>6} {'recall@1, points':>24} {'top 10':>7} {'p1 image':>9} {'text':>7}",
    ]
    for row in figures["arms"]:
        change = f"{-row['recall1_loss_points']:+.2f} [{-row['recall1_loss_high']:+.2f}, {-row['recall1_loss_low']:+.2f}]"
        lines.append(
            f"{row['arm']:38} {row['image_latency_1']['median']:>9.2f} {row['image_latency_2']['median']:>5.2f} {row['text_latency_1']['median']:>8.2f} "
            f"{row['text_latency_2']['median']:>5.2f} {row['bytes_ratio']:>6.2f} {change:>24} {row['overlap10']:>7.3f} {row['image_centred_p1']:>9.4f} "
            f"{row['text_centred_p1']:>7.4f}"
        )
    return lines


def _shape_lines(figures: dict[str, Any]) -> list[str]:
    lines = [f"\n{figures['shape']}-shaped towers, time beside float32 under ONNX Runtime:"]
    for tower in TOWERS:
        for threads in THREADS:
            found = ", ".join(f"{name} {value:.2f}" for name, value in figures[f"shape_{tower}_latency_{threads}"].items())
            lines.append(f"  {tower}, {threads} thread{'s' if threads > 1 else ''}: {found}; bytes {figures[f'shape_{tower}_bytes_ratio']:.2f}")
    return lines


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> int:
    config = tyro.cli(CompressionConfig, prog="python -m benchmarks.suites.compression", description=__doc__)
    figures = run_compression(config)
    _say(as_text(figures))
    keys = ("image_latency_ratio", "text_latency_ratio", "bytes_ratio", "recall1_loss_points", "recall1_loss_high", "pruned_recall5_kept")
    _say(json.dumps({name: figures[name] for name in keys if name in figures}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
