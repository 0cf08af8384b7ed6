"""A cache that is narrowed while a model runs, without training: dense keys and values, or latents, in small groups.

KIVI (arXiv 2402.02750) groups keys along tokens, because some of their channels are large in every token, and values
along channels. Quant-VideoGen (2602.02958) subtracts what tokens have in common, by k-means in one or more stages, and
groups the rest along the channels of a head. Neither groups nor clusters reach beyond a frame, so a masked pass over a
clip and a stream of chunks see the same ones, whatever frames a window keeps. Keys are grouped before they turn.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mlaconvert.config.cache_dtype import CODINGS, CachedPart, CacheDtype, Coding, centroids
from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.packing import run_bytes
from mlaconvert.model.quantizer import join_codes, split_codes, straight_through, wide

_FP8 = torch.float8_e4m3fn
_FP8_MOST = torch.finfo(_FP8).max
_FP8_LEAST = 2.0**-9  # the smallest above zero
_HALF_MOST = torch.finfo(torch.float16).max
_HALF_LEAST = 2.0**-24
_LLOYD_STEPS = 4


class GroupQuantizer:
    """What one layer caches, narrowed: its `parts` in buffers that have a row for each frame."""

    def __init__(self, dtype: CacheDtype, parts: Sequence[CachedPart]) -> None:
        self.coding = CODINGS.get(dtype)  # none: a cast
        self.parts = tuple(part.grouped(dtype) for part in parts)

    @classmethod
    def of(cls, config: WanConfig, layer: int) -> GroupQuantizer | None:
        """That of a model's layer; None for a model without a `cache_dtype`."""
        return None if config.cache_dtype is None else cls(config.cache_dtype, config.cached_parts(layer))

    def rows(self, tokens: int, dtype: torch.dtype) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of a row of each buffer, for frames of `tokens` tokens; `dtype` is the cache's."""
        found: list[tuple[tuple[int, ...], torch.dtype]] = []
        for part in self.parts:
            lines, length = part.lines(tokens)
            if part.along is None:
                found.append(((lines, length), dtype))
            elif self.coding is None:
                found.append(((lines, length), torch.uint8))
            else:
                (bits, stages), number = self.coding, self.coding.groups(length)[0]
                found.append(((lines, run_bytes([(bits, length)])), torch.uint8))
                found.append(((lines, 2, number), torch.uint8 if stages else torch.float16))
                if stages:
                    heads, (count, named) = lines // tokens, centroids(tokens)
                    found.append(((stages, heads, count, length), torch.uint8))
                    found.append(((stages, heads, run_bytes([(named, tokens)])), torch.uint8))
        return found

    def pack(self, tokens: int, cached: Sequence[Tensor]) -> list[Tensor]:
        """The rows [B, f, ...] of f frames of `tokens` tokens of what a layer caches, [B, f * tokens, ...] each."""
        made: list[Tensor] = []
        for part, x in zip(self.parts, cached, strict=True):
            frames = x.detach().flatten(2).unflatten(1, (-1, tokens))
            lines = frames.mT if part.along == "tokens" else frames
            if part.along is None:
                made.append(lines)
            elif self.coding is None:
                made.append(_to_fp8(lines))
            elif self.coding.stages:
                heads = frames.to(wide(x.dtype)).unflatten(-1, (-1, part.width[-1])).transpose(2, 3)
                rest, *clusters = _subtract_centroids(heads, self.coding.stages)
                made += [*_encode(rest.flatten(2, 3), self.coding), *clusters]
            else:
                made += _encode(lines, self.coding)
        return made

    def unpack(self, tokens: int, rows: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """What rows [B, F, ...] stand for, in `dtype`: the parts [B, F * tokens, ...], none of them a view of a row."""
        left, made = iter(rows), []
        for part in self.parts:
            length = part.lines(tokens)[1]
            lines = next(left)
            if part.along is None:
                lines = lines.to(dtype, copy=True)
            elif self.coding is None:
                lines = lines.view(_FP8).to(dtype)
            elif self.coding.stages:
                rest = _decode(lines, next(left), length, self.coding, wide(dtype)).unflatten(2, (-1, tokens))
                heads = _add_centroids(rest, next(left), next(left))
                lines = heads.transpose(2, 3).flatten(3).to(dtype)
            else:
                lines = _decode(lines, next(left), length, self.coding, dtype)
            frames = lines.mT if part.along == "tokens" else lines
            made.append(frames.flatten(1, 2).unflatten(-1, part.width))
        return made

    def round_trip(self, tokens: int, cached: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What the cache would give back of `cached`; gradients pass as if nothing were lost (straight through)."""
        held = self.unpack(tokens, self.pack(tokens, cached), cached[0].dtype)
        return tuple(straight_through(x, value) for x, value in zip(cached, held, strict=True))


def _encode(x: Tensor, coding: Coding) -> tuple[Tensor, Tensor]:
    """Codes of the groups along the last axis of x [..., n] in bytes, and the groups' zeros and steps [..., 2, g].

    A code is round((x - zero) / step), with the zero and the step as they are stored.
    """
    number, size = coding.groups(x.shape[-1])
    length, spare, top = x.shape[-1], number * size - x.shape[-1], 2**coding.bits - 1
    x = x.to(wide(x.dtype))
    if spare:  # more of the last number changes no group's range
        x = torch.cat((x, x[..., -1:].expand(*x.shape[:-1], spare)), -1)
    x = x.unflatten(-1, (number, size))
    low, high = x.amin(-1), x.amax(-1)
    step = (high - low) / top
    if coding.stages:
        bounds = _to_fp8(torch.stack((low, step.clamp_min(_FP8_LEAST)), -2))
    else:
        bounds = torch.stack((low, step), -2).clamp(-_HALF_MOST, _HALF_MOST).to(torch.float16)
    zero, step = _bounds(bounds, x.dtype)
    codes = ((x - zero) / step.clamp_min(_HALF_LEAST)).round().clamp(0, top).to(torch.uint8)
    return join_codes(codes.flatten(-2)[..., :length], coding.bits), bounds


def _decode(packed: Tensor, bounds: Tensor, length: int, coding: Coding, dtype: torch.dtype) -> Tensor:
    """The numbers [..., length] that `_encode`'s codes stand for."""
    number, size = coding.groups(length)
    codes = split_codes(packed, coding.bits, length)
    if number * size > length:
        codes = torch.nn.functional.pad(codes, (0, number * size - length))
    zero, step = _bounds(bounds, wide(dtype))
    value = torch.addcmul(zero, codes.unflatten(-1, (number, size)).to(zero.dtype), step)
    return value.to(dtype).flatten(-2)[..., :length]


def _bounds(stored: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Zeros and steps [..., g, 1] of stored ones [..., 2, g], in float16 or in the bytes of FP8."""
    values = stored.view(_FP8) if stored.dtype == torch.uint8 else stored
    zero, step = values.to(dtype).unsqueeze(-1).unbind(-3)
    return zero, step


def _to_fp8(x: Tensor) -> Tensor:
    """The bytes of x's nearest finite numbers in FP8."""
    return x.clamp(-_FP8_MOST, _FP8_MOST).to(_FP8).view(torch.uint8)


def _subtract_centroids(x: Tensor, stages: int) -> tuple[Tensor, Tensor, Tensor]:
    """What stages of k-means over the tokens leave of x [B, f, H, T, D]: the rest, centroids and packed names.

    Centroids are [B, f, stages, H, count, D] in the bytes of FP8; a later stage takes what the earlier ones left.
    """
    made = []
    for _ in range(stages):
        stored = _k_means(x)
        means = stored.view(_FP8).to(x.dtype)
        names = _nearest(x, means)
        x = x - _named(means, names)
        made.append((stored, join_codes(names.to(torch.uint8), centroids(x.shape[-2])[1])))
    stored, packed = (torch.stack(some, 2) for some in zip(*made, strict=True))
    return x, stored, packed


def _add_centroids(rest: Tensor, stored: Tensor, packed: Tensor) -> Tensor:
    """The tokens [B, F, H, T, D] of which `_subtract_centroids` left `rest`."""
    tokens = rest.shape[-2]
    names = split_codes(packed, centroids(tokens)[1], tokens).long()
    return rest + _named(stored.view(_FP8).to(rest.dtype), names).sum(2)


def _k_means(x: Tensor) -> Tensor:
    """Centroids [..., count, D] of the tokens of x [..., T, D], in the bytes of FP8.

    They begin at tokens that are spread evenly over the frame, so nothing is drawn; one that no token is nearest to
    stays where it is. Sums are products of matrices, which are the same in every run on a GPU, too.
    """
    tokens = x.shape[-2]
    every = torch.arange(centroids(tokens)[0], device=x.device)
    means = x[..., (2 * every + 1) * tokens // (2 * len(every)), :]
    for _ in range(_LLOYD_STEPS):
        members = (_nearest(x, means).unsqueeze(-2) == every.unsqueeze(-1)).to(x.dtype)
        size = members.sum(-1, keepdim=True)
        means = torch.where(size > 0, members @ x / size.clamp_min(1), means)
    return _to_fp8(means)


def _nearest(x: Tensor, means: Tensor) -> Tensor:
    """Which of the means [..., count, D] each token of x [..., T, D] is nearest to: [..., T]."""
    return (means.square().sum(-1).unsqueeze(-2) - 2 * x @ means.mT).argmin(-1)


def _named(means: Tensor, names: Tensor) -> Tensor:
    """The mean [..., T, D] of each of the names [..., T]."""
    return torch.take_along_dim(means, names.unsqueeze(-1), -2)
