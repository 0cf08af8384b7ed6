"""Healing of a student whose present is exact: every stage runs, and only what its past is read with learns."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from heal_run_cases import save_teacher, settings
from safetensors.torch import load_file
from support import count_bits

from mlaconvert.config.mla import RopeMode
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.run import convert
from mlaconvert.errors import ConfigError
from mlaconvert.files.names import WEIGHTS_NAME
from mlaconvert.healing.recipe import Train
from mlaconvert.healing.run import heal, plan
from mlaconvert.healing.state import choose_trained
from mlaconvert.model.load import load_model
from mlaconvert.model.wan import WanModel


@pytest.fixture(scope="module")
def students(home: Path) -> dict[str, Path]:
    """Conversions of the teacher in `home`, one of each way to turn keys."""
    ropes: tuple[RopeMode, ...] = ("head", "latent")
    for rope in ropes:
        recipe = ConvertRecipe(
            init="svd",
            kv_rank=7,
            present="exact",
            rope=rope,
            v_dim=9,
            key_norm="token",
            height=4,
            width=6,
            vae_stride=1,
        )
        convert(home / "teacher", home / f"exact-{rope}", recipe)
    return {rope: home / f"exact-{rope}" for rope in ropes}


def velocity(model: WanModel, chunks: tuple[int, ...]) -> torch.Tensor:
    g = torch.Generator().manual_seed(8)
    x, context = torch.randn(2, 3, sum(chunks), 4, 6, generator=g), torch.randn(2, 4, 10, generator=g)
    found: torch.Tensor = model(x, torch.tensor([700.0, 300.0]), context, chunks=chunks)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["distill", "teacher-forcing", "consistency", "dmd"])
@pytest.mark.parametrize("rope", ["head", "latent"])
def test_every_stage_heals_the_past_alone(
    home: Path, students: dict[str, Path], tmp_path: Path, stage: str, rope: str
) -> None:
    options: dict[str, Any] = {"attention_steps": 1} if stage == "distill" else {}
    recipe = settings(stage, steps=2, train="latent", validate_every=1, save_every=2, warmup=0, lr=1e-2, **options)
    heal(students[rope], tmp_path / "out", recipe, teacher=home / "teacher", data=home / "clips", cpu=True)
    before, after = (load_file(folder / WEIGHTS_NAME) for folder in (students[rope], tmp_path / "out"))
    assert before.keys() == after.keys()
    changed = {name.split(".")[3] for name in before if not torch.equal(before[name], after[name])}
    past = {"kv_b_proj", "past_out_proj", *(("q_b_proj", "k_rope_proj") if rope == "latent" else ())}
    # A rollout's past is a constant, so distribution matching leaves alone what is cached.
    assert changed <= past | {"kv_a_proj_with_mqa"}
    teacher, healed = load_model(home / "teacher"), load_model(tmp_path / "out")
    assert healed.config.mla is not None
    assert healed.config.mla.present == "exact"
    torch.testing.assert_close(velocity(healed, (2,)), velocity(teacher, (2,)), rtol=1e-5, atol=1e-5)
    assert (velocity(healed, (2, 2)) - velocity(teacher, (2, 2))).abs().max() > 1e-3


@pytest.mark.parametrize("train", ["attention", "all"])
def test_what_is_trained_runs_in_bits(home: Path, students: dict[str, Path], tmp_path: Path, train: Train) -> None:
    """Training sees what the cache will give back, and leaves the tables of its quantisers alone."""
    shutil.copytree(students["head"], tmp_path / "bits")
    count_bits(tmp_path / "bits")
    steps, lr = (20, 3e-3) if train == "attention" else (3, 1e-4)
    recipe = settings("distill", steps=steps, train=train, validate_every=1, lr=lr, attention_steps=0)
    report = heal(tmp_path / "bits", tmp_path / "out", recipe, teacher=home / "teacher", data=home / "clips", cpu=True)
    assert train == "all" or report.best[1] < 0.9 * report.curves.validation[0][1]
    before, after = (load_file(tmp_path / folder / WEIGHTS_NAME) for folder in ("bits", "out"))
    changed = {name.split(".")[3] for name in before if "self_attn" in name and not before[name].equal(after[name])}
    assert {"kv_b_proj", "kv_a_proj_with_mqa"} <= changed
    assert "kv_quantizer" not in changed
    assert not any("kv_quantizer" in name for name in choose_trained(load_model(tmp_path / "bits"), train))
    healed, loose = load_model(tmp_path / "out"), load_model(tmp_path / "out")
    for block in loose.blocks:
        block.self_attn.kv_quantizer = None  # type: ignore[assignment]
    assert (velocity(healed, (2, 2)) - velocity(loose, (2, 2))).abs().max() > 1e-3


@pytest.mark.parametrize("train", ["latent", "attention"])
def test_distillation_comes_nearer_to_the_teacher(
    home: Path, students: dict[str, Path], tmp_path: Path, train: str
) -> None:
    recipe = settings("distill", steps=20, train=train, validate_every=5, lr=3e-3, attention_steps=0)
    report = heal(students["head"], tmp_path / "out", recipe, teacher=home / "teacher", data=home / "clips", cpu=True)
    assert report.best[1] < 0.9 * report.curves.validation[0][1]
    before, after = (load_file(folder / WEIGHTS_NAME) for folder in (students["head"], tmp_path / "out"))
    changed = {name.split(".")[3] for name in before if not torch.equal(before[name], after[name])}
    assert {"kv_a_proj_with_mqa", "kv_b_proj", "past_out_proj"} <= changed
    assert ("v_proj" in changed) == (train == "attention")


@pytest.mark.parametrize("train", ["latent", "attention"])
def test_what_has_no_past_is_refused(home: Path, students: dict[str, Path], tmp_path: Path, train: str) -> None:
    """Clips of one chunk, and whole clips as a bidirectional teacher sees them: what they show is exact already."""
    both_ways = save_teacher(tmp_path / "both-ways", None)
    for options, teacher, says in (
        ({"frames": 2}, home / "teacher", "2 latent frames are one chunk"),
        ({}, both_ways, "whole clips, as its bidirectional teacher"),
    ):
        recipe = settings("distill", steps=1, train=train, **options)
        for begin in (plan, lambda *a, **k: heal(a[0], tmp_path / "out", *a[1:], cpu=True, **k)):
            with pytest.raises(ConfigError, match=says):
                begin(students["head"], recipe, teacher=teacher, data=home / "clips")
    assert not (tmp_path / "out").exists()
    recipe = settings("teacher-forcing", steps=1, train=train)
    heal(students["head"], tmp_path / "out", recipe, teacher=both_ways, data=home / "clips", cpu=True)


def test_a_dry_run_counts_what_learns(home: Path, students: dict[str, Path]) -> None:
    found = plan(students["latent"], settings("distill", train="latent"), teacher=home / "teacher", data=home / "clips")
    weights = load_file(students["latent"] / WEIGHTS_NAME)
    kept = ("q_a_proj", "q_a_layernorm", "k_norm_proj", "k_norm", "v_proj", "o")
    learns = sum(t.numel() for n, t in weights.items() if ".self_attn." in n and n.split(".")[3] not in kept)
    assert found.memory["average"] == 4 * learns
