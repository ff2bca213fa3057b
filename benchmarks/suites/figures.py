"""What the demo reports: retrieval and zero-shot of every model on the same pictures, the tables, the headline.

    python -m benchmarks.suites.figures OUT teachers|students|sample

Groups are evaluated by processes of their own; each model's result is kept in OUT/evaluations/NAME.json with the hash of what it was
made from, so that a rerun evaluates only what changed.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from runtime.evaluation import Encoder, Gallery, embed_gallery, retrieval, zero_shot
from runtime.files import write_json
from runtime.metrics import paired_recall_test
from runtime.pairs import Pairs, open_pairs

SPLITS = ("held_out", "trained", "keycap", "clock", "flag", "all")

QUERIES: dict[str, str] = {
    "a red heart": "2764",
    "black heart": "1f5a4",
    "Mrs. Claus": "1f936",
    "loudly crying face": "1f62d",
    "eyes": "1f440",
    "person biking": "1f6b4",
    "person swimming": "1f3ca",
    "person walking": "1f6b6",
    "hatching chick": "1f423",
    "palm tree": "1f334",
    "chestnut": "1f330",
    "strawberry": "1f353",
    "wine glass": "1f377",
    "full moon": "1f315",
    "shinto shrine": "26e9",
    "baseball": "26be",
    "musical score": "1f3bc",
    "money with wings": "1f4b8",
    "jeans": "1f456",
    "woman's boot": "1f462",
}
"""Query -> concept that is right: the README's. A red heart, and nineteen labels of things whose picture comes first on the *validation* style for
the students and the bundles of two whole runs."""

UNCHOSEN_QUERIES: dict[str, str] = {
    "a red heart": "2764",
    "pizza": "1f355",
    "dog face": "1f436",
    "rocket": "1f680",
    "sunflower": "1f33b",
    "banana": "1f34c",
    "soccer ball": "26bd",
    "guitar": "1f3b8",
    "strawberry": "1f353",
    "fire": "1f525",
    "key": "1f511",
    "crab": "1f980",
    "Christmas tree": "1f384",
    "hot dog": "1f32d",
    "bicycle": "1f6b2",
    "rainbow": "1f308",
    "watermelon": "1f349",
    "penguin": "1f427",
    "grapes": "1f347",
    "light bulb": "1f4a1",
}
"""The same, written down before any model was asked anything. Two of them, banana and soccer ball, were held out of training."""


def evaluations(out: Path) -> dict[str, Callable[[], Encoder]]:
    """Every model of a run, by the name that the tables give it; opened when called."""
    import runtime
    from distill.ensemble import open_teacher
    from distill.evaluate import EnsembleEncoder, open_encoder

    def teacher(name: str) -> Encoder:
        return open_teacher(str(out / "teachers" / name))

    def coreml(bundle: str) -> Encoder:
        from benchmarks.suites.coreml import CoreMLEncoder

        return CoreMLEncoder(out / bundle)

    def mixed(bundle: str) -> dict[str, str]:
        proven = int8_towers(out, bundle)
        return {tower: "int8" if tower in proven else "fp32" for tower in ("image", "text")}

    known = {
        "teacher lite0": lambda: teacher("lite0"),
        "teacher lite1": lambda: teacher("lite1"),
        "teacher ensemble": lambda: EnsembleEncoder([teacher("lite0"), teacher("lite1")]),
        "student, reinforced": lambda: open_encoder(out / "ckpt/student"),
        "student, plain": lambda: open_encoder(out / "ckpt/plain"),
        "student, pruned 25 %": lambda: open_encoder(out / "ckpt/pruned"),
        "bundle fp32": lambda: runtime.load(out / "bundle", threads=1, prefer="fp32"),
        "bundle int8": lambda: runtime.load(out / "bundle", threads=1, prefer=mixed("bundle")),
        "bundle Core ML fp16": lambda: coreml("bundle"),
        "sample teacher fp32": lambda: runtime.load(out / "teacher-bundle", threads=1, prefer="fp32"),
        "sample teacher int8": lambda: runtime.load(out / "teacher-bundle", threads=1, prefer=mixed("teacher-bundle")),
    }
    # A bundle with no int8 worth shipping has no row: it would show fp32's figures under another name.
    return {name: make for name, make in known.items() if name not in INT8 or int8_towers(out, INT8[name])}


INT8 = {"bundle int8": "bundle", "sample teacher int8": "teacher-bundle"}


def int8_towers(out: Path, bundle: str) -> set[str]:
    """The towers whose int8 ONNX is proven; all of them while the bundle is not made."""
    path = out / bundle / "manifest.json"
    if not path.exists():
        return {"image", "text"}
    artefacts = json.loads(path.read_text(encoding="utf-8"))["artefacts"]
    return {a["tower"] for a in artefacts if a["target"] == "onnx" and a["precision"] == "int8" and a["status"] == "proven"}


GROUPS = {
    "baselines": ("baselines",),
    "teachers": ("teacher lite0", "teacher lite1", "teacher ensemble"),
    "students": ("student, reinforced", "student, pruned 25 %", "bundle fp32", "bundle int8", "bundle Core ML fp16"),
    "plain": ("student, plain",),
    "sample": ("sample teacher fp32", "sample teacher int8"),
}  # fmt: skip


def evaluate_group(out: Path, group: str) -> None:
    """Evaluate every model of a group on the test pictures and, where they are there, on the photographs."""
    test = open_pairs(out / "pairs/test")
    stamps = open_pairs(out / "stamps") if (out / "stamps").is_dir() and list((out / "stamps").glob("*.tar")) else None
    known = evaluations(out)
    galleries: dict[str, tuple[Gallery, Gallery | None]] = {}
    for name in GROUPS[group]:
        if name in INT8 and name not in known:
            evaluation_path(out, name).unlink(missing_ok=True)
            continue
        if name == "baselines":
            from benchmarks.suites.lookup import evaluate_baselines

            for baseline, result in evaluate_baselines(out).items():
                _write(out, baseline, {"test": result})
            continue
        path = evaluation_path(out, name)
        digest = _digest(out, name)
        if path.exists() and json.loads(path.read_text(encoding="utf-8")).get("digest") == digest:
            continue
        encoder = known[name]()
        # The ensemble's and the int8 text tower's pictures were embedded already by their parts.
        if name == "teacher ensemble" and {"teacher lite0", "teacher lite1"} <= galleries.keys():
            parts = [galleries[member] for member in ("teacher lite0", "teacher lite1")]
            galleries[name] = (_joined([part[0] for part in parts]), _joined([part[1] for part in parts if part[1]]) if stamps else None)
        elif name == "sample teacher int8" and "sample teacher fp32" in galleries and "int8" not in str(encoder.choice["image"].id):  # type: ignore[attr-defined]
            galleries[name] = galleries["sample teacher fp32"]
        else:
            galleries[name] = (embed_gallery(encoder, test), embed_gallery(encoder, stamps) if stamps else None)
        found, photos = galleries[name]
        result: dict[str, Any] = {"test": retrieval(encoder, test, gallery=found), "zero_shot": zero_shot(encoder, test, gallery=found)}
        if stamps is not None and photos is not None:
            result["stamps"] = retrieval(encoder, stamps, gallery=photos)
        _write(out, name, {"digest": digest, **result})


def _joined(galleries: list[Gallery]) -> Gallery:
    import dataclasses

    return dataclasses.replace(galleries[0], embeddings=np.concatenate([g.embeddings for g in galleries], axis=1) / len(galleries) ** 0.5)


def _digest(out: Path, name: str) -> str:
    """Of the receipts that decide a model's figures."""
    places = {"teacher": "teachers/lite0/receipt.json", "student, reinforced": "ckpt/student/receipt.json", "student, plain": "ckpt/plain/receipt.json",
              "student, pruned": "ckpt/pruned/receipt.json", "bundle": "bundle/manifest.json", "sample": "teacher-bundle/manifest.json"}  # fmt: skip
    receipt = next(place for start, place in places.items() if name.startswith(start))
    other = out / "teachers/lite1/receipt.json"
    return hashlib.sha256((out / receipt).read_bytes() + (out / "pairs/sample.json").read_bytes() + (other.read_bytes() if other.exists() else b"")).hexdigest()


def evaluation_path(out: Path, name: str) -> Path:
    return out / "evaluations" / f"{name.replace(' ', '-').replace(',', '').replace('%', 'percent')}.json"


def _write(out: Path, name: str, result: dict[str, Any]) -> None:
    path = evaluation_path(out, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"model": name, **result})


def load_evaluations(out: Path) -> dict[str, dict[str, Any]]:
    """Every evaluated model's result, in the order of the tables."""
    order = ["thumbnail lookup", "lite0 feature lookup", "thumbnail lookup, clean", "lite0 lookup, clean", *evaluations(out)]
    return {name: json.loads(evaluation_path(out, name).read_text(encoding="utf-8")) for name in order if evaluation_path(out, name).exists()}


def kind_of(name: str) -> str:
    if "lookup" in name:
        return "baseline"
    return {"teacher": "teacher", "student": "student"}.get(name.split()[0].rstrip(","), "artefact")


def costs(out: Path, name: str) -> dict[str, Any]:
    """Parity, milliseconds and megabytes of a bundle's artefacts, as its manifest recorded them; empty for anything else."""
    bundle = {"bundle": "bundle", "sample": "teacher-bundle"}.get(name.split()[0])
    if bundle is None:
        checkpoint = {"student, reinforced": "student", "student, plain": "plain", "student, pruned 25 %": "pruned"}.get(name)
        return {"megabytes": round((out / "ckpt" / checkpoint / "model.safetensors").stat().st_size / 1e6, 2)} if checkpoint else {}
    manifest = json.loads((out / bundle / "manifest.json").read_text(encoding="utf-8"))
    target, precision = ("coreml", "fp16") if "Core ML" in name else ("onnx", name.split()[-1])
    chosen = {}
    for tower in ("image", "text"):
        found = [a for a in manifest["artefacts"] if a["tower"] == tower and a["target"] == target and a["status"] == "proven" and a["batch"] == "dynamic"]
        found = found or [a for a in manifest["artefacts"] if a["tower"] == tower and a["target"] == target and a["status"] == "proven"]
        best = [a for a in found if a["precision"] == precision] or [a for a in found if a["precision"] == "fp32"]
        if best:
            chosen[tower] = best[0]
    return {
        "parity_cosine_min": min((a["parity"]["cosine_min"] for a in chosen.values()), default=None),
        **{f"{tower}_ms": (a["latency"] or {}).get("p50_ms") for tower, a in chosen.items()},
        "megabytes": round(sum(a["bytes"] for a in chosen.values()) / 1e6, 2),
    }


def tables(place: Any, seconds: dict[str, float]) -> tuple[dict[str, Any], dict[str, Any]]:
    """tables.json for the report, and the flat summary: everything read from what the stages wrote."""
    out: Path = place.out
    found = load_evaluations(out)
    rows, zero = [], []
    for name, result in found.items():
        cost = costs(out, name)
        for direction in ("text_to_image", "image_to_text"):
            for split, row in result["test"].get(direction, {}).items():
                rows.append({"model": name, "kind": kind_of(name), "split": split, "direction": direction, "gallery": result["test"]["gallery"]["count"], **row, **cost})
            if "stamps" in result:
                row = result["stamps"][direction]["all"]
                rows.append({"model": name, "kind": kind_of(name), "split": "stamps", "direction": direction, "gallery": result["stamps"]["gallery"]["count"], **row, **cost})
        if "zero_shot" in result:
            zero.append({"model": name, "kind": kind_of(name), "n": result["zero_shot"]["n"], "accuracy": result["zero_shot"]["accuracy"]})
    examples = search_examples(out)
    summary = headline(out, found, examples)
    tables = {
        "title": "From pictures to a proven bundle", "created": _now(), "rows": rows, "zero_shot": zero, "timings": seconds, "headline": summary, "examples": examples["shown"],
    }  # fmt: skip
    return tables, summary


def headline(out: Path, found: dict[str, dict[str, Any]], examples: dict[str, Any]) -> dict[str, Any]:
    """The figures that the README quotes, names with units."""

    def recall(name: str, split: str, k: int = 5) -> dict[str, float]:
        return found[name]["test"]["text_to_image"][split][f"recall@{k}"]

    summary: dict[str, Any] = {}
    for key, name in (
        ("student", "student, reinforced"), ("plain", "student, plain"), ("ensemble", "teacher ensemble"), ("pruned", "student, pruned 25 %"),
        ("bundle_fp32", "bundle fp32"), ("bundle_int8", "bundle int8"), ("coreml", "bundle Core ML fp16"),
        ("thumbnail_lookup", "thumbnail lookup"), ("feature_lookup", "lite0 feature lookup"),
        ("thumbnail_lookup_clean", "thumbnail lookup, clean"), ("feature_lookup_clean", "lite0 lookup, clean"),
        ("sample_teacher_fp32", "sample teacher fp32"), ("sample_teacher_int8", "sample teacher int8"),
    ):  # fmt: skip
        if name in found:
            for split in ("trained", "held_out"):
                if split in found[name]["test"]["text_to_image"]:
                    value = recall(name, split)
                    summary[f"recall5_{key}_{split}"] = round(value["value"], 4)
                    summary[f"recall5_{key}_{split}_low"], summary[f"recall5_{key}_{split}_high"] = round(value["low"], 4), round(value["high"], 4)
    for split in ("trained", "held_out"):
        pair = [np.array(found[name]["test"]["ranks"]["text_to_image"][split]) for name in ("student, reinforced", "student, plain")]
        test = paired_recall_test(pair[0], pair[1], 5)
        summary[f"recall5_student_minus_plain_{split}"] = round(float(test[0]), 4)
        summary[f"recall5_student_minus_plain_{split}_p"] = float(test[2])
    for bundle, key in (("bundle", "bundle"), ("teacher-bundle", "sample_teacher")):
        manifest = json.loads((out / bundle / "manifest.json").read_text(encoding="utf-8"))
        for artefact in manifest["artefacts"]:
            if artefact["parity"]:
                summary[f"{key}_{artefact['id']}_cosine_min"] = round(artefact["parity"]["cosine_min"], 7)
        summary.update(text_int8(manifest, key))
    full, quantised = (summary.get(f"recall5_sample_teacher_{p}_trained") for p in ("fp32", "int8"))
    if full and quantised:
        summary["sample_teacher_int8_recall5_kept"] = round(quantised / full, 4)
    summary.update(first_embedding(out))
    summary["gallery_pictures"] = found["student, reinforced"]["test"]["gallery"]["count"]
    summary["gallery_sha256"] = found["student, reinforced"]["test"]["gallery"]["sha256"]
    summary["search_hits_of_20"], summary["search_hits_of_20_unchosen"] = examples["hits"], examples["unchosen_hits"]
    return summary


def first_embedding(out: Path) -> dict[str, float]:
    """Seconds of a fresh process from its start to its first embedding, median of the starts that `mclip bench` measured."""
    from benchmarks.results import read_results

    phases = {"cold_start_image": "cold_start_image_seconds", "cold_start_text": "cold_start_text_seconds"}
    found = [line for line in read_results([out / "results.jsonl"]) if line["kind"] == "cold_start"]
    return {phases.get(line["phase"], f"{line['phase']}_seconds"): round(float(np.median(line["samples"])) / 1e9, 3) for line in found}


def text_int8(manifest: dict[str, Any], key: str) -> dict[str, Any]:
    """Size and time of the text tower's int8 against its fp32, as the exporter measured them side by side."""
    towers = {a["precision"]: a for a in manifest["artefacts"] if a["tower"] == "text" and a["target"] == "onnx" and a["batch"] == "dynamic" and a["path"]}
    if not {"fp32", "int8"} <= towers.keys():
        return {}
    ratio = (towers["int8"]["latency"] or {}).get("ratio_to_fp32", {})
    return {
        f"{key}_text_int8_size_ratio": round(towers["int8"]["bytes"] / towers["fp32"]["bytes"], 3),
        **{f"{key}_text_int8_latency_ratio_{name}": round(ratio[name], 3) for name in ("median", "low", "high") if name in ratio},
    }


def search_examples(out: Path) -> dict[str, Any]:
    """The README's queries through the bundle as an app would load it: top five pictures each, and how many queries found theirs."""
    import runtime

    pairs: Pairs = open_pairs(out / "pairs/test")
    clip = runtime.load(out / "bundle", threads=1)
    gallery = embed_gallery(clip, pairs)
    concepts = [str(facts.get("concept")) for facts in gallery.meta]
    shown = [_answer(query, concept, row, gallery, concepts) for (query, concept), row in _scored(clip, QUERIES, gallery)]
    unchosen = [_answer(query, concept, row, gallery, concepts) for (query, concept), row in _scored(clip, UNCHOSEN_QUERIES, gallery)]
    hits, unchosen_hits = (sum(any(result["right"] for result in answer["results"]) for answer in answers) for answers in (shown, unchosen))
    return {"shown": shown, "hits": hits, "unchosen_hits": unchosen_hits}


def _scored(clip: Any, queries: dict[str, str], gallery: Gallery) -> list[tuple[tuple[str, str], np.ndarray]]:
    return list(zip(queries.items(), clip.encode_text(list(queries)) @ gallery.embeddings.T, strict=True))


def _answer(query: str, concept: str, scores: np.ndarray, gallery: Gallery, concepts: list[str]) -> dict[str, Any]:
    """The first five pictures for one query, each right or wrong."""
    target = next((n for n, found in enumerate(concepts) if found == concept), None)
    results = [{"key": gallery.keys[n], "score": round(float(scores[n]), 4), "right": concepts[n] == concept} for n in np.argsort(-scores, kind="stable")[:5]]
    return {
        "query": query,
        "split": "held_out" if target is not None and gallery.meta[target].get("held_out") else "trained",
        "target_key": None if target is None else gallery.keys[target],
        "results": results,
    }


def as_text(tables: dict[str, Any]) -> str:
    """The closing table of the demo."""
    chosen = [row for row in tables["rows"] if row["direction"] == "text_to_image" and row["split"] in ("held_out", "trained")]
    by_model: dict[str, dict[str, Any]] = {}
    for row in chosen:
        by_model.setdefault(row["model"], {})[row["split"]] = row
    lines = [
        f"text to image, recall@5 [95 % interval], gallery of {chosen[0]['gallery']} pictures in a drawing style that nobody trained on",
        f"{'':22}  {'held-out concepts':22}  {'trained concepts':22}  {'min cosine':>10}  {'image ms':>8}  {'text ms':>8}  {'MB':>7}",
    ]
    for model, splits in by_model.items():
        any_row = next(iter(splits.values()))
        cells = []
        for split in ("held_out", "trained"):
            row = splits.get(split)
            cells.append(f"{row['recall@5']['value']:.3f} [{row['recall@5']['low']:.3f}, {row['recall@5']['high']:.3f}]" if row else "-")

        def number(key: str, form: str, row: dict[str, Any] = any_row) -> str:
            return format(row[key], form) if isinstance(row.get(key), (int, float)) else "-"

        lines.append(
            f"{model:22}  {cells[0]:22}  {cells[1]:22}  {number('parity_cosine_min', '.6f'):>10}  {number('image_ms', '.2f'):>8}  "
            f"{number('text_ms', '.2f'):>8}  {number('megabytes', '.2f'):>7}"
        )
    return "\n".join(lines)


def _now() -> str:
    from datetime import UTC, datetime

    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def main(argv: list[str]) -> int:
    """`python -m benchmarks.suites.figures OUT GROUP`."""
    import torch

    torch.set_num_threads(1)
    evaluate_group(Path(argv[0]), argv[1])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
