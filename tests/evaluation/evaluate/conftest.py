"""The golden model beside conversions of it, clips for them, and the model as a teacher."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from evaluate_cases import STREAMING

from mlaconvert.clips.folder import Clips
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.run import convert
from mlaconvert.model.load import load_model
from mlaconvert.model.wan import WanModel


@pytest.fixture(scope="session")
def made(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the golden model beside conversions of it: streaming, lossless and bidirectional ones."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "wan_tiny").symlink_to(golden)
    video = {"height": 32, "width": 64, "streaming": STREAMING}
    recipes = {
        "small": ConvertRecipe(init="svd", kv_rank=9, q_rank="none", key_norm="token", **video),
        "large": ConvertRecipe(init="svd", kv_rank=60, q_rank="none", key_norm="token", **video),
        "lossless": ConvertRecipe(init="lossless", **video),
        "exact": ConvertRecipe(init="svd", kv_rank=9, rope="head", key_norm="token", present="exact", **video),
        "exact_lossless": ConvertRecipe(init="lossless", present="exact", **video),
        "both_ways": ConvertRecipe(init="svd", kv_rank=9, height=32, width=64),
    }
    for name, recipe in recipes.items():
        convert(golden, folder / name, recipe)
    return folder


@pytest.fixture(scope="session")
def clips() -> Clips:
    """Five clips of six frames, 4 x 8 latent pixels."""
    generator = torch.Generator().manual_seed(3)
    return Clips(torch.randn(5, 16, 6, 4, 8, generator=generator), torch.randn(5, 7, 40, generator=generator))


@pytest.fixture(scope="session")
def teacher(golden: Path) -> WanModel:
    return load_model(golden, streaming=STREAMING)
