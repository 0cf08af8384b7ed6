"""The memory plan against figures worked out by hand and against the model's own parameters."""

import dataclasses
import json

import pytest
import torch
from rich.console import Console

from mlaconvert.config.budget import default_budget
from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.mla import MLAConfig, MLALayer
from mlaconvert.errors import ConfigError
from mlaconvert.model.memory import MemoryPlan, StreamedVideo, parameter_count, plan_memory
from mlaconvert.model.wan import WanModel
from mlaconvert.reports.tables import memory_table
from mlaconvert.units import format_bytes

WAN_1_3B = WanConfig(dim=1536, num_heads=12, num_layers=30, ffn_dim=8960)
WAN_14B = WanConfig(dim=5120, num_heads=40, num_layers=40, ffn_dim=13824)
SMALL = WanConfig(dim=48, num_heads=4, num_layers=3, ffn_dim=52, freq_dim=10, text_dim=14, in_dim=5, out_dim=3)
GIB = 2**30


def layer(**changes: object) -> MLALayer:
    widths = {"kv_lora_rank": 7, "qk_nope_head_dim": 9, "v_head_dim": 11, "rope_components": ((0, 2), (3, 1))}
    return MLALayer(**(widths | changes))


def mixed_mla(q_lora_rank: int | None, key_norm: str) -> MLAConfig:
    layers = (layer(), None, layer(kv_lora_rank=13, v_head_dim=5, rope_components=((1, 1),)))
    return MLAConfig(q_lora_rank=q_lora_rank, key_norm=key_norm, softmax_scale=0.25, layers=layers)


def shown(plan: MemoryPlan) -> str:
    console = Console(width=80)
    with console.capture() as captured:
        console.print(memory_table(plan))
    return captured.get()


@pytest.mark.parametrize(
    ("width", "heads", "budget"),
    [
        (1536, 12, (192, 32, 96, 768)),  # the paper's
        (3072, 24, (416, 32, 96, 1536)),  # 448 in all
        (5120, 40, (714, 32, 96, 2560)),  # 746 in all, 7/48 being 746.67
        (192, 6, (20, 8, 24, 96)),  # 28 in all
        (24, 4, (1, 2, 4, 12)),
        (6, 1, (1, 2, 4, 3)),  # too narrow for 7/48: one channel, one pair
    ],
)
def test_default_budget(width: int, heads: int, budget: tuple[int, ...]) -> None:
    assert default_budget(WanConfig(dim=width, num_heads=heads, num_layers=1, ffn_dim=8)) == budget


@pytest.mark.parametrize("head_dim", range(6, 130, 2))
def test_default_budget_keeps_heads_whole_and_rotary_pairs_complete(head_dim: int) -> None:
    found = default_budget(WanConfig(dim=head_dim * 12, num_heads=12, num_layers=1, ffn_dim=8))
    assert found.qk_rope_head_dim % 2 == 0
    assert abs(found.qk_rope_head_dim - head_dim / 4) <= 1
    assert found.qk_nope_head_dim + found.qk_rope_head_dim == head_dim
    assert found.kv_lora_rank + found.qk_rope_head_dim == 7 * head_dim * 12 // 48


def test_wan_1_3b_by_hand() -> None:
    plan = plan_memory(WAN_1_3B, video=StreamedVideo(height=480, width=832, window_frames=7, batch=3), gpu_gb=80)
    assert plan.frame_tokens == 30 * 52 == 1560
    assert plan.minute_frames == 240
    assert plan.dense.scalars_per_token == (3072,) * 30
    assert plan.mla.scalars_per_token == (224,) * 30
    assert plan.dense.bytes_per_token == 180 * 1024
    assert plan.mla.bytes_per_token == 224 * 30 * 2 == 13_440
    assert plan.dense.bytes_per_window == 3 * 7 * 1560 * 184_320
    assert plan.mla.bytes_per_window == 3 * 7 * 1560 * 13_440
    assert plan.dense.bytes_per_minute == 3 * 240 * 1560 * 184_320
    assert plan.mla.bytes_per_minute == 3 * 240 * 1560 * 13_440
    assert plan.dense.weight_bytes == 2 * 1_418_996_800
    assert plan.reduction_percent == pytest.approx(92.7083, abs=1e-4)
    assert plan.ratio == pytest.approx(96 / 7)
    assert plan.seconds(7) == 1.75
    # 80 GiB less 2.84 GB of weights, over a window of 2.01 GB and over three frames of 288 MB.
    assert plan.dense.largest_batch == (85_899_345_920 - 2_837_993_600) // 2_012_774_400 == 41
    assert plan.dense.longest_window == (85_899_345_920 - 2_837_993_600) // 862_617_600 == 96


def test_wan_1_3b_mla_weights_by_hand() -> None:
    query = 1536 * 768 + 768 + 768 + 1536 * 768  # down with bias, norm, up to 12 heads of 96 + 32
    key_value = 1536 * 224 + 224 + 192 + 2688 * 192 + 1152  # down with bias, norm, up, content-key bias
    output = 1536 * 1536 + 1536
    dense = 4 * (1536 * 1536 + 1536) + 2 * 1536
    plan = plan_memory(WAN_1_3B, video=StreamedVideo(height=480, width=832, window_frames=7))
    assert plan.dense.weight_bytes - plan.mla.weight_bytes == 2 * 30 * (dense - query - key_value - output)


def test_wan_14b_by_hand() -> None:
    plan = plan_memory(WAN_14B, video=StreamedVideo(height=720, width=1280, window_frames=21), cache_itemsize=2)
    assert plan.dense.bytes_per_token == 800 * 1024
    assert plan.mla.bytes_per_token == 746 * 40 * 2
    assert plan.frame_tokens == 3600
    assert plan.dense.bytes_per_window == 21 * 3600 * 819_200
    assert plan.dense.largest_batch is None
    assert plan.mla.longest_window is None
    assert plan_memory(
        WAN_14B, video=StreamedVideo(height=720, width=1280, window_frames=21), cache_itemsize=4
    ).dense.bytes_per_token == (1600 * 1024)


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (WAN_1_3B, 1_418_996_800),
        (WAN_14B, 14_288_491_584),
        (dataclasses.replace(WAN_14B, in_dim=36, image_dim=1280), 16_394_878_784),
        (dataclasses.replace(WAN_14B, in_dim=36), 14_288_901_184),
        (
            WanConfig(dim=3072, num_heads=24, num_layers=30, ffn_dim=14336, in_dim=48, out_dim=48),
            4_999_787_712,
        ),
    ],
    ids=["1.3B", "14B", "I2V-14B", "I2V-A14B", "TI2V-5B"],
)
def test_parameters_of_the_published_models(config: WanConfig, parameters: int) -> None:
    assert parameter_count(config) == parameters


@pytest.mark.parametrize("key_norm", ["latent", "token"])
@pytest.mark.parametrize("q_lora_rank", [None, 17])
def test_parameters_equal_the_model(q_lora_rank: int | None, key_norm: str) -> None:
    config = dataclasses.replace(SMALL, mla=mixed_mla(q_lora_rank, key_norm), image_dim=22, cross_attn_norm=False)
    with torch.device("meta"):
        model = WanModel(config)
    assert parameter_count(config) == sum(p.numel() for p in model.parameters())


def test_mla_of_the_caller_goes_before_the_models_own() -> None:
    own, given = mixed_mla(None, "latent"), mixed_mla(None, "token")
    video = StreamedVideo(height=32, width=48, window_frames=4)
    config = dataclasses.replace(SMALL, mla=own)
    assert plan_memory(config, video=video).mla.scalars_per_token == (13, 96, 15)
    plan = plan_memory(config, given, video=video)
    assert plan.mla.scalars_per_token == (14, 96, 16)
    assert plan.dense.scalars_per_token == (96,) * 3
    assert plan.mla.weight_bytes == 2 * parameter_count(dataclasses.replace(SMALL, mla=given))
    assert plan.dense.weight_bytes == 2 * parameter_count(SMALL)


def test_what_fits_is_the_most_that_fits() -> None:
    plan = plan_memory(
        SMALL, video=StreamedVideo(height=64, width=96, window_frames=5, batch=2), gpu_gb=0.01, weight_itemsize=4
    )
    for side in (plan.dense, plan.mla):
        free = int(0.01 * GIB) - side.weight_bytes
        one_window = side.bytes_per_window // 2
        frame = side.bytes_per_window // 5
        assert side.largest_batch * one_window <= free < (side.largest_batch + 1) * one_window
        assert side.longest_window * frame <= free < (side.longest_window + 1) * frame
    assert plan.mla.largest_batch > plan.dense.largest_batch > 0


def test_nothing_fits_beside_weights_that_do_not() -> None:
    plan = plan_memory(WAN_14B, video=StreamedVideo(height=480, width=832, window_frames=7), gpu_gb=16)
    assert (plan.dense.largest_batch, plan.dense.longest_window) == (0, 0)
    assert "does not fit" in shown(plan)


def test_given_weights_replace_the_counted_ones() -> None:
    video = StreamedVideo(height=480, width=832, window_frames=7)
    counted, given = plan_memory(WAN_1_3B, video=video), plan_memory(WAN_1_3B, video=video, weight_bytes=5_000_000_000)
    assert given.dense.weight_bytes == 5_000_000_000
    saved = counted.dense.weight_bytes - counted.mla.weight_bytes
    assert given.mla.weight_bytes == 5_000_000_000 - saved


def test_other_frame_rates_and_vaes() -> None:
    config = WanConfig(dim=3072, num_heads=24, num_layers=30, ffn_dim=14336, in_dim=48, out_dim=48)
    plan = plan_memory(
        config, video=StreamedVideo(height=704, width=1280, window_frames=10, fps=25, vae_stride=(4, 16, 16))
    )
    assert plan.frame_tokens == 22 * 40
    assert plan.minute_frames == 375
    assert plan.seconds(10) == 1.6
    assert (
        plan_memory(
            SMALL, video=StreamedVideo(height=16, width=16, window_frames=1, fps=1, vae_stride=(8, 8, 8))
        ).minute_frames
        == 8
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 488}, "height is 488 pixels: give a multiple of 16"),
        ({"width": 840}, "width is 840 pixels: give a multiple of 16"),
        ({"height": 0}, "height is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"window_frames": -1}, "window_frames is -1"),
        ({"fps": 0}, "fps is 0"),
        ({"cache_itemsize": 0}, "cache_itemsize is 0"),
        ({"vae_stride": (4, 0, 8)}, "vae_stride is 0"),
        ({"gpu_gb": 0.0}, "gpu_gb is 0.0"),
        ({"gpu_gb": float("nan")}, "gpu_gb is nan"),
        ({"weight_bytes": 1}, "weight_bytes is 1, too few"),
        ({"mla": mixed_mla(None, "latent")}, "mla.layers has 3 entries for 30 layers"),
    ],
)
def test_impossible_settings_are_named(change: dict[str, object], message: str) -> None:
    video = {"height": 480, "width": 832, "window_frames": 7}
    video |= {name: change.pop(name) for name in [*change] if name in StreamedVideo.__dataclass_fields__}
    with pytest.raises(ConfigError, match=message):
        plan_memory(WAN_1_3B, video=StreamedVideo(**video), **change)


def test_json_is_plain_and_whole() -> None:
    plan = plan_memory(WAN_1_3B, video=StreamedVideo(height=480, width=832, window_frames=7), gpu_gb=24)
    data = json.loads(json.dumps(plan.to_json()))
    assert data["dense"]["bytes_per_token"] == 184_320
    assert data["mla"]["bytes_per_token"] == 13_440
    assert data["gpu_bytes"] == 24 * GIB
    assert data["reduction_percent"] == plan.reduction_percent


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (13_440, "13.1 KiB"),
        (184_320, "180 KiB"),
        (819_200, "800 KiB"),
        (2**20 - 1, "1.00 MiB"),
        (2_012_774_400, "1.87 GiB"),
        (69_009_408_000, "64.3 GiB"),
        (3 * 2**50, "3072 TiB"),
    ],
)
def test_bytes_for_people(count: int, text: str) -> None:
    assert format_bytes(count) == text


def test_table_says_what_people_need() -> None:
    text = shown(plan_memory(WAN_1_3B, video=StreamedVideo(height=480, width=832, window_frames=7), gpu_gb=24))
    for part in ("180 KiB", "13.1 KiB", "-92.7%, 13.7x", "1.87 GiB", "140 MiB", "2.64 GiB", "79 frames", "19.8 s"):
        assert part in text
    assert "activations not counted" in text
    assert "batch 1, bfloat16" in text
    assert "In float32, in which float32 files run on a CPU, all of it takes twice that." in text
    without_gpu = shown(plan_memory(WAN_1_3B, video=StreamedVideo(height=480, width=832, window_frames=7)))
    assert "max batch" not in without_gpu


def test_the_table_says_what_is_cached_in_bits() -> None:
    """Two layers of three: three codes of 7 bits, four of 5 and the norm of 8."""
    coarse = layer(cache_bits=((7, 3), (5, 4), (8, 1)), rope_components=())
    mla = MLAConfig(
        q_lora_rank=None, key_norm="token", softmax_scale=0.25, layers=(coarse, None, coarse), rope="latent"
    )
    config = WanConfig(dim=48, num_heads=2, num_layers=3, ffn_dim=8)
    plan = plan_memory(config, mla, video=StreamedVideo(height=64, width=96, window_frames=7))
    # Seven parts of 4 in 4 bytes, three of 2 and seven of 1 in one each, one of 8.
    assert plan.mla.bytes_per_token == 2 * (4 + 1 + 1 + 1) + 2 * 48 * 2
    text = " ".join(shown(plan).split())
    assert "3 layers, 2 bytes a scalar of dense layers, the others in bits" in text
    assert "all but what is in bits takes twice" in text
