"""Line charts as inline SVG."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

_WIDTH, _HEIGHT = 420, 270  # a chart's own units; on the screen it is 300 to 480 pixels wide
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 20, 10, 42
_COLORS = 5  # models of different colours; line patterns and markers tell them apart too
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "5 5")


@dataclass(frozen=True)
class Series:
    """A line of a chart; `color` numbers a model, None is the teacher."""

    name: str
    points: list[tuple[float, float]]
    color: int | None
    marker: bool = False
    thin: bool = False

    @property
    def style(self) -> str:
        """Its classes and line pattern."""
        if self.color is None:
            return 'class="line teacher thin" stroke-dasharray="2 3"' if self.thin else 'class="line teacher"'
        dash = _DASHES[self.color % len(_DASHES)]
        return f'class="line m{self.color % _COLORS}"' + (f' stroke-dasharray="{dash}"' if dash else "")


def chart(
    title: str,
    x_label: str,
    series: Sequence[Series],
    tick: Any,
    *,
    zero: bool = True,
    legend: bool = True,
    bundle: bool = False,
) -> str:
    """A line chart. `zero` keeps zero in sight; a `bundle` is many thin lines alike, with their median."""
    xs = [x for line in series for x, _ in line.points]
    ys = [y for line in series for _, y in line.points if math.isfinite(y)]
    x0, x1 = min(xs), max(xs)
    y_ticks = ticks(min([*ys, 0.0] if zero else ys), max([*ys, 0.0] if zero else ys), 6)
    y0, y1 = y_ticks[0], y_ticks[-1]
    x_ticks = [t for t in ticks(x0, x1, 6, whole=True) if x0 <= t <= x1]
    inner_w, inner_h = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + inner_w * ((x - x0) / (x1 - x0) if x1 > x0 else 0.5),
            _TOP + inner_h * (1 - (y - y0) / (y1 - y0)),
        )

    parts = []
    for value in y_ticks:
        _, y = place(x0, value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(tick(value))}</text>')
    for value in x_ticks:
        x, _ = place(value, y0)
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{value:g}</text>')
    middle = _LEFT + inner_w / 2
    parts.append(f'<text x="{middle:.0f}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    for line in series:
        spots = [place(x, y) for x, y in line.points if math.isfinite(y)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        style = 'class="line bundle"' if bundle else line.style
        parts.append(f'<polyline {style} points="{path}"><title>{escape(line.name)}</title></polyline>')
        if line.marker and len(spots) <= 48:
            parts += [_marker(x, y, line.color) for x, y in spots]
    if bundle:
        parts.append(_median_line(series, place))
    keys = [] if bundle or not legend else [(line.name, line.style) for line in series]
    if bundle:
        keys = [("one layer", 'class="line bundle"'), ("median", 'class="line teacher"')]
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>{_legend(keys)}"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)} over {escape(x_label)}">'
        f"{''.join(parts)}</svg></figure>"
    )


def _median_line(series: Sequence[Series], place: Any) -> str:
    length = min(len(line.points) for line in series)
    spots = [
        place(series[0].points[i][0], statistics.median([line.points[i][1] for line in series])) for i in range(length)
    ]
    return '<polyline class="line teacher" points="' + " ".join(f"{x:.1f},{y:.1f}" for x, y in spots) + '"/>'


def _marker(x: float, y: float, color: int | None) -> str:
    kind = "teacher" if color is None else f"m{color % _COLORS}"
    if color is None or color % 2 == 0:
        return f'<circle class="dot {kind}" cx="{x:.1f}" cy="{y:.1f}" r="3.2"/>'
    return f'<rect class="dot {kind}" x="{x - 3:.1f}" y="{y - 3:.1f}" width="6" height="6"/>'


def _legend(keys: Sequence[tuple[str, str]]) -> str:
    if len(keys) < 2:
        return ""
    items = "".join(
        f'<li><svg viewBox="0 0 30 8" aria-hidden="true"><line x1="1" x2="29" y1="4" y2="4" {style}/></svg>'
        f"{escape(name)}</li>"
        for name, style in keys
    )
    return f'<ul class="legend">{items}</ul>'


def ticks(low: float, high: float, count: int, *, whole: bool = False) -> list[float]:
    """About `count` round values that enclose low and high; `whole` keeps them integers."""
    if high <= low:
        low, high = low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5)
    raw = (high - low) / max(1, count - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= raw * 0.999)
    if whole:
        step = max(1.0, float(round(step)))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def number_tick(value: float) -> str:
    """A plain number on an axis."""
    return f"{value:.6g}"


def percent_tick(value: float) -> str:
    """A share on an axis."""
    return f"{100 * value:.6g}%"
