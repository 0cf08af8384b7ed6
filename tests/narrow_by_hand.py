"""What narrowed caches give back, in float64, line by line and number by number."""

from __future__ import annotations

from itertools import product

import numpy as np
import torch
from torch import Tensor

TOPS = {"int8": 255, "int4": 15, "int3": 7, "int2": 3}
STAGES = {"qvg4": 1, "qvg3": 1, "qvg2": 1, "qvg2-2stages": 2}

# What a byte of float8_e4m3fn stands for: a sign, four bits of exponent about 7, three of fraction; 127 is no number.
_FP8 = np.array([
    (1 + byte % 8 / 8) * 2.0 ** (byte // 8 - 7) if byte >= 8 else byte / 8 * 2.0**-6 for byte in range(127)
])  # fmt: skip


def fp8_by_hand(x: np.ndarray) -> np.ndarray:
    """The nearest of the finite numbers, the even one of two."""
    distance = np.abs(np.abs(x)[..., None] - _FP8)
    even = np.where(np.arange(127) % 2, 1e-12, 0)
    return np.sign(x) * _FP8[(distance + even * _FP8).argmin(-1)]


def lines_by_hand(lines: np.ndarray, dtype: str) -> np.ndarray:
    """KIVI's rounding of lines [n, length]."""
    top, out = TOPS[dtype], np.empty_like(lines)
    length = lines.shape[1]
    size = {35: 18, 42: 21, 37: 19, 6: 6}[length]
    for line, start in product(range(len(lines)), range(0, length, size)):
        group = lines[line, start : start + size]
        # By way of float32, as torch rounds a double.
        zero = np.float64(np.float16(np.float32(group.min())))
        step = np.float64(np.float16(np.float32((group.max() - group.min()) / top)))
        for i, number in enumerate(group):
            code = min(max(np.round((number - zero) / step), 0), top)
            out[line, start + i] = zero + code * step
    return out


def nearest_by_hand(tokens: np.ndarray, means: np.ndarray) -> np.ndarray:
    """Which of the means each token is nearest to."""
    return ((tokens[:, None] - means) ** 2).sum(-1).argmin(1)


def means_by_hand(tokens: np.ndarray) -> np.ndarray:
    """Lloyd's means of tokens [T, D]: a centroid for every twelve of them, at first the middle ones of even runs."""
    count = min(-(-len(tokens) // 12), 256)
    means = np.array([tokens[int((c + 0.5) * len(tokens) / count)] for c in range(count)])
    for _ in range(4):
        names = nearest_by_hand(tokens, means)
        for c in range(count):
            if (names == c).any():
                means[c] = tokens[names == c].mean(0)
    return means


def smoothed_by_hand(tokens: np.ndarray, dtype: str) -> np.ndarray:
    """Quant-VideoGen's rounding of a head's tokens [T, D]."""
    rest, given, top = tokens, np.zeros_like(tokens), TOPS["int" + dtype[3]]
    for _ in range(STAGES[dtype]):
        means = fp8_by_hand(means_by_hand(rest))
        chosen = means[nearest_by_hand(rest, means)]
        rest, given = rest - chosen, given + chosen
    width = tokens.shape[1]
    size = {14: 14, 70: 35}[width]
    for token, start in product(range(len(tokens)), range(0, width, size)):
        group = rest[token, start : start + size]
        zero, step = fp8_by_hand(group.min()), fp8_by_hand(max((group.max() - group.min()) / top, 2.0**-9))
        for i, number in enumerate(group):
            given[token, start + i] += zero + min(max(np.round((number - zero) / step), 0), top) * step
    return given


def narrow_by_hand(x: Tensor, dtype: str, along: str | None, tokens: int) -> Tensor:
    """What the cache gives back of [B, f * tokens, ..., D]."""
    flat = x.double().flatten(2).numpy()
    out, width = flat.copy(), x.shape[-1]
    for b, start in product(range(flat.shape[0]), range(0, flat.shape[1], tokens)):
        frame = flat[b, start : start + tokens]
        if dtype in STAGES and along:
            heads = [smoothed_by_hand(frame[:, i : i + width], dtype) for i in range(0, frame.shape[1], width)]
            frame = np.concatenate(heads, axis=1)
        elif dtype == "fp8" and along:
            frame = fp8_by_hand(frame)
        elif along:
            frame = lines_by_hand(frame.T, dtype).T if along == "tokens" else lines_by_hand(frame, dtype)
        out[b, start : start + tokens] = frame
    return torch.from_numpy(out).view(x.shape)
