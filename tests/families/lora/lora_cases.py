"""What several of these tests are made of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mlaconvert.families.wan import WanFamily

RANK, DIM, FFN = 3, 96, 160  # the golden model's
# Canonical module -> (outputs, inputs) of those that the test's LoRA changes.
MODULES = {
    "blocks.0.self_attn.q": (DIM, DIM),
    "blocks.1.self_attn.o": (DIM, DIM),
    "blocks.2.cross_attn.v": (DIM, DIM),
    "blocks.1.ffn.0": (FFN, DIM),
    "blocks.2.ffn.2": (DIM, FFN),
}


def diffusers_name(module: str) -> str:
    return WanFamily().source(f"{module}.weight", "diffusers").removesuffix(".weight")


def plain(factors: Mapping[str, tuple[Tensor, Tensor]], pattern: str) -> dict[str, Tensor]:
    """Keys such as `pattern`, which names a module and its part (lora_A, lora_B)."""
    return {
        pattern.format(module=module, other=diffusers_name(module), flat=module.replace(".", "_"), part=part): tensor
        for module, pair_of in factors.items()
        for part, tensor in zip(("A", "B"), pair_of, strict=True)
    }


def write_peft(folder: Path, factors: Any) -> Path:
    file = folder / "adapter_model.safetensors"
    save_file(plain(factors, "base_model.model.{module}.lora_{part}.weight"), file)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 12, "alpha_pattern": {"ffn.0": 24}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return file


def write_diffusers(folder: Path, factors: Any) -> Path:
    file = folder / "pytorch_lora_weights.safetensors"
    metadata = {"transformer.lora_alpha": 12, "transformer.alpha_pattern": {}}
    state = plain(factors, "transformer.{other}.lora_{part}.weight")
    save_file(state, file, metadata={"lora_adapter_metadata": json.dumps(metadata)})
    return file


def write_comfy(folder: Path, factors: Any) -> Path:
    file = folder / "comfy.safetensors"
    state = plain(factors, "diffusion_model.{module}.lora_{part}.weight")
    state = {key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): t for key, t in state.items()}
    save_file(state | {f"diffusion_model.{m}.alpha": torch.tensor(1.5) for m in factors}, file)
    return file


def write_kohya(folder: Path, factors: Any) -> Path:
    file = folder / "kohya.safetensors"
    state = plain(factors, "lora_unet_{flat}.lora_{part}.weight")
    state = {key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): t for key, t in state.items()}
    save_file(state | {f"lora_unet_{m.replace('.', '_')}.alpha": torch.tensor(6.0) for m in factors}, file)
    return file
