"""Models with parts that no Wan transformer has go back into their own code with latent attention."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from streaming_codebases import TheirAttention, TheirPipeline, WorldAttention
from streaming_fixtures import ABSOLUTE
from support import relative
from torch import Tensor, nn

from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.run import convert
from mlaconvert.errors import InputError
from mlaconvert.files.names import WEIGHTS_NAME
from mlaconvert.integrations.streaming import swap_attention

CAMERA = torch.randn(96, 12, generator=torch.Generator().manual_seed(5))


def with_camera(pipe: TheirPipeline, weight: Tensor) -> TheirPipeline:
    """The pipeline with an encoder of camera poses in its second block, as a world model's code has it."""
    encoder = nn.Linear(12, 96, bias=False)
    encoder.weight.data.copy_(weight)
    pipe.generator.model.blocks[1].cam_encoder = encoder
    return pipe


@pytest.mark.parametrize("kind", [TheirAttention, WorldAttention])
def test_a_model_with_passengers_goes_back_into_its_own_code(
    kind: type[TheirAttention],
    golden: Path,
    make: Callable[..., TheirPipeline],
    vectors: dict[str, Tensor],
    tmp_path: Path,
) -> None:
    shutil.copytree(golden, tmp_path / "world")
    state = load_file(golden / WEIGHTS_NAME) | {"blocks.1.cam_encoder.weight": CAMERA}
    save_file(state, tmp_path / "world" / WEIGHTS_NAME)
    convert(tmp_path / "world", tmp_path / "latent", ConvertRecipe(init="lossless", streaming=ABSOLUTE))
    pipe = with_camera(make(kind=kind), CAMERA)
    expected = pipe.twice(vectors["x"], vectors)
    swap_attention(pipe, tmp_path / "latent")
    assert relative(pipe.twice(vectors["x"], vectors), expected) < 1e-4
    with pytest.raises(InputError, match=r"'blocks.1.cam_encoder.weight' is missing in it"):
        swap_attention(make(), tmp_path / "latent")
