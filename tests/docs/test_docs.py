"""The API reference is made of docstrings: everything public has one."""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from types import ModuleType

import pytest
from sglang_standin import standing_in

import mlaconvert

ROOT = Path(__file__).parents[2]
with standing_in():  # a package is only walked if it can be imported
    MODULES = sorted(
        info.name
        for info in pkgutil.walk_packages(mlaconvert.__path__, "mlaconvert.")
        if not info.name.startswith(("mlaconvert.cli", "mlaconvert.__main__"))
    )


def undocumented(module: ModuleType) -> list[str]:
    """Public functions, classes and their members that `module` defines without saying what they are."""
    found = [] if inspect.getdoc(module) else [module.__name__]
    for name, thing in vars(module).items():
        if name.startswith("_") or getattr(thing, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(thing) and not inspect.getdoc(thing):
            found.append(name)
        if inspect.isclass(thing):
            found += [] if thing.__doc__ else [name]
            members = {key: value for key, value in vars(thing).items() if not key.startswith("_")}
            kinds = (property, classmethod, staticmethod)
            for key, value in members.items():
                if (inspect.isfunction(value) or isinstance(value, kinds)) and not inspect.getdoc(getattr(thing, key)):
                    found.append(f"{name}.{key}")
    return found


@pytest.mark.parametrize("name", MODULES)
def test_everything_public_has_a_docstring(name: str) -> None:
    with standing_in():
        assert undocumented(importlib.import_module(name)) == []


def test_a_missing_docstring_shows() -> None:
    module = ModuleType("sample", "Sample.")
    scope = {"__name__": "sample"}
    exec("class A:\n def b(self): pass\ndef c(): pass\ndef _d(): pass", scope)
    vars(module).update({name: scope[name] for name in ("A", "c", "_d")})
    assert undocumented(module) == ["A", "A.b", "c"]


def test_the_command_that_makes_the_reference_is_told() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (command,) = re.findall(r"pip install -e '\.\[(.*?)\]' && python docs/build.py", text)
    extras = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    assert set(command.split(",")) <= set(re.findall(r"^(\w+) = ", extras, re.MULTILINE))
    assert "docs" in command


PACKAGES = sorted(path.parent for path in Path(mlaconvert.__file__).parent.rglob("__init__.py"))


def example(package: Path) -> str:
    """The indented lines of a package's docstring."""
    text = ast.get_docstring(ast.parse((package / "__init__.py").read_text()), clean=False) or ""
    return "\n".join(line[4:] for line in text.splitlines() if line.startswith("    ") or not line)


@pytest.mark.parametrize("package", PACKAGES[1:], ids=lambda path: path.name)
def test_a_package_shows_its_use(package: Path) -> None:
    """What its example imports is there, takes what it is given, and all else is the example's own
    (but the `pipeline` of another codebase)."""
    shown = example(package).strip()
    assert shown, f"{package.name} shows no use"
    if package.name == "cli":
        assert shown.startswith("mlaconvert ")
        return
    tree, known = ast.parse(shown), dict(vars(builtins))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {alias.name: importlib.import_module(alias.name) for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            known |= {alias.name: getattr(module, alias.name) for alias in node.names}
    own = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            assert node.id in known or node.id in own or node.id == "pipeline", f"{node.id} is not imported"
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and inspect.isfunction(known.get(node.func.id))
        ):
            inspect.signature(known[node.func.id]).bind(*node.args, **{str(k.arg): k.value for k in node.keywords})
