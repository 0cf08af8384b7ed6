"""Work in parts whose matrices stay small."""

from __future__ import annotations

from collections.abc import Iterator

PIECE_SCALARS = 2**21  # of one matrix of a part of the work


def token_slices(start: int, end: int, width: int) -> Iterator[slice]:
    """Slices of tokens `start` to `end` whose matrices of `width` scalars a token stay small."""
    step = max(1, PIECE_SCALARS // width)
    for first in range(start, end, step):
        yield slice(first, min(end, first + step))
