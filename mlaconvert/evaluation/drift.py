"""Long rollouts of a converted model beside its teacher's: how they part over time, and how fast both run.

Two videos from one noise part by chaos alone, so distance is no loss of quality by itself. It is shown beside the
distance between two rollouts of the teacher, and beside statistics of the frames that a sound model keeps.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.model import rates
from mlaconvert.model.flops import rollout_work
from mlaconvert.model.rollout import CacheUse, Given, LatentSize, passes, rollout
from mlaconvert.model.schedule import Sampler
from mlaconvert.model.wan import WanModel
from mlaconvert.model.window import default_chunks

# What is measured of every frame, and how it is called.
STATISTICS = {
    "mean": "mean",
    "std": "spread (standard deviation within a frame)",
    "detail": "fine detail (share of a frame's variance above half the highest frequency)",
    "motion": "motion (RMS difference from the frame before)",
}


@dataclass(frozen=True, kw_only=True)
class RolloutPlan:
    """What every rollout of a comparison shares.

    `context` [B, T, text_dim]; `prefix` [B, C, F, height, width] is given, not generated. `frames` (latent) counts it.
    """

    context: Tensor
    prefix: Tensor | None
    frames: int
    height: int
    width: int
    sampler: Sampler
    null_context: Tensor | None
    streaming: StreamingConfig
    seed: int

    @property
    def given(self) -> int:
        """Latent frames of the prefix."""
        return 0 if self.prefix is None else self.prefix.shape[2]

    @property
    def passes(self) -> int:
        """Forward passes of one rollout."""
        return passes(self.frames, self.sampler, self.streaming, given=self.given)

    @property
    def other_seed(self) -> int:
        """The seed of rollouts to compare with: every video's noise is another one."""
        return self.seed + self.context.shape[0]

    def warning(self, teacher: WanModel, models: int) -> str | None:
        """A line about rollouts that will take a CPU long: twice the teacher's beside each of so many models."""
        config, device = teacher.config, teacher.patch_embedding.weight.device
        frame = config.tokens_per_frame(self.height, self.width)
        work = rollout_work(
            config, self.streaming, self.sampler, frames=self.frames, frame_tokens=frame, given=self.given
        )
        videos = 3 * models * len(self.context)
        what = f"{videos} rollouts of {self.frames} latent frames"
        tokens = self.streaming.chunk_frames * frame
        return rates.warning(what, videos * work, config, device, teacher.dtype, tokens=tokens)

    def chunks(
        self, model: WanModel, *, seed: int | None = None, on_step: Callable[[], None] | None = None
    ) -> Iterator[Tensor]:
        """The model's rollout, chunk by chunk, [B, C, f, height, width] on the CPU; `seed` None is the plan's."""
        for chunk in rollout(
            model,
            self.context,
            size=LatentSize(frames=self.frames, height=self.height, width=self.width),
            given=Given(null_context=self.null_context, prefix=self.prefix),
            cache=CacheUse(streaming=self.streaming),
            sampler=self.sampler,
            seed=self.seed if seed is None else seed,
            on_step=on_step,
        ):
            yield chunk.float().cpu()


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Latent frames per second of all videos together; `ratio` is the student's speed over the teacher's.

    The teacher's is that of its median chunk, the ratio the median over pairs of chunks that ran back to back.
    """

    teacher: float
    ratio: float

    @property
    def student(self) -> float:
        """Latent frames a second of the converted model."""
        return self.teacher * self.ratio


def paired_rollouts(
    teacher: WanModel, student: WanModel, plan: RolloutPlan, on_step: Callable[[], None] | None = None
) -> tuple[Tensor, Tensor, Speed]:
    """Both models' videos [B, C, F, height, width] from the same noise, chunk after chunk in turn, and their speed.

    Which one goes first changes with every chunk, so that neither profits from a machine that is busy for a while.
    Timed are chunks that see a full window, or all generated ones when the rollout is that short.
    """
    models = (teacher, student)
    streams = [plan.chunks(model, on_step=on_step) for model in models]
    videos: tuple[list[Tensor], list[Tensor]] = ([], [])
    seconds: list[tuple[int, list[float]]] = []  # first frame after the chunk; a frame's seconds, teacher and student
    end = 0
    for turn, frames in enumerate(default_chunks(plan.frames, plan.streaming)):
        took = [0.0, 0.0]
        for i in (0, 1) if turn % 2 == 0 else (1, 0):
            started = time.perf_counter()
            videos[i].append(next(streams[i]))  # on the CPU, so the device has finished
            took[i] = (time.perf_counter() - started) / frames
        end += frames
        if end > plan.given:
            seconds.append((end, took))
    for stream in streams:
        stream.close()  # type: ignore[attr-defined]
    full = [took for end, took in seconds if end >= plan.streaming.window_frames] or [took for _, took in seconds]
    batch = plan.context.shape[0]
    speed = Speed(
        teacher=batch / statistics.median(took[0] for took in full),
        ratio=statistics.median(took[0] / took[1] for took in full),
    )
    return torch.cat(videos[0], 2), torch.cat(videos[1], 2), speed


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Frame by frame, the student's rollout and a rollout of the teacher from another noise against the teacher's.

    `difference` is |video - teacher's| / |teacher's| of each frame, over all videos. `statistics` of each frame are
    those of `STATISTICS`, by name, for "teacher", "student" and "other_seed"; motion begins at the second frame.
    """

    given: int
    difference: dict[str, tuple[float, ...]]
    statistics: dict[str, dict[str, tuple[float, ...]]]

    @property
    def deviation(self) -> dict[str, dict[str, float]]:
        """How far "student" and "other_seed" are from the teacher in each statistic over the last third of the frames.

        Relative to the teacher's, but for the mean, which is relative to the teacher's spread.
        """

        def late(who: str, name: str) -> float:
            values = self.statistics[name][who]
            return statistics.fmean(values[-max(1, len(values) // 3) :])

        return {
            who: {
                name: (late(who, name) - late("teacher", name))
                / max(late("teacher", "std" if name == "mean" else name), 1e-12)
                for name in self.statistics
            }
            for who in ("student", "other_seed")
        }

    @property
    def late_difference(self) -> dict[str, float]:
        """Mean difference over the last third of the frames."""
        return {who: statistics.fmean(v[-max(1, len(v) // 3) :]) for who, v in self.difference.items()}

    def to_json(self) -> dict[str, Any]:
        """Plain data, to six significant digits."""

        def digits(values: tuple[float, ...]) -> list[float]:
            return [float(f"{value:.6g}") for value in values]

        return {
            "given_frames": self.given,
            "difference": {who: digits(values) for who, values in self.difference.items()},
            "statistics": {
                name: {who: digits(values) for who, values in by.items()} for name, by in self.statistics.items()
            },
            "last_third": {"difference": self.late_difference, "deviation": self.deviation},
        }


def compare_videos(teacher: Tensor, student: Tensor, other_seed: Tensor, *, given: int = 0) -> Drift:
    """The drift of videos [B, C, F, H, W] against the teacher's of the same shape; `given` frames are not generated."""
    videos = {"teacher": teacher, "student": student, "other_seed": other_seed}
    scale = teacher.double().square().sum((0, 1, 3, 4)).sqrt().clamp_min(1e-12)
    difference = {
        who: tuple(((video.double() - teacher.double()).square().sum((0, 1, 3, 4)).sqrt() / scale).tolist())
        for who, video in videos.items()
        if who != "teacher"
    }
    by_video = {who: frame_statistics(video) for who, video in videos.items()}
    return Drift(
        given=given,
        difference=difference,
        statistics={name: {who: tuple(by_video[who][name].tolist()) for who in videos} for name in STATISTICS},
    )


def frame_statistics(video: Tensor) -> dict[str, Tensor]:
    """`STATISTICS` of a video [B, C, F, H, W] over its batch and channels, float64 [F] each (motion [F - 1]).

    The spread is the root of the mean variance within a frame's channels. Fine detail is the share of that variance at
    spatial frequencies of more than a quarter cycle per pixel along either axis.
    """
    x = video.double()
    height, width = x.shape[-2:]
    power = torch.fft.fft2(x).abs().square()
    power[..., 0, 0] = 0
    fine = (torch.fft.fftfreq(height).abs()[:, None] > 0.25) | (torch.fft.fftfreq(width).abs() > 0.25)
    variance = x.var((-2, -1), correction=0).mean((0, 1))
    return {
        "mean": x.mean((0, 1, 3, 4)),
        "std": variance.sqrt(),
        "detail": (power * fine).sum((0, 1, 3, 4)) / power.sum((0, 1, 3, 4)).clamp_min(1e-12),
        "motion": x.diff(dim=2).square().mean((0, 1, 3, 4)).sqrt(),
    }
