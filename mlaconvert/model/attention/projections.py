"""The up-projections of latent attention, head by head."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LatentQuery(nn.Module):
    """Up-projection of the exact query path: per head, [B, N, H * D] -> [B, N, H * (nope + rope)]."""

    def __init__(self, num_heads: int, head_dim: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, width, head_dim))

    def forward(self, latent: Tensor) -> Tensor:
        heads = latent.unflatten(-1, (self.weight.shape[0], -1))
        return torch.einsum("bnhd,hed->bnhe", heads, self.weight).flatten(-2)


class LatentUp(nn.Module):
    """W_UK and W_UV by head, and the bias of the content keys; with `value_bias`, that of values as well."""

    def __init__(self, num_heads: int, nope: int, value: int, rank: int, *, value_bias: bool) -> None:
        super().__init__()
        self.split = (num_heads, nope, value)
        self.weight = nn.Parameter(torch.empty(num_heads * (nope + value), rank))
        self.bias = nn.Parameter(torch.empty(num_heads * (nope + value if value_bias else nope)))

    def forward(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """W_UK [H, nope, r], W_UV [H, v, r], the key bias [H, nope] and the value bias [H, v or 0].

        A call, so that offloading hooks see it.
        """
        heads, nope, value = self.split
        key, up = self.weight.unflatten(0, (heads, nope + value)).split((nope, value), dim=1)
        bias = self.bias.unflatten(0, (heads, -1))
        return key, up, bias[:, :nope], bias[:, nope:]
