"""Attention of video tokens that turn by position and by camera, dense and latent.

Shapes: B batch, N tokens of a pass, M of the past, T of the text, H heads of d channels, D model width, r latent.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mlaconvert.config.camera import CameraConfig
from mlaconvert.config.mla import MLAConfig, MLALayer
from mlaconvert.model.attention.kernel import RMSNorm, attend, inverse_rms
from mlaconvert.model.camera.turns import Turns

Cached = tuple[Tensor, ...]
"""What a layer holds of a past, [B, M, ...] each."""


class Seen(NamedTuple):
    """Keys and values [B, M, H, d], turned by position and by camera."""

    keys: tuple[Tensor, Tensor]
    values: tuple[Tensor, Tensor]


class CameraAttention(nn.Module):
    """Queries see the text, a past and their own pass, twice: turned by position, and by camera.

    Queries and keys are normed head by head. A token caches its keys and values as they were turned.
    """

    def __init__(self, config: CameraConfig) -> None:
        super().__init__()
        self.num_heads, self.eps, self.scale = config.num_heads, config.eps, config.head_dim**-0.5
        self._build(config)

    def _build(self, config: CameraConfig) -> None:
        self.q, self.k, self.v, self.o = (nn.Linear(config.dim, config.dim) for _ in range(4))
        self.norm_q, self.norm_k = (RMSNorm(config.head_dim, config.eps) for _ in range(2))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Normed queries, keys before and after their norm, and values of [B, N, D]: [B, N, H, d] each."""
        q, k, v = (layer(x).unflatten(-1, (self.num_heads, -1)) for layer in (self.q, self.k, self.v))
        return self.norm_q(q), k, self.norm_k(k), v

    def compress(self, x: Tensor, unnormed: Tensor, own: Seen) -> Cached:
        """What is cached of a pass [B, N, D], of its keys before their norm and all that is `own`."""
        return (*own.keys, *own.values)

    def recall(self, cached: Cached, turns: Turns) -> Seen:
        """Keys and values of a past, which was turned by `turns`."""
        k, camera_k, v, camera_v = cached
        return Seen((k, camera_k), (v, camera_v))

    def forward(
        self,
        x: Tensor,
        turns: Turns,
        text: tuple[Tensor, Tensor] | None = None,
        past: tuple[Cached, Turns] | None = None,
        *,
        keep: bool = False,
    ) -> tuple[Tensor, Tensor, Cached]:
        """[B, N, D] -> what positions made of it, projected, and the cameras' heads, not yet: [B, N, D] each.

        `text` are keys and values [B, T, H, d] that are not turned. With `keep` the third is what is to be cached.
        """
        q, unnormed, k, v = self.project(x)
        own = Seen(turns.keys(k), turns.values(v))
        seen = [own] if past is None else [self.recall(*past), own]
        if text is not None:
            seen.insert(0, Seen((text[0],) * 2, (text[1],) * 2))
        made = [
            attend(
                query,
                torch.cat([part.keys[kind] for part in seen], 1),
                torch.cat([part.values[kind] for part in seen], 1),
                None,
                self.scale,
            )
            for kind, query in enumerate(turns.queries(q))
        ]
        by_position, by_camera = turns.outputs(*made)
        cached = self.compress(x, unnormed, own) if keep else ()
        return self.o(by_position.flatten(-2)), by_camera.flatten(-2), cached


class LatentCameraAttention(CameraAttention):
    """Multi-Head Latent Attention for the past: the pass sees itself through the teacher's own keys and values.

    A token caches a latent, and of each head s = 1 / rms(W_K x + b_k). Both turned copies of a past's keys and values
    are made of them when a pass reads them.
    """

    def __init__(self, config: CameraConfig, mla: MLAConfig, layer: MLALayer) -> None:
        self.rank = layer.kv_lora_rank
        super().__init__(config)
        self.scale = mla.softmax_scale

    def _build(self, config: CameraConfig) -> None:
        dim = config.dim
        self.q_a_proj, self.k_norm_proj, self.v_proj, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.q_a_layernorm, self.k_norm = (RMSNorm(config.head_dim, config.eps) for _ in range(2))
        self.kv_a_proj_with_mqa = nn.Linear(dim, self.rank)
        self.kv_b_proj = nn.Linear(self.rank, 2 * dim)  # by head: key, value

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Normed queries, keys before and after their norm, and values of [B, N, D]: [B, N, H, d] each."""
        layers = (self.q_a_proj, self.k_norm_proj, self.v_proj)
        q, k, v = (layer(x).unflatten(-1, (self.num_heads, -1)) for layer in layers)
        return self.q_a_layernorm(q), k, self.k_norm(k), v

    def compress(self, x: Tensor, unnormed: Tensor, own: Seen) -> Cached:
        """The latent [B, N, r] and the inverse norms [B, N, H]."""
        return self.kv_a_proj_with_mqa(x), inverse_rms(unnormed, self.eps).squeeze(-1).to(x.dtype)

    def recall(self, cached: Cached, turns: Turns) -> Seen:
        """Keys and values that are made of latents."""
        latent, norms = cached
        k, v = self.kv_b_proj(latent).unflatten(-1, (self.num_heads, 2, -1)).unbind(-2)
        return Seen(turns.keys(k * norms.unsqueeze(-1)), turns.values(v))


def camera_attention(config: CameraConfig, layer: int) -> CameraAttention:
    """The attention of `layer`: latent where the model is converted."""
    mla = config.mla.layers[layer] if config.mla is not None else None
    if config.mla is None or mla is None:
        return CameraAttention(config)
    return LatentCameraAttention(config, config.mla, mla)
