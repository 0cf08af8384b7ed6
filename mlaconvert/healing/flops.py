"""Floating point operations of a model's passes, counted from shapes."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from mlaconvert.config.geometry import WanConfig
from mlaconvert.families.open import family_of
from mlaconvert.healing.frames import FrameLayout, View
from mlaconvert.healing.recipe import HealRecipe

_ONCE_A_TEXT = ("cross_attn.k.", "cross_attn.v.", "text_embedding.")
_ONCE_A_FRAME = ("time_embedding.", "time_projection.")


def forward_flops(config: WanConfig, layout: FrameLayout, height: int, width: int) -> float:
    """FLOPs of one clip's forward pass: `layout` of frames of `height` x `width` tokens.

    A linear layer takes 2 x (its weights) a token; attention 2 x (score width + value width) a head and visible pair
    of tokens; cross-attention likewise for every token and text token. Beside an exact present, pairs that see each
    other take whole heads.
    """
    size = height * width
    tokens, pairs = len(layout.positions) * size, int(layout.visible.sum()) * size * size
    present = int((layout.visible & layout.visible.mT).sum()) * size * size
    total = 0.0
    for name, shape in family_of(config).expected_shapes(config).items():
        if len(shape) < 2 or "modulation" in name:
            continue
        count = tokens
        if any(part in name for part in _ONCE_A_TEXT):
            count = config.text_len
        elif any(part in name for part in _ONCE_A_FRAME):
            count = len(layout.positions)
        total += 2.0 * prod(shape) * count
    for i in range(config.num_layers):
        layer = config.mla.layers[i] if config.mla else None
        score = config.head_dim if layer is None else layer.qk_nope_head_dim + layer.qk_rope_head_dim
        value = config.head_dim if layer is None else layer.v_head_dim
        own = present if layer is not None and config.mla and config.mla.present == "exact" else 0
        total += 2.0 * config.num_heads * ((score + value) * (pairs - own) + 2 * config.head_dim * own)
        total += 2.0 * config.num_heads * 2 * config.head_dim * tokens * config.text_len
    return total


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

    def forward(self, config: WanConfig, layout: FrameLayout) -> float:
        """FLOPs of a pass of student or teacher without gradients."""
        return forward_flops(config, layout, *self.grid)

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
