"""Golden inputs: pictures and texts whose pixels, tokens and embeddings travel with the bundle, rerun on this machine.

A driver, a library version or a processor that quietly computes something else shows here, before an application does.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.backends import missing
from runtime.bundle_files import read_file, verify_artefact
from runtime.encoder import open_artefact, run_tower
from runtime.errors import BundleError, ClipError
from runtime.manifest import Artefact, Manifest, read_manifest
from runtime.preprocess import preprocess
from runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from PIL import Image

PIXEL_TOLERANCE = 1e-6
LOGIT_TOLERANCE = 1e-3  # of the largest logit
VECTORS = "golden/golden.safetensors"
INDEX = "golden/golden.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Golden:
    """The golden inputs and what the checkpoint (fp32) makes of them.

    Attributes:
        images: encoded pictures (PNG bytes), N of them.
        texts: N texts; text n belongs to picture n.
        pixels: float32 (N, 3, H, W). tokens: int32 (N, T).
        image_embedding, text_embedding: float32 (N, D), unit norm.
        logits: float32 (N, N), picture by text: the score before the softmax or sigmoid. None in bundles of before it was stored.
        hard_texts: texts that readers of their own tend to get wrong; hard_tokens: int32 (M, T). Empty in bundles of before they were stored.
    """

    images: list[bytes]
    texts: list[str]
    pixels: np.ndarray
    tokens: np.ndarray
    image_embedding: np.ndarray
    text_embedding: np.ndarray
    hard_texts: list[str]
    hard_tokens: np.ndarray
    logits: np.ndarray | None = None


def write_golden(
    folder: str | os.PathLike[str],
    *,
    images: Sequence[Image.Image],
    texts: Sequence[str],
    pixels: np.ndarray,
    tokens: np.ndarray,
    image_embedding: np.ndarray,
    text_embedding: np.ndarray,
    logits: np.ndarray | None = None,
    hard_texts: Sequence[str] = (),
    hard_tokens: np.ndarray | None = None,
) -> dict[str, Any]:
    """Write `golden/` into a bundle that is being made; call it before `write_manifest`.

    Args:
        folder: the bundle.
        images: N RGB pictures, stored losslessly as golden/00.png … (their `preprocess` must be `pixels`).
        texts, pixels, tokens, image_embedding, text_embedding, logits, hard_texts, hard_tokens: as in `Golden`.

    Returns:
        The manifest's `golden` entry.
    """
    from safetensors.numpy import save

    folder = Path(folder)
    (folder / "golden").mkdir(parents=True, exist_ok=True)
    names = [f"golden/{n:02d}.png" for n in range(len(images))]
    for name, image in zip(names, images, strict=True):
        image.convert("RGB").save(folder / name)
    arrays = {"pixels": pixels, "tokens": tokens, "image_embedding": image_embedding, "text_embedding": text_embedding}
    if logits is not None:
        arrays["logits"] = logits
    if {len(value) for value in arrays.values()} != {len(images)} or len(texts) != len(images):
        counts = {name: len(value) for name, value in arrays.items()}
        raise BundleError(f"golden inputs differ in number: {len(images)} pictures, {len(texts)} texts, {counts}")
    if hard_tokens is not None:
        arrays["hard_tokens"] = hard_tokens
    typed = {name: np.ascontiguousarray(value, np.int32 if name.endswith("tokens") else np.float32) for name, value in arrays.items()}
    (folder / VECTORS).write_bytes(save(typed))
    index = {"images": names, "texts": list(texts), "hard_texts": list(hard_texts)}
    (folder / INDEX).write_text(json.dumps(index, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return {"n": len(images), "index": INDEX, "vectors": VECTORS}


def read_golden(folder: str | os.PathLike[str], manifest: Manifest) -> Golden:
    """Read `golden/`, every file checked against the manifest.

    Raises:
        BundleError: missing, changed or of other shapes than the manifest says.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        index = json.loads(read_file(folder, manifest, INDEX))
        arrays = load(read_file(folder, manifest, VECTORS))
        names, texts, hard = ([str(item) for item in items] for items in (index["images"], index["texts"], index.get("hard_texts", [])))
        arrays.setdefault("hard_tokens", np.zeros((0, manifest.text.context_length), np.int32))
        n, size = len(names), manifest.image.image_size
        shapes = {
            "pixels": (n, 3, size, size),
            "tokens": (n, manifest.text.context_length),
            "image_embedding": (n, manifest.embed_dim),
            "text_embedding": (n, manifest.embed_dim),
            "hard_tokens": (len(hard), manifest.text.context_length),
            **({"logits": (n, n)} if "logits" in arrays else {}),
        }
        found = {name: arrays[name].shape for name in shapes}
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise BundleError(f"the golden inputs of {folder} cannot be read ({type(error).__name__}: {error}); export the bundle again") from error
    if found != shapes or len(texts) != n or not n:
        raise BundleError(f"the golden inputs of {folder} have shapes {found} and {len(texts)} texts; the manifest asks for {shapes}")
    return Golden(images=[read_file(folder, manifest, name) for name in names], texts=texts, hard_texts=hard, **{name: arrays[name] for name in shapes})


def selfcheck(bundle: str | os.PathLike[str], threads: int | None = None, artefacts: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the golden inputs through preprocessing, tokenizer and artefacts, and compare with the checkpoint.

    Preprocessing must give the golden pixels (within 1e-6), the tokenizer the golden tokens exactly, the manifest's logit scale and bias
    the golden logits, and each ONNX artefact embeddings whose least cosine reaches its threshold. Artefacts of targets that do not run here are judged by
    the figure that their export recorded ("recorded"); those that are not proven are listed with their status.

    Args:
        bundle: the folder. Its files must have been verified, or are so where they are opened here.
        threads: as in `runtime.load`.
        artefacts: ids to check; None = all.

    Returns:
        {"ok", "name", "n", "preprocess": {"ok", "max_abs"}, "tokenizer": {"ok", "rows_different"}, "logits": {"ok", "max_abs", "expected", "found"} or None,
        "artefacts": [{"id", "ok", "how": "run"|"recorded"|"refused"|"unproven"|"failed", "cosine_min", "threshold", "reason", …}]}

    Raises:
        BundleError: the manifest or the golden inputs are unusable.
    """
    folder = Path(bundle)
    manifest = read_manifest(folder, verify=False)
    golden = read_golden(folder, manifest)
    pixels = preprocess(golden.images, manifest.image.preprocess_config())
    text = manifest.text
    different = 0
    if "tokenizer.json" in manifest.files:  # a bundle for pictures alone has none
        data = read_file(folder, manifest, "tokenizer.json")
        tokens = Tokenizer.from_bytes(data, folder / "tokenizer.json", text.context_length, text.cleaning, text.pad_id)([*golden.texts, *golden.hard_texts])
        different = int((tokens != np.concatenate([golden.tokens, golden.hard_tokens])).any(axis=1).sum())
    difference = float(np.abs(pixels - golden.pixels).max())
    report: dict[str, Any] = {
        "name": manifest.name,
        "n": len(golden.texts),
        "preprocess": {"ok": difference <= PIXEL_TOLERANCE, "max_abs": difference, "tolerance": PIXEL_TOLERANCE},
        "tokenizer": {"ok": different == 0, "rows_different": different},
        "logits": _check_logits(manifest, golden),
        "artefacts": [_check(folder, manifest, artefact, golden, threads) for artefact in manifest.artefacts if artefacts is None or artefact.id in artefacts],
    }
    report["ok"] = report["preprocess"]["ok"] and report["tokenizer"]["ok"] and (report["logits"] or {"ok": True})["ok"] and all(entry["ok"] for entry in report["artefacts"])
    return report


def _check_logits(manifest: Manifest, golden: Golden) -> dict[str, Any] | None:
    """The manifest's scale and bias on the golden embeddings against the checkpoint's own logits."""
    if golden.logits is None:
        return None
    found = golden.image_embedding.astype(np.float64) @ golden.text_embedding.T * manifest.logit_scale + (manifest.logit_bias or 0.0)
    difference = np.abs(found - golden.logits)
    place = np.unravel_index(difference.argmax(), difference.shape)
    return {
        "ok": bool(difference.max() <= LOGIT_TOLERANCE * max(1.0, float(np.abs(golden.logits).max()))),
        "max_abs": float(difference.max()),
        "expected": float(golden.logits[place]),
        "found": float(found[place]),
    }


def _check(folder: Path, manifest: Manifest, artefact: Artefact, golden: Golden, threads: int | None) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "id": artefact.id,
        "tower": artefact.tower,
        "target": artefact.target,
        "precision": artefact.precision,
        "batch": artefact.batch,
        "bytes": artefact.bytes,
        "parity": artefact.parity,
        "threshold": artefact.cosine_threshold,
        "reason": artefact.reason,
    }
    recorded = (artefact.parity or {}).get("cosine_min")
    if artefact.status != "proven":  # never picked: listed with its reason, not judged
        return {**entry, "ok": True, "how": artefact.status, "cosine_min": recorded}
    if missing(artefact.target):
        return _judge({**entry, "how": "recorded", "cosine_min": recorded})
    inputs, wanted = (golden.pixels, golden.image_embedding) if artefact.tower == "image" else (golden.tokens, golden.text_embedding)
    try:
        verify_artefact(folder, manifest, artefact)
        found = run_tower(open_artefact(folder, manifest, artefact, threads), artefact, inputs, manifest.embed_dim, 32, manifest)
    except ClipError as error:
        return {**entry, "ok": False, "how": "run", "cosine_min": None, "reason": str(error)}
    return _judge({**entry, "how": "run", **compared(found, wanted), "recorded_cosine_min": recorded})


def compared(found: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
    """How far embeddings (N, D) are from the golden ones: "cosine_min", "cosine_mean", "max_abs", "norm_error"."""
    norms = np.linalg.norm(found, axis=1)
    cosines = (found.astype(np.float64) * wanted).sum(axis=1) / np.maximum(norms * np.linalg.norm(wanted, axis=1), 1e-12)
    return {
        "cosine_min": float(cosines.min()),
        "cosine_mean": float(cosines.mean()),
        "max_abs": float(np.abs(found - wanted).max()),
        "norm_error": float(np.abs(norms - 1).max()),
    }


def shortfall(cosine_min: float | None, norm_error: float, least: float) -> str | None:
    """Why an artefact may not be used, in a clause; None when it may."""
    if cosine_min is None or not cosine_min >= least:
        return f"its least cosine to the checkpoint is {cosine_min}, expected at least {least}"
    return f"its embeddings have norms that differ from 1 by up to {norm_error:.3f}" if norm_error > 1e-2 else None


def _judge(entry: dict[str, Any]) -> dict[str, Any]:
    reason = shortfall(entry["cosine_min"], entry.get("norm_error", 0.0), entry["threshold"])
    return {**entry, "ok": reason is None, "reason": reason or entry["reason"]}
