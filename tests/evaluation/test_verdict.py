"""Verdicts: grades from limits that stand in one place, the same in JSON, on the terminal, the page and the card."""

from __future__ import annotations

import json
import math
import re
from html import unescape
from typing import Any

import pytest
from page_cases import model, report
from test_figures import card_of

from mlaconvert.evaluation.verdict import CLOSE_EXCESS, CLOSE_VELOCITY, NEAR_DISTANCE, NEAR_STATISTIC, judge
from mlaconvert.reports.evaluation_tables import verdict_lines
from mlaconvert.reports.page.sections import render


def entry(
    velocity: Any = 0.016,
    excess: Any = 0.126,
    *,
    distance: tuple[float, float] | None = (0.14, 0.15),
    motion: tuple[float, float] = (-0.03, 0.01),
    **changes: Any,
) -> dict[str, Any]:
    """A streaming model's, in evaluation.json; `distance` and `motion` are the student's and the other seed's."""
    late = None
    if distance is not None:
        late = {
            "difference": dict(zip(("student", "other_seed"), distance, strict=True)),
            "deviation": {who: {"motion": m} for who, m in zip(("student", "other_seed"), motion, strict=True)},
        }
    return {
        "velocity_error": 0.4,
        "excess": 3.0,
        "clean_past": {"velocity_error": velocity, "excess": excess},
        "drift": {"last_third": late} if late else None,
        "conditions": {"streaming": {"chunk_frames": 3}},
    } | changes


def whole_clips() -> dict[str, Any]:
    """A bidirectional model's, with nothing but validation figures."""
    return {"velocity_error": 0.0, "excess": 0.0, "clean_past": None, "conditions": {"streaming": None}}


@pytest.mark.parametrize(
    ("found", "grade"),
    [
        (entry(), "close"),
        (entry(0.05, 0.5, distance=(0.5, 0.4)), "close"),  # each limit is still close
        (entry(0.0501), "far"),
        (entry(excess=0.501), "far"),
        (entry(excess=-0.2), "close"),
        (entry(math.nan), "far"),
        (entry(excess=math.nan), "far"),
        (entry(distance=(0.19, 0.138)), "diverges"),
        (entry(distance=(math.nan, 0.1)), "diverges"),
        (entry(motion=(-0.21, 0.05)), "diverges"),
        (entry(motion=(-0.21, 0.12)), "close"),  # the teacher's own other seed moves as much
        (entry(motion=(math.nan, 0.1)), "diverges"),
        (entry(0.06, distance=(0.9, 0.1)), "far"),  # velocities come first
        (entry(distance=None), "close"),
        # A bidirectional model is judged by its validation figures.
        (entry(clean_past=None, conditions={"streaming": None}), "far"),
        (whole_clips(), "close"),
        # A clip of one chunk never reads the cache: a perfect figure there says nothing.
        ({**whole_clips(), "conditions": {"streaming": {"chunk_frames": 3}}}, "unknown"),
        (entry("0.01"), "unknown"),
        ({}, "unknown"),
    ],
)
def test_grades(found: dict[str, Any], grade: str) -> None:
    assert (CLOSE_VELOCITY, CLOSE_EXCESS, NEAR_DISTANCE, NEAR_STATISTIC) == (0.05, 0.5, 1.25, 0.2)
    assert judge(found).grade == grade


def test_a_verdict_names_figures_and_limits_and_the_next_step() -> None:
    assert judge(entry()).text == (
        "Close to the teacher: its velocity behind clean pasts is off by 1.6% (close: up to 5%) and its loss there "
        "changes by +12.6% (up to +50%), and rollouts end 0.93 times as far from the teacher's as those of the teacher "
        "with another seed (close: up to 1.25). Next: look at the videos, then publish it with `mlaconvert push`; "
        "`mlaconvert heal` brings it closer."
    )
    parted = judge(entry(distance=(0.189, 0.138), motion=(-0.3, 0.01)))
    assert "1.37 times as far" in parted.why
    assert "their motion changes by -30.0% (close: up to 20%, or twice the other seed's)" in parted.why
    assert "heal`, or convert it again, counted in bits (`mlaconvert convert --bytes-per-token N`)" in parted.next
    assert "long rollouts were not measured" in judge(entry(distance=None)).why
    assert "past" not in judge(whole_clips()).text


def test_what_comes_next_depends_on_what_was_done() -> None:
    far = entry(0.3)
    calibrated, svd = ({"recipe": {"init": init}} for init in ("calibrated", "svd"))
    assert judge(far, svd).next.startswith("convert it with real inputs (`mlaconvert convert --init calibrated`")
    assert judge(far, calibrated).next.startswith("train it with `mlaconvert heal`")
    assert judge(far, calibrated, {"recipe": {}}).next.startswith("train it for more steps with `mlaconvert heal`")
    assert judge(far, svd, {"recipe": {}}).next.startswith("train it for more steps")
    assert judge(far, {"recipe": "hostile"}).grade == "far"


def test_the_same_verdict_everywhere() -> None:
    """On the terminal, in evaluation.json, on the page, and on a card made from what was saved."""
    evaluation = report(model("one", 2), model("two", 1))
    lines = verdict_lines(evaluation)
    assert [line.partition(": ")[0] for line in lines] == ["one", "two"]
    saved = json.loads(json.dumps(evaluation.to_json()))
    page = unescape(render(evaluation))
    for line, one in zip(lines, saved["models"], strict=True):
        text = line.partition(": ")[2]
        assert text == f"{one['verdict']['why']} Next: {one['verdict']['next']}"
        assert line in page
    assert saved["models"][0]["verdict"]["grade"] == "far"  # its loss behind clean pasts is twice the teacher's
    (alone,) = report(model("one", 2)).verdicts()
    card = card_of(report(model("one", 2)).to_json())
    assert re.sub(r"\\(.)", r"\1", card).count(alone.why) == 1
