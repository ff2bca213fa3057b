"""The commands and the Python of README and docs, as they stand there."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md") if "/api/" not in str(path)))
VERBS = ("mclip", "make", "python", "pip", "sh", "torchrun", "ray", "npm", "git")


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """A fenced block: its page, the line it begins at, its language, its text."""

    page: str
    line: int
    language: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """One command of a shell block, without its comment; `a && b` and `a; b` are two."""

    page: str
    line: int
    words: tuple[str, ...]

    @property
    def text(self) -> str:
        return shlex.join(self.words)


def blocks(page: str) -> list[Block]:
    """All fenced blocks of a page."""
    found, inside, start, language = [], None, 0, ""
    for number, row in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), 1):
        fence = re.match(r"\s*```(\w*)", row)
        if fence and inside is None:
            inside, start, language = [], number, fence.group(1)
        elif fence and inside is not None:
            found.append(Block(page=page, line=start, language=language, text="\n".join(inside)))
            inside = None
        elif inside is not None:
            inside.append(row)
    return found


def commands(page: str) -> list[Command]:
    """All commands of a page, in order. A table in a fence is none: a command begins with a known verb and has no column of figures."""
    found: list[Command] = []
    for block in blocks(page):
        if block.language in ("python", "json", "swift", "kotlin", "js", "javascript", "html"):
            continue
        text = re.sub(r"\\\n\s*", "", block.text)
        for row in text.splitlines():
            if row.split(" ")[0] not in VERBS or re.search(r"\S {6,}\d+\.\d+ ", row):
                continue
            for part in re.split(r"\s(?:&&|;|\|)\s|;\s", re.sub(r"\s#\s.*$", "", row)):
                words = shlex.split(part)
                if words and words[0] in VERBS:
                    found.append(Command(page=page, line=block.line, words=tuple(words)))
    return found


def python_blocks(page: str) -> list[Block]:
    """The Python of a page."""
    return [block for block in blocks(page) if block.language == "python"]
