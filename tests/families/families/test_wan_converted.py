"""Recognising checkpoints: names, geometry, wrappers, and refusals by name.

Names and shapes are compared with diffusers' own model and converter; sizes with the published models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families_cases import DIFFUSERS_CONFIG, SaveFolder, State, to_diffusers

from mlaconvert.config.mla import MLAConfig, MLALayer
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.errors import CheckpointError, ConfigError, InputError, UnsupportedModelError
from mlaconvert.families.open import open_checkpoint
from mlaconvert.families.source import Source

MLA_CASES = {
    # H = 4 heads of 24, D = 96; layer 1: rank 10, nope 11, value 7, pairs 0 (twice), 4, 9 -> 8 rotary scalars.
    "latent": (
        MLAConfig(
            q_lora_rank=20,
            key_norm="latent",
            softmax_scale=0.2,
            layers=(
                None,
                MLALayer(kv_lora_rank=10, qk_nope_head_dim=11, v_head_dim=7, rope_components=((0, 2), (4, 1), (9, 1))),
                None,
            ),
        ),
        {
            "q_a_proj.weight": (20, 96),
            "q_a_proj.bias": (20,),
            "q_a_layernorm.weight": (20,),
            "q_b_proj.weight": (4 * 19, 20),
            "kv_a_proj_with_mqa.weight": (18, 96),
            "kv_a_proj_with_mqa.bias": (18,),
            "kv_a_layernorm.weight": (10,),
            "kv_b_proj.weight": (4 * 18, 10),
            "kv_b_proj.bias": (44,),
            "o.weight": (96, 28),
            "o.bias": (96,),
        },
    ),
    "token": (
        MLAConfig(
            q_lora_rank=None,
            key_norm="token",
            softmax_scale=0.2,
            calibration={"regime": "streaming"},
            layers=(
                None,
                MLALayer(kv_lora_rank=13, qk_nope_head_dim=0, v_head_dim=24, rope_components=((2, 3),)),
                None,
            ),
        ),
        {
            "q_a_proj.weight": (96, 96),
            "q_a_proj.bias": (96,),
            "q_a_layernorm.weight": (96,),
            "q_b_proj.weight": (4, 6, 24),
            "kv_a_proj_with_mqa.weight": (19, 96),
            "kv_a_proj_with_mqa.bias": (19,),
            "k_norm_proj.weight": (96, 96),
            "k_norm_proj.bias": (96,),
            "kv_b_proj.weight": (96, 13),
            "kv_b_proj.bias": (0,),
            "o.weight": (96, 96),
            "o.bias": (96,),
        },
    ),
}


@pytest.mark.parametrize("layout", ["native", "diffusers"])
@pytest.mark.parametrize("case", MLA_CASES)
def test_reads_its_own_converted_folders(
    case: str, layout: str, golden_state: State, golden_config: dict[str, Any], save_folder: SaveFolder
) -> None:
    mla, shapes = MLA_CASES[case]
    state = {name: t for name, t in golden_state.items() if not name.startswith("blocks.1.self_attn.")}
    state |= {f"blocks.1.self_attn.{name}": torch.full(shape, 0.5) for name, shape in shapes.items()}
    if layout == "diffusers":
        state = to_diffusers(state)
        assert "blocks.1.attn1.kv_b_proj.weight" in state
    base = golden_config if layout == "native" else DIFFUSERS_CONFIG
    raw = base | {"mla": mla.to_json(), "streaming": {"window_frames": 6}}
    with open_checkpoint(save_folder(state, raw)) as opened:
        assert opened.layout == layout
        assert opened.config.mla == mla
        assert opened.config.streaming == StreamingConfig(window_frames=6)
        assert {opened.output_name(name) for name in opened.names} == set(state)
        assert opened.describe().endswith("streaming, 1 MLA layers")
        opened.attention(0)
        with pytest.raises(UnsupportedModelError, match="layer 1 has no dense self-attention"):
            opened.attention(1)
    del state["blocks.1.self_attn.kv_b_proj.bias" if layout == "native" else "blocks.1.attn1.kv_b_proj.bias"]
    with pytest.raises(UnsupportedModelError, match=r"1 tensor .* missing: blocks.1.self_attn.kv_b_proj.bias"):
        open_checkpoint(save_folder(state, raw, "damaged"))


def test_other_families_are_refused_by_their_tensors(tmp_path: Path) -> None:
    import diffusers

    with torch.device("meta"):
        models = {
            "HunyuanVideo": diffusers.HunyuanVideoTransformer3DModel(
                num_layers=1, num_single_layers=1, num_refiner_layers=1
            ),
            "LTX-Video": diffusers.LTXVideoTransformer3DModel(num_layers=1),
            "CogVideoX": diffusers.CogVideoXTransformer3DModel(num_layers=1),
            "Mochi": diffusers.MochiTransformer3DModel(num_layers=1),
            "a VAE": diffusers.AutoencoderKLWan(base_dim=4),
        }
    for name, model in models.items():
        file = tmp_path / f"{type(model).__name__}.pt"
        torch.save({key: torch.zeros(1) for key in model.state_dict()}, file)
        with pytest.raises(UnsupportedModelError, match=rf"{file.name}: this is {name}"):
            open_checkpoint(file)
        # By class name too, whatever the tensors are called.
        torch.save({"x.weight": torch.zeros(1)}, tmp_path / "plain.pt")
        (tmp_path / "c.json").write_text(json.dumps({"_class_name": type(model).__name__}))
        with pytest.raises(UnsupportedModelError, match=r"this is|family is not known"):
            open_checkpoint(Source(tmp_path / "plain.pt", config=tmp_path / "c.json"))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["double_blocks.0.img_attn_qkv.weight"], "this is HunyuanVideo"),
        (["double_blocks.0.img_attn_q.weight"], "this is HunyuanVideo"),  # 1.5, and HY-WorldPlay
        (
            ["double_blocks.0.img_attn.qkv.weight", "txt_in.individual_token_refiner.blocks.0.norm1.weight"],
            "this is HunyuanVideo .*; give HY-WorldPlay's autoregressive model",
        ),  # ComfyUI's names, of which Flux has the first
        (
            ["double_blocks.0.img_attn.qkv.weight", "img_in.weight"],
            r"not known; .* of Wan \(patch_embedding\.weight, .* or HY-WorldPlay \(img_in\.proj\.weight, \.\.\.\)",
        ),
        (["patchify_proj.weight", "transformer_blocks.0.attn1.to_q.weight"], "this is LTX-Video"),
        (["blocks.0.self_attn.q.lora_A.weight"], "this is a LoRA .* merge it into its model first"),
        (["lora_unet_blocks_0_self_attn_q.lora_down.weight"], "this is a LoRA"),
        (["token_embedding.weight", "blocks.0.attn.q.weight"], "this is a text encoder"),
        (["encoder.block.0.layer.0.SelfAttention.q.weight"], "this is a text encoder"),
        (["decoder.middle.0.residual.0.gamma", "encoder.conv1.weight"], "this is a VAE"),
        (
            ["layers.0.weight", "layers.1.weight", "layers.2.weight", "x"],
            r"not known; found layers\.0\.weight, .*\.\.\.",
        ),
    ],
)
def test_files_that_are_no_transformer(names: list[str], message: str, tmp_path: Path) -> None:
    torch.save({"model": {name: torch.zeros(2) for name in names}}, tmp_path / "x.pt")
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        open_checkpoint(tmp_path / "x.pt")
    assert str(tmp_path / "x.pt") in str(caught.value)


Q, K, V = (f"blocks.1.self_attn.{name}.weight" for name in "qkv")


def drop(*names: str) -> Callable[[State], None]:
    return lambda state: [state.pop(name) for name in names] and None


def put(name: str, tensor: torch.Tensor) -> Callable[[State], None]:
    return lambda state: state.update({name: tensor})


def keep(_: State) -> None:
    pass


BAD_MODELS: dict[str, tuple[Callable[[State], None], dict[str, Any], type[InputError], str]] = {
    "missing": (drop(Q, K), {}, UnsupportedModelError, rf"2 tensors of a Wan model are missing: {Q}, {K}$"),
    "a layer missing": (
        lambda s: [s.pop(n) for n in list(s) if n.startswith("blocks.1.")] and None,
        {},
        CheckpointError,
        "says num_layers 3, the weights have 2 layers",
    ),
    "num_layers": (keep, {"num_layers": 10**9}, CheckpointError, "num_layers 1000000000, the weights have 3"),
    "unexpected": (put("blocks.0.norm2.weight", torch.ones(1)), {}, UnsupportedModelError, "1 tensor is not part"),
    "no patch embedding bias": (drop("patch_embedding.bias"), {}, UnsupportedModelError, "1 tensor .* patch_embed"),
    "no head": (drop("head.head.weight"), {}, UnsupportedModelError, "'head.head.weight' is missing"),
    "scalar": (put("head.head.weight", torch.tensor(1.0)), {}, UnsupportedModelError, r"'head.head.weight' is \[\]"),
    "shape": (
        put("blocks.2.ffn.0.bias", torch.ones(161)),
        {},
        UnsupportedModelError,
        r"'blocks.2.ffn.0.bias' has shape \[161\], expected \[160\]",
    ),
    "transposed": (
        put("blocks.0.ffn.2.weight", torch.ones(160, 96)),
        {},
        UnsupportedModelError,
        r"expected \[96, 160\]",
    ),
    "config disagrees": (keep, {"ffn_dim": 170}, UnsupportedModelError, r"\[160, 96\], expected \[170, 96\]"),
    "integer": (put(Q, torch.ones(96, 96, dtype=torch.int8)), {}, UnsupportedModelError, f"{Q}' is torch.int8"),
    "complex": (put(Q, torch.ones(96, 96, dtype=torch.complex64)), {}, UnsupportedModelError, "torch.complex64"),
    "grouped queries": (put(K, torch.ones(48, 96)), {}, UnsupportedModelError, rf"{K}' has 48 rows for 96 .*grouped"),
    "norm per head": (
        put("blocks.0.self_attn.norm_q.weight", torch.ones(24)),
        {},
        UnsupportedModelError,
        r"norm_q.weight' norms each head \(24 channels\)",
    ),
    "qk_norm": (keep, {"qk_norm": "rms_norm"}, UnsupportedModelError, "qk_norm 'rms_norm'; expected RMSNorm across"),
    "no qk_norm": (keep, {"qk_norm": False}, UnsupportedModelError, "qk_norm False"),
    "local window": (keep, {"window_size": [4, 4]}, UnsupportedModelError, r"window_size \[4, 4\]"),
    "vace": (keep, {"model_type": "vace"}, UnsupportedModelError, "model_type 'vace', and the weights have none"),
    "flf2v": (keep, {"model_type": "flf2v"}, UnsupportedModelError, "model_type 'flf2v', and the weights"),
    "class name": (keep, {"_class_name": "LTXVideoTransformer3DModel"}, UnsupportedModelError, "this is LTX-Video"),
    "heads": (keep, {"num_heads": 7}, ConfigError, "dim 96 does not split into 7 heads"),
    "text for a number": (
        keep,
        {"num_heads": "many"},
        ConfigError,
        'config.json: num_heads is "many": give a whole number',
    ),
    "window_size of a wrong type": (keep, {"window_size": 4}, UnsupportedModelError, "window_size 4"),
    "eps": (keep, {"eps": -1}, ConfigError, "eps is -1"),
    "streaming": (keep, {"streaming": {"window": 3}}, ConfigError, "unknown field 'window'"),
    "mla": (keep, {"mla": {"format_version": 9}}, ConfigError, "format_version is 9"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_bad_models(case: str, golden_state: State, golden_config: dict[str, Any], save_folder: SaveFolder) -> None:
    change, extra, error, message = BAD_MODELS[case]
    change(golden_state)
    folder = save_folder(golden_state, golden_config | extra)
    with pytest.raises(error, match=message) as caught:
        open_checkpoint(folder)
    assert type(caught.value) is error
    assert str(folder) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_diffusers_width_is_heads_times_head_width(golden_state: State, save_folder: SaveFolder) -> None:
    folder = save_folder(to_diffusers(golden_state), DIFFUSERS_CONFIG | {"attention_head_dim": 32})
    with pytest.raises(UnsupportedModelError, match=r"'patch_embedding.weight' has shape \[96, .*expected \[128, "):
        open_checkpoint(folder)


def test_unexpected_diffusers_names_are_not_lost(golden_state: State, save_folder: SaveFolder) -> None:
    state = to_diffusers(golden_state)
    state["blocks.0.norm3.weight"] = torch.ones(96)  # native name of a norm, which diffusers calls norm2
    with pytest.raises(UnsupportedModelError, match=r"1 tensor is not part of a Wan model: blocks\.0\.norm3\.weight"):
        open_checkpoint(save_folder(state, DIFFUSERS_CONFIG))
