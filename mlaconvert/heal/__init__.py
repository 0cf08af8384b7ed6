"""Healing: short trainings that bring a converted model back to its teacher, and on to a few-step streaming student."""

from mlaconvert.heal.loop import DivergedError
from mlaconvert.heal.output import HealReport
from mlaconvert.heal.recipe import HealRecipe, heal_recipe_names, load_heal_recipe
from mlaconvert.heal.run import heal, plan

__all__ = ["DivergedError", "HealRecipe", "HealReport", "heal", "heal_recipe_names", "load_heal_recipe", "plan"]
