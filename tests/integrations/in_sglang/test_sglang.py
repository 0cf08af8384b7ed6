"""Converted models in SGLang's causal pipeline: beside our own model and cache, the plan of `analyze`, and by hand."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sglang_standin
import torch
from sglang_cases import CACHE_BYTES, FRAMES, SHIPPED, TOKENS, expected, make_base, make_converted, make_dense, request
from support import count_bits, relative

from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.run import convert
from mlaconvert.errors import InputError, UnsupportedModelError
from mlaconvert.model.memory import StreamedVideo, plan_memory

HERE = Path(__file__).parent
CHUNKS_OF_2 = StreamingConfig(chunk_frames=2, window_frames=5, sink_frames=1)
NO_SINK = StreamingConfig(chunk_frames=3, window_frames=6, sink_frames=0, positions="absolute")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sglang")
    base = make_base(root / "base")
    dense = base / "transformer"
    found = {
        "base": base,
        "dense": dense,
        "converted": make_converted(root / "converted", base),
        "of the transformer alone": make_converted(root / "alone", dense),
        "native": make_converted(root / "native", dense, layout="native", present="exact", rope="head"),
        "cached rotary key": make_converted(
            root / "cached", dense, layers=None, key_norm="latent", rope="cached", q_rank=24, streaming=NO_SINK
        ),
        "chunks of 2": make_converted(root / "chunks of 2", base, streaming=CHUNKS_OF_2),
        "bidirectional": make_converted(root / "bidirectional", dense, streaming=None),
        "in bits": make_converted(root / "in bits", dense),
        "image": make_converted(root / "image", make_dense(root / "dense image", in_channels=36)),
    }
    count_bits(found["in bits"])
    return found


@pytest.fixture
def ours() -> Iterator[Any]:
    with sglang_standin.standing_in():
        yield importlib.import_module("mlaconvert.integrations.sglang")


def open_pipeline(ours: Any, folder: Path, **changes: Any) -> tuple[Any, Any, Any]:
    """The pipeline around a converted folder, its denoising stage and the arguments that it was made with."""
    given = {"component_paths": {"transformer": str(folder)}} | changes
    arguments = sglang_standin.server_args(**given)
    sglang_standin.SERVER_ARGS[-1] = arguments
    with pytest.warns(UserWarning, match="does not say that it is a few-step student"):
        pipeline = ours.WanMLAPipeline(
            str(folder if "component_paths" in changes else folder.parent / "base"), arguments
        )
    (stage,) = [stage for stage in pipeline.stages if hasattr(stage, "causal_kv_cache")]
    return pipeline, stage, arguments


def test_importing_the_package_registers_the_pipeline(ours: Any) -> None:
    pipeline, sampling, config = sglang_standin.PIPELINES["WanMLAPipeline"]
    assert (pipeline, sampling, config) == (ours.WanMLAPipeline, ours.WanMLASamplingParams, ours.WanMLAPipelineConfig)
    assert (sampling().guidance_scale, sampling().num_inference_steps, sampling().num_frames) == (1.0, 4, 81)


@pytest.mark.parametrize(("asked", "made"), [(81, 81), (83, 83), (17, 9), (1, 9), (37, 33), (45, 45)])
def test_whole_chunks_are_made(ours: Any, asked: int, made: int) -> None:
    """Chunks of 3 latent frames, of which each but the first stands for 4 of video: 9, 21, 33, 45, ..., 81."""
    config = ours.WanMLAPipelineConfig()
    assert config.adjust_num_frames(asked, log_adjustment=False) == made
    if asked != made:
        with pytest.warns(UserWarning, match=f"num_frames is {asked}.*; {made} are made"):
            config.adjust_num_frames(asked)


@pytest.mark.parametrize(
    ("name", "asked", "made"),
    [("chunks of 2", 29, 29), ("chunks of 2", 33, 29), ("converted", 41, 33), ("gone", 41, 33)],
)
@pytest.mark.parametrize("beside_a_base", [True, False])
def test_whole_chunks_are_the_folders(
    ours: Any, folders: dict[str, Path], name: str, asked: int, made: int, beside_a_base: bool
) -> None:
    """Known before the model is loaded; what cannot be read is refused by the loader, and not here."""
    folder = str(folders.get(name, folders["base"].parent / name))
    paths = {"transformer": folder} if beside_a_base else {}
    config = ours.WanMLAPipelineConfig()
    config.update_config_from_dict({"model_path": str(folders["base"]) if paths else folder, "component_paths": paths})
    assert config.adjust_num_frames(asked, log_adjustment=False) == made


@pytest.mark.parametrize("name", ["converted", "native", "in bits", "cached rotary key"])
def test_a_request_gives_what_our_own_model_gives(ours: Any, folders: dict[str, Path], name: str) -> None:
    """Beyond the window; the second one begins in the first one's memory."""
    pipeline, stage, arguments = open_pipeline(ours, folders[name])
    assert [stage if isinstance(stage, str) else type(stage).__name__ for stage in pipeline.stages] == [
        *("InputValidationStage", "text", "latents", "LatentCausalDenoisingStage", "decoding")
    ]
    kept = []
    for seed in (3, 4):
        found = stage.forward(request(seed), arguments).latents
        assert relative(found, expected(folders[name], request(seed))) < 1e-5
        kept.append([buffer.data_ptr() for layer in stage.causal_kv_cache for buffer in layer.layer.buffers])
    assert kept[0] == kept[1]


def test_the_built_in_model_gives_what_it_gives_with_us(ours: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    """Pixels for latents, patches of 4 x 4, and its own window."""
    convert("tiny", tmp_path / "tiny-mla", ConvertRecipe(init="svd"))
    given = {"transformer": str(tmp_path / "tiny-mla")}
    _, stage, arguments = open_pipeline(ours, folders["base"], component_paths=given)
    found = stage.forward(request(9, **SHIPPED), arguments).latents
    assert relative(found, expected(tmp_path / "tiny-mla", request(9, **SHIPPED))) < 1e-5


def test_a_converted_folder_alone_finds_its_base(ours: Any, folders: dict[str, Path]) -> None:
    """The repository that its conversion.json names."""
    pipeline, _, arguments = open_pipeline(ours, folders["converted"], component_paths={})
    assert pipeline.model_path == str(folders["base"])
    assert arguments.component_paths == {"transformer": str(folders["converted"])}


def test_a_converted_folder_whose_base_is_not_known_says_what_to_give(ours: Any, folders: dict[str, Path]) -> None:
    folder = folders["of the transformer alone"]
    with pytest.raises(InputError, match=r"not known; give it as --model-path, .*alone as --transformer-path$"):
        ours.WanMLAPipeline(str(folder), sglang_standin.server_args())


def test_a_native_base_is_not_sglangs(ours: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["converted"], tmp_path / "converted")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "Wan2.1_VAE.pth").touch()
    with pytest.raises(InputError, match=r"base is not in the layout of diffusers.*--transformer-path$"):
        ours.WanMLAPipeline(str(tmp_path / "converted"), sglang_standin.server_args())


def test_a_failure_of_another_kind_does_not_lead_to_diffusers_class(
    ours: Any, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("mlaconvert.integrations.sglang.transformer.load_model", fail)
    with pytest.raises(RuntimeError, match="Failed to load customized transformer"):
        ours.WanMLAPipeline(str(folders["converted"]), sglang_standin.server_args())


def test_another_size_gets_another_cache(ours: Any, folders: dict[str, Path]) -> None:
    _, stage, arguments = open_pipeline(ours, folders["converted"])
    for width in (10, 14, 10):
        found = stage.forward(request(5, width=width), arguments).latents
        assert relative(found, expected(folders["converted"], request(5, width=width))) < 1e-5


@pytest.mark.parametrize(("precision", "itemsize"), [("fp32", 4), ("bf16", 2)])
def test_the_cache_takes_what_analyze_plans(ours: Any, folders: dict[str, Path], precision: str, itemsize: int) -> None:
    config = ours.WanMLAPipelineConfig(dit_precision=precision)
    _, stage, arguments = open_pipeline(ours, folders["converted"], pipeline_config=config)
    asked = request(6)
    found = stage.forward(asked, arguments).latents
    held = sum(layer.nbytes for layer in stage.causal_kv_cache)
    assert held == CACHE_BYTES[itemsize] == stage.transformer.contract.cache_bytes(TOKENS, itemsize)
    video = StreamedVideo(height=48, width=80, window_frames=7)
    assert (
        held == plan_memory(stage.transformer.model.config, video=video, cache_itemsize=itemsize).mla.bytes_per_window
    )
    (said,) = [line for line in stage.said if "latent KV cache" in line]
    assert said == f"latent KV cache of 7 latent frames: {held / 1024:.1f} KiB"
    assert relative(found.float(), expected(folders["converted"], request(6))) < (1e-5 if itemsize == 4 else 0.05)


def test_what_stages_ask_of_a_cache(ours: Any, folders: dict[str, Path]) -> None:
    _, stage, arguments = open_pipeline(ours, folders["converted"])
    stage.forward(request(7), arguments)
    assert len(stage.causal_kv_cache) == len(stage.crossattn_cache) == 3
    for layer in stage.causal_kv_cache:
        assert (layer.cache_size, layer.attention_window_size, layer.sink_tokens) == (7 * TOKENS, 7 * TOKENS, TOKENS)
        assert layer.num_cache_heads == stage._num_causal_cache_attention_heads(sequence_shard_enabled=False) == 1
        assert layer.global_sink_tokens == 0
        assert layer.cache.end == FRAMES
    text = stage.crossattn_cache[1]
    assert text.is_init
    text.reset()
    assert not text.is_init
    with pytest.raises(UnsupportedModelError, match="cannot be moved"):
        stage.causal_kv_cache[0].pin_current_chunk(TOKENS)
    with pytest.raises(UnsupportedModelError, match="global_sink_tokens"):
        stage._initialize_kv_cache(1, torch.float32, torch.device("cpu"), global_sink_tokens=5)


def test_a_window_that_sglang_overrides_is_the_caches(ours: Any, folders: dict[str, Path]) -> None:
    _, stage, arguments = open_pipeline(ours, folders["converted"])
    stage.sliding_window_num_frames, stage.sink_size = 9, 3
    stage.forward(request(8), arguments)
    assert stage.causal_kv_cache[0].cache_size == 9 * TOKENS
    assert stage.causal_kv_cache[0].sink_tokens == 3 * TOKENS


def test_sglang_reads_sizes_and_window_from_its_own_fields(ours: Any, folders: dict[str, Path]) -> None:
    pipeline, _, arguments = open_pipeline(ours, folders["native"])
    transformer = pipeline.get_module("transformer")
    assert transformer.config is arguments.pipeline_config.dit_config.arch_config
    found = {name: getattr(transformer.config, name) for name in (
        "num_layers", "num_attention_heads", "attention_head_dim", "in_channels", "patch_size", "num_frames_per_block",
        "sliding_window_num_frames", "sink_size", "local_attn_size",
    )}  # fmt: skip
    assert list(found.values()) == [3, 4, 16, 16, (1, 2, 2), 3, 7, 1, -1]
    assert (transformer.hidden_size, transformer.num_channels_latents) == (64, 16)


def test_a_base_that_says_nothing_of_steps_gets_the_students(ours: Any, folders: dict[str, Path]) -> None:
    """As Wan's 14B, whose settings in SGLang are those of many steps."""
    config = sglang_standin.SelfForcingWanT2V480PConfig(
        dit_precision="fp32", dmd_denoising_steps=None, flow_shift=3.0, warp_denoising_step=False
    )
    _, stage, arguments = open_pipeline(ours, folders["converted"], pipeline_config=config)
    found = stage.forward(request(3), arguments).latents
    assert relative(found, expected(folders["converted"], request(3))) < 1e-5


def test_a_folder_that_says_it_is_a_student_is_no_reason_to_warn(
    ours: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Warnings are errors in tests."""
    shutil.copytree(folders["converted"], tmp_path / "student")
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    (tmp_path / "student" / "config.json").write_text(json.dumps(config | {"few_step": True}))
    arguments = sglang_standin.server_args(component_paths={"transformer": str(tmp_path / "student")})
    assert ours.WanMLAPipeline(str(folders["base"]), arguments).get_module("transformer").model.config.few_step


def test_guidance_that_is_not_used_is_said(ours: Any, folders: dict[str, Path]) -> None:
    _, stage, arguments = open_pipeline(ours, folders["converted"])
    stage.forward(request(3, do_classifier_free_guidance=True), arguments)
    assert stage.said[0].startswith("guidance_scale is not used")


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "dense": ("dense", {}, "is not converted"),
    "bidirectional": ("bidirectional", {}, "has no cache"),
    "image": ("image", {}, "image-to-video models do not run"),
    "nothing there": ("nothing", {}, "nothing"),
    "tensor parallelism": ("converted", {"tp_size": 2}, "tp_size is 2.*--dp-size"),
    "sequence parallelism": ("converted", {"ulysses_degree": 4}, "ulysses_degree is 4"),
    "a LoRA": ("converted", {"lora_path": "style"}, "lora_path.*convert --lora"),
    "quantised": ("converted", {"quantization": "fp8"}, "quantization"),
    "weights alone": ("converted", {"transformer_weights_path": "x"}, "transformer_weights_path.*--transformer-path"),
    "a quantised cache": ("converted", {"kv_cache_quant_config": SimpleNamespace(enabled=True)}, "kv_cache_quant"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_run_is_refused_in_one_line(ours: Any, folders: dict[str, Path], name: str) -> None:
    """By SGLang's own class of errors, which it does not answer with a fallback to diffusers' class."""
    folder, changes, message = REFUSED[name]
    arguments = sglang_standin.server_args(
        component_paths={"transformer": str(folders.get(folder, folders["base"].parent / folder))}, **changes
    )
    with pytest.raises(sglang_standin.ComponentCheckpointUnsupportedError, match=message) as caught:
        ours.WanMLAPipeline(str(folders["base"]), arguments)
    assert "\n" not in str(caught.value)


def test_compiling_goes_block_by_block(ours: Any, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []

    def compile_blocks(model: Any) -> None:
        compiled.append(model)

    monkeypatch.setattr("mlaconvert.model.wan.WanModel.compile_blocks", compile_blocks)
    pipeline, _, _ = open_pipeline(ours, folders["converted"], enable_torch_compile=True)
    assert compiled == [pipeline.get_module("transformer").model]


def test_without_sglang_it_is_said_what_to_install() -> None:
    if find_spec("sglang") is not None:
        pytest.skip("sglang is installed")
    with pytest.raises(ImportError, match=r"cannot be imported .*pip install 'sglang\[diffusion\]"):
        importlib.import_module("mlaconvert.integrations.sglang")


@pytest.mark.slow
def test_in_sglang_itself(tmp_path: Path) -> None:
    if find_spec("sglang") is None:
        pytest.skip("needs sglang, which is no dependency")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1]), *sys.path])}
    command = [sys.executable, str(HERE / "sglang_itself.py"), str(tmp_path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "both requests are ours" in done.stdout
