"""The architecture page is true: every module is on it, and imports point upwards only."""

import ast
import re
from pathlib import Path

import laconic

from . import sabotage

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "laconic"


def documented_order() -> list[str]:
    block = re.search(r"```text\n(.*?)```", (ROOT / "docs/architecture.md").read_text(), re.S)
    assert block is not None
    return [line.split()[0].removesuffix(".py").removesuffix("/") for line in block[1].splitlines()]


def imported_parts(path: Path) -> set[str]:
    """Top-level parts of laconic that a file imports, also inside functions."""
    depth = len(path.relative_to(SOURCE).parts)
    parts: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            if node.level < depth:
                continue  # inside its own package
            parts |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("laconic"):
            parts.add(((node.module or "") + ".").split(".")[1] or "__init__")
        elif isinstance(node, ast.Import):
            parts |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("laconic.")}
    return parts


def test_the_architecture_page_lists_exactly_the_modules_there_are():
    found = {p.stem if p.suffix else p.name for p in SOURCE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert sorted(documented_order()) == sorted(found - {"__init__"})


def test_imports_point_upwards_only():
    order = documented_order()
    wrong = []
    for path in SOURCE.rglob("*.py"):
        part = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if part != "__init__":
            wrong += [f"{path.name} imports {other}" for other in imported_parts(path) if order.index(other) >= order.index(part)]
    assert wrong == []


def test_every_edit_of_the_sabotage_finds_its_place():
    assert [e.name for e in sabotage.EDITS if e.right not in (SOURCE / e.file).read_text()] == []


def test_the_import_scan_sees_something():
    assert {"errors", "penalties"} <= imported_parts(SOURCE / "solvers" / "prox.py")


def test_tests_run_against_a_package_that_has_everything():
    installed = Path(laconic.__file__).parent
    assert {p.relative_to(SOURCE) for p in SOURCE.rglob("*.py")} == {p.relative_to(installed) for p in installed.rglob("*.py")}
    assert {p.name for p in SOURCE.rglob("*.toml")} == {p.name for p in installed.rglob("*.toml")}
