"""The arrows between folders, proved twice: by reading every import, and by looking at fresh interpreters."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = {"mobileclip", "distill", "export", "runtime", "benchmarks"}
ARROWS = {
    "runtime": set(),
    "mobileclip": {"runtime"},
    "distill": {"mobileclip", "runtime"},
    "export": {"distill", "mobileclip", "runtime"},
    "benchmarks": {"runtime"},
}
SUITES = ROOT / "benchmarks" / "suites"  # the one place that may join everything
TORCH_FREE = {"runtime", "benchmarks"}
TORCH = {"torch", "torchvision", "timm", "open_clip", "transformers", "torch_pruning", "coremltools"}


def imports(path: Path) -> set[str]:
    """Top-level names that a file imports anywhere, functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("folder", ARROWS)
def test_a_folder_imports_only_what_its_arrows_allow(folder):
    files = [path for path in sorted((ROOT / folder).rglob("*.py")) if path.parent != SUITES]
    assert len(files) >= 2
    for path in files:
        used = imports(path)
        assert used & OURS <= ARROWS[folder] | {folder}, path
        if folder in TORCH_FREE:
            # coremltools is imported there with torch out of sight (tests/runtime/test_backends.py)
                assert not (used & TORCH) - ({"coremltools"} if path.name == "backends.py" else set()), path


def test_nothing_imports_the_command_line_or_the_suites():
    for folder in OURS:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names] if isinstance(node, ast.Import) else []
                assert not [name for name in names if name.startswith("mobileclip.cli")], path
                assert path.parent == SUITES or not [name for name in names if name.startswith("benchmarks.suites")], path


def fresh(code: str) -> list[str]:
    """Modules loaded in a new interpreter after running `code`."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys, json; sys.stdout.write('\\n' + json.dumps(sorted(sys.modules)))"],
        capture_output=True, text=True, check=True, cwd=ROOT, timeout=120,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "code",
    [
        "import runtime, mobileclip, mobileclip.cli",
        "import runtime.encoder, runtime.shell, runtime.evaluation, runtime.selfcheck",
        "import mobileclip.models",
        "from mobileclip.cli import main; main(['--help'])",
        "from mobileclip.cli import main; main(['models'])",
        "import benchmarks.latency, benchmarks.measure, benchmarks.report, benchmarks.accuracy",
    ],
)
def test_no_torch_in_a_fresh_interpreter(code):
    assert not TORCH & {name.split(".")[0] for name in fresh(code)}


def test_help_imports_no_stage():
    loaded = fresh("from mobileclip.cli import main; main(['--help'])")
    assert not [name for name in loaded if name.split(".")[0] in {"distill", "export", "benchmarks", "numpy", "onnxruntime", "tyro"}]


@pytest.mark.parametrize("verb", ["embed", "classify", "index", "search", "adapt", "verify", "inspect"])
def test_sdk_verbs_load_no_torch_and_nothing_beyond_the_base_install(verb):
    loaded = {name.split(".")[0] for name in fresh(f"from mobileclip.cli import main\ntry: main(['{verb}', '--help'])\nexcept SystemExit: pass")}
    assert not loaded & (TORCH | {"tyro", "rich", "distill", "export", "benchmarks"})


def test_every_verb_names_a_function_that_exists():
    from mobileclip.cli import VERBS

    for target, help_text in VERBS.values():
        module, function = target.split(":")
        source = (ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8")
        assert function in {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}, target
        assert help_text


def test_the_wheel_holds_the_five_packages_and_no_tests():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert set(settings["tool"]["setuptools"]["packages"]) == OURS | {"benchmarks.suites"}
    base = " ".join(settings["project"]["dependencies"])
    assert not any(name in base for name in TORCH | {"tyro", "rich"})


@pytest.mark.parametrize(
    ("argv", "code", "where", "text"),
    [
        ([], 2, "stdout", "usage: mclip VERB"),
        (["--help"], 0, "stdout", "find pictures by text"),
        (["nonsense"], 2, "stderr", "unknown verb 'nonsense'"),
        (["inspect", "no/such/path"], 1, "stderr", "error: "),
        (["train", "--pairs", "no/such", "--store", "no/such", "--out", "unused"], 1, "stderr", "error: "),
    ],
)
def test_command_line_ends_in_one_sentence(argv, code, where, text, tmp_path):
    done = subprocess.run([sys.executable, "-m", "mobileclip.cli", *argv], capture_output=True, text=True, cwd=tmp_path, timeout=120, env=environment())
    assert done.returncode == code, done.stderr
    assert text in getattr(done, where)
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 1
    assert not list(tmp_path.iterdir())


def environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT), "MCLIP_PROGRESS": "0"}
