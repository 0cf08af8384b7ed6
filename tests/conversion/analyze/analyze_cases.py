"""What several of these tests are made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.mla import MLAConfig, MLALayer
from mlaconvert.conversion.spectra import Analysis
from mlaconvert.reports.tables import analysis_table

CONFIG = WanConfig(dim=48, num_heads=4, num_layers=3, ffn_dim=52, freq_dim=10, text_dim=14)
LATENT = MLALayer(kv_lora_rank=7, qk_nope_head_dim=9, v_head_dim=11, rope_components=((0, 2), (3, 1)))


class Weights:
    """A checkpoint in memory that remembers what was read."""

    def __init__(self, config: WanConfig, tensors: Mapping[str, Tensor]) -> None:
        self.config, self.tensors, self.names = config, tensors, []
        self.store = SimpleNamespace(source="some$^$model/", path=Path("folder/some.safetensors"))

    def read(self, name: str) -> Tensor:
        self.names.append(name)
        return self.tensors[name]

    def info(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name=f"in_file.{name}")

    def describe(self) -> str:
        return "three small layers"


def decaying(rows: int, columns: int, decay: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.exp(-decay * torch.arange(columns))


def dense_weights(dtype: torch.dtype = torch.float32) -> Weights:
    tensors = {}
    for i in range(CONFIG.num_layers):
        tensors[f"blocks.{i}.self_attn.k.weight"] = decaying(48, 48, 0.05 * (i + 1), seed=i).to(dtype)
        tensors[f"blocks.{i}.self_attn.v.weight"] = (3 * decaying(48, 48, 0.11, seed=9 + i)).to(dtype)
    return Weights(CONFIG, tensors)


def mixed_weights(key_norm: str = "latent") -> Weights:
    """Layer 0 dense, the others MLA with different latents."""
    layers = (None, LATENT, dataclasses.replace(LATENT, kv_lora_rank=13))
    mla = MLAConfig(q_lora_rank=None, key_norm=key_norm, softmax_scale=0.25, layers=layers)
    tensors = dict(dense_weights().tensors)
    for i, layer in enumerate(layers[1:], start=1):
        rank, prefix = layer.kv_lora_rank, f"blocks.{i}.self_attn"
        # The rotary rows are huge: a spectrum that takes them in is far off.
        down = decaying(rank, 48, 0.02, seed=30 + i)
        tensors[f"{prefix}.kv_a_proj_with_mqa.weight"] = torch.cat((down, torch.full((6, 48), 1e3)))
        tensors[f"{prefix}.kv_b_proj.weight"] = decaying(4 * (9 + 11), rank, 0.01, seed=40 + i)
        if key_norm == "latent":
            tensors[f"{prefix}.kv_a_layernorm.weight"] = torch.linspace(2.0, 0.01, rank)
    return Weights(dataclasses.replace(CONFIG, mla=mla), tensors)


def shown(analysis: Analysis, table: Callable[[Analysis], Table] = analysis_table) -> str:
    console = Console(width=80)
    with console.capture() as captured:
        console.print(table(analysis))
    return captured.get()
