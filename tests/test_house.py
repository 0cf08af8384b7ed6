"""The house keeps its order: a package imports only from packages before it, and no modules import in a circle."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import mlaconvert

# Each room may import from the rooms before it.
ORDER = (
    "errors",
    "progress",
    "units",
    "config",
    "files",
    "latent",
    "families",
    "model",
    "base",
    "clips",
    "conversion",
    "evaluation",
    "generation",
    "healing",
    "reports",
    "publishing",
    "integrations",
    "demo",
    "cli",
    "__main__",
)
ROOT = Path(mlaconvert.__file__).parent
MOST_LINES, MOST_FILES = 350, 14


def name_of(path: Path) -> str:
    """The dotted name of a module, without the package's own."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"}


def imports(path: Path, *, inside_functions: bool) -> set[str]:
    """The modules of the package that a module imports."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.walk(tree) if inside_functions else tree.body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            inner = name.removeprefix("mlaconvert.")
            if inner != name:
                found.add(inner if inner in MODULES else inner.rpartition(".")[0])
    return found & MODULES.keys()


def test_packages_import_in_order() -> None:
    assert len(MODULES) > 10
    for name, path in MODULES.items():
        room = name.split(".")[0]
        assert room in ORDER, f"{room} has no place in the order"
        for other in imports(path, inside_functions=True):
            below = other.split(".")[0]
            assert below == room or ORDER.index(below) < ORDER.index(room), f"{name} imports {other}"


def test_no_modules_import_in_a_circle() -> None:
    graph = {name: imports(path, inside_functions=False) - {name} for name, path in MODULES.items()}
    TopologicalSorter(graph).prepare()


def test_every_package_says_what_lives_there() -> None:
    for name, path in MODULES.items():
        assert ast.get_docstring(ast.parse(path.read_text())), f"{name} has no docstring"


def test_only_the_window_knows_the_rule_of_the_window() -> None:
    """Elsewhere a sink is set, printed or handed on, never reckoned with."""
    allowed = {"config.streaming", "model.window", "families.causal", "reports.card", "cli.convert"}
    readers = {
        name
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "sink_frames" and isinstance(node.ctx, ast.Load)
    }
    assert "model.window" in readers
    assert readers <= allowed, f"{readers - allowed} reckon with the sink; ask model/window.py"
