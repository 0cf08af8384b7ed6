"""Losses of teacher and student on the same clips, noise and noise levels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from mlaconvert.clips.folder import BATCH, BATCH_TOKENS, Clips
from mlaconvert.errors import InputError
from mlaconvert.model.blocks import Block
from mlaconvert.model.schedule import add_noise, warp
from mlaconvert.model.wan import WanModel
from mlaconvert.model.window import default_chunks
from mlaconvert.progress import Counter, Progress, silent


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """How close a student is to its teacher on the same clips, noise and noise levels: with noisy pasts.

    Every chunk has a noise level of its own, as in diffusion forcing, so the chunks that it sees are noisy too. In a
    rollout they are clean, which `timesteps.velocity_by_timestep` measures. A bidirectional model has no past.

    Losses are mean squared errors of the velocity. `excess` is the student's loss above the teacher's, as a
    share of it. Errors are Frobenius norms relative to the teacher's output: `attention_errors` of each layer's
    self-attention fed with the teacher's inputs, `velocity_error` of the whole model.
    """

    teacher_loss: float
    student_loss: float
    velocity_error: float
    attention_errors: tuple[float, ...]

    @property
    def excess(self) -> float:
        """Loss above the teacher's, as a share of it."""
        return self.student_loss / self.teacher_loss - 1


@dataclass(frozen=True, kw_only=True)
class NoisyBatch:
    """Clips at the noise levels of a validation loss, on the model's device."""

    noisy: Tensor  # [B, C, F, H, W]
    timestep: Tensor  # [B, F]
    context: Tensor  # [B, T, text_dim]
    target: Tensor  # [B, C, F, H, W], noise - data


def noisy_batches(model: WanModel, clips: Clips, *, seed: int = 0) -> list[NoisyBatch]:
    """The clips at noise levels that cover the shift-5 schedule evenly, one independent level per chunk.

    Everything follows from `seed`: the noise, and which of N * chunks equal strata of the schedule each chunk gets. A
    bidirectional model has one level per clip.
    """
    count, _, frames = clips.latents.shape[:3]
    chunks = chunks_of(model, frames)
    generator = torch.Generator().manual_seed(seed)
    strata = (torch.randperm(count * len(chunks), generator=generator) + 0.5) / (count * len(chunks))
    sigma = warp(strata).view(count, len(chunks)).repeat_interleave(torch.tensor(chunks), 1)
    noise = torch.randn(clips.latents.shape, generator=generator)
    return batches_at(model, clips, noise, sigma)


def chunks_of(model: WanModel, frames: int) -> list[int]:
    """Frames of each chunk; a bidirectional model has one."""
    return default_chunks(frames, model.config.streaming) if model.config.streaming else [frames]


def batches_at(model: WanModel, clips: Clips, noise: Tensor, sigma: Tensor) -> list[NoisyBatch]:
    """`clips` with `noise` [N, C, F, H, W] at levels `sigma` [N, F], as many at once as `BATCH_TOKENS` allow."""
    _, _, frames, height, width = clips.latents.shape
    tokens = frames // model.config.patch_size[0] * model.config.tokens_per_frame(height, width)
    size = max(1, min(BATCH, BATCH_TOKENS // max(1, tokens)))
    device = model.patch_embedding.weight.device
    parts = (add_noise(clips.latents, noise, sigma), 1000 * sigma, clips.context, noise - clips.latents)
    return [
        NoisyBatch(noisy=x, timestep=t, context=c, target=y)
        for x, t, c, y in zip(*(part.to(device).split(size) for part in parts), strict=True)
    ]


@torch.no_grad()
def validation_loss(
    model: WanModel,
    clips: Clips,
    *,
    seeds: Sequence[int] = (0,),
    progress: Progress = silent,
    stage: str = "losses",
) -> float:
    """Mean squared velocity error over `clips`, in one masked pass each, for every seed of `noisy_batches`.

    `progress` counts batches, as those of `stage`.
    """
    total = 0.0
    for seed in seeds:
        batches = noisy_batches(model, clips, seed=seed)
        count = Counter(progress, stage, len(batches))
        count.show()
        for batch in batches:
            velocity = model(batch.noisy, batch.timestep, batch.context).float()
            total += float((velocity - batch.target).square().sum())
            count.step()
    return total / (clips.latents.numel() * len(seeds))


@torch.no_grad()
def measure_fidelity(
    teacher: WanModel,
    student: WanModel,
    clips: Clips,
    *,
    seed: int = 0,
    progress: Progress = silent,
) -> Fidelity:
    """Compare `student` with the `teacher` that it was converted from; `progress` counts batches.

    One layer's activations are held at a time. Raises InputError when their geometries differ.
    """
    same = ("dim", "num_layers", "in_dim", "out_dim", "patch_size", "streaming")
    for name in same:
        ours, theirs = getattr(student.config, name), getattr(teacher.config, name)
        if ours != theirs:
            raise InputError(f"the student has {name} {ours}, the teacher {theirs}; give the model it was made from")
    losses = torch.zeros(2, dtype=torch.float64)
    velocity = torch.zeros(2, dtype=torch.float64)
    attention = torch.zeros(2, teacher.config.num_layers, dtype=torch.float64)
    batches = noisy_batches(teacher, clips, seed=seed)
    count = Counter(progress, "losses", len(batches))
    count.show()
    for batch in batches:
        expected = _trace(teacher, student, batch, attention).float()
        predicted = student(batch.noisy, batch.timestep, batch.context).float()
        losses += sums_of_squares(expected - batch.target, predicted - batch.target)
        velocity += sums_of_squares(predicted - expected, expected)
        count.step()
    per_value = losses / clips.latents.numel()
    errors = (attention[0] / attention[1]).sqrt()
    return Fidelity(
        teacher_loss=float(per_value[0]),
        student_loss=float(per_value[1]),
        velocity_error=float((velocity[0] / velocity[1]).sqrt()),
        attention_errors=tuple(errors.tolist()),
    )


def sums_of_squares(*values: Tensor) -> Tensor:
    """Sums of squares, float64 on the CPU."""
    return torch.stack([value.square().sum().double().cpu() for value in values])


def _trace(teacher: WanModel, student: WanModel, batch: NoisyBatch, sums: Tensor) -> Tensor:
    """The teacher's velocity; adds each layer's squared attention error and output to `sums` [2, layers]."""
    p = teacher.prepare(batch.noisy, batch.timestep, batch.context)
    x = p.x
    pairs = zip(cast(Sequence[Block], teacher.blocks), cast(Sequence[Block], student.blocks), strict=True)
    for i, (block, pupil) in enumerate(pairs):
        inputs, expected, x = block.trace(x, p.modulation, p.text, p.image, p.plan)
        attended = pupil.self_attn(inputs.to(student.dtype), p.plan)
        sums[0, i] += (attended - expected).double().square().sum().cpu()
        sums[1, i] += expected.double().square().sum().cpu()
    return teacher.finish(x, p)
