"""What several of these tests are made of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

State = dict[str, torch.Tensor]
SaveFolder = Callable[..., Path]


def to_diffusers(state: State) -> State:
    """Renamed by diffusers' own converter."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    converted: State = convert_wan_transformer_to_diffusers(dict(state))
    return converted


DIFFUSERS_CONFIG = {
    "_class_name": "WanTransformer3DModel",
    "attention_head_dim": 24,
    "num_attention_heads": 4,
    "num_layers": 3,
    "ffn_dim": 160,
    "freq_dim": 32,
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "text_dim": 40,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
    "image_dim": None,
    "added_kv_proj_dim": None,
    "eps": 1e-6,
}
