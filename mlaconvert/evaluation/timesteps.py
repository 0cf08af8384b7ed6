"""Velocities of teacher and student at each timestep of the sampler, behind clean pasts."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from mlaconvert.clips.folder import Clips
from mlaconvert.config.parsing import STRICT
from mlaconvert.config.streaming import StreamingConfig
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


@dataclass(frozen=True, kw_only=True)
class CleanPast:
    """The newest chunk behind clean pasts, as every rollout has it, over all timesteps of `velocity_by_timestep`.

    Losses (mean squared errors of the velocity) are means over the timesteps, so `excess` is the sum of the student's
    over the sum of the teacher's, less one: timesteps with a large loss count most. `velocity_error` is the mean of the
    relative errors: every timestep counts the same. A teacher that sees clean chunks leaves little loss, so a small
    `velocity_error` may be a large `excess`.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    teacher_loss: float
    student_loss: float
    velocity_error: float

    @classmethod
    def of(cls, steps: Sequence[TimestepError]) -> CleanPast:
        """The summary of `steps`, of which there is at least one."""
        names = ("teacher_loss", "student_loss", "velocity_error")
        return cls(**{name: statistics.fmean(getattr(step, name) for step in steps) for name in names})

    @property
    def excess(self) -> float:
        """Loss above the teacher's, as a share of it."""
        return self.student_loss / self.teacher_loss - 1

    def to_json(self) -> dict[str, float]:
        """Plain data: the losses, the excess, the velocity error."""
        names = ("teacher_loss", "student_loss", "excess", "velocity_error")
        return {name: getattr(self, name) for name in names}


def has_past(streaming: StreamingConfig | None, clips: Clips) -> bool:
    """Whether the newest chunk of `clips` has chunks before it; a bidirectional model (None) has no chunks."""
    return streaming is not None and clips.latents.shape[2] > streaming.chunk_frames


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
