"""What a measurement ran on: processor, memory, system and versions, without host names, user names or paths."""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("mobileclip-edge", "numpy", "pillow", "onnxruntime", "tokenizers", "ftfy", "onnx", "coremltools", "tensorrt_rtx_cu13", "torch", "timm")
"""Distributions whose versions are recorded when they are installed (looked up, never imported)."""

FEATURES = (
    *("avx", "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimddp", "i8mm", "sve"),
)
"""Instruction sets that decide which kernels a runtime can pick."""


def environment(threads: int | None = None) -> dict[str, Any]:
    """The facts beside every result; a value that cannot be read is None, never a guess.

    `threads` is what the measured code was told to use. The load averages are those of the moment of the call: take them before measuring.
    """
    return {
        "processor": _processor(),
        "memory_bytes": _memory_bytes(),
        "system": {"name": platform.system(), "release": _release(), "distribution": _distribution(), "machine": platform.machine()},
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "packages": packages(),
        "threads": threads,
        "load_average": _load_average(),
    }


def packages(names: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Versions of the installed distributions among `names`."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> dict[str, Any]:
    text = _read("/proc/cpuinfo") or ""
    fields: dict[str, str] = {}
    cores: set[tuple[str, str]] = set()
    package = ""
    for line in text.splitlines():
        name, _, value = (part.strip() for part in line.partition(":"))
        if name == "physical id":
            package = value
        if name == "core id":
            cores.add((package, value))
        if name and name not in fields:
            fields[name] = value
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return {
        "model": fields.get("model name") or fields.get("Hardware") or platform.processor() or platform.machine() or None,
        "physical_cores": len(cores) or None,
        "logical_cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "quota_cores": _quota(),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "features": [name for name in FEATURES if name in flags],
        "virtual": "hypervisor" in flags if flags else None,
    }


def _quota() -> float | None:
    """Cores that the control group allows, None when it sets no limit or there is none to read."""
    text = _read("/sys/fs/cgroup/cpu.max")
    if text:
        limit, _, period = text.partition(" ")
        return None if limit == "max" else round(int(limit) / int(period), 2)
    limit, period = _read("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), _read("/sys/fs/cgroup/cpu/cpu.cfs_period_us")
    if limit and period and int(limit) > 0:
        return round(int(limit) / int(period), 2)
    return None


def _memory_bytes() -> int | None:
    found = re.search(r"MemTotal:\s+(\d+) kB", _read("/proc/meminfo") or "")
    return int(found.group(1)) * 1024 if found else None


def _release() -> str | None:
    """Kernel version; a builder's suffix after the numbers may name a host and is left out."""
    found = re.match(r"\d+(\.\d+)*", platform.release())
    return found.group(0) if found else None


def _distribution() -> str | None:
    found = re.search(r'^PRETTY_NAME="?([^"\n]*)', _read("/etc/os-release") or "", flags=re.MULTILINE)
    return found.group(1) if found else None


def _load_average() -> list[float] | None:
    try:
        return [round(value, 2) for value in os.getloadavg()]
    except (AttributeError, OSError):
        return None


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
