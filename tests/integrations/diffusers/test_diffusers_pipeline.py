"""Converted models in diffusers: loaded, saved, in pipelines, offloaded, compiled, and with LoRAs."""

from __future__ import annotations

import filecmp
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from command_line import succeed
from diffusers_cases import TOLERANCE, diffusers
from documents import ROOT, blocks, shell_lines
from safetensors.torch import save_file
from support import relative
from torch import Tensor
from torch.nn import functional
from wan_diffusers import SMALL, inputs

from mlaconvert.errors import InputError, UnsupportedModelError
from mlaconvert.families.wan import WanFamily
from mlaconvert.files.names import WEIGHTS_NAME
from mlaconvert.integrations.diffusers import WanMLATransformer3DModel
from mlaconvert.model.load import load_model
from mlaconvert.model.wan import WanModel


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
    page = (Path(__file__).parents[3] / "docs" / "integrations" / "diffusers.md").read_text()
    monkeypatch.chdir(tmp_path)
    base = tmp_path / "Wan-AI" / "Wan2.1-T2V-1.3B-Diffusers"
    pipeline(parts, diffusers.WanTransformer3DModel.from_pretrained(folders["source"])).save_pretrained(base)
    for words in shell_lines(page):
        if words[0] == "python":
            line = [sys.executable, str(ROOT / words[1]), *words[2:]]
            said = subprocess.run(line, check=True, capture_output=True, text=True).stdout
            assert said.count(": passed") == len(said.splitlines()) > 10
            continue
        shown = " ".join(words).replace("--device cuda", "--device cpu --init svd")
        succeed(*shown.split()[1:])
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
