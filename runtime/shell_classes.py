"""`mclip classes`: put a table of classes into a bundle, on wish without the text tower."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
from pathlib import Path

from runtime.bundle_files import artefact_files
from runtime.classes import make_table
from runtime.encoder import load
from runtime.errors import BundleError, RecipeError
from runtime.files import whole_folder
from runtime.manifest import Manifest, read_manifest, write_manifest


def classes(argv: list[str]) -> int:
    """`mclip classes BUNDLE OUT --labels FILE`: a copy of a bundle that carries a class table."""
    parser = argparse.ArgumentParser(prog="mclip classes", description="Put a class table into a copy of a bundle; with --image-only the copy needs no text tower.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the new bundle")
    parser.add_argument("--labels", type=Path, required=True, metavar="FILE", help="one class a line; NAME<tab>TEXT<tab>TEXT … gives a class texts of its own")
    parser.add_argument("--templates", type=Path, metavar="FILE", help="prompt templates, one a line with {} where the name goes")
    parser.add_argument("--name", default="classes", help="of the table (default: classes)")
    parser.add_argument("--image-only", action="store_true", help="leave out the text tower and the tokenizer")
    args = parser.parse_args(argv)
    count = store_classes(args.bundle, args.out, args.labels, args.templates, args.name, image_only=args.image_only)
    sys.stdout.write(f"{args.out}: class table '{args.name}' of {count} classes{', pictures only' if args.image_only else ''}\n")
    return 0


def store_classes(bundle: Path, out: Path, labels: Path, templates: Path | None, name: str, *, image_only: bool = False) -> int:
    """Write the copy. Returns how many classes it has.

    Raises:
        RecipeError: labels or templates that cannot be used.
        BundleError: no text tower to embed them with, or the place is taken.
    """
    if not name.replace("-", "").replace("_", "").isalnum() or not name.isascii():
        raise RecipeError(f"--name is '{name}', expected letters, digits, - and _")
    if out.exists():
        raise BundleError(f"'{out}' exists; give another place or remove it")
    texts = {row[0]: row[1:] or row[:1] for row in (line.split("\t") for line in _lines(labels))}
    filled = _lines(templates) if templates is not None else ["{}"]
    manifest = read_manifest(bundle)
    try:
        table = make_table(load(bundle), texts, filled)
    except ValueError as error:
        raise RecipeError(f"the class table cannot be made: {error}") from None
    path = f"classes/{name}.safetensors"
    kept = [entry for entry in manifest.classes if entry.get("name") != name]
    manifest = dataclasses.replace(manifest, classes=(*kept, {"name": name, "path": path, "n": len(table.names), "templates": filled}))
    with whole_folder(out) as work:
        shutil.copytree(bundle, work)
        (work / "classes").mkdir(exist_ok=True)
        table.save(work / path)
        write_manifest(work, _without_text(work, manifest) if image_only else manifest)
    return len(table.names)


def _without_text(work: Path, manifest: Manifest) -> Manifest:
    for artefact in manifest.artefacts:
        if artefact.tower == "text" and artefact.path is not None:
            for file in artefact_files(artefact, manifest.files):
                (work / file).unlink(missing_ok=True)
    (work / "tokenizer.json").unlink(missing_ok=True)
    return dataclasses.replace(manifest, artefacts=tuple(artefact for artefact in manifest.artefacts if artefact.tower != "text"))


def _lines(path: Path) -> list[str]:
    try:
        found = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"'{path}' cannot be read as lines of text ({error})") from None
    if not found:
        raise RecipeError(f"'{path}' has no lines; expected one class or template a line")
    return found
