"""The SDK: `runtime.load(bundle)` gives a `Clip` that embeds pictures and texts without torch."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.backends import BACKENDS, Tower
from runtime.bundle_files import read_file, verify_artefact
from runtime.errors import BundleError, DeviceError
from runtime.manifest import RECALL1_CHANGE_MIN, TOWERS, Artefact, Manifest, read_manifest
from runtime.preprocess import as_list, is_one, preprocess
from runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from runtime.preprocess import ImageSource

# Medians closer than this are the same speed, and then the more precise artefact wins.
SAME_SPEED = 0.02
_PRECISIONS = ("fp32", "fp16", "bf16", "int8")
_IMAGE_BATCH, _TEXT_BATCH = 32, 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """Which artefact of a tower runs, why, and why not the others (id -> reason)."""

    id: str
    why: str
    passed_over: dict[str, str]

    def __str__(self) -> str:
        return f"{self.id}: {self.why}"


def load(bundle: str | os.PathLike[str], threads: int | None = None, prefer: str | Mapping[str, str] | None = None) -> Clip:
    """Open a bundle with the best proven artefact of each tower for this machine.

    The manifest and the files that are going to be used are checked against their hashes; a whole bundle is checked by
    `mclip inspect` and `mclip verify`. A tower's session opens at its first use.

    Args:
        bundle: the folder, or the bundle in one .zip file, which is unpacked once into the cache.
        threads: threads of one run; None = every processor that this process may use.
        prefer: a precision ("fp32") or an artefact's id, for both towers or as {"image": …, "text": …}.

    Raises:
        BundleError: damaged, or nothing in it that is proven and runs here.
    """
    folder = Path(bundle)
    if folder.is_file():
        from runtime.bundle_zip import folder_of  # zipfile takes its time to import

        folder = folder_of(folder)
    return Clip(folder, threads=threads, prefer=prefer)


class Clip:
    """An image-text model on this machine.

    Attributes:
        manifest: the bundle's facts.
        choice: tower -> `Choice`.
        tokenizer: texts -> int32 tokens.
    """

    def __init__(self, folder: Path, *, threads: int | None = None, prefer: str | Mapping[str, str] | None = None) -> None:
        if threads is not None and threads < 1:
            raise BundleError(f"threads is {threads}, expected at least 1")
        self.folder = folder
        self.manifest = read_manifest(folder, verify=False)
        self.choice = {tower: choose(self.manifest, tower, prefer if isinstance(prefer, str) or prefer is None else prefer.get(tower)) for tower in TOWERS}
        for choice in self.choice.values():
            verify_artefact(folder, self.manifest, self.manifest.artefact(choice.id))
        text = self.manifest.text
        self.tokenizer = Tokenizer.from_bytes(
            read_file(folder, self.manifest, "tokenizer.json"), folder / "tokenizer.json", text.context_length, text.cleaning, text.pad_id
        )
        if self.tokenizer.vocab_size > text.vocab_size:
            raise BundleError(f"{folder}: tokenizer.json has {self.tokenizer.vocab_size} tokens, the text tower {text.vocab_size}; export the bundle again")
        self.preprocess_config = self.manifest.image.preprocess_config()
        self._threads = threads
        self._towers: dict[str, Tower] = {}

    @property
    def embed_dim(self) -> int:
        """Width D of the embeddings."""
        return self.manifest.embed_dim

    def encode_image(self, images: Sequence[ImageSource] | ImageSource) -> np.ndarray:
        """Pictures -> float32 (B, D), unit norm.

        Args:
            images: a list of paths, PIL pictures and uint8 (H, W, 3) arrays in any mixture, or one of them.

        Raises:
            ImageError: one does not decode.
        """
        sources = as_list(images)
        parts = [self.encode_pixels(preprocess(sources[n : n + _IMAGE_BATCH], self.preprocess_config)) for n in range(0, len(sources), _IMAGE_BATCH)]
        return np.concatenate(parts) if parts else np.zeros((0, self.embed_dim), np.float32)

    def encode_text(self, texts: Sequence[str] | str) -> np.ndarray:
        """Texts -> float32 (B, D), unit norm. One string counts as a list of one."""
        return self.encode_tokens(self.tokenizer(texts))

    def encode_pixels(self, pixels: np.ndarray) -> np.ndarray:
        """Preprocessed float32 (B, 3, H, W) -> float32 (B, D)."""
        size = self.manifest.image.image_size
        if pixels.shape[1:] != (3, size, size):
            raise ValueError(f"pixels have shape {pixels.shape}, expected (B, 3, {size}, {size})")
        return self._run("image", np.ascontiguousarray(pixels, np.float32), _IMAGE_BATCH)

    def encode_tokens(self, tokens: np.ndarray) -> np.ndarray:
        """Token rows int32 (B, context_length) -> float32 (B, D)."""
        if tokens.ndim != 2 or tokens.shape[1] != self.manifest.text.context_length:
            raise ValueError(f"tokens have shape {tokens.shape}, expected (B, {self.manifest.text.context_length})")
        return self._run("text", np.ascontiguousarray(tokens, np.int32), _TEXT_BATCH)

    def classify(self, image: Sequence[ImageSource] | ImageSource, labels: Sequence[str]) -> np.ndarray:
        """Probability of each label.

        Softmax bundles: `softmax(logit_scale * cosine)`, a row sums to 1. Sigmoid bundles: `sigmoid(logit_scale *
        cosine + logit_bias)`, every label for itself.

        Args:
            image: one picture, or a list of them.
            labels: texts, at least one.

        Returns:
            float32 (len(labels),) for one picture, (B, len(labels)) for a list.
        """
        if isinstance(labels, str) or not len(labels):
            raise ValueError("labels must be a list of at least one text")
        cosines = self.encode_image(image) @ self.encode_text(labels).T
        found = probabilities(cosines, self.manifest.loss, self.manifest.logit_scale, self.manifest.logit_bias)
        return found[0] if is_one(image) else found

    def selfcheck(self) -> dict[str, Any]:
        """Run the bundle's golden inputs through preprocessing, tokenizer and the chosen artefacts: see `runtime.selfcheck`."""
        from runtime.selfcheck import selfcheck

        return selfcheck(self.folder, threads=self._threads, artefacts=[choice.id for choice in self.choice.values()])

    def _run(self, tower: str, inputs: np.ndarray, most: int) -> np.ndarray:
        artefact = self.manifest.artefact(self.choice[tower].id)
        if not len(inputs):
            return np.zeros((0, self.embed_dim), np.float32)
        if tower not in self._towers:
            self._towers[tower] = open_artefact(self.folder, self.manifest, artefact, self._threads)
        return run_batches(self._towers[tower], artefact, inputs, self.embed_dim, most)

    def __repr__(self) -> str:
        return f"Clip({self.manifest.name!r}, image={self.choice['image'].id}, text={self.choice['text'].id})"


def open_artefact(folder: Path, manifest: Manifest, artefact: Artefact, threads: int | None = None) -> Tower:
    """Open one artefact of a bundle. Raises BundleError when no backend here runs its target."""
    spec = manifest.image if artefact.tower == "image" else manifest.text
    if artefact.target not in BACKENDS or artefact.path is None:
        raise BundleError(f"artefact '{artefact.id}' cannot run here: target {artefact.target}, {artefact.status}; this SDK runs {', '.join(BACKENDS)}")
    return BACKENDS[artefact.target](folder / artefact.path, threads, spec.input, spec.output, half=artefact.precision == "fp16")


def run_batches(tower: Tower, artefact: Artefact, inputs: np.ndarray, embed_dim: int, most: int = 32) -> np.ndarray:
    """Run any number of inputs: in slices of at most `most`, or of exactly the artefact's fixed batch (the last one filled up).

    Raises:
        DeviceError: the result has another shape than the manifest says, or is not finite.
    """
    fixed = None if artefact.batch == "dynamic" else int(artefact.batch)
    parts = []
    for start in range(0, len(inputs), fixed or most):
        part = inputs[start : start + (fixed or most)]
        count = len(part)
        if fixed and count < fixed:
            part = np.concatenate([part, np.repeat(part[-1:], fixed - count, axis=0)])
        found = tower.run(part)[:count]
        if found.shape != (count, embed_dim) or not np.isfinite(found).all():
            wrong = int((~np.isfinite(found)).sum())
            raise DeviceError(f"artefact '{artefact.id}' gave {found.shape}, {wrong} values not finite; expected ({count}, {embed_dim}), all finite")
        parts.append(found)
    return np.concatenate(parts)


def probabilities(cosines: np.ndarray, loss: str, scale: float, bias: float | None) -> np.ndarray:
    """(B, L) cosines -> (B, L) float32: softmax over labels, or sigmoid of each."""
    logits = np.asarray(cosines, np.float64) * scale + (bias or 0.0)
    if loss == "sigmoid":
        return (0.5 * (1 + np.tanh(logits / 2))).astype(np.float32)
    logits = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return (logits / logits.sum(axis=-1, keepdims=True)).astype(np.float32)


def choose(manifest: Manifest, tower: str, prefer: str | None = None) -> Choice:
    """The artefact of a tower that should run here.

    Among those that are proven, runnable and near enough to the checkpoint: the fastest by the manifest's `p50_ms`; within
    2 % of it (or where nothing was timed) the more precise, then a dynamic batch. `prefer` (id or precision) narrows the field.

    Raises:
        BundleError: none is left.
    """
    passed_over: dict[str, str] = {}
    field: list[Artefact] = []
    for artefact in manifest.artefacts:
        if artefact.tower == tower:
            reason = unfit(artefact)
            if reason:
                passed_over[artefact.id] = reason
            else:
                field.append(artefact)
    if prefer is not None:
        wanted = [a for a in field if prefer in (a.id, a.precision)]
        if not wanted:
            known = ", ".join(f"{a.id} ({a.precision})" for a in field) or "none"
            raise BundleError(f"bundle '{manifest.name}' has no usable {tower} artefact '{prefer}'{_said(passed_over, prefer)}; usable: {known}")
        passed_over.update({a.id: f"'{prefer}' was asked for" for a in field if a not in wanted})
        field = wanted
    if not field:
        reasons = "; ".join(f"{id}: {reason}" for id, reason in passed_over.items()) or "the manifest lists none"
        raise BundleError(f"bundle '{manifest.name}' has no {tower} artefact that runs here ({reasons})")
    quickest = min(a.p50_ms for a in field)
    even = [a for a in field if a.p50_ms <= quickest * (1 + SAME_SPEED) or math.isinf(quickest)]
    best = min(even, key=lambda a: (_PRECISIONS.index(a.precision) if a.precision in _PRECISIONS else 9, a.batch != "dynamic", a.p50_ms, a.id))
    for artefact in field:
        if artefact is not best:
            passed_over[artefact.id] = f"{_speed(artefact)}, {artefact.precision}"
    return Choice(id=best.id, why=_why(best, field, even, prefer), passed_over=passed_over)


def unfit(artefact: Artefact) -> str | None:
    """Why an artefact may not be picked; None when it may."""
    if artefact.status != "proven":
        return f"{artefact.status}: {artefact.reason}"
    if artefact.target not in BACKENDS:
        return f"target {artefact.target} does not run in this SDK"
    parity = artefact.parity or {}
    if not parity.get("cosine_min", -1.0) >= artefact.cosine_threshold:
        return f"cosine_min {parity.get('cosine_min')} is below {artefact.cosine_threshold}"
    change = parity.get("recall1_clear", parity.get("recall1_change"))
    if change is not None and change < RECALL1_CHANGE_MIN:
        return f"recall@1 changes by {change:+.3f}, at most {RECALL1_CHANGE_MIN:+.2f} is let through"
    return None


def _why(best: Artefact, field: list[Artefact], even: list[Artefact], prefer: str | None) -> str:
    asked = f"'{prefer}' was asked for; " if prefer is not None else ""
    if len(field) == 1:
        return f"{asked}the only proven artefact that runs here ({_speed(best)})"
    if math.isinf(best.p50_ms):
        return f"{asked}nothing was timed, so the most precise"
    tie = " and the most precise of equally fast ones" if len(even) > 1 else ""
    return f"{asked}fastest of {len(field)} proven artefacts{tie} ({_speed(best)})"


def _speed(artefact: Artefact) -> str:
    return "not timed" if math.isinf(artefact.p50_ms) else f"{artefact.p50_ms:.2f} ms"


def _said(passed_over: dict[str, str], wanted: str) -> str:
    return f" ({passed_over[wanted]})" if wanted in passed_over else ""
