"""Recognising checkpoints: names, geometry, wrappers, and refusals by name.

Names and shapes are compared with diffusers' own model and converter; sizes with the published models.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.mla import MLAConfig, MLALayer
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.errors import CheckpointError, ConfigError, InputError, UnsupportedModelError
from mlaconvert.families.causal import STUDENT
from mlaconvert.families.open import open_checkpoint
from mlaconvert.families.wan import WanFamily
from mlaconvert.families.wrappers import unwrap
from mlaconvert.files.headers import TensorInfo

State = dict[str, torch.Tensor]
SaveFolder = Callable[..., Path]
WAN = WanFamily()
B14 = {"num_layers": 40, "dim": 5120, "num_heads": 40, "ffn_dim": 13824}


def infos(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(name, shape, torch.bfloat16, 2 * prod(shape)) for name, shape in shapes.items()}


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


# --- geometry and names ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "tensors", "parameters"),
    [
        ({"num_layers": 30, "dim": 1536, "num_heads": 12, "ffn_dim": 8960}, 825, 1_418_996_800),
        (B14, 1095, 14_288_491_584),
        (B14 | {"in_dim": 36, "image_dim": 1280, "model_type": "i2v"}, 1303, 16_394_878_784),
        (B14 | {"in_dim": 36, "model_type": "i2v"}, 1095, 14_288_901_184),
        (
            {"num_layers": 30, "dim": 3072, "num_heads": 24, "ffn_dim": 14336}
            | {"in_dim": 48, "out_dim": 48, "model_type": "ti2v"},
            825,
            4_999_787_712,
        ),
    ],
    ids=["t2v-1.3b", "t2v-14b", "i2v-14b", "i2v-a14b", "ti2v-5b"],
)
def test_published_sizes(fields: dict[str, Any], tensors: int, parameters: int) -> None:
    config = WanConfig(**fields)
    shapes = WAN.expected_shapes(config)
    assert (len(shapes), sum(map(prod, shapes.values()))) == (tensors, parameters)
    assert WAN.parse_config(None, infos(shapes)) == config  # from shapes alone
    assert WAN.parse_config(WAN.raw_config(config), infos(shapes)) == config


@pytest.mark.parametrize("image_dim", [None, 72])
def test_names_and_shapes_are_those_of_diffusers(image_dim: int | None) -> None:
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        model = WanTransformer3DModel(
            patch_size=(1, 2, 4),
            num_attention_heads=3,
            attention_head_dim=28,
            in_channels=20,
            out_channels=6,
            text_dim=52,
            freq_dim=44,
            ffn_dim=132,
            num_layers=2,
            image_dim=image_dim,
            added_kv_proj_dim=None if image_dim is None else 84,
        )
    theirs = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    tensors = infos({str(WAN.canonical(name, "diffusers")): shape for name, shape in theirs.items()})
    assert len(tensors) == len(theirs)
    config = WAN.parse_config(dict(model.config), tensors)
    assert (config.dim, config.num_heads, config.text_len, config.image_dim) == (84, 3, 512, image_dim)
    ours = WAN.expected_shapes(config)
    assert {WAN.source(name, "diffusers"): shape for name, shape in ours.items()} == theirs
    # Equal shapes could hide a swap: diffusers' converter says which native name each of its names has.
    assert to_diffusers({name: name for name in ours}) == {WAN.source(name, "diffusers"): name for name in ours}  # type: ignore[misc,comparison-overlap]
    assert all(WAN.canonical(WAN.source(name, "diffusers"), "diffusers") == name for name in ours)


def test_opens_the_golden_checkpoint(golden: Path, golden_config: dict[str, Any], golden_state: State) -> None:
    with open_checkpoint(golden) as opened:
        assert opened.config == WanConfig(
            dim=96, num_heads=4, num_layers=3, ffn_dim=160, freq_dim=32, text_dim=40, text_len=16
        )
        assert opened.raw_config == golden_config
        assert (opened.layout, opened.state_key, opened.family.name) == ("native", None, "wan")
        assert set(opened.names) == set(golden_state) == set(WAN.expected_shapes(opened.config))
        for name, tensor in golden_state.items():
            assert torch.equal(opened.read(name), tensor)
            assert opened.info(name).shape == tensor.shape
            assert opened.output_name(name) == name
        weights = opened.attention(2)
        for part in ("q", "k", "v", "o"):
            assert torch.equal(getattr(weights, f"{part}_weight"), golden_state[f"blocks.2.self_attn.{part}.weight"])
            assert torch.equal(getattr(weights, f"{part}_bias"), golden_state[f"blocks.2.self_attn.{part}.bias"])
        for part in ("norm_q", "norm_k"):
            assert torch.equal(getattr(weights, part), golden_state[f"blocks.2.self_attn.{part}.weight"])
        assert opened.describe() == (
            "wan t2v, native layout, 3 layers x 96 wide x 4 heads, float32, 414,112 parameters"
        )
        with pytest.raises(UnsupportedModelError, match="layer 3 has no dense"):
            opened.attention(3)
        with pytest.raises(CheckpointError, match=r"no tensor 'blocks.9.modulation'"):
            opened.read("blocks.9.modulation")


def test_diffusers_layout_reads_the_same(golden_state: State, save_folder: SaveFolder) -> None:
    folder = save_folder(to_diffusers(golden_state), DIFFUSERS_CONFIG, "repo/transformer")
    with open_checkpoint(folder.parent) as opened:
        assert opened.layout == "diffusers"
        assert (opened.config.dim, opened.config.num_heads, opened.config.text_len) == (96, 4, 512)
        for name, tensor in golden_state.items():
            assert torch.equal(opened.read(name), tensor)
            assert opened.output_name(name) == opened.info(name).name
        assert opened.output_name("blocks.1.self_attn.kv_b_proj.bias") == "blocks.1.attn1.kv_b_proj.bias"
        assert opened.output_name("blocks.1.self_attn.o.weight") == "blocks.1.attn1.to_out.0.weight"


def test_attention_weights_must_be_finite(
    golden_state: State, golden_config: dict[str, Any], save_folder: SaveFolder
) -> None:
    golden_state["blocks.1.self_attn.k.bias"][5] = float("inf")
    with open_checkpoint(save_folder(golden_state, golden_config)) as opened:
        opened.attention(0)
        with pytest.raises(CheckpointError, match=r"'blocks\.1\.self_attn\.k\.bias' holds NaN or infinite"):
            opened.attention(1)


def test_without_config_heads_of_128_are_assumed(tmp_path: Path, golden_state: State, golden: Path) -> None:
    config = WanConfig(dim=256, num_heads=2, num_layers=1, ffn_dim=40, in_dim=36, text_dim=24, freq_dim=8)
    state = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in WAN.expected_shapes(config).items()}
    torch.save(state, tmp_path / "wide.pt")
    with open_checkpoint(tmp_path / "wide.pt") as opened:
        assert (opened.config.num_heads, opened.config.model_type) == (2, "i2v")
        raw = opened.raw_config
        assert (raw["_class_name"], raw["dim"], raw["num_heads"], raw["text_len"]) == ("WanModel", 256, 2, 512)
    (tmp_path / "bare").mkdir()
    torch.save(golden_state, tmp_path / "bare" / "narrow.pt")
    with pytest.raises(UnsupportedModelError, match=r"narrow\.pt: .*width of 96 has; .*pass --config FILE"):
        open_checkpoint(tmp_path / "bare" / "narrow.pt")
    with open_checkpoint(tmp_path / "bare" / "narrow.pt", config=golden / "config.json") as opened:
        assert (opened.config.num_heads, opened.config.text_len) == (4, 16)
    with pytest.raises(CheckpointError, match="no such file"):
        open_checkpoint(tmp_path / "bare" / "narrow.pt", config=tmp_path / "none.json")


# --- wrappers and streaming --------------------------------------------------------------------------------------


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def fsdp(state: State) -> State:
    return {
        "model._fsdp_wrapped_module." + name.replace("blocks.1.", "blocks.1._fsdp_wrapped_module."): tensor
        for name, tensor in state.items()
    }


WRAPPED: dict[str, tuple[Callable[[State, State], dict[str, Any]], str | None, bool]] = {
    "Self-Forcing": (lambda s, o: {"generator_ema": prefixed(s, "model.")}, "generator_ema", True),
    "ode_init": (lambda s, o: {"model": s}, "model", False),
    "CausVid": (lambda s, o: {"critic": prefixed(o, "model."), "generator": prefixed(s, "model.")}, "generator", True),
    "Rolling Forcing": (
        lambda s, o: {"generator": prefixed(o, "model."), "critic": o, "generator_ema": fsdp(s)},
        "generator_ema",
        True,
    ),
    "LongLive": (lambda s, o: {"model": o, "generator": s}, "generator", True),
    "a trainer's state": (lambda s, o: {"state_dict": prefixed(s, "module."), "step": 5}, "state_dict", False),
    "compiled": (lambda s, o: {k.replace("blocks.2.", "blocks.2._orig_mod."): t for k, t in s.items()}, None, False),
    "ComfyUI": (lambda s, o: prefixed(s, "model.diffusion_model."), None, False),
    "bare": (lambda s, o: s, None, False),
}


@pytest.mark.parametrize("case", WRAPPED)
def test_wrapped_checkpoints(case: str, tmp_path: Path, golden: Path, golden_state: State) -> None:
    wrap, key, streaming = WRAPPED[case]
    other = {name: tensor + 1 for name, tensor in golden_state.items()}
    torch.save(wrap(golden_state, other), tmp_path / "model.pt")
    with open_checkpoint(tmp_path / "model.pt", config=golden / "config.json") as opened:
        assert opened.state_key == key
        assert opened.config.streaming == (STUDENT if streaming else None)
        assert opened.config.few_step == streaming  # published streaming generators are distilled
        for name, tensor in golden_state.items():
            assert torch.equal(opened.read(name), tensor)
            assert opened.output_name(name) == name
        assert (key is None) or f"state key {key}" in opened.describe()


def test_a_config_can_say_that_a_wrapped_model_is_not_streaming(
    tmp_path: Path, golden_state: State, golden_config: dict[str, Any]
) -> None:
    torch.save({"generator": golden_state}, tmp_path / "m.pt")
    (tmp_path / "config.json").write_text(json.dumps(golden_config | {"streaming": None}))
    with open_checkpoint(tmp_path) as opened:
        assert opened.config.streaming is None


def test_state_key_is_a_choice(tmp_path: Path, golden: Path, golden_state: State) -> None:
    other = {name: tensor + 1 for name, tensor in golden_state.items()}
    torch.save({"generator": other, "generator_ema": golden_state, "critic": other}, tmp_path / "m.pt")
    with open_checkpoint(tmp_path / "m.pt", state_key="critic", config=golden / "config.json") as opened:
        assert torch.equal(opened.read("head.modulation"), other["head.modulation"])
        assert opened.config.streaming is None
    with pytest.raises(CheckpointError, match=r"m\.pt: .*'ema'; there: 'critic', 'generator', 'generator_ema'"):
        open_checkpoint(tmp_path / "m.pt", state_key="ema")


def test_unwrap_refuses_to_guess() -> None:
    with pytest.raises(CheckpointError, match="--state-key; there: 'student', 'teacher'"):
        unwrap(["student/a", "teacher/a"])
    with pytest.raises(CheckpointError, match=r"'a' and 'model\.a' are both 'a'"):
        unwrap(["a", "model.a"])
    with pytest.raises(CheckpointError, match="no state key 'model'; there: none"):
        unwrap(["a"], "model")
    assert unwrap(["model.model.a"]) == (None, {"model.a": "model.model.a"})  # one leading prefix, not all


def test_streaming_follows_class_name_or_section(
    golden_state: State, golden_config: dict[str, Any], save_folder: SaveFolder
) -> None:
    window = {"chunk_frames": 2, "window_frames": 9, "sink_frames": 0, "positions": "absolute"}
    cases: list[tuple[dict[str, Any], StreamingConfig | None]] = [
        ({}, None),
        ({"_class_name": "CausalWanModel"}, STUDENT),
        ({"streaming": window}, StreamingConfig(**window)),  # type: ignore[arg-type]
        ({"_class_name": "CausalWanModel", "streaming": None}, None),
    ]
    for i, (extra, expected) in enumerate(cases):
        folder = save_folder(golden_state, golden_config | extra, f"model{i}")
        with open_checkpoint(folder) as opened:
            assert opened.config.streaming == expected


# --- converted models --------------------------------------------------------------------------------------------

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
    with pytest.raises(UnsupportedModelError, match=r"1 tensors .* missing: blocks.1.self_attn.kv_b_proj.bias"):
        open_checkpoint(save_folder(state, raw, "damaged"))


# --- refusals ----------------------------------------------------------------------------------------------------


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
            "Wan VACE": diffusers.WanVACETransformer3DModel(num_layers=1, vace_layers=[0]),
            "Wan FLF2V": diffusers.WanTransformer3DModel(
                num_layers=1, image_dim=16, added_kv_proj_dim=5120, pos_embed_seq_len=514
            ),
            "SkyReels-V2": diffusers.SkyReelsV2Transformer3DModel(num_layers=1, inject_sample_info=True),
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
            open_checkpoint(tmp_path / "plain.pt", config=tmp_path / "c.json")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["double_blocks.0.img_attn_qkv.weight"], "this is HunyuanVideo"),
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
    "unexpected": (put("blocks.0.extra.weight", torch.ones(1)), {}, UnsupportedModelError, "1 tensors are not part"),
    "no patch embedding bias": (drop("patch_embedding.bias"), {}, UnsupportedModelError, "1 tensors .* patch_embed"),
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
    "float8": (
        put(Q, torch.ones(96, 96).to(torch.float8_e4m3fn)),
        {},
        UnsupportedModelError,
        "is torch.float8_e4m3fn, expected .* unquantised",
    ),
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
    "vace": (keep, {"model_type": "vace"}, UnsupportedModelError, "this is Wan VACE"),
    "flf2v": (keep, {"model_type": "flf2v"}, UnsupportedModelError, "this is Wan FLF2V"),
    "skyreels": (put("fps_embedding.weight", torch.ones(2, 96)), {}, UnsupportedModelError, "this is SkyReels-V2"),
    "class name": (keep, {"_class_name": "LTXVideoTransformer3DModel"}, UnsupportedModelError, "this is LTX-Video"),
    "heads": (keep, {"num_heads": 7}, ConfigError, "dim 96 does not split into 7 heads"),
    "text for a number": (keep, {"num_heads": "many"}, ConfigError, "config.json: num_heads: "),
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
    with pytest.raises(UnsupportedModelError, match=r"1 tensors are not part of a Wan model: blocks\.0\.norm3\.weight"):
        open_checkpoint(save_folder(state, DIFFUSERS_CONFIG))
