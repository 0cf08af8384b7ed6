"""The model's file is found among what published repositories and training folders hold beside it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_cases import INDEX, SHARDS, STATE, assert_state, read_all, save_shards
from safetensors.torch import save_file

from mlaconvert.clips.folder import clip_files
from mlaconvert.clips.videos import find_videos
from mlaconvert.errors import CheckpointError
from mlaconvert.files.find import experts
from mlaconvert.files.hub_cache import fetch_files, list_files
from mlaconvert.files.names import WEIGHTS_NAME
from mlaconvert.files.select import select

T5, VAE = "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth"
CLIP = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
LIGHTX2V = [T5, VAE, CLIP, "config.json", "google/umt5-xxl/spiece.model"]

# The files of a repository -> the one that is the model.
REPOSITORIES: dict[str, tuple[list[str], str]] = {
    "Wan-AI/Wan2.1-T2V-1.3B": ([*LIGHTX2V, WEIGHTS_NAME], WEIGHTS_NAME),
    "a .pt beside the encoders": ([*LIGHTX2V, "distill_model.pt"], "distill_model.pt"),
    "a folder beside the encoders": (
        [*LIGHTX2V, "distill_models/distill_model.safetensors", "loras/lora_rank64.safetensors"],
        "distill_models/distill_model.safetensors",
    ),
    "a folder of shards": (
        [*LIGHTX2V, "original/config.json", *(f"original/{name}" for name in (*SHARDS, INDEX))],
        f"original/{INDEX}",
    ),
    "ComfyUI's split_files": (
        [
            "split_files/diffusion_models/wan2.1_t2v_14B_bf16.safetensors",
            "split_files/text_encoders/umt5_xxl_fp16.safetensors",
            "split_files/vae/wan_2.1_vae.safetensors",
            "split_files/clip_vision/clip_vision_h.safetensors",
        ],
        "split_files/diffusion_models/wan2.1_t2v_14B_bf16.safetensors",
    ),
    "all in one folder": (
        [
            "umt5-xxl-enc-bf16.safetensors",
            "Wan2_1_VAE_bf16.safetensors",
            "taew2_1.safetensors",
            "lighttaew2_1.pth",
            "clip_vision_h.safetensors",
            "open-clip-xlm-roberta-large-vit-huge-14_visual_fp16.safetensors",
            "Wan2_1-T2V-14B_bf16.safetensors",
            "Wan21_CausVid_14B_lora_rank32.safetensors",
        ],
        "Wan2_1-T2V-14B_bf16.safetensors",
    ),
    "HunyuanVideo 1.5 in one folder": (
        [
            "hunyuanvideo1.5_720p_t2v_fp16.safetensors",
            "byt5_small_glyphxl_fp16.safetensors",
            "qwen_2.5_vl_7b_fp8_scaled.safetensors",
            "Qwen2.5-VL-7B-Instruct.safetensors",
            "sigclip_vision_patch14_384.safetensors",
            "siglip-so400m.safetensors",
            "llava_llama3_fp8_scaled.safetensors",
            "hunyuanvideo15_vae_fp16.safetensors",
            "lighttaehy1_5.safetensors",
        ],
        "hunyuanvideo1.5_720p_t2v_fp16.safetensors",
    ),
    "HunyuanVideo's folders": (
        [
            "split_files/diffusion_models/hunyuan.safetensors",
            "split_files/latent_upscale_models/upsampler_720p.safetensors",
            "text_encoder/model.safetensors",
            "text_encoder_2/model.safetensors",
            "vision_encoder/siglip/model.safetensors",
        ],
        "split_files/diffusion_models/hunyuan.safetensors",
    ),
    "names that only resemble others": (["wan_lip_sync_qwen.safetensors"], "wan_lip_sync_qwen.safetensors"),
    "a training's states": (
        ["model.pt", "optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state.pth", "random_states_0.pkl"],
        "model.pt",
    ),
    "hidden companions": (
        [f"._{WEIGHTS_NAME}", ".ipynb_checkpoints/model-checkpoint.safetensors", "__MACOSX/a.safetensors", "w.ckpt"],
        "w.ckpt",
    ),
    "diffusers": (["transformer/" + WEIGHTS_NAME, "vae/" + WEIGHTS_NAME, T5], "transformer/" + WEIGHTS_NAME),
    "a variant": (
        [f"{WEIGHTS_NAME}.index.fp16.json", *(name.replace("model-", "model.fp16-") for name in SHARDS)],
        f"{WEIGHTS_NAME}.index.fp16.json",
    ),
    "an adapter alone": (["pytorch_lora_weights.safetensors", "README.md"], "pytorch_lora_weights.safetensors"),
    "LightX2V's blocks with an index": (["block_0.safetensors", "non_block.safetensors", INDEX], INDEX),
    "a name in capitals": (["WAN.SAFETENSORS", "wan_VAE.SFT"], "WAN.SAFETENSORS"),
}


@pytest.mark.parametrize("case", REPOSITORIES)
def test_the_model_of_a_repository(case: str) -> None:
    names, model = REPOSITORIES[case]
    assert select(sorted(names), "here") == model


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ([T5, VAE], f"it holds no weights .*{VAE}, {T5} is no transformer by its name"),
        ([T5, "a/x.safetensors", "b/c/y.pt"], r"several models in its folders \(a/x.safetensors, b/c/y.pt\); name"),
        (["._x.safetensors"], r"it holds no weights \([^)]*\)$"),
        (["zero_pp_rank_0_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"], "DeepSpeed .*zero_to_fp32"),
        (["a/__0_0.distcp", "a/__1_0.distcp"], r"here/a: a sharded .*dcp_to_torch here/a model\.pt`, and give model"),
        ([SHARDS[0], T5], "shards but no"),
    ],
)
def test_what_is_there_instead(names: list[str], says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        select(sorted(names), "here")


def test_one_shard_of_torch_distributed_leads_to_its_folder(tmp_path: Path) -> None:
    (tmp_path / "__1_0.distcp").write_bytes(b"x")
    for source in (tmp_path, tmp_path / "__1_0.distcp"):
        with pytest.raises(CheckpointError, match=rf"{tmp_path}: a sharded .*dcp_to_torch {tmp_path} model\.pt`, and"):
            read_all(source)


@pytest.mark.parametrize("ending", [".sft", ".SAFETENSORS", ".Sft", ".PT", ".Ckpt"])
def test_other_endings(ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"wan{ending}"
    (torch.save if ending in (".PT", ".Ckpt") else save_file)(STATE, file)
    assert_state(read_all(file))
    assert_state(read_all(tmp_path))


def test_a_variant_of_an_index(tmp_path: Path) -> None:
    for shard, name in zip(SHARDS, STATE, strict=True):
        save_file({name: STATE[name]}, tmp_path / shard.replace("model-", "model.fp16-"))
    places = {name: shard.replace("model-", "model.fp16-") for name, shard in zip(STATE, SHARDS, strict=True)}
    (tmp_path / f"{WEIGHTS_NAME}.index.fp16.json").write_text(json.dumps({"weight_map": places}))
    assert_state(read_all(tmp_path))


def test_block_files_without_an_index(tmp_path: Path) -> None:
    for name, tensor in zip(("block_0", "block_11"), STATE, strict=True):
        save_file({tensor: STATE[tensor]}, tmp_path / f"{name}.safetensors")
    save_file({"head": torch.ones(3)}, tmp_path / "non_block.safetensors")
    save_file({"not": torch.ones(3)}, tmp_path / "._block_1.safetensors")
    assert set(read_all(tmp_path)) == {*STATE, "head"}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A folder of the Hub's client: two commits of a repository in two shards, as links to blobs."""
    root = tmp_path / "models--user--wan"
    save_shards(tmp_path / "files")
    (root / "blobs").mkdir(parents=True)
    for commit in ("a" * 40, "b" * 40):
        there = root / "snapshots" / commit / "transformer"
        there.mkdir(parents=True)
        for file in (tmp_path / "files").iterdir():
            shutil.copy(file, root / "blobs" / f"{commit[:3]}{file.name}")
            (there / file.name).symlink_to(os.path.relpath(root / "blobs" / f"{commit[:3]}{file.name}", there))
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("b" * 40)
    return root


def test_a_folder_of_the_hubs_cache(cache: Path) -> None:
    assert_state(read_all(cache))
    assert experts(cache) == ()
    (cache / "refs" / "main").unlink()
    with pytest.raises(CheckpointError, match=r"a repository with 2 commits in .*snapshots; give one of them"):
        read_all(cache)
    shutil.rmtree(cache / "snapshots" / ("b" * 40))
    assert_state(read_all(cache))
    (cache / "refs" / "main").write_text("../../blobs")  # leads nowhere that counts
    assert_state(read_all(cache))


def test_a_revision_of_the_hubs_cache(cache: Path, tmp_path: Path) -> None:
    older = cache / "snapshots" / ("a" * 40) / "transformer"
    (older / SHARDS[1]).unlink()
    save_file({"b": STATE["b"] * 3}, older / SHARDS[1])
    (cache / "refs" / "pr").mkdir()
    (cache / "refs" / "pr" / "7").write_text("a" * 40 + "\n")
    (cache / "refs" / "v9").write_text("../../blobs")
    for revision, factor in (("a" * 40, 3), ("pr/7", 3), ("main", 1), ("b" * 40, 1), (None, 1)):
        assert torch.equal(read_all(cache, revision=revision)["b"], STATE["b"] * factor)
        assert torch.equal(read_all(cache, revision=revision, subfolder="transformer")["b"], STATE["b"] * factor)
        names = list_files(cache, revision)
        assert names == tuple(sorted(f"transformer/{name}" for name in (*SHARDS, INDEX)))
        assert (fetch_files(cache, names, revision) / names[0]).is_file()
        assert experts(cache, revision) == ()
    for revision in ("aaaa", "v9", "../b", f"../snapshots/{'a' * 40}", "/etc", ".", "", "\0", "--x"):
        with pytest.raises(
            CheckpointError, match=rf"a repository, without revision .*; it has {'a' * 40}, {'b' * 40};"
        ):
            read_all(cache, revision=revision)
    with pytest.raises(CheckpointError, match=r"is on this disk, which has no revision 'main'"):
        read_all(tmp_path / "files", revision="main")


def test_the_root_of_the_hubs_cache(tmp_path: Path) -> None:
    root = tmp_path / "hub"
    save_shards(root / "models--user--wan" / "snapshots" / ("a" * 40))
    inside = root / "models--user--other"
    (inside / "snapshots").mkdir(parents=True)
    (root / "models--user--no").mkdir()
    (root / "version.txt").write_text("1")
    for folder in (root, root.parent):
        with pytest.raises(CheckpointError) as caught:
            read_all(folder)
        says = f"{folder}: the Hub's cache of models--user--other, models--user--wan; give {inside}"
        assert str(caught.value) == says
    save_file(STATE, root / "wan.safetensors")  # a folder that the cache was put into
    assert_state(read_all(root))


@pytest.mark.parametrize("lost", [SHARDS[1], INDEX])
def test_a_missing_blob_is_named(cache: Path, lost: str) -> None:
    (cache / "blobs" / f"bbb{lost}").unlink()
    with pytest.raises(CheckpointError, match=rf"{lost}.* is a link to nowhere"):
        read_all(cache)


def test_hidden_clips_and_videos_are_none(tmp_path: Path) -> None:
    for name in ("a.safetensors", "._a.safetensors", ".ipynb_checkpoints/a-checkpoint.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save_file({"latents": torch.ones(1)}, tmp_path / name)
    assert [path.name for path in clip_files(tmp_path)] == ["a.safetensors"]
    for name in ("x.mp4", "._x.mp4", ".ipynb_checkpoints/x-checkpoint.mp4"):
        (tmp_path / name).write_bytes(b"-")
        (tmp_path / name).with_suffix(".txt").write_text("a cat")
    assert [video.name for video in find_videos([tmp_path])] == ["x.mp4"]


@pytest.mark.slow
def test_sharded_pickles_are_named(tmp_path: Path) -> None:
    """DTensors of one process, as FSDP2 leaves them; the classes they need are never loaded for them."""
    script = """
import sys, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
torch.save({"generator": {"w": distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)])}}, sys.argv[1])
dist.destroy_process_group()
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "fsdp2.pt")], check=True, capture_output=True)
    for _ in range(2):  # and where the classes happen to be loaded
        with pytest.raises(CheckpointError, match=r"a sharded training state .*full_tensor"):
            read_all(tmp_path / "fsdp2.pt")
