"""The windows of a calibration: which (query, key) pairs attention forms, at which timesteps.

Streaming: for every chunk of a clip, the chunk at one of the sampler's timesteps attends to itself and to the clean
frames of its window, and the clean pass (timestep 0) to clean ones; a share of the windows, `noisy_past`, has an
independent noise level per chunk instead, as in training and in the validation loss. Only the newest chunk's queries
count. Where the present is exact, only its past is read from latents, and a window without one is left out.
Bidirectional: all frames at one noise level, a timestep of the sampler's and in a second window any other.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mlaconvert.clips.folder import BATCH, BATCH_TOKENS, Clips
from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.mla import Present
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.conversion.calibration.layer import batches_enough
from mlaconvert.conversion.calibration.refit import QUERIES
from mlaconvert.errors import ConfigError
from mlaconvert.model.schedule import Sampler, add_noise, warp
from mlaconvert.model.window import window_views

BATCH_SCALARS = 2**22  # of one activation of a batch
PROBE_SCALARS = 2**27  # of the probes' activations of one followed model


@dataclass(frozen=True, kw_only=True)
class Regime:
    """Which (query, key) pairs attention forms: the window, or None for a bidirectional model, and timesteps."""

    streaming: StreamingConfig | None
    timesteps: tuple[float, ...]
    noisy_past: float = 0.0
    present: Present = "latent"
    seed: int = 0

    @classmethod
    def of(
        cls,
        streaming: StreamingConfig | None,
        seed: int = 0,
        *,
        few_step: bool = True,
        noisy_past: float = 0.0,
        present: Present = "latent",
    ) -> Regime:
        """The sampler's timesteps: four of a few-step model or the shift-5 grid of eight levels, and the clean pass.

        A bidirectional model has the grid, and no clean pass.
        """
        grid = Sampler.many_step(8).timesteps
        steps = (*(Sampler.few_step().timesteps if few_step else grid), 0.0) if streaming else grid
        return cls(streaming=streaming, timesteps=steps, seed=seed, noisy_past=noisy_past, present=present)

    def check_frames(self, frames: int) -> None:
        """Raise ConfigError for clips of so many frames that no window of them has a past that latents are read for."""
        if self.present == "latent" or self.streaming is None:
            return
        chunk, window = self.streaming.chunk_frames, self.streaming.window_frames
        for what, length, longer in (("clips", frames, "longer clips"), ("windows", window, "more --window-frames")):
            if length <= chunk:
                raise ConfigError(
                    f"{what} of {length} latent frames are one chunk of {chunk}: nothing is past that latents could be "
                    f"read for; give {longer}, smaller --chunk-frames, or --present latent"
                )

    def to_json(self) -> dict[str, Any]:
        """Plain data, for config.json."""
        return {
            "streaming": dataclasses.asdict(self.streaming) if self.streaming else None,
            "timesteps": [round(t, 4) for t in self.timesteps],
            "noisy_past": self.noisy_past,
            "present": self.present,
            "seed": self.seed,
        }


@dataclass(kw_only=True)
class Losses:
    """Mean squared velocity errors by step of a conversion, the teacher's under "dense", on the same clips.

    A bidirectional model has no past, and all its losses are in `clean_past`.
    """

    clean_past: dict[str, float] = field(default_factory=dict)
    noisy_past: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Window:
    """A batch of windows as the model sees them; the queries of the last `queries` frames count."""

    latents: Tensor  # [B, C, F, H, W], noisy
    target: Tensor  # [B, C, queries, H, W], noise - data of the last frames
    timestep: Tensor  # [B, F]
    context: Tensor  # [B, T, text_dim]
    chunks: tuple[int, ...] | None
    queries: int

    @property
    def denoised(self) -> Tensor:
        """Which rows of the batch count, bool [B]: a clean pass writes the cache, its velocity is not used."""
        return self.timestep[:, -1] > 0


def windows(clips: Clips, regime: Regime, batch: int = BATCH) -> Iterator[Window]:
    """Every window of every clip, `batch` clips at a time; the rows of a batch take the timesteps in turn.

    The seed decides the noise, and which timestep is the first.
    """
    generator = torch.Generator().manual_seed(regime.seed)
    timesteps = torch.tensor(regime.timesteps)
    turn = regime.seed
    for part in clips.batches(batch):
        for frames, chunks in window_views(part.latents.shape[2], regime.streaming):
            if regime.present == "exact" and chunks is not None and len(chunks) == 1:
                continue  # without a past
            latents, sizes = part.latents[:, :, frames], chunks or (len(frames),)
            rows = torch.arange(turn, turn + len(latents))
            turn += len(latents)
            sampled = torch.zeros(len(latents), len(sizes))
            sampled[:, -1] = timesteps[rows % len(timesteps)] / 1000
            levels, noisy = [sampled], warp(torch.rand(sampled.shape, generator=generator))
            if chunks is None:
                levels.append(noisy)
            else:
                levels = [torch.where(_in_share(rows, regime)[:, None], noisy, sampled)]
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


def _in_share(rows: Tensor, regime: Regime) -> Tensor:
    """Which rows, by their number, have noisy pasts: the same share of every timestep's, evenly spread."""
    count = len(regime.timesteps)
    before = (rows // count).double() * regime.noisy_past + (rows % count) / count + 1e-9  # but for rounding
    return (before + regime.noisy_past).floor() > before.floor()


def batch_size(clips: Clips, config: WanConfig) -> int:
    """How many clips go through a model at once."""
    return batch_of(clips.latents.shape[1:], config)


def batch_of(shape: Sequence[int], config: WanConfig) -> int:
    """How many clips [C, F, H, W] do."""
    tokens = shape[1] * config.tokens_per_frame(*shape[2:])
    return max(1, min(BATCH, BATCH_TOKENS // tokens, BATCH_SCALARS // (tokens * config.dim)))


def scratch_bytes(config: WanConfig, shape: Sequence[int], regime: Regime, *, followed: int) -> int:
    """About how many bytes of the disk a calibration on a CPU takes for the activations of clips [N, C, F, H, W].

    `followed` is the number of layers between which scalars are shared by what they do to the velocity.
    """
    count, channels, length, height, width = shape
    views = list(window_views(length, regime.streaming))
    times = count * (1 if regime.streaming else 2)
    frames = times * sum(len(seen) for seen, _ in views)
    counted = times * sum(chunks[-1] if chunks else len(seen) for seen, chunks in views)
    tokens = config.tokens_per_frame(height, width)
    hidden = config.dim * tokens * frames
    held = hidden + config.dim * (tokens * counted + 7 * frames + count * config.text_len)
    held += channels * height * width * counted
    # The first walk follows models; the second keeps two states of its own, and the curvatures of its queries.
    largest = tokens * max(len(seen) for seen, _ in views) * batch_of(shape[1:], config)
    probed = config.dim * largest * batches_enough(largest, sys.maxsize)  # at most, of each followed model
    first = followed * min(PROBE_SCALARS, hidden, probed)
    refits = QUERIES * config.dim * config.head_dim
    if regime.present == "exact":
        refits = 2 * config.dim * tokens * counted  # keys and values of the newest chunks
    return 4 * (held + max(first, 2 * hidden + refits))
