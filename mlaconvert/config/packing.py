"""How codes of a few bits lie in bytes, and how many bytes that takes.

A code of 7 bits is a part of 4, one of 2 and one of 1. Parts of the same width lie side by side, the widest first, and
each width fills up its last byte.
"""

from __future__ import annotations

from collections.abc import Sequence

PART_BITS = (8, 4, 2, 1)


def parts_of(bits: int) -> list[tuple[int, int]]:
    """The widths of a code's parts, the widest first, and where in the code each begins; the widest begins at 0."""
    return [(width, bits & ~(2 * width - 1)) for width in PART_BITS if bits & width]


def packed_length(count: int, width: int) -> int:
    """Bytes of `count` parts of `width` bits each."""
    return -(-count * width // 8)


def packed_bytes(bits: Sequence[int]) -> int:
    """Bytes of codes of so many bits each."""
    return run_bytes([(b, 1) for b in bits])


def run_bytes(runs: Sequence[tuple[int, int]]) -> int:
    """`packed_bytes` of (bits, count), which may be any number."""
    return sum(packed_length(sum(count for bits, count in runs if bits & width), width) for width in PART_BITS)
