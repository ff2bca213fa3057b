"""Every target for its share of the time, two at once: `python -m tests.fuzz.run --seconds 600` (make fuzz SECONDS=600). Exit code 1 with a find.

A find (an input that ends otherwise than in a value or one sentence, that takes more than ten seconds or more than 1.5 GB) is left in out/fuzz/finds/TARGET; put it
in tests/fuzz/corpus with --keep once it is mended, and it is tried by every run of the tests. `--keep` also keeps the smallest inputs that reach what was reached.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.fuzz.corpus import add_kept, read_kept

ROOT = Path(__file__).parents[2]


def fuzz(name: str, seconds: float, out: Path) -> dict[str, object]:
    """One target for this long; what libFuzzer said of it."""
    corpus, finds = out / "corpus" / name, out / "finds" / name
    for folder in (corpus, finds):
        folder.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(read_kept(name)):
        (corpus / f"kept-{number}").write_bytes(data)
    log = out / f"{name}.log"
    before = set(finds.iterdir())
    with log.open("wb") as file:
        command = [sys.executable, "-m", "tests.fuzz.child", name, str(corpus), str(finds), f"-max_total_time={max(1, round(seconds))}"]
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
        try:
            code = subprocess.run(command, stdout=file, stderr=file, cwd=ROOT, check=False, timeout=seconds + 90, env=environment).returncode
        except subprocess.TimeoutExpired:
            code = -1000  # not even libFuzzer's own alarm was heard
    said = log.read_text(encoding="utf-8", errors="replace")

    def figure(pattern: str) -> int:
        found = re.findall(pattern, said)
        return int(found[-1]) if found else 0

    return {
        "target": name, "runs": figure(r"stat::number_of_executed_units:\s+(\d+)"), "edges": figure(r" cov: (\d+)"), "corpus": figure(r" corp: (\d+)"),
        "peak_mb": figure(r"stat::peak_rss_mb:\s+(\d+)"), "slowest_s": figure(r"stat::slowest_unit_time_sec:\s+(\d+)"), "code": code,
        "finds": sorted(path.name for path in set(finds.iterdir()) - before),
    }  # fmt: skip


def keep(name: str, out: Path, most: int) -> int:
    """Add what broke a target, then the smallest inputs that reached something new, to the kept corpus. Returns its bytes."""
    finds = [path.read_bytes() for path in (out / "finds" / name).iterdir()]
    reached = [path.read_bytes() for path in (out / "corpus" / name).iterdir() if not path.name.startswith(("sound-", "kept-"))]
    add_kept(name, finds, 4 * most)
    return add_kept(name, reached, most)


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.run")
    parser.add_argument("targets", nargs="*", help="these alone")
    parser.add_argument("--seconds", type=float, default=600, help="seconds altogether, on --jobs processors (600)")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--out", type=Path, default=Path("out/fuzz"))
    parser.add_argument("--keep", action="store_true", help="keep the inputs that reach most in tests/fuzz/corpus")
    options = parser.parse_args()
    from tests.fuzz.targets import TARGETS

    names = options.targets or list(TARGETS)
    if unknown := set(names) - set(TARGETS):
        parser.error(f"no target {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
    out, started = options.out.resolve(), time.monotonic()
    each = options.seconds * options.jobs / len(names)
    print(f"{len(names)} targets, {each:.0f} s each, {options.jobs} at once", flush=True)
    print(f"{'target':20} {'runs':>9} {'edges':>6} {'corpus':>6} {'peak MB':>8} {'finds':>6}")
    rows = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for row in pool.map(lambda name: fuzz(name, each, out), names):
            rows.append(row)
            broken = not row["runs"] and not row["finds"]
            print(f"{row['target']:20} {row['runs']:9} {row['edges']:6} {row['corpus']:6} {row['peak_mb']:8} {len(row['finds']):6}{'  DID NOT RUN' if broken else ''}", flush=True)  # type: ignore[arg-type]
    finds = {str(row["target"]): row["finds"] for row in rows if row["finds"] or row["code"]}
    for name, found in finds.items():
        print(f"FIND  {name}: {', '.join(found) if isinstance(found, list) and found else 'ended otherwise'}; see {options.out / f'{name}.log'}")
    if options.keep:
        print(f"kept: {sum(keep(name, out, 15_000) for name in names)} bytes")
    minutes = sum(each for _ in names) / 60
    print(json.dumps({"targets": len(rows), "runs": sum(int(str(row["runs"])) for row in rows), "cpu_minutes": round(minutes, 1), "finds": sum(map(len, finds.values())),
                      "peak_mb": max(int(str(row["peak_mb"])) for row in rows), "minutes": round((time.monotonic() - started) / 60, 1)}))  # fmt: skip
    return int(bool(finds) or any(not row["runs"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
