"""Large symmetric matrices on a CPU: BLAS and LAPACK step by step, in place, the interpreter's lock let go.

SciPy's own functions hold the lock, so no other thread could read, hash or write a file meanwhile. They also offer all
eigenvectors, or some by a slow method; here only those that are wanted are made and turned back.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from scipy.linalg import LinAlgError, cython_blas, cython_lapack
from torch import Tensor

Array = np.ndarray[Any, Any]
_SHARE = 0.25  # of all eigenvectors; to find more of them, it is faster to find all


def eigenvalues(matrix: Tensor) -> Tensor:
    """All eigenvalues, ascending, of a symmetric matrix [n, n] float64, which is overwritten. Raises LinAlgError."""
    diagonal, beside, _ = _tridiagonal(matrix.numpy())
    _call("dsterf", len(diagonal), diagonal, beside)
    return torch.from_numpy(diagonal)


def leading_eigenvectors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The largest `rank` eigenvalues, ascending, and their vectors [n, rank], of a symmetric matrix [n, n] float64.

    The matrix is overwritten. Raises LinAlgError when it is not finite or nothing is found.
    """
    reflectors, size = matrix.numpy(), len(matrix)
    diagonal, beside, scales = _tridiagonal(reflectors)
    find = _all_of_tridiagonal if rank > _SHARE * size else _leading_of_tridiagonal
    values, vectors = find(diagonal, beside, rank)
    work = np.empty(max(1, 64 * rank))
    _call("dormtr", b"L", b"L", b"N", size, rank, reflectors, size, scales, vectors, size, work, len(work))
    return torch.from_numpy(values), torch.from_numpy(vectors).mT


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


def solve_positive(matrix: Tensor, rows: Tensor) -> Tensor:
    """X [m, n] of X M = rows for a positive definite M [n, n], float64; both are overwritten on a CPU.

    Raises LinAlgError when M is not positive definite.
    """
    if matrix.device.type != "cpu":
        found: Tensor = torch.linalg.solve(matrix, rows, left=False)
        return found
    made = rows.numpy()
    if not (made.flags.c_contiguous and made.dtype == np.float64 and matrix.is_contiguous()):
        raise ValueError(f"expected contiguous float64 matrices, not {rows.dtype}")
    _call("dposv", b"L", len(matrix), len(rows), matrix.numpy(), len(matrix), made, len(matrix))
    return rows


def _tridiagonal(matrix: Array) -> tuple[Array, ...]:
    """Diagonal [n] and what is beside it [n - 1]; the reflectors that lead there replace the matrix, with scales."""
    if matrix.dtype != np.float64 or not matrix.flags.c_contiguous:
        raise ValueError(f"expected a contiguous float64 matrix, not {matrix.dtype}")
    size = len(matrix)
    diagonal, beside, scales = np.empty(size), np.empty(max(1, size - 1)), np.empty(max(1, size - 1))
    work = np.empty(64 * size)
    # A symmetric matrix has the same rows and columns, so the order of LAPACK is that of numpy.
    _call("dsytrd", b"L", size, matrix, size, diagonal, beside, scales, work, len(work))
    if not (np.isfinite(diagonal).all() and np.isfinite(beside[: size - 1]).all()):
        raise LinAlgError("the matrix is not finite")
    return diagonal, beside[: size - 1], scales


def add_gram(total: Tensor, rows: Tensor) -> None:
    """Add `rows`^T `rows` to `total` [n, n], both float64; `rows` are [m, n]. What is below the diagonal is left."""
    if not (rows.dtype == total.dtype == torch.float64 and total.is_contiguous()):
        raise ValueError(f"expected float64 matrices and a contiguous sum, not {rows.dtype} and {total.dtype}")
    size, inner = len(total), len(rows)
    if rows.stride(1) == 1 and rows.stride(0) >= size:
        layout, stride = b"N", rows.stride(0)
    elif rows.stride(0) == 1 and rows.stride(1) >= inner:
        layout, stride = b"T", rows.stride(1)
    else:
        rows, layout, stride = rows.contiguous(), b"N", size
    product = _routine(cython_blas, "dsyrk")
    # Above the diagonal for numpy is below it for BLAS.
    product(*_boxes(b"L", layout, size, inner, 1.0, rows.numpy(), stride, 1.0, total.numpy(), size))


@cache
def _routine(module: Any, name: str) -> Any:
    """The routine of that name, out of what SciPy offers to compiled code; a call lets go of the lock."""
    capsule, api = module.__pyx_capi__[name], ctypes.pythonapi
    api.PyCapsule_GetName.restype, api.PyCapsule_GetName.argtypes = ctypes.c_char_p, [ctypes.py_object]
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    signature = api.PyCapsule_GetName(capsule)
    kinds = [ctypes.c_void_p] * (signature.count(b",") + 1)
    return ctypes.CFUNCTYPE(None, *kinds)(api.PyCapsule_GetPointer(capsule, signature))


def _call(name: str, *arguments: Any) -> None:
    """Call a routine of LAPACK; its last argument, the status, is added. Raises LinAlgError."""
    status = ctypes.c_int()
    _routine(cython_lapack, name)(*_boxes(*arguments), ctypes.byref(status))
    if status.value:
        raise LinAlgError(f"{name} ended with status {status.value}")


def _boxes(*arguments: Any) -> Iterator[Any]:
    """Arguments by reference, as Fortran takes them."""
    for value in arguments:
        if isinstance(value, np.ndarray):
            yield value.ctypes.data_as(ctypes.c_void_p)
        elif isinstance(value, bytes):
            yield ctypes.c_char_p(value)
        else:
            yield ctypes.byref(ctypes.c_double(value) if isinstance(value, float) else ctypes.c_int(value))
