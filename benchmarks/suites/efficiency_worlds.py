"""What the students of the learning-efficiency experiment read: pairs of several shares of noise, and their stores.

    web50       half of the captions wrong or a bare generic tag; teachers whose projectors, and a captioner that, read these same pairs
    web25, web0 the same with a quarter, and with none
    apart       of web50 the pairs of half of the concepts in two styles; teachers whose projectors read clean pairs of the other
                half of the concepts in the third style. Nothing that they were trained on is a student's pair.
    shuffled    web0 with a tenth or half of the captions dealt to other pictures of the same style
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.suites.captions import captioned_store, train_captioner
from benchmarks.suites.demo import TEACHERS, DemoConfig, Layout, prepare
from benchmarks.suites.stages import Stages
from distill.keep_list import write_keep_list
from runtime.pairs import Pairs, open_pairs, write_shard

NOISE = {"web50": "0.5", "web25": "0.25", "web0": "0"}
SHUFFLED = {"shuffled10": 0.1, "shuffled50": 0.5}
TEACHERS_STYLE = "openmoji"
"""The style of the clean pretraining apart; the students' are the two others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """Pairs to train on, their stores, and keep-lists; validation and test pairs are those of every world."""

    pairs: Path
    stores: dict[str, Path]
    keeps: dict[str, Path]
    concepts: frozenset[str] | None = None
    """Whose queries are asked; None: all trained ones."""


def make_world(name: str, run: Path, out: Path, say: Callable[[str], None], seed: int = 0) -> World:
    """Make what is missing of a world and return it. run: the demo run, made as far as its store where it is not."""
    if name in SHUFFLED:
        return _shuffled(name, make_world("web0", run, out, say, seed), out / name, say, seed)
    if name == "apart":
        return _apart(run, out, say, seed)
    folder = run if name == "web50" else out / name
    folder.mkdir(parents=True, exist_ok=True)
    place = Layout(folder)
    prepare(DemoConfig(out=str(folder), seed=seed), place, Stages(folder, say), NOISE[name])
    stages = Stages(out / f"{name}-captions", say)
    train_captioner(place, stages, threads=2)
    strong = captioned_store(place, stages)
    stores = {"strong": strong}
    if name == "web50":
        # views that are crops alone
        teachers, captions = [place.teacher(one) for one in TEACHERS], stages.out / "train"
        more = ["--augment.operations", "0", "--captions", str(captions)]
        stores["weak"] = _reinforce(stages, place.train, stages.out / "store-weak", teachers, seed, more, inputs=[captions / "receipt.json"])
    keep = out / f"{name}.keep"
    pairs = open_pairs(place.train)
    write_keep_list(keep, [key for row, key in enumerate(pairs.keys) if pairs.meta(row).get("noise", "none") == "none"], {"about": "pairs whose caption is right"})
    return World(pairs=place.train, stores=stores, keeps={"right": keep})


def in_first_half(concept: str) -> bool:
    """Whether a concept is one of the students' in the world apart; the teachers there have read the others. By hash: half of them."""
    return hashlib.sha256(b"apart\0" + concept.encode()).digest()[0] < 128


def _apart(run: Path, out: Path, say: Callable[[str], None], seed: int) -> World:
    noisy, clean = make_world("web50", run, out, say, seed), make_world("web0", run, out, say, seed)
    folder = out / "apart"
    source, learned, read = open_pairs(clean.pairs), open_pairs(noisy.pairs), folder / "teachers-pairs"
    chosen = [row for row in range(len(source)) if source.meta(row)["style"] == TEACHERS_STYLE and not in_first_half(source.meta(row)["concept"])]
    copy_pairs(source, chosen, read)
    keep = out / "apart.keep"
    rows = [row for row in range(len(learned)) if learned.meta(row)["style"] != TEACHERS_STYLE and in_first_half(learned.meta(row)["concept"])]
    write_keep_list(keep, [learned.keys[row] for row in rows], {"about": "pairs of half of the concepts in two styles"})
    stages = Stages(folder, say)
    teachers = [folder / "teachers" / name for name in TEACHERS]
    stages.run(
        "teachers",
        [["distill.projectors", str(read), str(teacher), "--backbone", backbone, "--image-size", "128", "--keep", "1", "--seed", str(seed)]
         for teacher, backbone in zip(teachers, TEACHERS.values(), strict=True)],
        inputs=[read / "pairs-00000.tar"], outputs=[teacher / "receipt.json" for teacher in teachers],
    )  # fmt: skip
    store = _reinforce(stages, noisy.pairs, folder / "store", teachers, seed)
    return World(pairs=noisy.pairs, stores={"strong": store}, keeps={"": keep}, concepts=frozenset(learned.meta(row)["concept"] for row in rows))


def _shuffled(name: str, clean: World, folder: Path, say: Callable[[str], None], seed: int) -> World:
    """Captions dealt anew among a share of the pairs of each style, none to its own picture."""
    source, made = open_pairs(clean.pairs), folder / "pairs"
    captions = {row: source.caption(row) for row in range(len(source))}
    generator = random.Random(f"shuffle {seed}")
    for style in sorted({source.meta(row)["style"] for row in captions}):
        rows = [row for row in captions if source.meta(row)["style"] == style]
        taken = generator.sample(rows, round(SHUFFLED[name] * len(rows)))
        for row, other in zip(taken, [source.caption(row) for row in (*taken[1:], taken[0])], strict=True):
            captions[row] = other
    copy_pairs(source, list(captions), made, captions)
    stages = Stages(folder, say)
    teacher = clean.pairs.parents[1] / "teachers" / next(iter(TEACHERS))
    return World(pairs=made, stores={"strong": _reinforce(stages, made, folder / "store", [teacher], seed)}, keeps={})


def _reinforce(
    stages: Stages, pairs: Path, store: Path, teachers: Sequence[Path], seed: int, more: Sequence[str] = (), inputs: Sequence[Path] = ()
) -> Path:  # fmt: skip
    stages.run(
        f"reinforce-{store.name}",
        [["mobileclip.cli", "reinforce", str(pairs), str(store), "--teachers", *map(str, teachers), "--augmentations", "5", *more, "--workers", "2", "--seed", str(seed)]],
        inputs=[*(teacher / "receipt.json" for teacher in teachers), *inputs], outputs=[store / "index.json"],
    )  # fmt: skip
    return store


def copy_pairs(source: Pairs, rows: Sequence[int], out: Path, captions: dict[int, str] | None = None) -> None:
    """Write rows of a pairs folder as one shard of another, with other captions where they are given. The same rows give the same bytes."""
    out.mkdir(parents=True, exist_ok=True)
    samples = [
        (source.keys[row], {"jpg": source.image_bytes(row), "txt": (captions[row] if captions else source.caption(row)).encode(), "json": _json(source, row)})
        for row in rows
    ]
    write_shard(out / "pairs-00000.tar", samples)


def _json(source: Pairs, row: int) -> bytes:
    return json.dumps(source.meta(row), ensure_ascii=False, sort_keys=True).encode()
