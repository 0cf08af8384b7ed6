"""Clips that a teacher generates itself, where there is no data set."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mlaconvert.clips.folder import Clips
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.model.rollout import rollout
from mlaconvert.model.schedule import Sampler
from mlaconvert.model.wan import WanModel


def own_clips(
    model: WanModel,
    count: int,
    *,
    frames: int,
    height: int,
    width: int,
    sampler: Sampler,
    seed: int,
    streaming: StreamingConfig,
    batch: int,
    on_step: Callable[[], None] | None = None,
) -> Clips:
    """`count` clips that the model makes of an empty caption, `batch` at a time, in float32 on the CPU.

    The arguments are `rollout`'s; `seed` is the first clip's.
    """
    context, parts = torch.zeros(count, 1, model.config.text_dim), []
    for first, some in zip(range(0, count, batch), context.split(batch), strict=True):
        chunks = rollout(
            model,
            some,
            frames=frames,
            height=height,
            width=width,
            sampler=sampler,
            seed=seed + first,
            streaming=streaming,
            on_step=on_step,
        )
        parts.append(torch.cat([chunk.float().cpu() for chunk in chunks], 2))
    return Clips(torch.cat(parts), context)
