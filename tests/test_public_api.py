"""What programs outside rely on changes only on purpose, and no setting is read by nobody."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections import Counter
from pathlib import Path

from tests.public_api import public_api

ROOT = Path(__file__).parents[1]
FOLDERS = ("mobileclip", "distill", "export", "runtime", "benchmarks")


def test_the_public_api_is_the_golden_one() -> None:
    golden = (ROOT / "tests/golden/public_api.txt").read_text(encoding="utf-8")
    assert public_api() == golden, "a public name changed: if that is meant, write the golden file anew (python -m tests.public_api) and a line in CHANGELOG.md"


def test_no_public_name_is_a_modules_name_too() -> None:
    """`from package.name import …` anywhere would leave the module where the function was."""
    for package in ("runtime", "mobileclip", "distill", "export"):
        module = importlib.import_module(package)
        assert not set(getattr(module, "__all__", ())) & {found.name for found in pkgutil.iter_modules(module.__path__)}


def test_every_setting_and_option_is_read_somewhere() -> None:
    """Fields of configurations and options of parsers that no code looks at are promises that nobody keeps."""
    declared: dict[str, str] = {}
    read: Counter[str] = Counter()
    for path in [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if "kits" not in path.parts]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and node.name.endswith(("Config", "Settings", "Bench", "Recipe", "Plan")):
                for field in node.body:
                    if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                        declared[field.target.id] = f"{path.relative_to(ROOT)}: {node.name}.{field.target.id}"
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
                names = [argument.value for argument in node.args if isinstance(argument, ast.Constant) and isinstance(argument.value, str)]
                given = next((word.value.value for word in node.keywords if word.arg == "dest" and isinstance(word.value, ast.Constant)), None)
                name = given or max(names, key=len, default="").lstrip("-").replace("-", "_")
                if name:
                    declared[name] = f"{path.relative_to(ROOT)}: {names}"
            elif isinstance(node, ast.Tuple):  # names that are looped over with getattr
                read.update(item.value for item in node.elts if isinstance(item, ast.Constant) and isinstance(item.value, str))
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read[node.attr] += 1
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr" and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
                read[str(node.args[1].value)] += 1
    assert len(declared) > 150
    assert not [where for name, where in declared.items() if not read[name]]
