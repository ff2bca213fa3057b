"""Captioners by name. No torch here: a captioner may be any callable.

A captioner is named by one string:

    coca:NAME[/PRETRAINED]        open_clip's CoCa; without PRETRAINED its weights are random (tests, timing)
    transformers:NAME_OR_PATH     any image-to-text or image-text-to-text model of transformers
    prefix:CHECKPOINT             the prefix captioner that mclip train-captioner wrote
    rewrite:NAME_OR_PATH          a causal or sequence-to-sequence language model of transformers that rewrites the pair's own caption
    module:function               a callable without arguments that returns any object with the attributes of `Captioner`,
                                  or one with a single argument, list of PIL pictures -> list of texts, or of lists of texts
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from runtime.errors import PairsError, RecipeError


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionerFacts:
    """What a captions folder says of its captioner. sha256: of the weights. settings: what else decides its captions."""

    name: str
    licence: str = "unknown"
    source: str = ""
    sha256: str = ""
    type: Literal["synthetic", "rewritten", "fused"] = "synthetic"
    reads: Literal["picture", "text", "both"] = "picture"
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """Captions that are wanted for one pair. `picture` or `text` is None where the captioner does not read it."""

    key: str
    picture: Image.Image | None
    text: str | None
    count: int
    uniforms: np.ndarray
    """(count, L) float64 in [0, 1): caption n may use row n and no other randomness."""
    vector: np.ndarray | None = None
    """The picture's stored embedding instead of the picture, where captions are made from a store."""


@runtime_checkable
class Captioner(Protocol):
    """What `mclip caption` needs. `most_uniforms`: how many random numbers a caption takes (L)."""

    facts: CaptionerFacts
    most_uniforms: int

    def caption(self, requests: Sequence[Request]) -> list[list[Draft]]:
        """As many drafts for each request as it counts, in the order of their numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """A caption as the captioner gave it, before it is cut and cleaned. note: joined to the captioner's name as the stored source."""

    text: str
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionerOptions:
    """What a captioner is opened with; `sampling` is a distill.nucleus.Sampling."""

    sampling: Any
    prompt: str | None = None
    best_of: int = 1
    device: str = "cpu"


def open_captioner(spec: str, options: CaptionerOptions) -> Captioner:
    """A captioner by its string (see the top of this module).

    Raises:
        RecipeError: the string fits none of the forms, an option does not go with it, or the callable does not return a captioner.
        CheckpointError: a model that cannot be loaded.
        MissingExtraError: its library is not installed.
    """
    kind, _, name = spec.partition(":")
    if kind in ("coca", "transformers", "prefix", "rewrite") and name:
        if options.best_of > 1 and kind != "prefix":
            raise RecipeError(f"best-of selection needs a captioner with a teacher, and '{kind}:' has none; leave --best-of at 1, or use prefix:CHECKPOINT")
        if options.prompt is not None and kind in ("coca", "prefix"):
            raise RecipeError(f"a captioner of the kind '{kind}:' reads no prompt; leave --prompt out")
        return _LOADERS[kind](name, options)
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", spec):
        return _callable(spec)
    raise RecipeError(f"captioner '{spec}' is no coca:NAME[/PRETRAINED], transformers:NAME, prefix:CHECKPOINT, rewrite:NAME and no module:function; give one of these")


def _coca(name: str, options: CaptionerOptions) -> Captioner:
    from distill.captioner_models import open_coca

    return open_coca(name, options)


def _transformers(name: str, options: CaptionerOptions) -> Captioner:
    from distill.captioner_models import open_image_to_text

    return open_image_to_text(name, options)


def _rewrite(name: str, options: CaptionerOptions) -> Captioner:
    from distill.captioner_models import open_rewriter

    return open_rewriter(name, options)


def _prefix(name: str, options: CaptionerOptions) -> Captioner:
    from distill.prefix_writing import open_prefix_captioner

    return open_prefix_captioner(name, options)


_LOADERS: dict[str, Callable[[str, CaptionerOptions], Captioner]] = {"coca": _coca, "transformers": _transformers, "prefix": _prefix, "rewrite": _rewrite}


class _Function:
    """A plain function as a captioner. Its captions are its own: no randomness is handed to it."""

    most_uniforms = 1

    def __init__(self, spec: str, function: Callable[[list[Image.Image]], Sequence[Any]]) -> None:
        self.facts = CaptionerFacts(name=spec, source="callable")
        self._function = function

    def caption(self, requests: Sequence[Request]) -> list[list[Draft]]:
        found = list(self._function([request.picture for request in requests if request.picture is not None]))
        return [[Draft(text=text) for text in ([made] if isinstance(made, str) else made)][: request.count] for made, request in zip(found, requests, strict=True)]


def _callable(spec: str) -> Captioner:
    module_name, _, function_name = spec.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise RecipeError(f"captioner '{spec}' cannot be imported ({error}); expected module:function on the Python path") from error
    try:
        needed = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    except (TypeError, ValueError) as error:
        raise RecipeError(f"captioner '{spec}' is no function ({error}); expected module:function") from error
    if needed:
        return _Function(spec, function)
    captioner = function()
    if not isinstance(captioner, Captioner) or not isinstance(captioner.facts, CaptionerFacts):
        raise RecipeError(f"captioner '{spec}' returned {type(captioner).__name__}, which lacks facts (CaptionerFacts), most_uniforms or caption")
    return captioner


def check_drafts(captioner: Captioner, requests: Sequence[Request], drafts: Any) -> list[list[Draft]]:
    """What a foreign captioner returned, one list of drafts a request. Raises PairsError for anything else."""
    sound = isinstance(drafts, list) and len(drafts) == len(requests) and all(
        isinstance(made, list) and all(isinstance(draft, Draft) and isinstance(draft.text, str) for draft in made) for made in drafts
    )  # fmt: skip
    if not sound:
        found = f"{len(drafts)} lists" if isinstance(drafts, list) else type(drafts).__name__
        raise PairsError(f"captioner '{captioner.facts.name}' returned {found} for {len(requests)} pairs; expected one list of drafts with texts for each")
    return drafts
