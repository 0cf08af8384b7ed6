"""The stages of healing, a file each.

A stage's file holds its losses, and as `STAGE` what the rest of the house asks of it (`stages.stage.Stage`). It has a
line in `STAGES` here, from which recipes, the command line, runs and estimates know it. Light, for `--help`.

    from mlaconvert.healing.recipe import HealRecipe

    HealRecipe(stage="consistency").resolved()  # with the stage's own defaults
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from mlaconvert.healing.stages.stage import Stage


class Entry(NamedTuple):
    """The `module` that holds a stage, and in a few words what the stage trains for."""

    module: str
    goal: str


STAGES = {
    "distill": Entry(f"{__name__}.distill", "the teacher's outputs"),
    "teacher-forcing": Entry(f"{__name__}.teacher_forcing", "flow matching behind a clean past"),
    "consistency": Entry(f"{__name__}.consistency", "four steps"),
    "dmd": Entry(f"{__name__}.dmd", "the teacher's distribution"),
}


def stage_of(name: str) -> Stage:
    """The stage of that name in `STAGES`. Raises KeyError for another."""
    stage: Stage = import_module(STAGES[name].module).STAGE
    return stage
