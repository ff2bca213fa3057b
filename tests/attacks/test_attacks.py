"""Files of strangers over all formats: each is refused in one sentence, under a second, in little memory; nothing written outside, nothing run."""

from __future__ import annotations

import re
import stat
from pathlib import Path

import pytest

from tests.attacks.corpus import CASES
from tests.attacks.harness import GoesOn, _Watch, judge
from tests.attacks.run import verdicts

ROOT = Path(__file__).parents[2]


def test_every_case_is_refused_or_rightly_gone_on_with() -> None:
    found = list(verdicts())
    assert not [f"{row['format']}, {row['case']}: {'; '.join(row['problems'])}" for row in found if row["problems"]]
    assert [(row["format"], row["case"]) for row in found] == [(format, name) for format, named in CASES.items() for name in named]
    assert len(found) >= 200


def test_the_harness_sees_what_it_looks_for(tmp_path: Path) -> None:
    """A judge that finds nothing wrong with anything would pass every case."""
    import os
    import subprocess

    from runtime.errors import ClipError

    class Raw(ClipError):
        __str__ = Exception.__str__

    def raised(error: BaseException) -> object:
        raise error

    def wrote(folder: Path) -> object:
        (folder.parent / "mark").write_bytes(b"x")
        raise ClipError("no")

    def ran(folder: Path) -> object:
        subprocess.run(["true"], check=True)
        return GoesOn("ran")

    def took(folder: Path) -> object:
        bytearray(os.urandom(2**20) * 300)
        raise ClipError("no")

    watch = _Watch()
    wrong = {
        "accepted": (lambda folder: 7, "was accepted"), "raised": (lambda folder: raised(KeyError("x")), "KeyError"), "wrote": (wrote, "did open"), "ran": (ran, "did subprocess"),
        "two lines": (lambda folder: raised(Raw("a\nb")), "no single sentence"), "escapes": (lambda folder: raised(Raw("\x1b[2J")), "do not print"),
        "took": (took, "MB"),
    }  # fmt: skip
    for name, (victim, expected) in wrong.items():
        verdict = judge("x", name, lambda folder, victim=victim: lambda: victim(folder), tmp_path / name, watch)  # type: ignore[misc]
        assert any(expected in problem for problem in verdict.problems), (name, verdict)
    assert not judge("x", "well", lambda folder: lambda: raised(ClipError("no")), tmp_path / "well", watch).problems


def test_the_page_and_the_package_for_browsers_make_no_markup_or_code_of_data() -> None:
    forbidden = re.compile(r"\.innerHTML|\.outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|javascript:|\.srcdoc|setAttribute\(\s*[\"']on")
    files = [*(ROOT / "runtime/web/src").glob("*.js"), *(ROOT / "runtime/web/demo").glob("*.*"), *(ROOT / "benchmarks/kits").glob("browser.*")]
    assert len(files) > 15
    for path in files:
        assert not forbidden.search(path.read_text(encoding="utf-8")), path
    from runtime.web_server import POLICY

    assert "'unsafe-inline'" not in POLICY
    assert "'unsafe-eval'" not in POLICY


def test_no_shell_is_given_a_text_and_no_pickle_is_read_freely() -> None:
    """What the rules of the house say, looked for in all of it."""
    forbidden = {r"shell=True": "a shell", r"os\.(system|popen)\(": "a shell", r"pickle\.loads?\(|weights_only=False": "a pickle", r"yaml\.load\(": "yaml"}
    for folder in ("mobileclip", "distill", "export", "runtime", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            for pattern, what in forbidden.items():
                assert not re.search(pattern, text), f"{path} uses {what}"


@pytest.mark.parametrize("module", ["benchmarks.device_local", "benchmarks.device_browser"])
def test_folders_for_a_while_are_private(module: str) -> None:
    import importlib

    from benchmarks.devices import DeviceSettings

    found = importlib.import_module(module)
    device = (found.LocalDevice if module.endswith("local") else found.BrowserDevice)(DeviceSettings())
    assert stat.S_IMODE(device._work.stat().st_mode) == 0o700
    device.close()
    assert not device._work.exists()


def test_what_applications_ship_carries_no_licence_that_asks_for_their_source() -> None:
    from tests.attacks.licences import COPYLEFT, base_install, licence

    base = base_install()
    assert {"numpy", "pillow", "onnxruntime", "ftfy", "safetensors"} <= base
    for name in base:
        said = licence(name)
        assert said != "not said", name
        assert not COPYLEFT.search(said), (name, said)
    assert COPYLEFT.search("GNU Lesser General Public License v3")


def test_the_lock_pins_what_is_asked_for() -> None:
    import tomllib

    from tests.attacks.licences import NAME, plain

    rows = [row for row in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines() if row and not row.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9._!+-]+", row) for row in rows)
    pinned = {plain(row.split("==")[0]) for row in rows}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(row for extra in project["optional-dependencies"].values() for row in extra)]
    asked = {plain(NAME.match(row).group()) for row in wanted} - {"mobileclip-edge"}  # type: ignore[union-attr]
    assert asked <= pinned
