"""Times the towers of this folder with numpy and onnxruntime alone (on Macs Core ML packages too, with coremltools).

Written to be carried to a device: Python 3.6 and later, no package of ours.

    python3 measure.py                  everything in plan.json that results.jsonl does not have yet
    python3 measure.py --stream         and print each line as it is finished

Take results.jsonl back to the folder that this one was copied from.
"""

import argparse
import gc
import hashlib
import json
import os
import platform
import re
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
clock = time.perf_counter


def say(text):
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def read(path):
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""


def environment(threads):
    import numpy
    import onnxruntime

    fields = {}
    for row in read("/proc/cpuinfo").splitlines():
        name, _, value = row.partition(":")
        fields.setdefault(name.strip(), value.strip())
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    known = ["avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimd", "asimddp", "i8mm", "sve"]
    memory = re.search(r"MemTotal:\s+(\d+) kB", read("/proc/meminfo"))
    release = re.match(r"\d+(\.\d+)*", platform.release())
    distribution = re.search(r'PRETTY_NAME="?([^"\n]*)', read("/etc/os-release"))
    board = read("/proc/device-tree/model").replace("\0", "")
    return {
        "processor": {
            "model": fields.get("model name") or board or fields.get("Hardware") or platform.processor() or platform.machine(),
            "logical_cores": os.cpu_count(),
            "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
            "governor": read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or None,
            "features": [name for name in known if name in flags],
        },
        "memory_bytes": int(memory.group(1)) * 1024 if memory else None,
        "system": {
            "name": platform.system(), "release": release.group(0) if release else None,
            "distribution": distribution.group(1) if distribution else None, "machine": platform.machine(),
        },
        "python": platform.python_implementation() + " " + platform.python_version(),
        "packages": {"numpy": numpy.__version__, "onnxruntime": onnxruntime.__version__},
        "threads": threads,
        "load_average": [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None,
    }


def has(name):
    import importlib.util

    return importlib.util.find_spec(name) is not None


def memory(which):
    found = re.search(which + r":\s+(\d+) kB", read("/proc/self/status"))
    return int(found.group(1)) * 1024 if found else None


def digest(path):
    made = hashlib.sha256()
    if os.path.isfile(path):
        with open(path, "rb") as file:
            made.update(file.read())
        return made.hexdigest()
    found = []
    for folder, _, names in os.walk(path):
        found += [os.path.join(folder, name) for name in names]
    for name in sorted(found, key=lambda one: os.path.relpath(one, path).split(os.sep)):
        with open(name, "rb") as file:
            made.update(os.path.relpath(name, path).replace(os.sep, "/").encode() + b"\0" + file.read())
    return made.hexdigest()


def open_core_ml(step):
    import importlib

    coremltools = importlib.import_module("coremltools")  # on Macs only, so nothing that checks imports should ask for it
    model = coremltools.models.MLModel(os.path.join(HERE, step["file"]), compute_units=coremltools.ComputeUnit.ALL)
    return lambda rows: model.predict({step["input"]: rows})[step["output"]]


def open_onnx(step):
    session = open_session(step)
    name = session.get_inputs()[0].name
    return lambda rows: session.run(None, {name: rows})[0]


def open_session(step):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.inter_op_num_threads = 1
    options.intra_op_num_threads = step["threads"]
    if step["precision"] == "fp16":
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    return onnxruntime.InferenceSession(os.path.join(HERE, step["file"]), options, providers=["CPUExecutionProvider"])


def cosine(found, wanted):
    import numpy as np

    found, wanted = found.astype(np.float64), wanted.astype(np.float64)
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(wanted, axis=1)
    return float((np.einsum("nd,nd->n", found, wanted) / np.maximum(norms, 1e-30)).min())


def timed(call, plan):
    """Warm up until two windows of five agree within 2 %, then time until the plan is done. Returns (samples, rounds of warm-up, converged, first)."""
    window, turn, seen, converged = 5, 0, [], False
    started = clock()
    while turn < plan["warmup"] or (not converged and turn < plan["warmup"] + plan["settle"] and clock() - started < max(1.0, plan["seconds"])):
        before = clock()
        call(turn)
        seen.append(clock() - before)
        turn += 1
        if turn >= 2 * window and turn % window == 0:
            last, previous = sorted(seen[-window:])[2], sorted(seen[-2 * window : -window])[2]
            converged = abs(last / previous - 1) <= 0.02
    samples = []
    gc.collect()
    gc.disable()
    started = clock()
    while len(samples) < plan["max_samples"]:
        passed = clock() - started
        if (passed >= plan["seconds"] and len(samples) >= plan["min_samples"]) or (passed >= 4 * plan["seconds"] and len(samples) >= 10):
            break
        before = clock()
        call(len(samples))
        samples.append(max(1, int((clock() - before) * 1e9)))
    gc.enable()
    return samples, turn, converged, int(seen[0] * 1e9)


def line(plan, step, kind, samples, figures, **settings):
    return {
        "schema": plan["schema"], "kind": kind, "phase": step["tower"] + "_tower", "artefact": step["artefact"], "bundle": plan["bundle"],
        "settings": dict({"threads": step["threads"], "batch": step["batch"], "input_sha256": plan["input_sha256"]}, **settings),
        "unit": {"latency": "ns", "load": "ns", "memory": "bytes"}[kind], "summary": {"maximum": max(samples)} if kind == "memory" else {},
        "figures": figures, "samples": samples, "environment": environment(step["threads"]), "device": None,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "tool": {"name": "plan", "version": plan["tool"]},
    }


def measure(plan, step):
    """The lines of one step: the tower timed, how long it took to load, and the process's memory when it is the only tower of this process."""
    import numpy as np

    if digest(os.path.join(HERE, step["file"])) != step["sha256"]:
        raise ValueError(step["file"] + " is not the file that was written; copy the folder again")
    arrays = np.load(os.path.join(HERE, "inputs.npz"))
    inputs, wanted = arrays[step["tower"]], arrays[step["tower"] + "_embedding"]
    before = clock()
    run = open_core_ml(step) if step["target"] == "coreml" else open_onnx(step)
    loaded = int((clock() - before) * 1e9)
    count = step["batch"]
    rows = [np.ascontiguousarray(np.take(inputs, range(start, start + count), axis=0, mode="wrap")) for start in range(len(inputs))]
    ones = np.concatenate([run(row)[:1] for row in rows])
    similarity = cosine(ones, wanted)
    if not similarity >= step["cosine_min"]:
        raise ValueError("%s gives wrong answers here (cosine %.6f, at least %.6f), so it is not timed" % (step["artefact"], similarity, step["cosine_min"]))
    samples, warmup, converged, first = timed(lambda turn: run(rows[turn % len(rows)]), plan)
    figures = dict(step["figures"], golden_cosine_min=similarity, first_ns=first)
    made = [line(plan, step, "latency", samples, figures, warmup=warmup, converged=converged, seconds=plan["seconds"])]
    made.append(dict(line(plan, step, "load", [loaded], {"file_bytes": step["figures"].get("bytes")}), phase="load_warm"))
    peak = memory("VmHWM")
    if peak:
        made.append(line(plan, step, "memory", [peak], {"resident_bytes": memory("VmRSS")}))
    return made


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--stream", action="store_true", help="print each line as it is finished")
    parser.add_argument("--step", type=int, help="only this step, in this process")
    options = parser.parse_args()
    with open(os.path.join(HERE, "plan.json"), encoding="utf-8") as file:
        plan = json.load(file)
    if options.step is not None:
        for row in measure(plan, plan["steps"][options.step]):
            sys.stdout.write(json.dumps(row) + "\n")
        return 0
    import subprocess

    out = os.path.join(HERE, "results.jsonl")
    done = set()
    for text in read(out).splitlines():
        try:
            row = json.loads(text)
            done.add((row["artefact"], row["settings"]["threads"], row["settings"]["batch"]))
        except (ValueError, KeyError):
            continue
    failed = 0
    for number, step in enumerate(plan["steps"]):
        if (step["artefact"], step["threads"], step["batch"]) in done:
            continue
        if step["target"] == "coreml" and (platform.system() != "Darwin" or not has("coremltools")):
            say("%s is left out: Core ML runs on Macs only, with coremltools (pip install coremltools)" % step["artefact"])
            continue
        say("%d of %d: %s, %d thread(s), batch %d" % (number + 1, len(plan["steps"]), step["artefact"], step["threads"], step["batch"]))
        # a process of its own for every step, so that peak memory is that of one tower
        child = subprocess.Popen([sys.executable, os.path.abspath(__file__), "--step", str(number)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        found, errors = child.communicate()
        if child.returncode:
            failed += 1
            say((errors.decode("utf-8", "replace").strip().splitlines() or ["it ended without a message"])[-1])
            continue
        with open(out, "ab") as file:
            file.write(found)
            file.flush()
            os.fsync(file.fileno())
        if options.stream:
            sys.stdout.write(found.decode("utf-8"))
            sys.stdout.flush()
    say("results.jsonl holds what was measured" + (", %d steps failed" % failed if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
