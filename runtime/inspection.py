"""What is this? Recognises the folders and files of the pipeline, checks their hashes and reports their facts."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runtime.errors import BundleError, CheckpointError, ClipError, PairsError


def inspect_path(path: str | os.PathLike[str], sample: float | None = None) -> dict[str, Any]:
    """Facts of a pairs folder, sample, store, checkpoint, bundle or results file.

    Where a manifest, index or receipt lists sha256 values, every listed file is hashed.

    Args:
        sample: of a store, compare this share of the rows of every part with their checksums instead; above 0, at most 1.

    Returns:
        JSON-ready {"kind", "path", "verified": number of files whose hash was compared, "bytes", …facts}.

    Raises:
        ClipError: nothing known, or damaged; the message says what was found.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix == ".jsonl":
            return _results(path)
        if path.suffix == ".zip":
            from runtime.bundle_zip import folder_of

            return {**bundle_facts(folder_of(path)), "path": str(path)}
        raise ClipError(f"{path} is a file of no known kind; expected a results file (*.jsonl), a bundle (*.zip) or a folder: pairs, sample, store, checkpoint or bundle")
    if not path.is_dir():
        raise ClipError(f"{path} does not exist; give a pairs folder, sample, store, checkpoint, bundle or results file")
    for marks, look in _KINDS:
        if any((path / mark).is_file() for mark in marks):
            return _store(path, sample) if look is _store else look(path)
    if any(path.glob("*.tar")):
        return _pairs(path)
    names = sorted(entry.name for entry in path.iterdir())
    found = f"it holds {', '.join(names[:5])}{' …' if len(names) > 5 else ''}" if names else "it is empty"
    raise ClipError(
        f"{path} is no folder of ours: {found}; expected *.tar (pairs), sample.json, index.json (store), config.json (checkpoint) or manifest.json (bundle)"
    )


def bundle_facts(path: Path) -> dict[str, Any]:
    """Facts of a bundle, every file verified. Raises BundleError."""
    from runtime.choice import choose
    from runtime.manifest import TOWERS, read_manifest

    manifest = read_manifest(path, verify=True)
    choice: dict[str, Any] = {}
    for tower in TOWERS:
        try:
            picked = choose(manifest, tower)
            choice[tower] = {"id": picked.id, "why": picked.why}
        except BundleError as error:
            choice[tower] = {"id": None, "why": str(error)}
    artefacts = [
        {
            "id": a.id,
            "tower": a.tower,
            "target": a.target,
            "precision": a.precision,
            "batch": a.batch,
            "status": a.status,
            "path": a.path,
            "bytes": a.bytes,
            "sha256": manifest.files[a.path].sha256 if a.path in manifest.files else None,
            "parity": a.parity,
            "threshold": a.cosine_threshold,
            "latency": a.latency,
            "reason": a.reason,
        }
        for a in manifest.artefacts
    ]
    return {
        "kind": "bundle",
        "path": str(path),
        "name": manifest.name,
        "verified": len(manifest.files),
        "bytes": sum(facts.bytes for facts in manifest.files.values()),
        "embed_dim": manifest.embed_dim,
        "image_size": manifest.image.image_size,
        "context_length": manifest.text.context_length,
        "loss": manifest.loss,
        "logit_scale": manifest.logit_scale,
        "languages": list(manifest.languages),
        "licences": list(manifest.licences),
        "choice": choice,
        "artefacts": artefacts,
        "provenance": manifest.provenance,
        "files": {name: {"sha256": facts.sha256, "bytes": facts.bytes} for name, facts in manifest.files.items()},
    }


def _store(path: Path, sample: float | None = None) -> dict[str, Any]:
    from runtime.store_facts import store_facts

    return store_facts(path, sample)


def _checkpoint(path: Path) -> dict[str, Any]:
    config = read_json(path / "config.json", CheckpointError)
    if not (path / "receipt.json").is_file():
        raise CheckpointError(f"{path} has no receipt.json: writing it was interrupted; run the stage that makes it again")
    receipt = read_json(path / "receipt.json", CheckpointError)
    files = receipt.get("files")
    if not isinstance(files, dict):
        raise CheckpointError(f"{path / 'receipt.json'} lists no files; write the checkpoint again")
    size = verify_files(path, files, CheckpointError, "receipt.json")
    weights = path / "model.safetensors"
    parameters = _count_parameters(weights) if weights.is_file() else None
    rest = {key: value for key, value in receipt.items() if key not in ("files", "kind", "schema")}
    return {
        "kind": "checkpoint",
        "path": str(path),
        "name": config.get("name"),
        "verified": len(files),
        "bytes": size,
        "parameters": parameters,
        "embed_dim": config.get("embed_dim"),
        "image": config.get("image"),
        "text": config.get("text"),
        "licence": config.get("licence"),
        "receipt": rest,
    }


def _count_parameters(path: Path) -> dict[str, int]:
    """Elements of all tensors, and of each tower's, from the header alone."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    except (OSError, ValueError, MemoryError, OverflowError) as error:
        raise CheckpointError(f"{path} has no readable safetensors header ({error}); write the checkpoint again") from error
    counts: Counter[str] = Counter()
    for name, tensor in header.items():
        if name != "__metadata__":
            elements = 1
            for length in tensor["shape"]:
                elements *= length
            counts["total"] += elements
            counts[name.split(".")[0]] += elements
    return dict(counts)


def _sample(path: Path) -> dict[str, Any]:
    receipt = read_json(path / "sample.json", PairsError)
    listed = {**receipt.get("shards", {}), **receipt.get("files", {})}
    size = verify_files(path, listed, PairsError, "sample.json")
    facts = {key: value for key, value in receipt.items() if key not in ("shards", "files", "kind")}
    return {"kind": "sample", "path": str(path), "sample": receipt.get("kind"), "verified": len(listed), "bytes": size, **facts}


def _pairs(path: Path) -> dict[str, Any]:
    from runtime.pairs import open_pairs

    pairs = open_pairs(path)
    verified = 0
    receipt = path.parent / "sample.json"
    if receipt.is_file():
        shards = read_json(receipt, PairsError).get("shards", {})
        own = {name: facts for name, facts in shards.items() if Path(name).parent.as_posix() == path.name}
        verify_files(path.parent, own, PairsError, "sample.json")
        verified = len(own)
    counts: Counter[str] = Counter()
    for row in range(len(pairs)):
        facts = pairs.meta(row)
        counts["without caption"] += not pairs.has_caption(row)
        for field in ("style", "slice", "noise"):
            if field in facts:
                counts[f"{field}: {facts[field]}"] += 1
    gallery = hashlib.sha256("\n".join(sorted(pairs.keys)).encode()).hexdigest()
    return {
        "kind": "pairs",
        "path": str(path),
        "verified": verified,
        "bytes": sum(shard.path.stat().st_size for shard in pairs.shards),
        "pairs": len(pairs),
        "keys_sha256": gallery,
        "shards": {shard.name: shard.stop - shard.start for shard in pairs.shards},
        "counts": {name: n for name, n in sorted(counts.items()) if n},
        "example": {"key": pairs.keys[0], "caption": pairs.caption(0) if pairs.has_caption(0) else None},
    }


def _results(path: Path) -> dict[str, Any]:
    kinds: Counter[str] = Counter()
    bundles: set[str] = set()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ClipError(f"{path} cannot be read as text ({type(error).__name__}); measure again") from error
    for number, text in enumerate(lines, 1):
        try:
            line = json.loads(text) if text.strip() else None
        except (ValueError, RecursionError) as error:
            raise ClipError(f"line {number} of {path} is not JSON ({str(error)[:120]}); remove that line and measure again") from error
        if line is None:
            continue
        if not isinstance(line, dict) or not isinstance(line.get("kind"), str) or "schema" not in line:
            raise ClipError(f"line {number} of {path} has no kind and schema; this is no results file of ours")
        kinds[line["kind"]] += 1
        if isinstance(line.get("bundle"), dict):
            bundles.add(f"{line['bundle'].get('name')} {str(line['bundle'].get('sha256'))[:12]}")
    return {
        "kind": "results",
        "path": str(path),
        "verified": 0,
        "bytes": path.stat().st_size,
        "lines": sum(kinds.values()),
        "kinds": dict(kinds),
        "bundles": sorted(bundles),
    }


_KINDS: list[tuple[tuple[str, ...], Callable[[Path], dict[str, Any]]]] = [
    (("manifest.json",), bundle_facts),
    (("index.json",), _store),
    (("config.json", "receipt.json"), _checkpoint),
    (("sample.json",), _sample),
]


def read_json(path: Path, error_class: type[ClipError]) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise error_class(f"{path} cannot be read as JSON ({type(error).__name__}); write it again") from error
    if not isinstance(value, dict):
        raise error_class(f"{path} holds a {type(value).__name__}, expected one JSON object")
    return value


def verify_files(folder: Path, listed: dict[str, Any], error_class: type[ClipError], by: str) -> int:
    """Hash the listed files (relative path -> {"sha256", "bytes"?}); returns the sum of their sizes."""
    total = 0
    for name, facts in listed.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise error_class(f"{folder / by} names '{name}', which leaves the folder; it is not to be trusted")
        if not isinstance(facts, dict) or not isinstance(facts.get("sha256"), str):
            raise error_class(f"{folder / by} has no sha256 for '{name}'; write it again")
        if not path.is_file():
            raise error_class(f"{path} is listed in {by} but missing; run the stage that makes it again")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != facts["sha256"]:
            raise error_class(f"{path} was changed: its sha256 is {digest[:12]}…, {by} says {facts['sha256'][:12]}…; run the stage that makes it again")
        total += path.stat().st_size
    return total
