"""The recipes that ship with the package, by name; light, so that a shell can complete them at once."""

from __future__ import annotations

from pathlib import Path


def recipe_names(folder: Path | None = None) -> list[str]:
    """Names of the recipes that ship with mlaconvert, or of those in `folder`."""
    return sorted(path.stem for path in (folder or recipe_folder()).glob("*.yaml"))


def recipe_folder() -> Path:
    """`mlaconvert/recipes` of an installed wheel, `recipes` beside the package in a checkout."""
    package = Path(__file__).parent
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"
