"""The prefix captioner at work: its checkpoint folder, its teachers, and the choice among candidates.

A checkpoint is `model.safetensors` (weights, the means and the caption memory), `config.json`, `tokenizer.json` and `receipt.json`, which
is written last. The teachers stay where they are; the checkpoint knows them by their strings and their weights' hashes.

Shapes: N = pictures, M = remembered captions, D = sum of the teachers' dimensions.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from distill.captioners import CaptionerFacts, CaptionerOptions, Draft, Request
from distill.ensemble import Teacher, encode_texts, open_teacher
from distill.nucleus import Sampling, generate
from distill.prefix_captioner import DecoderConfig, PrefixDecoder, Writer
from distill.store import open_store
from distill.store_writing import unit
from mobileclip.checkpoint import load_state, verify_receipt
from runtime.errors import CheckpointError, RecipeError, StoreError
from runtime.files import file_sha256, write_json
from runtime.tokenizer import Tokenizer

FILES = ("model.safetensors", "config.json", "tokenizer.json")
REMEMBERED_TEXTS = 16_384


class Conditioning(nn.Module):
    """From a picture's embeddings to what the decoder reads: the captions that the teachers find near it, averaged.

    Decoders are trained on embeddings of texts, which always belong to their text, however wrong the pairs are. A picture's embedding
    lies elsewhere in the space (the modality gap); the softmax-weighted mean of remembered captions' embeddings lies among texts
    (DeCap, Li et al. 2023, arXiv 2303.03032, section 3.2). Captions that fit other pictures cancel out there.
    """

    memory: Tensor
    mean: Tensor

    def __init__(self, remembered: int, dims: Sequence[int], scale: float) -> None:
        super().__init__()
        self.teachers, self.scale = len(dims), scale
        self.register_buffer("memory", torch.zeros(remembered, sum(dims)))
        self.register_buffer("mean", torch.zeros(sum(dims)))

    def of_texts(self, vectors: Tensor) -> Tensor:
        """(B, D) teachers' embeddings of texts side by side -> (B, D), unit norm."""
        return F.normalize(vectors - self.mean, dim=1)

    def forward(self, vectors: Tensor) -> Tensor:
        """(N, D) teachers' embeddings of pictures side by side -> (N, D), unit norm."""
        near = torch.softmax(self.scale / self.teachers * (vectors @ self.memory.T), dim=1)
        return self.of_texts(near @ self.memory)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TeacherNote:
    """A teacher as the checkpoint remembers it."""

    spec: str
    name: str
    dim: int
    sha256: str
    licence: str


def save_prefix_captioner(
    folder: Path, model: PrefixDecoder, conditioning: Conditioning, teachers: Sequence[TeacherNote], tokenizer: Path, extra: dict[str, Any]
) -> Path:
    """Write the checkpoint folder; the receipt comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "receipt.json").unlink(missing_ok=True)
    state = {f"decoder.{name}": tensor for name, tensor in model.state_dict().items()} | {f"conditioning.{name}": tensor for name, tensor in conditioning.state_dict().items()}
    temporary = folder / f".model.safetensors.{os.getpid()}.part"
    save_file({name: tensor.detach().contiguous() for name, tensor in state.items()}, temporary, metadata={"format": "pt"})
    os.replace(temporary, folder / "model.safetensors")
    write_json(folder / "config.json", {
        "kind": "prefix_captioner", "decoder": dataclasses.asdict(model.config), "scale": conditioning.scale, "remembered": len(conditioning.memory),
        "teachers": [dataclasses.asdict(note) for note in teachers],
    })  # fmt: skip
    if tokenizer != folder / "tokenizer.json":
        os.replace(tokenizer, folder / "tokenizer.json")
    write_json(folder / "receipt.json", {
        "schema": 1, "kind": "captioner", "files": {name: {"sha256": file_sha256(folder / name), "bytes": (folder / name).stat().st_size} for name in FILES},
        "tools": {package: importlib.metadata.version(package) for package in ("torch", "safetensors", "tokenizers")}, **extra,
    })  # fmt: skip
    return folder


def read_prefix_config(folder: Path) -> dict[str, Any]:
    """config.json of a captioner. Raises CheckpointError."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if config["kind"] != "prefix_captioner":
            raise KeyError(config["kind"])
        decoder = DecoderConfig(**{**config["decoder"], "dims": tuple(config["decoder"]["dims"])})
        notes = [TeacherNote(**note) for note in config["teachers"]]
        return {**config, "decoder": decoder, "teachers": notes, "scale": float(config["scale"]), "remembered": int(config["remembered"])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"'{folder}' is no prefix captioner: its config.json cannot be used ({error!r}); give a folder that mclip train-captioner wrote") from None


def load_prefix_captioner(folder: Path) -> tuple[PrefixDecoder, Conditioning, list[TeacherNote], Tokenizer, dict[str, Any]]:
    """Decoder and conditioning in eval mode, the teachers' notes, tokenizer and receipt; hashes checked. Raises CheckpointError."""
    config = read_prefix_config(folder)
    receipt = verify_receipt(folder)
    decoder, conditioning = PrefixDecoder(config["decoder"]), Conditioning(config["remembered"], config["decoder"].dims, config["scale"])
    try:
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no dict)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"'{folder / 'model.safetensors'}' cannot be read ({error}); train the captioner again") from None
    both = nn.ModuleDict({"decoder": decoder, "conditioning": conditioning})
    load_state(both, state, where=str(folder))
    tokenizer = Tokenizer.open(folder / "tokenizer.json", context_length=config["decoder"].context_length)
    return decoder.eval(), conditioning.eval(), config["teachers"], tokenizer, receipt


def open_teachers(notes: Sequence[TeacherNote], what: str) -> list[Teacher]:
    """The teachers of a checkpoint. Raises CheckpointError when one has changed since."""
    teachers = [open_teacher(note.spec) for note in notes]
    for note, teacher in zip(notes, teachers, strict=True):
        if teacher.facts.sha256 != note.sha256 or teacher.facts.dim != note.dim:
            found = f"sha256 {teacher.facts.sha256[:16]}…, dim {teacher.facts.dim}"
            raise CheckpointError(f"teacher '{note.spec}' is not the one that {what} was trained with ({found}; expected {note.sha256[:16]}…, dim {note.dim}); train again")
    return teachers


def image_vectors(teachers: Sequence[Teacher], pictures: Sequence[Any]) -> np.ndarray:
    """(N, D) float32: the teachers' unit vectors side by side. Raises FloatingPointError where a teacher's are not finite."""
    vectors = np.concatenate([np.asarray(teacher.encode_image(list(pictures)), np.float32) for teacher in teachers], axis=1)
    if not np.isfinite(vectors).all():
        raise FloatingPointError("a teacher's embedding is not finite")
    return vectors


class StoredPictures:
    """Pictures as a store knows them: by key the mean of a picture's views, for the teachers of a captioner. No picture is decoded."""

    def __init__(self, path: str, captioner: PrefixCaptioner) -> None:
        """Raises StoreError, or RecipeError where the store lacks a teacher of the captioner."""
        self._store = open_store(path)
        hashes = [facts.sha256 for facts in self._store.teachers]
        missing = [teacher.facts.name for teacher in captioner.teachers if teacher.facts.sha256 not in hashes]
        if missing:
            raise RecipeError(f"store '{path}' has no vectors of the captioner's teacher {', '.join(missing)}; it has {', '.join(f.name for f in self._store.teachers)}")
        self._teachers = [hashes.index(teacher.facts.sha256) for teacher in captioner.teachers]
        self._rows = {key: row for row, key in enumerate(self._store.keys)}

    def vector(self, key: str) -> np.ndarray:
        """(D,) float32, unit norm a teacher. Raises StoreError for a pair that the store skipped."""
        if key not in self._rows:
            raise StoreError(f"sample '{key}' is not in the store")
        row = self._rows[key]
        views = np.arange(int(self._store.n_augmentations[row]))
        means = [self._store.image_embeddings(teacher, np.full(len(views), row), views).mean(axis=0) for teacher in self._teachers]
        return np.concatenate([unit(mean) for mean in means])


class PrefixCaptioner:
    """`prefix:CHECKPOINT`. With best_of n, n candidates are drawn for each caption and those of highest mean similarity kept."""

    def __init__(self, folder: Path, sampling: Sampling, best_of: int) -> None:
        self.model, self.conditioning, notes, self.tokenizer, receipt = load_prefix_captioner(folder)
        room = self.model.config.context_length - 1
        if sampling.max_tokens > room:
            raise RecipeError(f"--max-tokens is {sampling.max_tokens}, but captioner '{folder}' writes at most {room}; ask for fewer")
        self.teachers = open_teachers(notes, f"captioner '{folder}'")
        self.sampling, self.best_of, self.most_uniforms = sampling, best_of, sampling.max_tokens
        self._start, self._end = self.model.config.vocab_size - 2, self.model.config.vocab_size - 1
        self._texts: OrderedDict[str, np.ndarray] = OrderedDict()
        licences = sorted({note.licence for note in notes})
        self.facts = CaptionerFacts(
            name="prefix", licence=f"decoder: as the pairs; teachers: {'; '.join(licences)}", source=f"mclip train-captioner on {', '.join(note.name for note in notes)}",
            sha256=receipt["files"]["model.safetensors"]["sha256"], settings={"teachers": [note.sha256 for note in notes], "selection": best_of},
        )  # fmt: skip

    def caption(self, requests: Sequence[Request]) -> list[list[Draft]]:
        stored = [request.vector for request in requests if request.vector is not None]
        vectors = np.stack(stored) if len(stored) == len(requests) else image_vectors(self.teachers, [request.picture for request in requests])
        count = max(request.count for request in requests)
        texts = self.write(vectors, np.stack([request.uniforms[: count * self.best_of] for request in requests]))
        if self.best_of == 1:
            return [[Draft(text=text) for text in made] for made in texts]
        return [[Draft(text=text, note=f"best of {self.best_of}") for text in self.select(vector, made, count)] for vector, made in zip(vectors, texts, strict=True)]

    def write(self, vectors: np.ndarray, randoms: np.ndarray) -> list[list[str]]:
        """vectors (N, D) of pictures, randoms (N, C, L) -> C candidates for each."""
        N, C, _ = randoms.shape
        with torch.inference_mode():
            writer = Writer(self.model, self.conditioning(torch.from_numpy(vectors)), C)
        first = torch.full((N * C,), self._start)
        ids = generate(writer, first, randoms.reshape(N * C, -1), self.sampling, self._end, (self._start,))
        texts = [self.tokenizer.decode(row) for row in ids]
        return [texts[n * C : (n + 1) * C] for n in range(N)]

    def select(self, vector: np.ndarray, candidates: Sequence[str], count: int) -> list[str]:
        """The `count` different candidates of highest similarity to the picture, the best first; equal ones in the order in which they were drawn."""
        different = [text for text in dict.fromkeys(candidates) if text.strip()]
        similarity = [round(float(self._text_vector(text) @ vector), 6) for text in different]
        return [different[n] for n in sorted(range(len(different)), key=lambda n: (-similarity[n], n))[:count]]

    def _text_vector(self, text: str) -> np.ndarray:
        """(D,): embedded alone, so that it does not depend on which texts came before."""
        if text in self._texts:
            self._texts.move_to_end(text)
        else:
            while len(self._texts) >= REMEMBERED_TEXTS:
                self._texts.popitem(last=False)
            self._texts[text] = np.concatenate([found[0] for found in encode_texts(self.teachers, [text])])
        return self._texts[text]


def open_prefix_captioner(name: str, options: CaptionerOptions) -> PrefixCaptioner:
    """A captioner folder. Raises CheckpointError, RecipeError."""
    if not Path(name).is_dir():
        raise CheckpointError(f"captioner '{name}' does not exist; expected a folder that mclip train-captioner wrote")
    return PrefixCaptioner(Path(name), options.sampling, options.best_of)
