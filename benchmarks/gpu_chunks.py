"""Latent sides against dense in back-to-back chunks.

Each is timed in pairs with the dense model, dense first in every other pair; a ratio is the median of dense time / own
over the pairs. Windows are full. Peaks of memory are those of one model, its cache and a chunk.
"""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

import torch
from gpu_case import IN_BITS, PAPER, QUANTISED, WHOLE, WINDOWS, Case, Emit

from mlaconvert.config.geometry import WanConfig, default_video
from mlaconvert.evaluation.bench.flops import forward_flops, seconds_by_part
from mlaconvert.evaluation.bench.memory import cache_bytes
from mlaconvert.evaluation.bench.run import full_window_mode
from mlaconvert.evaluation.bench.runner import ResolvedSetting, Runner, allocated, release
from mlaconvert.model.attention.cost import flops_per_byte
from mlaconvert.model.attention.kernel import AttentionMode


def chunks(case: Case, emit: Emit, *, window: int, compiled: bool = False) -> None:
    """Every latent side against dense, and the modes of attention of those that have several."""
    resolved, configs = case.resolved(window), case.sides(window)
    sides = [WHOLE, IN_BITS, QUANTISED, case.narrow(5), PAPER]
    modes = [case.narrow(5), PAPER]
    if compiled and case.small:  # compiling takes a CPU as long as it does for any size
        sides = sides[:1]
    elif not compiled:
        sides += [case.narrow(6), case.narrow(4)]
        modes += [case.narrow(6), case.narrow(4)] if window == WINDOWS[0] else []
    dense = _Timed("dense", configs["dense"], resolved, compiled=compiled)
    alone = [dense.runner.chunk() for _ in range(case.rounds)]
    profiled = window == WINDOWS[0] and not compiled
    _emit(emit, "dense, dense", dense.figures(alone), dense if profiled else None)
    for name in sides:
        side = _Timed(name, configs[name], resolved, compiled=compiled)
        _emit(emit, f"{name}, auto", _paired(dense, side, case.rounds), side if profiled else None)
        for mode in ("expanded", "absorbed") if name in modes and not compiled else ():
            side.set_mode(mode)
            emit(f"{name}, {mode}", _paired(dense, side, case.rounds))
        del side
        release()


class _Timed:
    """A runner whose window is full, and what was measured on the way there."""

    def __init__(self, name: str, config: WanConfig, resolved: ResolvedSetting, *, compiled: bool) -> None:
        self.held = allocated(resolved.device)  # by others
        self.config, self.resolved = config, resolved
        # Every length of the window would be compiled, too, so that happens when it is full.
        self.runner = Runner(name, config, resolved, compiled=False)
        self.first: float | None = None
        self.compile_seconds: float | None = None
        self.runner.begin()
        self.runner.chunk()  # to warm up
        if not compiled:
            self.runner.begin()
            self.first = self.runner.chunk()
        for _ in range(resolved.filling - 1):
            self.runner.chunk()
        if compiled:
            self.runner.model.compile_blocks()
            self.compile_seconds = self.runner.chunk() + self.runner.chunk()
        self.peak_bytes = self._peak()

    def set_mode(self, mode: AttentionMode) -> None:
        """Have latent attention compute in another way from the next chunk on."""
        self.resolved = dataclasses.replace(
            self.resolved, setting=dataclasses.replace(self.resolved.setting, attention=mode)
        )
        self.runner.model.attention_mode = mode
        self.peak_bytes = self._peak()

    def _peak(self) -> int | None:
        """Of a chunk, which also warms up."""
        if self.resolved.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.resolved.device)
        self.runner.chunk()
        if self.resolved.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.resolved.device) - self.held
        return None

    def figures(self, times: list[float]) -> dict[str, Any]:
        """Times in seconds, memory in bytes, FLOPs of a chunk (two a multiplication and addition)."""
        config, resolved = self.config, self.resolved
        flops = forward_flops(
            config,
            queries=resolved.chunk_tokens,
            keys=resolved.window_tokens,
            mode=resolved.setting.attention,
            itemsize=resolved.dtype.itemsize,
            flops_per_byte=flops_per_byte(resolved.device),
        )
        cache, text = cache_bytes(resolved, config)
        seconds = statistics.median(times)
        return {
            "mode": "dense" if config.mla is None else full_window_mode(resolved, config),
            "chunk": seconds,
            "chunk_spread": [min(times), max(times)],
            "frames_per_second": resolved.streaming.chunk_frames * default_video(config).frame_stride / seconds,
            "first_chunk": self.first,
            "compile_seconds": self.compile_seconds,
            "flops": (resolved.setting.steps + 1) * sum(flops.values()),
            "cache_bytes": cache,
            "text_bytes": text,
            "weight_bytes": self.runner.weight_bytes,
            "peak_bytes": self.peak_bytes,
        }


def _paired(dense: _Timed, side: _Timed, rounds: int) -> dict[str, Any]:
    """The side's figures from chunks back to back with dense ones."""
    times: dict[_Timed, list[float]] = {dense: [], side: []}
    for turn in range(rounds):
        for timed in (dense, side) if turn % 2 == 0 else (side, dense):
            times[timed].append(timed.runner.chunk())
    ratios = [theirs / own for theirs, own in zip(times[dense], times[side], strict=True)]
    found = {"speedup": statistics.median(ratios), "speedup_spread": [min(ratios), max(ratios)]}
    return side.figures(times[side]) | found | {"dense_chunk": statistics.median(times[dense])}


def _emit(emit: Emit, name: str, found: dict[str, Any], profiled: _Timed | None) -> None:
    """A side's figures, and once more with seconds of a chunk by part."""
    emit(name, found)
    if profiled is not None:
        runner = profiled.runner
        parts = seconds_by_part(runner.model, runner.chunk, profiled.resolved.device, compiled=False)
        emit(name, found | {"profile": parts})
