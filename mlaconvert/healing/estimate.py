"""What a step of healing costs, counted from shapes: floating point operations, and bytes of memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from mlaconvert.config.geometry import WanConfig
from mlaconvert.families.known import family_of
from mlaconvert.healing.flops import Passes
from mlaconvert.healing.frames import View
from mlaconvert.healing.recipe import HealRecipe
from mlaconvert.healing.stages import stage_of
from mlaconvert.healing.state import WIDEST
from mlaconvert.model.flops import Work, block_scalars
from mlaconvert.model.memory import parameter_count
from mlaconvert.model.rates import Rates


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """One step of one process. Memory in bytes, by what it is for; activations are a rough count.

    `flops` are those of matrix products and of attention's visible pairs (a multiplication and an addition are two).
    `seconds` need a measured rate of the device. `tokens` are those that go through the student with gradients. `disk`
    is what the teacher's velocities take that are kept (`HealRecipe.reuse`), of all steps.
    """

    trained_parameters: int
    parameters: int
    tokens: int
    flops: float
    memory: dict[str, int]
    seconds: float | None
    disk: int = 0

    @property
    def total_memory(self) -> int:
        """Bytes of everything on one device."""
        return sum(self.memory.values())

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self) | {"total_memory": self.total_memory}


def estimate(
    recipe: HealRecipe,
    student: WanConfig,
    teacher: WanConfig,
    trained: Sequence[Sequence[int]],
    view: View,
    *,
    size: tuple[int, int],
    rates: Rates | float | None = None,
    processes: int = 1,
) -> Estimate:
    """For trained tensors of these shapes and views of `size` (height, width) in latent pixels, on each of `processes`.
    Nothing is sharded. `rates` are those of a device, or the FLOPs a second that it sustains; None tells no time.
    """
    stage = stage_of(recipe.stage)
    patch = student.patch_size
    grid = (size[0] // patch[1], size[1] // patch[2])
    passes = Passes(recipe=recipe, student=student, teacher=teacher, view=view, grid=grid)
    samples = recipe.batch * recipe.accumulate
    layout = stage.layout(view, student.streaming)
    tokens = len(layout.positions) * prod(grid)
    parameters = parameter_count(student)
    learned = _elements(trained)
    copies = 1 if recipe.ema else 0
    half = 2 if recipe.precision == "bf16" else 4
    memory = {
        "weights": 4 * parameters,
        "gradients": 4 * learned,
        "optimizer": _optimizer(recipe, trained),
        "average": 4 * learned * (copies + stage.holds_average),
        "teacher": half * parameter_count(teacher) if stage.holds_teacher else 0,
        "critic": 8 * parameter_count(teacher) + _optimizer(recipe, _shapes(teacher)) if stage.holds_critic else 0,
        "activations": _activations(recipe, student, tokens),
    }
    total = samples * stage.flops(passes)
    velocity = 4 * student.out_dim * len(view.frames) * prod(size)  # bytes of one clip's
    return Estimate(
        trained_parameters=learned,
        parameters=parameters,
        tokens=tokens * samples * processes,
        flops=total.flops * processes,
        memory=memory,
        seconds=_seconds(total, rates),
        disk=velocity * samples * processes * recipe.kept_steps,
    )


def _seconds(work: Work, rates: Rates | float | None) -> float | None:
    if rates is None:
        return None
    return rates.seconds(work) if isinstance(rates, Rates) else work.flops / rates


def _shapes(config: WanConfig) -> list[tuple[int, ...]]:
    return list(family_of(config).expected_shapes(config).values())


def _elements(shapes: Sequence[Sequence[int]]) -> int:
    return sum(prod(shape) for shape in shapes)


def _optimizer(recipe: HealRecipe, shapes: Sequence[Sequence[int]]) -> int:
    """Bytes of Adam's two moments, of which Muon has one for a matrix; SOAP has a covariance and an eigenbasis for each
    side of a matrix besides.
    """
    moments, matrices = 8 * _elements(shapes), [shape for shape in shapes if len(shape) > 1]
    if recipe.optimizer == "muon":
        return moments - 4 * _elements([shape for shape in matrices if len(shape) == 2])
    if recipe.optimizer == "adamw":
        return moments
    return moments + 8 * sum(side * side for shape in matrices for side in shape if side <= WIDEST)


def _activations(recipe: HealRecipe, config: WanConfig, tokens: int) -> int:
    """What every block makes of its tokens, or with checkpointing one does, and the others' inputs."""
    block = tokens * recipe.batch * block_scalars(config) * (2 if recipe.precision == "bf16" else 4)
    if not recipe.gradient_checkpointing:
        return block * config.num_layers
    return block + tokens * recipe.batch * config.dim * 4 * config.num_layers
