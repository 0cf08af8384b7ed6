"""Noise levels: the flow-matching schedule and the samplers' timesteps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from mlaconvert.config.streaming import FEW_STEPS, SHIFT
from mlaconvert.errors import ConfigError, InputError


def warp(sigma: Tensor, shift: float = SHIFT) -> Tensor:
    """Shift noise levels in [0, 1] towards noise."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def add_noise(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x_t of [B, C, F, H, W] data and noise at per-frame noise levels `sigma` [B, F]."""
    level = sigma[:, None, :, None, None].to(clean.dtype)
    return torch.lerp(clean, noise, level)


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Noise levels of one chunk, from noise to data.

    Sampler.few_step()  # the distilled students' four steps
    Sampler.many_step(20, guidance=5.0)

    `timesteps` descend within (0, 1000]. With `renoise`, each step predicts the clean chunk and adds fresh noise
    (few-step students, as in Self-Forcing); otherwise steps integrate the flow by Euler's rule. `guidance` above 1
    mixes in an unconditional prediction (classifier-free guidance).
    """

    timesteps: tuple[float, ...]
    renoise: bool
    guidance: float = 1.0

    def __post_init__(self) -> None:
        steps = self.timesteps
        descend = all(a > b for a, b in pairwise(steps))  # false for NaN, too
        if not steps or not descend or not 0 < steps[-1] <= steps[0] <= 1000:
            raise ConfigError(f"timesteps {list(steps)} must descend within (0, 1000]")
        if self.guidance < 0:
            raise ConfigError(f"guidance is {self.guidance}: give 0 or more (1 switches it off)")

    @classmethod
    def few_step(
        cls, timesteps: Sequence[float] = FEW_STEPS, *, shift: float = SHIFT, guidance: float = 1.0
    ) -> Sampler:
        """The distilled students' schedule; `timesteps` are given before the warp."""
        warped = 1000 * warp(torch.tensor(timesteps, dtype=torch.float64) / 1000, shift)
        return cls(timesteps=tuple(warped.tolist()), renoise=True, guidance=guidance)

    @classmethod
    def many_step(cls, steps: int, *, shift: float = SHIFT, guidance: float = 1.0) -> Sampler:
        """`steps` Euler steps from pure noise."""
        if steps < 1:
            raise ConfigError(f"steps is {steps}: give 1 or more")
        grid = warp(torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1], shift)
        return cls(timesteps=tuple((1000 * grid).tolist()), renoise=False, guidance=guidance)

    @classmethod
    def usual(cls, *, few_step: bool) -> Sampler:
        """What a model is sampled with where nobody says otherwise: four steps for distilled students, else 20."""
        return cls.few_step() if few_step else cls.many_step(20)


def check_schedule(schedule: Sequence[tuple[int, Tensor]]) -> int:
    """The number of videos that a prompt schedule is for."""
    starts = [start for start, _ in schedule]
    if not starts or starts[0] != 0 or any(a >= b for a, b in pairwise(starts)):
        raise InputError(f"prompts begin at frames {starts}; the first must begin at 0 and the others after it in turn")
    batches = {text.shape[0] for _, text in schedule}
    if len(batches) > 1:
        raise InputError(f"the prompts are for {sorted(batches)} videos; give each prompt for the same videos")
    return batches.pop()
