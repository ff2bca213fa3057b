"""The bundle's manifest: what every file is, its hash, and how near each artefact comes to its checkpoint.

`docs/bundle-format.md` is the normative text; this module reads and writes it. Every byte of a bundle is covered: the
files by their sha256 in the manifest, the manifest by its own `manifest_sha256`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from runtime.bundle_files import MANIFEST, artefact_files, hash_file, verify_files, walk_files
from runtime.errors import BundleError, CheckpointError
from runtime.files import write_whole
from runtime.preprocess import PreprocessConfig

SCHEMA = 1
TOWERS = ("image", "text")
STATUSES = ("proven", "refused", "unproven", "failed")
LOSSES = ("softmax", "sigmoid")
MASKS = ("causal", "pad", "none")
# Least cosine to the checkpoint's fp32 embedding over all inputs tried; an artefact may carry its own.
COSINE_MIN = {"fp32": 0.99999, "fp16": 0.999, "mixed": 0.999, "bf16": 0.99, "int8": 0.9}
# An artefact that changes recall@1 by less than this (when it was measured) is good enough to be picked for its speed.
RECALL1_CHANGE_MIN = -0.02
MOST_BYTES = 16 * 1024 * 1024
_PARITY = ("cosine_min", "cosine_p1", "cosine_mean", "max_abs", "rank_agreement", "recall1_change", "n")


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageSpec:
    """How pictures become input, and what the image tower's tensors are called."""

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    resize: str = "shortest"
    crop: str = "center"
    crop_pct: float = 1.0
    input: str = "image"
    output: str = "image_embedding"

    def preprocess_config(self) -> PreprocessConfig:
        """The same as settings of `runtime.preprocess`."""
        return PreprocessConfig(image_size=self.image_size, mean=self.mean, std=self.std, interpolation=self.interpolation, crop_pct=self.crop_pct)


@dataclass(frozen=True, kw_only=True, slots=True)
class TextSpec:
    """How texts become input, and what the text tower's tensors are called."""

    context_length: int
    vocab_size: int
    pad_id: int = 0
    mask: str = "causal"
    cleaning: str = "clip"
    input: str = "tokens"
    output: str = "text_embedding"


@dataclass(frozen=True, kw_only=True, slots=True)
class Artefact:
    """One tower for one target in one precision.

    status: "proven"; "refused" (a reason, no file); "unproven" (a file, and why nothing could be shown about it, for instance int8 of an untrained
    tower); "failed" (a file that was kept although it is not what the checkpoint computes). Only what is proven is ever picked.

    Attributes:
        batch: "dynamic" or the fixed batch size as a string.
        path: file or package folder inside the bundle; None when refused.
        parity: figures against the checkpoint in fp32 (cosine_min, cosine_p1, cosine_mean, max_abs, rank_agreement,
            recall1_change, n); further keys are kept.
        bytes: size of its file, or of all files of its package; `write_manifest` fills it in.
        latency: measured figures; `p50_ms` (one input, batch 1) decides which artefact `runtime.load` picks.
        threshold: least `cosine_min`; None = `COSINE_MIN` of the precision.
        facts: what its converter or compiler said: layers, partitions, versions.
        any_length: a text graph that takes rows of fewer tokens than `context_length`, and gives the same for them.
    """

    id: str
    tower: str
    target: str
    precision: str
    batch: str = "dynamic"
    path: str | None
    status: str = "proven"
    reason: str | None = None
    parity: dict[str, Any] | None = None
    bytes: int | None = None
    latency: dict[str, Any] | None = None
    threshold: float | None = None
    facts: dict[str, Any] | None = None
    any_length: bool = False

    @property
    def cosine_threshold(self) -> float:
        """The least cosine to the checkpoint that this artefact must keep on every input."""
        return COSINE_MIN.get(self.precision, 0.9) if self.threshold is None else self.threshold

    @property
    def p50_ms(self) -> float:
        """Measured median latency in milliseconds, infinite where none was recorded."""
        value = (self.latency or {}).get("p50_ms")
        return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else math.inf


@dataclass(frozen=True, kw_only=True, slots=True)
class FileFacts:
    """sha256 (hex) and size of a file."""

    sha256: str
    bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The whole of `manifest.json`. `files` is filled by `write_manifest`.

    Attributes:
        calibration: how probable a match is, as `runtime.matching` reads it; None: not fitted.
        classes: class tables that travel along: [{"name", "path", "n"}].
    """

    name: str
    embed_dim: int
    image: ImageSpec
    text: TextSpec
    loss: str = "softmax"
    logit_scale: float
    logit_bias: float | None = None
    languages: tuple[str, ...] = ("en",)
    artefacts: tuple[Artefact, ...]
    golden: dict[str, Any] = field(default_factory=dict)
    licences: tuple[Any, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] | None = None
    classes: tuple[Any, ...] = ()
    files: dict[str, FileFacts] = field(default_factory=dict)
    schema: int = SCHEMA

    def artefact(self, id: str) -> Artefact:
        """The artefact of this id. Raises BundleError when there is none."""
        for artefact in self.artefacts:
            if artefact.id == id:
                return artefact
        raise BundleError(f"the bundle '{self.name}' has no artefact '{id}'; it has {', '.join(a.id for a in self.artefacts)}")


def read_manifest(folder: str | os.PathLike[str], verify: bool = True) -> Manifest:
    """Read `manifest.json` of a bundle.

    Args:
        folder: the bundle.
        verify: also hash every file of the bundle. Without it the manifest alone is checked (its own hash included),
            and whoever opens a file uses `read_file`, which checks that one.

    Raises:
        BundleError: one sentence on the first thing that is wrong: no manifest, damaged, another schema, a missing
            field, a path that leaves the bundle, a file that is missing, changed or not listed.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    try:
        if path.stat().st_size > MOST_BYTES:
            raise BundleError(f"{path} has {path.stat().st_size} bytes, expected at most {MOST_BYTES}; it is no manifest")
        raw = path.read_bytes()
    except OSError as error:
        what = "there is no such folder" if not folder.is_dir() else f"it has no readable {MANIFEST} ({error.strerror or error})"
        raise BundleError(f"{folder} is not a bundle: {what}; make one with 'mclip export'") from error
    manifest = parse_manifest(raw, path)
    if verify:
        verify_files(folder, manifest)
    return manifest


def write_manifest(folder: str | os.PathLike[str], manifest: Manifest) -> Manifest:
    """Hash every file of the folder and write `manifest.json` over it, atomically: the last step of making a bundle.

    Returns:
        The manifest with `files` as written.

    Raises:
        BundleError: the manifest contradicts itself or the folder.
    """
    folder = Path(folder)
    files = {name: FileFacts(sha256=hash_file(folder / name), bytes=(folder / name).stat().st_size) for name in sorted(walk_files(folder))}
    artefacts = tuple(replace(a, bytes=sum(files[name].bytes for name in artefact_files(a, files)) if a.path else None) for a in manifest.artefacts)
    manifest = replace(manifest, files=files, artefacts=artefacts)
    document = {key: value for key, value in asdict(manifest).items()}
    document["manifest_sha256"] = "0" * 64
    try:
        raw = (json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise BundleError(f"the manifest of {folder} cannot be written as JSON ({error}); give plain finite values") from error
    zeros = b'"manifest_sha256": "' + b"0" * 64 + b'"'
    raw = raw.replace(zeros, zeros.replace(b"0" * 64, hashlib.sha256(raw).hexdigest().encode()))
    written = parse_manifest(raw, folder / MANIFEST)
    # The part stands outside the bundle: left over by a kill, it would be a stranger there.
    write_whole(folder / MANIFEST, raw, part=folder.parent / f".{folder.name}.{os.getpid()}.manifest.part")
    return written


def parse_manifest(raw: bytes, path: Path) -> Manifest:
    """The manifest of these bytes, checked against its own hash; `path` is what messages call it. Raises BundleError."""
    if len(raw) > MOST_BYTES:
        raise BundleError(f"{path} has more than {MOST_BYTES} bytes; it is no manifest")
    try:
        document = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not the JSON of a manifest ({error}); fetch or export the bundle again") from error
    reader = _Reader(path)
    if not isinstance(document, dict):
        raise BundleError(f"{path} holds a {type(document).__name__}, expected one JSON object")
    schema = reader.take(document, "schema", int)
    if schema != SCHEMA:
        raise BundleError(f"{path} has schema {schema}, this version reads schema {SCHEMA}; upgrade, or export the bundle again")
    digest = reader.take(document, "manifest_sha256", str)
    quoted = b'"' + digest.encode() + b'"'
    if raw.count(quoted) != 1 or hashlib.sha256(raw.replace(quoted, b'"' + b"0" * 64 + b'"')).hexdigest() != digest:
        raise BundleError(f"{path} was changed: it does not match its own manifest_sha256; fetch or export the bundle again")
    try:
        manifest = _manifest(document, reader)
        manifest.image.preprocess_config()
    except CheckpointError as error:
        raise BundleError(f"{path}: 'image' is unusable: {error}") from error
    _check(manifest, path)
    return manifest


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name comes twice in one object")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


class _Reader:
    """Takes typed fields out of JSON objects; what is wrong becomes one BundleError."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def take(self, owner: dict[str, Any], name: str, kind: Any, where: str = "") -> Any:
        if name not in owner:
            raise BundleError(f"{self.path} lacks the field '{where}{name}'; export the bundle again")
        value = owner[name]
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if float in kinds and type(value) is int:
            value = float(value)
        if type(value) not in kinds:
            expected = " or ".join("null" if k is _NULL else k.__name__ for k in kinds)
            raise BundleError(f"{self.path}: the field '{where}{name}' is {json.dumps(value)[:60]}, expected {expected}")
        return value

    def triple(self, owner: dict[str, Any], name: str, where: str) -> tuple[float, float, float]:
        values = self.take(owner, name, list, where)
        if len(values) != 3 or any(type(v) not in (int, float) for v in values):
            raise BundleError(f"{self.path}: the field '{where}{name}' is {json.dumps(values)[:60]}, expected three numbers")
        return (float(values[0]), float(values[1]), float(values[2]))


_NULL = type(None)


def _manifest(document: dict[str, Any], reader: _Reader) -> Manifest:
    take = reader.take
    image, text = take(document, "image", dict), take(document, "text", dict)
    artefacts = []
    for n, entry in enumerate(take(document, "artefacts", list)):
        if not isinstance(entry, dict):
            raise BundleError(f"{reader.path}: artefacts[{n}] is no object")
        artefacts.append(_artefact(entry, reader, f"artefacts[{n}]."))
    files = {}
    for name, entry in take(document, "files", dict).items():
        if not isinstance(entry, dict):
            raise BundleError(f"{reader.path}: files['{name}'] is no object")
        where = f"files['{name}']."
        files[name] = FileFacts(sha256=take(entry, "sha256", str, where), bytes=take(entry, "bytes", int, where))
    return Manifest(
        name=take(document, "name", str),
        embed_dim=take(document, "embed_dim", int),
        image=ImageSpec(
            image_size=take(image, "image_size", int, "image."),
            mean=reader.triple(image, "mean", "image."),
            std=reader.triple(image, "std", "image."),
            crop_pct=take(image, "crop_pct", float, "image."),
            **{key: take(image, key, str, "image.") for key in ("interpolation", "resize", "crop", "input", "output")},
        ),
        text=TextSpec(
            **{key: take(text, key, int, "text.") for key in ("context_length", "vocab_size", "pad_id")},
            **{key: take(text, key, str, "text.") for key in ("mask", "cleaning", "input", "output")},
        ),
        loss=take(document, "loss", str),
        logit_scale=take(document, "logit_scale", float),
        logit_bias=take(document, "logit_bias", (float, _NULL)),
        languages=tuple(take(document, "languages", list)),
        artefacts=tuple(artefacts),
        golden=take(document, "golden", dict),
        licences=tuple(take(document, "licences", list)),
        provenance=take(document, "provenance", dict),
        calibration=take({"calibration": None, **document}, "calibration", (dict, _NULL)),
        classes=tuple(take({"classes": [], **document}, "classes", list)),
        files=files,
    )


def _artefact(entry: dict[str, Any], reader: _Reader, where: str) -> Artefact:
    optional = {"threshold": None, "facts": None, "any_length": False, **entry}
    return Artefact(
        **{key: reader.take(entry, key, str, where) for key in ("id", "tower", "target", "precision", "batch", "status")},
        **{key: reader.take(entry, key, (str, _NULL), where) for key in ("path", "reason")},
        **{key: reader.take(entry, key, (dict, _NULL), where) for key in ("parity", "latency")},
        bytes=reader.take(entry, "bytes", (int, _NULL), where),
        threshold=reader.take(optional, "threshold", (float, _NULL), where),
        facts=reader.take(optional, "facts", (dict, _NULL), where),
        any_length=reader.take(optional, "any_length", bool, where),
    )


def _check(manifest: Manifest, path: Path) -> None:
    """What types alone do not say."""

    def must(good: bool, message: str) -> None:
        if not good:
            raise BundleError(f"{path}: {message}")

    for what, value, most in (("embed_dim", manifest.embed_dim, 2**16), ("context_length", manifest.text.context_length, 2**16), ("vocab_size", manifest.text.vocab_size, 2**24)):
        must(value <= most, f"{what} is {value}, expected at most {most}")
    for name, facts in manifest.files.items():
        must(_inside(name), f"the path {name!r} may not leave the bundle; expected plain relative names with '/'")
        must(len(facts.sha256) == 64 and set(facts.sha256) <= set("0123456789abcdef"), f"the sha256 of '{name}' is not 64 lower-case hex digits")
        must(facts.bytes >= 0, f"the size of '{name}' is negative")
    must(manifest.embed_dim > 0, f"embed_dim is {manifest.embed_dim}, expected at least 1")
    must(manifest.image.resize == "shortest", f"image.resize is '{manifest.image.resize}', this version knows 'shortest'")
    must(manifest.image.crop == "center", f"image.crop is '{manifest.image.crop}', this version knows 'center'")
    must(0 <= manifest.text.pad_id < manifest.text.vocab_size, f"text.pad_id {manifest.text.pad_id} lies outside the vocabulary of {manifest.text.vocab_size}")
    must(manifest.text.context_length > 0, f"text.context_length is {manifest.text.context_length}, expected at least 1")
    must(manifest.text.mask in MASKS, f"text.mask is '{manifest.text.mask}', expected one of {', '.join(MASKS)}")
    must(manifest.text.cleaning in ("clip", "none"), f"text.cleaning is '{manifest.text.cleaning}', expected clip or none")
    must(manifest.loss in LOSSES, f"loss is '{manifest.loss}', expected one of {', '.join(LOSSES)}")
    must(math.isfinite(manifest.logit_scale) and manifest.logit_scale > 0, f"logit_scale is {manifest.logit_scale}, expected above 0")
    texts = any(artefact.tower == "text" for artefact in manifest.artefacts)
    must("tokenizer.json" in manifest.files or not texts, "no tokenizer.json is listed; a bundle with a text tower carries its tokenizer")
    ids = [artefact.id for artefact in manifest.artefacts]
    must(len(set(ids)) == len(ids), "two artefacts share an id")
    for artefact in manifest.artefacts:
        _check_artefact(artefact, manifest, must)


def _check_artefact(artefact: Artefact, manifest: Manifest, must: Callable[[bool, str], None]) -> None:
    name = f"artefact '{artefact.id}'"
    must(artefact.tower in TOWERS, f"{name} is of tower '{artefact.tower}', expected image or text")
    must(
        artefact.batch == "dynamic" or (artefact.batch.isdecimal() and int(artefact.batch) > 0),
        f"{name} has batch '{artefact.batch}', expected dynamic or a number",
    )
    must(not artefact.any_length or (artefact.tower == "text" and manifest.text.mask != "none"), f"{name} has any_length, which only a masked text tower can have")
    must(artefact.status in STATUSES, f"{name} has status '{artefact.status}', expected one of {', '.join(STATUSES)}")
    must(artefact.status == "proven" or bool(artefact.reason), f"{name} is {artefact.status}, so it must have a reason")
    if artefact.status == "refused":
        must(artefact.path is None, f"{name} is refused, so it has no path")
        return
    if artefact.path is None or not _inside(artefact.path):
        must(False, f"{name} is {artefact.status}, so it needs a path inside the bundle, not {artefact.path!r}")
        return
    parts = artefact_files(artefact, manifest.files)
    must(bool(parts), f"{name} names '{artefact.path}', which is not among the files")
    size = sum(manifest.files[part].bytes for part in parts)
    must(artefact.bytes == size, f"{name} says it has {artefact.bytes} bytes, its files have {size}")
    if artefact.status != "proven":
        return
    cosine = (artefact.parity or {}).get("cosine_min")
    must(type(cosine) in (int, float), f"{name} is proven, so its parity needs the field 'cosine_min'")


def _inside(name: str) -> bool:
    """Whether a name is a plain relative path that no operating system takes elsewhere."""
    parts = PurePosixPath(name).parts
    return bool(parts) and "/".join(parts) == name and not name.startswith("/") and not {".", ".."} & set(parts) and not set(name) & set("\\:\0\n\r")
