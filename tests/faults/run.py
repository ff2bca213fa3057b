"""Every fault into every stage, as a table: `python -m tests.faults.run` (make faults). Exit code 1 when anything was lost or corrupt.

    python -m tests.faults.run index train        these stages alone
    python -m tests.faults.run --times 2          each count doubled
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.faults.harness import COUNTS, QUICK, Outcome, run_faults


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.run")
    parser.add_argument("stages", nargs="*", choices=[*COUNTS, []], default=[])
    parser.add_argument("--times", type=int, default=1, help="each count this many times")
    parser.add_argument("--quick", action="store_true", help="a few of them, in seconds")
    options = parser.parse_args()
    every = QUICK if options.quick else COUNTS
    counts = {name: {fault: n * options.times for fault, n in faults.items()} for name, faults in every.items() if not options.stages or name in options.stages}
    total, started = sum(sum(faults.values()) for faults in counts.values()), time.monotonic()
    found: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="mclip-faults-") as name:
        for outcome in run_faults(Path(name), counts):
            found.append(outcome)
            if outcome.problem:
                print(f"LOST  {outcome.stage}, {outcome.fault} {outcome.number} ({outcome.how}): {outcome.problem}", flush=True)
            if sys.stderr.isatty():
                left = (time.monotonic() - started) / len(found) * (total - len(found))
                sys.stderr.write(f"\r{len(found)} of {total}, {outcome.stage}, {left / 60:.0f} min left  ")
    print(f"{'stage':10} {'fault':32} {'times':>5} {'hit':>5} {'survived':>9}")
    for stage, faults in counts.items():
        for fault in faults:
            rows = [row for row in found if (row.stage, row.fault) == (stage, fault)]
            hit = sum(row.how != "not hit" for row in rows)
            print(f"{stage:10} {fault:32} {len(rows):5} {hit:5} {sum(row.problem is None for row in rows):9}")
    lost = sum(row.problem is not None for row in found)
    ways = dict(Counter(row.how for row in found))
    print(json.dumps({"faults": len(found), "hit": sum(row.how != "not hit" for row in found), "lost": lost, "minutes": round((time.monotonic() - started) / 60, 1), "ways": ways}))
    return int(bool(lost))


if __name__ == "__main__":
    sys.exit(main())
