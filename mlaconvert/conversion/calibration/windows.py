"""The windows of a calibration: which (query, key) pairs attention forms, at which timesteps.

Streaming: for every chunk of a clip, the chunk at one of the sampler's timesteps attends to itself and to the clean
frames of its window, and the clean pass (timestep 0) to clean ones; with `noisy_context` a second window has an
independent noise level per chunk, as in training and in the validation loss. Only the newest chunk's queries count.
Bidirectional: all frames at one noise level.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlaconvert.clips.folder import Clips
from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.conversion.calibration.refit import QUERIES
from mlaconvert.model.schedule import Sampler, add_noise, warp
from mlaconvert.model.window import window_views

BATCH, BATCH_TOKENS = 8, 2**14  # clips that go through the model at once, and their tokens, but for long clips
BATCH_SCALARS = 2**22  # of one activation of a batch
PROBE_SCALARS = 2**27  # of the probes' activations of one followed model


@dataclass(frozen=True, kw_only=True)
class Regime:
    """Which (query, key) pairs attention forms: the window, or None for a bidirectional model, and timesteps."""

    streaming: StreamingConfig | None
    timesteps: tuple[float, ...]
    noisy_context: bool = True
    seed: int = 0

    @classmethod
    def of(cls, streaming: StreamingConfig | None, seed: int = 0) -> Regime:
        """The sampler's timesteps: four and the clean pass when streaming, else the shift-5 grid of eight levels."""
        steps = (*Sampler.few_step().timesteps, 0.0) if streaming else Sampler.many_step(8).timesteps
        return cls(streaming=streaming, timesteps=steps, seed=seed)

    def to_json(self) -> dict[str, Any]:
        """Plain data, for config.json."""
        return {
            "streaming": dataclasses.asdict(self.streaming) if self.streaming else None,
            "timesteps": [round(t, 4) for t in self.timesteps],
            "noisy_context": self.noisy_context,
            "seed": self.seed,
        }


@dataclass(frozen=True, kw_only=True)
class Window:
    """A batch of windows as the model sees them; the queries of the last `queries` frames count."""

    latents: Tensor  # [B, C, F, H, W], noisy
    target: Tensor  # [B, C, queries, H, W], noise - data of the last frames
    timestep: Tensor  # [B, F]
    context: Tensor  # [B, T, text_dim]
    chunks: tuple[int, ...] | None
    queries: int


def windows(clips: Clips, regime: Regime, batch: int = BATCH) -> Iterator[Window]:
    """Every window of every clip, `batch` clips at a time; the rows of a batch take the timesteps in turn."""
    generator = torch.Generator().manual_seed(regime.seed)
    timesteps = torch.tensor(regime.timesteps)
    turn = 0
    for part in clips.batches(batch):
        for frames, chunks in window_views(part.latents.shape[2], regime.streaming):
            latents, sizes = part.latents[:, :, frames], chunks or (len(frames),)
            rows = torch.arange(turn, turn + len(latents))
            turn += len(latents)
            sampled = torch.zeros(len(latents), len(sizes))
            sampled[:, -1] = timesteps[rows % len(timesteps)] / 1000
            levels = [sampled]
            if regime.noisy_context:
                levels.append(warp(torch.rand(sampled.shape, generator=generator)))
            for level in levels:
                sigma = level.repeat_interleave(torch.tensor(sizes), 1)
                noise = torch.randn(latents.shape, generator=generator)
                yield Window(
                    latents=add_noise(latents, noise, sigma),
                    target=(noise - latents)[:, :, -sizes[-1] :],
                    timestep=1000 * sigma,
                    context=part.context,
                    chunks=chunks,
                    queries=sizes[-1],
                )


def batch_size(clips: Clips, config: WanConfig) -> int:
    """How many clips go through a model at once."""
    tokens = clips.latents.shape[2] * config.tokens_per_frame(*clips.latents.shape[3:])
    return max(1, min(BATCH, BATCH_TOKENS // tokens, BATCH_SCALARS // (tokens * config.dim)))


def scratch_bytes(config: WanConfig, shape: Sequence[int], regime: Regime, *, followed: int) -> int:
    """About how many bytes of the disk a calibration on a CPU takes for the activations of clips [N, C, F, H, W].

    `followed` is the number of layers between which scalars are shared by what they do to the velocity.
    """
    count, channels, length, height, width = shape
    views = list(window_views(length, regime.streaming))
    times = count * (2 if regime.noisy_context else 1)
    frames = times * sum(len(seen) for seen, _ in views)
    counted = times * sum(chunks[-1] if chunks else len(seen) for seen, chunks in views)
    tokens = config.tokens_per_frame(height, width)
    hidden = config.dim * tokens * frames
    held = hidden + config.dim * (tokens * counted + 7 * frames + count * config.text_len)
    held += channels * height * width * counted
    # The first walk follows models; the second keeps two states of its own, and the curvatures of its queries.
    first = followed * min(PROBE_SCALARS, hidden)
    return 4 * (held + max(first, 2 * hidden + QUERIES * config.dim * config.head_dim))
