"""index.json of a reinforcement store: its layers and parts, checked before anything is believed. Format: docs/store-format.md (normative).

A store is a stack of layers. Layer 0 holds the rows; every later one adds views, captions or teachers to all of them, in files of its own.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.errors import StoreError

SCHEMA = 2
INDEX = "index.json"
KINDS = ("rows", "augmentations", "captions", "teachers")
DTYPES = ("int8", "float32", "float16", "bfloat16", "int4")
MOST_LAYERS = 999
"""Later layers have one to three digits in their files' names, parts at least four: the two cannot be confused."""

_SHARD = re.compile(r"(?!\.\.?$)[^/\\\0]+")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """What one layer adds. views: the run-on numbers of the views whose vectors (and, unless it adds teachers, parameters) it holds."""

    number: int
    kind: str
    views: range
    teachers: range

    @property
    def adds_captions(self) -> bool:
        return self.kind in ("rows", "captions")

    @property
    def adds_views(self) -> bool:
        return self.kind in ("rows", "augmentations")


def read_index(folder: Path) -> dict[str, Any]:
    """index.json, checked for schema and everything that a reader relies on. Raises StoreError."""
    path = folder / INDEX
    if not path.is_file():
        raise StoreError(f"'{folder}' is not a finished store: it has no {INDEX}; run mclip reinforce (again, it continues)")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(f"'{path}' is not JSON ({error}); reinforce again") from None
    check_index(index, f"'{path}'")
    return index


def check_index(index: Any, name: str) -> None:
    """Schema, types of fields, dtype, teachers, layers, and one part of every layer for every part of layer 0. Raises StoreError."""
    if not isinstance(index, dict) or index.get("schema") != SCHEMA or index.get("kind") != "store":
        found = f"schema {index.get('schema')!r}" if isinstance(index, dict) else f"a {type(index).__name__} instead of an object"
        raise StoreError(f"{name} has {found}, this release reads store schema {SCHEMA}; update it, or reinforce again")
    kinds = {"teachers": list, "parts": list, "layers": list, "rows": int, "augmentations": int, "dtype": str, "sources": list, "languages": list, "columns": dict}
    wrong = [field for field, kind in kinds.items() if not _is(index.get(field), kind)]
    wrong += [field for field, kind in (("skipped", list), ("coverage", dict), ("shards", dict)) if field in index and not _is(index[field], kind)]
    wrong += [field for field in ("sources", "languages") if field not in wrong and not all(isinstance(item, str) for item in index[field])]
    if wrong or index["dtype"] not in DTYPES:
        raise StoreError(f"{name} has unusable fields: {', '.join(wrong) or 'dtype'}; reinforce again")
    _check_teachers(index["teachers"], name)
    layers = layers_of(index, name)
    for column, facts in index["columns"].items():
        if not isinstance(facts, dict) or not _is(facts.get("layer", 0), int) or not 0 <= facts.get("layer", 0) < len(layers):
            raise StoreError(f"{name} declares the column '{column}' without a layer that exists; reinforce again")
    _check_parts(index, layers, name)


def _is(value: Any, kind: type) -> bool:
    """Whether a field has its type; integers are counts, so neither booleans nor negative."""
    return isinstance(value, kind) and not (isinstance(value, bool) or (isinstance(value, int) and value < 0))


def _check_teachers(teachers: list[Any], name: str) -> None:
    names = set()
    for n, facts in enumerate(teachers):
        usable = isinstance(facts, dict) and isinstance(facts.get("name"), str) and _is(facts.get("dim"), int) and facts["dim"] >= 1
        scale: Any = facts.get("logit_scale") if usable else None
        if not isinstance(scale, (int, float)) or isinstance(scale, bool) or not math.isfinite(scale) or scale <= 0:
            raise StoreError(f"{name} has an unusable teacher (number {n}: {json.dumps(facts)[:80]}); expected a name, dim >= 1, a positive scale, reinforce again")
        names.add(facts["name"])
    if len(names) != len(teachers):
        raise StoreError(f"{name} has two teachers of one name; names tell them apart, reinforce again")


def layers_of(index: dict[str, Any], name: str = INDEX) -> list[Layer]:
    """The layers, in order. Views, captions and teachers must follow on one another without a gap or an overlap. Raises StoreError."""
    layers: list[Layer] = []
    views = teachers = 0
    for n, entry in enumerate(index["layers"]):
        kind = entry.get("kind") if isinstance(entry, dict) else None
        if kind not in KINDS or (n == 0) != (kind == "rows"):
            raise StoreError(f"{name}: layer {n} is of kind {kind!r}; this release reads one layer 'rows', then {', '.join(KINDS[1:])}: update it or reinforce again")
        own, span = _follow_on(entry, views, teachers)
        if entry.get("number") != n or not own or entry.get("teachers") != list(own) or entry.get("views") != span or (span and span[0] >= span[1]):
            raise StoreError(
                f"{name}: layer {n} ({kind}) says number {entry.get('number')}, views {entry.get('views')} and teachers {entry.get('teachers')}, which do not "
                f"follow on {views} views and {teachers} teachers; layers must neither overlap nor leave a gap, reinforce again"
            )
        layers.append(Layer(number=n, kind=kind, views=range(*span) if span else range(0), teachers=own))
        views, teachers = max(views, layers[-1].views.stop), max(teachers, own.stop)
    if not 1 <= len(layers) <= MOST_LAYERS + 1 or views != index["augmentations"] or teachers != len(index["teachers"]):
        raise StoreError(
            f"{name} has {len(layers)} layers with {views} views and {teachers} teachers, but says {index['augmentations']} views and lists "
            f"{len(index['teachers'])} teachers; reinforce again"
        )
    return layers


def _follow_on(entry: dict[str, Any], views: int, teachers: int) -> tuple[range, list[int] | None]:
    """Teachers and views that a layer must have, after so many of both; how many it adds is its own to say."""
    kind, said = entry["kind"], entry.get("views")
    count = len(entry["teachers"]) if isinstance(entry.get("teachers"), list) else 0
    stop = said[1] if isinstance(said, list) and len(said) == 2 and _is(said[1], int) else 0
    if kind == "rows":
        return range(count), [0, stop]
    if kind == "teachers":
        return range(teachers, teachers + count), [0, views]
    return range(teachers), [views, stop] if kind == "augmentations" else None


def layer_part_name(base: str, layer: int) -> str:
    """File name of the part of a later layer, from its base part's: SHARD.PPPP.safetensors -> SHARD.PPPP.L.safetensors."""
    return f"{base.removesuffix('.safetensors')}.{layer}.safetensors"


def parts_by_layer(index: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """Per base part, in pairs order, its entries in `parts`: one a layer. The index must have been checked."""
    listed = {entry["path"]: entry for entry in index["parts"]}
    base = [entry for entry in index["parts"] if entry["kind"] == "rows"]
    return [[entry, *(listed[layer_part_name(entry["path"], n)] for n in range(1, len(index["layers"])))] for entry in base]


def _check_parts(index: dict[str, Any], layers: list[Layer], name: str) -> None:
    facts = {"path": str, "kind": str, "layer": int, "rows": int, "bytes": int, "sha256": str, "keys_sha256": str}
    listed: dict[str, dict[str, Any]] = {}
    for n, entry in enumerate(index["parts"]):
        wrong = [field for field, kind in facts.items() if not _is(entry.get(field), kind)] if isinstance(entry, dict) else ["not an object"]
        wrong += [field for field in ("sha256", "keys_sha256") if not wrong and not _SHA256.fullmatch(entry[field])]
        if wrong:
            raise StoreError(f"{name} has unusable fields: parts[{n}] ({', '.join(wrong)}); reinforce again")
        path = entry["path"]
        if not path or path.startswith(".") or "/" in path or "\\" in path or "\0" in path:
            raise StoreError(f"{name} names the part '{path}', which lies outside the store; the index is not to be trusted")
        if not _SHARD.fullmatch(str(entry.get("shard", "-"))):
            raise StoreError(f"{name} has a part of the shard {str(entry['shard'])[:80]!r}, which is no plain name; the index is not to be trusted")
        if entry["kind"] not in KINDS:
            raise StoreError(f"{name} has a part of kind '{entry['kind']}', this release reads {', '.join(KINDS)}; update it or reinforce again")
        if entry["layer"] >= len(layers) or layers[entry["layer"]].kind != entry["kind"] or path in listed or not path.endswith(".safetensors"):
            raise StoreError(f"{name} lists the part '{path}' of kind '{entry['kind']}' in layer {entry['layer']}, where it does not belong; reinforce again")
        listed[path] = entry
    base = [entry for entry in index["parts"] if entry["layer"] == 0]
    for layer in layers[1:]:
        for entry in base:
            found = listed.pop(layer_part_name(entry["path"], layer.number), None)
            if found is None or found["layer"] != layer.number:
                raise StoreError(f"{name} lacks the part '{layer_part_name(entry['path'], layer.number)}' of layer {layer.number}; append that layer again")
            if (found["rows"], found["keys_sha256"]) != (entry["rows"], entry["keys_sha256"]):
                raise StoreError(f"{name}: part '{found['path']}' has other keys than its base part '{entry['path']}'; append layer {layer.number} again")
    if len(listed) != len(base):
        stray = next(path for path in listed if listed[path]["layer"] != 0)
        raise StoreError(f"{name} lists the part '{stray}', which belongs to no base part; reinforce again")
    if sum(entry["rows"] for entry in base) != index["rows"]:
        raise StoreError(f"{name} says {index['rows']} rows, its parts have {sum(entry['rows'] for entry in base)}; reinforce again")
