"""What `lapack` does, by torch alone: on any device, but all eigenvectors are made where some are wanted.

As there, symmetric matrices are float64, and only what is on and above their diagonal is read.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GRAM_BLOCK = 384  # rows of a Gram matrix that are made at once


def eigenvalues(matrix: Tensor) -> Tensor:
    """All eigenvalues, ascending [n], of a symmetric matrix [n, n]. Raises torch.linalg.LinAlgError."""
    return torch.linalg.eigvalsh(matrix, UPLO="U")


def leading_eigenvectors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The largest `rank` eigenvalues, ascending, and their vectors [n, rank], of a symmetric matrix [n, n].

    Raises torch.linalg.LinAlgError.
    """
    values, vectors = torch.linalg.eigh(matrix, UPLO="U")
    return values[len(matrix) - rank :], vectors[:, len(matrix) - rank :]


def solve_positive(matrix: Tensor, rows: Tensor) -> Tensor:
    """X [m, n] of X M = rows for a positive definite M [n, n], in the place of `rows`.

    Raises torch.linalg.LinAlgError when M is not positive definite.
    """
    root = torch.linalg.cholesky(matrix.mT).mT  # it reads what is below the diagonal
    return rows.copy_(torch.cholesky_solve(rows.mT, root, upper=True).mT)


def add_gram(total: Tensor, rows: Tensor) -> None:
    """Add `rows`^T `rows` to `total` [n, n]; `rows` are [m, n]. What is below the diagonal is left."""
    for start in range(0, len(total), _GRAM_BLOCK):
        block = total[start : start + _GRAM_BLOCK, start:]
        square = block[:, : len(block)]
        below = square.tril(-1)
        block.addmm_(rows[:, start : start + _GRAM_BLOCK].mT, rows[:, start:])
        square.triu_().add_(below)
