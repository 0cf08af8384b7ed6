"""A converted layer drawn at random, for the paper's comparison of starts."""

from __future__ import annotations

import torch
from torch import Tensor

from mlaconvert.config.mla import MLAConfig, MLALayer
from mlaconvert.latent.factorize import Factors, exact_present, norms
from mlaconvert.latent.weights import AttentionWeights


def random_layer(
    weights: AttentionWeights,
    layer: MLALayer,
    *,
    num_heads: int,
    mla: MLAConfig,
    generator: torch.Generator,
) -> Factors:
    """Every new projection drawn from N(0, 1 / fan_in), biases zero; what the teacher shares stays the teacher's.

    Those are W_O where values stay as wide as the head, the query projection of the exact path, and the key norm.
    """
    w, q_lora_rank, rope = weights, mla.q_lora_rank, mla.rope
    dim, rank, rotary = w.q_weight.shape[0], layer.kv_lora_rank, layer.qk_rope_head_dim
    width, head_dim = layer.qk_nope_head_dim + rotary, dim // num_heads

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * shape[-1] ** -0.5

    def zeros(size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.float64)

    if q_lora_rank is None:
        query = {
            "q_a_proj.weight": w.q_weight,
            "q_a_proj.bias": w.q_bias,
            "q_a_layernorm.weight": w.norm_q,
            "q_b_proj.weight": draw(num_heads, width, head_dim),
        }
    else:
        query = {
            "q_a_proj.weight": draw(q_lora_rank, dim),
            "q_a_proj.bias": zeros(q_lora_rank),
            "q_a_layernorm.weight": zeros(q_lora_rank) + 1,
            "q_b_proj.weight": draw(num_heads * width, q_lora_rank),
        }
    same_width, cached = layer.v_head_dim == head_dim, rank + (rotary if rope == "cached" else 0)
    tensors = query | {
        "kv_a_proj_with_mqa.weight": draw(cached, dim),
        "kv_a_proj_with_mqa.bias": zeros(cached),
        "kv_b_proj.weight": draw(num_heads * (layer.qk_nope_head_dim + layer.v_head_dim), rank),
        "kv_b_proj.bias": zeros(num_heads * layer.qk_nope_head_dim),
        "o.weight": w.o_weight if same_width else draw(dim, num_heads * layer.v_head_dim),
        "o.bias": w.o_bias,
    }
    if rope == "latent" and rotary:
        tensors |= {"k_rope_proj.weight": draw(rotary, rank), "k_rope_proj.bias": zeros(rotary)}
    if mla.present == "exact":
        tensors["kv_b_proj.bias"] = zeros(num_heads * (layer.qk_nope_head_dim + layer.v_head_dim))
        tensors |= exact_present(w)
        if not same_width:
            tensors["past_out_proj.weight"] = draw(num_heads, head_dim, layer.v_head_dim)
        if rope == "head":
            del tensors["q_b_proj.weight"]
    return Factors(tensors=tensors | norms(w, mla.key_norm, rank), errors={})
