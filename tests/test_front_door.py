"""`import mlaconvert`: what it offers, and that it costs nothing before it is used."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mlaconvert

OFFERED = [name for name in mlaconvert.__all__ if name != "__version__"]


def test_what_is_offered() -> None:
    commands = {"analyze", "collect", "convert", "heal", "generate", "evaluate", "push"}
    models = {"open_checkpoint", "load_model", "load_camera_model", "rollout", "Sampler", "LatentCache", "LatentSize"}
    settings = {"ConvertRecipe", "HealRecipe", "Generation", "Source", "Output", "Listener"}
    assert commands | models | settings == set(OFFERED)
    assert set(OFFERED) <= set(dir(mlaconvert))


def test_a_bare_import_loads_nothing_large() -> None:
    """Neither does what an editor does: list the names."""
    code = "import sys, mlaconvert; dir(mlaconvert); print(*sorted(n.partition('.')[0] for n in sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "mlaconvert" in loaded
    assert not {"torch", "pydantic", "numpy", "huggingface_hub", "safetensors", "typer"} & set(loaded)


def test_types_and_values_are_the_same_things() -> None:
    """What a type checker is told under TYPE_CHECKING is what a program gets, by the same names."""
    tree = ast.parse(Path(mlaconvert.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    shown = {
        alias.asname: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert set(shown) == set(OFFERED)
    for name, home in shown.items():
        assert getattr(mlaconvert, name) is getattr(importlib.import_module(str(home)), name)


@pytest.mark.parametrize("name", OFFERED)
def test_docstrings_show_the_use(name: str) -> None:
    text = inspect.getdoc(getattr(mlaconvert, name)) or ""
    assert re.search(rf"\b{name}(\.\w+)?\([^)]", text), f"{name} does not show how it is called"


def test_other_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'sweep'"):
        mlaconvert.sweep  # noqa: B018
    with pytest.raises(ImportError):
        exec("from mlaconvert import nothing_of_the_kind")
