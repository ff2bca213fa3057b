"""The SDK from the shell: embed, classify, search, verify, inspect. Each `verb(argv)` returns its exit code; none needs torch."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import BundleError, ClipError, ImageError, PairsError
from runtime.files import write_whole

if TYPE_CHECKING:
    import numpy as np

    from runtime.encoder import Clip

DEFAULT_BUNDLE = "out/demo/bundle"
DEFAULT_IMAGES = "out/demo/pairs/test"
PICTURES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
_BATCH = 64


def embed(argv: list[str]) -> int:
    """`mclip embed`: embeddings of pictures and texts, printed or written to a safetensors file."""
    parser = _parser("embed", "Embed pictures and texts. Pictures are files or folders.")
    parser.add_argument("inputs", nargs="*", metavar="INPUT", help="an existing path is a picture (or a folder of them), anything else is a text")
    parser.add_argument("--image", nargs="+", default=[], metavar="PATH", help="pictures or folders of pictures")
    parser.add_argument("--text", nargs="+", default=[], metavar="TEXT", help="texts")
    parser.add_argument("--out", metavar="FILE", help="write 'image' and 'text' (float32, one row an input) as safetensors instead of printing rows")
    args = parser.parse_args(argv)
    paths = [*args.image, *(item for item in args.inputs if os.path.exists(item))]
    texts = [*args.text, *(item for item in args.inputs if not os.path.exists(item))]
    if not paths and not texts:
        parser.error("nothing to embed: give pictures or texts")
    clip = _load(args)
    pictures = [picture for path in paths for picture in _pictures(Path(path))]
    found = {"image": clip.encode_image(pictures), "text": clip.encode_text(texts)}
    names = {"image": [str(path) for path in pictures], "text": texts}
    if args.out:
        _save(Path(args.out), found, names)
    if args.json:
        rows = {
            kind: [{_NAME[kind]: name, **({} if args.out else {"embedding": row.tolist()})} for name, row in zip(names[kind], found[kind], strict=True)]
            for kind in found
        }
        _write_json({"bundle": str(clip.folder), "embed_dim": clip.embed_dim, "choice": _choice(clip), "out": args.out, **rows})
        return 0
    for kind, embeddings in found.items():
        for name, row in zip(names[kind], embeddings, strict=True):
            _write(f"{kind}\t{name}" + ("" if args.out else "\t" + " ".join(f"{value:.6f}" for value in row)))
    if args.out:
        _write(f"{len(pictures)} pictures and {len(texts)} texts, {clip.embed_dim} values each, in {args.out}")
    return 0


_NAME = {"image": "path", "text": "text"}


def _save(out: Path, found: dict[str, np.ndarray], names: dict[str, list[str]]) -> None:
    from safetensors.numpy import save

    try:
        write_whole(out, save(found, metadata={kind: json.dumps(values) for kind, values in names.items()}))
    except OSError as error:
        raise ClipError(f"{out} cannot be written ({error.strerror or error}); choose another --out") from error


def classify(argv: list[str]) -> int:
    """`mclip classify`: probabilities of labels for a picture."""
    parser = _parser("classify", "Probabilities of labels for a picture.")
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument("labels", nargs="+", metavar="LABEL")
    parser.add_argument("--template", default="{}", help='text around each label, with {} in it (default "{}"), e.g. "a picture of {}"')
    args = parser.parse_args(argv)
    if "{}" not in args.template:
        parser.error(f"--template is {args.template!r}, it needs {{}} where the label goes")
    clip = _load(args)
    found = clip.classify(args.image, [args.template.replace("{}", label) for label in args.labels])
    order = sorted(range(len(args.labels)), key=lambda n: -float(found[n]))
    rows = [{"label": args.labels[n], "probability": float(found[n])} for n in order]
    if args.json:
        _write_json({"image": args.image, "bundle": str(clip.folder), "loss": clip.manifest.loss, "choice": _choice(clip), "labels": rows})
    else:
        for row in rows:
            _write(f"{row['probability']:8.4f}  {row['label']}")
    return 0


def search(argv: list[str]) -> int:
    """`mclip search`: the pictures that fit a text best."""
    parser = _parser("search", "Find pictures by text: in an index that 'mclip index' made, or straight in a folder of pictures or a pairs folder.")
    parser.add_argument("query", nargs="?", metavar="QUERY")
    parser.add_argument("--images", default=DEFAULT_IMAGES, metavar="DIR|PAIRS", help=f"what to search without an index (default {DEFAULT_IMAGES})")
    parser.add_argument("-k", type=_positive, default=10, metavar="N", help="how many to show (default 10)")
    add_index_options(parser)
    args = parser.parse_args(argv)
    if args.index is not None:
        from runtime.shell_index import search_index

        return search_index(args, parser)
    if args.query is None:
        parser.error("without --index a QUERY is needed")
    if any(getattr(args, name) not in (None, False) for name in INDEX_ONLY):
        parser.error(f"{', '.join('--' + name.replace('_', '-') for name in INDEX_ONLY)} need --index")
    clip = _load(args)
    query = clip.encode_text([args.query])[0]
    embeddings, entries, skipped = _embed_all(clip, Path(args.images))
    scores = embeddings @ query
    order = sorted(range(len(entries)), key=lambda n: (-float(scores[n]), n))[: args.k]
    rows = [{"score": float(scores[n]), **entries[n]} for n in order]
    if args.json:
        _write_json(
            {
                "query": args.query,
                "bundle": str(clip.folder),
                "images": args.images,
                "searched": len(entries),
                "choice": _choice(clip),
                "results": rows,
                "skipped": skipped,
            }
        )
        return 0
    for row in rows:
        _write(f"{row['score']:7.4f}  {row.get('path') or row['key']}" + (f"  {row['caption']}" if row.get("caption") else ""))
    _say_skipped(skipped)
    return 0


INDEX_ONLY = ("image", "weight", "folder", "since", "until", "adapter", "same_space", "duplicates", "html", "open")


def add_index_options(parser: argparse.ArgumentParser) -> None:
    """What `mclip search` knows beyond words when it has an index."""
    group = parser.add_argument_group("with an index")
    group.add_argument("--index", metavar="INDEX", help="search this index")
    group.add_argument("--image", metavar="PICTURE", help="search by a picture, alone or beside QUERY")
    group.add_argument("--weight", type=_unit, metavar="SHARE", help="of the picture beside QUERY (default 0.5)")
    group.add_argument("--folder", metavar="DIR", help="only pictures below this folder")
    group.add_argument("--since", metavar="DATE", help="only pictures taken at this date or later, e.g. 2024 or 2024-05-31")
    group.add_argument("--until", metavar="DATE", help="only pictures taken before the end of this date")
    group.add_argument("--adapter", metavar="FILE", help="what 'mclip adapt' made for this bundle and the index's model")
    group.add_argument("--same-space", action="store_true", help="this bundle embeds into the same space as the index's model (a student and its teacher)")
    group.add_argument("--duplicates", nargs="?", type=_unit, const=0.95, metavar="COSINE", help="list groups of near-duplicates instead (default 0.95)")
    group.add_argument("--html", metavar="FILE", help="also write the results as a page with pictures")
    group.add_argument("--open", action="store_true", help="write that page (without --html to a temporary file) and show it in a browser")


def _embed_all(clip: Clip, source: Path) -> tuple[np.ndarray, list[dict[str, Any]], list[dict[str, str]]]:
    """Embeddings (N, D) of all pictures that decode, what they are, and what was skipped and why."""
    import numpy as np

    from runtime.pairs import open_pairs
    from runtime.preprocess import load_image

    pairs = open_pairs(source) if source.is_dir() and any(source.glob("*.tar")) else None
    paths = [] if pairs is not None else _pictures(source)
    total = len(pairs) if pairs is not None else len(paths)
    entries: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    parts: list[np.ndarray] = []
    batch: list[Any] = []
    for n in range(total):
        name = {"key": pairs.keys[n]} if pairs is not None else {"path": str(paths[n])}
        try:
            batch.append(pairs.image(n) if pairs is not None else load_image(paths[n]))
        except ImageError as error:
            skipped.append({**name, "reason": str(error)})
        else:
            known = {"caption": pairs.caption(n) if pairs.has_caption(n) else None, "meta": pairs.meta(n)} if pairs is not None else {}
            entries.append({**name, **known})
        if batch and (len(batch) == _BATCH or n == total - 1):
            parts.append(clip.encode_image(batch))
            batch = []
    if not entries:
        raise PairsError(f"none of the {len(skipped)} pictures of {source} decodes; check them")
    return np.concatenate(parts), entries, skipped


def verify(argv: list[str]) -> int:
    """`mclip verify`: every hash, then the golden inputs through every artefact that runs here; 1 when one misses its threshold."""
    parser = argparse.ArgumentParser(prog="mclip verify", description="Check a bundle's hashes and run its parity gate on this machine.")
    parser.add_argument("bundle", metavar="BUNDLE")
    parser.add_argument("--threads", type=_positive, metavar="N")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    from runtime.bundle_zip import folder_of
    from runtime.manifest import read_manifest
    from runtime.parity_table import lines
    from runtime.selfcheck import selfcheck

    folder = folder_of(Path(args.bundle))
    manifest = read_manifest(folder, verify=True)
    report = {"bundle": args.bundle, "files_verified": len(manifest.files), **selfcheck(folder, threads=args.threads)}
    if args.json:
        _write_json(report)
        return 0 if report["ok"] else 1
    _write(f"{manifest.name}: {len(manifest.files)} files match their hashes; {report['n']} golden inputs")
    for line in lines(report):
        _write(line)
    if not report["ok"]:
        sys.stderr.write(f"error: {args.bundle} does not pass: see the lines marked FAIL\n")
    return 0 if report["ok"] else 1


def inspect(argv: list[str], look: Callable[[str, float | None], dict[str, Any]] | None = None) -> int:
    """What a path is, its facts, its hashes checked. `look` finds the facts; left out, the kinds that the SDK knows are told apart."""
    parser = argparse.ArgumentParser(prog="mclip inspect", description="Say what a folder or file is, check its hashes and print its facts.")
    parser.add_argument("path", metavar="PATH")
    parser.add_argument("--sample", type=_share, metavar="SHARE", help="of a store, compare this share of its rows with their checksums instead of every byte")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    from runtime.inspection import inspect_path

    facts = (look or inspect_path)(args.path, args.sample)
    if args.json:
        _write_json(facts)
        return 0
    verified = f"{facts['verified']} files match their hashes" if facts["verified"] else "no hashes are recorded for it"
    _write(f"{facts['kind']}  {facts['path']}  {facts['bytes'] / 1e6:.2f} MB, {facts.pop('checked', None) or verified}")
    artefacts = facts.pop("artefacts", [])
    for key, value in facts.items():
        if key not in ("kind", "path", "verified", "bytes", "files") and value not in (None, {}, []):
            for line in _lines(key, value):
                _write("  " + line)
    for entry in artefacts:
        cosine = (entry["parity"] or {}).get("cosine_min")
        speed = (entry["latency"] or {}).get("p50_ms")
        parts = [f"{entry['status']:<7}", f"{entry['id']:<28}", f"batch {entry['batch']:<7}"]
        parts += [f"{entry['bytes'] / 1e6:.2f} MB" if entry["bytes"] else "", f"min cosine {cosine:.6f}" if cosine is not None else ""]
        parts += [f"{speed:.2f} ms" if speed is not None else "", entry["reason"] or ""]
        _write("  " + "  ".join(part for part in parts if part))
    return 0


def _lines(key: str, value: Any) -> list[str]:
    """A fact on one line; a list of objects has a line for each."""
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return [f"{key}:", *(f"  {', '.join(f'{name} {json.dumps(fact, ensure_ascii=False)}' for name, fact in item.items())}" for item in value)]
    return [f"{key}: {value if isinstance(value, (str, int, float)) else json.dumps(value, ensure_ascii=False)}"]


def _parser(verb: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"mclip {verb}", description=description)
    parser.add_argument(
        "--bundle", default=os.environ.get("MCLIP_BUNDLE", DEFAULT_BUNDLE), metavar="BUNDLE", help=f"default: $MCLIP_BUNDLE, else {DEFAULT_BUNDLE}"
    )
    parser.add_argument("--prefer", metavar="ID|PRECISION", help="use this artefact or precision instead of the fastest proven one")
    parser.add_argument("--threads", type=_positive, metavar="N", help="threads (default: all that this process may use)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{value} is no share of the rows; expected more than 0, at most 1")
    return value


def _unit(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{value} is not between 0 and 1")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def _load(args: argparse.Namespace) -> Clip:
    from runtime.encoder import load

    try:
        return load(args.bundle, threads=args.threads, prefer=args.prefer)
    except BundleError:
        if args.bundle == DEFAULT_BUNDLE and not Path(args.bundle).exists():
            raise BundleError(f"there is no bundle at {DEFAULT_BUNDLE}; make it with 'mclip demo', or name one with --bundle") from None
        raise


def _pictures(path: Path) -> list[Path]:
    """The picture itself, or all pictures below a folder, sorted. Raises PairsError when there are none."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise PairsError(f"{path} does not exist; give a picture, a folder of pictures or a pairs folder")
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in PICTURES and file.is_file())
    if not found:
        raise PairsError(f"{path} holds no pictures ({', '.join(sorted(PICTURES))}) and no *.tar shards; give another folder")
    return found


def _choice(clip: Clip) -> dict[str, dict[str, str]]:
    return {tower: {"id": choice.id, "why": choice.why} for tower, choice in clip.choice.items()}


def _say_skipped(skipped: list[dict[str, str]]) -> None:
    if skipped:
        sys.stderr.write(f"{len(skipped)} pictures skipped:\n" + "".join(f"  {entry['reason']}\n" for entry in skipped))


def _write(line: str) -> None:
    sys.stdout.write(line + "\n")


def _write_json(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")
