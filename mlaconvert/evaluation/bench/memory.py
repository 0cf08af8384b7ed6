"""What a side takes in memory: its cache, the peak of a chunk, and the largest batch that fits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import accumulate
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from mlaconvert.config.geometry import WanConfig
from mlaconvert.evaluation.bench.runner import ResolvedSetting, Runner, allocated, no_remarks, release
from mlaconvert.model.rates import synchronize


def cache_bytes(resolved: ResolvedSetting, config: WanConfig) -> tuple[int, int]:
    """Bytes of the cache, as the device's allocator counts them, and of the prompt's keys and values."""
    before = allocated(resolved.device)
    cache = resolved.cache(config, resolved.setting.batch)
    measured = allocated(resolved.device) - before if resolved.device.type == "cuda" else cache.nbytes
    text = 2 * config.num_layers * resolved.setting.batch * config.text_len * config.dim * resolved.dtype.itemsize
    return measured, text if resolved.setting.keeps_text else 0


def peak_bytes(runner: Runner) -> int:
    """Peak memory of a video until its window is full: weights, cache, prompt and what passes need, of one side alone.

    On a GPU as its allocator counts it, on a CPU as torch's profiler does. Afterwards the runner's window is full.
    """
    device = runner.resolved.device
    runner.begin()
    if device.type != "cuda":
        return runner.weight_bytes + profiled_peak(lambda: [runner.chunk() for _ in range(runner.resolved.filling)])
    before = allocated(device) - runner.weight_bytes
    torch.cuda.reset_peak_memory_stats(device)
    for _ in range(runner.resolved.filling):
        runner.chunk()
    return torch.cuda.max_memory_allocated(device) - before


def profiled_peak(work: Callable[[], Any]) -> int:
    """The most bytes of a CPU's memory that `work` took and did not yet give back, as torch's profiler sees them."""
    with no_remarks(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    results: Any = profiler.profiler
    changes = [(e.start_ns(), e.nbytes()) for e in results.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(size for _, size in sorted(changes, key=itemgetter(0))), default=0)


def largest_batches(resolved: ResolvedSetting, config: WanConfig) -> tuple[int | None, int | None]:
    """The largest batches that fit in one pass and one video at a time; a CPU is not filled up to find out."""
    if resolved.device.type != "cuda" or not resolved.setting.search_batch:
        return None, None
    release()
    runner = Runner("", config, resolved, compiled=False)  # every batch size would compile anew
    return largest(partial(batch_fits, runner, False)), largest(partial(batch_fits, runner, True))


def batch_fits(runner: Runner, sliced: bool, batch: int) -> bool:
    """Whether caches for `batch` videos and a pass with a full window fit."""
    caches = []
    size = 1 if sliced else batch
    config, resolved = runner.config, runner.resolved
    try:
        caches = [resolved.cache(config, size) for _ in range(batch // size)]
        caches[0].seek(resolved.streaming.window_frames)
        shape = (size, config.out_dim, resolved.streaming.chunk_frames, resolved.height, resolved.width)
        with torch.no_grad():
            if resolved.setting.keeps_text and sliced:  # every video's prompt, not only the first's
                texts = [_text(resolved, config) for _ in caches[1:]]
            runner.model(
                torch.zeros(shape, device=resolved.device),
                torch.zeros(size, device=resolved.device),
                resolved.context[:1].expand(size, -1, -1),
                cache=caches[0],
                start_frame=resolved.streaming.window_frames,
            )
        synchronize(resolved.device)
    except torch.cuda.OutOfMemoryError:
        return False
    else:
        return True
    finally:
        texts = []
        caches.clear()
        del texts
        release()


def _text(resolved: ResolvedSetting, config: WanConfig) -> Tensor:
    """As much memory as one prompt's keys and values take."""
    return torch.empty(2, config.num_layers, config.text_len, config.dim, device=resolved.device, dtype=resolved.dtype)


def largest(fits: Callable[[int], bool]) -> int:
    """The largest number that fits, by doubling and halving; 0 when none does."""
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
