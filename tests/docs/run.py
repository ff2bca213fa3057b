"""Every command and every Python block of README and docs: `python -m tests.docs.run` (make test-docs). Prints how each was run; exit code 1 when one fails.

Commands of `mclip` run in children forked from a process that has imported everything, so that a hundred of them take minutes; anything else runs as a process.
"""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tests.docs.documents import PAGES, ROOT, Command, commands, python_blocks
from tests.docs.rules import NOT_RUN, SMALLER
from tests.docs.world import make_world, page_folder
from tests.faults.harness import ask, run_child
from tests.faults.injection import Seen

PYTHON_NOT_RUN = (
    (r"FastAPI", "asks for FastAPI, which nothing here depends on"),
    (r"hf-hub:|mobileclip_s2\.pt", "asks for published weights; the same is done with random ones in tests/mobileclip"),
    (r"^class |^def |Teacher|import torch", "a sketch of one's own code"),
    (r"\bmug1\.jpg|ClassTable", "goes on from a clip of one's own; run in tests/runtime/test_classes.py"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ran:
    """What became of one command."""

    page: str
    text: str
    how: str
    seconds: float
    problem: str | None


def plan(command: Command) -> tuple[str, list[str] | None]:
    """("as written" | "smaller" | "not run: reason", words to run)."""
    for pattern, reason in NOT_RUN:
        if re.search(pattern, command.text):
            return f"not run: {reason}", None
    for pattern, changes, more in SMALLER:
        if re.search(pattern, command.text):
            text = command.text
            for old, new in changes:
                text = re.sub(old, new, text)
            words = shlex.split(text)
            added = [word for name, value in more.items() if name not in words for word in (name, value) if word]
            return ("smaller" if [*words, *added] != list(command.words) else "as written"), [*words, *added]
    return "as written", list(command.words)


def run_command(command: Command, place: Path) -> Ran:
    """Run one command in its page's folder."""
    how, words = plan(command)
    started = time.monotonic()
    problem = None
    if words is not None:
        words = [os.path.expanduser(word) if word.startswith("~") else word for word in words]
        words = [word.replace(str(Path.home()), str(place / "home"), 1) if word.startswith(str(Path.home())) else word for word in words]
        if words[0] == "mclip":
            code, said, _ = run_child(words[1:], lambda *_: os.chdir(place), random.Random(0), Seen(), place)
        else:
            words[0] = sys.executable if words[0] == "python" else words[0]
            done = _process(words, place)
            code, said = done.returncode, done.stderr
        if code:
            problem = f"exit {code}: {' '.join(said.split())[-300:]}"
    return Ran(page=command.page, text=command.text, how=how, seconds=time.monotonic() - started, problem=problem)


def _process(words: list[str], place: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=place, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)})


def run_python(page: str, place: Path) -> list[Ran]:
    """The Python of a page, each block by itself."""
    found = []
    for block in python_blocks(page):
        reason = next((reason for pattern, reason in PYTHON_NOT_RUN if re.search(pattern, block.text, re.MULTILINE)), None)
        started, problem = time.monotonic(), None
        if reason is None:
            done = _process([sys.executable, "-c", block.text], place)
            problem = f"exit {done.returncode}: {' '.join(done.stderr.split())[-300:]}" if done.returncode else None
        if problem:
            print(f"FAILS  {page}, line {block.line}: {problem}", flush=True)
        first = next(row for row in block.text.splitlines() if row.strip())
        how = "as written" if reason is None else f"not run: {reason}"
        found.append(Ran(page=page, text=f"python: {first} …", how=how, seconds=time.monotonic() - started, problem=problem))
    return found


def run_pages(pages: tuple[str, ...], work: Path) -> list[Ran]:
    """All commands of these pages."""
    import tests.faults.harness as harness

    harness.warm_up(harness.MODULES)
    os.environ.update(MCLIP_PROGRESS="0", MOBILECLIP_CACHE=str(work / "cache"), OMP_NUM_THREADS="1", MOBILECLIP_MEASURE="0", MCLIP_BUNDLE="BUNDLE")
    world = work / "world"
    _, error = ask(work, lambda: make_world(world))
    if error:
        raise RuntimeError(f"the world of the documents cannot be made: {error}")
    found: list[Ran] = []
    for page in pages:
        place = page_folder(world, page, work / "pages" / page.replace("/", "-"))
        for command in commands(page):
            found.append(run_command(command, place))
            if found[-1].problem:
                print(f"FAILS  {page}: {found[-1].text}: {found[-1].problem}", flush=True)
        found += run_python(page, place)
    return found


def main() -> int:
    """Run and print the table."""
    pages = tuple(sys.argv[1:]) or PAGES
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mclip-docs-") as name:
        found = run_pages(pages, Path(name))
    page = ""
    for row in found:
        if row.page != page:
            page = row.page
            print(f"\n{page}")
        print(f"  {row.text[:96]:96} {row.seconds:6.1f} s  {'FAILS' if row.problem else row.how}")
    bad = sum(row.problem is not None for row in found)
    ways = dict(Counter(row.how.split(":")[0] for row in found))
    print("\n" + json.dumps({"commands": len(found), **ways, "fail": bad, "minutes": round((time.monotonic() - started) / 60, 1)}))
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
