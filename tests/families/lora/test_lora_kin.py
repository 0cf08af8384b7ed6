"""DoRA, LoKr and LoHa: merged as PEFT merges what it saved, and as the products of LyCORIS's files written longhand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lora_cases import DIM, FFN
from safetensors.torch import load_file, save_file
from support import relative
from torch import Tensor

from mlaconvert.families.lora import LoraFile
from mlaconvert.families.merged import merge_loras, merged
from mlaconvert.families.open import open_checkpoint
from mlaconvert.model.load import load_model

TARGETS = ["blocks.0.self_attn.q", "blocks.1.self_attn.o", "blocks.1.ffn.0", "blocks.2.ffn.2"]
PEFT: dict[str, Any] = {
    "DoRA": peft.LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=TARGETS),
    "DoRA, rank-stabilised": peft.LoraConfig(r=3, lora_alpha=5, use_dora=True, use_rslora=True, target_modules=TARGETS),
    "LoHa": peft.LoHaConfig(r=3, alpha=5, target_modules=TARGETS, alpha_pattern={"ffn.0": 7}),
    "LoKr": peft.LoKrConfig(r=3, alpha=5, target_modules=TARGETS, decompose_factor=4),
    "LoKr, both factors": peft.LoKrConfig(
        r=2, alpha=5, target_modules=TARGETS, decompose_both=True, rank_pattern={"ffn.2": 3}
    ),
    "LoKr, whole matrices": peft.LoKrConfig(r=40, alpha=5, target_modules=TARGETS, decompose_factor=4),
}


@pytest.mark.parametrize("kind", PEFT)
def test_what_peft_saved_is_merged_as_peft_merges_it(
    kind: str, golden: Path, golden_state: dict[str, Tensor], tmp_path: Path
) -> None:
    model = load_model(golden, dtype=torch.float64)
    adapted = peft.get_peft_model(model, PEFT[kind])
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(parameter * (1 + 0.3 * draw) if "magnitude" in name else 0.3 * draw)
    adapted.save_pretrained(str(tmp_path))
    expected = adapted.merge_and_unload().state_dict()
    with merge_loras(open_checkpoint(golden), [LoraFile(path=tmp_path / "adapter_model.safetensors")]) as checkpoint:
        (record,) = merged(checkpoint)
        assert (record["alpha"], record["modules"]) == ("config", len(TARGETS))
        for name, before in golden_state.items():
            after = checkpoint.read(name)
            if name.removesuffix(".weight") in TARGETS:
                assert relative(after.double() - before.double(), expected[name] - before.double()) < 1e-4, name
            else:
                assert torch.equal(after, before), name


G = torch.Generator().manual_seed(6)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=G, dtype=torch.float64) * 0.2


def kron(a: Tensor, b: Tensor) -> Tensor:
    """Longhand: block (i, j) is a[i, j] times b."""
    return torch.cat([torch.cat([a[i, j] * b for j in range(a.shape[1])], 1) for i in range(a.shape[0])])


LOHA = {"hada_w1_a": draw(FFN, 3), "hada_w1_b": draw(3, DIM), "hada_w2_a": draw(FFN, 3), "hada_w2_b": draw(3, DIM)}
W1, W2 = draw(5, 4), draw(32, 24)
SPLIT = {"lokr_w1": draw(5, 4), "lokr_w2_a": draw(32, 3), "lokr_w2_b": draw(3, 24)}
BOTH = {"lokr_w1_a": draw(8, 3), "lokr_w1_b": draw(3, 6), "lokr_w2_a": draw(20, 3), "lokr_w2_b": draw(3, 16)}
LORA = {"lora_up.weight": draw(FFN, 3), "lora_down.weight": draw(3, DIM)}
ROWS, COLUMNS = draw(FFN, 1).abs() + 0.5, draw(1, DIM).abs() + 0.5
# What a file has of one module [FFN, DIM], and its change before any magnitudes, for alpha 1.5 of rank 3.
LYCORIS: dict[str, tuple[dict[str, Tensor], Tensor]] = {
    "LoHa": (LOHA, 0.5 * (LOHA["hada_w1_a"] @ LOHA["hada_w1_b"]) * (LOHA["hada_w2_a"] @ LOHA["hada_w2_b"])),
    "LoKr": (SPLIT, 0.5 * kron(SPLIT["lokr_w1"], SPLIT["lokr_w2_a"] @ SPLIT["lokr_w2_b"])),
    "LoKr of four": (
        BOTH, 0.5 * kron(BOTH["lokr_w1_a"] @ BOTH["lokr_w1_b"], BOTH["lokr_w2_a"] @ BOTH["lokr_w2_b"]),
    ),
    "LoKr of whole matrices, which no alpha scales": ({"lokr_w1": W1, "lokr_w2": W2}, kron(W1, W2)),
    "LoRA": (LORA, 0.5 * LORA["lora_up.weight"] @ LORA["lora_down.weight"]),
}  # fmt: skip


@pytest.mark.parametrize("scale", [1.0, -0.7])
@pytest.mark.parametrize("magnitude", [None, ROWS, COLUMNS], ids=["plain", "outputs", "inputs"])
@pytest.mark.parametrize("prefix", ["lycoris_blocks_1_ffn_0", "diffusion_model.blocks.1.ffn.0"])
@pytest.mark.parametrize("kind", LYCORIS)
def test_what_lycoris_saved_is_the_longhand_product(
    kind: str,
    prefix: str,
    magnitude: Tensor | None,
    scale: float,
    golden: Path,
    golden_state: dict[str, Tensor],
    tmp_path: Path,
) -> None:
    held, change = LYCORIS[kind]
    state = {f"{prefix}.{part}": tensor.float().contiguous() for part, tensor in held.items()}
    state[f"{prefix}.alpha"] = torch.tensor(1.5)
    before = golden_state["blocks.1.ffn.0.weight"].double()
    expected = before + change
    if magnitude is not None:
        state[f"{prefix}.dora_scale"] = magnitude.float()
        lengths = [torch.stack([part.square().sum().sqrt() for part in expected.unbind(axis)]) for axis in (0, 1)]
        expected = expected / (lengths[0][:, None] if magnitude is ROWS else lengths[1]) * magnitude
    save_file(state, tmp_path / "kin.safetensors")
    with merge_loras(open_checkpoint(golden), [LoraFile(path=tmp_path / "kin.safetensors", scale=scale)]) as checkpoint:
        after = checkpoint.read("blocks.1.ffn.0.weight")
    assert after.dtype == golden_state["blocks.1.ffn.0.weight"].dtype
    assert relative(after, before + scale * (expected - before)) < 1e-5


def test_a_convolution_in_tucker_form(golden: Path, golden_state: dict[str, Tensor], tmp_path: Path) -> None:
    """The patch embedding [96, 16, 1, 2, 2], each element a sum over the core."""
    t, a, b = draw(3, 2, 1, 2, 2), draw(3, DIM), draw(2, 16)
    core = torch.stack([sum(t[i, j] * a[i, o] * b[j, c] for i in range(3) for j in range(2))  # type: ignore[misc]
                        for o in range(DIM) for c in range(16)]).view(DIM, 16, 1, 2, 2)  # fmt: skip
    one = torch.ones(1, 1)
    parts = {"lokr_w1": one, "lokr_t2": t, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(2.0)}
    state = {f"lycoris_patch_embedding.{part}": tensor.float() for part, tensor in parts.items()}
    magnitude = torch.rand(1, DIM, 1, 1, 1, generator=G) + 0.5
    for name, more in (("plain", {}), ("dora", {"lycoris_patch_embedding.dora_scale": magnitude})):
        save_file(state | more, tmp_path / f"{name}.safetensors")
        with merge_loras(open_checkpoint(golden), [LoraFile(path=tmp_path / f"{name}.safetensors")]) as checkpoint:
            after = checkpoint.read("patch_embedding.weight")
        expected = golden_state["patch_embedding.weight"].double() + core  # alpha / r is one
        if more:
            expected *= (magnitude.flatten() / expected.flatten(1).norm(dim=1)).view(DIM, 1, 1, 1, 1)
        assert relative(after, expected) < 1e-5, name


def test_peft_without_its_configuration(golden: Path, tmp_path: Path) -> None:
    save_file({f"base_model.model.blocks.1.ffn.0.{part}": tensor.float() for part, tensor in SPLIT.items()},
              tmp_path / "adapter_model.safetensors")  # fmt: skip
    from mlaconvert.errors import CheckpointError

    for config, says in (
        (None, "adapter_config.json is missing beside it"),
        ('{"peft_type": "LORA", "lora_alpha": 4, "r": 3}', "it is of 'LORA', not of LOKR"),
        ('{"peft_type": "LOKR", "r": 3}', "it has no alpha"),
        ('{"peft_type": "LOKR", "r": 4, "alpha": 2}', "its r is 4, and .* has rank 3"),
    ):
        if config is not None:
            (tmp_path / "adapter_config.json").write_text(config)
        with open_checkpoint(golden) as checkpoint, pytest.raises(CheckpointError, match=says):
            merge_loras(checkpoint, [LoraFile(path=tmp_path / "adapter_model.safetensors")])
    assert load_file(tmp_path / "adapter_model.safetensors")
