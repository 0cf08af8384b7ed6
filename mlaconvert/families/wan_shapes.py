"""The tensors of a Wan transformer: their native names and shapes, dense and converted."""

from __future__ import annotations

from math import prod

from mlaconvert.config.geometry import FPS_CHOICES, WanConfig
from mlaconvert.config.mla import MLAConfig, MLALayer

QUANTIZER = ("center", "slope", "gain")


def expected_shapes(config: WanConfig) -> dict[str, tuple[int, ...]]:
    """Native name -> shape, in module order; latent attention where `config.mla` has it."""
    d = config.dim
    shapes: dict[str, tuple[int, ...]] = {"patch_embedding.weight": (d, config.in_dim, *config.patch_size)}
    shapes["patch_embedding.bias"] = (d,)
    _linear(shapes, "text_embedding.0", d, config.text_dim)
    _linear(shapes, "text_embedding.2", d, d)
    _linear(shapes, "time_embedding.0", d, config.freq_dim)
    _linear(shapes, "time_embedding.2", d, d)
    _linear(shapes, "time_projection.1", 6 * d, d)
    if config.fps is not None:
        shapes["fps_embedding.weight"] = (FPS_CHOICES, d)
        _linear(shapes, "fps_projection.0", d, d)
        _linear(shapes, "fps_projection.2", 6 * d, d)
    if config.reference_dim is not None:
        shapes["ref_conv.weight"] = (d, config.reference_dim, *config.patch_size[1:])
        shapes["ref_conv.bias"] = (d,)
    for i in range(config.num_layers):
        block = f"blocks.{i}."
        shapes[block + "modulation"] = (1, 6, d)
        layer = config.mla.layers[i] if config.mla is not None else None
        if config.mla is None or layer is None:
            _dense_attention(shapes, block + "self_attn.", d)
        else:
            _latent_attention(shapes, block + "self_attn.", config, config.mla, layer)
        _dense_attention(shapes, block + "cross_attn.", d)
        if config.image_dim is not None:
            _linear(shapes, block + "cross_attn.k_img", d, d)
            _linear(shapes, block + "cross_attn.v_img", d, d)
            shapes[block + "cross_attn.norm_k_img.weight"] = (d,)
        if config.cross_attn_norm:
            _layer_norm(shapes, block + "norm3", d)
        _linear(shapes, block + "ffn.0", config.ffn_dim, d)
        _linear(shapes, block + "ffn.2", d, config.ffn_dim)
    shapes["head.modulation"] = (1, 2, d)
    _linear(shapes, "head.head", config.out_dim * prod(config.patch_size), d)
    if config.image_dim is not None:
        _layer_norm(shapes, "img_emb.proj.0", config.image_dim)
        _linear(shapes, "img_emb.proj.1", config.image_dim, config.image_dim)
        _linear(shapes, "img_emb.proj.3", d, config.image_dim)
        _layer_norm(shapes, "img_emb.proj.4", d)
    return shapes


def _linear(shapes: dict[str, tuple[int, ...]], name: str, rows: int, columns: int) -> None:
    shapes[f"{name}.weight"] = (rows, columns)
    shapes[f"{name}.bias"] = (rows,)


def _layer_norm(shapes: dict[str, tuple[int, ...]], name: str, width: int) -> None:
    shapes[f"{name}.weight"] = (width,)
    shapes[f"{name}.bias"] = (width,)


def _dense_attention(shapes: dict[str, tuple[int, ...]], prefix: str, dim: int) -> None:
    for name in ("q", "k", "v", "o"):
        _linear(shapes, prefix + name, dim, dim)
    shapes[prefix + "norm_q.weight"] = (dim,)
    shapes[prefix + "norm_k.weight"] = (dim,)


def _latent_attention(
    shapes: dict[str, tuple[int, ...]], prefix: str, config: WanConfig, mla: MLAConfig, layer: MLALayer
) -> None:
    """The converted layer's tensors; rows of kv_a: latent, cached rotary; of kv_b, per head: content key, value."""
    d, heads = config.dim, config.num_heads
    nope, rope, value, rank = layer.qk_nope_head_dim, layer.qk_rope_head_dim, layer.v_head_dim, layer.kv_lora_rank
    query_rank = mla.q_lora_rank or d
    _linear(shapes, prefix + "q_a_proj", query_rank, d)
    shapes[prefix + "q_a_layernorm.weight"] = (query_rank,)
    exact_present = mla.present == "exact"
    if mla.q_lora_rank is not None:
        shapes[prefix + "q_b_proj.weight"] = (heads * (nope + rope), query_rank)
    elif mla.past_queries:
        shapes[prefix + "q_b_proj.weight"] = (heads, nope + rope, config.head_dim)
    _linear(shapes, prefix + "kv_a_proj_with_mqa", rank + mla.cached_rope(layer), d)
    if mla.rope == "latent" and rope:
        _linear(shapes, prefix + "k_rope_proj", rope, rank)
    if mla.key_norm == "latent":
        shapes[prefix + "kv_a_layernorm.weight"] = (rank,)
    if mla.key_norm == "token" or exact_present:
        _linear(shapes, prefix + "k_norm_proj", d, d)
    if exact_present:
        shapes[prefix + "k_norm.weight"] = (d,)
        _linear(shapes, prefix + "v_proj", d, d)
        if value < config.head_dim:
            shapes[prefix + "past_out_proj.weight"] = (heads, config.head_dim, value)
    if layer.cache_bits:
        for leaf in QUANTIZER:
            shapes[f"{prefix}kv_quantizer.{leaf}"] = (sum(count for _, count in layer.cache_bits),)
    shapes[prefix + "kv_b_proj.weight"] = (heads * (nope + value), rank)
    shapes[prefix + "kv_b_proj.bias"] = (heads * (nope + value if exact_present else nope),)
    shapes[prefix + "o.weight"] = (d, d if exact_present else heads * value)
    shapes[prefix + "o.bias"] = (d,)
