"""Recognising checkpoints: names, geometry, wrappers, and refusals by name.

Names and shapes are compared with diffusers' own model and converter; sizes with the published models."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from families_cases import DIFFUSERS_CONFIG, SaveFolder, State, to_diffusers

from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.errors import CheckpointError, ConfigError, UnsupportedModelError
from mlaconvert.families.causal import STUDENT
from mlaconvert.families.open import open_checkpoint
from mlaconvert.families.source import Source
from mlaconvert.families.wan import WanFamily
from mlaconvert.families.wrappers import unwrap
from mlaconvert.files.headers import TensorInfo

WAN = WanFamily()
B14 = {"num_layers": 40, "dim": 5120, "num_heads": 40, "ffn_dim": 13824}


def infos(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(name, shape, torch.bfloat16, 2 * prod(shape)) for name, shape in shapes.items()}


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
    with open_checkpoint(Source(tmp_path / "bare" / "narrow.pt", config=golden / "config.json")) as opened:
        assert (opened.config.num_heads, opened.config.text_len) == (4, 16)
    with pytest.raises(CheckpointError, match="no such file"):
        open_checkpoint(Source(tmp_path / "bare" / "narrow.pt", config=tmp_path / "none.json"))


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
    with open_checkpoint(Source(tmp_path / "model.pt", config=golden / "config.json")) as opened:
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
    with open_checkpoint(Source(tmp_path / "m.pt", state_key="critic", config=golden / "config.json")) as opened:
        assert torch.equal(opened.read("head.modulation"), other["head.modulation"])
        assert opened.config.streaming is None
    with pytest.raises(CheckpointError, match=r"m\.pt: .*'ema'; there: 'critic', 'generator', 'generator_ema'"):
        open_checkpoint(Source(tmp_path / "m.pt", state_key="ema"))


@pytest.mark.parametrize(
    ("field", "says"),
    [("num_heads", "num_heads"), ("in_channels", "in_channels"),
     ("num_attention_heads", r"num_attention_heads \* attention_head_dim")],
)  # fmt: skip
def test_a_field_is_named_as_in_config_json(
    field: str, says: str, golden_state: State, save_folder: SaveFolder
) -> None:
    native = field == "num_heads"
    folder = save_folder(
        golden_state if native else to_diffusers(golden_state), ({} if native else DIFFUSERS_CONFIG) | {field: 0}
    )
    with pytest.raises(ConfigError, match=rf"config\.json: {says} is 0: give 1 or more"):
        open_checkpoint(folder)


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
