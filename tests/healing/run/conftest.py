"""A folder with a teacher, its conversion and clips; references of few steps are short."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from heal_run_cases import save_teacher
from safetensors.torch import save_file

from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.run import convert
from mlaconvert.healing.stages import few_step as fewstep


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher, its conversion and clips."""
    root = tmp_path_factory.mktemp("heal")
    save_teacher(root / "teacher")
    settings = ConvertRecipe(
        init="svd", kv_rank=7, rope_dim=4, q_rank="none", key_norm="token", height=4, width=6, vae_stride=1
    )
    convert(root / "teacher", root / "student", settings)
    g = torch.Generator().manual_seed(0)
    (root / "clips").mkdir()
    for i, count in enumerate((5, 8)):
        clips = {
            "latents": torch.randn(count, 3, 6, 4, 6, generator=g),
            "context": torch.randn(count, 4, 10, generator=g),
        }
        save_file(clips, root / "clips" / f"{i}.safetensors")
    save_file({"context": torch.randn(1, 4, 10, generator=g)}, root / "clips" / "null_context.safetensors")
    return root


@pytest.fixture(autouse=True)
def short_references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fewstep, "TEACHER_STEPS", 2)
