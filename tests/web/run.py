"""Every test of the browser package, and its figures: `python -m tests.web.run out/web BUNDLE …`, after `make web`. Writes SITE/summary.json."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.browser import find_chromium
from tests.web.vectors import write_vectors

HERE = Path(__file__).parent
NODE_TESTS = ("vectors.test.js", "package.test.js")


def run_node(tests: tuple[str, ...], vectors: Path, summary: Path, site: Path | None = None, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """`node --test` on some files of this folder; their figures are in `summary` afterwards."""
    settings = {"VECTORS": str(vectors), "SUMMARY": str(summary), "PYTHON": sys.executable, "CHROMIUM": find_chromium() or "", **({"SITE": str(site)} if site else {})}
    command = ["node", "--test", "--test-reporter=spec", *(str(HERE / name) for name in tests)]
    return subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=timeout, check=False)


def main(site: Path, bundles: list[Path]) -> int:
    """Run all, print the figures, write them. Returns 1 where a test failed."""
    if not shutil.which("node"):
        print("error: there is no node; install Node.js 20 or later", file=sys.stderr)
        return 1
    if not find_chromium():
        print("error: there is no chromium; install it (apt-get install chromium) or name one in CHROMIUM", file=sys.stderr)
        return 1
    figures: dict[str, Any] = {}
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_vectors(folder, bundles, 4000)
        for tests, timeout in ((NODE_TESTS, 120), (("browser.test.js",), 400)):
            summary = folder / "figures.json"
            done = run_node(tests, folder, summary, site, timeout)
            print(done.stdout, done.stderr, sep="", end="")
            failed += done.returncode != 0
            if summary.is_file():
                figures |= json.loads(summary.read_text())
                summary.unlink()
    figures["ok"] = not failed
    (site / "summary.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), [Path(bundle) for bundle in sys.argv[2:]]))
