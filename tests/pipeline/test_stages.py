"""The demo's stages: real processes that are skipped when done, repeated when their inputs change, and never half done."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.suites.demo import DemoConfig, run_demo
from benchmarks.suites.stages import MemoryWatch, StageError, Stages, run_side_by_side, tree_bytes

MODULE = """
import pathlib, sys, time
action, place = sys.argv[1], pathlib.Path(sys.argv[2])
if action == "count":
    place.write_text(str(int(place.read_text() or 0) + 1 if place.exists() else 1))
elif action == "fail":
    sys.stderr.write("error: no such thing\\n"); sys.exit(1)
elif action == "wait":
    place.write_text("started"); time.sleep(60)
elif action == "meet":
    place.write_text("here")
    until = time.monotonic() + 20
    while not pathlib.Path(sys.argv[3]).exists():
        assert time.monotonic() < until
        time.sleep(0.02)
"""


@pytest.fixture
def stages(tmp_path, monkeypatch) -> Stages:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "stage_module.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'code'}{os.pathsep}{Path(__file__).resolve().parents[2]}")
    return Stages(tmp_path / "run", lambda line: None)


def test_a_done_stage_is_skipped_until_its_inputs_or_outputs_change(stages, tmp_path):
    counter, source = tmp_path / "count", tmp_path / "input"
    source.write_text("a")

    def go(*extra: str) -> int:
        stages.run("one", [["stage_module", "count", str(counter), *extra]], inputs=[source], outputs=[counter])
        return int(counter.read_text())

    assert [go(), go()] == [1, 1]
    source.write_text("b")
    assert [go(), go()] == [2, 2]
    assert [go("--other"), go("--other")] == [3, 3]
    counter.unlink()
    assert go("--other") == 1
    assert set(stages.seconds()) == {"one"}


def test_commands_of_a_stage_run_at_the_same_time(stages, tmp_path):
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    stages.run("two", [["stage_module", "meet", a, b], ["stage_module", "meet", b, a]])


def test_a_failure_ends_the_others_and_is_not_remembered_as_done(stages, tmp_path):
    started = time.monotonic()
    with pytest.raises(StageError, match="exit code 1"):
        stages.run("bad", [["stage_module", "wait", str(tmp_path / "w")], ["stage_module", "fail", "x"]])
    assert time.monotonic() - started < 30
    assert "bad" not in stages.seconds()


def test_chains_run_at_the_same_time_and_pass_their_error_on(stages, tmp_path):
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    stages.chains(lambda: stages.run("left", [["stage_module", "meet", a, b]]) and None, lambda: stages.run("right", [["stage_module", "meet", b, a]]) and None)
    assert {"left", "right"} <= set(stages.seconds())

    def fails() -> None:
        stages.run("fails", [["stage_module", "fail", "x"]])

    counter = tmp_path / "count"
    with pytest.raises(StageError, match="exit code 1"):
        stages.chains(fails, lambda: stages.run("works", [["stage_module", "count", str(counter)]]) and None)
    assert counter.read_text() == "1"


@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_leaves_no_child_behind(stages, tmp_path, signal_):
    mark = tmp_path / "mark"
    code = (
        "import sys\nfrom pathlib import Path\nfrom benchmarks.suites.stages import Stages\n"
        f"try:\n    Stages(Path({str(tmp_path / 'r')!r}), print).run('s', [['stage_module', 'wait', {str(mark)!r}], ['stage_module', 'wait', {str(mark)!r}]])\n"
        "except KeyboardInterrupt:\n    sys.exit(130)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 30
    while not mark.exists() and time.monotonic() < until:
        time.sleep(0.05)
    if signal_ == signal.SIGINT:
        os.killpg(parent.pid, signal.SIGINT)  # as a terminal does
        assert parent.wait(40) == 130
        assert "unfinished" in json.loads((tmp_path / "r/stages/s.json").read_text())
    else:
        parent.kill()
        parent.wait(10)
    until = time.monotonic() + 15
    while _alive(parent.pid) and time.monotonic() < until:
        time.sleep(0.1)
    assert not _alive(parent.pid)


def _alive(group: int) -> list[int]:
    import psutil

    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except (ProcessLookupError, psutil.Error):
            continue
    return found


def test_memory_is_summed_over_children():
    with MemoryWatch() as watch:
        subprocess.run([sys.executable, "-c", "x = bytearray(300_000_000); import time; time.sleep(2.5)"], check=True)
    assert watch.peak > 300_000_000


def test_bytes_of_a_tree(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/b").write_bytes(b"12345")
    (tmp_path / "c").write_bytes(b"1")
    assert tree_bytes(tmp_path) == 6


def test_other_settings_in_the_same_folder_are_refused(tmp_path):
    (tmp_path / "demo.json").write_text(json.dumps({"quick": False, "seed": 3}))
    with pytest.raises(StageError, match="demo with other settings"):
        run_demo(DemoConfig(out=str(tmp_path)))
    assert {path.name for path in tmp_path.iterdir()} == {"demo.json"}


def test_nothing_to_run_is_nothing(tmp_path):
    run_side_by_side([], tmp_path / "log")


def test_an_interrupted_parent_stops_its_children_and_begins_nothing_more(tmp_path):
    """A lone SIGINT reaches the parent only; a terminal would have interrupted the children as well."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom benchmarks.suites.stages import Stages\nout = Path(sys.argv[1])\n"
        "stages = Stages(out, lambda line: (sys.stdout.write(line + chr(10)), sys.stdout.flush()))\n"
        "def work(name):\n    return lambda: [stages.run(f'{name}{n}', [['long_module', str(out / f'{name}{n}.ended')]]) for n in range(3)] and None\n"
        "stages.chains(work('a'), work('b'))"
    )
    (tmp_path / "long_module.py").write_text(
        "import pathlib, sys, time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    pathlib.Path(sys.argv[1]).write_text('saved')\n    sys.exit(130)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.getcwd(), os.environ.get("PYTHONPATH", "")])}
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert {parent.stdout.readline().split()[0], parent.stdout.readline().split()[0]} == {"a0", "b0"}
    time.sleep(1.5)  # the children have begun to sleep
    parent.send_signal(signal.SIGINT)
    _, said = parent.communicate(timeout=30)
    assert parent.returncode != 0, said
    assert sorted(path.name for path in tmp_path.glob("*.ended")) == ["a0.ended", "b0.ended"]
