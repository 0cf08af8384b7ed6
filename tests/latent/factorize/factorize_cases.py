"""What several of these tests are made of."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.mla import KeyNorm, MLAConfig, MLALayer, RopeMode
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.latent.factorize import Factors, factorize_layer
from mlaconvert.latent.moments import LayerMoments, modulation_moments
from mlaconvert.latent.pairs import mean_rotation
from mlaconvert.latent.weights import AttentionWeights
from mlaconvert.model.attention.kernel import AttentionPlan
from mlaconvert.model.attention.latent import LatentAttention
from mlaconvert.model.rope import rotary
from mlaconvert.model.window import full_window

HEADS, WIDTH, EPS = 5, 12, 1e-6
DIM = HEADS * WIDTH
CONFIG = WanConfig(dim=DIM, num_heads=HEADS, num_layers=1, ffn_dim=8)
SPLIT = CONFIG.rope_split
GRID = (4, 2, 3)  # frames, height, width in tokens
EXACT = 1e-12


def make_weights(seed: int = 0) -> AttentionWeights:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64) * 0.3

    square = {f"{name}_weight": draw(DIM, DIM) for name in "qkvo"}
    bias = {f"{name}_bias": draw(DIM) for name in "qkvo"}
    return AttentionWeights(**square, **bias, norm_q=1 + draw(DIM), norm_k=1 + draw(DIM))


def make_modulation() -> Tensor:
    return torch.randn(3, 2, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.4


def make_inputs(batch: int = 2) -> Tensor:
    g = torch.Generator().manual_seed(2)
    x = torch.randn(batch, GRID[0] * GRID[1] * GRID[2], DIM, generator=g, dtype=torch.float64)
    x = torch.nn.functional.layer_norm(x, (DIM,))
    shift, scale = make_modulation()[0]
    return x * (1 + scale) + shift


def moments(weights: AttentionWeights) -> LayerMoments:
    queries, keys = full_window(StreamingConfig(), GRID[0])
    rho = mean_rotation(SPLIT, queries=queries, keys=keys, height=GRID[1], width=GRID[2])
    return modulation_moments(weights, make_modulation(), num_heads=HEADS, eps=EPS, rho=rho)


def run(
    factors: Factors,
    layer: MLALayer,
    key_norm: KeyNorm,
    q_rank: int | None,
    x: Tensor,
    mode: Any,
    rope: RopeMode = "cached",
) -> Tensor:
    mla = MLAConfig(
        q_lora_rank=q_rank,
        key_norm=key_norm,
        softmax_scale=WIDTH**-0.5,
        layers=(layer,),
        rope=rope,
    )
    with torch.device("meta"):
        module = LatentAttention(dataclasses.replace(CONFIG, mla=mla), mla, layer)
    module.load_state_dict(factors.tensors, strict=True, assign=True)
    turn = rotary(torch.arange(GRID[0]), GRID[1], GRID[2], SPLIT, torch.float64)
    with torch.no_grad():
        return module(x, AttentionPlan(query_rotary=turn, key_rotary=turn, mode=mode))


def convert(
    weights: AttentionWeights,
    layer: MLALayer,
    key_norm: KeyNorm = "token",
    q_rank: int | None = None,
    rope: RopeMode = "cached",
) -> Factors:
    return factorize_layer(
        weights,
        layer,
        moments(weights),
        num_heads=HEADS,
        mla=MLAConfig(key_norm=key_norm, q_lora_rank=q_rank, rope=rope, softmax_scale=1.0, layers=()),
    )


def lossy(**change: Any) -> MLALayer:
    layer = MLALayer(kv_lora_rank=17, qk_nope_head_dim=8, v_head_dim=WIDTH, rope_components=((0, 2), (3, 1)))
    return dataclasses.replace(layer, **change)
