"""MODELCARD.md of a bundle: what the model is, made from what, how good, where it fails, and what each artefact was shown to be."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from export.licences import Work
from runtime.errors import RecipeError
from runtime.manifest import Artefact, Manifest

FIGURES = ("recall@1", "recall@5", "recall@10")


def read_evaluation(path: Path) -> dict[str, Any]:
    """What `mclip eval --json` wrote. Raises RecipeError where the file holds no retrieval figures."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"--evaluation {path}: cannot be read as JSON ({type(error).__name__}); give what mclip eval --json printed") from None
    if not isinstance(result, dict) or not list(_slices(result)):
        raise RecipeError(f"--evaluation {path}: holds no retrieval figures; give what mclip eval --json printed")
    return result


def model_card(
    manifest: Manifest, receipt: Mapping[str, Any], works: Sequence[Work], evaluations: Mapping[str, Mapping[str, Any]], intended: str | None, failures: Sequence[str]
) -> str:
    """The card as Markdown, the same for the same input.

    Args:
        evaluations: name to what `read_evaluation` gives.
        intended: what the model is meant for, in the words of who ships it.
        failures: known failures, one sentence each.
    """
    parts = [
        f"# {manifest.name}\n\nAn image-text model: pictures and texts become vectors of {manifest.embed_dim} numbers whose dot product says how well they fit.\n",
        _facts(manifest),
        "## Intended use\n\n" + (intended or "Not stated by who made this bundle. Measure it on pictures of your own purpose before you rely on it.") + "\n",
        _making(receipt),
        _quality(evaluations),
        _failures(manifest, failures),
        _artefacts(manifest.artefacts),
        _licences(works),
    ]
    return "\n".join(part for part in parts if part)


def _facts(manifest: Manifest) -> str:
    image, text = manifest.image, manifest.text
    rows = {
        "parameters": f"{manifest.provenance.get('parameters', 0):,}",
        "pictures": f"{image.image_size} x {image.image_size}, {image.interpolation}, mean {_numbers(image.mean)}, standard deviation {_numbers(image.std)}",
        "texts": f"{text.context_length} tokens of {text.vocab_size:,}, mask {text.mask}",
        "languages": ", ".join(manifest.languages),
        "loss": f"{manifest.loss}, logit scale {manifest.logit_scale:.4g}" + ("" if manifest.logit_bias is None else f", bias {manifest.logit_bias:.4g}"),
        "checkpoint (sha256)": str(manifest.provenance.get("checkpoint_sha256", "unknown")),
    }
    return "| | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in rows.items())


def _making(receipt: Mapping[str, Any]) -> str:
    settings, figures = receipt.get("config") or {}, receipt.get("figures") or {}
    lines = [f"- stage: {receipt.get('stage', 'not recorded')}"]
    if settings.get("recipe"):
        lines.append(f"- recipe: {settings['recipe']}, seed {settings.get('seed')}")
    if figures.get("samples"):
        lines.append(f"- samples seen: {figures['samples']:,} of {figures.get('pairs', 0):,} pairs; {figures.get('unreadable_count', 0)} unreadable")
    for key, sha256 in sorted((receipt.get("inputs") or {}).get("pairs", {}).items()):
        lines.append(f"- pairs {key}: sha256 {str(sha256)[:12]}…")
    return "## How it was made\n\n" + "\n".join(lines) + "\n"


def _quality(evaluations: Mapping[str, Mapping[str, Any]]) -> str:
    if not evaluations:
        return "## Quality\n\nNo evaluation was given when this bundle was made (`mclip export --evaluation`). The figures below compare artefacts with the checkpoint, no more.\n"
    rows = []
    for name, result in evaluations.items():
        for direction, part, figures in _slices(result):
            cells = " | ".join(_figure(figures.get(figure)) for figure in FIGURES)
            rows.append(f"| {name} | {direction.replace('_', ' ')} | {part} | {figures.get('n', '')} | {cells} |")
    head = f"| evaluation | direction | slice | n | {' | '.join(FIGURES)} |\n|---|---|---|---|{'---|' * len(FIGURES)}\n"
    return "## Quality\n\nWith 95 % intervals.\n\n" + head + "\n".join(rows) + "\n"


def _slices(result: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """(direction, slice, figures) wherever an evaluation holds them."""
    for name, value in result.items():
        if name in ("text_to_image", "image_to_text") and isinstance(value, dict):
            for part, figures in value.items():
                if isinstance(figures, dict) and any(figure in figures for figure in FIGURES):
                    yield name, part, figures
        elif isinstance(value, dict):
            yield from _slices(value)


def _figure(value: Any) -> str:
    if not isinstance(value, dict) or "value" not in value:
        return ""
    return f"{value['value']:.3f} [{value.get('low', float('nan')):.3f}, {value.get('high', float('nan')):.3f}]"


def _failures(manifest: Manifest, failures: Sequence[str]) -> str:
    refused = [f"{artefact.id} was not shipped: {artefact.reason}" for artefact in manifest.artefacts if artefact.status in ("refused", "failed")]
    lines = [*failures, *refused]
    return "## Known failures\n\n" + ("\n".join(f"- {line}" for line in lines) if lines else "None recorded, which does not mean that there are none.") + "\n"


def _artefacts(artefacts: Sequence[Artefact]) -> str:
    rows = []
    for artefact in artefacts:
        parity = artefact.parity or {}
        figures = (("cosine_min", ".6f"), ("centred_p1", ".4f"), ("recall1_change", "+.3f"))
        cells = [f"{parity[name]:{form}}" if isinstance(parity.get(name), int | float) else "" for name, form in figures]
        rows.append(f"| {artefact.id} | {artefact.status} | {' | '.join(cells)} | {artefact.path or ''} |")
    head = "| artefact | status | least cosine | centred cosine, first percentile | change of recall@1 | file |\n|---|---|---|---|---|---|\n"
    return "## Artefacts against the checkpoint\n\n" + head + "\n".join(rows) + "\n"


def _licences(works: Sequence[Work]) -> str:
    return "## Licences\n\n" + "\n".join(f"- {work.what} ({work.name}): {work.licence} [{work.standing}]" for work in works) + "\n\nMore in THIRD_PARTY.md.\n"


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
