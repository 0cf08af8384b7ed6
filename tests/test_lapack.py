"""LAPACK by its steps against numpy's own eigenvalues and vectors."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mlaconvert.latent import lapack
from mlaconvert.latent.lapack import LinAlgError, add_gram, eigenvalues, leading_eigenvectors, solve_positive


def symmetric(size: int, condition: float = 1e3) -> torch.Tensor:
    g = torch.Generator().manual_seed(size)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=g, dtype=torch.float64))
    return (basis * torch.logspace(0, float(np.log10(condition)), size, dtype=torch.float64)) @ basis.T


@pytest.mark.parametrize("size", [1, 2, 3, 7, 150])
def test_eigenvalues_are_numpys(size: int) -> None:
    matrix = symmetric(size)
    expected = np.linalg.eigvalsh(matrix.numpy())
    assert np.abs(eigenvalues(matrix.clone()).numpy() - expected).max() < 1e-12 * expected.max()


@pytest.mark.parametrize(("size", "rank"), [(1, 1), (2, 2), (7, 3), (150, 1), (150, 60), (150, 150)])
def test_leading_vectors_are_vectors_of_the_largest_values(size: int, rank: int) -> None:
    matrix = symmetric(size)
    values, vectors = leading_eigenvectors(matrix.clone(), rank)
    assert vectors.shape == (size, rank)
    assert np.allclose(values, np.linalg.eigvalsh(matrix.numpy())[size - rank :], rtol=1e-11)
    assert float((matrix @ vectors - vectors * values).norm()) < 1e-10
    assert float((vectors.T @ vectors - torch.eye(rank)).norm()) < 1e-10


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (1, 11), (5, 1), (3, 7), (29, 11)])
def test_gram_matrices_above_the_diagonal(rows: int, size: int) -> None:
    g = torch.Generator().manual_seed(rows)
    given = torch.randn(rows, size, generator=g, dtype=torch.float64)
    before = torch.randn(size, size, generator=g, dtype=torch.float64)
    expected = before.numpy() + np.triu(given.numpy().T @ given.numpy())
    wide = torch.zeros(rows, size + 2, dtype=torch.float64)
    wide[:, :size] = given
    for layout in (given, given.T.contiguous().T, torch.stack((given, given), -1)[..., 0], wide[:, :size]):
        total = before.clone()
        add_gram(total, layout)
        assert np.abs(total.numpy() - expected).max() < 1e-12
    total = before.clone()
    add_gram(total, given[:1].expand(4, -1))
    assert np.abs(total.numpy() - before.numpy() - 4 * np.triu(np.outer(given[0], given[0]))).max() < 1e-12
    with pytest.raises(ValueError, match="float64"):
        add_gram(before, given.float())


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 7), (29, 11)])
def test_solving_in_place(rows: int, size: int) -> None:
    matrix = symmetric(size)
    right = torch.randn(rows, size, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    expected = right @ torch.linalg.inv(matrix)
    given = right.clone()
    found = solve_positive(matrix.clone(), given)
    assert found.data_ptr() == given.data_ptr()
    assert float((found - expected).norm() / expected.norm()) < 1e-10
    with pytest.raises(LinAlgError):
        solve_positive(-matrix, right)


def test_what_lapack_cannot_take() -> None:
    broken = symmetric(5)
    broken[2, 1] = broken[1, 2] = torch.nan
    with pytest.raises(LinAlgError, match="not finite"):
        eigenvalues(broken.clone())
    with pytest.raises(LinAlgError, match="not finite"):
        leading_eigenvectors(broken, 2)
    with pytest.raises(ValueError, match="contiguous float64"):
        eigenvalues(symmetric(5).float())
    with pytest.raises(ValueError, match="contiguous float64"):
        eigenvalues(symmetric(6)[::2, ::2])


def test_the_benchmarks_floor_does_not_time_this_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a slower solver here would raise the floor that it is held against."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    monkeypatch.delitem(sys.modules, "scale", raising=False)

    def fail(*arguments: object) -> None:
        raise AssertionError("the floor times mlaconvert's own solver")

    for name in ("eigenvalues", "leading_eigenvectors", "_call"):
        monkeypatch.setattr(lapack, name, fail)
    found = importlib.import_module("scale").eigenproblems(48, (7, 24))
    assert found.keys() == {"analyze", "convert --init svd"}
    assert all(seconds > 0 for seconds in found.values())
