"""From a new model's space to an old one's: new queries search a gallery that the old model embedded, and nothing is embedded again.

Shapes: n = texts or pictures, N = width of the new model's embeddings, O = of the old one's. numpy only, in closed form.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from runtime.errors import SearchError
from runtime.files import write_whole

MOST_BYTES = 1_000_000
RIDGES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
"""Tried penalties, as a share of the mean variance of the new embeddings times their number."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapter:
    """Affine maps to the old space.

    Attributes:
        old, new: identities of the models (`runtime.index_models.identity`).
        tensors: "text.weight" (N, O) or its factors "text.left" (N, R), "text.right" (R, O), and "text.bias" (O,); the same with "image."
            when it was fitted on pictures too. float16.
        figures: what was measured when it was fitted.
    """

    old: dict[str, Any]
    new: dict[str, Any]
    tensors: dict[str, np.ndarray]
    figures: dict[str, Any] = field(default_factory=dict)

    def text(self, vectors: np.ndarray) -> np.ndarray:
        """Text embeddings of the new model, float32 (N,) or (n, N) -> unit float32 (O,) or (n, O)."""
        return self._map("text", vectors)

    def image(self, vectors: np.ndarray) -> np.ndarray:
        """Picture embeddings likewise. Raises SearchError when the adapter was fitted on texts alone."""
        if "image.bias" not in self.tensors:
            raise SearchError("this adapter was fitted on texts alone, so pictures cannot be asked with; fit one with 'mclip adapt --pictures'")
        return self._map("image", vectors)

    def _map(self, kind: str, vectors: np.ndarray) -> np.ndarray:
        value = np.asarray(vectors, np.float32)
        for name in ("weight", "left", "right"):
            if f"{kind}.{name}" in self.tensors:
                value = value @ self.tensors[f"{kind}.{name}"].astype(np.float32)
        value = value + self.tensors[f"{kind}.bias"].astype(np.float32)
        return np.asarray(value / np.maximum(np.linalg.norm(value, axis=-1, keepdims=True), 1e-12), np.float32)


def fit(new: np.ndarray, old: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray, float]:
    """Ridge regression from float32 (n, N) to (n, O), the penalty chosen on a fifth of the rows by the mean cosine.

    Returns:
        weight (N, O), bias (O,), and the mean cosine on that fifth.
    """
    if len(new) < 20:
        raise SearchError(f"{len(new)} different texts are too few to fit an adapter on; give at least 20, better some thousand")
    order = np.random.default_rng(seed).permutation(len(new))
    inner, outer = order[len(order) // 5 :], order[: len(order) // 5]
    scored = []
    for ridge in RIDGES:
        weight, bias = _ridge(new[inner], old[inner], ridge)
        guess = new[outer] @ weight + bias
        cosine = (guess * old[outer]).sum(axis=1) / np.maximum(np.linalg.norm(guess, axis=1), 1e-12)
        scored.append((float(cosine.mean()), ridge))
    best, ridge = max(scored)
    weight, bias = _ridge(new, old, ridge)
    return weight.astype(np.float32), bias.astype(np.float32), best


def _ridge(new: np.ndarray, old: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    x, y = new.astype(np.float64), old.astype(np.float64)
    mean_x, mean_y = x.mean(axis=0), y.mean(axis=0)
    x, y = x - mean_x, y - mean_y
    gram = x.T @ x
    weight = np.linalg.solve(gram + ridge * max(np.trace(gram), 1e-12) / len(gram) * np.eye(len(gram)), x.T @ y)
    return weight, mean_y - mean_x @ weight


def tensors(kind: str, weight: np.ndarray, bias: np.ndarray, most: int) -> dict[str, np.ndarray]:
    """The map in float16; as two factors of the highest rank that keeps it below `most` bytes, where whole it would be larger."""
    if 2 * weight.size + 2 * bias.size <= most:
        return {f"{kind}.weight": weight.astype(np.float16), f"{kind}.bias": bias.astype(np.float16)}
    left, values, right = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
    rank = max(1, (most // 2 - bias.size) // (weight.shape[0] + weight.shape[1]))
    root = np.sqrt(values[:rank])
    factors = {"left": left[:, :rank] * root, "right": root[:, None] * right[:rank], "bias": bias}
    return {f"{kind}.{name}": value.astype(np.float16) for name, value in factors.items()}


def write_adapter(path: str | os.PathLike[str], adapter: Adapter) -> int:
    """Write it as safetensors, whole or not at all. Returns its bytes, at most MOST_BYTES."""
    from safetensors.numpy import save

    metadata = {"format": "mclip-adapter", **{name: json.dumps(getattr(adapter, name), sort_keys=True) for name in ("old", "new", "figures")}}
    metadata["sha256"] = _digest(adapter.tensors, metadata)
    data = save({name: np.ascontiguousarray(value) for name, value in adapter.tensors.items()}, metadata=metadata)
    try:
        write_whole(path, data)
    except OSError as error:
        raise SearchError(f"{path} cannot be written ({error.strerror or error}); choose another --out") from error
    return len(data)


def _digest(found: dict[str, np.ndarray], metadata: dict[str, str]) -> str:
    """sha256 of everything that an adapter says: identities and figures, then each tensor in order of name."""
    digest = hashlib.sha256("".join(metadata[name] + "\n" for name in ("old", "new", "figures")).encode())
    for name in sorted(found):
        digest.update(f"{name} {found[name].dtype.str} {found[name].shape}\n".encode() + np.ascontiguousarray(found[name]).tobytes())
    return digest.hexdigest()


def read_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Read an adapter. Raises SearchError when it is none or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        if Path(path).stat().st_size > 2 * MOST_BYTES:
            raise SearchError(f"{path} has {Path(path).stat().st_size} bytes; an adapter has at most {MOST_BYTES}")
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        if metadata.get("format") != "mclip-adapter":
            raise SearchError(f"{path} is no adapter; make one with 'mclip adapt OLD NEW --out {path}'")
        if _digest(found, metadata) != metadata["sha256"]:
            raise SearchError(f"{path} is damaged: it does not match its own hash; fetch it again, or fit it again with 'mclip adapt'")
        old, new, figures = (json.loads(metadata[name]) for name in ("old", "new", "figures"))
        adapter = Adapter(old=old, new=new, tensors=found, figures=figures)
        for kind in ("text", *(("image",) if "image.bias" in found else ())):
            probe = adapter._map(kind, np.ones(int(new["embed_dim"]), np.float32))
            if probe.shape != (int(old["embed_dim"]),) or not all(np.isfinite(value).all() for value in found.values()):
                raise SearchError(f"{path} does not lead from {new['embed_dim']} to {old['embed_dim']} dimensions; fit it again with 'mclip adapt'")
        return adapter
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise SearchError(f"{path} cannot be read as an adapter ({error}); fit it again with 'mclip adapt'") from error
