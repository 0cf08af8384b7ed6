"""Wan's three-axis rotary embedding.

A head of width D holds D/2 complex pairs, interleaved as (real, imaginary). They are numbered over the time, height
and width axes in that order; pair j of an axis with n pairs turns by position * 10000^(-j/n). The frequencies are
always those of the full head, also where an MLA layer keeps only some of the pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mlaconvert.latent.pairs import THETA, frequencies


class Rotary(NamedTuple):
    """Cosines and sines of the rotation of each token and pair, [tokens, pairs]."""

    cos: Tensor
    sin: Tensor

    def select(self, pairs: Sequence[int] | Tensor) -> Rotary:
        """The columns of `pairs`, which may repeat."""
        index = torch.as_tensor(pairs, dtype=torch.long, device=self.cos.device)
        return Rotary(self.cos[:, index], self.sin[:, index])


def angles(frames: Tensor, height: int, width: int, split: tuple[int, int, int], theta: float = THETA) -> Tensor:
    """Rotation angles in float64 [F * height * width, pairs] of the tokens of F frames.

    `frames` [F] gives each frame's position in time; `height` and `width` count tokens.
    """
    freq = frequencies(split, theta).to(frames.device)
    axis = torch.arange(3, device=frames.device).repeat_interleave(torch.tensor(split, device=frames.device))
    rows = torch.arange(height, dtype=torch.float64, device=frames.device)
    columns = torch.arange(width, dtype=torch.float64, device=frames.device)
    position = torch.stack(torch.meshgrid(frames.double(), rows, columns, indexing="ij"), -1).reshape(-1, 3)
    return position[:, axis] * freq


def rotary(
    frames: Tensor,
    height: int,
    width: int,
    split: tuple[int, int, int],
    dtype: torch.dtype = torch.float32,
    theta: float = THETA,
) -> Rotary:
    """`angles` as cosines and sines of `dtype`."""
    angle = angles(frames, height, width, split, theta)
    return Rotary(angle.cos().to(dtype), angle.sin().to(dtype))


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate the pairs of `x`: [B, N, H, 2 * pairs] by `rotary` [N, pairs], in float32 if `x` is narrower."""
    wide = x if x.dtype == torch.float64 else x.float()
    cos, sin = rotary.cos[:, None].to(wide.dtype), rotary.sin[:, None].to(wide.dtype)
    # Compilers fuse plain products but not complex ones, whose gradients need an aligned offset in memory besides.
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad):
        real, imag = wide.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((real * cos - imag * sin, real * sin + imag * cos), -1).flatten(-2).to(x.dtype)
    pairs = wide.unflatten(-1, (-1, 2)).contiguous()
    if pairs.storage_offset() % 2:  # one token alone, behind a latent of odd width
        pairs = pairs.clone()
    turned = torch.view_as_complex(pairs) * torch.complex(cos, sin)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


class Rope(nn.Module):
    """`rotate` as a module, so that a profile sees it."""

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        return rotate(x, rotary)
