"""All cases by format, and what warms a process up for them."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from tests.attacks.harness import Case, cli


def warm_up(folder: Path) -> None:
    """Sound files through every reader, so that imports and first uses count for no case."""
    import numpy as np
    import torch

    from tests.attacks import bundles, data, weights

    folder.mkdir(parents=True)
    bundles.load(bundles.toy_bundle(folder))()
    cli("verify", folder / "bundle")()
    cli("inspect", folder / "bundle")()
    (folder / "photos").mkdir()
    (folder / "photos/a.jpg").write_bytes(data.encoded("JPEG"))
    cli("index", folder / "photos", "--out", folder / "w.idx", "--bundle", folder / "bundle")()
    (folder / "r.jsonl").write_bytes(data.line())
    for words in (("report", folder / "r.jsonl", "-o", folder / "r.html"), ("import-results", "trtexec", folder / "r.jsonl", "--tower", "image")):
        with suppress(Exception):
            cli(*words)()
    torch.save({"a": torch.zeros(2)}, folder / "w.pt")
    weights.read(folder / "w.pt")()
    with suppress(Exception):
        cli("convert", folder / "w.pt", folder / "out")()
    data.read_store(data.made_store(folder))()
    data.photo_index(lambda place: None)(folder)()
    for name, case in (("pairs", data.tar_of(*data.good_pair())), ("checkpoint", weights.checkpoint(lambda config: None)), ("hub", weights.hub("no/such"))):
        (folder / name).mkdir()
        with suppress(Exception):
            case(folder / name)()
    for form in ("PNG", "JPEG", "WEBP", "TIFF", "GIF"):
        from tests.attacks.pictures import bytes_of, encoded

        bytes_of(encoded(form), f"w.{form}")(folder)()
    np.linalg.norm(np.ones(3))


def _cases() -> dict[str, dict[str, Case]]:
    from tests.attacks import bundles, data, pictures, weights

    return {
        "picture": pictures.PICTURES, "manifest": bundles.BUNDLES, "graph": bundles.GRAPHS, "tokenizer": bundles.TOKENIZERS, "golden": bundles.GOLDEN,
        "class table": bundles.TABLES, "bundle zip": bundles.ARCHIVES, "weights": weights.WEIGHTS, "checkpoint": weights.CHECKPOINTS, "pairs": data.PAIRS,
        "store": data.STORES, "photo index": data.INDEXES, "results": data.RESULTS, "device": data.DEVICES,
    }  # fmt: skip


CASES = _cases()
