"""Large symmetric matrices on a CPU: BLAS and LAPACK step by step, in place, the interpreter's lock let go.

SciPy's own functions hold the lock, so no other thread could read, hash or write a file meanwhile. They also offer all
eigenvectors, or some by a slow method; here only those that are wanted are made and turned back.

The routines are those that SciPy offers to compiled code. Where one is missing, or takes other arguments (64-bit
integers, say), `plain` does all of the work, for the same arguments and with the same errors; `backend` tells which.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.linalg import LinAlgError
from torch import Tensor

from mlaconvert.latent import plain

Array = np.ndarray[Any, Any]
Found = TypeVar("Found")
# What a matrix that cannot be decomposed raises: numpy's, SciPy's and here, or torch's.
LINALG_ERRORS: tuple[type[Exception], ...] = (LinAlgError, torch.linalg.LinAlgError)  # type: ignore[attr-defined]
# Arguments of each routine, all by reference: characters, ints (logicals too) and doubles.
_ARGUMENTS = {
    "scipy.linalg.cython_blas": {"dsyrk": "cciiddiddi"},
    "scipy.linalg.cython_lapack": {
        "dormtr": "ccciididdidii",
        "dposv": "ciididii",
        "dstedc": "cidddidiiii",
        "dstemr": "cciddddiiiddiiiidiiii",
        "dsterf": "iddi",
        "dsytrd": "cididdddii",
    },
}
_SHARE = 0.25  # of all eigenvectors; to find more of them, it is faster to find all


def backend() -> Literal["scipy", "torch"]:
    """Whose routines do the work in this process: SciPy's, or torch's where SciPy does not offer all of them."""
    return "torch" if _routines() is None else "scipy"


def eigenvalues(matrix: Tensor) -> Tensor:
    """All eigenvalues, ascending, of a symmetric matrix [n, n] float64, which may be overwritten.

    Raises LinAlgError when it is not finite, and ValueError when it is not float64 and contiguous.
    """
    _check(matrix)
    if backend() == "torch":
        return _plainly(plain.eigenvalues, matrix)
    diagonal, beside, _ = _tridiagonal(matrix.numpy())
    _call("dsterf", len(diagonal), diagonal, beside)
    return torch.from_numpy(diagonal)


def leading_eigenvectors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The largest `rank` eigenvalues, ascending, and their vectors [n, rank], of a symmetric matrix [n, n] float64.

    The matrix may be overwritten. Raises LinAlgError when it is not finite or nothing is found, and ValueError when it
    is not float64 and contiguous.
    """
    _check(matrix)
    if backend() == "torch":
        return _plainly(plain.leading_eigenvectors, matrix, rank)
    reflectors, size = matrix.numpy(), len(matrix)
    diagonal, beside, scales = _tridiagonal(reflectors)
    find = _all_of_tridiagonal if rank > _SHARE * size else _leading_of_tridiagonal
    values, vectors = find(diagonal, beside, rank)
    work = np.empty(max(1, 64 * rank))
    _call("dormtr", b"L", b"L", b"N", size, rank, reflectors, size, scales, vectors, size, work, len(work))
    return torch.from_numpy(values), torch.from_numpy(vectors).mT


def solve_positive(matrix: Tensor, rows: Tensor) -> Tensor:
    """X [m, n] of X M = rows for a positive definite M [n, n], float64; on a CPU it replaces `rows`.

    There the matrix may be overwritten too. Raises LinAlgError when M is not positive definite, and ValueError when
    one of the two is not float64 and contiguous.
    """
    if matrix.device.type != "cpu":
        return torch.linalg.solve(matrix, rows, left=False)
    _check(matrix)
    _check(rows)
    if backend() == "torch":
        return _plainly(plain.solve_positive, matrix, rows)
    _call("dposv", b"L", len(matrix), len(rows), matrix.numpy(), len(matrix), rows.numpy(), len(matrix))
    return rows


def add_gram(total: Tensor, rows: Tensor) -> None:
    """Add `rows`^T `rows` to `total` [n, n], both float64; `rows` are [m, n]. What is below the diagonal is left.

    Raises ValueError when they are not float64, or the sum is not contiguous.
    """
    if not (rows.dtype == total.dtype == torch.float64 and total.is_contiguous()):
        raise ValueError(f"expected float64 matrices and a contiguous sum, not {rows.dtype} and {total.dtype}")
    if backend() == "torch":
        plain.add_gram(total, rows)
        return
    size, inner = len(total), len(rows)
    if rows.stride(1) == 1 and rows.stride(0) >= size:
        layout, stride = b"N", rows.stride(0)
    elif rows.stride(0) == 1 and rows.stride(1) >= inner:
        layout, stride = b"T", rows.stride(1)
    else:
        rows, layout, stride = rows.contiguous(), b"N", size
    # Above the diagonal for numpy is below it for BLAS.
    _run("dsyrk", b"L", layout, size, inner, 1.0, rows.numpy(), stride, 1.0, total.numpy(), size)


def _leading_of_tridiagonal(diagonal: Array, beside: Array, rank: int) -> tuple[Array, Array]:
    """The largest `rank` eigenvalues, ascending, and their vectors as rows [rank, n]: each on its own (MRRR)."""
    size = len(diagonal)
    values, vectors = np.empty(size), np.empty((rank, size))  # LAPACK's columns are numpy's rows
    found, supports = np.zeros(1, np.int32), np.empty(2 * rank, np.int32)
    work, whole = np.empty(18 * size), np.empty(10 * size, np.int32)
    _call(
        "dstemr", b"V", b"I", size, diagonal, np.append(beside, 0.0), 0.0, 0.0, size - rank + 1, size, found, values,
        vectors, size, rank, supports, 1, work, len(work), whole, len(whole),
    )  # fmt: skip
    if found[0] != rank:
        raise LinAlgError(f"{found[0]} of {rank} eigenvectors were found")
    return values[:rank], vectors


def _all_of_tridiagonal(diagonal: Array, beside: Array, rank: int) -> tuple[Array, Array]:
    """The same out of all of them, found together by divide and conquer: mostly matrix products."""
    size = len(diagonal)
    vectors, work, whole = np.empty((size, size)), np.empty(1 + size * (size + 4)), np.empty(5 * size + 3, np.int32)
    _call("dstedc", b"I", size, diagonal, beside, vectors, size, work, len(work), whole, len(whole))
    return diagonal[size - rank :], vectors[size - rank :]


def _tridiagonal(matrix: Array) -> tuple[Array, ...]:
    """Diagonal [n] and what is beside it [n - 1]; the reflectors that lead there replace the matrix, with scales."""
    size = len(matrix)
    diagonal, beside, scales = np.empty(size), np.empty(max(1, size - 1)), np.empty(max(1, size - 1))
    work = np.empty(64 * size)
    # A symmetric matrix has the same rows and columns, so the order of LAPACK is that of numpy.
    _call("dsytrd", b"L", size, matrix, size, diagonal, beside, scales, work, len(work))
    if not (np.isfinite(diagonal).all() and np.isfinite(beside[: size - 1]).all()):
        raise LinAlgError("the matrix is not finite")
    return diagonal, beside[: size - 1], scales


def _check(matrix: Tensor) -> None:
    """Raise ValueError for what LAPACK cannot take as it lies."""
    if matrix.dtype != torch.float64 or not matrix.is_contiguous():
        raise ValueError(f"expected a contiguous float64 matrix, not {matrix.dtype}")


def _plainly(function: Callable[..., Found], matrix: Tensor, *arguments: Any) -> Found:
    """What a function of `plain` makes of the matrix, with the errors of this module."""
    if not bool(matrix.triu().isfinite().all()):
        raise LinAlgError("the matrix is not finite")
    try:
        return function(matrix, *arguments)
    except LINALG_ERRORS as error:
        raise LinAlgError(str(error)) from None


def _call(name: str, *arguments: Any) -> None:
    """Call a routine of LAPACK; its last argument, the status, is added. Raises LinAlgError."""
    status = np.zeros(1, np.int32)
    _run(name, *arguments, status)
    if status[0]:
        raise LinAlgError(f"{name} ended with status {status[0]}")


def _run(name: str, *arguments: Any) -> None:
    """Call a routine; arguments go by reference, as Fortran takes them."""
    routines = _routines()
    assert routines is not None
    routines[name](*_boxes(*arguments))


def _boxes(*arguments: Any) -> Iterator[Any]:
    for value in arguments:
        if isinstance(value, np.ndarray):
            yield value.ctypes.data_as(ctypes.c_void_p)
        elif isinstance(value, bytes):
            yield ctypes.c_char_p(value)
        else:
            yield ctypes.byref(ctypes.c_double(value) if isinstance(value, float) else ctypes.c_int(value))


@cache
def _routines() -> Mapping[str, Callable[..., None]] | None:
    """The routines by name, out of what SciPy offers to compiled code; None where one is not there as expected."""
    try:
        return {
            name: _routine(importlib.import_module(module).__pyx_capi__[name], arguments)
            for module, routines in _ARGUMENTS.items()
            for name, arguments in routines.items()
        }
    except (ImportError, AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        logging.getLogger(__name__).debug("SciPy's BLAS and LAPACK are not there as expected (%s): torch's", reason)
        return None


def _routine(capsule: Any, arguments: str) -> Callable[..., None]:
    """What a capsule points to; a call lets go of the lock. Raises ValueError when it takes other arguments."""
    api = ctypes.pythonapi
    api.PyCapsule_GetName.restype, api.PyCapsule_GetName.argtypes = ctypes.c_char_p, [ctypes.py_object]
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    signature = api.PyCapsule_GetName(capsule)  # "void (char *, int *, ..._d *)"
    types = re.fullmatch(r"void \((.*)\)", signature.decode())
    kinds = {"char *": "c", "int *": "i"}
    found = [kinds.get(each, "d" if each.endswith("_d *") else "?") for each in types[1].split(", ")] if types else []
    if "".join(found) != arguments:
        raise ValueError(f"it is {signature.decode()}")
    prototype = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * len(arguments))
    made: Callable[..., None] = prototype(api.PyCapsule_GetPointer(capsule, signature))
    return made
