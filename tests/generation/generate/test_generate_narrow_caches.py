"""Generating with a narrowed cache: the model's own rollout, what is noted of it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from generate_cases import invoke, succeed
from safetensors.torch import load_file, save_file
from torch import Tensor

from mlaconvert.config.cache_dtype import CacheDtype
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.run import convert
from mlaconvert.errors import OutputError
from mlaconvert.files.names import CONFIG_NAME, WEIGHTS_NAME
from mlaconvert.generation.chunks import ChunkFile
from mlaconvert.generation.request import Generation, Runtime
from mlaconvert.generation.run import generate
from mlaconvert.generation.vbench_names import generate_for_vbench
from mlaconvert.model.load import load_model
from mlaconvert.model.rollout import LatentSize, rollout
from mlaconvert.model.schedule import Sampler

SIZE = ("--height", 32, "--width", 48)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    context = torch.randn(1, 3, 40, generator=torch.Generator().manual_seed(1))
    save_file({"context": context}, tmp_path / "text.safetensors")
    return tmp_path / "text.safetensors"


# A frame of 6 tokens: 96 keys, in one group of 6 tokens each, and three groups of values. Behind k-means, keys and
# values of 4 heads alike: 24 of them in a group for each token, a centroid, and a bit to name it.
@pytest.mark.parametrize(
    ("dtype", "frame"), [("int4", 96 * (3 + 4) + 6 * (48 + 3 * 4)), ("qvg2", 2 * 4 * (6 * (6 + 2) + 24 + 1))]
)
def test_the_command_rolls_out_as_the_model_does(
    golden: Path, tmp_path: Path, text: Path, dtype: CacheDtype, frame: int
) -> None:
    flags = (*SIZE, "--frames", 9, "--timesteps", "900,300", "--shift", 2, "--guidance", 1, "--embeddings", text)
    done = succeed(golden, "-o", tmp_path / "video", *flags, "--cache-dtype", dtype)
    found = load_file(tmp_path / "video" / "latents.safetensors")["latents"]
    context, videos = load_file(text)["context"], {}
    for name in (None, dtype):
        model = load_model(golden, cache_dtype=name)
        size = LatentSize(frames=9, height=4, width=6)
        videos[name] = torch.cat(
            list(rollout(model, context, size=size, sampler=Sampler.few_step((900, 300), shift=2))), 2
        )
    assert torch.equal(found, videos[dtype])
    assert torch.equal(found[:, :, :3], videos[None][:, :, :3])  # before there is a past
    assert not torch.equal(found[:, :, 3:], videos[None][:, :, 3:])
    report = json.loads((tmp_path / "video" / "generation.json").read_text())
    assert report["settings"]["cache_dtype"] == dtype
    assert report["cache_bytes"] == 3 * 7 * frame  # layers, frames of the window
    assert f", {dtype}" in done.stderr
    plain = succeed(golden, "-o", tmp_path / "plain", *flags)
    assert ", float32" in plain.stderr
    assert "cache_dtype" not in json.loads((tmp_path / "plain" / "generation.json").read_text())["settings"]


@pytest.mark.parametrize("dtype", ["int8", "qvg3"])
def test_an_interrupted_run_goes_on_with_the_same_cache_alone(
    golden: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, dtype: CacheDtype
) -> None:
    wanted, narrow = Generation(frames=15, height=32, width=48, steps=1, embeddings=text), Runtime(cache_dtype=dtype)
    generate(golden, tmp_path / "whole", wanted, narrow, movie="none")
    original = ChunkFile.write

    def write(self: ChunkFile, start: int, chunk: Tensor) -> None:
        original(self, start, chunk)
        if start == 9:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ChunkFile, "write", write)
        with pytest.raises(KeyboardInterrupt):
            generate(golden, tmp_path / "video", wanted, narrow, movie="none")
    with pytest.raises(OutputError, match="an unfinished video with other settings"):
        generate(golden, tmp_path / "video", wanted, Runtime(cache_dtype="int4"), movie="none")
    assert generate(golden, tmp_path / "video", wanted, narrow, movie="none").resumed_frames == 12
    whole, video = (load_file(tmp_path / name / "latents.safetensors")["latents"] for name in ("whole", "video"))
    assert torch.equal(whole, video)


def test_videos_of_two_caches_never_mix(golden: Path, tmp_path: Path, text: Path) -> None:
    wanted = Generation(frames=3, height=32, width=48, samples=1, steps=1, embeddings=text)
    generate_for_vbench(golden, tmp_path / "out", ["a cat"], wanted, Runtime(cache_dtype="int2"))
    with pytest.raises(OutputError, match="another cache_dtype"):
        generate_for_vbench(golden, tmp_path / "out", ["a cat"], wanted, Runtime(cache_dtype="int4"))


def test_a_cache_with_bits_of_its_own_is_left_alone(
    golden: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "bits"
    kept = ConvertRecipe(init="svd", kv_rank=9, rope="head", key_norm="token", streaming=StreamingConfig())
    convert(golden, model, kept)
    config, weights = json.loads((model / CONFIG_NAME).read_text()), load_file(model / WEIGHTS_NAME)
    config["mla"]["format_version"] = 3
    for index, layer in enumerate(config["mla"]["layers"]):
        layer["cache_bits"] = [[4, 10]]
        for leaf in ("center", "slope", "gain"):
            weights[f"blocks.{index}.self_attn.kv_quantizer.{leaf}"] = torch.ones(10)
    (model / CONFIG_NAME).write_text(json.dumps(config))
    save_file(weights, model / WEIGHTS_NAME)
    flags = (*SIZE, "--frames", 3, "--steps", 1, "--embeddings", text, "-o", tmp_path / "video")
    with monkeypatch.context() as patch:
        patch.delattr(Runtime, "load")  # it is known before anything large is read
        refused = invoke(model, *flags, "--cache-dtype", "int4")
    assert refused.exit_code == 2
    assert "this model's cache has bits of its own; leave cache_dtype out" in refused.stderr
    assert not (tmp_path / "video").exists()
    assert not (tmp_path / ".video.partial").exists()
    succeed(model, *flags)


def test_a_name_that_is_none_is_refused(golden: Path, tmp_path: Path) -> None:
    refused = invoke(golden, "-o", tmp_path / "video", "--cache-dtype", "int5")
    assert refused.exit_code == 2
    assert "cache_dtype is 'int5': give fp8, int8, int4, int3, int2, qvg4, qvg3, qvg2 or qvg2-2stages" in refused.stderr
