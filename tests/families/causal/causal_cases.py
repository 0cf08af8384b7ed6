"""What several of these tests are made of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from mlaconvert.config.streaming import StreamingConfig

State = dict[str, torch.Tensor]
SaveFolder = Callable[..., Path]
CAUSAL = {"_class_name": "CausalWanModel"}
ASSUMED = "assumed, as no file or option states it: "


def sees(chunk: int, window: int, sink: int, positions: str = "absolute") -> StreamingConfig:
    return StreamingConfig(chunk_frames=chunk, window_frames=window, sink_frames=sink, positions=positions)  # type: ignore[arg-type]
