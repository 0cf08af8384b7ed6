"""Calibration beside an exact present: errors and refits of what only the past uses, and losses of whole models."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from calibrate_cases import (
    SMALL,
    STREAMING,
    beside_present,
    make_clips,
    make_layer,
    nth,
    target,
)
from torch import Tensor

from mlaconvert.config.mla import KeyNorm, RopeMode
from mlaconvert.conversion.calibration.layer import Layer
from mlaconvert.conversion.calibration.measure import layer_moments
from mlaconvert.conversion.calibration.newest import attention_error
from mlaconvert.conversion.calibration.refit_past import refit_past
from mlaconvert.conversion.calibration.target import PAST_ONLY, Target
from mlaconvert.conversion.calibration.walk import LayerWalk
from mlaconvert.conversion.calibration.windows import Regime, windows
from mlaconvert.families.open import open_checkpoint
from mlaconvert.model.attention.latent import LatentAttention
from mlaconvert.model.load import load_model
from mlaconvert.model.wan import WanModel

KINDS: list[tuple[RopeMode, int, KeyNorm]] = [
    ("head", 14, "token"),
    ("head", 9, "latent"),
    ("latent", 9, "token"),
    ("cached", 14, "token"),
]


def exact(rope: RopeMode, v_dim: int = 14, key_norm: KeyNorm = "token") -> Target:
    return target(key_norm, rope=rope, v_dim=v_dim, present="exact")


def lossy(layer: Layer, made: Target) -> LatentAttention:
    return made.convert(layer, made.layer(11, () if made.rope == "head" else SMALL), layer_moments(layer))


def squared_error(layer: Layer, student: LatentAttention) -> Tensor:
    """Of the counted queries' output in whole passes, relative to the teacher's."""
    error, power = torch.zeros(()).double(), 0.0
    for batch in layer.inputs:
        teacher = layer.attention(batch.x, batch.plan)[:, batch.first_query :].detach()
        error = error + (student(batch.x, batch.plan)[:, batch.first_query :] - teacher).square().sum()
        power += float(teacher.square().sum())
    return error / power


@pytest.mark.parametrize(("rope", "v_dim", "key_norm"), KINDS)
def test_the_error_of_newest_chunks_is_that_of_whole_passes(rope: RopeMode, v_dim: int, key_norm: KeyNorm) -> None:
    layer = beside_present(make_layer(6))
    student = lossy(layer, exact(rope, v_dim, key_norm))
    found = attention_error(layer, student)
    assert found == pytest.approx(float(squared_error(layer, student)) ** 0.5, rel=1e-9)
    assert 0.02 < found < 0.9
    # Beside a latent present the same factors lose more: the newest chunk is read from latents too.
    plain = dataclasses.replace(layer, inputs=[dataclasses.replace(b, past_only=False) for b in layer.inputs])
    assert attention_error(plain, lossy(plain, target(key_norm, rope=rope, v_dim=v_dim))) > found


@pytest.mark.parametrize(("rope", "v_dim", "key_norm"), KINDS)
def test_refit_past_lowers_the_error_and_changes_what_the_past_uses(
    rope: RopeMode, v_dim: int, key_norm: KeyNorm
) -> None:
    layer = beside_present(make_layer(1, batch=3))
    student = lossy(layer, exact(rope, v_dim, key_norm))
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    start = attention_error(layer, student)
    refitted = refit_past(layer, student)
    assert attention_error(layer, refitted) < 0.9 * start
    assert attention_error(layer, student) == start  # the original is as it was
    after = refitted.state_dict()
    changed = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    assert changed == {name for name in before if name in PAST_ONLY}
    assert {"kv_b_proj.weight", "kv_b_proj.bias"} <= changed
    assert ("q_b_proj.weight" in changed) == (rope != "head")
    assert ("past_out_proj.weight" in changed) == (v_dim < 14)
    assert ("k_rope_proj.weight" in changed) == (rope == "latent")
    assert not any(p.requires_grad or p.grad is not None for p in refitted.parameters())


def test_refit_past_goes_towards_the_least_squares() -> None:
    """By the gradient of whole passes: it all but vanishes, and more iterations lose no more."""
    layer = beside_present(make_layer(2, batch=3))
    student = lossy(layer, exact("head"))

    def steepness(module: LatentAttention) -> float:
        leaves = [p.requires_grad_(True) for name, p in module.named_parameters() if name in PAST_ONLY]
        with torch.enable_grad():
            gradients = torch.autograd.grad(squared_error(layer, module), leaves)
        for leaf in leaves:
            leaf.requires_grad_(False)
        return float(torch.cat([g.flatten() for g in gradients]).norm())

    few, many = (refit_past(layer, student, iterations=count) for count in (12, 300))
    assert attention_error(layer, many) < attention_error(layer, few) < attention_error(layer, student)
    assert steepness(many) < 0.01 * steepness(student)


def test_a_refit_that_loses_on_held_back_clips_gives_the_student_itself() -> None:
    layer = beside_present(make_layer(3))
    student = lossy(layer, exact("latent", 9))
    held_back = beside_present(make_layer(4))
    layer.held_back = dataclasses.replace(held_back, attention=layer.attention)
    # Where the student is the teacher, whatever it becomes is worse.
    layer.held_back.__dict__["expected"] = [
        student(batch.x, batch.plan)[:, batch.first_query :] for batch in held_back.inputs
    ]
    assert refit_past(layer, student) is student
    layer.held_back = dataclasses.replace(layer, held_back=None)
    assert refit_past(layer, student) is not student


def test_held_back_clips_have_noisy_pasts_only_where_the_fit_has(folder: Path) -> None:
    for share, batches in ((0.0, 3), (0.25, 6)):
        regime = Regime(streaming=STREAMING, timesteps=(900.0, 0.0), present="exact", noisy_past=share)
        with open_checkpoint(folder) as checkpoint:
            layer = nth(LayerWalk(checkpoint, make_clips(4), regime, validation=make_clips(2, seed=7)), 1)
            assert len(layer.inputs) == 3  # windows that have a past, of four clips
            assert layer.held_back is not None
            assert [len(batch.x) for batch in layer.held_back.inputs] == [2] * batches
            assert all(batch.past_only for batch in (*layer.inputs, *layer.held_back.inputs))


def loss_by_hand(model: WanModel, regime: Regime, seed: int) -> float:
    """Mean squared velocity error on the newest chunk of every window, but of clean passes."""
    total, count = 0.0, 0
    for w in windows(make_clips(2, seed=seed), regime):
        velocity = model(w.latents, w.timestep, w.context, chunks=w.chunks)
        rows = w.timestep[:, -1] > 0
        total += float((velocity[:, :, -w.queries :] - w.target)[rows].double().square().sum())
        count += w.target[rows].numel()
    return total / count


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_losses_of_a_walk_are_those_of_whole_models(folder: Path, share: float) -> None:
    """Behind clean pasts and with noisy ones, whichever of them the layers are fitted to."""
    regime = Regime(streaming=STREAMING, timesteps=(900.0, 0.0, 400.0), present="exact", noisy_past=share)
    made, students = exact("head"), {}
    with open_checkpoint(folder) as checkpoint:
        walk = LayerWalk(checkpoint, make_clips(3), regime, dtype=torch.float64, validation=make_clips(2, seed=7))
        for layer in walk:
            if layer.index != 1:
                students[layer.index] = lossy(layer, made)
                layer.follow("low rank", students[layer.index])
    model = load_model(folder, dtype=torch.float64)
    expected: list[tuple[float, float]] = []
    for _ in range(2):
        clean, noisy = (loss_by_hand(model, dataclasses.replace(regime, noisy_past=n), 7) for n in (0.0, 1.0))
        expected.append((clean, noisy))
        for index, student in students.items():
            model.blocks[index].self_attn = student
    losses = walk.losses
    assert list(losses.clean_past) == list(losses.noisy_past) == ["dense", "low rank"]
    found = list(zip(losses.clean_past.values(), losses.noisy_past.values(), strict=True))
    assert found == [pytest.approx(pair, rel=1e-9) for pair in expected]
    assert len({loss for pair in expected for loss in pair}) == 4
