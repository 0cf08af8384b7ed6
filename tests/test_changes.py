"""What CONTRIBUTING.md says of five changes: each touches the rooms that its table names, and no other."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import mlaconvert

ROOT = Path(mlaconvert.__file__).parent
MODULES = {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}

MODELS = re.compile(
    r"Wan(?![a-z])|(?<![a-z])wan(?![a-z])|WAN|"
    r"(?i:sky_?reels|causvid|self.?forcing|longlive|hunyuan|ltx|cogvideo|mochi|matrix.?game)"
)
OURS = {"WanConfig", "WanModel"}  # one geometry and one transformer for all families
# Rooms that name models for a reason. Nothing here decides how a checkpoint is read or converted.
NAMED = {
    "base/repository.py": "which file in a base repository is its VAE, and what to give instead of one",
    "base/text.py": "the encoder that was expected, in an error",
    "base/vae.py": "diffusers' class of the VAE and its conversion",
    "cli/__init__.py": "help",
    "cli/convert.py": "help",
    "cli/encode.py": "help, and the default base",
    "cli/options.py": "help",
    "publishing/hub.py": "an example in an error",
}


def docstrings(tree: ast.AST) -> set[int]:
    """Texts that stand alone: of modules, classes, functions and fields."""
    bodies = [node.body for node in ast.walk(tree) if isinstance(getattr(node, "body", None), list)]
    return {id(line.value) for body in bodies for line in body if isinstance(line, ast.Expr)}


def words(tree: ast.AST) -> list[str]:
    """Every name and text of the code, without docstrings."""
    told, found = docstrings(tree), []
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=str(text)) if id(node) not in told:
                found.append(text)
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name):
                found.append(name)
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.alias(name=name):
                found.append(name)
    return found


def models_named(tree: ast.AST) -> set[str]:
    return {word for word in words(tree) if MODELS.search(word) and word not in OURS}


def test_names_of_models_stay_in_families() -> None:
    found = {
        path: names
        for path, tree in MODULES.items()
        if not path.startswith(("families/", "integrations/", "clips/tiny/")) and (names := models_named(tree))
    }
    assert found.keys() == NAMED.keys(), {path: found[path] for path in found.keys() - NAMED.keys()}


def test_a_name_of_a_model_shows() -> None:
    code = (
        'def f(x: WanConfig) -> WanModel:\n    """As SkyReels does."""\n    return "WanModel2" if LTX else y.wan_steps'
    )
    assert models_named(ast.parse(code)) == {"WanModel2", "LTX", "wan_steps"}
    assert models_named(ast.parse("wants = 'unwanted'")) == set()
