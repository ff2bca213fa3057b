"""The photo index from the shell: `mclip index`, `mclip search --index`, `mclip adapt`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runtime.errors import SearchError, shown
from runtime.files import write_whole
from runtime.index import Hit, Index
from runtime.shell import _load, _parser, _positive


def index(argv: list[str]) -> int:
    """`mclip index PICTURES --out INDEX`: what is new is embedded, what moved is recognised, what is gone is forgotten."""
    parser = _parser("index", "Bring a photo index up to date with folders of pictures. Interrupted, it goes on where it was.")
    parser.add_argument("pictures", nargs="*", metavar="PICTURES", help="folders or single pictures")
    parser.add_argument("--out", required=True, metavar="INDEX", help="folder of the index, e.g. photos.idx")
    parser.add_argument("--dtype", choices=("float16", "int8", "binary"), help="of the stored vectors, for a new index (default float16)")
    parser.add_argument("--dims", type=_positive, metavar="N", help="store the first N dimensions only, for a new index (models with nested dimensions)")
    parser.add_argument("--rescore", choices=("float16", "int8"), help="also keep vectors to score the best candidates with, for a new index")
    parser.add_argument("--forget", nargs="+", default=[], metavar="PATH", help="forget the files at or below these paths")
    parser.add_argument("--verify", action="store_true", help="read every byte of the index and compare it with its checksums")
    args = parser.parse_args(argv)
    if not args.pictures and not args.forget and not args.verify:
        parser.error("nothing to do: give PICTURES, --forget or --verify")
    for path in args.pictures:
        if not os.path.exists(path):
            raise SearchError(f"{shown(path)} does not exist; give a folder of pictures, or a picture")
    wanted = {"dtype": args.dtype, "dims": args.dims, "rescore": args.rescore}
    with _open_to_write(args, wanted) as found:
        summary: dict[str, Any] = {"index": args.out}
        summary["forgotten"] = sum(found.remove(path) for path in args.forget)
        if args.pictures:
            report = found.add(*args.pictures, progress=_progress("index"), threads=args.threads)
            summary |= {name: getattr(report, name) for name in report.__dataclass_fields__}
            if args.json:
                summary |= {name: [{"path": path, "reason": reason} for path, reason in summary[name]] for name in ("failed", "unreadable")}
            else:
                _say_report(report)
        summary |= found.verify() if args.verify else found.facts()
    if args.json:
        _write_json(summary)
        return 0
    rescoring = f", {summary['rescoring_bytes'] / 1e6:.2f} MB of rescoring vectors" if summary["rescore"] else ""
    whole = "; every byte matches its checksum" if args.verify else ""
    stored = summary["vector_bytes"] + summary["list_bytes"]
    _write(f"{args.out}: {summary['files']} files, {summary['pictures']} different pictures; {stored / 1e6:.2f} MB of vectors{rescoring}{whole}")
    if args.pictures and not summary["files"]:
        raise SearchError(f"no picture was found in {', '.join(map(shown, args.pictures))}; look for them elsewhere")
    return 0


def _open_to_write(args: argparse.Namespace, wanted: dict[str, Any]) -> Index:
    exists = (Path(args.out) / "index.sqlite").is_file()
    if not exists and not args.pictures:
        raise SearchError(f"{args.out} is no photo index; make one with 'mclip index PICTURES --out {args.out}'")
    if not args.pictures:
        return Index.open(args.out)
    clip = _load(args)
    if not exists:
        return Index.create(args.out, clip, dtype=args.dtype or "float16", dims=args.dims, rescore=args.rescore)
    found = Index.open(args.out, clip)
    for name, value in wanted.items():
        if value is not None and found.settings[name] != value:
            found.close()
            raise SearchError(f"{args.out} was made with {name} {found.settings[name]}, not {value}; leave --{name} out, or make another index")
    return found


def _say_report(report: Any) -> None:
    parts = [f"{report.added} embedded ({report.images_per_s:.0f} images/s)" if report.added else "", f"{report.unchanged} unchanged" if report.unchanged else ""]
    parts += [f"{report.known - report.moved} copies of known ones" if report.known > report.moved else "", f"{report.moved} moved" if report.moved else ""]
    parts += [f"{report.deleted} gone" if report.deleted else "", f"{report.vanished} vanished meanwhile" if report.vanished else ""]
    _write(f"{', '.join(part for part in parts if part) or 'nothing new'} in {report.seconds:.1f} s")
    for what, entries in (("pictures are not usable and were left out", report.failed), ("places cannot be looked at, what is known of them was kept", report.unreadable)):
        if entries:
            sys.stderr.write(f"{len(entries)} {what}:\n" + "".join(f"  {shown(path)}: {shown(reason)}\n" for path, reason in entries[:20]))
            if len(entries) > 20:
                sys.stderr.write(f"  and {len(entries) - 20} more (--json lists all)\n")


def search_index(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """`mclip search QUERY --index INDEX`."""
    if args.query is None and args.image is None and args.duplicates is None:
        parser.error("give a QUERY, --image or --duplicates")
    if args.query is not None and not args.query.strip():
        raise SearchError("the query is empty; say in words what the picture shows")
    if args.duplicates is not None:
        return _duplicates(args)
    clip = _load(args)
    adapter = None
    if args.adapter:
        from runtime.index_adapter import read_adapter

        adapter = read_adapter(args.adapter)
    with Index.open(args.index, clip, adapter=adapter, same_space=args.same_space, create=False) as found:
        narrowed = {"folder": args.folder, "since": args.since, "until": args.until}
        weight = 0.5 if args.weight is None else args.weight
        started = time.perf_counter()
        hits = found.search(args.query, image=args.image, weight=weight, k=args.k, **narrowed)
        seconds = time.perf_counter() - started
        count = len(found)
    asked = {name: value for name, value in {"query": args.query, "image": args.image, **narrowed}.items() if value is not None}
    page = _page(args, hits, ", ".join(str(value) for value in asked.values()), f"{len(hits)} of {count} pictures in {args.index}")
    if args.json:
        rows = [{"path": hit.path, "score": hit.score, "taken": hit.taken, "copies": list(hit.copies)} for hit in hits]
        _write_json({**asked, "index": args.index, "bundle": str(clip.folder), "searched": count, "seconds": seconds, "page": page, "results": rows})
    else:
        for hit in hits:
            _write(f"{hit.score:7.4f}  {hit.path}")
    if not hits:
        sys.stderr.write(f"no picture found: {args.index} holds {count}" + (", none of them passes the filters\n" if count else "\n"))
    return 0


def _page(args: argparse.Namespace, hits: list[Hit], title: str, note: str) -> str | None:
    """Write the contact sheet where it is wanted; its path is said when no browser shows it."""
    if not (args.open or args.html):
        return None
    from runtime.index_page import contact_sheet, open_page

    text = contact_sheet(title, note, [(hit.path, hit.score, hit.taken) for hit in hits])
    if args.html:
        path = Path(args.html)
    else:
        handle, name = tempfile.mkstemp(prefix="mclip-search-", suffix=".html")
        os.close(handle)
        path = Path(name)
    try:
        write_whole(path, text.encode("utf-8", "replace"))
    except OSError as error:
        raise SearchError(f"{path} cannot be written ({error.strerror or error}); choose another --html") from error
    if not args.open or not open_page(path):
        sys.stderr.write(f"the page is {path}\n")
    return str(path)


def _duplicates(args: argparse.Namespace) -> int:
    with Index.open(args.index, create=False) as found:
        progress = _progress("duplicates")
        groups = found.duplicates(args.duplicates, lambda done, total: progress(done, total, 0.0))
    if args.json:
        _write_json({"index": args.index, "threshold": args.duplicates, "groups": groups})
        return 0
    for group in groups:
        _write("\n".join(group) + "\n")
    sys.stderr.write(f"{len(groups)} groups, {sum(map(len, groups)) - len(groups)} files more than different pictures\n")
    return 0


def adapt(argv: list[str]) -> int:
    """`mclip adapt OLD NEW --out FILE`: fit an adapter; 1 when new queries find less in an old gallery than old ones by more than noise."""
    parser = argparse.ArgumentParser(prog="mclip adapt", description="Fit a small map from a new bundle's space to an old one's, so that an old index need not be made again.")
    parser.add_argument("old", metavar="OLD", help="the bundle that made the index")
    parser.add_argument("new", metavar="NEW", help="the bundle that is to ask")
    parser.add_argument("--out", required=True, metavar="FILE", help="the adapter, e.g. new-to-old.safetensors")
    parser.add_argument("--texts", nargs="+", default=[], type=Path, metavar="FILE", help="texts to fit on, one a line, or .jsonl")
    parser.add_argument("--pairs", metavar="PAIRS", help="pairs folder to fit on: its captions, and its pictures as the old bundle sees them")
    parser.add_argument("--check", metavar="PAIRS", help="pairs folder to check with (default: a fifth of the captions of --pairs, held out)")
    parser.add_argument("--pictures", action="store_true", help="fit a map for picture queries too, on the pictures of --pairs")
    parser.add_argument("--prefer", metavar="ID|PRECISION", help="use this artefact or precision of both bundles")
    parser.add_argument("--threads", type=_positive, metavar="N", help="threads (default: all that this process may use)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    if not args.texts and not args.pairs:
        parser.error("nothing to fit on: give --texts or --pairs")
    from runtime.encoder import load
    from runtime.index_adaptation import adapt as fit
    from runtime.index_adaptation import read_texts
    from runtime.index_adapter import write_adapter
    from runtime.pairs import open_pairs

    old, new = (load(path, threads=args.threads, prefer=args.prefer) for path in (args.old, args.new))
    texts = [text for path in args.texts for text in read_texts(path)]
    sets = [open_pairs(path) if path else None for path in (args.pairs, args.check)]
    adapter, facts = fit(old, new, texts=texts, pairs=sets[0], check=sets[1], pictures=args.pictures)
    size = write_adapter(args.out, adapter) if facts["ok"] else None
    if args.json:
        _write_json({"out": args.out if facts["ok"] else None, "bytes": size, **facts})
        return 0 if facts["ok"] else 1
    _write(f"fitted on {facts['texts']} texts and {facts['pairs']} pairs, checked on {facts['checked_on']} (recall@1, @5, @10)")
    for name, label in (("new_on_old", "new queries, old gallery"), ("old_on_old", "old queries, old gallery")):
        _write(f"  {label}  " + "  ".join(f"{facts[name][f'recall{k}']:.3f}" for k in (1, 5, 10)))
    _write(f"  difference of recall@5 {facts['difference']:+.3f} [{facts['low']:+.3f}, {facts['high']:+.3f}]")
    if not facts["ok"]:
        sys.stderr.write("error: new queries find less than old ones by more than noise, nothing was written; give more or nearer texts, or make the index again\n")
        return 1
    _write(f"{args.out}: {size} bytes; use it with 'mclip search --adapter {args.out}'")
    return 0


def _progress(title: str) -> Callable[[int, int, float], None]:
    """A line on standard error: kept up to date on a terminal, now and then elsewhere, none with MCLIP_PROGRESS=0."""
    if os.environ.get("MCLIP_PROGRESS") == "0":
        return lambda done, total, rate: None
    terminal = sys.stderr.isatty()
    started = last = time.monotonic()

    def say(done: int, total: int, rate: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < (0.2 if terminal else 30.0) and (done < total or not terminal):
            return
        last = now
        left = (now - started) * (total - done) / max(done, 1)
        speed = f", {rate:.0f} images/s" if rate else ""
        line = f"{title}: {done} of {total}{speed}, about {left:.0f} s left"
        sys.stderr.write(f"\r{line:<70}" + ("\n" if done == total else "") if terminal else line + "\n")
        sys.stderr.flush()

    return say


def _write(line: str) -> None:
    """A line of results. Bytes of names that are no text go out as they are; line breaks in names do not break lines."""
    text = "".join(sign if sign.isprintable() or sign == "\n" or "\udc80" <= sign <= "\udcff" else shown(sign) for sign in line) + "\n"
    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode("utf-8", "surrogateescape"))
    sys.stdout.buffer.flush()


def _write_json(value: dict[str, Any]) -> None:
    """One object on a line; ASCII alone where a name is not UTF-8, so that its bytes survive as surrogate escapes."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    if any("\udc80" <= sign <= "\udcff" for sign in text):
        text = json.dumps(value, allow_nan=False)
    sys.stdout.write(text + "\n")
