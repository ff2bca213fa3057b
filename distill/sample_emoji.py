"""``mclip sample emoji``: which picture goes where with which caption, and the resumable writing of it."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import PIL
import tyro

from distill.fetch import CLDR, CLDR_DERIVED, EMOJIBASE, PACKAGES, STYLES, fetch, read_members
from distill.sample_concepts import Concept, Drawings, name_drawings, read_concepts, read_drawings
from distill.sample_render import MARGINS, Job, background_of, check_renderer, draw_batches, svg_of
from distill.sample_write import Plan, PlannedShard, write_sample
from runtime.errors import SampleError

logger = logging.getLogger(__name__)

SPLITS: dict[str, tuple[str, ...]] = {
    "train": ("noto", "fluent-emoji-flat", "openmoji"),
    "validation": ("emojione",),
    "test": ("twemoji",),
}
BASE_LANGUAGES = ("en", "de", "fr", "es", "it", "pt", "nl", "pl", "ru", "uk", "ja", "ko", "zh", "bn", "da", "et", "fi", "hi", "hu", "lt", "ms", "nb", "sv", "th", "vi")
CLDR_LANGUAGES = ("ar", "cs", "el", "id", "tr")
"""Not in emojibase, whose labels are the CLDR's: taken from there."""
LANGUAGES = (*BASE_LANGUAGES, *CLDR_LANGUAGES)
SHARD_PAIRS = 512
GENERIC = ("emoji", "icon", "clipart", "image", "picture", "sticker", "symbol", "logo", "vector graphic", "free download")
GENERIC_NUMBERED = ("image {}", "icon-{}.png", "IMG_{}", "clipart {}", "untitled {}")

Noise = Literal["none", "swapped", "generic"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EmojiConfig:
    """Emoji drawings of five vendors with human captions: train, validation and test, split by style and by concept."""

    pairs: Annotated[Path, tyro.conf.Positional]
    """Folder to write: train/, validation/, test/, captions/, sample.json, CREDITS.md."""
    web_noise: float = 0.0
    """Share of the training captions that belong to another picture or are a bare generic tag, as in a crawl."""
    image_size: int = 128
    """Width and height of the pictures in pixels."""
    concepts: int | None = None
    """Only so many trained concepts, and held-out ones in proportion."""
    cache: Path | None = None
    """Where the source packages are kept (default: ~/.cache/mobileclip-edge/sample, or $MOBILECLIP_CACHE/sample)."""
    seed: int = 0
    """Draws the noise and the choice of --concepts; the pictures do not depend on it."""
    json: bool = False
    """Print the receipt as one JSON object."""

    def check(self) -> None:
        """Raises SampleError when a setting is out of range."""
        if not 0 <= self.web_noise <= 1:
            raise SampleError(f"--web-noise is {self.web_noise}, expected a share from 0 to 1")
        if not 16 <= self.image_size <= 1024:
            raise SampleError(f"--image-size is {self.image_size}, expected 16 to 1024 pixels")
        if self.concepts is not None and self.concepts < 10:
            raise SampleError(f"--concepts is {self.concepts}, expected at least 10")

    def arguments(self) -> dict[str, Any]:
        """What decides the contents: the settings without the places."""
        return {"web_noise": self.web_noise, "image_size": self.image_size, "concepts": self.concepts, "seed": self.seed}


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """One picture of the sample with the caption that it gets."""

    key: str
    style: str
    concept: Concept
    caption: str
    noise: Noise = "none"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sources:
    """What was read from the packages."""

    concepts: list[Concept]
    drawings: Mapping[str, Drawings]
    captions: Mapping[str, list[dict[str, Any]]]


def make_emoji(config: EmojiConfig, advance: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Write the sample (or what is missing of it) and return its receipt; ``["already_complete"]`` says nothing was to do.

    Args:
        config: the settings.
        advance: called with (pictures done, pictures to do) while drawing.

    Raises:
        SampleError: a setting is out of range, the folder holds another sample, or the packages cannot be had.
        MissingExtraError: the renderer or npm is not installed.
    """
    config.check()
    tools = {"resvg_py": check_renderer(), "pillow": PIL.__version__}
    sources = read_sources(config.cache)
    pairs = plan_pairs(config, sources)
    return write_sample(config.pairs, _plan(config, sources, pairs, tools), _drawer(config, sources), advance)


def read_sources(cache: Path | None = None) -> Sources:
    """Fetch (when needed) and read the packages."""
    tarballs = fetch(cache)
    wanted = [f"{language}/data.json" for language in BASE_LANGUAGES]
    base = read_members(tarballs[EMOJIBASE.name], ["en/messages.json", *wanted])
    labels = {row["hexcode"].lower(): row["label"] for row in base["en/data.json"]}
    raw = {style: read_members(tarballs[package.name], ["icons.json", "chars.json"]) for style, package in STYLES.items()}
    named = [entry["chars.json"] for entry in raw.values() if entry["chars.json"]]
    drawings = {
        style: read_drawings(style, entry["icons.json"], entry["chars.json"], labels)
        if entry["chars.json"]
        else name_drawings(style, entry["icons.json"], labels, named)
        for style, entry in raw.items()
    }
    concepts = read_concepts(base["en/data.json"], base["en/messages.json"], drawings.values())
    gallery = drawings[SPLITS["test"][0]].names
    captions = {language: base[f"{language}/data.json"] for language in BASE_LANGUAGES} | _read_cldr(tarballs)
    return Sources(concepts=[concept for concept in concepts if concept.code in gallery], drawings=drawings, captions=captions)


def _read_cldr(tarballs: Mapping[str, Path]) -> dict[str, list[dict[str, Any]]]:
    """Language -> rows with the keys that emojibase's have."""
    captions: dict[str, list[dict[str, Any]]] = {language: [] for language in CLDR_LANGUAGES}
    for package, kind in ((CLDR, "annotations"), (CLDR_DERIVED, "annotationsDerived")):
        members = {language: f"{kind}/{language}/annotations.json" for language in CLDR_LANGUAGES}
        read = read_members(tarballs[package.name], list(members.values()))
        for language, member in members.items():
            for text, entry in read[member][kind]["annotations"].items():
                if entry.get("tts"):
                    captions[language].append({"hexcode": "-".join(f"{ord(sign):04x}" for sign in text), "label": entry["tts"][0], "tags": entry.get("default", [])})
    return captions


def plan_pairs(config: EmojiConfig, sources: Sources) -> dict[str, list[Pair]]:
    """Split -> its pairs, sorted by key. Held-out families are absent from train in every style."""
    concepts = _choose(sources.concepts, config.concepts, config.seed)
    pairs: dict[str, list[Pair]] = {}
    for split, styles in SPLITS.items():
        pairs[split] = [
            Pair(key=f"{style}-{concept.code}", style=style, concept=concept, caption=concept.label)
            for style in styles
            for concept in concepts
            if concept.code in sources.drawings[style].names and not (split == "train" and concept.held_out)
        ]
    pairs["train"] = add_web_noise(pairs["train"], config.web_noise, config.seed)
    return {split: sorted(members, key=lambda pair: pair.key) for split, members in pairs.items()}


def add_web_noise(pairs: Sequence[Pair], share: float, seed: int) -> list[Pair]:
    """Give a share of each style's pairs (exact to rounding) a wrong caption: half another picture's, half a generic tag.

    Which pairs and which captions follow from hashes of seed and key, so a pair is noisy at 0.5 whenever it is at 0.3.
    """
    result = list(pairs)
    by_style: dict[str, list[int]] = {}
    for index, pair in enumerate(pairs):
        by_style.setdefault(pair.style, []).append(index)
    for members in by_style.values():
        members.sort(key=lambda index: _draw(seed, "noise", pairs[index].key))
        noisy = members[: int(share * len(members) + 0.5)]
        for turn, index in enumerate(noisy):
            pair = pairs[index]
            if turn % 2 == 0:
                result[index] = _noisy(pair, "swapped", _other_label(pairs, pair, seed))
            else:
                result[index] = _noisy(pair, "generic", _generic_tag(pair, seed))
    return result


def pair_facts(pair: Pair, web_like: bool) -> dict[str, Any]:
    """``KEY.json``. A web-like pair says what kind of noise it got and never what the clean label would be."""
    concept = pair.concept
    facts: dict[str, Any] = {
        "concept": concept.code,
        "style": pair.style,
        "family": concept.family,
        "held_out": concept.held_out,
        "slice": concept.slice,
        "group": concept.group,
    }
    return {**facts, "noise": pair.noise} if web_like else {**facts, "label": concept.label, "tags": list(concept.tags)}


def _choose(concepts: Sequence[Concept], count: int | None, seed: int) -> list[Concept]:
    """The first trained concepts of a shuffle of whole families, and held-out ones in the same proportion as in all."""
    if count is None:
        return list(concepts)
    kept: set[str] = set()
    trained = [concept for concept in concepts if not concept.held_out]
    held_out = [concept for concept in concepts if concept.held_out]
    for members, wanted in ((trained, count), (held_out, round(count * len(held_out) / len(trained)))):
        shuffled = sorted(members, key=lambda concept: _draw(seed, "family", concept.family))  # stable: a family stays together
        kept.update(concept.code for concept in shuffled[:wanted])
    return [concept for concept in concepts if concept.code in kept]


def _draw(seed: int, purpose: str, name: str) -> int:
    """A 64-bit number that depends on nothing but its arguments, on every platform and version."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{purpose}:{name}".encode()).digest()[:8], "big")


def _noisy(pair: Pair, noise: Noise, caption: str) -> Pair:
    return Pair(key=pair.key, style=pair.style, concept=pair.concept, caption=caption, noise=noise)


def _other_label(pairs: Sequence[Pair], pair: Pair, seed: int) -> str:
    start = _draw(seed, "other", pair.key)
    for step in range(len(pairs)):
        other = pairs[(start + step) % len(pairs)].concept
        if other.family != pair.concept.family and other.label != pair.concept.label:
            return other.label
    raise SampleError("web-like noise needs training pictures of at least two families; raise --concepts")


def _generic_tag(pair: Pair, seed: int) -> str:
    drawn = _draw(seed, "generic", pair.key)
    kind, number = drawn % 4, drawn >> 8
    if kind == 0:
        return pair.concept.group
    if kind == 1:
        return GENERIC_NUMBERED[number % len(GENERIC_NUMBERED)].format(number % 9973 + 1)
    return GENERIC[number % len(GENERIC)]


def _drawer(config: EmojiConfig, sources: Sources) -> Callable[..., Any]:
    def draw(shards: Sequence[PlannedShard], advance: Callable[[int], None]) -> Any:
        jobs = [[_job(config, sources, key) for key, _ in shard.samples] for shard in shards]
        return draw_batches(jobs, advance)

    return draw


def _job(config: EmojiConfig, sources: Sources, key: str) -> Job:
    style = next(name for name in sources.drawings if key.startswith(f"{name}-"))
    drawings = sources.drawings[style]
    svg = svg_of(drawings.icons, drawings.names[key.removeprefix(f"{style}-")], MARGINS[style])
    return Job(key=key, svg=svg, background=background_of(key), size=config.image_size)


def _plan(config: EmojiConfig, sources: Sources, pairs: Mapping[str, Sequence[Pair]], tools: dict[str, str]) -> Plan:
    web_like = config.web_noise > 0
    shards: list[PlannedShard] = []
    for split, members in pairs.items():
        for style in SPLITS[split]:
            own = [pair for pair in members if pair.style == style]
            for number, at in enumerate(range(0, len(own), SHARD_PAIRS)):
                samples = tuple((pair.key, _texts(pair, web_like and split == "train")) for pair in own[at : at + SHARD_PAIRS])
                shards.append(PlannedShard(name=f"{split}/{style}-{number:05d}.tar", samples=samples))
    concepts = {pair.concept.code: pair.concept for members in pairs.values() for pair in members}
    files = {f"captions/{language}.jsonl": _captions(sources.captions[language], concepts) for language in LANGUAGES}
    files["CREDITS.md"] = _credits(config).encode()
    return Plan(kind="emoji", arguments=config.arguments(), facts=_facts(pairs, concepts), packages=_packages(), tools=tools, shards=shards, files=files)


def _texts(pair: Pair, web_like: bool) -> dict[str, bytes]:
    facts = json.dumps(pair_facts(pair, web_like), ensure_ascii=False, separators=(",", ":"))
    return {"txt": pair.caption.encode(), "json": facts.encode()}


def _captions(rows: Sequence[dict[str, Any]], concepts: Mapping[str, Concept]) -> bytes:
    named = {_bare(row["hexcode"].lower()): row for row in rows}
    found = {code: named[_bare(code)] for code in sorted(concepts) if _bare(code) in named}
    lines = [json.dumps({"concept": code, "label": row["label"], "tags": row.get("tags", [])}, ensure_ascii=False) for code, row in found.items()]
    return ("\n".join(lines) + "\n").encode()


def _bare(code: str) -> str:
    """Without variation selectors, which sources write or leave out as they like."""
    return "-".join(part for part in code.split("-") if part != "fe0f")


def _packages() -> list[dict[str, Any]]:
    return [{**asdict(package), "used_for": _use(package.name)} for package in PACKAGES]


def _use(name: str) -> str:
    style = name.rpartition("/")[2]
    return next((f"pictures: {split}" for split, styles in SPLITS.items() if style in styles), "captions")


def _facts(pairs: Mapping[str, Sequence[Pair]], concepts: Mapping[str, Concept]) -> dict[str, Any]:
    families = {concept.family: concept.held_out for concept in concepts.values()}
    gallery = sorted(pair.key for pair in pairs["test"])
    return {
        "splits": {
            split: {
                "pairs": len(members),
                "styles": dict(Counter(pair.style for pair in members)),
                "slices": dict(Counter(pair.concept.slice for pair in members)),
                "held_out": sum(pair.concept.held_out for pair in members),
                "noise": dict(Counter(pair.noise for pair in members)),
            }
            for split, members in pairs.items()
        },
        "gallery": {"count": len(gallery), "sha256": hashlib.sha256("\n".join(gallery).encode()).hexdigest()},
        "families": {"count": len(families), "held_out": sum(families.values())},
        "concepts": {"count": len(concepts), "held_out": sum(concept.held_out for concept in concepts.values())},
        "languages": list(LANGUAGES),
    }


def _credits(config: EmojiConfig) -> str:
    lines = [
        "# Credits",
        "",
        f"The pictures are other people's drawings, rendered at {config.image_size} px on plain backgrounds. Each keeps its own licence;",
        "OpenMoji's also asks that what is made from its pictures be shared alike.",
        "",
        "| what | used for | author | licence | source | package |",
        "|---|---|---|---|---|---|",
    ]
    for package in PACKAGES:
        what = package.name.rpartition("/")[2]
        lines.append(f"| {what} | {_use(package.name)} | {package.author} | {package.licence} | {package.source} | {package.name} {package.version} |")
    return "\n".join(lines) + "\n"
