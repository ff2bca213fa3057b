"""kill -9 at random moments: a reinforcement that was killed again and again ends with the bytes of one that never was.

    python -m benchmarks.suites.kills PAIRS OUT --teachers CKPT --kills 20 --engine local --workers 2

One process makes the store whole. Then the same command is started, killed at a random moment (all its processes, as the kernel would)
and started again, until the kills are spent; the last start is left alone. Moments are drawn from the seed, in shares of the time that
the first run took, so that they fall everywhere from loading the teachers to writing the index.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from distill.engines import EngineName
from runtime.errors import ClipError
from runtime.files import file_sha256


@dataclass(frozen=True, kw_only=True, slots=True)
class KillsConfig:
    """Kill a reinforcement of PAIRS again and again, and compare what it ends with to an undisturbed run."""

    pairs: tyro.conf.Positional[str]
    out: tyro.conf.Positional[str]
    """Folder for the stores; made anew."""
    teachers: tuple[str, ...]
    kills: int = 20
    engine: EngineName = "local"
    workers: int = 2
    augmentations: int = 2
    part_rows: int = 32
    seed: int = 0
    more: tuple[str, ...] = ()
    """Further arguments of mclip reinforce."""


def main(argv: list[str]) -> int:
    """Entry point; returns the exit code: 1 when a byte differs."""
    config = tyro.cli(KillsConfig, args=argv, prog="python -m benchmarks.suites.kills")
    found = kill_runs(config)
    sys.stdout.write(json.dumps({name: value for name, value in found.items() if name not in ("expected", "found")}) + "\n")
    return 0 if found["equal"] else 1


def kill_runs(config: KillsConfig, reference: Path | None = None) -> dict[str, Any]:
    """Run the test. reference: a store of the same settings that was made undisturbed; None makes one (local, as many workers).

    Returns:
        {"equal": all parts have the same sha256, "kills": that hit a running process, "starts", "parts", "parts_at_kill": how many lay
        there at each kill, "seconds", "expected" and "found": sha256 by part}.

    Raises:
        ClipError: a run failed by itself.
    """
    out = Path(config.out)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    started = time.monotonic()
    if reference is None:
        reference = out / "whole"
        _finish(_start(config, reference, "local"), reference)
    expected, store = hashes(reference), out / "killed"
    whole = time.monotonic()
    _finish(_start(config, out / "timed", config.engine), out / "timed")
    once = time.monotonic() - whole
    differs = hashes(out / "timed") != expected
    rng, kills, starts, lying = random.Random(config.seed), 0, 0, []
    while kills < config.kills:
        process, begun = _start(config, store, config.engine), time.monotonic()
        starts += 1
        # Parts that are done make the next run shorter: the moments grow closer with it.
        left = 1 - len(list(store.glob("*.safetensors"))) / max(len(expected), 1)
        moment = rng.uniform(0.2, 0.35 + 0.65 * max(left, 0.1)) * once
        while process.poll() is None and time.monotonic() - begun < moment:
            time.sleep(0.005)
        if process.poll() is not None:
            _finish(process, store)
            shutil.rmtree(store)  # done before its moment: from the start again
            continue
        _kill(process)
        kills += 1
        lying.append(len(list(store.glob("*.safetensors"))))
    _finish(_start(config, store, config.engine), store)
    found = hashes(store)
    return {
        "equal": found == expected and not differs, "engine": config.engine, "workers": config.workers, "kills": kills, "starts": starts + 1, "parts": len(found),
        "parts_at_kill": lying, "seconds": round(time.monotonic() - started, 1), "expected": expected, "found": found,
    }  # fmt: skip


def hashes(store: Path) -> dict[str, str]:
    """sha256 of every part by name."""
    return {path.name: file_sha256(path) for path in sorted(store.glob("*.safetensors"))}


def _start(config: KillsConfig, store: Path, engine: str) -> subprocess.Popen[str]:
    arguments = [
        "reinforce", config.pairs, str(store), "--teachers", *config.teachers, "--augmentations", str(config.augmentations), "--part-rows", str(config.part_rows),
        "--engine", engine, "--workers", str(config.workers), "--device", "cpu", *config.more,
    ]  # fmt: skip
    env = {**os.environ, "MCLIP_PROGRESS": "0"}
    # its own process group: a kill takes the workers along, as a machine that goes down does
    return subprocess.Popen(
        [sys.executable, "-m", "mobileclip.cli", *arguments], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def _kill(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def _finish(process: subprocess.Popen[str], store: Path) -> None:
    _, said = process.communicate()
    if process.returncode:
        raise ClipError(f"the reinforcement into '{store}' failed with exit {process.returncode}: {said.strip()[-300:]}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
