"""A block of two streams, and the projection of video tokens to patches."""

from __future__ import annotations

import math

from torch import Tensor, nn

from mlaconvert.config.camera import CameraConfig
from mlaconvert.model.attention.kernel import RMSNorm, attend
from mlaconvert.model.blocks import gated, modulate
from mlaconvert.model.camera.attention import Cached, camera_attention
from mlaconvert.model.camera.turns import Turns


class TextAttention(nn.Module):
    """Attention of text tokens to each other, whose keys and values video tokens see as well."""

    def __init__(self, config: CameraConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(config.dim, config.dim) for _ in range(4))
        self.norm_q, self.norm_k = (RMSNorm(config.head_dim, config.eps) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[1, T, D] -> [1, T, D], and keys and values [1, T, H, d]."""
        q, k, v = (layer(x).unflatten(-1, (self.num_heads, -1)) for layer in (self.q, self.k, self.v))
        k = self.norm_k(k)
        return self.o(attend(self.norm_q(q), k, v, None).flatten(-2)), k, v


class CameraBlock(nn.Module):
    """Attention and feed-forward of video tokens, and the same of text tokens, which do not see the video."""

    def __init__(self, config: CameraConfig, layer: int) -> None:
        super().__init__()
        dim, hidden = config.dim, config.ffn_dim
        self.norm = nn.LayerNorm(dim, config.eps, elementwise_affine=False)
        self.modulation, self.text_modulation = nn.Linear(dim, 6 * dim), nn.Linear(dim, 6 * dim)
        self.self_attn, self.camera_o = camera_attention(config, layer), nn.Linear(dim, dim)
        self.text_attn = TextAttention(config)
        self.ffn, self.text_ffn = (
            nn.Sequential(nn.Linear(dim, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, dim)) for _ in range(2)
        )

    def read(self, x: Tensor, time: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Text tokens [1, T, D] and the time [1, 1, D] after its SiLU -> [1, T, D], and keys and values."""
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = self.text_modulation(time).chunk(6, -1)
        attended, k, v = self.text_attn(modulate(self.norm(x), shift, scale))
        x = x + gated(attended, gate)
        return x + gated(self.text_ffn(modulate(self.norm(x), ffn_shift, ffn_scale)), ffn_gate), (k, v)

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        turns: Turns,
        text: tuple[Tensor, Tensor],
        past: tuple[Cached, Turns] | None,
        *,
        keep: bool = False,
    ) -> tuple[Tensor, Cached]:
        """Video tokens [1, N, D] and each frame's time [1, F, D] after its SiLU -> [1, N, D], and what to cache."""
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = self.modulation(time).chunk(6, -1)
        attended, by_camera, cached = self.self_attn(modulate(self.norm(x), shift, scale), turns, text, past, keep=keep)
        x = x + gated(attended + self.camera_o(by_camera), gate)
        return x + gated(self.ffn(modulate(self.norm(x), ffn_shift, ffn_scale)), ffn_gate), cached


class CameraHead(nn.Module):
    """Modulated projection of tokens to patches."""

    def __init__(self, config: CameraConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.modulation = nn.Linear(config.dim, 2 * config.dim)
        self.head = nn.Linear(config.dim, math.prod(config.patch_size) * config.out_dim)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """[1, N, D] and each frame's time [1, F, D] after its SiLU -> [1, N, patch]."""
        shift, scale = self.modulation(time).chunk(2, -1)
        return self.head(modulate(self.norm(x), shift, scale))
