"""A cache that is narrowed while a model runs, without training: dense keys and values, or latents, in small groups.

KIVI (arXiv 2402.02750) groups keys along tokens, because some of their channels are large in every token, and values
along channels; Quant-VideoGen (2602.02958) does so for video. Groups never reach beyond a frame, so a masked pass over
a clip and a stream of chunks see the same ones. Keys are grouped before they turn.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mlaconvert.config.cache_dtype import INTEGER_BITS, CachedPart, CacheDtype, groups
from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.packing import run_bytes
from mlaconvert.model.quantizer import join_codes, split_codes, straight_through, wide

_FP8 = torch.float8_e4m3fn
_FP8_MOST = torch.finfo(_FP8).max
_HALF_MOST = torch.finfo(torch.float16).max
_HALF_LEAST = 2.0**-24  # the smallest above zero


class GroupQuantizer:
    """What one layer caches, narrowed: its `parts` in buffers that have a row for each frame."""

    def __init__(self, dtype: CacheDtype, parts: Sequence[CachedPart]) -> None:
        self.bits = INTEGER_BITS.get(dtype)
        if self.bits is None:  # nothing to group, so nothing to turn
            parts = [part._replace(along=part.along and "channels") for part in parts]
        self.parts = tuple(parts)

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
            elif self.bits is None:
                found.append(((lines, length), torch.uint8))
            else:
                found.append(((lines, run_bytes([(self.bits, length)])), torch.uint8))
                found.append(((lines, 2, groups(length)[0]), torch.float16))
        return found

    def pack(self, tokens: int, cached: Sequence[Tensor]) -> list[Tensor]:
        """The rows [B, f, ...] of f frames of `tokens` tokens of what a layer caches, [B, f * tokens, ...] each."""
        made = []
        for part, x in zip(self.parts, cached, strict=True):
            frames = x.detach().flatten(2).unflatten(1, (-1, tokens))
            lines = frames.mT if part.along == "tokens" else frames
            if part.along is None:
                made.append(lines)
            elif self.bits is None:
                made.append(lines.clamp(-_FP8_MOST, _FP8_MOST).to(_FP8).view(torch.uint8))
            else:
                made += _encode(lines, self.bits)
        return made

    def unpack(self, tokens: int, rows: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """What rows [B, F, ...] stand for, in `dtype`: the parts [B, F * tokens, ...], none of them a view of a row."""
        left, made = iter(rows), []
        for part in self.parts:
            length = part.lines(tokens)[1]
            lines = next(left)
            if part.along is None:
                lines = lines.to(dtype, copy=True)
            elif self.bits is None:
                lines = lines.view(_FP8).to(dtype)
            else:
                lines = _decode(lines, next(left), length, self.bits, dtype)
            frames = lines.mT if part.along == "tokens" else lines
            made.append(frames.flatten(1, 2).unflatten(-1, part.width))
        return made

    def round_trip(self, tokens: int, cached: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What the cache would give back of `cached`; gradients pass as if nothing were lost (straight through)."""
        held = self.unpack(tokens, self.pack(tokens, cached), cached[0].dtype)
        return tuple(straight_through(x, value) for x, value in zip(cached, held, strict=True))


def _encode(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes of the groups along the last axis of x [..., n] in bytes, and the groups' zeros and steps [..., 2, g].

    A code is round((x - zero) / step), with the zero and the step as they are stored.
    """
    number, size = groups(x.shape[-1])
    length, spare, top = x.shape[-1], number * size - x.shape[-1], 2**bits - 1
    x = x.to(wide(x.dtype))
    if spare:  # more of the last number changes no group's range
        x = torch.cat((x, x[..., -1:].expand(*x.shape[:-1], spare)), -1)
    x = x.unflatten(-1, (number, size))
    low, high = x.amin(-1), x.amax(-1)
    bounds = torch.stack((low, (high - low) / top), -2).clamp(-_HALF_MOST, _HALF_MOST).to(torch.float16)
    zero, step = (part.unsqueeze(-1) for part in bounds.to(x.dtype).unbind(-2))
    codes = ((x - zero) / step.clamp_min(_HALF_LEAST)).round().clamp(0, top).to(torch.uint8)
    return join_codes(codes.flatten(-2)[..., :length], bits), bounds


def _decode(packed: Tensor, bounds: Tensor, length: int, bits: int, dtype: torch.dtype) -> Tensor:
    """The numbers [..., length] that `_encode`'s codes stand for."""
    number, size = groups(length)
    codes = split_codes(packed, bits, length)
    if number * size > length:
        codes = torch.nn.functional.pad(codes, (0, number * size - length))
    zero, step = (part.unsqueeze(-1) for part in bounds.to(wide(dtype)).unbind(-2))
    value = torch.addcmul(zero, codes.unflatten(-1, (number, size)).to(zero.dtype), step)
    return value.to(dtype).flatten(-2)[..., :length]
