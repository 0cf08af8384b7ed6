"""The card of a model that only its own code runs says so, and shows no snippet that cannot work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from golden_relatives import make_worldplay
from hub_server import Hub
from support import SaveFolder
from torch import Tensor
from typer.testing import CliRunner

from mlaconvert.cli import app
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.run import convert


def test_the_card_of_a_world_model(
    hub: Hub, golden_state: dict[str, Tensor], golden_config: dict[str, Any], save_folder: SaveFolder, tmp_path: Path
) -> None:
    source = save_folder(golden_state | {"blocks.1.cam_encoder.weight": torch.ones(96, 12)}, golden_config)
    convert(source, tmp_path / "out", ConvertRecipe(init="random"))
    result = CliRunner().invoke(app, ["push", str(tmp_path / "out"), "alice/world", "--dry-run"])
    assert result.exit_code == 0, result.stderr
    assert "1 tensor beyond Wan's, of a camera encoder (ReCamMaster)" in result.stdout
    assert "swap_attention(pipeline, 'alice/world')" in result.stdout
    assert "load_model" not in result.stdout


def test_the_card_of_a_model_with_cameras_calls_it_by_its_name(hub: Hub, tmp_path: Path) -> None:
    convert(make_worldplay(tmp_path), tmp_path / "out", ConvertRecipe(init="random", kv_rank=5))
    result = CliRunner().invoke(app, ["push", str(tmp_path / "out"), "alice/world", "--dry-run"])
    assert result.exit_code == 0, result.stderr
    assert "Multi-Head Latent Attention in HY-WorldPlay models" in result.stdout
    assert "Hy-worldplay" not in result.stdout
