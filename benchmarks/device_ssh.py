"""Linux machines and boards over the system's ssh: our SDK travels with the bundle, runs there, and its lines come back as they are measured.

Host names, ports, keys and jumps are ssh's own business (`~/.ssh/config`, or another file with --ssh-config), so what `ssh HOST` reaches, this reaches.
Where the Python there is too old for the SDK (3.11) but has numpy and onnxruntime, the towers are measured by the script that `plan:` writes.
"""

from __future__ import annotations

import io
import json
import shlex
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from runtime.errors import DeviceError

from .devices import DeviceSettings, Stream, blame, lines_of
from .results import Line, check

OPTIONS = ("-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=10", "-o", "ServerAliveCountMax=3", "-T")
NEEDED = ("numpy", "PIL", "onnxruntime", "ftfy", "safetensors")
PROBE = """
import importlib.util, json, os, shutil, sys, tempfile
found = [name for name in %r if importlib.util.find_spec(name) is not None]
place = tempfile.mkdtemp(prefix="mclip-bench-")
print(json.dumps({"python": list(sys.version_info[:3]), "packages": found, "place": place, "free": shutil.disk_usage(place).free, "cores": os.cpu_count()}))
"""
ROOM = 64 * 2**20
"""Bytes beside the bundle for code and results."""


class SshDevice:
    """One machine that ssh reaches."""

    def __init__(self, host: str, settings: DeviceSettings) -> None:
        if host.startswith("-") or any(letter.isspace() for letter in host):
            raise DeviceError(f"'{host}' is no host; write it as ssh takes it, such as user@board")
        self._host, self._settings = host, settings
        self._what = f"ssh:{host}"
        self.note: str | None = None
        config = ["-F", str(settings.ssh_config)] if settings.ssh_config else []
        self._ssh = ["ssh", *OPTIONS, *config, host]
        self.facts: dict[str, Any] = {"kind": "ssh", "label": settings.label}
        if settings.cores:
            self.facts["cores"] = list(settings.cores)
        if settings.priority is not None:
            self.facts["priority"] = settings.priority
        self._place = ""
        self._plan = False
        found = self._probe()
        self._place, self._free = str(found["place"]), int(found["free"])
        missing = [name for name in NEEDED if name not in found["packages"]]
        if tuple(found["python"]) < (3, 11) or missing:
            self._plan = not {"numpy", "onnxruntime"} & set(missing)
            if not self._plan:
                self.close()
                version = ".".join(map(str, found["python"]))
                raise DeviceError(f"{self._what}: Python {version} there lacks {', '.join(missing)}; install there: {settings.remote_python} -m pip install numpy onnxruntime")

    def push(self, bundle: Path, known: Sequence[Line]) -> None:
        """Bundle and code in one tar, unpacked there; nothing else there is touched."""
        size = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
        if size + ROOM > self._free:
            free, needed = (f"{value / 2**20:.0f} MB" for value in (self._free, size + ROOM))
            raise DeviceError(f"{self._what}: {free} are free in its folder for temporary files, the bundle needs {needed}; make room or set TMPDIR there")
        with tempfile.TemporaryFile() as file:
            with tarfile.open(fileobj=file, mode="w") as tar:
                if self._plan:
                    from .device_plan import write_plan

                    with tempfile.TemporaryDirectory() as scratch:
                        write_plan(bundle, Path(scratch) / "plan", self._settings)
                        tar.add(Path(scratch) / "plan", "plan")
                else:
                    tar.add(bundle, "bundle")
                    root = Path(__file__).resolve().parents[1]
                    for package in ("runtime", "benchmarks"):
                        for path in sorted((root / package).glob("*.py")):
                            tar.add(path, f"code/{package}/{path.name}")
                    rows = "".join(json.dumps(row) + "\n" for row in known).encode()
                    if rows:
                        entry = tarfile.TarInfo("results.jsonl")
                        entry.size = len(rows)
                        tar.addfile(entry, io.BytesIO(rows))
            file.seek(0)
            self._call(["tar", "-xf", "-", "-C", self._place], given=file, timeout=max(60.0, self._settings.timeout))

    def run(self) -> Iterator[Line]:
        """Measure there."""
        settings = self._settings
        place = f"{self._place}/plan" if self._plan else self._place
        if self._plan:
            command = [settings.remote_python, "measure.py", "--stream"]
        else:
            where = (["--cores", ",".join(map(str, settings.cores))] if settings.cores else []) + (["--priority", str(settings.priority)] if settings.priority is not None else [])
            command = [settings.remote_python, "-m", "benchmarks.device_run", *where, "bundle", "--out", "results.jsonl", *settings.arguments]
        there = f"cd {shlex.quote(place)} && exec env PYTHONPATH={shlex.quote(self._place + '/code')} OPENBLAS_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE {shlex.join(command)}"
        yield from lines_of(Stream([*self._ssh, there], settings.timeout), self._what, self.facts)

    def pull(self) -> list[Line]:
        """Whole lines of the results file there."""
        if not self._place:
            return []
        name = "plan/results.jsonl" if self._plan else "results.jsonl"
        text = self._call(["cat", f"{self._place}/{name}"], timeout=60)
        rows = []
        for number, row in enumerate(text.splitlines(), 1):
            try:
                rows.append(check(json.loads(row), f"line {number} of the results on {self._what}"))
            except (ValueError, RecursionError):  # the line that was being written when the device went away
                continue
        return rows

    def close(self) -> None:
        """Remove the folder there."""
        if self._place:
            self._call(["rm", "-rf", self._place], timeout=60)
            self._place = ""

    def _probe(self) -> dict[str, Any]:
        text = self._call([self._settings.remote_python, "-c", PROBE % (NEEDED,)], timeout=60)
        try:
            found: dict[str, Any] = json.loads(text.strip().splitlines()[-1])
        except (json.JSONDecodeError, IndexError) as error:
            said = text.strip()[:80]
            raise DeviceError(f"{self._what}: {self._settings.remote_python} there answered '{said}' to a question in Python; name another with --remote-python") from error
        return found

    def _call(self, command: Sequence[str], *, given: Any = subprocess.DEVNULL, timeout: float) -> str:
        """Run a command there, quoted for its shell. Raises DeviceError."""
        try:
            done = subprocess.run([*self._ssh, shlex.join(command)], stdin=given, capture_output=True, timeout=timeout, check=False)
        except FileNotFoundError:
            raise DeviceError("there is no ssh on this machine; install it (openssh-client)") from None
        except subprocess.TimeoutExpired:
            raise DeviceError(f"{self._what}: no answer within {timeout:.0f} s; is it on, and in this network?") from None
        if done.returncode:
            errors = done.stderr.decode("utf-8", "replace").splitlines()
            if done.returncode == 127:
                raise DeviceError(f"{self._what}: there is no {command[0]} there; name another with --remote-python")
            raise DeviceError(blame(self._what, done.returncode, errors))
        return done.stdout.decode("utf-8", "replace")


def open_ssh(name: str, settings: DeviceSettings) -> SshDevice:
    """Connect once and look around. Raises DeviceError in one sentence."""
    return SshDevice(name, settings)
