"""The side of a device: settle where the process runs, measure as `mclip bench` does, and print each line as it is finished.

    python -m benchmarks.device_run --cores 0 --priority 5 BUNDLE --out results.jsonl --threads 1

Errors are printed as {"error": "one sentence"}, so that the other side can tell them from a broken connection.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys


def settle(cores: str, priority: int | None) -> None:
    """Pin this process, and so its children, to cores, and set its priority. Raises ValueError in one sentence."""
    if cores:
        if not hasattr(os, "sched_setaffinity"):
            raise ValueError("this system does not pin processes to cores; leave --cores out")
        wanted = {int(core) for core in cores.split(",")}
        have = set(range(os.cpu_count() or 1))
        if not wanted <= have:
            raise ValueError(f"--cores names {sorted(wanted - have)}, this device has the cores 0 to {max(have)}")
        os.sched_setaffinity(0, wanted)
    if priority is not None:
        try:
            os.setpriority(os.PRIO_PROCESS, 0, priority)
        except PermissionError:
            raise ValueError(f"--priority {priority} is for the device's administrator only; take 0 or more") from None


def main(argv: list[str]) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device_run")
    parser.add_argument("--cores", default="")
    parser.add_argument("--priority", type=int)
    options, rest = parser.parse_known_args(argv)
    # one thread for numpy's own products: what is measured is told its threads, and nothing else may take cores beside it
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        settle(options.cores, options.priority)
        from benchmarks.board import board_facts
        from benchmarks.latency import main as bench

        sys.stdout.write(json.dumps({"board": board_facts()}) + "\n")
        sys.stdout.flush()
        return bench([*rest, "--stream"])
    except ValueError as error:
        sys.stdout.write(json.dumps({"error": str(error)}) + "\n")
    except ImportError as error:
        sys.stdout.write(json.dumps({"error": f"the package {error.name} is not installed there; install it with pip"}) + "\n")
    except Exception as error:
        from runtime.errors import ClipError

        if not isinstance(error, (ClipError, OSError)):
            raise
        sys.stdout.write(json.dumps({"error": " ".join(str(error).split())}) + "\n")
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
