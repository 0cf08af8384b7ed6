"""What an evaluation comes to: close to the teacher, close but for long rollouts, or far; and what to do next.

The limits stand here and nowhere else. Every verdict names those that it was judged by. What counts is what a rollout
meets: the velocity behind clean pasts, then its loss, then where long rollouts end. A bidirectional model has no past:
its validation figures are judged by the same limits.

    for entry in entries(evaluation):
        print(judge(entry).text)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mlaconvert.evaluation.lines import Entry, has_clean_past, number, numbers
from mlaconvert.units import percent, signed_percent

CLOSE_VELOCITY = 0.05
"""A close model's velocity is off by no more than this, relative to the teacher's."""

CLOSE_EXCESS = 0.5
"""A close model's loss lies no further above the teacher's than this share of it."""

NEAR_DISTANCE = 1.25
"""Close rollouts end no further from the teacher's than this many times the distance of the teacher's other noise."""

NEAR_STATISTIC = 0.2
"""Nor does a statistic of theirs change by more than this share, or twice the change of the teacher's other noise."""

Record = Mapping[str, Any]  # a model's conversion.json or healing.json
Grade = Literal["close", "diverges", "far", "unknown"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One model's: how it is graded, why with the limits, and what to do next."""

    grade: Grade
    why: str
    next: str

    @property
    def text(self) -> str:
        """Both in two sentences."""
        return f"{self.why} Next: {self.next}"

    def to_json(self) -> dict[str, str]:
        """Plain data."""
        return {"grade": self.grade, "why": self.why, "next": self.next}


def judge(entry: Entry, conversion: Record | None = None, healing: Record | None = None) -> Verdict:
    """The verdict on a model's entry in evaluation.json, as `figures.entries` gives it.

    `conversion` and `healing` are its records, which decide what comes next.
    """
    past = has_clean_past(entry)
    where = " behind clean pasts" if past else ""
    path = ("clean_past",) if past else ()
    velocity, excess = number(*path, "velocity_error")(entry), number(*path, "excess")(entry)
    if velocity is None or excess is None or (not past and _streams(entry)):
        return Verdict(
            grade="unknown",
            why="No verdict: nothing was measured behind clean pasts, which is what a model meets that streams.",
            next="evaluate it again with clips that are longer than a chunk (--data DIR).",
        )
    measured = (
        f"its velocity{where} is off by {percent(velocity)} (close: up to {CLOSE_VELOCITY:.0%}) and its loss there "
        f"changes by {signed_percent(excess)} (up to {CLOSE_EXCESS:+.0%})"
    )
    # Written so that what is not a number is far.
    if not (velocity <= CLOSE_VELOCITY and excess <= CLOSE_EXCESS):
        return Verdict(grade="far", why=f"Far from the teacher: {measured}.", next=_nearer(conversion, healing))
    videos = "long rollouts" if past else "the videos that it makes"
    late = numbers("drift", "last_third", "difference")(entry)
    if late is None or not {"student", "other_seed"} <= late.keys():
        return Verdict(
            grade="close",
            why=f"Close to the teacher: {measured}; {videos} were not measured.",
            next="measure them as well (--frames 60).",
        )
    times = late["student"] / max(late["other_seed"], 1e-12)
    ends = (
        f"rollouts end {times:.2f} times as far from the teacher's as those of the teacher with another seed "
        f"(close: up to {NEAR_DISTANCE:g})"
    )
    left = _left(entry)
    if times <= NEAR_DISTANCE and not left:
        return Verdict(
            grade="close",
            why=f"Close to the teacher: {measured}, and {ends}.",
            next="look at the videos, then publish it with `mlaconvert push`; `mlaconvert heal` brings it closer.",
        )
    also = (
        f"; their {' and '.join(left)} (close: up to {NEAR_STATISTIC:.0%}, or twice the other seed's)" if left else ""
    )
    return Verdict(
        grade="diverges",
        why=f"Close to the teacher, but {videos} diverge: {measured}; {ends}{also}.",
        next=_healing(healing) + ", or convert it again, counted in bits (`mlaconvert convert --bytes-per-token N`).",
    )


def _streams(entry: Entry) -> bool:
    """Whether it was measured as a model that makes video chunk by chunk."""
    conditions = entry.get("conditions")
    return isinstance(conditions, Mapping) and conditions.get("streaming") is not None


def _left(entry: Entry) -> list[str]:
    """The statistics of the rollouts' last third that leave the teacher's, each with its change."""
    read = (numbers("drift", "last_third", "deviation", who) for who in ("student", "other_seed"))
    student, other = (found(entry) or {} for found in read)
    return [
        f"{name} changes by {signed_percent(change)}"
        for name, change in student.items()
        if not abs(change) <= max(NEAR_STATISTIC, 2 * abs(other.get(name, 0.0)))
    ]


def _healing(healing: Record | None) -> str:
    return "train it for more steps with `mlaconvert heal`" if healing else "train it with `mlaconvert heal`"


def _nearer(conversion: Record | None, healing: Record | None) -> str:
    recipe = (conversion or {}).get("recipe")
    init = recipe.get("init") if isinstance(recipe, Mapping) else None
    if not healing and init in ("svd", "random"):
        return f"convert it with real inputs (`mlaconvert convert --init calibrated` instead of {init}), then heal it."
    return (
        _healing(healing) + "; if that does not do, convert it again, counted in bits or with more of them "
        "(--bytes-per-token N), or with clips like those that it is to make (--data DIR)."
    )
