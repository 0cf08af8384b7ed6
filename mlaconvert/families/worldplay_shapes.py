"""The tensors of HY-WorldPlay's transformer: their canonical names and shapes, dense and converted."""

from __future__ import annotations

from math import prod

from mlaconvert.config.camera import CameraConfig
from mlaconvert.config.mla import MLALayer

Shapes = dict[str, tuple[int, ...]]


def expected_shapes(config: CameraConfig) -> Shapes:
    """Canonical name -> shape, in module order; latent attention where `config.mla` has it."""
    d, shapes = config.dim, Shapes()

    def linear(name: str, rows: int, columns: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (rows, columns), (rows,)

    def layer_norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (width,), (width,)

    def attention(name: str) -> None:
        for part in "qkvo":
            linear(f"{name}.{part}", d, d)
        shapes[f"{name}.norm_q.weight"] = shapes[f"{name}.norm_k.weight"] = (config.head_dim,)

    def latent(name: str, layer: MLALayer) -> None:
        """Rows of kv_b by head: key, value."""
        for part in ("q_a_proj", "k_norm_proj", "v_proj", "o"):
            linear(f"{name}.{part}", d, d)
        shapes[f"{name}.q_a_layernorm.weight"] = shapes[f"{name}.k_norm.weight"] = (config.head_dim,)
        linear(f"{name}.kv_a_proj_with_mqa", layer.kv_lora_rank, d)
        linear(f"{name}.kv_b_proj", 2 * d, layer.kv_lora_rank)

    def embedding(name: str) -> None:
        linear(f"{name}.0", d, config.freq_dim)
        linear(f"{name}.2", d, d)

    shapes["patch_embedding.weight"] = (d, config.in_dim, *config.patch_size)
    shapes["patch_embedding.bias"] = (d,)
    embedding("time_embedding")
    embedding("action_embedding")
    linear("text_embedding.input_embedder", d, config.text_dim)
    embedding("text_embedding.time")
    linear("text_embedding.c_embedder.linear_1", d, config.text_dim)
    linear("text_embedding.c_embedder.linear_2", d, d)
    for i in range(config.refiner_layers):
        block = f"text_embedding.blocks.{i}."
        layer_norm(block + "norm1", d)
        linear(block + "self_attn_qkv", 3 * d, d)
        linear(block + "self_attn_proj", d, d)
        layer_norm(block + "norm2", d)
        linear(block + "mlp.fc1", config.refiner_dim, d)
        linear(block + "mlp.fc2", d, config.refiner_dim)
        linear(block + "adaLN_modulation.1", 2 * d, d)
    if config.glyph_dims is not None:
        width, hidden, outer = config.glyph_dims
        layer_norm("glyph_embedding.layernorm", width)
        linear("glyph_embedding.fc1", hidden, width)
        linear("glyph_embedding.fc2", outer, hidden)
        linear("glyph_embedding.fc3", d, outer)
    if config.image_dim is not None:
        layer_norm("img_emb.proj.0", config.image_dim)
        linear("img_emb.proj.1", config.image_dim, config.image_dim)
        linear("img_emb.proj.3", d, config.image_dim)
        layer_norm("img_emb.proj.4", d)
    if config.token_types:
        shapes["type_embedding.weight"] = (3, d)
    for i in range(config.num_layers):
        block, layer = f"blocks.{i}.", config.mla.layers[i] if config.mla is not None else None
        linear(block + "modulation", 6 * d, d)
        if layer is None:
            attention(block + "self_attn")
        else:
            latent(block + "self_attn", layer)
        linear(block + "camera_o", d, d)
        linear(block + "ffn.0", config.ffn_dim, d)
        linear(block + "ffn.2", d, config.ffn_dim)
        linear(block + "text_modulation", 6 * d, d)
        attention(block + "text_attn")
        linear(block + "text_ffn.0", config.ffn_dim, d)
        linear(block + "text_ffn.2", d, config.ffn_dim)
    linear("head.modulation", 2 * d, d)
    linear("head.head", config.out_dim * prod(config.patch_size), d)
    return shapes
