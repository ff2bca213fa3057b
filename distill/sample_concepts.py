"""What the emoji sample is about: concepts (labels, groups, slices), their families, and which drawings each style has.

A *concept* is a base emoji with a label, skin tones left out. A *family* is a concept with its variants of gender,
direction and skin: those share most of their drawing, so a family is trained or held out as a whole.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

HOLD_OUT_SALT = "mobileclip-edge/held-out/1"  # fixed for good: another salt would train on what others hold out
HOLD_OUT_SHARE = 0.1

_GENDER_SIGNS = {"2640", "2642"}
_DIRECTION_SIGNS = {"27a1", "2194", "2195"}
_HAIR = {"1f9b0", "1f9b1", "1f9b2", "1f9b3"}
_SKIN = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
_PRESENTATION = {"fe0e", "fe0f"}
_PEOPLE = {
    **dict.fromkeys(("1f468", "1f469", "1f9d1"), "person"),
    **dict.fromkeys(("1f474", "1f475", "1f9d3"), "old"),
    **dict.fromkeys(("1f466", "1f467", "1f9d2"), "child"),
}
_PEOPLE_WORDS = {"man", "woman", "person", "men", "women", "people", "adult", "and", "mrs", "mx", "santa", "merman", "mermaid", "merperson"}
_DIRECTION_WORDS = {"left", "right", "up", "down", "upwards", "downwards", "leftwards", "rightwards", "facing"}
_SAME_WORD = {"boy": "child", "girl": "child", "older": "old", "prince": "crown", "princess": "crown"}
_WHOLE = {"person with crown": "crown"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Concept:
    """One base emoji. ``code`` and ``family`` are lower-case code points joined by '-'."""

    code: str
    label: str
    tags: tuple[str, ...]
    group: str
    slice: str
    family: str
    held_out: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawings:
    """One style: the icon set's JSON and which icon draws which concept."""

    style: str
    icons: Mapping[str, Any]
    names: Mapping[str, str]


def bare(code: str) -> str:
    """Lower-case code points without presentation selectors, as icon sets and emojibase agree on."""
    return "-".join(part for part in code.lower().split("-") if part not in _PRESENTATION)


def read_concepts(data: list[dict[str, Any]], messages: dict[str, Any], styles: Iterable[Drawings]) -> list[Concept]:
    """The concepts of emojibase (components left out) in its order, with families joined over all styles' drawings."""
    groups = {entry["order"]: entry["message"] for entry in messages["groups"]}
    rows = [row for row in data if groups.get(row.get("group"), "components") != "components"]
    rows.sort(key=lambda row: row["order"])
    family = _families(rows, styles)
    return [
        Concept(
            code=code,
            label=row["label"],
            tags=tuple(row.get("tags", ())),
            group=groups[row["group"]],
            slice=_slice(code, row["label"]),
            family=family[code],
            held_out=is_held_out(family[code]),
        )
        for row in rows
        for code in [row["hexcode"].lower()]
    ]


def is_held_out(family: str) -> bool:
    """Whether a family is never trained on: a fixed hash, the same for every seed and size of the sample."""
    return int.from_bytes(hashlib.sha256(f"{HOLD_OUT_SALT}:{family}".encode()).digest()[:8], "big") < HOLD_OUT_SHARE * 2**64


def read_drawings(style: str, icons: dict[str, Any], chars: dict[str, str], codes: Iterable[str]) -> Drawings:
    """The style's icon for every concept that its ``chars.json`` knows."""
    have = {bare(code): name for code, name in chars.items()}
    names = {code: have[bare(code)] for code in codes if bare(code) in have}
    return Drawings(style=style, icons=icons, names={code: name for code, name in names.items() if _root(icons, name) is not None})


def name_drawings(style: str, icons: dict[str, Any], concepts: Mapping[str, str], others: Iterable[dict[str, str]]) -> Drawings:
    """A style without ``chars.json``: its icons by name, where other sets or the label give that name to one concept only.

    Args:
        concepts: code -> label.
        others: ``chars.json`` of sets that follow the same naming.
    """
    known = {bare(code): code for code in concepts}
    claims: dict[str, set[str]] = defaultdict(set)
    for chars in others:
        for raw, name in chars.items():
            if bare(raw) in known:
                claims[name].add(known[bare(raw)])
    for code, label in concepts.items():
        slug = re.sub("[^a-z0-9]+", "-", label.lower()).strip("-")
        for name in (slug, slug.replace("flag-", "flag-for-", 1), slug.replace("keycap-", "keycap-digit-", 1)):
            claims[name].add(code)
    names: dict[str, str] = {}
    taken: set[str] = set()
    # Real icons before aliases: an alias may carry an old name that a newer emoji bears today (the cricket is no bat).
    for name, codes in sorted(claims.items(), key=lambda claim: (claim[0] not in icons["icons"], claim[0])):
        root = _root(icons, name)
        if len(codes) == 1 and root is not None and root not in taken and not codes & names.keys():
            names[next(iter(codes))] = name
            taken.add(root)
    return Drawings(style=style, icons=icons, names=names)


def _root(icons: Mapping[str, Any], name: str) -> str | None:
    """The icon that is drawn in the end, through aliases; None when there is none."""
    for _ in range(8):
        if name in icons["icons"]:
            return name
        alias = icons.get("aliases", {}).get(name)
        if alias is None:
            return None
        name = alias["parent"]
    return None


def _slice(code: str, label: str) -> str:
    if label.startswith("keycap:"):
        return "keycap"
    if label.startswith("flag:"):
        return "flag"
    if 0x1F550 <= int(code.split("-")[0], 16) <= 0x1F567:
        return "clock"
    return "main"


def _families(rows: list[dict[str, Any]], styles: Iterable[Drawings]) -> dict[str, str]:
    """Code -> family, named by its first member. Joined by code points, by label, and by one drawing that serves two."""
    parent = {row["hexcode"].lower(): row["hexcode"].lower() for row in rows}
    place = {code: index for index, code in enumerate(parent)}

    def find(code: str) -> str:
        while parent[code] != code:
            parent[code] = parent[parent[code]]
            code = parent[code]
        return code

    def join(members: list[str]) -> None:
        first = min((find(code) for code in members), key=place.__getitem__)
        for code in members:
            parent[find(code)] = first

    alike: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in rows:
        code = row["hexcode"].lower()
        alike["code", _code_key(code)].append(code)
        alike["label", _label_key(row["label"])].append(code)
    for style in styles:
        for code, name in style.names.items():
            root = _root(style.icons, name)
            if code in parent:
                alike[style.style, str(root)].append(code)
    for members in alike.values():
        join(members)
    return {code: find(code) for code in parent}


def _code_key(code: str) -> str:
    dropped = _GENDER_SIGNS | _DIRECTION_SIGNS | _HAIR | _SKIN | _PRESENTATION | {"200d"}
    parts = code.split("-")
    if len(parts) == 1:
        return _PEOPLE.get(code, code)
    kept = [_PEOPLE.get(part, part) for part in parts if part not in dropped]
    return "-".join(kept) if kept else code


def _label_key(label: str) -> str:
    label = _WHOLE.get(label, label)
    if label.startswith(("flag:", "keycap:")):
        return label
    subject, colon, rest = label.partition(": ")
    if colon and subject in ("family", "kiss", "couple with heart"):
        return subject
    words = [_SAME_WORD.get(word, word) for word in re.findall(r"[\w’'.]+", label.lower().replace(".", ""))]
    kept = [word for word in words if word not in _PEOPLE_WORDS | _DIRECTION_WORDS]
    return " ".join(kept) if kept else "person" if set(words) & _PEOPLE_WORDS else label
