"""What a prompt is made into before the blocks: text, letters and image tokens of the model's width, [1, T, D]."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from mlaconvert.config.camera import CameraConfig
from mlaconvert.model.attention.kernel import attend
from mlaconvert.model.conditions import timestep_embedding


class TimeEmbedding(nn.Sequential):
    """Maps numbers [F], such as timesteps, to the model's width, [F, D]."""

    def __init__(self, config: CameraConfig) -> None:
        super().__init__(nn.Linear(config.freq_dim, config.dim), nn.SiLU(), nn.Linear(config.dim, config.dim))
        self.freq_dim = config.freq_dim

    def forward(self, numbers: Tensor) -> Tensor:
        x = timestep_embedding(numbers, self.freq_dim).to(next(self.parameters()))
        for layer in self:
            x = layer(x)
        return x


class GlyphEmbedding(nn.Sequential):
    """Maps the embedding of letters to the model's width."""

    def __init__(self, config: CameraConfig) -> None:
        width, hidden, outer = config.glyph_dims or (1, 1, 1)
        parts = {
            "layernorm": nn.LayerNorm(width),
            "fc1": nn.Linear(width, hidden),
            "act1": nn.GELU(),
            "fc2": nn.Linear(hidden, outer),
            "act2": nn.GELU(),
            "fc3": nn.Linear(outer, config.dim),
        }
        super().__init__(OrderedDict(parts))


class RefinerBlock(nn.Module):
    """Attention of the text to itself and a feed-forward network, both gated by what the whole prompt is."""

    def __init__(self, config: CameraConfig) -> None:
        super().__init__()
        dim, hidden = config.dim, config.refiner_dim
        self.num_heads = config.num_heads
        self.norm1, self.norm2 = (nn.LayerNorm(dim, config.eps) for _ in range(2))
        self.self_attn_qkv, self.self_attn_proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        parts = {"fc1": nn.Linear(dim, hidden), "act": nn.SiLU(), "fc2": nn.Linear(hidden, dim)}
        self.mlp = nn.Sequential(OrderedDict(parts))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, prompt: Tensor) -> Tensor:
        """[1, T, D] and [1, D] -> [1, T, D]."""
        gate, mlp_gate = self.adaLN_modulation(prompt).unsqueeze(1).chunk(2, -1)
        q, k, v = self.self_attn_qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        x = x + gate * self.self_attn_proj(attend(q, k, v, None).flatten(-2))
        return x + mlp_gate * self.mlp(self.norm2(x))


class TextEmbedding(nn.Module):
    """Maps a text encoder's states [1, T, text_dim] to the model's width, at timestep 0."""

    def __init__(self, config: CameraConfig) -> None:
        super().__init__()
        self.input_embedder, self.time = nn.Linear(config.text_dim, config.dim), TimeEmbedding(config)
        parts = {
            "linear_1": nn.Linear(config.text_dim, config.dim),
            "act": nn.SiLU(),
            "linear_2": nn.Linear(config.dim, config.dim),
        }
        self.c_embedder = nn.Sequential(OrderedDict(parts))
        self.blocks = nn.ModuleList(RefinerBlock(config) for _ in range(config.refiner_layers))

    def forward(self, states: Tensor) -> Tensor:
        prompt = self.time(torch.zeros(1)) + self.c_embedder(states.mean(1))
        x = self.input_embedder(states)
        for block in self.blocks:
            x = block(x, prompt)
        return x
