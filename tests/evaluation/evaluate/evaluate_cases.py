"""What several of these tests are made of."""

from __future__ import annotations

from mlaconvert.config.streaming import StreamingConfig

STREAMING = StreamingConfig(chunk_frames=2, window_frames=5, sink_frames=1)
