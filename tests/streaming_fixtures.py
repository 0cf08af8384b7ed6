"""Fixtures of the tests of streaming codebases: recorded outputs, conversions of one model, pipelines around it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from streaming_codebases import TheirAttention, TheirModel, TheirPipeline
from support import count_bits
from torch import Tensor

from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.run import convert
from mlaconvert.model.load import load_model

WINDOW = StreamingConfig(window_frames=6)
ABSOLUTE = StreamingConfig(window_frames=6, positions="absolute")


@pytest.fixture(scope="module")
def vectors() -> dict[str, Tensor]:
    return dict(load_file(Path(__file__).parent / "golden" / "wan_tiny" / "golden.safetensors"))


RECIPES = {
    "lossless": ConvertRecipe(init="lossless", streaming=WINDOW),
    "absolute": ConvertRecipe(init="lossless", streaming=ABSOLUTE),
    "paper": ConvertRecipe(init="svd", streaming=WINDOW),
    "token": ConvertRecipe(init="svd", streaming=WINDOW, key_norm="token", rope="latent"),
    "head": ConvertRecipe(init="svd", streaming=WINDOW, key_norm="token", rope="head", layers="0,2"),
    "lossless, exact present": ConvertRecipe(init="lossless", present="exact", streaming=WINDOW),
    "absolute, exact present": ConvertRecipe(init="lossless", present="exact", streaming=ABSOLUTE),
    "heads beside an exact present": ConvertRecipe(
        init="svd", present="exact", streaming=WINDOW, key_norm="token", rope="head", v_dim=17
    ),
    "shared key beside an exact present": ConvertRecipe(init="svd", present="exact", streaming=WINDOW, rope="latent"),
}

IN_BITS = ("head, in bits", "heads beside an exact present, in bits")


@pytest.fixture(scope="module")
def folders(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("streaming")
    for name, recipe in RECIPES.items():
        convert(golden, root / name, recipe)
    for name in IN_BITS:
        shutil.copytree(root / name.removesuffix(", in bits"), root / name)
        count_bits(root / name)
    return {name: root / name for name in (*RECIPES, *IN_BITS)}


@pytest.fixture
def make(golden: Path) -> Callable[..., TheirPipeline]:
    def pipeline(window: int = 6, sink: int = 1, kind: type[TheirAttention] = TheirAttention) -> TheirPipeline:
        return pipeline_of(golden, window, sink, kind)

    return pipeline


def pipeline_of(
    folder: Path, window: int = 6, sink: int = 1, kind: type[TheirAttention] = TheirAttention
) -> TheirPipeline:
    """A pipeline around the dense model in `folder`."""
    return TheirPipeline(TheirModel(load_model(folder), window, sink, kind))
