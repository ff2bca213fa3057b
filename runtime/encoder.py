"""The SDK: `runtime.load(bundle)` gives a `Clip` that embeds pictures and texts without torch."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.backends import BACKENDS, Tower, missing, return_memory
from runtime.choice import NOTHING, Findings, candidates, choose
from runtime.errors import BundleError, DeviceError
from runtime.machine import Notes, try_out
from runtime.manifest import TOWERS, Artefact, Manifest, read_manifest
from runtime.preprocess import OVERSAMPLING, as_list, is_one, preprocess
from runtime.query_cache import QueryCache
from runtime.text_lengths import by_length
from runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from runtime.classes import ClassTable
    from runtime.matching import Calibration
    from runtime.preprocess import ImageSource

_IMAGE_BATCH, _TEXT_BATCH = 32, 256
MEASURE = "MOBILECLIP_MEASURE"
"""Environment variable; "0": artefacts are not tried out on this machine, the manifest's figures decide, and nothing is remembered."""


def load(
    bundle: str | os.PathLike[str],
    threads: int | None = None,
    prefer: str | Mapping[str, str] | None = None,
    *,
    measure: bool | None = None,
    oversampling: float = OVERSAMPLING,
) -> Clip:
    """Open a bundle with the best proven artefact of each tower for this machine.

    What is best is found out when a tower is first used: artefacts are run on the bundle's golden inputs, those that compute something else here are left out
    with a warning, and the fastest is taken. That is remembered, as are the hashes of the files that were read (a file of the same size, time and inode is
    not hashed again; `mclip verify` always hashes everything).

    Args:
        bundle: the folder, or the bundle in one .zip file, which is unpacked once into the cache.
        threads: threads of one run; None = every processor that this process may use.
        prefer: a precision ("fp32"), a target ("openvino") or an artefact's id, for both towers or as {"image": …, "text": …}.
        measure: False: nothing is tried out here or remembered, the manifest's own figures decide. None = True, unless the variable MOBILECLIP_MEASURE is "0".
        oversampling: large JPEG files are decoded at a fraction of their size that leaves so many times the pixels that are needed. 4 keeps the embedding to
            1e-4 in cosine; 2 is quicker; infinity decodes all of it.

    Raises:
        BundleError: damaged, or nothing in it that is proven and runs here.
    """
    folder = Path(bundle)
    if folder.is_file():
        from runtime.bundle_zip import folder_of  # zipfile takes its time to import

        folder = folder_of(folder)
    return Clip(folder, threads=threads, prefer=prefer, measure=measure, oversampling=oversampling)


class Clip:
    """An image-text model on this machine. Threads may share one.

    Attributes:
        manifest: the bundle's facts.
        choice: tower -> `Choice`; what will run by all that is known so far. A bundle may lack the text tower.
        queries: texts that were asked before, with their embeddings.
        calibration: of scores, once it was read (`runtime.matching.read_calibration`).
    """

    def __init__(
        self, folder: Path, *, threads: int | None = None, prefer: str | Mapping[str, str] | None = None, measure: bool | None = None, oversampling: float = OVERSAMPLING
    ) -> None:
        if not oversampling >= 1:
            raise BundleError(f"oversampling is {oversampling}, expected at least 1")
        if threads is not None and threads < 1:
            raise BundleError(f"threads is {threads}, expected at least 1")
        self.folder = folder
        self.manifest = read_manifest(folder, verify=False)
        self.preprocess_config = self.manifest.image.preprocess_config()
        self.queries = QueryCache()
        self.calibration: Calibration | None = None
        self._tokenizer: Tokenizer | None = None
        self._threads, self._oversampling = threads, oversampling
        self._measure = os.environ.get(MEASURE) != "0" if measure is None else measure
        self._notes = Notes(folder, kept=self._measure)
        self._prefer = {tower: prefer if isinstance(prefer, str) or prefer is None else prefer.get(tower) for tower in TOWERS}
        self._towers: dict[str, tuple[Tower, Artefact]] = {}
        self._lock = threading.RLock()
        there = {artefact.tower for artefact in self.manifest.artefacts}
        self.choice = {tower: choose(self.manifest, tower, self._prefer[tower], self._found(tower) or NOTHING) for tower in TOWERS if tower in there or tower == "image"}
        for choice in self.choice.values():
            self._notes.verify(self.manifest, self.manifest.artefact(choice.id))
        if "text" in self.choice:
            self._notes.verify_file(self.manifest, "tokenizer.json")

    @property
    def tokenizer(self) -> Tokenizer:
        """Texts -> int32 tokens; opened when first asked for.

        Raises:
            BundleError: the bundle has none, or one that does not fit its text tower.
        """
        if self._tokenizer is None:
            with self._lock:
                if self._tokenizer is None:
                    self._tokenizer = self._open_tokenizer()
        return self._tokenizer

    def _open_tokenizer(self) -> Tokenizer:
        if "tokenizer.json" not in self.manifest.files:
            raise BundleError(f"the bundle '{self.manifest.name}' is for pictures alone: no tokenizer, no text tower; use its class tables, or a bundle of both towers")
        text, path = self.manifest.text, self.folder / "tokenizer.json"
        self._notes.verify_file(self.manifest, "tokenizer.json")
        found = Tokenizer.from_bytes(path.read_bytes(), path, text.context_length, text.cleaning, text.pad_id)
        return_memory()
        if found.vocab_size > text.vocab_size:
            raise BundleError(f"{self.folder}: tokenizer.json has {found.vocab_size} tokens, the text tower {text.vocab_size}; export the bundle again")
        return found

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
        slices = [sources[n : n + _IMAGE_BATCH] for n in range(0, len(sources), _IMAGE_BATCH)]
        parts = [self.encode_pixels(preprocess(part, self.preprocess_config, threads=self._threads, oversampling=self._oversampling)) for part in slices]
        return np.concatenate(parts) if parts else np.zeros((0, self.embed_dim), np.float32)

    def encode_text(self, texts: Sequence[str] | str) -> np.ndarray:
        """Texts -> float32 (B, D), unit norm. One string counts as a list of one. What was asked before is remembered (`queries`)."""
        asked = [texts] if isinstance(texts, str) else list(texts)
        known = self.queries.get(asked)
        if known is not None:
            return known
        found = self.encode_tokens(self.tokenizer(asked))
        self.queries.put(asked, found)
        return found

    def encode_pixels(self, pixels: np.ndarray) -> np.ndarray:
        """Preprocessed float32 (B, 3, H, W) -> float32 (B, D)."""
        size = self.manifest.image.image_size
        if pixels.shape[1:] != (3, size, size):
            raise ValueError(f"pixels have shape {pixels.shape}, expected (B, 3, {size}, {size})")
        return self._run("image", np.ascontiguousarray(pixels, np.float32), _IMAGE_BATCH)

    def encode_tokens(self, tokens: np.ndarray) -> np.ndarray:
        """Token rows int32 (B, context_length) -> float32 (B, D). Padding is not computed where the artefact takes shorter rows."""
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

    def classes(self, names: Sequence[str] | Mapping[str, Sequence[str]], templates: Sequence[str] = ("{}",)) -> ClassTable:
        """Classes to tell pictures apart by: see `runtime.classes.ClassTable`.

        Args:
            names: class names, put into each template; or a dict of names to texts of their own.
            templates: with {} where the name goes. A class is the mean of its texts' embeddings.
        """
        from runtime.classes import make_table

        return make_table(self, names, templates)

    def stored_classes(self, name: str | None = None) -> ClassTable:
        """A class table that travels with the bundle (`mclip classes` puts them there); None: the only one."""
        from runtime.classes import stored_table

        return stored_table(self, name)

    def match(self, images: Sequence[ImageSource] | ImageSource, texts: Sequence[str] | str) -> np.ndarray:
        """Probability that a text fits a picture, each pair for itself: low for all texts means "nothing like that here".

        Returns:
            float32 (B, L).

        Raises:
            BundleError: the bundle carries no score calibration.
        """
        from runtime.matching import read_calibration

        return read_calibration(self).probability(self.encode_image(images), self.encode_text(texts))

    def explain(self) -> str:
        """What runs on this machine and why, a paragraph a tower; tries out what was not tried yet."""
        lines = []
        for tower in self.choice:
            _, artefact = self._open(tower)
            choice = self.choice[tower]
            lines.append(f"{tower}: {artefact.target} {artefact.precision} ({choice.id}): {choice.why}")
            lines += [f"  not {id}: {reason}" for id, reason in choice.passed_over.items()]
        return "\n".join(lines)

    def selfcheck(self) -> dict[str, Any]:
        """Run the bundle's golden inputs through preprocessing, tokenizer and the chosen artefacts: see `runtime.selfcheck`."""
        from runtime.selfcheck import selfcheck

        return selfcheck(self.folder, threads=self._threads, artefacts=[choice.id for choice in self.choice.values()])

    def _found(self, tower: str) -> Findings | None:
        return self._notes.findings(self._question(tower)) if self._measure else NOTHING

    def _question(self, tower: str) -> str:
        """What findings are kept under: they hold for as many threads and for the same field."""
        return f"{tower}, {self._threads} threads, {self._prefer[tower]}"

    def _open(self, tower: str) -> tuple[Tower, Artefact]:
        """The tower's session; at its first use on this machine, the best artefact is found out."""
        opened = self._towers.get(tower)
        if opened is not None:
            return opened
        with self._lock:
            if tower not in self._towers:
                if tower not in self.choice:
                    raise BundleError(f"the bundle '{self.manifest.name}' has no {tower} tower; use its class table, or export it with both towers")
                if self._found(tower) is None:
                    self._try_out(tower)
                artefact = self.manifest.artefact(self.choice[tower].id)
                self._towers[tower] = open_artefact(self.folder, self.manifest, artefact, self._threads), artefact
                return_memory()
            return self._towers[tower]

    def _try_out(self, tower: str) -> None:
        field, _ = candidates(self.manifest, tower, self._prefer[tower])
        size = self.embed_dim

        def open_it(artefact: Artefact) -> Tower:
            self._notes.verify(self.manifest, artefact)
            return open_artefact(self.folder, self.manifest, artefact, self._threads)

        def run(opened: Tower, artefact: Artefact, inputs: np.ndarray) -> np.ndarray:
            return run_tower(opened, artefact, inputs, size, _IMAGE_BATCH, self.manifest)

        found = try_out(self.manifest, self.folder, field, open_it, run, timed=len(field) > 1)
        self.choice[tower] = choose(self.manifest, tower, self._prefer[tower], found)
        self._notes.verify(self.manifest, self.manifest.artefact(self.choice[tower].id))
        self._notes.keep(self._question(tower), found)

    def _run(self, tower: str, inputs: np.ndarray, most: int) -> np.ndarray:
        if not len(inputs):
            return np.zeros((0, self.embed_dim), np.float32)
        opened, artefact = self._open(tower)
        return run_tower(opened, artefact, inputs, self.embed_dim, most, self.manifest)

    def __repr__(self) -> str:
        return f"Clip({self.manifest.name!r}, {', '.join(f'{tower}={choice.id}' for tower, choice in self.choice.items())})"


def open_artefact(folder: Path, manifest: Manifest, artefact: Artefact, threads: int | None = None) -> Tower:
    """Open one artefact of a bundle. Raises BundleError when no backend here runs its target."""
    spec = manifest.image if artefact.tower == "image" else manifest.text
    absent = missing(artefact.target)
    if absent or artefact.path is None:
        raise BundleError(f"artefact '{artefact.id}' cannot run here: {absent or artefact.status}; this SDK runs {', '.join(BACKENDS)}")
    return BACKENDS[artefact.target](folder / artefact.path, threads, spec.input, spec.output, precision=artefact.precision)


def run_tower(tower: Tower, artefact: Artefact, inputs: np.ndarray, embed_dim: int, most: int, manifest: Manifest) -> np.ndarray:
    """`run_batches`, with token rows cut to what they hold where the artefact takes any length."""

    def run(part: np.ndarray) -> np.ndarray:
        return run_batches(tower, artefact, part, embed_dim, most)

    if artefact.tower == "text" and artefact.any_length:
        return by_length(inputs, manifest.text.pad_id, run, embed_dim)
    return run(inputs)


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
