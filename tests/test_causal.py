"""How a model sees time: what the codebases' own fields mean, what is refused, and what is said when none states it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import invoke, refused
from hub_server import Blob, Hub
from safetensors.torch import save, save_file

from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.conversion.provenance import open_teacher
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.run import convert
from mlaconvert.errors import ConfigError
from mlaconvert.families.causal import EVERYTHING, STUDENT, read_timing
from mlaconvert.families.open import open_checkpoint
from mlaconvert.files.names import CONFIG_NAME, WEIGHTS_NAME
from mlaconvert.healing.recipe import HealRecipe
from mlaconvert.healing.run import heal
from mlaconvert.model.window import window_views

State = dict[str, torch.Tensor]
SaveFolder = Callable[..., Path]
CAUSAL = {"_class_name": "CausalWanModel"}
ASSUMED = "assumed, as no file or option states it: "


def sees(chunk: int, window: int, sink: int, positions: str = "absolute") -> StreamingConfig:
    return StreamingConfig(chunk_frames=chunk, window_frames=window, sink_frames=sink, positions=positions)  # type: ignore[arg-type]


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
    with open_checkpoint(source, config=settings) as opened:
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


# --- what is said, and how it is set -----------------------------------------------------------------------------


@pytest.fixture
def bare(golden_state: State, tmp_path: Path) -> Path:
    """A streaming student as it is passed on: weights of heads of 128 under a prefix, and no config.json."""
    from mlaconvert.config.geometry import WanConfig
    from mlaconvert.families.wan import WanFamily

    generator = torch.Generator().manual_seed(0)
    config = WanConfig(dim=256, num_heads=2, num_layers=1, ffn_dim=40, freq_dim=16, text_dim=24)
    state = {
        f"model.{name}": 0.06 * torch.randn(shape, generator=generator)
        for name, shape in WanFamily().expected_shapes(config).items()
    }
    save_file(state, tmp_path / "student.safetensors")
    save_file({"context": torch.randn(1, 4, 24, generator=generator)}, tmp_path / "text.safetensors")
    return tmp_path / "student.safetensors"


def said(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if "assumed" in line]


def written(folder: Path) -> tuple[dict[str, Any] | None, Any]:
    data = json.loads((folder / CONFIG_NAME).read_text())
    return data["streaming"], data.get("few_step")


def test_a_bare_file_opens_and_says_what_is_assumed(bare: Path, tmp_path: Path) -> None:
    code, _, stderr = invoke("convert", bare, "-o", tmp_path / "out", "--init", "svd")
    assert code == 0
    (line,) = said(stderr)
    assert line.startswith(f"{ASSUMED}a bidirectional model, many steps; to set it: ")
    assert all(f"--{name}-frames" in line for name in ("chunk", "window", "sink"))
    assert "--positions" in line
    assert "--few-step" in line
    assert "self-forcing-1.3b" in line
    assert written(tmp_path / "out") == (None, None)
    (line,) = said(invoke("analyze", bare)[2])
    assert line == (
        f"{ASSUMED}a bidirectional model, many steps; to set it: "
        "`streaming` and `few_step` in a config.json beside the weights"
    )
    size = ("--frames", "3", "--height", "32", "--width", "32", "--embeddings", tmp_path / "text.safetensors")
    (line,) = said(invoke("generate", bare, "-o", tmp_path / "video", *size, "--steps", "1")[2])
    assert "a bidirectional model, a window of 7 latent frames, chunks of 3, a sink of 1" in line


@pytest.mark.parametrize(
    ("options", "streaming", "few_step", "left"),
    [
        (["--recipe", "self-forcing-1.3b", "--kv-rank", "20"], sees(3, 21, 0), True, None),
        (["--bidirectional", "--many-step"], None, None, None),
        (["--bidirectional"], None, None, "many steps"),
        (["--bidirectional", "--few-step"], None, True, None),
        (
            [
                "--chunk-frames",
                "2",
                "--window-frames",
                "9",
                "--sink-frames",
                "1",
                "--positions",
                "window",
                "--few-step",
            ],
            *(sees(2, 9, 1, "window"), True, None),
        ),
        (
            ["--window-frames", "12", "--sink-frames", "3", "--few-step"],
            *(sees(3, 12, 3), True, "chunks of 3, positions counted from the start"),
        ),
        (
            ["--recipe", "self-forcing-1.3b", "--kv-rank", "20", "--window-frames", "12", "--sink-frames", "3"],
            *(sees(3, 12, 3), True, None),
        ),
    ],
)
def test_options_and_recipes_set_what_a_bare_file_leaves_open(
    bare: Path,
    tmp_path: Path,
    options: list[str],
    streaming: StreamingConfig | None,
    few_step: bool | None,
    left: str | None,
) -> None:
    code, _, stderr = invoke("convert", bare, "-o", tmp_path / "out", *options, "--init", "svd")
    assert code == 0, stderr
    lines = said(stderr)
    assert [line.removeprefix(ASSUMED).partition("; ")[0] for line in lines] == ([left] if left else [])
    section, few = written(tmp_path / "out")
    assert (section and StreamingConfig(**section), few) == (streaming, few_step)
    with open_checkpoint(tmp_path / "out") as opened:  # all of it is stated now
        assert opened.timing.assumed == frozenset()
        assert opened.config.few_step == bool(few_step)


def test_options_that_exclude_each_other(bare: Path, tmp_path: Path) -> None:
    convert_ = ("convert", bare, "-o", tmp_path / "out", "--init", "svd")
    refused(tmp_path, *convert_, "--bidirectional", "--window-frames", "9", says="bidirectional and window_frames excl")
    refused(tmp_path, *convert_, "--positions", "x", says="options: positions is 'x': give window or absolute")
    refused(tmp_path, *convert_, "--window-frames", "2", says="window_frames is 2")
    generate = ("generate", bare, "-o", tmp_path / "video", "--embeddings", tmp_path / "text.safetensors")
    refused(tmp_path, *generate, "--few-step", "--steps", "3", says="few_step and steps")
    refused(tmp_path, *generate, "--many-step", "--timesteps", "900", says="timesteps .few-step. and many steps")
    refused(tmp_path, *generate, "--positions", "x", says="positions is 'x': give window or absolute")


def test_a_student_generates_in_four_steps_and_says_so(bare: Path, tmp_path: Path) -> None:
    """Converted with the recipe it is known; a bare file needs the option."""
    assert (
        invoke("convert", bare, "-o", tmp_path / "out", "--init", "svd", "--window-frames", "9", "--few-step")[0] == 0
    )
    size = ("--frames", "3", "--height", "32", "--width", "32", "--embeddings", tmp_path / "text.safetensors")
    window = ("--chunk-frames", "3", "--window-frames", "9", "--sink-frames", "0", "--positions", "absolute")
    for model, options in ((tmp_path / "out", ()), (bare, ("--few-step", *window))):
        code, _, stderr = invoke("generate", model, "-o", tmp_path / f"video of {model.name}", *size, *options)
        assert code == 0, stderr
        assert "a few-step student: timesteps 1000, 750, 500, 250, warped by shift 5\n" in stderr
        assert not said(stderr)
        settings = json.loads((tmp_path / f"video of {model.name}" / "generation.json").read_text())["settings"]
        # 1000 * 5 s / (1 + 4 s) for s of 1, 3/4, 1/2 and 1/4
        assert settings["sampler"]["timesteps"] == pytest.approx([1000, 3750 / 4, 2500 / 3, 1250 / 2])
        assert settings["streaming"] == {
            **{"chunk_frames": 3, "window_frames": 9, "sink_frames": 0, "positions": "absolute"}
        }


def test_the_teacher_of_a_bare_student_is_as_the_recipe_took_it(bare: Path, tmp_path: Path) -> None:
    """And one that nothing is known of is said to be assumed when a student is healed."""
    convert(bare, tmp_path / "few", ConvertRecipe(init="svd", kv_rank=40, streaming=sees(1, 3, 0), few_step=True))
    with open_teacher(str(tmp_path / "few"), json.loads((tmp_path / "few" / "conversion.json").read_text())) as teacher:
        assert (teacher.config.streaming, teacher.config.few_step) == (sees(1, 3, 0), True)
    convert(bare, tmp_path / "many", ConvertRecipe(init="svd", kv_rank=40, streaming=sees(1, 3, 0)))
    lines: list[str] = []
    generator = torch.Generator().manual_seed(3)
    (tmp_path / "clips").mkdir()
    clips = {"latents": torch.randn(5, 16, 3, 4, 6, generator=generator), "context": torch.randn(5, 2, 24)}
    save_file(clips, tmp_path / "clips" / "a.safetensors")
    recipe = HealRecipe(stage="distill", steps=1, batch=1, validation_clips=1, precision="float32", tracker="none")
    heal(tmp_path / "many", tmp_path / "healed", recipe, data=tmp_path / "clips", cpu=True, say=lines.append)
    assert [line.partition(";")[0] for line in lines if "assumed" in line] == [
        f"teacher: {ASSUMED}a bidirectional model, many steps"
    ]


def test_a_sink_and_absolute_positions_are_calibrated(
    golden_state: State, golden_config: dict[str, Any], save_folder: SaveFolder, tmp_path: Path
) -> None:
    """LongLive's are both; the default way to convert takes them, and says what its statistics leave out."""
    fields = {"local_attn_size": 5, "sink_size": 1, "num_frame_per_block": 2, "few_step": True}
    source = save_folder(golden_state, golden_config | CAUSAL | fields)
    recipe, lines = ConvertRecipe(clips=2, height=32, width=48, kv_rank=30), list[str]()
    convert(source, tmp_path / "out", recipe, say=lines.append)
    assert lines == ["calibrated on windows whose positions count from the sink; the model counts from the start"]
    assert written(tmp_path / "out") == (
        {"chunk_frames": 2, "window_frames": 5, "sink_frames": 1, "positions": "absolute"},
        True,
    )


def test_both_experts_are_read_and_said_once(
    golden_state: State, golden_config: dict[str, Any], save_folder: SaveFolder, tmp_path: Path
) -> None:
    for name in ("high_noise_model", "low_noise_model"):
        save_folder(golden_state, golden_config | CAUSAL | {"local_attn_size": 8, "sink_size": 1}, f"pair/{name}")
    code, _, stderr = invoke("convert", tmp_path / "pair", "-o", tmp_path / "out", "--init", "svd")
    assert (code, len(said(stderr))) == (0, 1)
    assert all(
        written(tmp_path / "out" / name)[0] == {"chunk_frames": 3, "window_frames": 8, "sink_frames": 1}
        | {"positions": "absolute"}
        for name in ("high_noise_model", "low_noise_model")
    )  # fmt: skip
