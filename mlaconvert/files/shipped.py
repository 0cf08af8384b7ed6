"""What ships with the package: recipes by name, and the built-in model. Light, for a shell's completion."""

from __future__ import annotations

from pathlib import Path

TINY = Path(__file__).parents[1] / "clips" / "tiny"


def recipe_names(folder: Path | None = None) -> list[str]:
    """Names of the recipes that ship with mlaconvert, or of those in `folder`."""
    return sorted(path.stem for path in (folder or recipe_folder()).glob("*.yaml"))


def recipe_kind(name: str) -> str | None:
    """The folder of the shipped recipe of that name, "." for a conversion's; None where there is none."""
    kinds = (".", *sorted(path.name for path in recipe_folder().iterdir() if path.is_dir()))
    return next((kind for kind in kinds if name in recipe_names(recipe_folder() / kind)), None)


def recipe_folder() -> Path:
    """`mlaconvert/recipes` of an installed wheel, `recipes` beside the package in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"
