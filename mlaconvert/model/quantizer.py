"""What a layer caches, in bits: each channel has a number of its own (MLALayer.cache_bits), packed into bytes.

A latent's channels come out ordered, decorrelated and of one variance, which is what transform coding wants (Goyal,
"Theoretical foundations of transform coding", 2001). Their values have heavy tails, so the steps widen with their size:
a channel is compressed by asinh and cut into equal steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mlaconvert.config.packing import PART_BITS, packed_bytes, packed_length, parts_of


def wide(dtype: torch.dtype) -> torch.dtype:
    """What is computed in, of numbers in `dtype`: float32 at least."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def straight_through(x: Tensor, value: Tensor) -> Tensor:
    """`value`, which stands for `x`; gradients pass to `x` as if it were the same."""
    return x + (value - x).detach() if x.requires_grad else value


def join_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., n], uint8, of `bits` each (at most 8) in bytes, as `config.packing` lays them."""
    parts = [_join_parts((codes >> shift) & (2**width - 1), width) for width, shift in parts_of(bits)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def split_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of bytes [..., n], uint8."""
    parts = parts_of(bits)
    lengths = [packed_length(count, width) for width, _ in parts]
    found = [
        _split_parts(some, width, count) << shift
        for (width, shift), some in zip(parts, packed.split(lengths, -1), strict=True)
    ]
    return found[0] if len(found) == 1 else torch.stack(found).sum(0, dtype=packed.dtype)


def _join_parts(codes: Tensor, width: int) -> Tensor:
    """Parts [..., n] of `width` bits, side by side in bytes [..., ceil(n * width / 8)], the first in the lowest."""
    each = 8 // width
    codes = nn.functional.pad(codes, (0, -codes.shape[-1] % each)).unflatten(-1, (-1, each))
    return (codes << _places(codes, width)).sum(-1, dtype=torch.int32).to(torch.uint8)


def _split_parts(packed: Tensor, width: int, count: int) -> Tensor:
    """The first `count` parts of bytes [..., n], in the dtype that these are given in."""
    codes = (packed.unsqueeze(-1) >> _places(packed, width)) & (2**width - 1)
    return codes.flatten(-2)[..., :count]


def _places(codes: Tensor, width: int) -> Tensor:
    """Where in a byte its codes begin, in bits."""
    return torch.arange(0, 8, width, dtype=codes.dtype, device=codes.device)


class Packing:
    """Codes [..., c] of `bits` each, as bytes [..., nbytes] and back (`config.packing`); whole tensors at a time."""

    def __init__(self, bits: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.count, self.nbytes = len(bits), packed_bytes(bits)
        of = torch.tensor(tuple(bits), dtype=torch.int32)
        self.half = (2.0 ** (of - 1)).to(device)
        self.parts = []
        for width in PART_BITS:
            channels = (of & width).nonzero().flatten()
            if len(channels):
                shift = of[channels] & ~(2 * width - 1)  # as `parts_of` has it
                self.parts.append((width, channels.to(device), shift.to(device)))

    def pack(self, codes: Tensor) -> Tensor:
        """Codes, int32, from 0 to 2^bits - 1 each, to uint8."""
        made = []
        for width, channels, shift in self.parts:
            made.append(_join_parts((codes.index_select(-1, channels) >> shift) & (2**width - 1), width))
        return torch.cat(made, -1)

    def unpack(self, packed: Tensor) -> Tensor:
        """The codes, int32, of bytes."""
        codes = torch.zeros(*packed.shape[:-1], self.count, dtype=torch.int32, device=packed.device)
        start = 0
        for width, channels, shift in self.parts:
            end = start + packed_length(len(channels), width)
            part = _split_parts(packed[..., start:end].to(torch.int32), width, len(channels))
            codes = codes.index_add(-1, channels, part << shift)
            start = end
        return codes


class CacheQuantizer(nn.Module):
    """Static scalar quantisation of what one layer caches, with `bits` for each of its c scalars.

    A code is floor(gain * asinh(slope * (x - center))), held to the 2^bits that there are, and stands for the middle of
    its step. `center`, `slope` and `gain` [c] come from a calibration.
    """

    def __init__(self, bits: Sequence[int]) -> None:
        super().__init__()
        self.bits = tuple(bits)
        self.center, self.slope, self.gain = (
            nn.Parameter(torch.empty(len(self.bits)), requires_grad=False) for _ in range(3)
        )
        self._packings: dict[torch.device, Packing] = {}

    @property
    def packing(self) -> Packing:
        """How codes lie in bytes, with its tables where the weights are."""
        device = self.center.device
        if device not in self._packings:
            self._packings[device] = Packing(self.bits, device)
        return self._packings[device]

    def pack(self, *cached: Tensor) -> Tensor:
        """The bytes [B, N, nbytes], uint8, of what `LatentAttention.compress` makes, [B, N, ...] each."""
        packing = self.packing
        return packing.pack((self._code(torch.cat(cached, -1)) + packing.half).to(torch.int32))

    def unpack(self, packed: Tensor, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What bytes [B, M, nbytes] stand for, in the widths and the dtype of `like`."""
        packing = self.packing
        value = self._value(packing.unpack(packed).to(wide(like[0].dtype)) - packing.half).to(like[0].dtype)
        return value.split([part.shape[-1] for part in like], -1)

    def forward(self, *cached: Tensor) -> tuple[Tensor, ...]:
        """What the cache would give back of `cached`; gradients pass as if nothing were lost (straight through).

        Called as a module, so that hooks which keep weights elsewhere bring the tables.
        """
        x = torch.cat(cached, -1)
        value = straight_through(x, self._value(self._code(x)).to(x.dtype))
        return value.split([part.shape[-1] for part in cached], -1)

    def _code(self, x: Tensor) -> Tensor:
        """Codes about zero, as whole numbers in float32 at least."""
        x, half = x.detach().to(wide(x.dtype)), self.packing.half
        center, slope, gain = (p.to(x.dtype) for p in (self.center, self.slope, self.gain))
        code = (gain * torch.asinh(slope * (x - center))).floor()
        return torch.minimum(torch.maximum(code, -half), half - 1)

    def _value(self, code: Tensor) -> Tensor:
        center, slope, gain = (p.to(code.dtype) for p in (self.center, self.slope, self.gain))
        return torch.sinh((code + 0.5) / gain) / slope + center
