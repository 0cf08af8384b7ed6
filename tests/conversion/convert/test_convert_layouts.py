"""Conversion of whole checkpoints: small ones of odd sizes in every layout, and the golden model without loss."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_cases import EXACT, LOSSLESS, NATIVE, SaveFolder, State
from safetensors import safe_open
from safetensors.torch import load_file
from support import relative
from torch import Tensor

from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.conversion import from_weights
from mlaconvert.conversion.from_weights import layer_modulation, time_modulation
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.run import convert
from mlaconvert.families.causal import STUDENT
from mlaconvert.families.open import open_checkpoint
from mlaconvert.files.names import CONFIG_NAME, WEIGHTS_NAME
from mlaconvert.files.writer import ModelWriter, TensorSpec
from mlaconvert.model.cache import LatentCache
from mlaconvert.model.load import load_model

DIFFUSERS = {
    "_class_name": "WanTransformer3DModel",
    "num_attention_heads": 3,
    "attention_head_dim": 20,
    "num_layers": 3,
    "ffn_dim": 44,
    "freq_dim": 14,
    "text_dim": 18,
    "in_channels": 5,
    "out_channels": 5,
    "patch_size": [1, 2, 2],
}


def to_diffusers(state: State) -> State:
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    converted: State = convert_wan_transformer_to_diffusers(dict(state))
    return {name: tensor.contiguous() for name, tensor in converted.items()}


def native(tmp_path: Path, state: State, save: SaveFolder) -> Path:
    return save(state, NATIVE)


def diffusers(tmp_path: Path, state: State, save: SaveFolder) -> Path:
    return save(to_diffusers(state), DIFFUSERS, "model/transformer").parent


def bfloat16(tmp_path: Path, state: State, save: SaveFolder) -> Path:
    return save({name: tensor.bfloat16() for name, tensor in state.items()}, NATIVE)


def sharded(tmp_path: Path, state: State, save: SaveFolder) -> Path:
    specs = [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()]
    with ModelWriter(tmp_path / "model", specs, metadata={}, max_shard_bytes=100_000) as writer:
        for name, tensor in state.items():
            writer.write(name, tensor)
        writer.write_text(CONFIG_NAME, json.dumps(NATIVE))
        writer.commit()
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    return tmp_path / "model"


def wrapped(tmp_path: Path, state: State, save: SaveFolder) -> Path:
    """As streaming checkpoints are published: an FSDP average beside the generator."""
    average = {f"model._fsdp_wrapped_module.{name}": tensor for name, tensor in state.items()}
    other = {f"model.{name}": tensor + 1 for name, tensor in state.items()}
    torch.save({"generator": other, "generator_ema": average}, tmp_path / "model.pt")
    (tmp_path / CONFIG_NAME).write_text(json.dumps(NATIVE))
    return tmp_path / "model.pt"


@pytest.mark.parametrize("layout", [native, diffusers, bfloat16, sharded, wrapped])
def test_every_layout_converts_and_loads(
    tmp_path: Path, state: State, save_folder: SaveFolder, layout: Callable[..., Path]
) -> None:
    given = layout(tmp_path, state, save_folder)
    convert(given, tmp_path / "out", EXACT)
    model = load_model(tmp_path / "out")  # strict
    assert model.config.mla is not None
    assert model.config.few_step == (layout is wrapped)
    assert model.config.cached_scalars() == (9, 9, 9)
    assert model.config.streaming == (STUDENT if layout is wrapped else None)
    written = load_file(tmp_path / "out" / WEIGHTS_NAME)
    if layout is diffusers:
        expected = to_diffusers(state)
        attention, outward = ".attn1.", "blocks.1.attn1.to_out.0.weight"
    else:
        expected = {n: t.bfloat16() for n, t in state.items()} if layout is bfloat16 else state
        attention, outward = ".self_attn.", "blocks.1.self_attn.o.weight"
    passed = {name for name in expected if attention not in name}
    assert len(passed) == len(state) - 3 * 10
    for name in passed:
        assert written[name].dtype == expected[name].dtype
        assert torch.equal(written[name], expected[name]), name
    assert f"blocks.2{attention}kv_a_proj_with_mqa.weight" in written
    assert torch.equal(written[outward], expected[outward])  # values stay as wide as the head
    assert {tensor.dtype for tensor in written.values()} == {expected[outward].dtype}


def test_names_and_shapes_are_the_documented_ones(source: Path, tmp_path: Path) -> None:
    """Latent 7, rotary 4 (2 pairs), unrotated 11, values 13 wide."""
    widths = {"kv_rank": 7, "rope_dim": 4, "nope_dim": 11, "v_dim": 13}
    common = {
        "q_a_proj.weight": (9, 60),
        "q_a_proj.bias": (9,),
        "q_a_layernorm.weight": (9,),
        "q_b_proj.weight": (3 * 15, 9),
        "kv_a_proj_with_mqa.weight": (7 + 4, 60),
        "kv_a_proj_with_mqa.bias": (7 + 4,),
        "kv_b_proj.weight": (3 * (11 + 13), 7),
        "kv_b_proj.bias": (3 * 11,),
        "o.weight": (60, 3 * 13),
        "o.bias": (60,),
    }
    latent = common | {"kv_a_layernorm.weight": (7,)}
    token = common | {"k_norm_proj.weight": (60, 60), "k_norm_proj.bias": (60,)}
    token |= {
        "q_a_proj.weight": (60, 60),
        "q_a_proj.bias": (60,),
        "q_a_layernorm.weight": (60,),
        "q_b_proj.weight": (3, 15, 20),
    }
    for name, recipe, expected in (
        ("latent", ConvertRecipe(init="svd", **widths, q_rank=9), latent),
        ("token", ConvertRecipe(init="svd", **widths, q_rank="none", key_norm="token"), token),
    ):
        convert(source, tmp_path / name, recipe)
        with safe_open(tmp_path / name / WEIGHTS_NAME, framework="pt") as opened:
            prefix = "blocks.1.self_attn."
            found = {n: tuple(opened.get_slice(n).get_shape()) for n in opened.keys() if n.startswith(prefix)}  # noqa: SIM118
            assert opened.metadata() == {"format": "pt"}
        assert found == {prefix + n: shape for n, shape in expected.items()}


def test_config_keeps_the_source_and_adds_mla(source: Path, tmp_path: Path) -> None:
    streaming = StreamingConfig(window_frames=5)
    convert(source, tmp_path / "out", ConvertRecipe(init="svd", layers="0,2", streaming=streaming))
    config = json.loads((tmp_path / "out" / CONFIG_NAME).read_text())
    kept = {name: value for name, value in NATIVE.items() if name != "_class_name"}
    assert {name: config[name] for name in kept} == kept
    assert config["_class_name"] == "WanMLATransformer3DModel"
    assert config["quantization_config"].keys() == {"quant_method"}
    assert config["streaming"] == {"chunk_frames": 3, "window_frames": 5, "sink_frames": 1, "positions": "window"}
    mla = config["mla"]
    layer = {"kv_lora_rank": 4, "qk_nope_head_dim": 16, "v_head_dim": 20, "rope_components": [[0, 1], [1, 1]]}
    assert mla["layers"] == [layer, {"dense": True}, layer]
    assert (mla["q_lora_rank"], mla["key_norm"]) == (30, "latent")
    assert mla["softmax_scale"] == pytest.approx(20**-0.5)
    assert mla["calibration"]["regime"] == "streaming"
    assert mla["calibration"]["frames"] == 5
    assert mla["calibration"]["tokens"] == [30, 52]
    assert mla["calibration"]["timesteps"] == pytest.approx([1000, 937.5, 833.333333, 625, 0])


def test_dense_layers_and_mixed_dtypes_stay(state: State, save_folder: SaveFolder, tmp_path: Path) -> None:
    """Norms in float32 beside bfloat16 weights, as diffusers' repositories have them."""
    mixed = {n: t if "norm" in n or "modulation" in n else t.bfloat16() for n, t in state.items()}
    convert(save_folder(mixed, NATIVE), tmp_path / "out", ConvertRecipe(init="svd", layers="1"))
    written = load_file(tmp_path / "out" / WEIGHTS_NAME)
    for name, tensor in mixed.items():
        if not name.startswith("blocks.1.self_attn."):
            assert written[name].dtype == tensor.dtype
            assert torch.equal(written[name], tensor)
    made = {name.removeprefix("blocks.1.self_attn."): tensor.dtype for name, tensor in written.items()}
    assert made["kv_a_layernorm.weight"] == made["q_a_layernorm.weight"] == torch.float32
    assert made["kv_b_proj.weight"] == made["kv_a_proj_with_mqa.bias"] == made["o.bias"] == torch.bfloat16
    assert load_model(tmp_path / "out", dtype=torch.float32).config.cached_scalars() == (120, 8, 120)


def test_dtype_option_casts_everything(source: Path, state: State, tmp_path: Path) -> None:
    report = convert(source, tmp_path / "out", ConvertRecipe(init="svd", dtype="bfloat16"), verify=True)
    written = load_file(tmp_path / "out" / WEIGHTS_NAME)
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    assert torch.equal(written["blocks.0.ffn.0.weight"], state["blocks.0.ffn.0.weight"].bfloat16())
    assert report.models[0].verification is not None


def test_lossless_conversion_is_the_golden_model(golden: Path, tmp_path: Path) -> None:
    """Identity 5 of the design, through files: what the reference code computes, with latent attention."""
    vectors = load_file(golden / "golden.safetensors")
    report = convert(golden, tmp_path / "out", LOSSLESS, verify=True)
    model = load_model(tmp_path / "out")
    out = model(vectors["x"], vectors["t"], vectors["context"])
    assert relative(out, vectors["wan21.out"]) < 1e-5
    verification = report.models[0].verification
    assert verification is not None
    assert sorted(verification.attention_errors) == [0, 1, 2]
    assert max(verification.attention_errors.values()) < 1e-5
    for latents, expected in (("x", "sf.chunks3.out"), ("x_long", "sf.window6_sink1.out")):
        streaming = StreamingConfig(window_frames=6, positions="absolute")
        model = load_model(tmp_path / "out", streaming=streaming)
        cache = LatentCache(model.config, batch=1, height=6, width=10)
        chunks = [
            model(chunk, vectors["t"], vectors["context"], cache=cache, start_frame=3 * i)
            for i, chunk in enumerate(vectors[latents].split(3, dim=2))
        ]
        assert relative(torch.cat(chunks, 2), vectors[expected]) < 1e-5


def test_lossy_conversion_is_worse_than_lossless_and_better_than_random(source: Path, tmp_path: Path) -> None:
    errors = {}
    for name, recipe in (
        ("wide", ConvertRecipe(init="svd", kv_rank=50, rope_dim=20, nope_dim=0, q_rank="none", key_norm="token")),
        ("narrow", EXACT),
        ("random", ConvertRecipe(init="random")),
    ):
        report = convert(source, tmp_path / name, recipe, verify=True)
        verification = report.models[0].verification
        assert verification is not None
        errors[name] = sum(verification.attention_errors.values())
    assert 1e-3 < errors["wide"] < errors["narrow"] < errors["random"]


def test_modulation_is_what_the_blocks_apply(source: Path) -> None:
    timesteps = [1000.0, 625.0, 0.0]
    model = load_model(source)
    _, modulation = model.embed_time(torch.tensor(timesteps), 3, 1)
    with open_checkpoint(source) as checkpoint:
        time = time_modulation(checkpoint, timesteps)
        for layer, block in enumerate(model.blocks):
            expected = (modulation + block.modulation)[:, 0, :2]  # shift and scale of self-attention
            found = layer_modulation(checkpoint, layer, time)
            assert found.shape == (3, 2, 60)
            assert relative(found, expected) < 1e-6


def test_the_regime_decides_the_mean_rotation(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Mapping[str, Any]] = []
    original = from_weights.mean_rotation

    def remember(split: tuple[int, int, int], **arguments: Any) -> Tensor:
        seen.append({"split": split, **{k: v.tolist() if isinstance(v, Tensor) else v for k, v in arguments.items()}})
        return original(split, **arguments)

    monkeypatch.setattr(from_weights, "mean_rotation", remember)
    streaming = StreamingConfig(window_frames=9)
    convert(source, tmp_path / "a", ConvertRecipe(init="svd", streaming=streaming, layers="0"))
    convert(
        source, tmp_path / "b", ConvertRecipe(init="svd", frames=5, height=96, width=160, vae_stride=16, layers="0")
    )
    assert seen == [
        {"split": (4, 3, 3), "queries": [6, 7, 8], "keys": [*range(9)], "height": 30, "width": 52},
        {"split": (4, 3, 3), "queries": [*range(5)], "keys": [*range(5)], "height": 3, "width": 5},
    ]
    a, b = (load_file(tmp_path / name / WEIGHTS_NAME)["blocks.0.self_attn.kv_b_proj.weight"] for name in "ab")
    assert not torch.allclose(a, b)
