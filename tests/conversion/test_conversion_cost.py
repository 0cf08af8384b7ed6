"""What a conversion computes, part by part, is what was counted before it began."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import succeed
from counted_flops import FlopCount

from mlaconvert.clips import teacher_made
from mlaconvert.conversion import cost, from_clips
from mlaconvert.conversion import run as conversion
from mlaconvert.conversion.calibration import layer
from mlaconvert.conversion.calibration import run as calibration
from mlaconvert.conversion.calibration.target import Target
from mlaconvert.conversion.calibration.walk import LayerWalk
from mlaconvert.conversion.cost import CLIPS, FACTORS, INPUTS, LAYERS, MODEL, WALKS, ConversionCost
from mlaconvert.conversion.plan import ConversionPlan
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.recipes import load_recipe
from mlaconvert.conversion.run import convert, preview
from mlaconvert.listener import Listener
from mlaconvert.model import rates
from mlaconvert.model.flops import Work
from mlaconvert.model.rates import LONG, Rates
from mlaconvert.reports.plan import cost_lines

SHAPE = (3, 9, 24, 32)  # of the built-in model's clips
GIVEN = Rates(products=4e9, attention=2e9, double=1e9, moved=1e15)
# Where a part of a conversion is done, but for its factorisations, which torch does not count.
PLACES: tuple[tuple[str, Any, str], ...] = (
    *((WALKS, LayerWalk, name) for name in ("_prepare", "_run", "_judge")),
    (INPUTS, calibration, "layer_moments"),
    *((LAYERS, calibration, name) for name in ("attention_error", "refit_past", "refit_output", "refit_query")),
    *((LAYERS, Target, name) for name in ("measure", "fit_output")),
    *((FACTORS, Target, name) for name in ("convert", "components")),
    (MODEL, from_clips, "refit_model"),
    (CLIPS, teacher_made, "rollout"),
)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """FLOPs by part of all that runs, each operation's in the innermost part."""
    found = dict.fromkeys((part for part, _, _ in PLACES), 0)

    def count(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any, **kwargs: Any) -> Any:
            before = sum(found.values())
            with FlopCount() as counter:
                made = function(*args, **kwargs)
                made = iter(list(made)) if part == CLIPS else made
            found[part] += counter.total - (sum(found.values()) - before)
            return made

        return counting

    for part, owner, name in PLACES:
        monkeypatch.setattr(owner, name, count(part, getattr(owner, name)))
    return found


def planned(recipe: ConvertRecipe) -> ConversionPlan:
    return preview("tiny", None, recipe).models[0].plan


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{}, {"present": "latent", "rope": "cached", "rope_dim": 4, "kv_rank": 24, "q_rank": 96, "key_norm": "latent"}],
    ids=["exact present", "the paper's cache"],
)
def test_every_part_computes_what_is_counted(tmp_path: Path, counted: dict[str, int], changes: dict[str, Any]) -> None:
    """Within a fifth for walks, inputs and the model, a third for the many small steps of a layer."""
    refit = {} if changes else {"refit_steps": 3, "refit_clips": 5}
    recipe = dataclasses.replace(load_recipe("tiny"), clips=5, **refit, **changes)
    expected = cost.conversion_work(planned(recipe), SHAPE, makes_clips=False)
    convert("tiny", tmp_path / "out", recipe)
    assert (CLIPS in expected, MODEL in expected) == (False, not changes)
    for part, most in ((WALKS, 0.1), (INPUTS, 0.2), (LAYERS, 0.35), (MODEL, 0.2)):
        if part in expected:
            work = expected[part]
            assert work.products + work.attention + work.double == pytest.approx(counted[part], rel=most), part


@pytest.mark.slow
def test_errors_are_measured_on_as_many_tokens_as_are_enough(
    tmp_path: Path, counted: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four batches of windows two: the second half is left out of what is counted and of what is done."""
    recipe = dataclasses.replace(load_recipe("tiny"), clips=20, refit_steps=0)
    all_of_them = cost.conversion_work(planned(recipe), SHAPE, makes_clips=False)
    monkeypatch.setattr(layer, "ENOUGH", 3000)
    expected = cost.conversion_work(planned(recipe), SHAPE, makes_clips=False)
    convert("tiny", tmp_path / "out", recipe)
    for part, most in ((WALKS, 0.1), (LAYERS, 0.35)):
        work = expected[part]
        assert work.flops < 0.85 * all_of_them[part].flops, part
        assert work.products + work.attention + work.double == pytest.approx(counted[part], rel=most), part


def test_time_and_memory_follow_from_rates_and_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """More clips take more of both, a refit in bfloat16 has rates of its own, and a CPU's memory is not counted."""
    work = {WALKS: Work(products=8e9, attention=1e9), MODEL: Work(products=8e9, double=1e9)}
    half = dataclasses.replace(GIVEN, products=8e9)
    assert cost.seconds_of(work | {CLIPS: Work(products=16e9)}, GIVEN, half) == {WALKS: 2.5, MODEL: 2.0, CLIPS: 2.0}
    few, many = (planned(dataclasses.replace(load_recipe("tiny"), clips=clips)) for clips in (10, 40))
    monkeypatch.setattr(cost, "probe", lambda *_, **__: GIVEN)
    costs = [cost.conversion_cost(plan, None, torch.device("cpu"), makes_clips=False) for plan in (few, many)]
    assert costs[0].memory is None
    for part in (WALKS, INPUTS):
        assert 3 < costs[1].seconds[part] / costs[0].seconds[part] <= 4
    assert costs[1].seconds[FACTORS] == costs[0].seconds[FACTORS]
    sizes = [cost.device_bytes(plan, None, 336) for plan in (few, many)]
    assert sizes[1] > 2 * sizes[0]
    made = cost.conversion_work(few, SHAPE, makes_clips=True)[CLIPS]
    assert made.products == 10 / 40 * cost.conversion_work(many, SHAPE, makes_clips=True)[CLIPS].products > 0


def test_a_conversion_from_weights_that_takes_seconds_is_not_probed_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "probe", lambda *_, **__: pytest.fail("nothing to tell"))
    report = preview("tiny", None, ConvertRecipe(init="svd"), estimate=True).models[0]
    assert report.cost is not None
    assert list(cost_lines(report, "cpu")) == [
        "tiny: what it will take",
        "  time     seconds, and the copying of 9.80 MiB",
    ]
    monkeypatch.setattr(cost, "SHORT", 0.0)
    monkeypatch.setattr(cost, "probe", lambda *_, **__: GIVEN)
    report = preview("tiny", None, ConvertRecipe(init="svd"), estimate=True).models[0]
    assert report.cost is not None
    assert report.cost.total == pytest.approx(sum(w.double for w in report.cost.work.values()) / 1e9)


def test_a_dry_run_says_how_long_it_takes_and_what_takes_it(tmp_path: Path) -> None:
    result = succeed("convert", "tiny", "--recipe", "tiny", "--clips", 5, "--dry-run", "--device", "cpu")
    line = result.stdout.splitlines()[-1]
    assert re.fullmatch(
        r"  time     about \d+ (s|min) on cpu, \S+ FLOPs: refitting the model \d+ \w+(, [a-z ]+ \d+ \w+)*", line
    )
    assert "what it will take" in result.stdout


def test_a_gpu_that_is_too_small_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    report = preview("tiny", None, load_recipe("tiny")).models[0]
    spent = ConversionCost(
        work={WALKS: Work(products=2e15)}, seconds={WALKS: 7200.0, INPUTS: 240.0, LAYERS: 0.1}, memory=30 * 2**30
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (24 * 2**30, 24 * 2**30))
    assert list(cost_lines(dataclasses.replace(report, cost=spent), "cuda"))[1:] == [
        "  time     about 2.1 h on cuda, 2e+15 FLOPs: clips through the model 2.0 h, measuring inputs 4 min",
        "  memory   about 30 GiB of cuda",
        "  does not fit: about 30 GiB are needed on cuda, 24 GiB are free; take fewer --clips, or --device cpu",
    ]


def test_hours_on_a_cpu_are_said_before_they_begin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A line before the first layer, once; nothing of it changes what is done."""
    monkeypatch.setattr(rates, "probe", lambda *_, **__: dataclasses.replace(GIVEN, products=1e12 / (9 * LONG)))
    monkeypatch.setattr(rates, "SHORT", 0.0)
    said: list[str] = []

    def stop(stage: str, *_: Any) -> None:
        assert said
        raise KeyboardInterrupt(stage)

    with pytest.raises(KeyboardInterrupt):
        convert("tiny", tmp_path / "out", load_recipe("tiny"), listener=Listener(progress=stop, say=said.append))
    (line,) = said
    assert re.fullmatch(
        r"the conversion will take about \S+ h on cpu \(\S+ FLOPs\); a GPU takes a small part of that "
        r"\(--device cuda\); --dry-run says what takes it",
        line,
    )
    del said[:]
    monkeypatch.setattr(conversion, "warning", lambda *_, **__: pytest.fail("weights alone are no matter of hours"))
    convert("tiny", tmp_path / "svd", ConvertRecipe(init="svd"), listener=Listener(say=said.append))
    assert said == []
