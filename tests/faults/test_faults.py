"""A few faults of every kind in every run of the tests, and a harness that finds what a careless writer loses. All of them: make faults."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

CARELESS = """
import sys
import benchmarks.results
from pathlib import Path
from tests.faults.harness import run_faults

def in_place(path, data):
    with open(path, "wb", buffering=0) as file:  # what was there is gone before the new is whole
        for start in range(0, len(data), 64):
            file.write(data[start : start + 64])
    return Path(path)

benchmarks.results.write_whole = in_place
found = list(run_faults(Path(sys.argv[1]), {"bench": {"short writes, then EFBIG": 3}}))
print(sum(row.problem is not None for row in found), {row.problem for row in found})
"""


def test_a_few_faults_of_every_kind_lose_nothing() -> None:
    done = subprocess.run([sys.executable, "-m", "tests.faults.run", "--quick"], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-500:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["lost"] == 0
    assert found["hit"] >= 8, done.stdout


def test_the_harness_finds_what_a_careless_writer_loses(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", CARELESS, tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    count, said = done.stdout.strip().split(" ", 1)
    assert int(count) >= 1, said
    assert "earlier is lost" in said
