"""What many tests use: builders of weights, and how results are compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

SaveFolder = Callable[..., Path]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius norm of the difference, relative to `expected`."""
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def randomize(module: torch.nn.Module, seed: int = 0) -> None:
    """Random weights of a trained model's size: norms near one, biases and modulations that matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * (0.3 if p.ndim == 1 else 0.15))
            if "norm" in name and name.endswith("weight"):
                p.add_(1)
