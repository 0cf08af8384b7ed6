"""One side of a benchmark as it runs: a model with random weights and its rollout, on the machine that is measured."""

from __future__ import annotations

import gc
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.evaluation.bench.setting import BenchSetting, random_model
from mlaconvert.model.cache import LatentCache
from mlaconvert.model.rates import synchronize
from mlaconvert.model.rollout import CacheUse, LatentSize, rollout
from mlaconvert.model.schedule import Sampler


@dataclass(frozen=True, kw_only=True)
class ResolvedSetting:
    """What all sides run on, and with: the setting with every default filled in.

    `height` and `width` are latent pixels; `context` [batch, text_len, text_dim] is the prompt of all.
    """

    setting: BenchSetting
    device: torch.device
    dtype: torch.dtype
    streaming: StreamingConfig
    height: int
    width: int
    frame_tokens: int
    context: Tensor

    @property
    def chunk_tokens(self) -> int:
        """Queries of a chunk."""
        return self.streaming.chunk_frames * self.frame_tokens

    @property
    def window_tokens(self) -> int:
        """Keys that a chunk with a full window sees."""
        return self.streaming.window_frames * self.frame_tokens

    @property
    def filling(self) -> int:
        """Chunks until the window is full, and one more."""
        return -(-self.streaming.window_frames // self.streaming.chunk_frames) + 1

    def cache(self, config: WanConfig, batch: int) -> LatentCache:
        """An empty cache for `batch` videos."""
        return LatentCache(
            config,
            batch=batch,
            height=self.height,
            width=self.width,
            streaming=self.streaming,
            dtype=self.dtype,
            device=self.device,
            keeps_text=self.setting.keeps_text,
        )


class Runner:
    """A model and its rollout, one chunk at a time; `first` and `times` are seconds of its first and timed chunks."""

    def __init__(self, name: str, config: WanConfig, resolved: ResolvedSetting, *, compiled: bool) -> None:
        self.name, self.config, self.resolved = name, config, resolved
        before = allocated(resolved.device)
        self.model = random_model(config, resolved.device, resolved.dtype)
        parameters = sum(p.nbytes for p in self.model.parameters())
        self.weight_bytes = allocated(resolved.device) - before if resolved.device.type == "cuda" else parameters
        self.model.attention_mode = resolved.setting.attention
        if compiled:
            self.model.compile_blocks()
        self.video: Iterator[Tensor] = iter(())
        self.times: list[float] = []
        self.first = 0.0

    def begin(self) -> None:
        """A new video."""
        resolved, setting = self.resolved, self.resolved.setting
        self.video = rollout(
            self.model,
            resolved.context,
            size=LatentSize(
                frames=resolved.streaming.chunk_frames * 10**6, height=resolved.height, width=resolved.width
            ),
            cache=CacheUse(streaming=resolved.streaming, keeps_text=setting.keeps_text, slice_size=setting.slice_size),
            sampler=Sampler.few_step(tuple(1000 * (1 - i / setting.steps) for i in range(setting.steps))),
        )

    def chunk(self) -> float:
        """Seconds of the next chunk."""
        synchronize(self.resolved.device)
        start = time.perf_counter()
        next(self.video)
        synchronize(self.resolved.device)
        return time.perf_counter() - start


def device_name(device: torch.device) -> str:
    """What people call the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    return f"CPU {name}"


def allocated(device: torch.device) -> int:
    """Bytes that are allocated on a GPU; 0 on a CPU, which does not count them."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def release() -> None:
    """Give back what nothing holds any longer."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def no_remarks() -> Iterator[None]:
    """What torch's profiler writes to the terminal from outside Python when it starts and stops goes nowhere."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
