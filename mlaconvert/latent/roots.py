"""Square roots of covariances."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

DAMPING = 1e-6  # of the mean eigenvalue, added before a covariance is inverted


class Root(Protocol):
    """A square root R of a covariance C = R R^T."""

    def apply(self, rows: Tensor) -> Tensor:
        """`rows` [.., D] times R."""

    def left(self, columns: Tensor) -> Tensor:
        """R times `columns` [D, n]."""

    def solve(self, rows: Tensor) -> Tensor:
        """`rows` [.., D] times R^-1."""


@dataclass(frozen=True)
class TriangularRoot:
    """Cholesky's root of any covariance."""

    lower: Tensor  # [D, D]

    def apply(self, rows: Tensor) -> Tensor:
        """`rows` [.., D] times the root."""
        return rows @ self.lower

    def left(self, columns: Tensor) -> Tensor:
        """The root times `columns` [D, n]."""
        return self.lower @ columns

    def solve(self, rows: Tensor) -> Tensor:
        """`rows` [.., D] times its inverse."""
        return torch.linalg.solve_triangular(self.lower, rows, upper=False, left=False)


@dataclass(frozen=True)
class DiagonalRoot:
    """A root of diag(scale)^2 + rows^T rows for a few rows: scale times a symmetric matrix that is nearly the identity.

    With rows / scale = U S Q^T, that matrix is I + Q (sqrt(1 + S^2) - 1) Q^T. Products with it cost next to nothing.
    """

    scale: Tensor  # [D]
    directions: Tensor  # [D, T], Q
    stretch: Tensor  # [T], sqrt(1 + S^2)

    @classmethod
    def of(cls, diagonal: Tensor, rows: Tensor) -> DiagonalRoot:
        """The root of diag(`diagonal`) + `rows`^T `rows`, damped as `cholesky` does: [D] and [T, D]."""
        damping = DAMPING * (diagonal.mean() + rows.square().sum() / len(diagonal))
        scale = (diagonal + damping).sqrt()
        _, spread, directions = torch.linalg.svd(rows / scale, full_matrices=False)
        return cls(scale, directions.mT, (1 + spread.square()).sqrt())

    def apply(self, rows: Tensor) -> Tensor:
        """`rows` [.., D] times the root."""
        scaled = rows * self.scale
        return scaled.add_(((scaled @ self.directions) * (self.stretch - 1)) @ self.directions.mT)

    def left(self, columns: Tensor) -> Tensor:
        """The root times `columns` [D, n]."""
        stretched = columns + self.directions @ ((self.stretch - 1)[:, None] * (self.directions.mT @ columns))
        return self.scale[:, None] * stretched

    def solve(self, rows: Tensor) -> Tensor:
        """`rows` [.., D] times its inverse."""
        return (rows + ((rows @ self.directions) * (1 / self.stretch - 1)) @ self.directions.mT) / self.scale


def cholesky(covariance: Tensor) -> Tensor:
    """Lower triangular root of a covariance, damped so that it can be inverted."""
    damped = covariance.clone()
    damped.diagonal().add_(DAMPING * covariance.diagonal().mean())
    return torch.linalg.cholesky(damped)


def symmetric_root(matrix: Tensor) -> Tensor:
    """The symmetric root of positive semidefinite matrices [.., n, n], damped to stay invertible."""
    values, vectors = torch.linalg.eigh(matrix)
    floor = values[..., -1:].clamp_min(1e-30) * 1e-12
    return (vectors * values.clamp_min(0).add(floor).sqrt().unsqueeze(-2)) @ vectors.mT
