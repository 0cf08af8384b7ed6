"""Calibration on a small checkpoint of odd sizes, against loops and least squares written out longhand in float64."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import pytest
import torch
from calibrate_cases import EVERY, FEW, HEADS, SMALL, WIDTH, falling, make_clips, make_layer, make_sweep, nth, target

from mlaconvert.clips.folder import BATCH
from mlaconvert.config.mla import KeyNorm, MLALayer, RopeMode
from mlaconvert.conversion.calibration.measure import layer_moments
from mlaconvert.conversion.calibration.method import Method
from mlaconvert.conversion.calibration.newest import attention_error
from mlaconvert.conversion.calibration.refit import refit_output, refit_query
from mlaconvert.conversion.calibration.target import ErrorTable, share_budget
from mlaconvert.conversion.calibration.walk import LayerWalk
from mlaconvert.families.open import open_checkpoint
from mlaconvert.latent.components import choose_components


@pytest.mark.parametrize("off", ["weights", "components"])
def test_components_are_chosen_without_the_part_that_is_switched_off(off: str) -> None:
    layer = make_layer(4)
    moments = layer_moments(layer)
    uneven = torch.logspace(-3, 3, HEADS, dtype=torch.float64)  # weighted, the last head's queries decide
    moments = dataclasses.replace(moments, query=moments.query * uneven[:, None, None])
    found = dataclasses.replace(target(), method=Method(**{off: False})).components(layer.weights, moments, [5])
    whole = {"several": True, "weighted": True}
    part = {"weights": "weighted", "components": "several"}[off]
    chosen = partial(choose_components, layer.weights, moments, num_heads=HEADS, counts=[5])
    assert found == chosen(**whole | {part: False}) != chosen(**whole)


def test_layer_arithmetic() -> None:
    made = target(v_dim=11)
    assert made.layer(13, SMALL) == MLALayer(
        kv_lora_rank=7, qk_nope_head_dim=WIDTH - 6, v_head_dim=11, rope_components=SMALL
    )
    assert made.layer(50, EVERY).qk_nope_head_dim == 0
    assert made.layer(50, EVERY).kv_lora_rank == 8
    assert dataclasses.replace(made, nope_dim=5).layer(13, SMALL).qk_nope_head_dim == 5
    assert dataclasses.replace(made, nope_dim=9).layer(13, SMALL).qk_nope_head_dim == min(9, WIDTH - 6)
    section = target("latent", q_rank=9, rope="latent").mla([made.layer(13, SMALL), None], {"clips": 3})
    assert section.softmax_scale == pytest.approx(WIDTH**-0.5)
    assert (section.q_lora_rank, section.key_norm, section.rope) == (9, "latent", "latent")
    assert section.calibration == {"clips": 3}
    assert [section.cached_scalars(i, 84) for i in range(2)] == [7, 84]
    read, whole = target(rope="latent").layer(13, SMALL), target(rope="head").layer(13, ())
    assert (read.kv_lora_rank, read.qk_nope_head_dim) == (13, WIDTH - 6)
    assert (whole.kv_lora_rank, whole.qk_nope_head_dim) == (13, WIDTH)


@pytest.mark.parametrize("rope", ["cached", "latent"])
@pytest.mark.parametrize("key_norm", ["token", "latent"])
@pytest.mark.parametrize("q_rank", [None, 30])
def test_more_budget_loses_less(folder: Path, rope: RopeMode, key_norm: KeyNorm, q_rank: int | None) -> None:
    made = target(key_norm, q_rank=q_rank, rope=rope)
    with open_checkpoint(folder) as checkpoint:
        layer = nth(make_sweep(checkpoint, make_clips(3)), 1)
        moments = layer_moments(layer)
        tight, roomy, full = (
            attention_error(layer, made.convert(layer, made.layer(budget, components), moments))
            for budget, components in ((7, SMALL), (24, SMALL), (84, EVERY))
        )
    assert tight > 1.15 * roomy > 1.3 * full
    if (key_norm, q_rank) == ("token", None):
        assert full < 1e-9
    else:
        assert 1e-4 < full < 0.5


def test_converted_modules_take_the_layers_dtype(folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint:
        layer = nth(LayerWalk(checkpoint, make_clips(1), FEW), 0)
        student = target().convert(layer, target().layer(84, EVERY), layer_moments(layer))
        refit_query(layer, student)
        refit_output(layer, student)
        assert {p.dtype for p in student.parameters()} == {torch.float32}
        assert not any(p.requires_grad for p in student.parameters())
        assert attention_error(layer, student) < 1e-4


def test_measured_errors_are_those_of_conversions(folder: Path) -> None:
    made = target()
    with open_checkpoint(folder) as checkpoint:
        layer = nth(make_sweep(checkpoint, make_clips(2 * BATCH)), 1)
        moments = layer_moments(layer)
        table = made.measure(layer, moments, counts=(1, 4), budgets=(8, 9, 14), inputs=99)
        assert {count: set(curve) for count, curve in table.errors.items()} == {1: {8, 9, 14}, 4: {9, 14}}
        for count, components in table.components.items():
            assert sum(n for _, n in components) == count
            for budget, error in table.errors[count].items():
                student = made.convert(layer, made.layer(budget, components), moments)
                refit_output(layer, student)
                assert error == pytest.approx(attention_error(layer, student), rel=1e-9)
        few = made.measure(layer, moments, counts=(4,), budgets=(9,), inputs=3)
        assert few.components[4] == table.components[4]
        assert few.errors[4][9] != table.errors[4][9]
        assert few.errors[4][9] == pytest.approx(table.errors[4][9], rel=0.3)


def test_best_split_by_hand() -> None:
    two, four = ((0, 1), (3, 1)), ((0, 4),)
    table = ErrorTable(
        components={2: two, 4: four, 5: ((1, 5),)},
        errors={2: {6: 0.4, 10: 0.1}, 4: {9: 0.3, 12: 0.03}, 5: {}},
    )
    for budget, error, components in (
        (6, 0.4, two),
        (8, 0.2, two),  # the geometric mean; four components were not measured there
        (9, 0.4 * 0.25**0.75, two),
        (11, 0.3 * 0.1 ** (2 / 3), four),
        (12, 0.03, four),
        (15, 0.003, four),
    ):
        assert table.best(budget)[0] == pytest.approx(error)
        assert table.best(budget)[1] == components
    with pytest.raises(ValueError):
        table.best(5)
    lone = ErrorTable(components={2: two}, errors={2: {7: 0.2}})
    assert lone.best(7) == lone.best(30) == (0.2, two)


def test_budgets_are_shared_by_what_layers_lose() -> None:
    """Equal slopes: budgets differ by halving / 2 * log2 of the ratio of sensitivities, whatever the tables' units."""
    tables, sensitive = [falling(1.0), falling(7.0), falling(0.2)], (1.0, 8.0, 0.5)
    found = share_budget(tables, sensitive, 20, largest=99)
    assert sum(found) == 60
    assert found[1] - found[0] == pytest.approx(2.5 * 3, abs=1.5)
    assert found[0] - found[2] == pytest.approx(2.5 * 1, abs=1.5)
    assert share_budget(tables, (3.0, 3.0, 3.0), 20, largest=99) == [20, 20, 20]
    wide = share_budget(tables[:2], (1.0, 1e9), 20, largest=99)
    assert wide == [8, 32]  # 1 / 2.4 of the average
    assert share_budget([falling(1.0)] * 3, (1.0, 1e9, 1e9), 20, largest=99, spread=1.25) == [16, 22, 22]
    assert share_budget([falling(1.0, 17), falling(1.0)], (1.0, 1e9), 20, largest=99) == [
        17,
        23,
    ]  # no less than was measured
