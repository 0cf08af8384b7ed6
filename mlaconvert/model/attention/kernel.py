"""What both kinds of self-attention share: the plan of a pass, RMSNorm, and the attention itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlaconvert.model.cache import LayerCache, WindowView
from mlaconvert.model.rope import Rotary

AttentionMode = Literal["auto", "expanded", "absorbed"]


@dataclass(frozen=True)
class AttentionPlan:
    """What all layers of one forward pass share: rotations, who sees whom, and where the cache is written.

    `mask` is bool [N, M], True where a query sees a key; None where every query sees every key. `turns` are the
    rotations of queries and keys for pairs that were selected beforehand.
    """

    query_rotary: Rotary
    key_rotary: Rotary
    mask: Tensor | None = None
    window: WindowView | None = None
    mode: AttentionMode = "expanded"
    turns: Mapping[tuple[int, ...], tuple[Rotary, Rotary]] = field(default_factory=dict)

    def select(self, pairs: tuple[int, ...]) -> tuple[Rotary, Rotary]:
        """The rotations of queries and of keys for these pairs."""
        found = self.turns.get(pairs)
        return found or (self.query_rotary.select(pairs), self.key_rotary.select(pairs))

    def remember(self, cache: LayerCache | None, *new: Tensor) -> tuple[Tensor, ...]:
        """Put the chunk's tensors into the cache and return the window's; without a cache, `new` itself."""
        if cache is None or self.window is None:
            return new
        return tuple(x.to(n.dtype) for x, n in zip(cache.update(self.window, *new), new, strict=True))


class RMSNorm(nn.Module):
    """x * weight / rms(x) over the last axis, in float32 like Wan's."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != self.weight.dtype:  # the fused kernels want one dtype
            return x * inverse_rms(x, self.eps).to(x.dtype) * self.weight
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last axis, kept as [..., 1], in float32 at least."""
    wide = x if x.dtype == torch.float64 else x.float()
    return torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)


def kernel_width(*widths: int) -> int:
    """The width that scores and values are padded to: the fused kernels want both alike, in multiples of 8."""
    return -(-max(widths) // 8) * 8


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None = None) -> Tensor:
    """Softmax attention: [B, N, H, Dq], [B, M, H, Dq], [B, M, H, Dv] -> [B, N, H, Dv]."""
    scale, value = scale or q.shape[-1] ** -0.5, v.shape[-1]
    q, k, v = (x.to(v.dtype).transpose(1, 2) for x in (q, k, v))
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and torch.is_grad_enabled() and q.requires_grad:
        # The fused CPU kernel's backward is twice as slow as plain products in this dtype.
        scores = (q * scale) @ k.mT
        if mask is not None:
            scores = scores + torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, float("-inf"))
        out = scores.softmax(-1).to(v.dtype) @ v
    else:
        width = kernel_width(q.shape[-1], value)
        q, k, v = (x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)[..., :value]
    return out.transpose(1, 2)
