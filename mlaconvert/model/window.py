"""Who sees whom: sink, recent frames and chunks of a causal model, and where in time they stand.

The one place that knows the rule of the window; the cache, masks, calibration and healing ask here. A chunk sees
itself, the sink (the first frames of the video), and the most recent frames, as many as fill the window. All frames are
latent frames.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.errors import InputError


def default_chunks(frames: int, streaming: StreamingConfig | None) -> list[int]:
    """Frames of each chunk of a clip; the last one may be shorter."""
    size = (streaming or StreamingConfig()).chunk_frames
    return [min(size, frames - start) for start in range(0, frames, size)]


def seen_frames(end: int, streaming: StreamingConfig) -> list[int]:
    """The frames that a chunk sees which ends before frame `end`, ascending; its own are the last of them."""
    sink, recent = streaming.sink_frames, streaming.window_frames - streaming.sink_frames
    return [*range(min(sink, end)), *range(max(end - recent, sink), end)]


def frame_positions(frames: Sequence[int], end: int, streaming: StreamingConfig) -> list[int]:
    """Positions in time, for the rotary embedding, of `frames` that a chunk sees which ends before frame `end`."""
    shift = 0 if streaming.positions == "absolute" else max(end - streaming.window_frames, 0)
    return [frame if frame < streaming.sink_frames else frame - shift for frame in frames]


def positions_matter(streaming: StreamingConfig) -> bool:
    """Whether counting from the start of the video differs from counting within the window: only beside a sink."""
    return streaming.sink_frames > 0


def slot(frame: int, streaming: StreamingConfig) -> int:
    """The slot of a cache of `window_frames` that holds `frame`: the sink's own, then a ring of the recent frames."""
    sink = streaming.sink_frames
    return frame if frame < sink else sink + (frame - sink) % (streaming.window_frames - sink)


def check_chunk(start: int, frames: int, streaming: StreamingConfig) -> None:
    """Raise InputError for a chunk of `frames` frames at frame `start` that the window cannot hold beside its sink."""
    sink, window = streaming.sink_frames, streaming.window_frames
    if (start > 0 and frames > window - sink) or frames > window:
        raise InputError(
            f"a chunk of {frames} frames does not fit a window of {window} with a sink of {sink}; "
            f"give window_frames of at least {sink + frames}"
        )


def chunk_mask(chunks: Sequence[int], streaming: StreamingConfig | None) -> Tensor:
    """Which frame sees which, bool [F, F], of a clip in chunks of `chunks` frames."""
    streaming, count = streaming or StreamingConfig(), sum(chunks)
    visible = torch.zeros(count, count, dtype=torch.bool)
    end = 0
    for size in chunks:
        end += size
        visible[end - size : end, seen_frames(end, streaming)] = True
    return visible


def window_views(frames: int, streaming: StreamingConfig | None) -> Iterator[tuple[list[int], tuple[int, ...] | None]]:
    """Frames and chunks of each window: what the newest chunk sees as a clip goes by; all at once without streaming."""
    if streaming is None:
        yield list(range(frames)), None
        return
    sink, end = streaming.sink_frames, 0
    for size in default_chunks(frames, streaming):
        end += size
        seen = seen_frames(end, streaming)
        if len(seen) == end:
            yield seen, tuple(default_chunks(end, streaming))
        else:
            older = default_chunks(len(seen) - sink - size, streaming)[::-1]
            yield seen, (*((sink,) if sink else ()), *older, size)


def full_window(streaming: StreamingConfig | None, frames: int) -> tuple[Tensor, Tensor]:
    """Positions of the newest chunk's frames and of all that it sees in a full window; without, all `frames` twice."""
    seen = torch.arange(streaming.window_frames if streaming else frames)
    return (seen[-streaming.chunk_frames :] if streaming else seen), seen
