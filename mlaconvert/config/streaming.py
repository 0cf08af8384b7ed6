"""How a causal model sees time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from mlaconvert.config.parsing import MOST_FRAMES, STRICT, check_positive
from mlaconvert.errors import ConfigError

# How published few-step students are sampled: timesteps, and how far they are warped towards noise.
FEW_STEPS = (1000.0, 750.0, 500.0, 250.0)
SHIFT = 5.0


@dataclass(frozen=True, kw_only=True)
class StreamingConfig:
    """How a causal model sees time. Frames are latent frames.

    `window_frames` counts every frame that a query can see: sink, cached, and those of its own chunk. In a
    window, frame positions are counted from the sink (`window`), so that rotary phases stay in the trained
    range; `absolute` counts from the start of the video, as Self-Forcing does.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    chunk_frames: int = 3
    window_frames: int = 7
    sink_frames: int = 1
    positions: Literal["window", "absolute"] = "window"

    def __post_init__(self) -> None:
        check_positive(self, "chunk_frames", "window_frames", limit=MOST_FRAMES)
        if self.sink_frames < 0:
            raise ConfigError(f"sink_frames is {self.sink_frames}: give 0 or more")
        if self.window_frames < self.sink_frames + self.chunk_frames:
            raise ConfigError(
                f"window_frames is {self.window_frames}: it must hold the sink ({self.sink_frames}) and one chunk "
                f"({self.chunk_frames}), so give at least {self.sink_frames + self.chunk_frames}"
            )
