"""Products and eigenvectors of large float64 matrices, with bounded memory."""

from __future__ import annotations

import torch
from torch import Tensor

from mlaconvert.latent import lapack, plain

_MIRROR_BLOCK = 384  # rows that are mirrored at once


def affine(weight: Tensor, bias: Tensor) -> Tensor:
    """[.., D] and [..] -> [.., D + 1], acting on [x; 1]."""
    return torch.cat((weight, bias.unsqueeze(-1)), -1)


def leading_directions(gram: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Orthonormal eigenvectors [D, rank] of the largest eigenvalues of `gram`, these [rank], and their trace's share.

    They descend, and none is below zero. `gram` is overwritten on a CPU. Raises LinAlgError when it is not finite.
    """
    trace = float(gram.trace())
    if gram.device.type == "cpu":
        values, vectors = lapack.leading_eigenvectors(gram.contiguous(), rank)
    else:
        values, vectors = plain.leading_eigenvectors(gram, rank)
    values = values.clamp_min(0)
    kept = float(values.sum()) / trace if trace > 0 else 1.0
    return vectors.flip(1).contiguous(), values.flip(0), min(1.0, kept)


def add_gram(total: Tensor, rows: Tensor) -> None:
    """Add `rows`^T `rows` to `total` [D, D], only on and above the diagonal; `mirror` does the rest."""
    (lapack if _in_one_thread(total) else plain).add_gram(total, rows)


def mirror(total: Tensor) -> Tensor:
    """Copy what lies above the diagonal of `total` [D, D] below it, in place."""
    for start in range(0, len(total), _MIRROR_BLOCK):
        end = start + _MIRROR_BLOCK
        block = total[start:end, start:end]
        block.copy_(block.triu() + block.triu(1).mT)
        total[end:, start:end] = total[start:end, end:].mT
    return total


def row_gram(heads: Tensor) -> Tensor:
    """Each head's rows times themselves, [H, d, n] -> [H, d, d]."""
    if not _in_one_thread(heads):
        return heads @ heads.mT
    total = heads.new_zeros(*heads.shape[:2], heads.shape[1])
    for made, rows in zip(total, heads, strict=True):
        lapack.add_gram(made, rows.mT)
        mirror(made)
    return total


def product(left: Tensor, right: Tensor) -> Tensor:
    """`left` @ `right`."""
    return torch.from_numpy(left.numpy() @ right.numpy()) if _in_one_thread(left) else left @ right


def _in_one_thread(tensor: Tensor) -> bool:
    """Whether OpenBLAS, which numpy and SciPy bring, is worth its while.

    Its float64 products are faster than torch's on some processors, and it multiplies a matrix with itself in half
    the time; torch has more threads.
    """
    return tensor.device.type == "cpu" and torch.get_num_threads() == 1
