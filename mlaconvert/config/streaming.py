"""How a causal model sees time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from mlaconvert.config.parsing import STRICT, Frames, check_fields
from mlaconvert.errors import ConfigError

# How published few-step students are sampled: timesteps, and how far they are warped towards noise.
FEW_STEPS = (1000.0, 750.0, 500.0, 250.0)
SHIFT = 5.0

Positions = Literal["window", "absolute"]


@dataclass(frozen=True, kw_only=True)
class StreamingConfig:
    """How a causal model sees time. Frames are latent frames. Raises ConfigError naming the field."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    chunk_frames: Frames = 3
    """Frames that are made together and see one another."""
    window_frames: Frames = 7
    """Every frame that a query can see: the sink, cached ones, and those of its own chunk."""
    sink_frames: Annotated[int, Field(ge=0)] = 1
    """The first frames of a video, which never leave the window; 0 for none."""
    positions: Positions = "window"
    """Where a frame's position is counted from: the sink ("window"), so that rotary phases stay in the trained range,
    or the start of the video ("absolute"), as Self-Forcing does."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.window_frames < self.sink_frames + self.chunk_frames:
            raise ConfigError(
                f"window_frames is {self.window_frames}: it must hold the sink ({self.sink_frames}) and one chunk "
                f"({self.chunk_frames}), so give at least {self.sink_frames + self.chunk_frames}"
            )
