"""Singular values of weight matrices, the energy that a rank holds, and effective ranks.

The energy of a matrix is the sum of its squared singular values. All maths is float64, whatever the source's
dtype. Spectra of full matrices come from a Gram matrix: several times faster than an SVD, and Gram matrices
of stacked matrices simply add. The price is that singular values below 1e-8 of the largest drown in rounding,
which moves no energy that one could see.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from mlaconvert.errors import ConfigError
from mlaconvert.latent import lapack, plain
from mlaconvert.latent.matrices import add_gram, mirror

_GRAM_ROWS = 1024  # rows of the float64 copy: 42 MB at width 5120


def gram(*matrices: Tensor) -> Tensor:
    """Gram matrix of the matrices stacked on top of each other: the sum of W^T W.

    `matrices` are [rows, D] each, of any floating dtype; returns [D, D] float64 on their device. Only a
    bounded block of rows is copied to float64 at a time.
    """
    width = matrices[0].shape[1]
    total = torch.zeros(width, width, dtype=torch.float64, device=matrices[0].device)
    for matrix in matrices:
        for start in range(0, len(matrix), _GRAM_ROWS):
            add_gram(total, matrix[start : start + _GRAM_ROWS].to(torch.float64))
    return mirror(total)


def singular_values_from_gram(gram_matrix: Tensor) -> Tensor:
    """Singular values of W from W^T W: [D, D] float64 -> [D] float64, descending. The matrix is overwritten on a CPU.

    If W has fewer rows than D, the values beyond them are zero to rounding.
    """
    found = (lapack if gram_matrix.device.type == "cpu" else plain).eigenvalues(gram_matrix)
    return found.clamp_min_(0).sqrt_().flip(0)  # rounding can leave a zero eigenvalue slightly negative


def product_singular_values(up: Tensor, down: Tensor) -> Tensor:
    """Singular values of up @ down without forming it: [m, r], [r, D] -> [min(m, r, D)] float64, descending.

    With thin QRs up = Q1 R1 and down^T = Q2 R2, the product is Q1 (R1 R2^T) Q2^T, so the small matrix in the
    middle has its singular values.
    """
    left = torch.linalg.qr(up.to(torch.float64), mode="r").R
    right = torch.linalg.qr(down.to(torch.float64).T, mode="r").R
    values: Tensor = torch.linalg.svdvals(left @ right.T)
    return values


def check_threshold(threshold: float) -> None:
    """Raise ConfigError unless `threshold` is a share of the energy between 0 and 1, both excluded."""
    if not 0 < threshold < 1:
        raise ConfigError(f"threshold is {threshold}: give a share of energy between 0 and 1, such as 0.99")


def cumulative_energy(singular_values: Tensor) -> Tensor:
    """Share of the energy held by the leading 1, 2, ... directions: [n] descending -> [n], rising to 1.

    A zero matrix has no energy to lose: all its shares are 1.
    """
    energy = singular_values.to(torch.float64).square().cumsum(0)
    return energy / energy[-1] if energy[-1] > 0 else torch.ones_like(energy)


def effective_rank(singular_values: Tensor, threshold: float = 0.99) -> int:
    """Smallest rank that holds `threshold` of the energy, from [n] descending singular values.

    It is 0 for a zero matrix. Raises ConfigError unless 0 < threshold < 1.
    """
    check_threshold(threshold)
    if not singular_values.any():
        return 0
    return int((cumulative_energy(singular_values) < threshold).sum()) + 1


def energy_at(singular_values: Tensor, rank: int) -> float:
    """Share of the energy in the leading `rank` of the [n] descending singular values.

    Raises ConfigError unless 0 <= rank <= n.
    """
    return 1.0 - _tail_share(singular_values, rank)


def relative_error(singular_values: Tensor, rank: int) -> float:
    """Relative Frobenius error of the best approximation of that rank (Eckart-Young): sqrt(1 - energy).

    Raises ConfigError unless 0 <= rank <= n.
    """
    return math.sqrt(_tail_share(singular_values, rank))


def _tail_share(singular_values: Tensor, rank: int) -> float:
    # Summing the tail itself keeps small errors exact; 1 - energy would cancel.
    if not 0 <= rank <= len(singular_values):
        raise ConfigError(f"rank {rank} does not fit a matrix of {len(singular_values)} singular values")
    energy = singular_values.to(torch.float64).square()
    total = float(energy.sum())
    return float(energy[rank:].sum()) / total if total > 0 else 0.0


@functools.cache
def random_rank_baseline(out_dim: int, kv_lora_rank: int, in_dim: int, threshold: float = 0.99, seed: int = 0) -> int:
    """Effective rank of up @ down for Gaussian factors: [out_dim, kv_lora_rank] and [kv_lora_rank, in_dim].

    A learned pair of factors that reaches this rank has shown no more than random factors do. One seeded draw
    on the CPU, so the same on every machine; at these sizes draws differ by about one. Raises ConfigError
    unless 0 < threshold < 1.
    """
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(out_dim, kv_lora_rank, dtype=torch.float64, generator=generator)
    down = torch.randn(kv_lora_rank, in_dim, dtype=torch.float64, generator=generator)
    return effective_rank(product_singular_values(up, down), threshold)
