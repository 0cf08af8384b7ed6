"""A model of diffusers' own, conversions of it, one that is loaded, and what our runtime makes of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers_cases import STREAMING
from torch import Tensor
from wan_diffusers import inputs, reference

from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.run import convert
from mlaconvert.integrations.diffusers import WanMLATransformer3DModel
from mlaconvert.model.load import load_model


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


@pytest.fixture
def model(folders: dict[str, Path]) -> WanMLATransformer3DModel:
    return WanMLATransformer3DModel.from_pretrained(folders["partly"])


@pytest.fixture
def expected(folders: dict[str, Path]) -> Iterator[Tensor]:
    runtime = load_model(folders["partly"])
    with torch.no_grad():
        yield runtime(*inputs())
