"""LAPACK by its steps, and torch in its place, against numpy's own eigenvalues and vectors."""

from __future__ import annotations

import ctypes
import importlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.linalg import LinAlgError
from scipy.linalg import cython_blas, cython_lapack

from mlaconvert.latent import lapack
from mlaconvert.latent.lapack import LINALG_ERRORS, add_gram, backend, eigenvalues, leading_eigenvectors, solve_positive


@pytest.fixture
def look_again() -> Iterator[None]:
    """SciPy is asked anew in this test, and after it."""
    lapack._routines.cache_clear()
    yield
    lapack._routines.cache_clear()


@pytest.fixture(autouse=True, params=["scipy", "torch"])
def chosen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test with the routines of either; SciPy's are there in the environment of the tests."""
    assert lapack._routines() is not None
    if request.param == "torch":
        monkeypatch.setattr(lapack, "_routines", lambda: None)
    assert backend() == request.param


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
    with pytest.raises(ValueError, match="contiguous float64"):
        leading_eigenvectors(symmetric(6)[::2, ::2], 1)
    right = torch.ones(2, 6, dtype=torch.float64)
    for matrix, rows in (
        (symmetric(6), right.float()),
        (symmetric(6), right.T.contiguous().T),
        (symmetric(12)[::2, ::2], right),
    ):
        with pytest.raises(ValueError, match="contiguous float64"):
            solve_positive(matrix, rows)


def test_the_benchmarks_floor_does_not_time_this_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a slower solver here would raise the floor that it is held against."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    monkeypatch.delitem(sys.modules, "scale", raising=False)

    def fail(*arguments: object) -> None:
        raise AssertionError("the floor times mlaconvert's own solver")

    for name in ("eigenvalues", "leading_eigenvectors", "_call"):
        monkeypatch.setattr(lapack, name, fail)
    found = importlib.import_module("scale").eigenproblems(48, (7, 24))
    assert found.keys() == {"analyze", "convert --init svd"}
    assert all(seconds > 0 for seconds in found.values())


def test_only_what_is_on_and_above_the_diagonal_is_read() -> None:
    whole = symmetric(7)
    upper = whole.triu() + 99 * torch.ones_like(whole).tril(-1)
    assert np.allclose(eigenvalues(upper.clone()), np.linalg.eigvalsh(whole.numpy()), rtol=1e-12)
    values, vectors = leading_eigenvectors(upper.clone(), 3)
    assert float((whole @ vectors - vectors * values).norm()) < 1e-10
    right = torch.ones(2, 7, dtype=torch.float64)
    assert np.allclose(solve_positive(upper.clone(), right.clone()) @ whole, right)


def test_what_callers_catch() -> None:
    assert set(LINALG_ERRORS) == {np.linalg.LinAlgError, torch.linalg.LinAlgError}  # type: ignore[attr-defined]


def capsule(signature: bytes) -> Any:
    """A pointer that must not be called, offered with a signature as Cython writes it; the bytes must live on."""
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return new(1, signature, None)


EXPECTED = b"void (char *, int *, __pyx_d *, int *, __pyx_d *, __pyx_d *, __pyx_d *, __pyx_d *, int *, int *)"
WIDE, SINGLE = EXPECTED.replace(b"int *", b"int64_t *"), EXPECTED.replace(b"_d *", b"_s *")
FEWER = b"void (char *, int *, __pyx_d *, int *, __pyx_d *, __pyx_d *, __pyx_d *, __pyx_d *, int *)"


@pytest.mark.usefixtures("look_again")
@pytest.mark.parametrize("chosen", ["scipy"], indirect=True)
@pytest.mark.parametrize("signature", [None, WIDE, FEWER, SINGLE], ids=["missing", "64-bit", "fewer", "single"])
def test_torch_does_the_work_where_scipys_routines_are_not_as_expected(
    signature: bytes | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    offered = dict(cython_lapack.__pyx_capi__)
    if signature is None:
        del offered["dsytrd"]
    else:
        offered["dsytrd"] = capsule(signature)
    monkeypatch.setattr(cython_lapack, "__pyx_capi__", offered)
    with caplog.at_level(logging.DEBUG, "mlaconvert"):
        values = eigenvalues(symmetric(7))
    assert np.allclose(values, np.linalg.eigvalsh(symmetric(7).numpy()))
    assert backend() == "torch"
    assert len(caplog.messages) == 1  # chosen once
    assert ("dsytrd" if signature is None else signature.decode()) in caplog.messages[0]


@pytest.mark.usefixtures("look_again")
@pytest.mark.parametrize("chosen", ["scipy"], indirect=True)
def test_torch_does_the_work_where_scipy_offers_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(cython_blas, "__pyx_capi__")
    total = torch.zeros(3, 3, dtype=torch.float64)
    add_gram(total, torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64))
    assert backend() == "torch"
    assert total.tolist() == [[1, 2, 3], [0, 4, 6], [0, 0, 9]]
