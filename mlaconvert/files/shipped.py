"""What ships with the package: recipes by name, and the built-in model. Light, for a shell's completion."""

from __future__ import annotations

from pathlib import Path

from mlaconvert.errors import ConfigError

RECIPE_KINDS = {"": "convert", "heal": "heal", "sweep": "sweep"}
"""The command of the recipes in each folder."""

TINY = Path(__file__).parents[1] / "clips" / "tiny"


def recipe_names(folder: Path | None = None) -> list[str]:
    """Names of the recipes that ship with mlaconvert, or of those in `folder`."""
    return sorted(path.stem for path in (folder or recipe_folder()).glob("*.yaml"))


def recipe_kind(name: str) -> str | None:
    """The folder of the shipped recipe of that name, one of `RECIPE_KINDS`; None where there is none."""
    return next((kind for kind in RECIPE_KINDS if name in recipe_names(recipe_folder() / kind)), None)


def recipe_file(name: str) -> Path:
    """The file of a shipped recipe. Raises ConfigError for a name that there is not."""
    kind = recipe_kind(name)
    if kind is None:
        raise ConfigError(f"no recipe {name!r} ships; `mlaconvert recipes list` shows those that do")
    return recipe_folder() / kind / f"{name}.yaml"


def recipe_folder() -> Path:
    """`mlaconvert/recipes` of an installed wheel, `recipes` beside the package in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"
