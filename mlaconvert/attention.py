"""Self-attention of a Wan block: dense as pretrained, and with Multi-Head Latent Attention.

Shapes: B batch, N query tokens, M key tokens, H heads, D head width, r latent rank, R rotary scalars.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlaconvert.cache import LayerCache, WindowView
from mlaconvert.config import MLAConfig, MLALayer, WanConfig
from mlaconvert.rope import Rotary, rotate

AttentionMode = Literal["expanded", "absorbed"]


@dataclass(frozen=True)
class AttentionPlan:
    """What all layers of one forward pass share: rotations, who sees whom, and where the cache is written.

    `mask` is bool [N, M], True where a query sees a key; None where every query sees every key.
    """

    query_rotary: Rotary
    key_rotary: Rotary
    mask: Tensor | None = None
    window: WindowView | None = None
    mode: AttentionMode = "expanded"

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
        return x * inverse_rms(x, self.eps).to(x.dtype) * self.weight


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last axis, kept as [..., 1], in float32 at least."""
    wide = x if x.dtype == torch.float64 else x.float()
    return torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None = None) -> Tensor:
    """Softmax attention: [B, N, H, Dq], [B, M, H, Dq], [B, M, H, Dv] -> [B, N, H, Dv]."""
    q, k, v = (x.to(v.dtype).transpose(1, 2) for x in (q, k, v))
    if q.device.type == "cpu" and torch.is_grad_enabled() and q.requires_grad:
        # The fused CPU kernel's backward is several times slower than plain products.
        scores = (q * (scale or q.shape[-1] ** -0.5)) @ k.mT
        if mask is not None:
            scores = scores + torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, float("-inf"))
        out = scores.softmax(-1).to(v.dtype) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.transpose(1, 2)


class DenseAttention(nn.Module):
    """Wan's self-attention: full-width RMSNorm on queries and keys, then heads, then RoPE."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        dim = config.dim
        self.num_heads = config.num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, config.eps), RMSNorm(dim, config.eps)

    def forward(self, x: Tensor, plan: AttentionPlan, cache: LayerCache | None = None) -> Tensor:
        """[B, N, D] -> [B, N, D]; with a cache, the queries see its window."""
        heads = (self.num_heads, -1)
        q = self.norm_q(self.q(x)).unflatten(-1, heads)
        k = self.norm_k(self.k(x)).unflatten(-1, heads)
        v = self.v(x).unflatten(-1, heads)
        k, v = plan.remember(cache, k, v)
        out = attend(rotate(q, plan.query_rotary), rotate(k, plan.key_rotary), v, plan.mask)
        return self.o(out.flatten(-2))


class LatentQuery(nn.Module):
    """Up-projection of the exact query path: per head, [B, N, H * D] -> [B, N, H * (nope + rope)]."""

    def __init__(self, num_heads: int, head_dim: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, width, head_dim))

    def forward(self, latent: Tensor) -> Tensor:
        heads = latent.unflatten(-1, (self.weight.shape[0], -1))
        return torch.einsum("bnhd,hed->bnhe", heads, self.weight).flatten(-2)


class LatentUp(nn.Module):
    """W_UK and W_UV by head, and the bias of the content keys."""

    def __init__(self, num_heads: int, nope: int, value: int, rank: int) -> None:
        super().__init__()
        self.split = (num_heads, nope, value)
        self.weight = nn.Parameter(torch.empty(num_heads * (nope + value), rank))
        self.bias = nn.Parameter(torch.empty(num_heads * nope))

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """W_UK [H, nope, r], W_UV [H, v, r] and the key bias [H, nope]."""
        heads, nope, value = self.split
        key, up = self.weight.unflatten(0, (heads, nope + value)).split((nope, value), dim=1)
        return key, up, self.bias.unflatten(0, (heads, nope))


class LatentAttention(nn.Module):
    """Multi-Head Latent Attention (DeepSeek-V2, arXiv 2405.04434) with VideoMLA's shared 3D-RoPE key (2605.30351).

    A token caches its latent, one rotary key for all heads (unrotated) and, with `key_norm` "token", the teacher's
    key norm s = 1 / rms(W_K x + b_k), which scales keys but never values. Content keys and values are built from the
    content c: the latent, and with `rotary_in_content` the rotary key as well.
    """

    def __init__(self, config: WanConfig, mla: MLAConfig, layer: MLALayer) -> None:
        super().__init__()
        dim, heads, rank = config.dim, config.num_heads, layer.kv_lora_rank
        self.layer, self.num_heads, self.eps, self.scale = layer, heads, config.eps, mla.softmax_scale
        self.rotary_in_content = mla.rotary_in_content
        rope, width = layer.qk_rope_head_dim, layer.qk_nope_head_dim + layer.qk_rope_head_dim
        query_rank = mla.q_lora_rank or dim
        self.q_a_proj = nn.Linear(dim, query_rank)
        self.q_a_layernorm = RMSNorm(query_rank, config.eps)
        self.q_b_proj: nn.Module = (
            nn.Linear(query_rank, heads * width, bias=False)
            if mla.q_lora_rank is not None
            else LatentQuery(heads, config.head_dim, width)
        )
        self.kv_a_proj_with_mqa = nn.Linear(dim, rank + rope)
        self.kv_a_layernorm = RMSNorm(rank, config.eps) if mla.key_norm == "latent" else None
        self.k_norm_proj = nn.Linear(dim, dim) if mla.key_norm == "token" else None
        self.kv_b_proj = LatentUp(heads, layer.qk_nope_head_dim, layer.v_head_dim, mla.content_width(layer))
        self.o = nn.Linear(heads * layer.v_head_dim, dim)

    def compress(self, x: Tensor) -> tuple[Tensor, ...]:
        """What is cached of [B, N, D]: latent [B, N, r], rotary key [B, N, R] (times s) and, in token mode, s."""
        latent, rope = self.kv_a_proj_with_mqa(x).split((self.layer.kv_lora_rank, self.layer.qk_rope_head_dim), -1)
        if self.kv_a_layernorm is not None:
            return self.kv_a_layernorm(latent), rope
        assert self.k_norm_proj is not None
        norm = inverse_rms(self.k_norm_proj(x), self.eps).to(x.dtype)
        return latent, rope * norm, norm

    def forward(self, x: Tensor, plan: AttentionPlan, cache: LayerCache | None = None) -> Tensor:
        """[B, N, D] -> [B, N, D]; with a cache, the queries see its window."""
        return self.o(self.heads(x, plan, cache))

    def content(self, latent: Tensor, k_rope: Tensor, norm: Tensor | None) -> Tensor:
        """What content keys and values are built from, [B, M, columns of kv_b_proj]."""
        if not self.rotary_in_content:
            return latent
        return torch.cat((latent, k_rope if norm is None else k_rope / norm), -1)

    def heads(self, x: Tensor, plan: AttentionPlan, cache: LayerCache | None = None) -> Tensor:
        """Attention before its output projection, [B, N, D] -> [B, N, H * v]."""
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))).unflatten(-1, (self.num_heads, -1))
        q_nope, q_rope = q.split((self.layer.qk_nope_head_dim, self.layer.qk_rope_head_dim), -1)
        latent, k_rope, *norms = plan.remember(cache, *self.compress(x))
        norm = norms[0] if norms else None  # [B, M, 1]
        content = self.content(latent, k_rope, norm)
        q_rope = rotate(q_rope, plan.query_rotary.select(self.layer.component_pairs))
        k_rope = rotate(k_rope.unsqueeze(2), plan.key_rotary.select(self.layer.component_pairs))  # [B, M, 1, R]
        attend_heads = self._expanded if plan.mode == "expanded" else self._absorbed
        return attend_heads(q_nope, q_rope, content, k_rope, norm, plan.mask).flatten(-2)

    def content_keys(self, content: Tensor, norm: Tensor | None) -> Tensor:
        """Unrotated keys of every head, [B, M, H, nope]."""
        up_key, _, bias = self.kv_b_proj.factors()
        keys = torch.einsum("bmr,hdr->bmhd", content, up_key) + bias
        return keys if norm is None else keys * norm.unsqueeze(2)

    def _expanded(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        content: Tensor,
        k_rope: Tensor,
        norm: Tensor | None,
        mask: Tensor | None,
    ) -> Tensor:
        """Keys and values of every head, rebuilt from the content."""
        _, up_value, _ = self.kv_b_proj.factors()
        v = torch.einsum("bmr,hdr->bmhd", content, up_value)
        k = torch.cat((self.content_keys(content, norm), k_rope.expand(-1, -1, self.num_heads, -1)), -1)
        return attend(torch.cat((q_nope, q_rope), -1), k, v, mask, self.scale)

    def _absorbed(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        content: Tensor,
        k_rope: Tensor,
        norm: Tensor | None,
        mask: Tensor | None,
    ) -> Tensor:
        """Attention on the content itself: one key and value for all heads.

        The content-key bias is one more channel, [c; 1], scaled by s on the key side like the rest of the key.
        """
        up_key, up_value, bias = self.kv_b_proj.factors()
        q_latent = torch.einsum("bnhd,hdr->bnhr", q_nope, up_key)
        q_bias = torch.einsum("bnhd,hd->bnh", q_nope, bias).unsqueeze(-1)
        key = torch.cat((content, torch.ones_like(content[..., :1])), -1)
        if norm is not None:
            key = key * norm
        k = torch.cat((key.unsqueeze(2), k_rope), -1).expand(-1, -1, self.num_heads, -1)
        v = content.unsqueeze(2).expand(-1, -1, self.num_heads, -1)
        out = attend(torch.cat((q_latent, q_bias, q_rope), -1), k, v, mask, self.scale)
        return torch.einsum("bnhr,hdr->bnhd", out, up_value)
