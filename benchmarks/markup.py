"""Small pieces of HTML that the sections of the report share. Everything that comes from data is escaped here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

DASH = "–"


def text(value: object) -> str:
    """Escaped text."""
    return escape(str(value), quote=True)


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits, without exponent; a dash for None and for what is not finite."""
    if value is None or not math.isfinite(value):
        return DASH
    if value == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(places, 9)}f}"


def recall(found: dict[str, Any] | None) -> str:
    """A recall with its interval below it; "no answer" for None."""
    if not found or found.get("value") is None:
        return '<span class="muted">no answer</span>'
    interval = ""
    if found.get("low") is not None and found.get("high") is not None:
        interval = f'<span class="interval">{found["low"]:.2f} to {found["high"]:.2f}</span>'
    return f"{found['value']:.3f}{interval}"


def cosine(value: float | None) -> str:
    """A cosine with as many nines as matter: 0.99999 must not read 1.000."""
    return DASH if value is None else f"{value:.6f}" if value > 0.999 else f"{value:.4f}"


def megabytes(value: float | None) -> str:
    """Bytes as MB (10^6), one decimal."""
    return DASH if value is None else f"{value / 1e6:,.1f}"


def seconds(value: float) -> str:
    """A duration that a person reads: 0.41 s, 41 s, 6 min 52 s."""
    if value < 10:
        return f"{value:.2f} s"
    if value < 90:
        return f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]], *, textual: Sequence[int] = ()) -> str:
    """A table whose cells are ready HTML; the first column holds the row headers. `textual` columns are left-aligned."""

    def kind(column: int) -> str:
        return ' class="text"' if column in textual else ""

    head = "".join(
        f'<th scope="col"{" class=text" if column == 0 or column in textual else ""}>{title}</th>' for column, title in enumerate(heads)
    )
    body = "".join(
        "<tr>" + "".join(f'<th scope="row">{cell}</th>' if column == 0 else f"<td{kind(column)}>{cell}</td>" for column, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    # a table that scrolls sideways must be reachable by keyboard
    inner = f"<table><caption>{text(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{text(caption)}">{inner}</div>'


def chart(svg: str, title: str, note: str = "") -> str:
    """A drawing with its visible title."""
    return f'<figure class="chart"><figcaption><b>{text(title)}</b>{" " + text(note) if note else ""}</figcaption>{svg}</figure>'


def dot(kind: str) -> str:
    """The coloured dot of a kind of row."""
    order = ("baseline", "teacher", "student", "artefact")
    return f'<span class="dot" aria-hidden="true" style="background:var(--k{order.index(kind) + 1 if kind in order else 1})"></span>'


def badge(label: str, tone: str = "plain") -> str:
    """A small pill; tone is good, bad, warn or plain."""
    return f'<span class="badge {tone}">{text(label)}</span>'


def listing(items: Sequence[str]) -> str:
    """A bullet list of ready HTML."""
    return f'<ul class="plain">{"".join(f"<li>{item}</li>" for item in items)}</ul>'


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Names and values (ready HTML) side by side."""
    return f'<dl class="facts">{"".join(f"<dt>{text(name)}</dt><dd>{value}</dd>" for name, value in pairs)}</dl>'
