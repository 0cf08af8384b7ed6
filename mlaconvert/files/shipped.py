"""What ships with the package: recipes by name, and the built-in model. Light, for a shell's completion."""

from __future__ import annotations

from pathlib import Path

TINY = Path(__file__).parents[1] / "clips" / "tiny"


def recipe_names(folder: Path | None = None) -> list[str]:
    """Names of the recipes that ship with mlaconvert, or of those in `folder`."""
    return sorted(path.stem for path in (folder or recipe_folder()).glob("*.yaml"))


def recipe_folder() -> Path:
    """`mlaconvert/recipes` of an installed wheel, `recipes` beside the package in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"
