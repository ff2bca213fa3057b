"""How long it takes until a checkpoint of somebody else is a model: fresh processes, MobileCLIP-S0's 216 MB in Apple's layout.

    python -m benchmarks.suites.loading --out out/loading.json      (make bench-loading)

Importing is told apart from what this project does: timm imports torchvision, and torchvision torch's compiler, which takes
longer than reading the file.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks.environment import environment
from runtime.files import write_json

CHILD = """
import json, sys, time
began = time.perf_counter()
import torch
torch_ready = time.perf_counter()
import timm
timm_ready = time.perf_counter()
from mobileclip import create_model
model = create_model(sys.argv[1])
ready = time.perf_counter()
print(json.dumps({"import_torch": torch_ready - began, "import_timm": timm_ready - torch_ready, "load": ready - timm_ready,
                  "beyond_torch": ready - torch_ready, "model": model.config.name}))
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadingConfig:
    """What to measure."""

    model: str = "mobileclip_s0"
    layout: str = "apple"
    rounds: int = 7
    """Fresh processes; the file is read once before, so that it lies in memory."""
    out: str = "out/loading.json"


def measure(config: LoadingConfig) -> dict[str, Any]:
    """Seconds of each phase: medians and extremes over fresh processes."""
    import torch

    from mobileclip import create_model
    from mobileclip.convert import from_ours

    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        made = create_model(config.model)
        path = Path(folder) / f"{config.model}.pt"
        torch.save(from_ours(made.state_dict(), config.layout, made.config), path)
        size = path.stat().st_size
        del made
        runs = [json.loads(subprocess.run([sys.executable, "-c", CHILD, str(path)], check=True, capture_output=True, text=True).stdout) for _ in range(config.rounds + 1)][1:]
    phases = {
        phase: {"median": statistics.median(found), "low": min(found), "high": max(found)}
        for phase in ("import_torch", "import_timm", "load", "beyond_torch")
        if (found := [run[phase] for run in runs])
    }
    return {"model": runs[0]["model"], "layout": config.layout, "bytes": size, "rounds": config.rounds, "seconds": phases, "environment": environment()}


def main() -> int:
    config = tyro.cli(LoadingConfig, prog="python -m benchmarks.suites.loading", description=__doc__)
    found = measure(config)
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    write_json(config.out, found)
    for phase, seconds in found["seconds"].items():
        sys.stdout.write(f"{phase:13} {seconds['median']:.2f} s  [{seconds['low']:.2f}, {seconds['high']:.2f}]\n")
    sys.stdout.write(f"{found['model']}, {found['bytes'] / 1e6:.0f} MB in layout {found['layout']}, {found['rounds']} fresh processes\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
