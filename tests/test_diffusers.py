"""Converted models in diffusers: loaded, saved, in pipelines, offloaded, compiled, and with LoRAs."""

from __future__ import annotations

import dataclasses
import filecmp
import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SaveFolder, relative
from documents import blocks, shell_lines
from hub_server import Blob, Hub
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from typer.testing import CliRunner

from mlaconvert.cli import app
from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.run import convert
from mlaconvert.errors import ConfigError, InputError, OutputError, UnsupportedModelError
from mlaconvert.families.open import open_checkpoint
from mlaconvert.families.wan import WanFamily
from mlaconvert.files.names import CONFIG_NAME, WEIGHTS_NAME
from mlaconvert.model.load import load_model
from mlaconvert.model.wan import WanModel

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from accelerate import cpu_offload, disk_offload  # noqa: E402
from wan_diffusers import IMAGE, SMALL, inputs, reference  # noqa: E402

from mlaconvert.integrations.diffusers import WanMLATransformer3DModel  # noqa: E402

TOLERANCE = 1e-5
STREAMING = StreamingConfig(chunk_frames=2, window_frames=5, sink_frames=1)


@pytest.fixture(scope="module")
def teacher() -> Any:
    return reference()


@pytest.fixture(scope="module")
def folders(teacher: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Conversions of `teacher`: all layers, some, all of a streaming model, in both layouts, and lossless."""
    root = tmp_path_factory.mktemp("diffusers")
    teacher.save_pretrained(root / "source")
    recipes = {
        "svd": ConvertRecipe(init="svd"),
        "partly": ConvertRecipe(init="svd", layers="0,2", layout="native"),
        "streaming": ConvertRecipe(init="svd", layers="1", streaming=STREAMING, key_norm="token", rope="latent"),
        "lossless": ConvertRecipe(init="lossless", layout="native"),
    }
    for name, recipe in recipes.items():
        convert(root / "source", root / name, recipe)
    return {name: root / name for name in ("source", *recipes)}


# --- both layouts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_dim", [None, 10])
@pytest.mark.parametrize("text_len", [512, 16])
def test_the_config_of_a_layout_is_read_back(image_dim: int | None, text_len: int) -> None:
    """What diffusers' own class makes of its fields, and what we read from ours."""
    family = WanFamily()
    config = WanConfig(
        dim=36, num_heads=3, num_layers=2, ffn_dim=44, text_len=text_len, image_dim=image_dim, text_dim=14
    )
    shapes = family.expected_shapes(config)
    raw = family.raw_config(config, "diffusers")
    theirs = diffusers.WanTransformer3DModel.from_config(raw)
    assert {name: tuple(p.shape) for name, p in theirs.named_parameters()} == {
        family.source(name, "diffusers"): shape for name, shape in shapes.items()
    }
    infos = {name: _info(name, shape) for name, shape in shapes.items()}
    assert family.parse_config(raw, infos) == dataclasses.replace(config, model_type=config.model_type)
    assert set(raw) - {"text_len", "_class_name"} == {name for name in theirs.config if not name.startswith("_")} - {
        "text_len"
    }


def _info(name: str, shape: tuple[int, ...]) -> Any:
    from mlaconvert.files.headers import TensorInfo

    return TensorInfo(name, shape, torch.float32, 0)


@pytest.mark.parametrize("layout", ["native", "diffusers", None])
def test_convert_writes_the_layout_that_is_asked_for(folders: dict[str, Path], tmp_path: Path, layout: Any) -> None:
    convert(folders["source"], tmp_path / "out", ConvertRecipe(init="svd", layout=layout))
    with open_checkpoint(tmp_path / "out") as found, open_checkpoint(folders["svd"]) as expected:
        assert found.layout == (layout or "diffusers")
        assert found.config == expected.config
        assert set(found.names) == set(expected.names)
        for name in found.names:
            assert torch.equal(found.read(name), expected.read(name)), name
    names = load_file(tmp_path / "out" / WEIGHTS_NAME)
    assert ("blocks.0.self_attn.kv_b_proj.weight" in names) == (layout == "native")
    raw = json.loads((tmp_path / "out" / CONFIG_NAME).read_text())
    assert ("num_heads" in raw) == (layout == "native")
    assert raw["_class_name"] == "WanMLATransformer3DModel"


def test_a_native_source_becomes_diffusers(golden: Path, tmp_path: Path) -> None:
    """Dense layers of the output load into diffusers' own class."""
    convert(golden, tmp_path / "out", ConvertRecipe(init="svd", layers="1", layout="diffusers"))
    weights = load_file(tmp_path / "out" / WEIGHTS_NAME)
    theirs = diffusers.WanTransformer3DModel.from_config(json.loads((tmp_path / "out" / CONFIG_NAME).read_text()))
    found = theirs.load_state_dict(weights, strict=False)
    assert {name.split(".")[1] for name in (*found.missing_keys, *found.unexpected_keys)} == {"1"}


# --- the transformer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["svd", "partly", "streaming", "lossless"])
@pytest.mark.parametrize("text", [512, 9])
@torch.no_grad()
def test_equals_our_runtime(folders: dict[str, Path], name: str, text: int) -> None:
    """Our runtime fills texts up to 512 tokens as Wan's own code does; in diffusers, the pipeline does it."""
    ours, theirs = load_model(folders[name]), WanMLATransformer3DModel.from_pretrained(folders[name])
    x, t, context = inputs(text=text)
    expected = ours(x, t, context)
    context = functional.pad(context, (0, 0, 0, 512 - text))
    assert relative(theirs(x, t, context).sample, expected) < TOLERANCE
    assert relative(theirs(x, t, context, return_dict=False)[0], expected) < TOLERANCE
    if name == "streaming":
        everything_seen = dataclasses.replace(ours.config, streaming=None)
        seen = WanModel(everything_seen)
        seen.load_state_dict(ours.state_dict())
        assert relative(seen(x, t, context), expected) > 1e-3


@torch.no_grad()
def test_lossless_and_dense_equal_diffusers_own(teacher: Any, folders: dict[str, Path]) -> None:
    """In one timestep a video, and in one a token as Wan2.2 5B's pipeline gives them."""
    lossless = WanMLATransformer3DModel.from_pretrained(folders["lossless"])
    dense = WanMLATransformer3DModel.from_pretrained(folders["source"])
    x, t, context = inputs()
    tokens = torch.linspace(0, 900, 5 * 3 * 5).expand(2, -1)
    for timestep in (t, tokens):
        expected = teacher(x, timestep, context).sample
        assert relative(dense(x, timestep, context).sample, expected) == 0
        assert relative(lossless(x, timestep, context).sample, expected) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("text", [1, 9, 77, 226, 511, 513])
@torch.no_grad()
def test_text_of_any_length_is_read_as_diffusers_reads_it(
    folders: dict[str, Path], text: int, dtype: torch.dtype
) -> None:
    teacher = diffusers.WanTransformer3DModel.from_pretrained(folders["source"], torch_dtype=dtype)
    lossless = WanMLATransformer3DModel.from_pretrained(folders["lossless"], torch_dtype=dtype)
    x, t, context = (part.to(dtype) for part in inputs(text=text))
    expected = teacher(x, t, context).sample
    assert relative(lossless(x, t, context).sample, expected) < TOLERANCE
    if text < 500:
        filled = functional.pad(context, (0, 0, 0, 512 - text))
        assert relative(lossless(x, t, filled).sample, expected) > 1e-3


@torch.no_grad()
def test_image_to_video(save_folder: SaveFolder, tmp_path: Path) -> None:
    model = reference(**IMAGE)
    source = save_folder({k: v.contiguous() for k, v in model.state_dict().items()}, dict(model.config))
    convert(source, tmp_path / "lossless", ConvertRecipe(init="lossless"))
    lossless = WanMLATransformer3DModel.from_pretrained(tmp_path / "lossless")
    for text, tokens in ((512, 257), (512, 0), (300, 257)):  # the last is read askew, as diffusers reads it
        x, t, context = inputs(9, 3, text)
        features = torch.randn(2, tokens, 10) if tokens else None
        assert relative(lossless(x, t, context, features).sample, model(x, t, context, features).sample) < TOLERANCE
    convert(source, tmp_path / "out", ConvertRecipe(init="svd"))
    ours, theirs = load_model(tmp_path / "out"), WanMLATransformer3DModel.from_pretrained(tmp_path / "out")
    x, t, context = inputs(9, 3)
    image = torch.randn(2, 257, 10)
    expected = ours(x, t, context, image_features=image)
    assert relative(theirs(x, t, context, image).sample, expected) < TOLERANCE
    assert relative(theirs(x, t, context).sample, expected) > 1e-3
    with pytest.raises(UnsupportedModelError, match="512"):
        WanMLATransformer3DModel(**SMALL, image_dim=10, added_kv_proj_dim=36, text_len=16)


@pytest.mark.parametrize("name", ["svd", "partly", "streaming"])
def test_saving_writes_back_what_was_loaded(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    model = WanMLATransformer3DModel.from_pretrained(folders[name])
    model.save_pretrained(tmp_path / "new" / "folder")
    for file in (WEIGHTS_NAME, CONFIG_NAME, "conversion.json"):
        assert filecmp.cmp(folders[name] / file, tmp_path / "new" / "folder" / file, shallow=False), file
    with pytest.raises(OutputError, match="overwrite=True"):
        model.save_pretrained(folders[name])
    with torch.no_grad():
        model.proj_out.bias.add_(1)
    model.save_pretrained(tmp_path / "new" / "folder", overwrite=True, max_shard_size="40KB")
    again = WanMLATransformer3DModel.from_pretrained(tmp_path / "new" / "folder")
    assert len(list((tmp_path / "new" / "folder").glob("*.safetensors"))) > 1
    assert torch.equal(again.proj_out.bias, model.proj_out.bias)
    assert load_model(tmp_path / "new" / "folder").config == load_model(folders[name]).config


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own way of sending files
def test_a_repository_on_the_hub(folders: dict[str, Path], hub: Hub) -> None:
    for name in ("svd", "partly"):  # diffusers' layout and the native one
        files = {file.name: Blob(file.read_bytes(), file.suffix == ".safetensors") for file in folders[name].iterdir()}
        hub.create(f"alice/{name}").commit(files)
        found = WanMLATransformer3DModel.from_pretrained(f"alice/{name}").state_dict()
        expected = WanMLATransformer3DModel.from_pretrained(folders[name]).state_dict()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_model_made_from_a_config_is_saved_as_one(folders: dict[str, Path], tmp_path: Path) -> None:
    loaded = WanMLATransformer3DModel.from_pretrained(folders["svd"])
    made = WanMLATransformer3DModel.from_config(loaded.config)
    made.load_state_dict(loaded.state_dict())
    made.save_pretrained(tmp_path / "made")
    x, t, context = inputs()
    with torch.no_grad():
        assert relative(load_model(tmp_path / "made")(x, t, context), load_model(folders["svd"])(x, t, context)) == 0


def test_half_precision_keeps_what_diffusers_keeps(folders: dict[str, Path], tmp_path: Path) -> None:
    kept = WanMLATransformer3DModel.from_pretrained(folders["svd"], torch_dtype=torch.bfloat16)
    theirs = diffusers.WanTransformer3DModel.from_pretrained(folders["source"], torch_dtype=torch.bfloat16)
    dtypes = {name: p.dtype for name, p in theirs.named_parameters()}
    common = {name: p.dtype for name, p in kept.named_parameters() if name in dtypes}
    assert len(common) > 40
    assert common == {name: dtypes[name] for name in common}
    assert kept.dtype == theirs.dtype == torch.bfloat16
    x, t, context = inputs()
    with torch.no_grad():
        found = kept(x.bfloat16(), t, context.bfloat16()).sample
        assert relative(found, load_model(folders["svd"])(x, t, context)) < 0.03
    convert(folders["source"], tmp_path / "half", ConvertRecipe(init="svd", dtype="bfloat16"))
    half = WanMLATransformer3DModel.from_pretrained(tmp_path / "half")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    half.save_pretrained(tmp_path / "again")
    assert filecmp.cmp(tmp_path / "half" / WEIGHTS_NAME, tmp_path / "again" / WEIGHTS_NAME, shallow=False)


def test_options_that_mean_nothing_here_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="token"):
        WanMLATransformer3DModel.from_pretrained(folders["svd"], token="secret")
    model = WanMLATransformer3DModel.from_pretrained(folders["svd"], low_cpu_mem_usage=True, variant=None)
    for option in ({"variant": "fp16"}, {"push_to_hub": True}, {"safe_serialization": False}):
        with pytest.raises(ConfigError, match=next(iter(option))):
            model.save_pretrained(tmp_path / "out", **option)
    with pytest.raises(ConfigError, match="5GB"):
        model.save_pretrained(tmp_path / "out", max_shard_size="5 parsecs")
    assert not (tmp_path / "out").exists()


def test_importing_mlaconvert_imports_no_diffusers() -> None:
    code = "import sys, mlaconvert.cli, mlaconvert.integrations; print('diffusers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "False\n"


# --- in a pipeline -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    """Small random components in the classes of the published pipelines."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "red": 4, "square": 5}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    encoder = UMT5Config(
        vocab_size=11, d_model=14, d_kv=5, d_ff=20, num_layers=2, num_heads=2, relative_attention_num_buckets=4
    )
    torch.manual_seed(0)
    return {
        "tokenizer": PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>"),
        "text_encoder": UMT5EncoderModel(encoder).eval(),
        "vae": diffusers.AutoencoderKLWan(
            base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
            latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
        ).eval(),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    }  # fmt: skip


SHOT: dict[str, Any] = {
    "prompt": "a red square",
    "negative_prompt": "square",
    "height": 48,
    "width": 80,
    "num_frames": 9,
    "num_inference_steps": 3,
    "guidance_scale": 4.0,
    "max_sequence_length": 7,
    "output_type": "latent",
}


def pipeline(parts: dict[str, Any], transformer: Any, **options: Any) -> Any:
    made = diffusers.WanPipeline(transformer=transformer, **parts, **options)
    made.set_progress_bar_config(disable=True)
    return made


def shoot(pipe: Any, **changes: Any) -> Tensor:
    return pipe(**SHOT | changes, generator=torch.Generator().manual_seed(3)).frames


@torch.no_grad()
def by_hand(parts: dict[str, Any], model: WanModel) -> Tensor:
    """The same video by our runtime: the pipeline's encoder and noise, Euler steps written out."""
    tokenizer, encoder = parts["tokenizer"], parts["text_encoder"]
    texts = []
    for prompt in (SHOT["prompt"], SHOT["negative_prompt"]):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        state = encoder(
            functional.pad(ids, (0, 7 - ids.shape[1])), (torch.arange(7) < ids.shape[1])[None]
        ).last_hidden_state
        texts.append(state[:, : ids.shape[1]])
    x = torch.randn(1, 4, 3, 6, 10, generator=torch.Generator().manual_seed(3))
    scheduler = parts["scheduler"]
    scheduler.set_timesteps(3)
    sigmas = scheduler.sigmas.tolist()
    for now, after in pairwise(sigmas):
        conditional, empty = (model(x, torch.tensor([1000 * now]), text) for text in texts)
        x = x + (after - now) * torch.lerp(empty, conditional, SHOT["guidance_scale"])
    return x


@pytest.mark.parametrize("name", ["svd", "streaming"])
def test_a_pipeline_makes_what_our_runtime_makes(
    parts: dict[str, Any], teacher: Any, folders: dict[str, Path], name: str
) -> None:
    pipe = pipeline(parts, teacher)
    dense = shoot(pipe)
    pipe.transformer = WanMLATransformer3DModel.from_pretrained(folders[name])
    found = shoot(pipe, max_sequence_length=512)
    assert relative(found, by_hand(parts, load_model(folders[name]))) < TOLERANCE
    assert relative(found, dense) > 1e-2
    assert shoot(pipe, output_type="np").shape == (1, 9, 48, 80, 3)


def test_a_lossless_pipeline_makes_what_the_original_makes(
    parts: dict[str, Any], teacher: Any, folders: dict[str, Path]
) -> None:
    """With a timestep a token too, as Wan2.2 5B has it, and texts of each length that a pipeline fills up to."""
    lossless = WanMLATransformer3DModel.from_pretrained(folders["lossless"])
    for length, options in ((512, {}), (226, {}), (77, {"expand_timesteps": True})):
        videos = [
            shoot(pipeline(parts, transformer, **options), max_sequence_length=length)
            for transformer in (teacher, lossless)
        ]
        assert relative(videos[1], videos[0]) < 1e-4


def test_a_saved_pipeline_loads_again(parts: dict[str, Any], folders: dict[str, Path], tmp_path: Path) -> None:
    pipe = pipeline(parts, WanMLATransformer3DModel.from_pretrained(folders["partly"]))
    pipe.save_pretrained(tmp_path / "pipe")
    again = diffusers.WanPipeline.from_pretrained(tmp_path / "pipe")
    again.set_progress_bar_config(disable=True)
    assert type(again.transformer) is WanMLATransformer3DModel
    assert filecmp.cmp(
        folders["partly"] / WEIGHTS_NAME, tmp_path / "pipe" / "transformer" / WEIGHTS_NAME, shallow=False
    )
    assert torch.equal(shoot(again), shoot(pipe))


# --- offloading and compiling --------------------------------------------------------------------------------------


@pytest.fixture
def model(folders: dict[str, Path]) -> WanMLATransformer3DModel:
    return WanMLATransformer3DModel.from_pretrained(folders["partly"])


@pytest.fixture
def expected(folders: dict[str, Path]) -> Iterator[Tensor]:
    runtime = load_model(folders["partly"])
    with torch.no_grad():
        yield runtime(*inputs())


def test_offloaded_weights_give_the_same(
    model: WanMLATransformer3DModel, expected: Tensor, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Module by module, as sequential offloading runs: every parameter is away until its module is called."""
    x = inputs()
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in model.parameters())
    assert relative(model(*x).sample, expected) < TOLERANCE
    model.save_pretrained(tmp_path / "saved")
    assert filecmp.cmp(folders["partly"] / WEIGHTS_NAME, tmp_path / "saved" / WEIGHTS_NAME, shallow=False)
    on_disk = WanMLATransformer3DModel.from_pretrained(folders["partly"])
    disk_offload(on_disk, tmp_path / "disk", execution_device=torch.device("cpu"))
    assert relative(on_disk(*x).sample, expected) < TOLERANCE


@pytest.mark.filterwarnings("ignore:The following device_map keys:UserWarning")  # a parameter is no submodule
@pytest.mark.parametrize("where", ["cpu", "disk", "auto", "balanced"])
def test_device_maps(folders: dict[str, Path], expected: Tensor, tmp_path: Path, where: str) -> None:
    options: dict[str, Any] = {"device_map": where}
    if where == "disk":
        whole = {name: "cpu" for name, _ in WanMLATransformer3DModel(**SMALL).named_children()}
        del whole["blocks"]
        blocks = {f"blocks.{i}": "disk" if i == 2 else "cpu" for i in range(3)}
        options = {"device_map": whole | blocks | {"scale_shift_table": "cpu"}, "offload_folder": tmp_path / "away"}
    model = WanMLATransformer3DModel.from_pretrained(folders["partly"], **options)
    assert relative(model(*inputs()).sample, expected) < TOLERANCE
    assert any(p.is_meta for p in model.parameters()) == (where == "disk")


GPU = {"marks": pytest.mark.gpu}


@pytest.mark.parametrize(
    ("kind", "device"),
    [("model", "cpu"), pytest.param("model", "cuda", **GPU), pytest.param("sequential", "cuda", **GPU)],
)
def test_a_pipeline_offloads_to_the_cpu(
    parts: dict[str, Any], folders: dict[str, Path], device: str, kind: str
) -> None:
    """Without a GPU, whole models are moved from the CPU to the CPU, by the same hooks."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    pipe = pipeline(parts, WanMLATransformer3DModel.from_pretrained(folders["partly"]))
    expected = shoot(pipe)
    getattr(pipe, f"enable_{kind}_cpu_offload")(device=device)
    assert hasattr(pipe.transformer, "_hf_hook")
    assert all(p.is_meta for p in pipe.transformer.parameters()) == (kind == "sequential")
    assert relative(shoot(pipe).cpu(), expected) < (TOLERANCE if device == "cpu" else 1e-2)
    pipe.remove_all_hooks()
    pipe.to("cpu")
    assert {type(block).__name__ for block in pipe.transformer.blocks} == set(pipe.transformer._no_split_modules)


def test_group_offloading(model: WanMLATransformer3DModel, expected: Tensor) -> None:
    cpu = torch.device("cpu")
    model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    with torch.no_grad():
        assert relative(model(*inputs()).sample, expected) < TOLERANCE


@pytest.mark.parametrize("name", ["svd", "streaming"])
@pytest.mark.slow
def test_compiled_without_breaks(folders: dict[str, Path], name: str) -> None:
    """The graph is captured whole; the backend that would turn it into kernels is left out."""
    model = WanMLATransformer3DModel.from_pretrained(folders[name])
    x = inputs()
    with torch.no_grad():
        expected = model(*x).sample
        model.compile_repeated_blocks(fullgraph=True, backend="eager")
        assert relative(model(*x).sample, expected) < TOLERANCE
        if name == "svd":
            whole = torch.compile(WanMLATransformer3DModel.from_pretrained(folders[name]), backend="eager")
            assert relative(whole(*x).sample, expected) < TOLERANCE


def test_gradients_flow_and_checkpointing_changes_nothing(model: WanMLATransformer3DModel) -> None:
    x = inputs()
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.enable_gradient_checkpointing()
        model.train().zero_grad()
        model(*x).sample.square().mean().backward()
        found.append(model.blocks[0].attn1.kv_b_proj.weight.grad.clone())
    assert float(found[0].norm()) > 0
    assert relative(found[1], found[0]) < TOLERANCE


# --- LoRAs ---------------------------------------------------------------------------------------------------------


OUTSIDE = ("blocks.1.ffn.net.0.proj", "blocks.0.ffn.net.2", "blocks.2.attn2.to_q", "blocks.2.attn2.to_out.0")


def lora(model: Any, modules: tuple[str, ...], prefix: str = "transformer.") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    state = {}
    for name in modules:
        rows, columns = model.get_submodule(name).weight.shape
        state[f"{prefix}{name}.lora_A.weight"] = torch.randn(2, columns, generator=generator)
        state[f"{prefix}{name}.lora_B.weight"] = torch.randn(rows, 2, generator=generator) * 0.1
    return state


@pytest.mark.parametrize("from_file", [False, True])
def test_a_lora_outside_self_attention_has_the_effect_of_merged_weights(
    parts: dict[str, Any], folders: dict[str, Path], tmp_path: Path, from_file: bool
) -> None:
    pytest.importorskip("peft")
    model = WanMLATransformer3DModel.from_pretrained(folders["partly"])
    state = lora(model, OUTSIDE)
    save_file(state, tmp_path / "lora.safetensors")
    pipe = pipeline(parts, model)
    x = inputs()
    with torch.no_grad():
        before = model(*x).sample
        if from_file:
            model.load_lora_adapter(str(tmp_path), weight_name="lora.safetensors", adapter_name="one")
        else:
            pipe.load_lora_weights(dict(state), adapter_name="one")
        found = model(*x).sample
        merged = load_model(folders["partly"])
        weights = dict(merged.named_parameters())
        for name in OUTSIDE:
            a, b = (state[f"transformer.{name}.lora_{side}.weight"] for side in "AB")
            weights[WanFamily().canonical(f"{name}.weight", "diffusers") or ""].add_(b @ a)
        assert relative(found, merged(*x)) < TOLERANCE
        assert relative(found, before) > 1e-2
        with pytest.raises(InputError, match="LoRA"):
            model.save_pretrained(tmp_path / "saved")
        assert not (tmp_path / "saved").exists()
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        model.save_pretrained(tmp_path / "saved")
        assert relative(load_model(tmp_path / "saved")(*x), merged(*x)) < TOLERANCE


def test_a_lora_of_converted_self_attention_is_refused(folders: dict[str, Path], teacher: Any) -> None:
    pytest.importorskip("peft")
    model = WanMLATransformer3DModel.from_pretrained(folders["partly"])
    for module in ("blocks.0.attn1.to_q", "blocks.2.attn1.to_out.0"):
        with pytest.raises(UnsupportedModelError, match="--lora"):
            model.load_lora_adapter(lora(teacher, (module,)))
    model.load_lora_adapter(lora(teacher, ("blocks.1.attn1.to_q",)))  # that layer is dense


def test_the_walkthrough_runs(
    parts: dict[str, Any], folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every command and snippet of the page, with a small base, another recipe, and a CPU for the device."""
    pytest.importorskip("peft")
    page = (Path(__file__).parent.parent / "examples" / "diffusers.md").read_text()
    monkeypatch.chdir(tmp_path)
    base = tmp_path / "Wan-AI" / "Wan2.1-T2V-1.3B-Diffusers"
    pipeline(parts, diffusers.WanTransformer3DModel.from_pretrained(folders["source"])).save_pretrained(base)
    for words in shell_lines(page):
        shown = " ".join(words).replace("--device cuda", "--device cpu --init svd")
        result = CliRunner().invoke(app, shown.split()[1:])
        assert result.exit_code == 0, result.stderr
    written: list[Any] = []
    monkeypatch.setattr("diffusers.utils.export_to_video", lambda video, path, fps: written.append((video.shape, path)))
    small = {
        "enable_model_cpu_offload()": "enable_model_cpu_offload(device='cpu')",
        "height=480, width=832, num_frames=81, num_inference_steps=50": "height=32, width=48, num_frames=9, "
        "num_inference_steps=2, max_sequence_length=7",
        "fullgraph=True": "fullgraph=True, backend='eager'",
    }  # fmt: skip
    scope: dict[str, Any] = {}
    for number, snippet in enumerate(blocks(page, "python")):
        if number == 1:  # as the page says, a pipeline that is not offloaded
            scope["pipe"].remove_all_hooks()
            scope["pipe"].transformer = WanMLATransformer3DModel.from_pretrained("wan-mla")
            (tmp_path / "style-lora").mkdir()
            save_file(lora(scope["pipe"].transformer, OUTSIDE), tmp_path / "style-lora" / "style.safetensors")
        for shown, run in small.items():
            snippet = snippet.replace(shown, run)  # noqa: PLW2901
        exec(compile(snippet, "diffusers.md", "exec"), scope)
    assert written == [((9, 32, 48, 3), "fox.mp4")]
    assert load_model("wan-mla-style").config == load_model("wan-mla").config
