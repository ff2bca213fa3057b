"""What lies in a store's folder while it is made: the lock, the settings that decide its bytes, and whether it is finished."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distill.reinforce_worker import said_plainly
from distill.remote import filesystem, upload
from distill.store import TeacherFacts, open_store
from distill.store_writing import INDEX
from runtime.errors import StoreError
from runtime.files import write_json
from runtime.store_index import read_index

logger = logging.getLogger(__name__)

SETTINGS = "settings.json"
WORK = ".work"


def hash_of(settings: dict[str, Any]) -> str:
    """sha256 by which parts know the settings they were made with."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the store for writing, and remove what a killed writer left half written. Raises StoreError when another process holds it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".lock").touch()
    except OSError as error:
        raise StoreError(f"store folder '{folder}' cannot be made ({error.strerror or error}); give another path") from None
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StoreError(f"another process is writing the store '{folder}'; wait for it or stop it") from None
        for pattern in (".*.safetensors.*", ".*.json.*", f"{WORK}/.*"):
            for half in folder.glob(pattern):
                half.unlink(missing_ok=True)
        yield


def claim(folder: Path, settings: dict[str, Any], remote: str = "", name: str = SETTINGS) -> None:
    """Write the settings into a fresh folder, or compare them with those that are there. Raises StoreError when they differ."""
    path = folder / name
    shown = remote or str(folder)
    found = _remote_json(f"{remote}/{name}") if remote else _local_json(path, shown)
    if found is None:
        if name == SETTINGS and not remote:
            strangers = [entry.name for entry in folder.iterdir() if entry.name not in (".lock", WORK)]
            if strangers:
                raise StoreError(f"'{folder}' is no store but holds {', '.join(sorted(strangers)[:3])}; give a new or an empty folder")
        with said_plainly(path):
            write_json(path, settings)
        if remote:
            upload(path, f"{remote}/{name}")
        return
    different = [name for name in settings if found.get(name) != settings[name]]
    if different:
        told = [f"{name} ({_short(found.get(name))} there, {_short(settings[name])} now)" for name in different]
        raise StoreError(f"store '{shown}' was begun with other {', '.join(told)}; give another folder, or remove this one to start anew")


def _local_json(path: Path, shown: str) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise StoreError(f"'{path}' cannot be read ({error}); remove the store '{shown}' and run again") from None


def _remote_json(url: str) -> dict[str, Any] | None:
    fs, path = filesystem(url, StoreError)
    try:
        return dict(json.loads(fs.cat_file(path)))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise StoreError(f"'{url}' cannot be read ({error}); check the address and your access, or remove that store") from None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:8]}"


def finished(folder: Path, fingerprint: str, remote: str = "") -> dict[str, Any] | None:
    """The index of a store that is complete and unchanged; None when there is work to do."""
    if remote:
        index = _remote_json(f"{remote}/{INDEX}")
        return index if index is not None and index.get("settings_sha256") == fingerprint else None
    if not (folder / INDEX).is_file():
        return None
    try:
        store = open_store(folder, verify=True)
    except StoreError as error:
        logger.warning("the store is repaired: %s", error)
        return None
    return store.index if store.index.get("settings_sha256") == fingerprint else None


def known_teachers(specs: tuple[str, ...], device: str, folder: Path) -> list[TeacherFacts] | None:
    """Facts of the teachers as a finished store has them, when their receipts say that they are the same: nothing is loaded.

    None when there is no such store, when a teacher is no checkpoint folder, or when it was computed in another precision than asked.
    """
    try:
        index = read_index(folder)
        receipts = [json.loads((Path(spec) / "receipt.json").read_text(encoding="utf-8")) for spec in specs]
        given = [(Path(spec).name, receipt["files"]["model.safetensors"]["sha256"]) for spec, receipt in zip(specs, receipts, strict=True)]
    except (OSError, ValueError, KeyError, StoreError):
        return None
    facts = [TeacherFacts(**fact) for fact in index["teachers"][: len(index["layers"][0]["teachers"])]]
    wanted = {"cpu": ("float32",), "auto": ("float32", "bfloat16")}.get(device, ("bfloat16",))
    same = all(fact.preprocessing.get("precision", "float32") in wanted for fact in facts)
    return facts if same and given == [(fact.name, fact.sha256) for fact in facts] else None
