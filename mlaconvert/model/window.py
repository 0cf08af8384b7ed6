"""Who sees whom: sink, recent frames and chunks of a causal model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mlaconvert.config.streaming import StreamingConfig


def window_views(frames: int, streaming: StreamingConfig | None) -> Iterator[tuple[list[int], tuple[int, ...] | None]]:
    """Frames and chunks of each window: what the newest chunk sees as a clip goes by."""
    if streaming is None:
        yield list(range(frames)), None
        return
    sink, window = streaming.sink_frames, streaming.window_frames
    end = 0
    for size in default_chunks(frames, streaming):
        end += size
        if end <= window:
            yield list(range(end)), tuple(default_chunks(end, streaming))
            continue
        recent = window - sink - size
        seen = [*range(sink), *range(end - size - recent, end)]
        older = default_chunks(recent, streaming)[::-1]
        yield seen, (*((sink,) if sink else ()), *older, size)


def default_chunks(frames: int, streaming: StreamingConfig | None) -> list[int]:
    """Frames of each chunk of a clip; the last one may be shorter."""
    size = (streaming or StreamingConfig()).chunk_frames
    return [min(size, frames - start) for start in range(0, frames, size)]


def chunk_mask(chunks: Sequence[int], streaming: StreamingConfig | None) -> Tensor:
    """Which frame sees which, bool [F, F]: its own chunk, the sink, and the most recent frames of the window."""
    streaming = streaming or StreamingConfig()
    end = torch.repeat_interleave(torch.tensor(chunks).cumsum(0), torch.tensor(chunks))[:, None]
    frame = torch.arange(len(end))
    oldest = end - (streaming.window_frames - streaming.sink_frames)
    return (frame < end) & ((frame < streaming.sink_frames) | (frame >= oldest))
