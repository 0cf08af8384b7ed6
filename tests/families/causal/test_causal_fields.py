"""How a model sees time: what the codebases' own fields mean, what is refused, and what is said when none states it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from causal_cases import ASSUMED, CAUSAL, SaveFolder, State, sees
from command_line import invoke
from hostile import refused
from hub_server import Blob, Hub
from safetensors.torch import save, save_file

from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.errors import ConfigError
from mlaconvert.families.causal import EVERYTHING, STUDENT, read_timing
from mlaconvert.families.open import open_checkpoint
from mlaconvert.families.source import Source
from mlaconvert.files.names import CONFIG_NAME, WEIGHTS_NAME
from mlaconvert.model.window import window_views

# Fields as the codebases' own files have them: how the model sees time, few-step, and what is left to be assumed.
PUBLISHED: dict[str, tuple[dict[str, Any], StreamingConfig | None, bool, set[str]]] = {
    "Self-Forcing": (
        CAUSAL | {"local_attn_size": -1, "sink_size": 0},
        *(sees(3, 21, 0), False, {"chunk_frames", "window_frames", "few_step"}),
    ),
    "Self-Forcing, local": (
        CAUSAL | {"local_attn_size": 15, "sink_size": 2, "num_frame_per_block": 3},
        *(sees(3, 15, 2), False, {"few_step"}),
    ),
    "Self-Forcing, every frame a chunk": (
        CAUSAL | {"local_attn_size": 9, "sink_size": 0, "num_frame_per_block": 1, "few_step": True},
        *(sees(1, 9, 0), True, set()),
    ),
    "its YAML": (
        {"causal": True, "num_frame_per_block": 3, "model_kwargs": {"timestep_shift": 5.0}}
        | {"denoising_step_list": [1000, 750, 500, 250], "warp_denoising_step": True, "independent_first_frame": False},
        *(sees(3, 21, 0), True, {"window_frames", "sink_frames", "positions"}),
    ),
    "LongLive": (
        CAUSAL | {"num_frame_per_block": 3, "model_kwargs": {"local_attn_size": 12, "sink_size": 3}},
        *(sees(3, 12, 3), False, {"few_step"}),
    ),
    "LongLive, infinite": (
        CAUSAL
        | {"num_frame_per_block": 3, "use_infinite_attention": True}
        | {"model_kwargs": {"local_attn_size": 12, "sink_size": 3}},
        *(sees(3, 12, 3, "window"), False, {"few_step"}),
    ),
    "LongLive 2": (
        CAUSAL | {"model_kwargs": {"num_frame_per_block": 8, "local_attn_size": 32}, "inference": {"sink_size": 8}},
        *(sees(8, 32, 8), False, {"few_step"}),
    ),
    "LongLive 2, its YAML": (
        {"model_kwargs": {"model_name": "Wan2.2-TI2V-5B", "timestep_shift": 5.0, "num_frame_per_block": 8}
         | {"local_attn_size": 32}}
        | {"inference": {"sampling_steps": 4, "sink_size": 8, "guidance_scale": 1.0, "multi_shot_sink": True}},
        *(sees(8, 32, 8), False, {"positions"}),
    ),
    "Krea, its YAML": (
        {"num_frame_per_block": 3, "do_kv_recomp": True, "guidance_scale": 3.0, "model_kwargs": {"timestep_shift": 5.0}}
        | {"denoising_step_list": [1000, 937, 833, 625, 0], "warp_denoising_step": False},
        *(sees(3, 6, 1, "window"), True, {"window_frames"}),
    ),
    "Krea, five frames of past": (
        CAUSAL | {"num_frame_per_block": 3, "do_kv_recomp": True, "kv_cache_num_frames": 5},
        *(sees(3, 8, 1, "window"), False, {"few_step"}),
    ),
    "LongLive 2 in training": (
        CAUSAL | {"num_frame_per_block": 8, "local_attn_size": -1, "sink_size": 8},
        *(sees(8, 24, 8), False, {"window_frames", "few_step"}),
    ),
    "Infinity-RoPE": (
        {"_class_name": "InfinityRopeWanModel", "num_frame_per_block": 3, "local_attn_size": 6, "sink_size": 1},
        *(sees(3, 6, 1, "window"), False, {"few_step"}),
    ),
    "SGLang, Causal-Forcing": (
        {"_class_name": "CausalWanTransformer3DModel", "num_frames_per_block": 1}
        | {"sliding_window_num_frames": 21, "sink_size": 0},
        *(sees(1, 21, 0), False, {"few_step"}),
    ),
    "SGLang, Rolling Forcing": (
        {"_class_name": "RollingForcingWanTransformer3DModel", "num_frames_per_block": 3, "sink_size": 3}
        | {"sliding_window_num_frames": 24, "max_attention_num_frames": 21},
        *(sees(3, 21, 3, "window"), True, set()),
    ),
    "FastVideo": (
        {"_class_name": "CausalWanTransformer3DModel", "num_frames_per_block": 3, "local_attn_size": -1}
        | {"sliding_window_num_frames": 21, "sink_size": 0, "rope_cache_policy": "absolute"},
        *(sees(3, 21, 0), False, {"few_step"}),
    ),
    "FastVideo, relativistic": (
        {"_class_name": "CausalWanTransformer3DModel", "num_frames_per_block": 3}
        | {"arch_config": {"local_attn_size": 6, "sink_size": 1}, "rope_cache_policy": "relativistic"},
        *(sees(3, 6, 1, "window"), False, {"few_step"}),
    ),
    "tokens": (
        CAUSAL | {"num_frame_per_block": 3, "sink_size": 3, "max_attention_size": 18720},  # 12 frames of 1560
        *(sees(3, 12, 3), False, {"few_step"}),
    ),
    "SkyReels-V2, diffusers": (
        {"_class_name": "SkyReelsV2Transformer3DModel", "num_frame_per_block": 5, "inject_sample_info": False},
        *(sees(5, 35, 0), False, {"window_frames"}),
    ),
    "SkyReels-V2, native": (
        {"_class_name": "WanModel", "num_frame_per_block": 3, "flag_causal_attention": True},
        *(sees(3, 33, 0), False, {"window_frames"}),
    ),
    "SkyReels-V2, whole clips": (
        {"_class_name": "SkyReelsV2Transformer3DModel", "num_frame_per_block": 1},
        *(None, False, set()),
    ),
    "SkyReels-V2, its flag off": (
        {"_class_name": "WanModel", "num_frame_per_block": 5, "flag_causal_attention": False},
        *(None, False, set()),
    ),
    "null fields": (
        CAUSAL | {"local_attn_size": None, "sink_size": None, "model_kwargs": None, "num_frame_per_block": None},
        *(STUDENT, False, {"window_frames", "chunk_frames", "sink_frames", "few_step"}),
    ),
    "a class of no codebase": (
        {"_class_name": "WanTransformer3DModel", "num_frames_per_block": 3, "sliding_window_num_frames": 12},
        *(sees(3, 12, 0), False, {"sink_frames", "positions", "few_step"}),
    ),
    "Wan": ({"_class_name": "WanModel"}, None, False, set()),
    "Wan, diffusers": ({"_class_name": "WanTransformer3DModel"}, None, False, set()),
    "Wan with fields that say no window": (
        {"_class_name": "WanModel", "local_attn_size": -1, "sink_size": 0},
        *(None, False, set(EVERYTHING)),
    ),
    "no class": ({}, None, False, set(EVERYTHING)),
    "our own": (
        CAUSAL | {"local_attn_size": 12, "sink_size": "abc", "streaming": {"window_frames": 9, "chunk_frames": 2}},
        *(sees(2, 9, 1, "window"), False, set()),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PUBLISHED)
def test_the_codebases_fields_are_read(case: str) -> None:
    raw, streaming, few_step, assumed = PUBLISHED[case]
    found = read_timing(raw)
    assert (found.streaming, found.few_step, set(found.assumed)) == (streaming, few_step, assumed)


def visible(chunk: int, local_attn_size: int, sink_size: int, frames: int) -> list[list[int]]:
    """What each chunk sees in Self-Forcing's cache: it holds `local_attn_size` frames and evicts behind the sink."""
    cache: list[int] = []
    found = []
    for start in range(0, frames, chunk):
        new = list(range(start, start + chunk))
        evicted = max(0, len(cache) + len(new) - local_attn_size)
        cache = cache[:sink_size] + cache[sink_size + evicted :] + new
        found.append(list(cache))
    return found


@pytest.mark.parametrize(("chunk", "window", "sink"), [(3, 8, 2), (2, 7, 0), (1, 5, 3), (4, 12, 4)])
def test_a_window_is_the_cache_of_self_forcing(chunk: int, window: int, sink: int) -> None:
    """Sink, older frames and the chunk in work: `local_attn_size` counts them all, as ours does."""
    raw = CAUSAL | {"local_attn_size": window, "sink_size": sink, "num_frame_per_block": chunk}
    frames = chunk * (window + 5)
    expected = visible(chunk, window, sink, frames)
    seen = [list(view) for view, _ in window_views(frames, read_timing(raw).streaming)]
    full = [view for view in expected if len(view) == window]  # those before are parts of the first view
    assert len(full) > 5
    assert seen[-len(full) + 1 :] == full[1:]
    assert all(view in expected for view in seen)


HOSTILE: list[tuple[dict[str, Any], str]] = [
    ({"local_attn_size": "21"}, "local_attn_size is '21'; give a whole number from 1 to 10000, or -1 for none"),
    ({"local_attn_size": 0}, "local_attn_size is 0"),
    ({"local_attn_size": -2}, "local_attn_size is -2"),
    ({"local_attn_size": 1e9}, "local_attn_size is 1000000000.0"),
    ({"local_attn_size": 10**9}, "local_attn_size is 1000000000"),
    ({"local_attn_size": [6, 12]}, r"local_attn_size is \[6, 12\]"),
    ({"local_attn_size": float("nan")}, "local_attn_size is nan"),
    ({"local_attn_size": True}, "local_attn_size is True"),
    ({"sliding_window_num_frames": 21.0}, "sliding_window_num_frames is 21.0"),
    ({"sink_size": -1}, "sink_size is -1; give a whole number from 0"),
    ({"model_kwargs": {"sink_size": {}}}, "model_kwargs.sink_size is {}"),
    ({"num_frame_per_block": 0}, "num_frame_per_block is 0; give a whole number from 1"),
    ({"num_frames_per_block": "x" * 5000}, "num_frames_per_block is 'xxx"),
    ({"max_attention_size": 10**12}, "max_attention_size is 1000000000000"),
    ({"max_attention_size": 10_000}, "max_attention_size is 10000 tokens.*give local_attn_size in frames"),
    ({"flag_causal_attention": "yes"}, "flag_causal_attention is 'yes'; give true or false"),
    ({"rope_cache_policy": "other"}, "rope_cache_policy is 'other'; give absolute or relativistic"),
    ({"denoising_step_list": [1000, "a"]}, "denoising_step_list is"),
    ({"timestep_shift": float("inf")}, "timestep_shift is inf"),
    ({"kv_cache_num_frames": 0}, "kv_cache_num_frames is 0; give a whole number from 1"),
    ({"do_kv_recomp": 1}, "do_kv_recomp is 1; give true or false"),
    ({"do_kv_recomp": True, "use_relative_rope": False, "kv_cache_num_frames": 2.0}, "kv_cache_num_frames is 2.0"),
    ({"inference": {"sampling_steps": "4"}}, "inference.sampling_steps is '4'"),
    ({"inference": {"guidance_scale": "high"}}, "inference.guidance_scale is 'high'; give a number"),
    # Fields that contradict each other.
    ({"num_frame_per_block": 3, "num_frames_per_block": 1}, "num_frame_per_block 3 and num_frames_per_block 1 contra"),
    ({"local_attn_size": 21, "sliding_window_num_frames": 12}, "local_attn_size 21 and sliding_window_num_frames 12"),
    ({"local_attn_size": 21, "model_kwargs": {"local_attn_size": 12}}, "model_kwargs.local_attn_size is 12.*keep one"),
    ({"sliding_window_num_frames": 12, "max_attention_num_frames": 21}, "21 is more than the 12 frames of the cache"),
    ({"local_attn_size": 12, "max_attention_size": 18721}, "18721 tokens, which the window of 12 frames do"),
    ({"local_attn_size": 4, "sink_size": 2, "num_frame_per_block": 3}, "local_attn_size 4, sink_size 2 do not go toge"),
    ({"causal": False}, "causal is false, which _class_name CausalWanModel contradicts"),
    ({"_class_name": "WanModel", "causal": False, "local_attn_size": 12}, "which local_attn_size contradicts"),
    ({"use_infinite_attention": True, "rope_cache_policy": "absolute"}, "contradict each other"),
]


@pytest.mark.parametrize(("fields", "says"), HOSTILE, ids=range(len(HOSTILE)))
def test_impossible_fields_are_one_line(
    fields: dict[str, Any], says: str, golden_state: State, golden_config: dict[str, Any], save_folder: SaveFolder
) -> None:
    folder = save_folder(golden_state, golden_config | CAUSAL | fields)
    with pytest.raises(ConfigError, match=rf"model.*config\.json: .*{says}"):
        open_checkpoint(folder)
    refused(folder.parent, "convert", folder, "-o", folder.parent / "out", "--init", "svd", says=says)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"independent_first_frame": True}, "independent_first_frame"),
        ({"bank_size": 3}, "bank_size 3: .*MemFlow"),
        ({"compression_alpha": 0.999}, "compression_alpha: .*Reward-Forcing"),
        ({"_class_name": "RollingForcingWanTransformer3DModel"}, "one chunk after the other"),
        # CausVid's steps are given as they are, Causal-Forcing++'s before the warp.
        ({"denoising_step_list": [1000, 757, 522, 0]}, "--timesteps 1000,757,522 --shift 1"),
        ({"denoising_step_list": [1000, 500], "warp_denoising_step": True}, "--timesteps 1000,500 --shift 5"),
        ({"do_kv_recomp": True}, "do_kv_recomp: the past is not computed again"),
        ({"do_kv_recomp": False}, None),
        ({"inference": {"multi_shot_sink": True, "multi_shot_rope_offset": 8}}, "multi_shot_sink: .*LongLive 2"),
        ({"inference": {"multi_shot_rope_offset": 0.0}}, None),
        (
            {"inference": {"sampling_steps": 4, "guidance_scale": 1.0}, "model_kwargs": {"timestep_shift": 7.0}},
            "--steps 4 --shift 7 --guidance 1$",
        ),
        ({"inference": {"sampling_steps": 30}, "guidance_scale": 3.0}, "--steps 30 --shift 5$"),  # 3 is training's
        # krea's are the usual ones, warped already.
        ({"denoising_step_list": [1000, 937, 833, 625, 0], "warp_denoising_step": False}, None),
        ({"denoising_step_list": [1000, 750, 500, 250], "warp_denoising_step": True, "timestep_shift": 5.0}, None),
    ],
)
def test_what_is_not_done_here_is_said(fields: dict[str, Any], says: str | None) -> None:
    remarks = read_timing(CAUSAL | fields).remarks
    assert len(remarks) == (says is not None)
    assert says is None or re.search(says, remarks[0])


def test_a_pipelines_class_says_few_step(golden_state: State, golden_config: dict[str, Any], tmp_path: Path) -> None:
    """FastVideo's and SGLang's folders name it in model_index.json, above the transformer."""
    folder = tmp_path / "student" / "transformer"
    folder.mkdir(parents=True)
    save_file(golden_state, folder / WEIGHTS_NAME)
    (folder / CONFIG_NAME).write_text(json.dumps(golden_config | {"_class_name": "CausalWanTransformer3DModel"}))
    for name, few_step in (("WanCausalDMDPipeline", True), ("CausalForcingPipeline", True), ("WanPipeline", False)):
        (tmp_path / "student" / "model_index.json").write_text(json.dumps({"_class_name": name}))
        with open_checkpoint(tmp_path / "student") as opened:
            assert opened.config.few_step == few_step
            assert ("few_step" in opened.timing.assumed) == (not few_step)
    (tmp_path / "student" / "model_index.json").write_text("{")  # only a hint
    with open_checkpoint(tmp_path / "student") as opened:
        assert not opened.config.few_step


def test_a_pipelines_class_is_read_on_the_hub(hub: Hub, golden_state: State, golden_config: dict[str, Any]) -> None:
    raw = golden_config | {"_class_name": "CausalWanTransformer3DModel", "num_frames_per_block": 2}
    files = {
        f"transformer/{WEIGHTS_NAME}": Blob(save(golden_state), True),
        f"transformer/{CONFIG_NAME}": Blob(json.dumps(raw).encode(), False),
        "model_index.json": Blob(json.dumps({"_class_name": "WanCausalDMDPipeline"}).encode(), False),
    }
    hub.create("user/student").commit(files)
    with open_checkpoint("user/student") as opened:
        assert opened.config.few_step
        assert opened.config.streaming == sees(2, 22, 0)  # 21 frames in whole chunks
        assert opened.timing.assumed == {"window_frames", "sink_frames"}


def test_a_codebases_yaml_tells_the_window(
    golden_state: State, golden_config: dict[str, Any], save_folder: SaveFolder, tmp_path: Path
) -> None:
    source, settings = save_folder(golden_state, golden_config), tmp_path / "longlive.yaml"
    settings.write_text(
        "denoising_step_list: [1000, 750, 500, 250]\nwarp_denoising_step: true\nnum_frame_per_block: 3\nseed: 0\n"
        "model_kwargs:\n  local_attn_size: 12\n  timestep_shift: 5.0\n  sink_size: 3\n"
    )
    code, _, stderr = invoke("convert", source, "-o", tmp_path / "out", "--init", "svd", "--config", settings)
    assert code == 0
    assert f"{ASSUMED}positions counted from the start; to set it: --positions, or a recipe\n" in stderr
    with open_checkpoint(tmp_path / "out") as opened:
        assert (opened.config.streaming, opened.config.few_step) == (sees(3, 12, 3), True)
    settings.write_text("num_frame_per_block: 1\n")  # a framewise model's
    with open_checkpoint(Source(source, config=settings)) as opened:
        assert (opened.config.streaming, opened.config.few_step) == (sees(1, 21, 0), False)
    settings.write_text("local_attn_size: many\n")
    refused(tmp_path, "convert", source, "-o", tmp_path / "no", "--config", settings, says="local_attn_size is 'many'")
    settings.write_text("- 3\n")
    refused(tmp_path, "convert", source, "-o", tmp_path / "no", "--config", settings, says="a mapping of fields")


@pytest.mark.parametrize("name", ["WanARModel", "MatrixGameWanModel", "StreamDiffusionV2", "WanTransformer3DModelV2"])
def test_a_class_that_nobody_knows_states_nothing(name: str) -> None:
    """Not even that it sees whole clips."""
    found = read_timing({"_class_name": name})
    assert found.streaming is None
    assert found.assumed == EVERYTHING
    for known in ("WanModel", "WanTransformer3DModel", "Wan2_2Transformer3DModel"):
        assert read_timing({"_class_name": known}).assumed == set()
