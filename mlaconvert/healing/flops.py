"""What the passes of a healing step compute, for a stage to add up."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from mlaconvert.config.geometry import WanConfig
from mlaconvert.healing.frames import FrameLayout, View
from mlaconvert.healing.recipe import HealRecipe
from mlaconvert.model.flops import Work, forward_work


@dataclass(frozen=True, kw_only=True)
class Passes:
    """What the passes of one clip cost, for a stage to add up its step.

    `view` is how the clip is shown, of frames of `grid` tokens (height, width).
    """

    recipe: HealRecipe
    student: WanConfig
    teacher: WanConfig
    view: View
    grid: tuple[int, int]

    def forward(self, config: WanConfig, layout: FrameLayout) -> Work:
        """A pass of student or teacher without gradients."""
        itemsize = 2 if self.recipe.precision == "bf16" else 4
        return forward_work(config, layout.visible, prod(self.grid), itemsize=itemsize)

    @property
    def trained(self) -> float:
        """Forward passes that one with gradients costs: three, or four with checkpointing.

        So it does where only some weights are trained, for the gradient has to pass the others too.
        """
        return 4.0 if self.recipe.gradient_checkpointing else 3.0

    @property
    def guided(self) -> float:
        """Forward passes that a guided one costs."""
        return 2.0 if self.recipe.guidance != 1 else 1.0
