"""Search results as a contact sheet: one self-contained HTML page, pictures as small thumbnails that lead to the files."""

from __future__ import annotations

import base64
import html
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote_from_bytes

from runtime.errors import ImageError, shown
from runtime.preprocess import load_image

SIDE = 320
MOST_PICTURES = 200
_STYLE = """
:root{color-scheme:light dark;--back:#fafafa;--card:#fff;--line:#ddd;--ink:#1b1b1b;--soft:#666}
@media(prefers-color-scheme:dark){:root{--back:#161616;--card:#212121;--line:#3a3a3a;--ink:#eee;--soft:#aaa}}
body{margin:0;padding:1.5rem;background:var(--back);color:var(--ink);font:15px/1.45 system-ui,sans-serif}
h1{font-size:1.3rem;margin:0 0 .25rem;overflow-wrap:anywhere}p{margin:0 0 1.25rem;color:var(--soft)}
ol{list-style:none;margin:0;padding:0;display:grid;gap:1rem;grid-template-columns:repeat(auto-fill,minmax(14rem,1fr))}
li{background:var(--card);border:1px solid var(--line);border-radius:.5rem;overflow:hidden}
a{color:inherit;text-decoration:none;display:block}a:focus-visible{outline:3px solid #2a7de1;outline-offset:-3px}
img,.none{display:flex;width:100%;height:12rem;object-fit:contain;background:var(--back);align-items:center;justify-content:center;color:var(--soft)}
.name{padding:.5rem .7rem 0;overflow-wrap:anywhere}.facts{padding:0 .7rem .6rem;color:var(--soft);font-size:.85rem;overflow-wrap:anywhere}
"""


def contact_sheet(title: str, note: str, rows: Sequence[tuple[str, float, str]]) -> str:
    """The page.

    Args:
        title, note: plain text.
        rows: (path, score, date) in order; a path may hold surrogate escapes. Pictures that are gone or do not decode keep their place without one.
    """
    items = []
    for rank, (path, score, taken) in enumerate(rows, start=1):
        name = html.escape(shown(os.path.basename(path)))
        picture = thumbnail(path) if rank <= MOST_PICTURES else None
        shape = f'<img src="{picture}" alt="{name}" loading="lazy">' if picture else '<span class="none">no picture</span>'
        facts = f"{rank}. &nbsp;{score:.3f} &nbsp;{html.escape(taken[:10])} &nbsp;{html.escape(shown(os.path.dirname(path)))}"
        items.append(f'<li><a href="{html.escape(file_url(path))}">{shape}<div class="name">{name}</div><div class="facts">{facts}</div></a></li>')
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1"><title>{html.escape(shown(title))}</title>'
    body = f"<h1>{html.escape(shown(title))}</h1><p>{html.escape(shown(note))}</p><ol>{''.join(items)}</ol>"
    return f'<!doctype html><html lang="en"><head>{head}<style>{_STYLE}</style></head><body>{body}</body></html>\n'


def thumbnail(path: str) -> str | None:
    """A picture of at most SIDE pixels as a data URL; None when it does not decode."""
    from PIL import Image

    try:
        image = load_image(os.fsencode(path).decode("utf-8", "surrogateescape"))
        image.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC)
        target = io.BytesIO()
        image.save(target, "JPEG", quality=80)
    except (ImageError, OSError, ValueError):
        return None
    return "data:image/jpeg;base64," + base64.b64encode(target.getvalue()).decode("ascii")


def file_url(path: str) -> str:
    """file:// URL of an absolute path, every odd byte escaped."""
    data = os.fsencode(path)
    return "file://" + quote_from_bytes(data if os.name != "nt" else b"/" + data.replace(b"\\", b"/"), safe="/:" if os.name == "nt" else "/")


def open_page(path: Path) -> bool:
    """Show it in a browser; False where there is no display or no browser."""
    import webbrowser

    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return False
    try:
        return webbrowser.open(path.resolve().as_uri())
    except webbrowser.Error:
        return False
