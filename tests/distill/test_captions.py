"""Typed captions derive from the pair's own caption and nothing else."""

from __future__ import annotations

import pytest

from distill.captions import TEMPLATES, TYPES, Caption, captions_of
from runtime.errors import RecipeError


def test_raw_first_then_templates_with_parent_and_source() -> None:
    made = captions_of("  flag:  France ", ("emoji", "photo"))
    assert made[0] == Caption(text="flag: France", type="raw", source="pairs", parent=-1)
    assert [(c.type, c.source, c.parent) for c in made[1:]] == [("template", "emoji", 0), ("template", "photo", 0)]
    assert [c.text for c in made[1:]] == ["an emoji of flag France", "a photo of flag France"]


def test_braces_in_a_caption_are_only_text() -> None:
    assert captions_of("{0} {x}", ("emoji",))[1].text == "an emoji of {0} {x}"


def test_every_template_holds_the_caption_once() -> None:
    assert all(phrase.count("{}") == 1 for phrase in TEMPLATES.values())
    assert all(caption.type in TYPES for caption in captions_of("cat", tuple(TEMPLATES)))


def test_unknown_template_is_named() -> None:
    with pytest.raises(RecipeError, match=r"unknown caption template poem; known are emoji"):
        captions_of("cat", ("poem",))
