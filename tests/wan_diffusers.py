"""Small models of diffusers' own, and inputs for them."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from support import randomize
from torch import Tensor

SMALL: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 3,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 14,
    "freq_dim": 16,
    "ffn_dim": 44,
    "num_layers": 3,
    "eps": 1e-6,
}
IMAGE: dict[str, Any] = {"image_dim": 10, "added_kv_proj_dim": 36, "in_channels": 9}


def reference(kind: str = "WanTransformer3DModel", **changes: Any) -> Any:
    """A transformer of diffusers' own with random weights."""
    model = getattr(diffusers, kind)(**SMALL | changes).eval()
    randomize(model)
    return model


def inputs(channels: int = 4, frames: int = 5, text: int = 512) -> tuple[Tensor, Tensor, Tensor]:
    """Latents [2, C, F, 6, 10], timesteps [2], text [2, T, 14]."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, channels, frames, 6, 10, generator=generator)
    return latents, torch.tensor([625.0, 20.0]), torch.randn(2, text, 14, generator=generator)
