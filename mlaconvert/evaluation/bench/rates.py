"""The device's own speed at plain matrix products and attention."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from mlaconvert.config.geometry import WanConfig


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second of a large square matrix product: the best of five after one to warm up."""
    size = 8192 if device.type == "cuda" else 768
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / _fastest(lambda: a @ b, device)


def attention_rate(config: WanConfig, queries: int, keys: int, device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second of the fused attention kernel alone, at the dense side's shape."""
    q, k, v = (
        torch.randn(1, config.num_heads, count, config.head_dim, device=device, dtype=dtype)
        for count in (queries, keys, keys)
    )
    seconds = _fastest(lambda: F.scaled_dot_product_attention(q, k, v), device)
    return 4 * queries * keys * config.dim / seconds


def _fastest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of five runs, after one to warm up."""
    times = []
    for _ in range(6):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
