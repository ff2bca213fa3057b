"""Whose software is installed with ours: `python -m tests.attacks.licences` (make licences) prints each package with its licence and what draws it in.

The base install, which applications ship, must be free of licences that ask for the application's own source; exit code 1 when it is not.
"""

from __future__ import annotations

import re
import sys
from importlib import metadata

OURS = "mobileclip-edge"
COPYLEFT = re.compile(r"\bA?GPL|\bLGPL|GNU (Affero |Lesser )?General Public|\bEUPL|\bSSPL|\bCC-BY-(NC|SA)|\bMPL|Mozilla Public", re.IGNORECASE)
EXTRA = re.compile(r"extra\s*==")
NAME = re.compile(r"[A-Za-z0-9._-]+")


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def needs(name: str) -> set[str]:
    """What a distribution needs without any extra."""
    rows = metadata.requires(name) or []
    return {plain(NAME.match(row).group()) for row in rows if not EXTRA.search(row)}  # type: ignore[union-attr]


def base_install() -> set[str]:
    """The distributions that `pip install mobileclip-edge` brings, without ours; those that are not installed here (for other systems) are left out."""
    found: set[str] = set()
    waiting = needs(OURS)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        try:
            waiting |= needs(name)
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
    return found


def licence(name: str) -> str:
    """What the metadata says, in a few words."""
    facts = metadata.metadata(name)
    classifiers = [row.split(" :: ")[-1] for row in facts.get_all("Classifier") or [] if row.startswith("License ::")]
    text = facts.get("License-Expression") or ", ".join(classifiers) or (facts.get("License") or "").strip().split("\n")[0]
    return text[:70] or "not said"


def main() -> int:
    """Print the table; the base install first."""
    base = base_install()
    every = sorted({plain(found.metadata["Name"]) for found in metadata.distributions()} - {OURS})
    bad = 0
    for name in (*sorted(base), *(name for name in every if name not in base)):
        said = licence(name)
        wrong = name in base and (said == "not said" or bool(COPYLEFT.search(said)))
        bad += wrong
        print(f"{'base' if name in base else 'extra':6} {name:36} {metadata.version(name):18} {said}{'   <- not in a base install' if wrong else ''}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
