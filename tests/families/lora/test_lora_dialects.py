"""Names of LoRAs as trainers write them, and what files hold beside factors; each against the sum written longhand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lora_cases import DIM, MODULES, RANK, diffusers_name, plain
from safetensors.torch import save_file
from support import relative
from torch import Tensor

from mlaconvert.errors import CheckpointError, InputError
from mlaconvert.families.lora import LoraFile
from mlaconvert.families.merged import merge_loras, merged, remarks
from mlaconvert.families.open import open_checkpoint
from mlaconvert.families.source import Source


def block(module: str) -> str:
    """A module's name with dots in it and none after its block."""
    return module.replace("blocks.", "blocks_")


# A name of a module in each dialect; "down" dialects write lora_down and lora_up.
DIALECTS: dict[str, Any] = {
    "kohya": lambda m: f"lora_unet_{m.replace('.', '_')}.lora_down",
    "kohya, dots after the block": lambda m: f"lora_unet_{block(m)}.lora_down",
    "kohya, names of diffusers": lambda m: f"lora_unet_{diffusers_name(m).replace('.', '_')}.lora_down",
    "Wan-Fun": lambda m: f"lora_unet__{m.replace('.', '_')}.lora_down",
    "LyCORIS": lambda m: f"lycoris_{m.replace('.', '_')}.lora_down",
    "DiffSynth": lambda m: f"pipe.dit.{m}.lora_A.default",
    "UniAnimate-DiT": lambda m: f"pipe.dit.{m}.lora_A",
    "a trainer's dit": lambda m: f"dit.{m}.lora_A",
    "PEFT around a pipeline": lambda m: f"base_model.model.dit.{m}.lora_A.default",
    "ComfyUI": lambda m: f"diffusion_model.{m}.lora_down",
    "ComfyUI, whole": lambda m: f"model.diffusion_model.{m}.lora_down",
    "diffusers, old": lambda m: f"transformer.{diffusers_name(m)}.lora.down",
    "xlabs": lambda m: f"unet.{m}.lora_down",
}


@pytest.mark.parametrize("alpha", ["alpha", "lora_alpha", None])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_dialects_merge_to_the_longhand_sum(
    dialect: str, alpha: str | None, golden: Path, golden_state: dict[str, Tensor], tmp_path: Path, factors: Any
) -> None:
    state = {}
    for module, (a, b) in factors.items():
        down: str = DIALECTS[dialect](module)
        stem = down.rpartition(".lora_A" if down.endswith(".default") else ".")[0]
        state[f"{down}.weight"] = a
        up = down.replace("lora_down", "lora_up").replace("lora_A", "lora_B").replace("lora.down", "lora.up")
        state[f"{up}.weight"] = b
        if alpha is not None:
            state[f"{stem.removesuffix('.lora')}.{alpha}"] = torch.tensor(6.0)
    save_file(state, tmp_path / "some.safetensors")
    scaling = 1 if alpha is None else 6 / RANK
    with merge_loras(open_checkpoint(golden), [LoraFile(path=tmp_path / "some.safetensors")]) as checkpoint:
        assert merged(checkpoint)[0]["modules"] == len(MODULES)
        for name, before in golden_state.items():
            change = checkpoint.read(name).double() - before.double()
            if name.removesuffix(".weight") in factors:
                a, b = factors[name.removesuffix(".weight")]
                assert relative(change, scaling * (b.double() @ a.double())) < 1e-5, name
            else:
                assert not change.any(), name


@pytest.mark.parametrize(
    "pattern",
    ["blocks.1.ffn.0.lora_{}", "generator.model.blocks.1.ffn.0.lora_{}.weight", "blocks_1_ffn_0.lora_{}.fast"],
)
def test_names_that_leave_out_the_leaf(
    pattern: str, golden: Path, golden_state: dict[str, Tensor], tmp_path: Path, factors: Any
) -> None:
    name = "blocks.1.ffn.0"
    save_file(
        {pattern.format(part): t for part, t in zip("AB", factors[name], strict=True)}, tmp_path / "l.safetensors"
    )
    with open_checkpoint(Source(golden, loras=(LoraFile(path=tmp_path / "l.safetensors"),))) as checkpoint:
        change = checkpoint.read(f"{name}.weight").double() - golden_state[f"{name}.weight"].double()
    a, b = factors[name]
    assert relative(change, b.double() @ a.double()) < 1e-5


MODULATIONS = {
    "blocks.1.diff_m": "blocks.1.modulation",
    "blocks.1.modulation.diff": "blocks.1.modulation",
    "blocks.2.scale_shift_table.diff": "blocks.2.modulation",
    "head.diff_m": "head.modulation",
    "scale_shift_table.diff": "head.modulation",
}


@pytest.mark.parametrize("key", MODULATIONS)
def test_the_modulation_is_changed(key: str, golden: Path, golden_state: dict[str, Tensor], tmp_path: Path) -> None:
    before = golden_state[MODULATIONS[key]]
    diff = torch.randn(before.shape, generator=torch.Generator().manual_seed(4))
    save_file({f"diffusion_model.{key}": diff}, tmp_path / "m.safetensors")
    source = Source(golden, loras=(LoraFile(path=tmp_path / "m.safetensors", scale=0.5),))
    with open_checkpoint(source) as checkpoint:
        for name, tensor in golden_state.items():
            expected = tensor + 0.5 * diff if name == MODULATIONS[key] else tensor
            assert torch.allclose(checkpoint.read(name), expected, atol=1e-6), name
            assert checkpoint.is_stored(name) == (name != MODULATIONS[key])


def test_a_modulation_of_another_size_is_refused(golden: Path, tmp_path: Path) -> None:
    save_file({"blocks.0.diff_m": torch.ones(1, 5, DIM)}, tmp_path / "m.safetensors")
    with (
        open_checkpoint(golden) as checkpoint,
        pytest.raises(CheckpointError, match=r"diff_m' has shape \[1, 5, 96\] for 'blocks.0.modulation' .*\[1, 6, 96"),
    ):
        merge_loras(checkpoint, [LoraFile(path=tmp_path / "m.safetensors")])


def test_branches_that_the_model_has_not_are_left_out(
    golden: Path, golden_state: dict[str, Tensor], tmp_path: Path, factors: Any
) -> None:
    """A LoRA of Wan2.1's image-to-video on a model without CLIP image features, as every runtime takes it."""
    state = plain(factors, "diffusion_model.{module}.lora_{part}.weight")
    expected = {}
    for layer in range(3):
        for part in ("k_img", "v_img"):
            stem = f"diffusion_model.blocks.{layer}.cross_attn.{part}"
            state |= {f"{stem}.lora_A.weight": torch.ones(RANK, DIM), f"{stem}.lora_B.weight": torch.ones(DIM, RANK)}
        state[f"diffusion_model.blocks.{layer}.cross_attn.norm_k_img.diff"] = torch.ones(DIM)
    state["diffusion_model.img_emb.proj.1.diff_b"] = torch.ones(7)
    save_file(state, tmp_path / "i2v.safetensors")
    save_file(plain(factors, "diffusion_model.{module}.lora_{part}.weight"), tmp_path / "t2v.safetensors")
    for name in ("i2v", "t2v"):
        with merge_loras(open_checkpoint(golden), [LoraFile(path=tmp_path / f"{name}.safetensors")]) as checkpoint:
            expected[name] = {tensor: checkpoint.read(tensor) for tensor in golden_state}
            lines = remarks(checkpoint)
            said = "LoRA i2v.safetensors: 16 keys of branches that this model has not (k_img, norm_k_img, v_img, "
            assert (f"{said}img_emb) are left out" in lines) == (name == "i2v")
    assert all(torch.equal(expected["i2v"][name], expected["t2v"][name]) for name in golden_state)
    only = {key: tensor for key, tensor in state.items() if "_img" in key}
    save_file(only, tmp_path / "only.safetensors")
    with (
        open_checkpoint(golden) as opened,
        pytest.raises(CheckpointError, match="all of it is of branches that this model has not: k_img"),
    ):
        merge_loras(opened, [LoraFile(path=tmp_path / "only.safetensors")])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.float64])
def test_factors_of_any_float(
    dtype: torch.dtype, golden: Path, golden_state: dict[str, Tensor], tmp_path: Path, factors: Any
) -> None:
    small = {module: (a.to(dtype), b.to(dtype)) for module, (a, b) in factors.items()}
    save_file(plain(small, "{module}.lora_{part}.weight"), tmp_path / "small.safetensors")
    with merge_loras(open_checkpoint(golden), [LoraFile(path=tmp_path / "small.safetensors")]) as checkpoint:
        for module, (a, b) in small.items():
            change = checkpoint.read(f"{module}.weight").double() - golden_state[f"{module}.weight"].double()
            assert relative(change, b.double() @ a.double()) < 1e-5


KINDS = {
    "lora_unet_blocks_0_self_attn_q.oft_blocks": "an OFT",
    "lycoris_blocks_0_self_attn_q.b2.weight": "a GLoRA",
}


@pytest.mark.parametrize("key", KINDS)
def test_other_kinds_are_named_before_work_begins(key: str, golden: Path, tmp_path: Path, factors: Any) -> None:
    state = plain(factors, "diffusion_model.{module}.lora_{part}.weight") | {key: torch.ones(4, 4)}
    for name, tensors in (("beside", state), ("alone", {key: torch.ones(4, 4)})):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        with open_checkpoint(golden) as checkpoint, pytest.raises(InputError, match=f"it is {KINDS[key]}.*; merge it"):
            merge_loras(checkpoint, [LoraFile(path=tmp_path / f"{name}.safetensors")])
