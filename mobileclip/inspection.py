"""`mclip inspect`: what a path is. Weights of MobileCLIP models in any layout are recognised here, everything else by the SDK.

Names and shapes tell the layout and the architecture, so nobody has to say which model a file is. torch is loaded for pickles
only.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from mobileclip.safetensors_header import Entry
from mobileclip.weights import find_weights, weight_entries, weights_candidates
from runtime.errors import CheckpointError

# What lies in a folder of the pipeline; such a folder is the SDK's to inspect even if weights lie beside.
_PIPELINE = ("manifest.json", "index.json", "sample.json")

_TOWERS = {"image": ("image.", "image_encoder.", "visual."), "text": ("text.", "text_encoder.")}
_BUFFERS = (".running_mean", ".running_var", ".num_batches_tracked", "attn_mask", "position_ids")


def main(argv: list[str]) -> int:
    """`mclip inspect PATH [--sample SHARE] [--json]`. Raises ClipError when the path is nothing known, or damaged."""
    from runtime.shell import inspect

    return inspect(argv, look=facts_of)


def facts_of(path: str, sample: float | None = None) -> dict[str, Any]:
    """JSON-ready facts of any path: weights, or what `runtime.inspection.inspect_path` knows (`sample` as there).

    Raises:
        ClipError: nothing known, or damaged; the message says what was found.
    """
    place = Path(path)
    if place.is_file() and place.suffix != ".jsonl":
        return {"kind": "weights", "path": str(place), "verified": 0, "bytes": place.stat().st_size, **weights_facts(place)}
    if place.is_dir() and _holds_weights(place):
        return _folder(place)
    from runtime.inspection import inspect_path

    return inspect_path(place, sample)


def weights_facts(path: Path) -> dict[str, Any]:
    """Layout, model, size and preprocessing of a weights file, from its names and shapes.

    A file of another model has null as layout and model, and `unrecognised` says why.

    Raises:
        CheckpointError: no weights file, or damaged.
        MissingExtraError: it is a torch pickle and torch is not installed.
    """
    from mobileclip.layouts import best_name, recognise
    from mobileclip.presets import PRESETS

    entries = weight_entries(path)
    size = {"tensors": len(entries), "dtypes": dict(Counter(entry.dtype for entry in entries.values()).most_common())}
    try:
        found = recognise({name: entry.shape for name, entry in entries.items()}, f"'{path}'")
    except CheckpointError as error:
        return {"layout": None, "model": None, **size, "parameters": count_parameters(entries, ""), "unrecognised": str(error)}
    facts = {"layout": found.layout, "model": None, "names": list(found.names), "folded": found.folded, **size}
    facts["parameters"] = count_parameters(entries, found.layout)
    if not found.names:
        return facts
    config = PRESETS[best_name(found, _hints(path))]
    image, text = config.image, config.text
    facts |= {
        "model": config.name,
        "embed_dim": config.embed_dim,
        "preprocessing": {
            "image_size": image.image_size, "mean": list(image.mean), "std": list(image.std), "interpolation": image.interpolation, "crop_pct": image.crop_pct,
        },
        "licence": config.licence,
        "sources": list(config.sources),
    }  # fmt: skip
    if len(found.names) > 1:
        facts["note"] = f"{', '.join(found.names)} have the same tensors; only names tell them apart: a receipt's, the file's, timm's tag, the folders'"
    if found.layout != "timm":
        facts |= {"context_length": text.context_length, "vocabulary": text.vocab_size, "text_mask": text.mask, "text_pool": text.pool}
    return facts


def count_parameters(entries: dict[str, Entry], layout: str) -> dict[str, int]:
    """Trained values of the whole and of each tower; running statistics and masks are not counted. timm's layout is an image tower."""
    counts: Counter[str] = Counter()
    for name, entry in entries.items():
        if name.endswith(_BUFFERS):
            continue
        elements = math.prod(entry.shape)
        counts["total"] += elements
        for tower, beginnings in _TOWERS.items():
            if name.startswith(beginnings) or (layout == "timm" and tower == "image"):
                counts[tower] += elements
    return {part: counts[part] for part in ("image", "text", "total") if counts[part]}


def _holds_weights(folder: Path) -> bool:
    """Whether a folder is one of weights: written by `mclip convert`, or in the form of a hub's repository."""
    names = {entry.name for entry in folder.iterdir()}
    if names & {*_PIPELINE} or any(name.endswith(".tar") for name in names):
        return False
    if "receipt.json" in names:
        from runtime.inspection import read_json

        return read_json(folder / "receipt.json", CheckpointError).get("kind") == "weights"
    # A config.json with a schema number is ours, and without a receipt it was interrupted: the SDK says so.
    return "schema" not in _json(folder / "config.json") and bool(weights_candidates(name for name in names if (folder / name).is_file()))


def _folder(folder: Path) -> dict[str, Any]:
    """Facts of a folder of weights; the hashes of its receipt are verified where there is one."""
    from runtime.inspection import verify_files

    receipt = _json(folder / "receipt.json")
    verified, rest = 0, {}
    if receipt:
        files = receipt.get("files")
        if not isinstance(files, dict):
            raise CheckpointError(f"'{folder / 'receipt.json'}' lists no files; convert the weights again")
        verify_files(folder, files, CheckpointError, "receipt.json")
        verified, rest = len(files), {key: value for key, value in receipt.items() if key not in ("files", "kind", "schema")}
    path = find_weights(folder)
    size = sum(entry.stat().st_size for entry in folder.iterdir() if entry.is_file())
    facts = {"kind": "weights", "path": str(folder), "verified": verified, "bytes": size, "file": path.name}
    return facts | weights_facts(path) | ({"receipt": rest} if rest else {})


def _hints(path: Path) -> list[str]:
    """What may name the model, the most telling first: a receipt, the file's name, timm's tag, the folders (the hub's cache has the repository's name)."""
    path = path.absolute()
    receipt, config = _json(path.with_name("receipt.json")), _json(path.with_name("config.json"))
    tag = config["pretrained_cfg"].get("tag") if isinstance(config.get("pretrained_cfg"), dict) else None
    return [hint for hint in (receipt.get("model"), path.name, tag, *reversed(path.parts[1:-1])) if isinstance(hint, str)]


def _json(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where there is none."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
