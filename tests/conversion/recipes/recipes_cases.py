"""What several of these tests are made of."""

from __future__ import annotations

from math import prod
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import cast

import torch

from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.families.checkpoint import Checkpoint
from mlaconvert.families.wan import WanFamily
from mlaconvert.files.headers import TensorInfo
from mlaconvert.files.store import TensorStore

WAN_1B = WanConfig(dim=1536, num_heads=12, num_layers=30, ffn_dim=8960)
TINY = WanConfig(
    dim=192,
    num_heads=6,
    num_layers=6,
    ffn_dim=352,
    in_dim=3,
    out_dim=3,
    freq_dim=64,
    text_dim=32,
    text_len=8,
    patch_size=(1, 4, 4),
    streaming=StreamingConfig(),
)


def shapes_only(config: WanConfig) -> Checkpoint:
    """A checkpoint of that geometry without a single weight."""
    family = WanFamily()
    shapes = family.expected_shapes(config)
    tensors = {name: TensorInfo(name, shape, torch.bfloat16, 2 * prod(shape)) for name, shape in shapes.items()}
    return Checkpoint(
        store=cast(TensorStore, SimpleNamespace(source="user/model", path=Path("model"), tensors=tensors)),
        family=family,
        config=config,
        raw_config=family.raw_config(config),
        layout="native",
        state_key=None,
        names=MappingProxyType({name: name for name in tensors}),
    )
