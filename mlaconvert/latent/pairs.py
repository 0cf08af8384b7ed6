"""Rotary pairs: their frequencies, and how far a constant can stand for their rotation in a window."""

from __future__ import annotations

import torch
from torch import Tensor

THETA = 10000.0  # Wan's


def highest_pairs(split: tuple[int, int, int], count: int) -> tuple[tuple[int, int], ...]:
    """The `count` highest-frequency pairs, shared over the axes as Wan shares a head: VideoMLA's (6, 5, 5) of 16."""
    share = (count - 2 * (count // 3), count // 3, count // 3)
    offsets = (0, split[0], split[0] + split[1])
    return tuple((offset + j, 1) for offset, n in zip(offsets, share, strict=True) for j in range(n))


def mean_rotation(split: tuple[int, int, int], *, queries: Tensor, keys: Tensor, height: int, width: int) -> Tensor:
    """E[e^{i theta (m - n)}] of every pair, complex128 [pairs], over query positions m and key positions n.

    `queries` and `keys` are the positions in time of frames of `height` x `width` tokens; all (query, key) pairs count
    alike.
    """
    rows, columns = torch.arange(height), torch.arange(width)
    means = []
    for freq, q, k in zip(
        frequencies(split).split(split), (queries, rows, columns), (keys, rows, columns), strict=True
    ):
        means.append(_phase(freq, q).mean(0) * _phase(freq, k).mean(0).conj())
    return torch.cat(means)


def _phase(freq: Tensor, positions: Tensor) -> Tensor:
    angle = positions.double()[:, None] * freq
    return torch.polar(torch.ones_like(angle), angle)


def frequencies(split: tuple[int, int, int], theta: float = THETA) -> Tensor:
    """Radians per position of every pair, float64 [sum(split)]; `theta` is their base."""
    return torch.cat([theta ** -(torch.arange(n, dtype=torch.float64) / max(n, 1)) for n in split])
