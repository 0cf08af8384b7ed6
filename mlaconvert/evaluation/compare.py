"""One model beside its teacher."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlaconvert.config.geometry import default_video
from mlaconvert.evaluation import figures
from mlaconvert.evaluation.conditions import Conditions
from mlaconvert.evaluation.drift import Drift, RolloutPlan, Speed, compare_videos, paired_rollouts
from mlaconvert.evaluation.losses import Fidelity, measure_fidelity
from mlaconvert.evaluation.timesteps import CleanPast, TimestepError, has_past, velocity_by_timestep
from mlaconvert.evaluation.vbench import VBenchScores
from mlaconvert.model.cache import LatentCache
from mlaconvert.model.wan import WanModel
from mlaconvert.progress import Counter, Progress


@dataclass(frozen=True, kw_only=True)
class ModelEvaluation:
    """Everything measured of one model beside its teacher.

    `fidelity` is measured with noisy pasts, an independent noise level per chunk; `clean_past` sums up `timesteps`, or
    is None where the newest chunk has no past (bidirectional models, clips of one chunk). `cache_bytes` are those of
    the buffers for one video. `speed`, `drift` and the videos are None without a rollout; videos are [B, C, F, H, W]
    latents on the CPU. `conversion` and `healing` are the model's JSON records.
    """

    path: str
    fidelity: Fidelity
    timesteps: tuple[TimestepError, ...]
    cache_bytes: dict[str, int]
    clean_past: CleanPast | None = None
    drift: Drift | None = None
    speed: Speed | None = None
    teacher_video: Tensor | None = None
    video: Tensor | None = None
    conversion: dict[str, Any] | None = None
    healing: dict[str, Any] | None = None
    vbench: VBenchScores | None = None
    frame_stride: int = 1

    @property
    def cache_reduction(self) -> float:
        """Share of the teacher's cache that is saved."""
        return 1 - self.cache_bytes["student"] / self.cache_bytes["teacher"]

    @property
    def frames_per_second(self) -> dict[str, float] | None:
        """Video frames per second of teacher and student, without the VAE, and the ratio of their speeds."""
        if self.speed is None:
            return None
        teacher, student = (self.frame_stride * rate for rate in (self.speed.teacher, self.speed.student))
        return {"teacher": teacher, "student": student, "ratio": self.speed.ratio}

    def to_json(self) -> dict[str, Any]:
        """Plain data: every figure, no frames."""
        return {"path": self.path, **figures.to_json(self)}


def compare(
    teacher: WanModel, student: WanModel, conditions: Conditions, *, path: str, progress: Progress
) -> ModelEvaluation:
    """Measure `student` against `teacher` under `conditions`. Raises InputError when they do not belong together."""
    found = compare_on_clips(teacher, student, conditions, path=path, progress=progress)
    plan = conditions.rollout
    return found if plan is None else with_rollouts(found, teacher, student, plan, progress=progress)


def compare_on_clips(
    teacher: WanModel, student: WanModel, conditions: Conditions, *, path: str, progress: Progress
) -> ModelEvaluation:
    """What `compare` measures without a rollout: losses, errors and cache. Raises InputError as it does."""
    clips, seed, plan = conditions.clips, conditions.seed, conditions.rollout
    fidelity = measure_fidelity(teacher, student, clips, seed=seed, progress=progress)
    timesteps = velocity_by_timestep(teacher, student, clips, seed=seed, progress=progress)
    height, width = clips.latents.shape[-2:]
    streaming = plan.streaming if plan is not None else student.config.streaming
    cache_bytes = {
        who: LatentCache(
            model.config,
            batch=1,
            height=height,
            width=width,
            streaming=streaming,
            dtype=model.dtype,
            device=model.patch_embedding.weight.device,
        ).nbytes
        for who, model in (("teacher", teacher), ("student", student))
    }
    return ModelEvaluation(
        path=path,
        fidelity=fidelity,
        timesteps=timesteps,
        clean_past=CleanPast.of(timesteps) if has_past(teacher.config.streaming, clips) else None,
        cache_bytes=cache_bytes,
        frame_stride=default_video(student.config).frame_stride,
    )


def with_rollouts(
    found: ModelEvaluation, teacher: WanModel, student: WanModel, plan: RolloutPlan, *, progress: Progress
) -> ModelEvaluation:
    """`found` with drift, speed and videos: both models' rollouts, and the teacher's from another noise."""
    count = Counter(progress, "rollouts", 3 * plan.passes)
    count.show()
    expected, video, speed = paired_rollouts(teacher, student, plan, count.step)
    other = torch.cat(list(plan.chunks(teacher, seed=plan.other_seed, on_step=count.step)), 2)
    return dataclasses.replace(
        found,
        drift=compare_videos(expected, video, other, given=plan.given),
        speed=speed,
        teacher_video=expected,
        video=video,
    )
