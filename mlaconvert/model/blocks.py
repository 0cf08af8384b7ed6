"""The parts of a Wan transformer around its self-attention."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mlaconvert.config.geometry import WanConfig
from mlaconvert.model.attention.dense import DenseAttention
from mlaconvert.model.attention.kernel import AttentionPlan, RMSNorm, attend
from mlaconvert.model.attention.latent import LatentAttention
from mlaconvert.model.cache import LayerCache
from mlaconvert.model.group_quantizer import GroupQuantizer


class CrossAttention(nn.Module):
    """Attention to the text and, in Wan2.1 image-to-video, to CLIP image tokens in front of it."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        dim = config.dim
        self.num_heads = config.num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, config.eps), RMSNorm(dim, config.eps)
        self.has_image = config.image_dim is not None
        if self.has_image:
            self.k_img, self.v_img = nn.Linear(dim, dim), nn.Linear(dim, dim)
            self.norm_k_img = RMSNorm(dim, config.eps)

    def project(self, text: Tensor, image: Tensor | None) -> tuple[Tensor, ...]:
        """Keys and values [B, T, H, D] of the text [B, T, D], then those of image tokens [B, I, D] if there are any."""
        heads = (self.num_heads, -1)
        found = (self.norm_k(self.k(text)).unflatten(-1, heads), self.v(text).unflatten(-1, heads))
        if not self.has_image or image is None:
            return found
        return (
            *found,
            self.norm_k_img(self.k_img(image)).unflatten(-1, heads),
            self.v_img(image).unflatten(-1, heads),
        )

    def forward(self, x: Tensor, memory: Sequence[Tensor]) -> Tensor:
        """[B, N, D] and the keys and values of `project` -> [B, N, D]."""
        q = self.norm_q(self.q(x)).unflatten(-1, (self.num_heads, -1))
        out = attend(q, memory[0], memory[1], None)
        if len(memory) > 2:
            out = out + attend(q, memory[2], memory[3], None)
        return self.o(out.flatten(-2))


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward; timesteps modulate the first and the last."""

    def __init__(self, config: WanConfig, layer: int) -> None:
        super().__init__()
        dim, eps = config.dim, config.eps
        mla = config.mla.layers[layer] if config.mla else None
        self.self_attn: DenseAttention | LatentAttention = (
            DenseAttention(config) if mla is None or config.mla is None else LatentAttention(config, config.mla, mla)
        )
        self.self_attn.group_quantizer = GroupQuantizer.of(config, layer)
        self.cross_attn = CrossAttention(config)
        self.norm1 = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.norm3 = nn.LayerNorm(dim, eps) if config.cross_attn_norm else nn.Identity()
        self.ffn = nn.Sequential(
            nn.Linear(dim, config.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(config.ffn_dim, dim)
        )
        self.modulation = nn.Parameter(torch.empty(1, 6, dim))

    def attention_input(self, x: Tensor, modulation: Tensor) -> Tensor:
        """What self-attention reads of x [B, N, D]: the modulated LayerNorm. `modulation` [B, F or 1, 6, D]."""
        shift, scale, _, _, _, _ = (modulation + self.modulation).unbind(-2)
        return modulate(self.norm1(x), shift, scale)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        text: Tensor,
        image: Tensor | None,
        plan: AttentionPlan,
        cache: LayerCache | None,
    ) -> Tensor:
        """[B, N, D] -> [B, N, D]. Text and image are read from the cache where it holds them."""
        attended = self.self_attn(self.attention_input(x, modulation), plan, cache)
        remembered = cache.text if cache is not None and not torch.is_grad_enabled() else ()
        return self.complete(x, attended, modulation, remembered or self.cross_attn.project(text, image))

    def trace(
        self, x: Tensor, modulation: Tensor, text: Tensor, image: Tensor | None, plan: AttentionPlan
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What self-attention reads, what it makes of that, and the block's output without a cache: [B, N, D] each."""
        inputs = self.attention_input(x, modulation)
        attended = self.self_attn(inputs, plan)
        return inputs, attended, self.complete(x, attended, modulation, self.cross_attn.project(text, image))

    def complete(self, x: Tensor, attended: Tensor, modulation: Tensor, memory: Sequence[Tensor]) -> Tensor:
        """The block after self-attention, whose output is `attended` [B, N, D]: each token on its own.

        `memory` is `CrossAttention.project`'s of the text.
        """
        _, _, gate, ffn_shift, ffn_scale, ffn_gate = (modulation + self.modulation).unbind(-2)
        x = x + gated(attended, gate)
        x = x + self.cross_attn(self.norm3(x), memory)
        return x + gated(self.ffn(modulate(self.norm2(x), ffn_shift, ffn_scale)), ffn_gate)


class Head(nn.Module):
    """Modulated projection of tokens to patches."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.head = nn.Linear(config.dim, math.prod(config.patch_size) * config.out_dim)
        self.modulation = nn.Parameter(torch.empty(1, 2, config.dim))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """[B, N, D], [B, F or 1, D] -> [B, N, patch]."""
        shift, scale = (embedding.unsqueeze(-2) + self.modulation).unbind(-2)
        return self.head(modulate(self.norm(x), shift, scale))


class ImageEmbedding(nn.Module):
    """Maps CLIP image features [B, I, image_dim] to the model's width."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        width = config.image_dim or 0
        self.proj = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, config.dim),
            nn.LayerNorm(config.dim),
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.proj(features)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift with [B, N, D] and per-frame [B, F or 1, D]."""
    frames = x.unflatten(1, (shift.shape[1], -1))
    return torch.addcmul(shift.unsqueeze(2), frames, 1 + scale.unsqueeze(2)).flatten(1, 2)


def gated(x: Tensor, gate: Tensor) -> Tensor:
    """x * gate with [B, N, D] and per-frame [B, F or 1, D]."""
    return (x.unflatten(1, (gate.shape[1], -1)) * gate.unsqueeze(2)).flatten(1, 2)
