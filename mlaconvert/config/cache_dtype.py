"""Dtypes that a running model's cache can be narrowed to, without training or calibration, and the bytes they take.

"fp8" is a plain cast. The integers are KIVI's (arXiv 2402.02750): asymmetric, in small groups that each keep a zero and
a step in float16; keys are grouped along tokens, channel by channel, and everything else along a token's channels.
"qvg" is Quant-VideoGen's (2602.02958): tokens that are alike share a centroid, found by k-means in each head, and what
is left of them is coded along the head's channels, with centroids, zeros and steps in FP8.
"""

from __future__ import annotations

from math import prod
from typing import Literal, NamedTuple

from mlaconvert.config.packing import run_bytes

CacheDtype = Literal["fp8", "int8", "int4", "int3", "int2", "qvg4", "qvg3", "qvg2", "qvg2-2stages"]
CACHE_DTYPES: tuple[CacheDtype, ...] = ("fp8", "int8", "int4", "int3", "int2", "qvg4", "qvg3", "qvg2", "qvg2-2stages")
MOST_IN_GROUP = 32
MOST_IN_HEAD_GROUP = 64  # as Quant-VideoGen has it
WHOLE_GROUPS = 48 * MOST_IN_GROUP  # tokens, about a frame at 480 x 832
_TOKENS_A_CENTROID = 12
_MOST_CENTROIDS = 256  # what a byte can name


class Coding(NamedTuple):
    """Asymmetric integers of `bits`, of what `stages` of k-means leave of the numbers; 0 of the numbers themselves."""

    bits: int
    stages: int = 0

    def groups(self, length: int) -> tuple[int, int]:
        """`groups` of a line of `length` numbers."""
        return groups(length, MOST_IN_HEAD_GROUP if self.stages else MOST_IN_GROUP)

    def line_bytes(self, length: int) -> int:
        """Bytes of a line of `length` codes, and of a zero and a step for each of its groups."""
        return run_bytes([(self.bits, length)]) + (2 if self.stages else 4) * self.groups(length)[0]


CODINGS: dict[CacheDtype, Coding] = {
    "int8": Coding(8),
    "int4": Coding(4),
    "int3": Coding(3),
    "int2": Coding(2),
    "qvg4": Coding(4, stages=1),
    "qvg3": Coding(3, stages=1),
    "qvg2": Coding(2, stages=1),
    "qvg2-2stages": Coding(2, stages=2),
}


class CachedPart(NamedTuple):
    """Numbers that a token caches, in a trailing shape `width`, and along what they are grouped.

    `along` "tokens" groups each channel over the tokens of a frame, "channels" each token over its channels, "heads"
    each token over the channels of a head, the last of `width`; None is never narrowed.
    """

    width: tuple[int, ...]
    along: Literal["tokens", "channels", "heads"] | None

    def grouped(self, dtype: CacheDtype) -> CachedPart:
        """Along what `dtype` groups it: a cast groups nothing, and k-means goes by heads."""
        if self.along is None:
            return self
        if dtype == "fp8":
            return self._replace(along="channels")
        return self._replace(along="heads") if CODINGS[dtype].stages else self

    def lines(self, tokens: int) -> tuple[int, int]:
        """How many lines of groups a frame of `tokens` tokens has, and how many numbers stand in each."""
        channels = prod(self.width)
        if self.along == "heads":
            return tokens * channels // self.width[-1], self.width[-1]
        return (channels, tokens) if self.along == "tokens" else (tokens, channels)

    def frame_bytes(self, dtype: CacheDtype, tokens: int, itemsize: int) -> int:
        """Bytes of a frame of `tokens` tokens; a number that is not narrowed takes `itemsize`."""
        lines, length = self.grouped(dtype).lines(tokens)
        if self.along is None:
            return lines * length * itemsize
        if dtype == "fp8":
            return lines * length
        coding, (count, bits) = CODINGS[dtype], centroids(tokens)
        smoothed = lines // tokens * (count * length + run_bytes([(bits, tokens)]))
        return lines * coding.line_bytes(length) + coding.stages * smoothed


def groups(count: int, most: int = MOST_IN_GROUP) -> tuple[int, int]:
    """How many groups `count` numbers fall into, and the numbers in each; the last group may have fewer.

    No group has more than `most`, there are no more of them than that takes, and they are as even as can be.
    """
    number = -(-count // most)
    return number, -(-count // number)


def centroids(tokens: int) -> tuple[int, int]:
    """How many centroids the `tokens` of a frame share in each head, and the bits that name one of them."""
    count = min(-(-tokens // _TOKENS_A_CENTROID), _MOST_CENTROIDS)
    return count, max(1, (count - 1).bit_length())
