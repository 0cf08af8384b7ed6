"""Velocities of teacher and student at each timestep of the sampler, behind clean pasts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mlaconvert.clips.folder import Clips
from mlaconvert.evaluation.losses import batches_at, chunks_of, sums_of_squares
from mlaconvert.model.schedule import Sampler
from mlaconvert.model.wan import WanModel
from mlaconvert.progress import Counter, Progress, silent

LEVELS = 8  # noise levels at which velocities are compared


@dataclass(frozen=True, kw_only=True)
class TimestepError:
    """The newest chunk's velocity at a timestep (0 clean, 1000 noise): error relative to the teacher's, and losses."""

    timestep: float
    velocity_error: float
    teacher_loss: float
    student_loss: float


@torch.no_grad()
def velocity_by_timestep(
    teacher: WanModel,
    student: WanModel,
    clips: Clips,
    *,
    seed: int = 0,
    progress: Progress = silent,
) -> tuple[TimestepError, ...]:
    """Velocities of both models along the sampler's schedule: `LEVELS` levels of the shift-5 grid.

    The few-step schedule is among them. Streaming: the last chunk of every clip is at the timestep and the ones before
    it are clean, as in a rollout. Bidirectional: the whole clip is at it. The clean pass (timestep 0) is not among
    them: its velocity is never used.
    """
    chunks = chunks_of(teacher, clips.latents.shape[2])
    newest = slice(-chunks[-1], None)
    timesteps = Sampler.many_step(LEVELS).timesteps
    noise = torch.randn(clips.latents.shape, generator=torch.Generator().manual_seed(seed))
    errors = []
    progressed = Counter(progress, "timesteps", len(timesteps))
    progressed.show()
    for timestep in timesteps:
        sigma = torch.zeros(clips.latents.shape[0], clips.latents.shape[2])
        sigma[:, newest] = timestep / 1000
        sums, count = torch.zeros(4, dtype=torch.float64), 0
        for batch in batches_at(teacher, clips, noise, sigma):
            expected, velocity = (
                model(batch.noisy, batch.timestep, batch.context).float()[:, :, newest] for model in (teacher, student)
            )
            target = batch.target[:, :, newest]
            sums += sums_of_squares(velocity - expected, expected, expected - target, velocity - target)
            count += target.numel()
        errors.append(
            TimestepError(
                timestep=timestep,
                velocity_error=float((sums[0] / sums[1]).sqrt()),
                teacher_loss=float(sums[2]) / count,
                student_loss=float(sums[3]) / count,
            )
        )
        progressed.step()
    return tuple(errors)
