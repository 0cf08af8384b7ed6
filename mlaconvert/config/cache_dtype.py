"""Dtypes that a running model's cache can be narrowed to, without training or calibration, and the bytes they take.

"fp8" is a plain cast. The integers are KIVI's (arXiv 2402.02750): asymmetric, in small groups that each keep a zero and
a step in float16; keys are grouped along tokens, channel by channel, and everything else along a token's channels.
"""

from __future__ import annotations

from math import prod
from typing import Literal, NamedTuple

from mlaconvert.config.packing import run_bytes

CacheDtype = Literal["fp8", "int8", "int4", "int3", "int2"]
CACHE_DTYPES: tuple[CacheDtype, ...] = ("fp8", "int8", "int4", "int3", "int2")
INTEGER_BITS: dict[str, int] = {"int8": 8, "int4": 4, "int3": 3, "int2": 2}
MOST_IN_GROUP = 32
_GROUP_BYTES = 4  # a zero and a step in float16


class CachedPart(NamedTuple):
    """Numbers that a token caches, in a trailing shape `width`, and along what they are grouped.

    `along` "tokens" groups each channel over the tokens of a frame, "channels" each token over its channels; None is
    never narrowed.
    """

    width: tuple[int, ...]
    along: Literal["tokens", "channels"] | None

    def lines(self, tokens: int) -> tuple[int, int]:
        """How many lines of groups a frame of `tokens` tokens has, and how many numbers stand in each."""
        channels = prod(self.width)
        return (channels, tokens) if self.along == "tokens" else (tokens, channels)

    def frame_bytes(self, dtype: CacheDtype, tokens: int, itemsize: int) -> int:
        """Bytes of a frame of `tokens` tokens; a number that is not narrowed takes `itemsize`."""
        lines, length = self.lines(tokens)
        if self.along is None:
            return lines * length * itemsize
        if dtype == "fp8":
            return lines * length
        return lines * (run_bytes([(INTEGER_BITS[dtype], length)]) + _GROUP_BYTES * groups(length)[0])


def groups(count: int) -> tuple[int, int]:
    """How many groups `count` numbers fall into, and the numbers in each; the last group may have fewer.

    No group has more than `MOST_IN_GROUP`, there are no more of them than that takes, and they are as even as can be.
    """
    number = -(-count // MOST_IN_GROUP)
    return number, -(-count // number)
