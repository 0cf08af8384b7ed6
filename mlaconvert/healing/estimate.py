"""What a step of healing costs, counted from shapes: floating point operations, and bytes of memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from mlaconvert.config.geometry import WanConfig
from mlaconvert.families.wan import WanFamily
from mlaconvert.healing.frames import Layout, View, forcing_layout, noisy_layout
from mlaconvert.healing.recipe import HealRecipe
from mlaconvert.healing.state import WIDEST

FEW = 4  # steps of the student
_ONCE_A_TEXT = ("cross_attn.k.", "cross_attn.v.", "text_embedding.")
_ONCE_A_FRAME = ("time_embedding.", "time_projection.")


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """One step of one process. Memory in bytes, by what it is for; activations are a rough count.

    `flops` are those of matrix products and of attention's visible pairs (a multiplication and an addition are two).
    `seconds` need a measured rate of the device. `tokens` are those that go through the student with gradients.
    """

    trained_parameters: int
    parameters: int
    tokens: int
    flops: float
    memory: dict[str, int]
    seconds: float | None

    @property
    def total_memory(self) -> int:
        """Bytes of everything on one device."""
        return sum(self.memory.values())

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self) | {"total_memory": self.total_memory}


def forward_flops(config: WanConfig, layout: Layout, height: int, width: int) -> float:
    """FLOPs of one clip's forward pass: `layout` of frames of `height` x `width` tokens.

    A linear layer takes 2 x (its weights) a token; attention 2 x (score width + value width) a head and visible pair
    of tokens; cross-attention likewise for every token and text token.
    """
    size = height * width
    tokens, pairs = len(layout.positions) * size, int(layout.visible.sum()) * size * size
    total = 0.0
    for name, shape in WanFamily().expected_shapes(config).items():
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
        total += 2.0 * config.num_heads * (score + value) * pairs
        total += 2.0 * config.num_heads * 2 * config.head_dim * tokens * config.text_len
    return total


def estimate(
    recipe: HealRecipe,
    student: WanConfig,
    teacher: WanConfig,
    trained: Sequence[Sequence[int]],
    view: View,
    *,
    height: int,
    width: int,
    flops_per_second: float | None = None,
    processes: int = 1,
) -> Estimate:
    """For trained tensors of these shapes and views of `height` x `width` latent pixels, on each of `processes`.
    Nothing is sharded.

    A pass with gradients costs three forward passes (four with checkpointing); so it does where only some weights are
    trained, for the gradient has to pass the others too.
    """
    patch = student.patch_size
    grid = (height // patch[1], width // patch[2])
    noisy, forcing = noisy_layout(view, student.streaming), forcing_layout(view, student.streaming)
    seen = noisy_layout(view, teacher.streaming)
    once = 4.0 if recipe.gradient_checkpointing else 3.0
    guided = 2.0 if recipe.guidance != 1 else 1.0
    samples = recipe.batch * recipe.accumulate
    layout = noisy if recipe.stage in ("distill", "dmd") else forcing
    ours, theirs = forward_flops(student, layout, *grid), forward_flops(teacher, seen, *grid)
    if recipe.stage == "distill":
        flops = once * ours + theirs
    elif recipe.stage == "teacher-forcing":
        flops = once * ours
    elif recipe.stage == "consistency":
        flops = (once + 1) * ours + guided * forward_flops(teacher, forcing, *grid)
    else:
        # On average half of the steps, then the clean pass; the critic learns from as many more rollouts.
        generate = ((FEW + 1) / 2 + 1) * ours
        flops = generate + (once - 1) * ours + (1 + guided) * theirs + recipe.critic_steps * (generate + once * theirs)
    tokens = len(layout.positions) * prod(grid)
    parameters = _count(student)
    learned = _elements(trained)
    copies = 1 if recipe.ema else 0
    half = 2 if recipe.precision == "bf16" else 4
    memory = {
        "weights": 4 * parameters,
        "gradients": 4 * learned,
        "optimizer": _optimizer(recipe, trained),
        "average": 4 * learned * (copies + (recipe.stage == "consistency")),
        "teacher": 0 if recipe.stage == "teacher-forcing" else half * _count(teacher),
        "critic": 8 * _count(teacher) + _optimizer(recipe, _shapes(teacher)) if recipe.stage == "dmd" else 0,
        "activations": _activations(recipe, student, tokens),
    }
    total = flops * samples
    return Estimate(
        trained_parameters=learned,
        parameters=parameters,
        tokens=tokens * samples * processes,
        flops=total * processes,
        memory=memory,
        seconds=None if flops_per_second is None else total / flops_per_second,
    )


def _shapes(config: WanConfig) -> list[tuple[int, ...]]:
    return list(WanFamily().expected_shapes(config).values())


def _elements(shapes: Sequence[Sequence[int]]) -> int:
    return sum(prod(shape) for shape in shapes)


def _count(config: WanConfig) -> int:
    return _elements(_shapes(config))


def _optimizer(recipe: HealRecipe, shapes: Sequence[Sequence[int]]) -> int:
    """Bytes of Adam's two moments; SOAP has a covariance and an eigenbasis for each side of a matrix besides."""
    moments = 8 * _elements(shapes)
    if recipe.optimizer == "adamw":
        return moments
    return moments + 8 * sum(side * side for shape in shapes if len(shape) > 1 for side in shape if side <= WIDEST)


def _activations(recipe: HealRecipe, config: WanConfig, tokens: int) -> int:
    """About 16 tensors of the width and 2 of the feed-forward's a token and block, and a checkpointed block's input."""
    block = tokens * recipe.batch * (16 * config.dim + 2 * config.ffn_dim) * (2 if recipe.precision == "bf16" else 4)
    if not recipe.gradient_checkpointing:
        return block * config.num_layers
    return block + tokens * recipe.batch * config.dim * 4 * config.num_layers
