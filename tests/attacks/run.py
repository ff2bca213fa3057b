"""Every hostile case, as a table: `python -m tests.attacks.run` (make attacks). Exit code 1 when one is not well."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any


def verdicts(*chosen: str, timeout: float = 600) -> Iterator[dict[str, Any]]:
    """Verdicts of all cases (or of the chosen ones, "format/name"), from a process of their own. A child that dies is the verdict of the case it died in."""
    command, environment = [sys.executable, "-m", "tests.attacks.harness", *chosen], {**os.environ, "MOBILECLIP_MEASURE": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    assert process.stderr is not None
    for row in process.stdout:
        yield json.loads(row)
    errors = process.stderr.read()
    if process.wait(timeout=timeout):
        last = (errors.strip().splitlines() or ["no message"])[-1]
        yield {"format": "harness", "case": "the child", "said": last, "seconds": 0.0, "megabytes": 0.0, "problems": [f"ended with {process.returncode}"]}


def main() -> int:
    """Print the table."""
    bad = count = 0
    print(f"{'format':14} {'case':46} {'s':>6} {'MB':>6}  verdict")
    for row in verdicts(*(word for word in sys.argv[1:] if not word.startswith("--"))):
        count += 1
        bad += bool(row["problems"])
        verdict = "; ".join(row["problems"]) if row["problems"] else ("goes on" if row["said"].startswith("goes on") else "refused")
        print(f"{row['format']:14} {row['case']:46} {row['seconds']:6.2f} {row['megabytes']:6.1f}  {verdict}", flush=True)
        if not row["problems"] and "--quiet" not in sys.argv:
            print(f"{'':14}   {row['said'][:150]}")
    print(json.dumps({"attacks": count, "not_well": bad}))
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
