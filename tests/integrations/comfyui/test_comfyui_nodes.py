"""The nodes for ComfyUI, run against a stand-in of it: what they make is what a rollout makes, in ComfyUI's terms."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comfyui_stand_in import Interrupted, Told, install
from safetensors.torch import save_file
from support import randomize
from torch import Tensor
from wan_base import make_vae

from mlaconvert import ConvertRecipe, LatentSize, Sampler, convert, load_model, rollout
from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.errors import InputError
from mlaconvert.families.wan import WanFamily
from mlaconvert.files.names import CONFIG_NAME, WEIGHTS_NAME
from mlaconvert.model.cache import LatentCache
from mlaconvert.model.rollout import CacheUse, Given
from mlaconvert.model.wan import WanModel

TEXT, HEIGHT, WIDTH = 12, 32, 48  # channels of a text embedding, pixels
WIDGETS = {
    **{"seed": 5, "width": WIDTH, "height": HEIGHT, "length": 33, "batch_size": 1, "steps": 0, "cfg": 0.0},
    **{"shift": 5.0, "window_frames": 0, "sink_frames": -1, "positions": "model's own"},
}
SIZE = LatentSize(frames=9, height=HEIGHT // 8, width=WIDTH // 8)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ComfyUI's folder of models with one in it, small-mla: a few-step student with Wan's latents, converted."""
    root = tmp_path_factory.mktemp("models")
    config = WanConfig(
        **{"dim": 48, "num_heads": 2, "num_layers": 2, "ffn_dim": 40, "freq_dim": 16, "text_dim": TEXT, "text_len": 9},
        streaming=StreamingConfig(chunk_frames=3, window_frames=6),
        few_step=True,
    )
    model = WanModel(config)
    randomize(model)
    dense = root / "dense"
    dense.mkdir()
    save_file(model.state_dict(), dense / WEIGHTS_NAME)
    raw = WanFamily().raw_config(config) | {"few_step": True, "num_frame_per_block": 3}
    (dense / CONFIG_NAME).write_text(json.dumps(raw))
    (root / "mlaconvert" / "no model").mkdir(parents=True)
    convert(dense, root / "mlaconvert" / "small-mla", ConvertRecipe(init="svd", kv_rank=16))
    return root


@pytest.fixture
def comfy(small: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The nodes by the name of their class, and what ComfyUI was told."""
    package, told = install(monkeypatch, small)
    extension = asyncio.run(package.comfy_entrypoint())
    nodes = {node.__name__: node for node in asyncio.run(extension.get_node_list())}
    return SimpleNamespace(**nodes, all=list(nodes.values()), told=told, root=small)


def load(comfy: SimpleNamespace, folder: str = "small-mla", **given: str) -> Any:
    widgets = {"hub_id": "", "dtype": "auto", "cache_dtype": "model's own", "attention": "auto"} | given
    return comfy.LoadModel.execute(folder, **widgets).args[0]


def prompt(seed: int, tokens: int = 4, channels: int = TEXT) -> list[Any]:
    """A CONDITIONING as CLIPTextEncode makes it: zeros after the last token."""
    words = torch.randn(1, tokens, channels, generator=torch.Generator().manual_seed(seed))
    return [[torch.nn.functional.pad(words, (0, 0, 0, max(0, 9 - tokens))), {"pooled_output": None}]]


def sample(comfy: SimpleNamespace, model: Any, positive: Any = None, **given: Any) -> Tensor:
    (latent,) = comfy.Sample.execute(model, positive or prompt(1), **WIDGETS | given).args
    assert list(latent) == ["samples"]
    samples: Tensor = latent["samples"]
    return samples


def expected(comfy: SimpleNamespace, schedule: list[tuple[int, Any]], **given: Any) -> Tensor:
    """What a rollout gives, with the mean and standard deviation of diffusers' VAE."""
    vae = make_vae().config
    mean, std = (torch.tensor(values).view(16, 1, 1, 1) for values in (vae.latents_mean, vae.latents_std))
    model = load_model(comfy.root / "mlaconvert" / "small-mla")
    contexts = [(frame, conditioning[0][0]) for frame, conditioning in schedule]
    settings = {"sampler": Sampler.few_step(), "seed": 5} | given
    return torch.cat(list(rollout(model, contexts, size=SIZE, **settings)), 2) * std + mean


def test_the_latents_are_the_vaes_own_values(comfy: SimpleNamespace) -> None:
    found = sample(comfy, load(comfy))
    assert found.shape == (1, 16, 9, HEIGHT // 8, WIDTH // 8)
    assert torch.equal(found, expected(comfy, [(0, prompt(1))]))


def test_prompts_switch_at_their_chunks_in_whatever_order_they_are_chained(comfy: SimpleNamespace) -> None:
    (late,) = comfy.PromptSwitch.execute(prompt(3), 2).args
    (both,) = comfy.PromptSwitch.execute(prompt(2), 1, late).args
    assert [chunk for chunk, _ in late] == [2]  # what is chained to is left as it was
    found = sample(comfy, load(comfy), later_prompts=both)
    assert torch.equal(found, expected(comfy, [(0, prompt(1)), (3, prompt(2)), (6, prompt(3))]))
    assert not torch.equal(found[:, :, 3:], expected(comfy, [(0, prompt(1))])[:, :, 3:])


def test_settings_of_the_node_are_the_rollouts(comfy: SimpleNamespace) -> None:
    given = {"steps": 2, "cfg": 3.0, "shift": 4.0, "window_frames": 7, "sink_frames": 1, "positions": "absolute"}
    found = sample(comfy, load(comfy), negative=prompt(4, 2), **given)
    streaming = StreamingConfig(chunk_frames=3, window_frames=7, sink_frames=1, positions="absolute")
    assert torch.equal(
        found,
        expected(
            comfy,
            [(0, prompt(1))],
            sampler=Sampler.many_step(2, shift=4.0, guidance=3.0),
            given=Given(null_context=prompt(4, 2)[0][0]),
            cache=CacheUse(streaming=streaming),
        ),
    )


def test_seeds_repeat_and_count_up_in_a_batch(comfy: SimpleNamespace) -> None:
    model = load(comfy)
    alone, again, other = (sample(comfy, model, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(alone, again)
    batch = sample(comfy, model, batch_size=2)
    for row, one in zip(batch, (alone, other), strict=True):
        torch.testing.assert_close(row, one[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("length", "frames"), [(1, 1), (33, 9), (34, 9), (36, 9), (37, 10), (0, 21)])
def test_the_length_is_in_video_frames(comfy: SimpleNamespace, length: int, frames: int) -> None:
    assert sample(comfy, load(comfy), length=length).shape[2] == frames


def test_progress_counts_passes_and_each_chunk_is_previewed_as_the_model_sees_it(comfy: SimpleNamespace) -> None:
    found = sample(comfy, load(comfy))
    told: Told = comfy.told
    assert sorted(set(told.progress)) == [(n, 15) for n in range(1, 16)]  # three chunks of four steps and one clean
    vae = make_vae().config
    mean, std = (torch.tensor(values).view(16, 1, 1, 1) for values in (vae.latents_mean, vae.latents_std))
    assert len(told.previews) == 3
    for chunk, newest in enumerate(told.previews):
        torch.testing.assert_close(newest * std + mean, found[:, :, 3 * chunk + 2 : 3 * chunk + 3])


def test_a_cancel_is_heard_after_the_next_pass(comfy: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    passes, forward = [], WanModel.forward

    def counted(model: WanModel, *args: Any, **given: Any) -> Tensor:
        passes.append(given["start_frame"])
        return forward(model, *args, **given)

    monkeypatch.setattr(WanModel, "forward", counted)
    comfy.told.cancel_after = 6
    model = load(comfy)
    with pytest.raises(Interrupted):
        sample(comfy, model)
    assert passes == [0, 0, 0, 0, 0, 3]  # the first six are reported; the chunk's report comes before the seventh
    comfy.told.cancel_after = None
    assert torch.equal(sample(comfy, model), expected(comfy, [(0, prompt(1))]))


def test_comfyui_moves_the_model_and_is_told_what_the_rest_takes(comfy: SimpleNamespace) -> None:
    model = load(comfy)
    assert comfy.told.loaded == []
    sample(comfy, model, length=81)
    sample(comfy, model, length=81, batch_size=3)
    (one, first), (_, three) = comfy.told.loaded
    assert one == [model.patcher]
    assert first["force_full_load"] is True
    cache = LatentCache(
        model.model.config, batch=1, height=HEIGHT // 8, width=WIDTH // 8, streaming=model.model.config.streaming
    )
    assert cache.nbytes < first["memory_required"]
    assert three["memory_required"] == 3 * first["memory_required"]  # all but the weights, which ComfyUI counts itself


def test_folders_with_a_config_are_offered_and_the_built_in_model_last(comfy: SimpleNamespace) -> None:
    other = comfy.root / "diffusion_models" / "other"
    other.mkdir(parents=True, exist_ok=True)
    (other / CONFIG_NAME).write_text("{}")
    assert comfy.LoadModel.define_schema().named()["folder"].options == ["small-mla", "other", "tiny"]


def test_the_loader_passes_on_what_it_is_set_to(comfy: SimpleNamespace) -> None:
    model = load(comfy, dtype="bfloat16", cache_dtype="int8", attention="absorbed").model
    assert (model.dtype, model.config.cache_dtype, model.attention_mode) == (torch.bfloat16, "int8", "absorbed")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"positive": prompt(1) + prompt(2)}, "combines several prompts"),
        ({"positive": prompt(1, channels=20)}, "20 channels, the model takes 12"),
        ({"positive": prompt(1, 10)}, "10 tokens, the model reads 9"),
        ({"cfg": 5.0}, "cfg 5 needs a negative prompt"),
        ({"later_prompts": [(3, prompt(2))]}, r"at chunks \[3\]; this video has chunks 0 to 2"),
        ({"later_prompts": [(1, prompt(2)), (1, prompt(3))]}, r"at chunks \[1, 1\]"),
        ({"height": 40}, "height is 40 pixels: give a multiple of 16"),
    ],
)
def test_what_does_not_fit_is_said(comfy: SimpleNamespace, given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        sample(comfy, load(comfy), **given)
    assert comfy.told.loaded == []  # before anything is moved


@pytest.mark.parametrize("hub_id", ["/etc", "../models", "owner", "a/b/c", "owner/../name"])
def test_a_hub_id_is_no_path(comfy: SimpleNamespace, hub_id: str) -> None:
    with pytest.raises(InputError, match="no repository on the Hub"):
        load(comfy, hub_id=hub_id)


def test_a_folder_that_is_not_there_is_said(comfy: SimpleNamespace) -> None:
    """As that of a template before it is made."""
    with pytest.raises(InputError, match=r"no folder 'sf-mla' with a config\.json below models/mlaconvert or"):
        load(comfy, "sf-mla")


def test_the_built_in_model_runs_without_other_files(comfy: SimpleNamespace) -> None:
    """Its captions are embedded by mlaconvert's own table, and its latents are pixels."""
    (caption,) = comfy.Caption.execute("large red disc right, sky").args
    (empty,) = comfy.Caption.execute("").args
    pixels = sample(
        comfy, load(comfy, "tiny"), caption, negative=empty, length=4, steps=1, width=16, height=8, batch_size=2
    )
    assert pixels.shape == (2, 3, 4, 8, 16)
    (images,) = comfy.ToImage.execute({"samples": pixels}).args
    assert images.shape == (8, 8, 16, 3)
    assert 0 <= images.min() < images.max() <= 1
    torch.testing.assert_close(images[5, 2, 3], (pixels[1, :, 1, 2, 3].clamp(-1, 1) + 1) / 2)
    assert [preview.shape[2] for preview in comfy.told.previews] == [1, 1]
    with pytest.raises(ValueError, match="connect VAE Decode"):
        comfy.ToImage.execute({"samples": torch.zeros(1, 16, 3, 2, 2)})
