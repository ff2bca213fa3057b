"""Adding to a finished store: more views, more captions or further teachers, as a layer of parts beside those that are there.

Nothing that is there is touched. A layer becomes visible when the index that names it is written, at the end; until then the store is
what it was. An addition that was interrupted is continued by the same command. What a view is depends on seed, key and its number alone,
so five views and five added later have the parameters of ten.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill import augment
from distill.augment import AugmentSpec
from distill.engines import Engine
from distill.layer_worker import embed_layer
from distill.reinforce_captions import caption_facts
from distill.reinforce_plan import scan
from distill.reinforce_state import INDEX, WORK, hash_of
from distill.reinforce_tasks import LayerTask, ShardScan
from distill.reinforce_worker import describe_teachers, said_plainly
from distill.remote import ShardPlace
from distill.store import TeacherFacts
from distill.store_writing import next_layer, write_index
from runtime.errors import StoreError
from runtime.files import write_json
from runtime.store_index import layer_part_name, parts_by_layer, read_index

if TYPE_CHECKING:
    from distill.reinforce import ReinforceConfig

logger = logging.getLogger(__name__)


def append(config: ReinforceConfig, folder: Path, places: list[ShardPlace], engine: Engine) -> dict[str, Any]:
    """Add one layer to the store and return its index. What is there already (the same captions, the same teachers) is not added twice.

    Raises:
        StoreError: the store is not finished, belongs to other pairs, other teachers are given than it has, or another addition was begun.
    """
    started = time.monotonic()
    if "://" in config.store:
        raise StoreError(f"'{config.store}' lies elsewhere, and a store is added to where it lies on a disk; copy it here, add, and copy it back")
    index = read_index(folder)
    check_origin(index, config)
    scans = scan(places, folder / WORK, config.add_captions, engine)
    check_pairs(index, scans, config)
    if config.add_augmentations:
        spec_of(index["augmentation"])
    if config.add_captions:
        facts = caption_facts(config.add_captions)
        known = [layer.get("captioner") for layer in index["layers"] if layer.get("captioner")]
        if any(there.get("sha256") == facts["sha256"] for there in known):
            logger.info("the captions '%s' are in the store already", config.add_captions)
            return index
        settings = _settings(index, "captions", captioner=facts, tables=_longer_tables(index, scans), given=config.add_captions)
    given: list[TeacherFacts] = engine.submit(describe_teachers).result()
    if config.add_teachers:
        if {fact.sha256 or fact.name for fact in given} <= {fact["sha256"] or fact["name"] for fact in index["teachers"]}:
            logger.info("the teachers %s are in the store already", ", ".join(fact.name for fact in given))
            return index
        settings = _settings(index, "teachers", teachers=_named_apart(given, index), given=list(config.add_teachers))
    else:
        check_teachers(index, given)
    if config.add_augmentations:
        settings = _settings(index, "augmentations", views=[index["augmentations"], index["augmentations"] + config.add_augmentations])
    layer = len(index["layers"])
    _claim(folder, layer, settings)
    return _make(config, folder, index, layer, settings, places, engine, started)


def repair(config: ReinforceConfig, folder: Path, places: list[ShardPlace], engine: Engine) -> dict[str, Any]:
    """Make damaged or missing parts of later layers again. The engine's workers hold all teachers of the store, in its order."""
    index = read_index(folder)
    check_teachers(index, engine.submit(describe_teachers).result())
    for layer in range(1, len(index["layers"])):
        path = folder / settings_name(layer)
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise StoreError(f"layer {layer} of '{folder}' cannot be repaired without '{path.name}' ({error}); restore that file") from None
        made = _embed(folder, _below(index, layer), layer, settings, places, engine, all_loaded=True)[0]
        before = {entry["path"]: entry["sha256"] for entry in index["parts"]}
        changed = [entry["path"] for entry in made if before[entry["path"]] != entry["sha256"]]
        if changed:
            raise StoreError(f"'{changed[0]}' was made again and has other bytes than the index says: the teachers' libraries or processor changed; reinforce anew")
    shutil.rmtree(folder / WORK, ignore_errors=True)
    return index


def _below(index: dict[str, Any], layer: int) -> dict[str, Any]:
    """The index as it was before a layer was added."""
    layers = index["layers"][:layer]
    return {
        **index, "layers": layers, "parts": [entry for entry in index["parts"] if entry["layer"] < layer],
        "augmentations": max(entry["views"][1] for entry in layers if entry["views"]), "teachers": index["teachers"][: layers[-1]["teachers"][-1] + 1],
    }  # fmt: skip


def settings_name(layer: int) -> str:
    """File that says how a later layer was made."""
    return f"settings.{layer}.json"


# ---------------------------------------------------------------- checks before anything is written


def check_origin(index: dict[str, Any], config: ReinforceConfig) -> None:
    """Raises StoreError when the index does not say how the store was made, as one that another program wrote may not."""
    unsaid = [name for name in ("shards", "seed", "augmentation", "skipped") if name not in index]
    unsaid += sorted({name for entry in index["parts"] for name in ("shard", "part", "input_sha256") if name not in entry})
    if unsaid:
        raise StoreError(f"the index of '{config.store}' does not say {', '.join(unsaid)}, so nothing can be added to it; reinforce the pairs into a store of their own")


def check_pairs(index: dict[str, Any], scans: list[ShardScan], config: ReinforceConfig) -> None:
    """Raises StoreError when the pairs are not those of the store."""
    found = {one.name: one.sha256 for one in scans}
    different = sorted(name for name in set(found) | set(index["shards"]) if found.get(name) != index["shards"].get(name))
    if different:
        raise StoreError(f"the store '{config.store}' was made from other pairs than '{config.pairs}': {len(different)} shards differ, the first '{different[0]}'")


def check_teachers(index: dict[str, Any], given: list[TeacherFacts]) -> None:
    """Raises StoreError when the loaded teachers are not those of the store, in its order."""
    wanted = [TeacherFacts(**fact) for fact in index["teachers"]]
    same = len(wanted) == len(given) and all(dataclasses.replace(one, name="x") == dataclasses.replace(other, name="x") for one, other in zip(wanted, given, strict=True))
    if not same:
        names = [", ".join(f"{fact.name} ({fact.sha256[:8]}, {fact.preprocessing.get('precision', 'float32')})" for fact in facts) for facts in (wanted, given)]
        raise StoreError(f"the store has the teachers {names[0]}, and {names[1] or 'none'} were loaded; name its teachers in this order with --teachers")


def _named_apart(given: list[TeacherFacts], index: dict[str, Any]) -> list[dict[str, Any]]:
    """Facts of teachers to be added, under names that the store does not have yet."""
    taken, out = {fact["name"] for fact in index["teachers"]}, []
    for fact in given:
        name, n = fact.name, 2
        while name in taken:
            name, n = f"{fact.name}-{n}", n + 1
        taken.add(name)
        out.append(dataclasses.asdict(dataclasses.replace(fact, name=name)))
    return out


def _longer_tables(index: dict[str, Any], scans: list[ShardScan]) -> dict[str, list[str]]:
    """The store's tables with the new captions' names behind them: numbers that are stored keep their meaning."""
    tables = {}
    for field in ("sources", "languages"):
        new = {name for one in scans for name in getattr(one, field)} - set(index[field])
        tables[field] = [*index[field], *sorted(new)]
    return tables


def _settings(index: dict[str, Any], kind: str, **own: Any) -> dict[str, Any]:
    """Everything that decides the bytes of a layer: what is added, and what it is added to."""
    known = {"teachers": index["teachers"]} if kind != "teachers" else {}
    below = hash_of({"parts": [[entry["path"], entry["sha256"]] for entry in index["parts"]]})
    tables = {"sources": index["sources"], "languages": index["languages"]}
    return json.loads(json.dumps({
        "kind": kind, "layer": len(index["layers"]), "on": below, "dtype": index["dtype"], "seed": index["seed"], "augmentation": index["augmentation"],
        "views": [0, index["augmentations"]], "tables": tables, **known, **own,
    }))  # fmt: skip


def _claim(folder: Path, layer: int, settings: dict[str, Any]) -> None:
    path = folder / settings_name(layer)
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            found = {}
        if found != settings:
            names = ", ".join(name for name in settings if found.get(name) != settings[name])
            raise StoreError(
                f"another addition to '{folder}' was begun and did not finish (it differs in {names}); run that command again, or remove '{path.name}' and *.{layer}.safetensors"
            )
        return
    with said_plainly(path):
        write_json(path, settings)


# ---------------------------------------------------------------- work


def _make(
    config: ReinforceConfig, folder: Path, index: dict[str, Any], layer: int, settings: dict[str, Any], places: list[ShardPlace], engine: Engine, started: float
) -> dict[str, Any]:
    from distill.reinforce import figures

    entries, skipped, spent = _embed(folder, index, layer, settings, places, engine)
    kind, fingerprint = settings["kind"], hash_of(settings)
    added = {"augmentations": settings["views"][1] - settings["views"][0], "captions": 0, "teachers": len(settings["teachers"])}[kind]
    facts: dict[str, Any] = {"settings_sha256": fingerprint}
    if kind == "augmentations":
        facts |= {"augmentation": settings["augmentation"], "augmentations": added, "seed": settings["seed"]}
    if kind == "captions":
        facts |= {"captioner": settings["captioner"]}
    new = {**index, "layers": [*index["layers"], next_layer(index, kind, added, **facts)], "parts": [*index["parts"], *entries], **settings["tables"]}
    new["skipped"] = [*index["skipped"], *skipped]
    remembered = dict(index.get("given", {}))
    if kind == "augmentations":
        new["augmentations"] = settings["views"][1]
    if kind == "teachers":
        new["teachers"] = [*index["teachers"], *settings["teachers"]]
        remembered["teachers"] = [*remembered.get("teachers", []), *config.add_teachers]
    if config.teachers and kind != "teachers":
        remembered["teachers"] = list(config.teachers)
    new["given"] = remembered
    views = {"augmentations": added, "captions": 0, "teachers": index["augmentations"]}[kind]
    new["figures"] = figures(new, spent, time.monotonic() - started, engine, views)
    with said_plainly(folder / INDEX):
        write_index(folder, new)
    shutil.rmtree(folder / WORK, ignore_errors=True)
    return read_index(folder)


def _embed(folder: Path, index: dict[str, Any], layer: int, settings: dict[str, Any], places: list[ShardPlace], engine: Engine, all_loaded: bool = False) -> Any:
    from distill.reinforce import embed_parts

    tasks = _tasks(folder, index, layer, settings, places, all_loaded)
    return embed_parts(embed_layer, tasks, index["rows"], engine)


def _tasks(folder: Path, index: dict[str, Any], layer: int, settings: dict[str, Any], places: list[ShardPlace], all_loaded: bool) -> Iterator[LayerTask]:
    """One task a base part. all_loaded: the workers hold all of the store's teachers, not only those that are added."""
    where = {place.name: place for place in places}
    adds_teachers = settings["kind"] == "teachers"
    known = index["layers"][-1]["teachers"][-1] + 1  # those that the layers below know
    count = len(settings["teachers"])
    numbers = tuple(range(known, known + count)) if adds_teachers else tuple(range(count))
    loaded = numbers if all_loaded else tuple(range(count))
    fingerprint = hash_of(settings)
    for entries in parts_by_layer(index):
        base = entries[0]
        yield LayerTask(
            store=str(folder), index={**{name: index[name] for name in _READER_FIELDS}, "parts": entries, "rows": base["rows"]},
            path=str(folder / layer_part_name(base["path"], layer)), place=where[base["shard"]], kind=settings["kind"],
            views=(settings["views"][0], settings["views"][1]), teachers=numbers, loaded=loaded, given=settings.get("given", "") if settings["kind"] == "captions" else "",
            spec=spec_of(settings["augmentation"]) if settings["kind"] == "augmentations" else AugmentSpec(), seed=settings["seed"],
            dtype=settings["dtype"], tables=settings["tables"], count=base["rows"],
            metadata={
                "settings_sha256": fingerprint, "shard": base["shard"], "part": str(base["part"]), "input_sha256": base["input_sha256"], "format": "mclip-store",
                "layer": str(layer), "base_sha256": base["sha256"],
            },
        )  # fmt: skip


_READER_FIELDS = ("schema", "kind", "teachers", "layers", "dtype", "augmentations", "sources", "languages", "columns")


def spec_of(stored: dict[str, Any]) -> AugmentSpec:
    """The settings by which a store's views were drawn. Raises StoreError when this release draws them otherwise."""
    known = {field.name for field in dataclasses.fields(AugmentSpec)}
    if "drawn_by" in stored:
        raise StoreError(f"the store's views were drawn by {stored['drawn_by']} elsewhere; captions and teachers can be added to it, views cannot")
    if stored.get("version") != augment.VERSION or set(stored) - {"version"} != known:
        raise StoreError(f"the store's views were drawn with augmentation version {stored.get('version')}, this release draws version {augment.VERSION}; views cannot be added")
    return AugmentSpec(**{name: tuple(value) if isinstance(value, list) else value for name, value in stored.items() if name != "version"})
