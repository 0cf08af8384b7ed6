"""What several of these tests are made of."""

from __future__ import annotations

import pytest

from mlaconvert.config.streaming import StreamingConfig

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
TOLERANCE = 1e-5
STREAMING = StreamingConfig(chunk_frames=2, window_frames=5, sink_frames=1)
