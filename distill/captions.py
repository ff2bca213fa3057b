"""Typed captions. What is made here derives from one string: the pair's own caption, right or wrong.

A web-like pair's clean label is unknown to this module by construction: nothing but the caption is handed in. Captions that look at
the picture, or rewrite the text, come from a captioner (distill/captioners.py, `mclip caption`) or from elsewhere (`open_captions`).

Every stored caption has one of five types, and training draws captions by type: `caption_mix = {"raw": 0.5, "synthetic": 0.5}` takes half
of a sample's draws from its own caption and half from captioners; types that a sample lacks leave their share to the others.

    raw         the pair's own caption
    template    that caption inside a fixed phrase
    synthetic   made by a captioner from the picture
    rewritten   made by a language model from another caption (LaCLIP, Fan et al. 2023, arXiv 2305.20088)
    fused       made from a picture's caption and its own caption together (VeCLIP, Lai et al. 2023, arXiv 2310.07699)
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runtime.errors import RecipeError

if TYPE_CHECKING:
    from pathlib import Path

    from distill.caption_files import CaptionFile

TYPES = ("raw", "template", "synthetic", "rewritten", "fused")
"""Kinds of captions; a store keeps the index. "raw" is the pair's own, "template" that one inside a fixed phrase."""

TEMPLATES: dict[str, str] = {
    "emoji": "an emoji of {}",
    "drawing": "a drawing of {}",
    "photo": "a photo of {}",
    "icon": "{}, icon",
}
"""Name to phrase; `{}` stands for the caption. A stored template caption names its template as `source`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Caption:
    """One caption of a pair.

    text: any string that UTF-8 can hold; type: one of TYPES; language: BCP-47; source: where it comes from ("pairs", a template's
    name, later a captioner); parent: index of the caption it was made from, -1 for none; sentence: index of the sentence of its
    parent, -1 for the whole.
    """

    text: str
    type: str = "raw"
    language: str = "en"
    source: str = "pairs"
    parent: int = -1
    sentence: int = -1


def captions_of(caption: str, templates: tuple[str, ...] = (), language: str = "en") -> list[Caption]:
    """The caption itself (index 0), then one per template. White space is collapsed, nothing else is changed.

    Raises:
        RecipeError: a template is unknown.
    """
    text = " ".join(caption.split())
    check_templates(templates)
    made = [Caption(text=text, language=language)]
    for name in templates:
        made.append(Caption(text=TEMPLATES[name].format(_inner(text)), type="template", language=language, source=name, parent=0))
    return made


def open_captions(path: str | Path) -> CaptionFile:
    """Captions made elsewhere or by `mclip caption`, by key: a folder, a .jsonl or a .parquet. See distill/caption_files.py, which says what it raises."""
    from distill import caption_files

    return caption_files.open_captions(path)


def check_templates(templates: tuple[str, ...]) -> None:
    """Raises RecipeError when a name is not in TEMPLATES."""
    unknown = [name for name in templates if name not in TEMPLATES]
    if unknown:
        raise RecipeError(f"unknown caption template {', '.join(unknown)}; known are {', '.join(TEMPLATES)}")


def _inner(text: str) -> str:
    """The caption as it stands inside a phrase: the colon of "flag: France" would read as a second phrase."""
    return re.sub(r"\s*:\s*", " ", text).strip()
