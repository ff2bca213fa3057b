"""The search for int8 of both towers of a checkpoint, and what precision.json and the exporter take from it."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from export.draft import Job
from export.front import Arm, arms_of, measure_front, names_of
from export.quality import Limits
from export.search import Point, Search, best, table
from export.to_onnx import export_onnx
from export.towers import TOWERS, Tower, choose_rows, encoder_of, read_samples
from export.verify import at_chance, reference_of
from mobileclip.checkpoint import open_tokenizer, preprocess_config
from mobileclip.folding import reparameterize
from mobileclip.model import ImageTextModel
from runtime.errors import RecipeError
from runtime.pairs import open_pairs

LOSS_POINTS = 0.5  # of recall@1, where only a latency is asked for
ROWS = 64  # that ranges are taken over
PROBE = 48  # that layers are compared on
SEARCHED = ("onnx", "openvino")  # where a verdict holds: other targets judge their own int8 at export
FEWEST = 64


def search_towers(config: Any, checkpoint: Path, model: ImageTextModel, say: Callable[[str], None]) -> dict[str, Any]:
    """Search both towers within the limits of a `CompressConfig`.

    Returns:
        `front`: with `--front` what `measure_front` returns.
        `chosen`: tower to the runtime that the chosen form is fastest on, and how fast.
        `int8`: tower to the recipe that the exporter follows.
        `refused`: tower to target to the reason why it gets no int8.
        `report`: every point that was measured.
        `calibration`: which pairs decided.

    Raises:
        RecipeError: too few pairs, a checkpoint that finds no more than chance would, or a latency that no form of a tower reaches.
    """
    limits = limits_of(config)
    pairs = open_pairs(config.calibrate)
    if len(pairs) < FEWEST:
        raise RecipeError(f"'{config.calibrate}' has {len(pairs)} pairs, and a search for int8 needs at least {FEWEST}: for ranges, for comparing layers and for judging")
    sets = choose_rows(len(pairs), (min(ROWS, len(pairs) // 4), min(PROBE, len(pairs) // 4), config.judge), config.seed)
    pixels, tokenizer = preprocess_config(model.config), open_tokenizer(checkpoint, model.config)
    read = [read_samples(pairs, rows, pixels, tokenizer) for rows in sets]
    for line in (line for _, skipped in read for line in skipped):
        say(f"left out: {line}")
    rows, probe, judge = (samples for samples, _ in read)
    reference = reference_of(model, judge)
    untrained = at_chance(reference)
    if untrained:
        raise RecipeError(f"nothing would judge a search for int8: the checkpoint is {untrained}; train it first, or give pairs that it knows")
    folded = model if model.config.folded else reparameterize(model)[0]
    points: list[Point] = []
    arms: dict[Tower, list[Arm]] = {}
    front_files = tempfile.TemporaryDirectory() if config.front else None
    for tower in TOWERS:
        graph = export_onnx(encoder_of(folded, tower), rows.inputs(tower))
        notes = config.out.with_name(f"{config.out.name}.search") / f"{tower}.json"
        notes.parent.mkdir(parents=True, exist_ok=True)
        search = Search(
            tower=tower, model=graph, rows=rows.inputs(tower), probe=probe.inputs(tower), judge=judge, reference=reference, limits=limits, notes=notes, say=say
        )
        found_points = search.run()
        points += found_points
        if front_files is not None:
            half = Job(model=folded, tower=tower, calibration=rows, folder=Path(front_files.name)).onnx_half
            graphs = {name: search.graph(point.recipe) for name, point in names_of(found_points).items()}
            arms[tower] = arms_of(tower, graph, rows.inputs(tower), half, graphs, Path(front_files.name) / tower)
    for line in table(points).splitlines():
        say(line)
    found: dict[str, Any] = {"int8": {}, "chosen": {}, "refused": {}, "report": [point.as_dict() for point in points], "front": None}
    if front_files is not None:
        found["front"] = measure_front(arms, judge, reference, say=say)
        front_files.cleanup()
    for tower in TOWERS:
        own = [point for point in points if point.tower == tower]
        chosen, followed = best(own), best([point for point in own if point.recipe.form != "grouped"])
        if chosen is None and limits.latency is not None:
            raise RecipeError(f"no int8 form of the {tower} tower keeps to the budget; {_nearest(own, limits)}")
        if chosen is None:
            found["refused"][tower] = dict.fromkeys(SEARCHED, f"the search found no int8 form worth having; {_nearest(own, limits)}")
        else:
            if followed is not None:
                found["int8"][tower] = followed.recipe.as_dict()
            other = _refused(own, followed, limits)
            if other:
                found["refused"][tower] = other
            found["chosen"][tower] = {"runtime": chosen.runtime, "time_beside_float32": chosen.ratio.as_dict(), "bytes_ratio": chosen.bytes_ratio}
    keys = "\n".join((*rows.keys, *probe.keys, *judge.keys))
    found["calibration"] = {"n": len(rows) + len(probe), "judged_on": len(judge), "seed": config.seed, "keys_sha256": hashlib.sha256(keys.encode()).hexdigest()}
    return found


def _refused(points: list[Point], followed: Point | None, limits: Limits) -> dict[str, str]:
    """Where a tower that has a good form on one runtime has none on another: of matrix products, whose forms are each runtime's own."""
    grouped = next((point for point in points if point.recipe.form == "grouped"), None)
    reasons = {}
    if followed is None:
        reasons["onnx"] = f"the search found no int8 form worth having; {_nearest([point for point in points if point.recipe.form != 'grouped'], limits)}"
    if grouped is not None and grouped.problem is not None:
        reasons["openvino"] = f"the search tried it: {grouped.problem}"
    return reasons


def limits_of(config: Any) -> Limits:
    """Raises RecipeError for limits that make no sense."""
    loss = LOSS_POINTS if config.max_recall_loss is None else config.max_recall_loss
    if not 0 <= loss <= 100:
        raise RecipeError(f"--max-recall-loss is {loss:g} points, expected 0 to 100 (0.5 is half a hundredth of recall@1)")
    if config.latency is not None and not 0 < config.latency <= 1:
        raise RecipeError(f"--latency is {config.latency:g}, expected a share of float32's time above 0 and at most 1")
    if config.judge < FEWEST:
        raise RecipeError(f"--judge is {config.judge}, expected at least {FEWEST} pairs")
    return Limits(recall1_loss=loss / 100, latency=config.latency)


def _nearest(points: list[Point], limits: Limits) -> str:
    """The best that was reached, in a clause."""
    kept = [point for point in points if point.quality.misses(limits) is None]
    if kept:
        fastest = min(kept, key=lambda point: point.ratio.median)
        return f"the fastest that loses no more takes {fastest.ratio.median:.2f} of float32's time (on {fastest.runtime}, {len(fastest.recipe.float_layers)} layers float)"
    nearest = max(points, key=lambda point: point.quality.centred_p1)
    return f"the nearest has {nearest.quality.misses(limits)} (at {nearest.ratio.median:.2f} of float32's time)"
