"""What a reinforcement store holds, for `mclip inspect`: coverage, teachers, captions, layers, and what each kind of data takes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from runtime.errors import StoreError
from runtime.store_index import INDEX, layers_of, parts_by_layer, read_index
from runtime.store_parts import CAPTION_TYPES, CHECKSUMS, Part
from runtime.store_verification import verify_store


def store_facts(path: Path, sample: float | None = None) -> dict[str, Any]:
    """JSON-ready facts of a store whose bytes, or a sample of whose rows, have been compared with their hashes.

    Raises:
        StoreError: unusable, or changed; the message names part, shard and row.
    """
    verified = verify_store(path, sample)
    index = read_index(path)
    layers, captions, sizes = layers_of(index), _CaptionCounts(index), Counter({INDEX: (path / INDEX).stat().st_size})
    for entries in parts_by_layer(index):
        for entry, layer in zip(entries, layers, strict=True):
            part = Part(path / entry["path"])
            sizes["headers"] += part.start
            for name, array in part.arrays.items():
                sizes[_role(name)] += array.nbytes
            if layer.adds_captions:
                captions.add(part)
    rows, total = index["rows"], sum(sizes.values())
    checked = f"{verified.rows} of {_rows_of_all(index)} rows match their checksums (a sample of {sample:g})" if sample is not None else None
    return {
        "kind": "store", "path": str(path), "verified": verified.files, "checked": checked, "bytes": total, "schema": index["schema"], "rows": rows,
        "coverage": index.get("coverage"), "dtype": index["dtype"], "augmentations": index["augmentations"], "seed": index.get("seed"),
        "teachers": [_teacher(index, t) for t in range(len(index["teachers"]))],
        "captions": captions.facts(rows), "layers": [_layer(index, n) for n in range(len(layers))], "parts": len(index["parts"]),
        "bytes_per_sample": {name: round(sizes[name] / rows, 1) for name in sorted(sizes, key=lambda name: -sizes[name])} | {"all": round(total / rows, 1)} if rows else {},
        "skipped": dict(Counter(str(entry.get("reason")) for entry in index.get("skipped", []) if isinstance(entry, dict)).most_common(5)),
        "columns": sorted(index["columns"]), "settings_sha256": index.get("settings_sha256"),
    }  # fmt: skip


def _role(array: str) -> str:
    if array.endswith((".embeddings", ".scales")):
        return "image embeddings" if array.startswith("image.") else "text embeddings"
    roles = {"augmentations": "parameters", "pair_rows": "keys", "n_captions": "captions", CHECKSUMS: "checksums"}
    return roles.get(array) or {"keys": "keys", "captions": "captions", "column": "columns"}.get(array.split(".")[0], "other")


def _rows_of_all(index: dict[str, Any]) -> int:
    return index["rows"] * len(index["layers"])


def _teacher(index: dict[str, Any], t: int) -> dict[str, Any]:
    layer = next(n for n, entry in enumerate(index["layers"]) if t in entry["teachers"])
    return {key: index["teachers"][t].get(key) for key in ("name", "dim", "logit_scale", "licence", "micro_batch")} | {"layer": layer}


def _layer(index: dict[str, Any], n: int) -> dict[str, Any]:
    entry = index["layers"][n]
    parts = [part for part in index["parts"] if part["layer"] == n]
    facts = {key: entry[key] for key in ("kind", "views", "teachers", "captioner", "seed", "settings_sha256") if entry.get(key) is not None}
    return {"number": n, **facts, "parts": len(parts), "bytes": sum(part["bytes"] for part in parts)}


class _CaptionCounts:
    """Stored captions by type, source and language, summed over parts."""

    def __init__(self, index: dict[str, Any]) -> None:
        self.names = {"types": list(CAPTION_TYPES), "sources": index["sources"], "languages": index["languages"]}
        self.counts = {field: np.zeros(len(names), np.int64) for field, names in self.names.items()}

    def add(self, part: Part) -> None:
        counts = part.get("n_captions")
        valid = np.arange(part.get("captions.types").shape[1]) < counts[:, None]
        for field, names in self.names.items():
            found = np.bincount(part.get(f"captions.{field}")[valid], minlength=len(names))
            if len(found) > len(names):
                raise StoreError(f"store part '{part.path.name}' has captions of {field[:-1]} {len(found) - 1}, the store knows {len(names)} {field}; reinforce again")
            self.counts[field] += found

    def facts(self, rows: int) -> dict[str, Any]:
        total = int(self.counts["types"].sum())
        by = {field[:-1]: {name: int(count) for name, count in zip(names, self.counts[field], strict=True) if count} for field, names in self.names.items()}
        return {"stored": total, "per_row": round(total / rows, 2) if rows else 0, **by}
