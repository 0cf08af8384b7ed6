"""Stage consistency: from a teacher of many steps to a student of four (VideoMLA's second stage)."""

from __future__ import annotations

import torch
from torch import Tensor

from mlaconvert.clips.folder import Clips
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.healing.batches import Batch
from mlaconvert.healing.flops import Passes
from mlaconvert.healing.frames import clean_frames, forcing_layout
from mlaconvert.healing.objective import Uncast, draw_noise, per_frame, with_past
from mlaconvert.healing.recipe import HealRecipe
from mlaconvert.healing.stages.few_step import FewStep
from mlaconvert.healing.stages.stage import Stage
from mlaconvert.healing.state import Trained
from mlaconvert.model.flops import Work
from mlaconvert.model.schedule import add_noise, warp
from mlaconvert.model.wan import WanModel

HUBER = 1e-3  # where the loss goes over from square to absolute, as in 2310.04378


class Consistency(FewStep):
    """Guided consistency distillation (Luo et al., arXiv 2310.04378) of the probability flow, in velocities.

    The consistency function is f(x, sigma) = x - sigma v(x, sigma): at sigma 0 it is x itself, so no boundary
    coefficients are needed. From a noisy chunk at level s_n of `solver_steps` + 1 levels of the shift-5 schedule, one
    Euler step of the teacher's guided flow leads to s_(n+1); f of the student at the former is held to f of its running
    average at the latter, by the pseudo-Huber distance. Chunks stand behind a clean past, like in teacher forcing. The
    student's four timesteps 1000, 750, 500, 250 (before the shift) are among the levels.
    """

    def __init__(
        self,
        student: WanModel,
        teacher: WanModel,
        recipe: HealRecipe,
        streaming: StreamingConfig | None,
        reference: list[Tensor] | None = None,
    ) -> None:
        super().__init__(student, teacher, recipe, reference)
        self._streaming = streaming
        self.grid = warp(torch.linspace(1, 0, recipe.solver_steps + 1, dtype=torch.float64)).float()

    def train_loss(self, batch: Batch, step: int, trained: Trained) -> Tensor:
        with torch.no_grad(), trained.averaged():
            target = self.call(self.target, batch)
        return self.call(self.loss, batch, step, target)

    def target(self, batch: Batch) -> Uncast:
        """The noisy clips, their levels [B, F], and what f must give there; the average's weights are in place."""
        index = batch.rows.integers(self.recipe.solver_steps, len(batch.view.chunks))
        now, after = (per_frame(self.grid[i].to(batch.latents.device), batch.view) for i in (index, index + 1))
        noisy = add_noise(batch.latents, draw_noise(batch), now)
        flow = self._velocity(self._teacher[0], batch, noisy, now, guided=True)
        solved = noisy + _scaled(after - now, flow)
        return Uncast((noisy, now, solved - _scaled(after, self._velocity(self.student, batch, solved, after))))

    def loss(self, batch: Batch, step: int, target: Uncast | None = None) -> Tensor:
        assert target is not None
        noisy, sigma, expected = target.tensors
        found = noisy - _scaled(sigma, self._velocity(self.student, batch, noisy, sigma))
        return ((found - expected).square() + HUBER**2).sqrt().mean() - HUBER

    def validate(self, clips: Clips) -> float:
        return self.distance(clips)

    def _velocity(self, model: WanModel, batch: Batch, noisy: Tensor, sigma: Tensor, *, guided: bool = False) -> Tensor:
        latents, timestep = with_past(batch, noisy, sigma)
        layout = forcing_layout(batch.view, self._streaming)
        run = (
            self.run_guided(model, latents, timestep, batch, layout)
            if guided
            else self.run(model, latents, timestep, batch.context, layout)
        )
        return run[:, :, clean_frames(batch.view) :]


def _scaled(sigma: Tensor, x: Tensor) -> Tensor:
    """Per-frame factors [B, F] times [B, C, F, H, W]."""
    return sigma[:, None, :, None, None] * x


def _flops(passes: Passes) -> Work:
    ours, theirs = (
        passes.forward(config, forcing_layout(passes.view, passes.student.streaming))
        for config in (passes.student, passes.teacher)
    )
    return (passes.trained + 1) * ours + passes.guided * theirs


STAGE = Stage(
    objective=lambda models, recipe, streaming: Consistency(models.student, models.teacher, recipe, streaming),
    flops=_flops,
    lr=2e-6,  # these are the paper's (arXiv 2605.30351)
    betas=(0.0, 0.999),
    layout=forcing_layout,
    needs_streaming_student=True,
    needs_streaming_teacher=True,
    guided=True,
    few_step=True,
    holds_average=True,
)
