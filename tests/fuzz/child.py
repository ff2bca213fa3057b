"""One target under libFuzzer: `python -m tests.fuzz.child TARGET CORPUS FINDS [libFuzzer's options]`. Every input that reaches new code is kept in CORPUS."""

from __future__ import annotations

import logging
import os
import resource
import sys
import tempfile
import warnings
from pathlib import Path

import atheris
from atheris import custom_mutator  # noqa: F401  (else it is loaded when there may be no room for it)

OURS = ("runtime", "mobileclip", "distill", "benchmarks")
ADDRESS_SPACE = 6 * 2**30
"""Virtual bytes: an allocation of what a file claims ends as MemoryError, and that is a find."""


def main(argv: list[str]) -> int:
    """Run until libFuzzer's own limits."""
    name, corpus, finds, *options = argv
    os.environ.update(MCLIP_PROGRESS="0", OMP_NUM_THREADS="1")
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="mclip-fuzz-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as work:
        os.environ["MOBILECLIP_CACHE"] = str(Path(work) / "cache")
        with atheris.instrument_imports(include=[*OURS, "zipfile", "tarfile"], enable_loader_override=False):
            from tests.fuzz.targets import TARGETS, well

            target = TARGETS[name]
            place = Path(work) / "place"
            place.mkdir()
            reader, seeds = target.prepare(place)
            for seed in seeds:
                well(reader, seed)
        for number, seed in enumerate(seeds):
            (Path(corpus) / f"sound-{number}").write_bytes(seed)
        if target.bounded:
            resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))

        def changed(data: bytes, size: int, seed: int) -> bytes:
            return target.change(data, size, seed, atheris.Mutate)

        atheris.Setup(
            ["fuzz", corpus, f"-artifact_prefix={finds}/", f"-max_len={target.most}", "-len_control=0", "-timeout=10", "-rss_limit_mb=1500", "-print_final_stats=1", *options],
            lambda data: well(reader, data) and None,
            custom_mutator=changed,
        )
        atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
