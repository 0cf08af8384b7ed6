"""Models with an exact present in `generate`: their rollout, in every mode of attention, and what it caches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from generate_cases import invoke, succeed
from safetensors.torch import load_file, save_file
from support import relative
from torch import Tensor
from typer.testing import CliRunner

from mlaconvert.cli import app
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.run import convert
from mlaconvert.generation.request import Generation
from mlaconvert.generation.run import generate
from mlaconvert.model.load import load_model
from mlaconvert.model.rollout import LatentSize, rollout
from mlaconvert.model.schedule import Sampler

WINDOW = StreamingConfig(chunk_frames=2, window_frames=5, sink_frames=1)
FLAGS = ("--frames", 8, "--height", 32, "--width", 48, "--timesteps", "900,300", "--shift", 2, "--guidance", 1)


@pytest.fixture(scope="module")
def presents(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden model's conversions, and the prompts of two videos."""
    root = tmp_path_factory.mktemp("presents")
    common: dict[str, Any] = {"present": "exact", "streaming": WINDOW}
    for name, recipe in {
        "lossless": ConvertRecipe(init="lossless", **common),
        "heads": ConvertRecipe(init="svd", rope="head", key_norm="token", layers="0,2", v_dim=17, **common),
        "shared": ConvertRecipe(init="svd", rope="latent", **common),
        "cached": ConvertRecipe(init="svd", v_dim=10, nope_dim=9, **common),
    }.items():
        convert(golden, root / name, recipe)
    save_file({"context": torch.randn(1, 3, 40, generator=torch.Generator().manual_seed(1))}, root / "text.safetensors")
    return root


def rolled_out(model: Path, context: Tensor) -> Tensor:
    chunks = rollout(
        load_model(model, streaming=WINDOW),
        context,
        size=LatentSize(frames=8, height=4, width=6),
        sampler=Sampler.few_step((900, 300), shift=2),
    )
    return torch.cat(list(chunks), 2)


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("lossless", "auto"),
        ("heads", "auto"),
        ("heads", "expanded"),
        *((name, mode) for name in ("shared", "cached") for mode in ("auto", "expanded", "absorbed")),
    ],
)
def test_the_command_rolls_out_as_the_model_does(
    golden: Path, presents: Path, tmp_path: Path, name: str, attention: str
) -> None:
    succeed(
        presents / name, "-o", tmp_path / "video", *FLAGS, "--attention", attention,
        "--embeddings", presents / "text.safetensors",
    )  # fmt: skip
    found = load_file(tmp_path / "video" / "latents.safetensors")["latents"]
    context = load_file(presents / "text.safetensors")["context"]
    assert relative(found, rolled_out(presents / name, context)) < 1e-5
    dense = rolled_out(golden, context)
    assert relative(found[:, :, :2], dense[:, :, :2]) < 1e-5  # before there is a past
    assert (relative(found, dense) < 1e-4) == (name == "lossless")


def test_heads_that_turn_their_own_keys_have_no_absorbed_form(presents: Path, tmp_path: Path) -> None:
    text = presents / "text.safetensors"
    refused = invoke(
        presents / "heads", "-o", tmp_path / "video", *FLAGS, "--attention", "absorbed", "--embeddings", text
    )
    assert refused.exit_code == 2
    assert "--rope latent" in refused.stderr
    assert not (tmp_path / "video").exists()


@pytest.mark.parametrize(
    ("name", "scalars"),
    [
        ("heads", (14 + 1, 192, 14 + 1)),  # latent and key norm; two keys and values of 96 channels
        ("shared", (14,) * 3),
        ("cached", (8 + 6,) * 3),
    ],
)
def test_the_cache_is_what_analyze_plans(presents: Path, tmp_path: Path, name: str, scalars: tuple[int, ...]) -> None:
    """An exact present caches nothing. `analyze` counts two bytes a scalar, a run on a CPU has four."""
    wanted = Generation(frames=8, height=32, width=48, steps=2, embeddings=presents / "text.safetensors")
    report = generate(presents / name, tmp_path / "video", wanted, movie="none")
    analyzed = CliRunner().invoke(
        app, ["analyze", str(presents / name), "--json", "--height", "32", "--width", "48", "--window-frames", "5"]
    )
    assert analyzed.exit_code == 0, analyzed.stderr
    planned = json.loads(analyzed.stdout)["memory"]["mla"]
    assert tuple(planned["scalars_per_token"]) == scalars
    assert report.cache_bytes == 2 * planned["bytes_per_window"] == 4 * 5 * 6 * sum(scalars)
    weights = load_model(presents / name).state_dict().values()
    assert planned["weight_bytes"] == 2 * sum(tensor.numel() for tensor in weights)
