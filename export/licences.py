"""Whose work a bundle is made of, on what terms, and whether those allow selling what is built with it.

The words of a licence are read, not interpreted: what is not recognised counts as unknown, and whoever knows better says so with `--licence`. Not legal advice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.errors import RecipeError

_CLOSED = re.compile(r"research[ -]only|research purposes|non[- ]?commercial|\b(NC|ND)\b|Apple ML Research|academic", re.IGNORECASE)
_OPEN = re.compile(
    r"\b(MIT|Apache|BSD|ISC|CC0|CC[- ]BY(-SA)?|Unlicense|OFL|MPL|Unicode-3\.0|Unicode-DFS|public domain|[AL]?GPL(v\d)?|Zlib|PSF)(?![A-Za-z])", re.IGNORECASE
)  # CC BY-NC and CC BY-ND are caught by _CLOSED before


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Something of somebody that is in the bundle or that its weights were made with."""

    what: str
    name: str
    licence: str
    source: str = ""

    @property
    def standing(self) -> str:
        """ "open", "closed" (not to be sold) or "unknown"."""
        if _CLOSED.search(self.licence):
            return "closed"
        return "open" if _OPEN.search(self.licence) else "unknown"


def works(receipt: Mapping[str, Any], config: Any, pairs: Path, given: Sequence[str]) -> list[Work]:
    """All works of a bundle.

    Args:
        receipt: of the checkpoint. config: its `ModelConfig`.
        pairs: the pairs folder whose pictures become golden inputs; a sample folder beside it names its authors.
        given: lines of `--licence`: "WHAT: LICENCE", where WHAT is one of those below, or anything else.
    """
    said = dict(line.split(":", 1) for line in given if ":" in line)
    said = {name.strip(): licence.strip() for name, licence in said.items()}
    found = [Work(what="weights", name=config.name, licence=said.pop("weights", config.licence), source=", ".join(config.sources))]
    for licence in receipt.get("store_licences", ()):
        found.append(Work(what="teachers", name="teachers and captioners of the store", licence=said.get("teachers", str(licence))))
    if receipt.get("stage"):  # converted weights have none: their own licence speaks for what they were trained on
        found.append(Work(what="training data", name="pictures and captions", licence=said.pop("training data", "") or _sample_licences(pairs) or "unknown"))
    found.append(Work(what="tokenizer", name=config.text.tokenizer, licence=said.pop("tokenizer", _TOKENIZERS.get(config.text.tokenizer, "unknown"))))
    golden = _authors(pairs)
    if "golden" in said or not golden:
        golden = [Work(what="golden", name="pictures and texts of golden/", licence=said.pop("golden", "unknown"))]
    said.pop("teachers", None)
    others = [(what, licence) for what, licence in said.items()] + [("other", line) for line in given if ":" not in line]
    return [*found, *golden, *(Work(what=what, name=what, licence=licence) for what, licence in others)]


_TOKENIZERS = {"clip": "MIT (OpenAI's CLIP vocabulary)", "bert": "Apache-2.0 (Google's BERT vocabulary)"}


def _packages(pairs: Path) -> list[Mapping[str, Any]]:
    path = pairs.parent / "sample.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["packages"]
        return [entry for entry in found if isinstance(entry, dict)]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _sample_licences(pairs: Path) -> str:
    return ", ".join(sorted({str(entry.get("licence", "unknown")) for entry in _packages(pairs)}))


def _authors(pairs: Path) -> list[Work]:
    return [
        Work(what="golden", name=f"{entry.get('name', '?')} {entry.get('version', '')}".strip(), licence=str(entry.get("licence", "unknown")), source=str(entry.get("source", "")))
        for entry in _packages(pairs)
    ]


def require_commercial(found: Iterable[Work]) -> None:
    """Raises RecipeError for the first works whose terms forbid selling, or are not known."""
    bad = [work for work in found if work.standing != "open"]
    if bad:
        listed = "; ".join(f"{work.what} ({work.name}): {work.licence or 'nothing said'}" for work in bad[:4])
        raise RecipeError(
            f"--commercial: {len(bad)} of the works in this bundle may not be sold, or their terms are not known: {listed}; "
            f"say what you know with --licence '{bad[0].what}: LICENCE', or leave --commercial out"
        )


def third_party(found: Sequence[Work]) -> str:
    """THIRD_PARTY.md."""
    rows = "".join(f"| {_cell(work.what)} | {_cell(work.name)} | {_cell(work.licence)} | {_cell(work.source)} | {work.standing} |\n" for work in found)
    return (
        "# Third parties\n\nWhat this bundle holds or was made with, on whose terms. *Standing* is read from the words alone: open, closed (not to be sold) or "
        "unknown. golden: pictures and texts in `golden/`, for self-checks.\n\n"
        f"| what | name | licence | source | standing |\n|---|---|---|---|---|\n{rows}"
    )


def _cell(text: str) -> str:
    return " ".join(str(text).replace("|", "/").split())
