"""Which model made an index and which may ask it; what an index holds, and whether all of it is whole."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import SearchError
from runtime.index_files import damaged

if TYPE_CHECKING:
    from runtime.index import Index
    from runtime.index_adapter import Adapter
    from runtime.manifest import Manifest


def identity(manifest: Manifest) -> dict[str, Any]:
    """Which model a bundle holds: name, checkpoint, width and, where its provenance names one, the space that it embeds into.

    The checkpoint counts, not the artefact: fp32 and int8 of one checkpoint are one model. A bundle that does not say which checkpoint it
    comes from is known by its golden embeddings.
    """
    checkpoint = manifest.provenance.get("checkpoint_sha256")
    if not isinstance(checkpoint, str):
        vectors = manifest.files.get(str(manifest.golden.get("vectors")))
        checkpoint = "golden:" + (vectors.sha256 if vectors else "none")
    space = manifest.provenance.get("space")
    return {"name": manifest.name, "checkpoint": checkpoint, "embed_dim": manifest.embed_dim, "space": space if isinstance(space, str) else None}


def same_model(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two identities are one checkpoint."""
    return bool(one["checkpoint"] == other["checkpoint"] and one["embed_dim"] == other["embed_dim"])


def check_query_model(folder: Path, made_by: dict[str, Any], asked: dict[str, Any], adapter: Adapter | None, same_space: bool) -> None:
    """Refuse a model that does not speak the index's language, or an adapter between other models. Raises SearchError."""
    if adapter is not None:
        for side, model, role in ((adapter.old, made_by, "made the index"), (adapter.new, asked, "asks")):
            if not same_model(side, model):
                raise SearchError(f"the adapter leads from {said(adapter.new)} to {said(adapter.old)}, but {said(model)} {role}; fit one with 'mclip adapt'")
        return
    if same_model(made_by, asked):
        return
    if made_by["embed_dim"] == asked["embed_dim"] and (same_space or (asked["space"] is not None and asked["space"] == made_by["space"])):
        return
    wide = "" if made_by["embed_dim"] == asked["embed_dim"] else f" of {made_by['embed_dim']} and {asked['embed_dim']} dimensions"
    raise SearchError(
        f"{folder} was made by {said(made_by)}, this bundle is {said(asked)}: their embeddings{wide} cannot be compared; use the model that made it, "
        "fit an adapter with 'mclip adapt OLD NEW --out FILE', or index again"
    )


def said(model: dict[str, Any]) -> str:
    """A model in words."""
    return f"'{model['name']}' (checkpoint {model['checkpoint'][:12]})"


def facts(index: Index) -> dict[str, Any]:
    """Counts, settings, and bytes on disk by kind: `rescoring_bytes` are those of the full vectors alone."""
    index.refresh()
    table = index.files.segments()
    sizes = {kind: sum(files[kind]["bytes"] for _, files in table.values() if kind in files) for kind in ("vectors", "full", "lists")}
    count = index.files.rows("SELECT count(*), count(content), coalesce(sum(reason IS NOT NULL), 0) FROM files")[0]
    names = [index.files.path, *(index.files.path.with_name(index.files.path.name + suffix) for suffix in ("-wal",))]
    return {
        "files": count[1],
        "unusable": count[2],
        "pictures": index.files.rows("SELECT count(*) FROM contents WHERE files > 0")[0][0],
        "segments": len(table),
        "vector_bytes": sizes["vectors"],
        "list_bytes": sizes["lists"],
        "rescoring_bytes": sizes["full"],
        "database_bytes": sum(path.stat().st_size for path in names if path.exists()),
        **index.settings,
    }


def verify(index: Index) -> dict[str, Any]:
    """Hash every file of every segment and read every row of the database. Raises SearchError at the first difference."""
    index.refresh()
    problem = index.files.rows("PRAGMA integrity_check(1)")[0][0]
    if problem != "ok":
        raise damaged(index.files.path, str(problem))
    for number, (rows, files) in index.files.segments().items():
        for kind, known in files.items():
            path = index.vectors.path(number, kind)
            digest = hashlib.sha256()
            with path.open("rb") as stream:
                while data := stream.read(1 << 22):
                    digest.update(data)
            if digest.hexdigest() != known["sha256"]:
                raise damaged(path, "its content does not match its hash")
        for start in range(0, rows, 4096):
            index.files.check_contents(number, range(start, min(start + 4096, rows)))
    last = b""
    while page := [row[0] for row in index.files.rows("SELECT path FROM files WHERE path > ? ORDER BY path LIMIT 4096", (last,))]:
        index.files.check_files(page)
        last = page[-1]
    return facts(index)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files of an index."""
    return sum(os.path.getsize(os.path.join(place, name)) for place, _, names in os.walk(folder) for name in names)
