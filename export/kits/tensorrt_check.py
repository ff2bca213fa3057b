"""Compare what trtexec exported with the golden embeddings: python3 check.py OUTPUT.json EXPECTED.json TOWER PRECISION. Standard library only."""

import json
import math
import sys


def main(output, expected, tower, precision):
    with open(expected, encoding="utf-8") as file:
        facts = json.load(file)
    wanted, least = facts["embeddings"][tower], facts["least"].get(precision, facts["least"]["lossy"])
    with open(output, encoding="utf-8") as file:
        found = [entry for entry in json.load(file) if entry["name"] == facts["outputs"][tower]]
    if len(found) != 1:
        print("FAIL  %s.%s: the engine has no output '%s'" % (tower, precision, facts["outputs"][tower]))
        return 1
    values, width = found[0]["values"], len(wanted[0])
    rows = [values[start : start + width] for start in range(0, len(values), width)]
    if len(rows) != len(wanted) or not all(math.isfinite(value) for value in values):
        print("FAIL  %s.%s: %d rows, expected %d, all of them finite" % (tower, precision, len(rows), len(wanted)))
        return 1
    cosine = min(
        sum(a * b for a, b in zip(row, right)) / max(1e-12, math.sqrt(sum(a * a for a in row)) * math.sqrt(sum(b * b for b in right)))
        for row, right in zip(rows, wanted)
    )
    good = cosine >= least
    print("%s  %s.%s: least cosine to the checkpoint %.6f, expected at least %g (%d golden inputs)" % ("ok  " if good else "FAIL", tower, precision, cosine, least, len(rows)))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:5]) if len(sys.argv) == 5 else 2)
