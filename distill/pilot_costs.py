"""What a reinforcement costs: measured a picture, a view, a caption and a sample on the pilot's pairs, then multiplied out.

    seconds = N (decode + V (draw + sum of teachers' view) + C (sum of text trunks' caption))
    bytes   = N (row + V (parameters + sum of teachers' view) + C (caption + sum of teachers' text))

N = pairs, V = views a picture, C = captions a pair. Seconds are of one core (processor time, so that other work on the machine does not
count), or of the device that a teacher names.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distill.augment import AugmentSpec, sample_parameters
from distill.ensemble import Teacher, open_teacher
from distill.store import open_store
from distill.teachers import TorchTeacher, choose_device
from distill.views import open_picture
from runtime.files import write_json
from runtime.pairs import Pairs

FORMULA_SECONDS = "pairs x (decode + views x (draw + teachers' view seconds) + captions x text seconds)"
FORMULA_BYTES = "pairs x (row + views x (parameters + teachers' view bytes) + captions x (caption + teachers' text bytes))"
PICTURES, BATCH = 32, 32
MEASURED_SECONDS = 1.0
"""At least so long, or three calls, a teacher and kind."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What a reinforcement stores. captions: how many a pair."""

    teachers: tuple[str, ...]
    augmentations: int
    captions: float


def measure_seconds(specs: Sequence[str], names: Sequence[str], pairs: Pairs, path: Path, device: str = "cpu") -> dict[str, Any]:
    """Seconds of every stage on the first pictures and captions of `pairs`, in this process with one thread; kept in `path`.

    Args:
        specs, names: the teachers as they are given, and as the store names them. device: where those of torch run.

    Returns:
        JSON-ready {"device", "decode", "draw" (per size of a view), "teachers": {name: {"device", "image_size", "view", "text", "trunk"}}}.
        "trunk" is equal for teachers that share their text tower: it runs once for all of them.
    """
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    device = choose_device(device)
    teachers = [open_teacher(spec, device) for spec in specs]
    places = [device if isinstance(teacher, TorchTeacher) else str(getattr(teacher, "device", "cpu")) for teacher in teachers]
    chosen = range(min(PICTURES, len(pairs)))
    captions = list(dict.fromkeys(pairs.caption(row) for row in range(min(8 * BATCH, len(pairs)))))
    views, decode, draw = _draw([pairs.image_bytes(row) for row in chosen], sorted({teacher.image_size for teacher in teachers}))
    facts: dict[str, dict[str, Any]] = {}
    trunks: dict[str, float] = {}
    for name, teacher, place in zip(names, teachers, places, strict=True):
        trunk = hashlib.sha256(getattr(teacher, "text_trunk", name).encode()).hexdigest()[:16]
        clock = time.process_time if place == "cpu" else time.perf_counter
        if trunk not in trunks:
            trunks[trunk] = _text_seconds(teacher, captions, clock)
        facts[name] = {
            "device": place, "image_size": teacher.image_size, "trunk": trunk, "view": _view_seconds(teacher, views[teacher.image_size], clock), "text": trunks[trunk],
        }  # fmt: skip
    others = sorted({_device_name(place) for place in places if place != "cpu"})
    found = {"device": f"one core of {processor()}" + (f", teachers on {', '.join(others)}" if others else ""), "decode": decode, "draw": draw, "teachers": facts}
    write_json(path, found)
    return found


def _draw(pictures: Sequence[bytes], sizes: Sequence[int]) -> tuple[dict[int, np.ndarray], float, dict[str, float]]:
    """Views of each size, seconds to decode a picture, seconds to draw a view of each size. Medians."""
    rng = np.random.default_rng(0)
    views: dict[int, list[np.ndarray]] = {size: [] for size in sizes}
    decode: list[float] = []
    draw: dict[int, list[float]] = {size: [] for size in sizes}
    for data in pictures:
        started = time.process_time()
        picture = open_picture(data)
        parameters = sample_parameters(rng, AugmentSpec(), picture.size)
        picture.view(parameters, sizes[0])  # decoding may wait for the first view
        first = time.process_time() - started
        for size in sizes:
            started = time.process_time()
            views[size].append(picture.view(parameters, size))
            draw[size].append(time.process_time() - started)
        decode.append(max(0.0, first - draw[sizes[0]][-1]))
    return {size: np.stack(made) for size, made in views.items()}, float(np.median(decode)), {str(size): float(np.median(draw[size])) for size in sizes}


def _device_name(place: str) -> str:
    import torch

    return torch.cuda.get_device_name(place) if place.startswith("cuda") else place


def _view_seconds(teacher: Teacher, views: np.ndarray, clock: Callable[[], float]) -> float:
    """clock: processor time for a teacher on the processor, time on the wall for one on another device."""
    batch = views[np.arange(BATCH) % len(views)]
    teacher.encode_image(batch)  # the first call also compiles and allocates
    calls = list[float]()
    while len(calls) < 3 or sum(calls) < MEASURED_SECONDS:
        started = clock()
        teacher.encode_image(batch)
        calls.append(max(clock() - started, 1e-9))
    return float(np.median(calls)) / BATCH


def _text_seconds(teacher: Teacher, captions: Sequence[str], clock: Callable[[], float]) -> float:
    """Every call has other texts: teachers may remember their last answers."""
    teacher.encode_text([f"{caption}." for caption in captions[:BATCH]])
    calls = list[float]()
    for n in range(0, len(captions), BATCH):
        chunk, started = list(captions[n : n + BATCH]), clock()
        teacher.encode_text(chunk)
        calls.append((clock() - started) / len(chunk))
        if sum(calls) * BATCH > MEASURED_SECONDS and len(calls) >= 3:
            break
    return float(np.median(calls))


def measure_bytes(folder: Path) -> dict[str, Any]:
    """Bytes of a store by what they grow with: {"row", "parameters", "caption", "image": {teacher: a view}, "text": {teacher: a caption}}.

    Counted from the headers of the parts: every array's bytes over its rows, views or captions; headers and all else count to the row.
    """
    store = open_store(folder)
    rows, views, captions = len(store), int(store.n_augmentations.sum()), int(store.caption_counts.sum())
    sums: Counter[str] = Counter()
    whole = 0
    for entry in store.index["parts"]:
        with open(folder / entry["path"], "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        whole += entry["bytes"]
        for name, array in header.items():
            if name != "__metadata__":
                sums[_grows_with(name)] += array["data_offsets"][1] - array["data_offsets"][0]
    per_view = {store.teachers[n].name: sums[f"image.{n}"] / views for n in range(len(store.teachers))}
    per_text = {store.teachers[n].name: sums[f"text.{n}"] / captions for n in range(len(store.teachers))}
    rest = whole - sum(size for name, size in sums.items() if name != "row")
    return {"row": rest / rows, "parameters": sums["parameters"] / views, "caption": sums["caption"] / captions, "image": per_view, "text": per_text}


def _grows_with(array: str) -> str:
    kind, _, rest = array.partition(".")
    if kind in ("image", "text"):
        return f"{kind}.{rest.partition('.')[0]}"
    return {"augmentations": "parameters", "captions": "caption"}.get(kind, "row")


def cost(setting: Setting, seconds: dict[str, Any], sizes: dict[str, Any], pairs: int) -> dict[str, Any]:
    """Seconds and bytes of reinforcing `pairs` pairs, by the formulas at the top of this module. JSON-ready."""
    known = [seconds["teachers"][name] for name in setting.teachers]
    view = sum(fact["view"] for fact in known)
    draw = sum(seconds["draw"][str(size)] for size in {fact["image_size"] for fact in known})
    text = sum({fact["trunk"]: fact["text"] for fact in known}.values())
    per_pair = seconds["decode"] + setting.augmentations * (draw + view) + setting.captions * text
    view_bytes = sizes["parameters"] + sum(sizes["image"][name] for name in setting.teachers)
    caption_bytes = sizes["caption"] + sum(sizes["text"][name] for name in setting.teachers)
    bytes_per_pair = sizes["row"] + setting.augmentations * view_bytes + setting.captions * caption_bytes
    return {
        "teachers": list(setting.teachers), "augmentations": setting.augmentations, "captions": round(setting.captions, 3), "pairs": pairs,
        "seconds_per_pair": per_pair, "seconds": per_pair * pairs, "hours": per_pair * pairs / 3600,
        "bytes_per_pair": bytes_per_pair, "bytes": bytes_per_pair * pairs,
    }  # fmt: skip


def teacher_seconds(name: str, seconds: dict[str, Any]) -> float:
    """Of one view by one teacher, without drawing it."""
    return float(seconds["teachers"][name]["view"])


def processor() -> str:
    """The processor's name, as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    except OSError:
        pass
    return platform.processor() or platform.machine()
