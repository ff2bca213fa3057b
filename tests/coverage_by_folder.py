"""What `coverage` measured, a row a folder: `python -m tests.coverage_by_folder` (make coverage)."""

from __future__ import annotations

import io
import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from coverage import Coverage


def main() -> int:
    """Print the table and the ten files with the most lines that no test reaches."""
    found = Coverage()
    found.load()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name) / "coverage.json"
        found.json_report(outfile=str(place))
        files = json.loads(place.read_text(encoding="utf-8"))["files"]
    folders: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for path, row in files.items():
        for folder in (Path(path).parts[0] if Path(path).parent.name != "suites" else "benchmarks/suites", "all"):
            folders[folder][0] += row["summary"]["num_statements"]
            folders[folder][1] += row["summary"]["covered_lines"]
    out = io.StringIO()
    out.write(f"{'folder':20} {'lines':>7} {'reached':>8} {'share':>7}\n")
    for folder, (lines, reached) in sorted(folders.items(), key=lambda item: (item[0] == "all", item[0])):
        out.write(f"{folder:20} {lines:7} {reached:8} {reached / max(lines, 1):7.1%}\n")
    worst = sorted(files.items(), key=lambda item: -item[1]["summary"]["missing_lines"])[:10]
    out.write("most lines that no test reaches: " + ", ".join(f"{path} {row['summary']['missing_lines']}" for path, row in worst) + "\n")
    lines, reached = folders["all"]
    out.write(json.dumps({"lines": lines, "reached": reached, "share": round(reached / max(lines, 1), 4)}) + "\n")
    sys.stdout.write(out.getvalue())
    return 0


if __name__ == "__main__":
    sys.exit(main())
