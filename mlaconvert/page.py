"""An evaluation as one HTML page that needs nothing else: no script, no request, light and dark, narrow and wide.

Charts are inline SVG, frames inline PNG. Every chart has its numbers in a table below it.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mlaconvert.drift import STATISTICS
from mlaconvert.evaluate import EVALUATION_NAME, REPORT_NAME, ModelEvaluation, Report
from mlaconvert.report import format_bytes, percent, signed_percent, summary_notes, summary_rows, write_whole
from mlaconvert.spectrum import cumulative_energy
from mlaconvert.vbench import SIX

_WIDTH, _HEIGHT = 420, 270  # a chart's own units; on the screen it is 300 to 480 pixels wide
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 20, 10, 42
_COLORS = 5  # models of different colours; line patterns and markers tell them apart too
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "5 5")
_STRIP = 8  # frames of each video that the page shows
_PIXELS = 960  # least width of a strip, so that small frames are enlarged without smoothing


def save(report: Report, folder: Path) -> Path:
    """Put evaluation.json and the page into a model's folder; the page's path. Raises OutputError."""
    text = json.dumps(report.to_json(), indent=2) + "\n"
    write_whole(folder / EVALUATION_NAME, text.encode(), "the results")
    write_page(report, folder / REPORT_NAME)
    return folder / REPORT_NAME


def write_page(report: Report, path: Path) -> None:
    """Write the page of `report` to `path`, whole or not at all. Raises OutputError when it cannot be written."""
    write_whole(path, render(report).encode(), "the page")


def render(report: Report) -> str:
    """The page as HTML."""
    names = [model.path for model in report.models]
    title = f"{', '.join(names)} beside {report.teacher}"
    sections = (
        _summary(report),
        _strips(report),
        _layers(report),
        _timesteps(report),
        _drift(report),
        _vbench(report),
        _spectra(report),
        _making(report),
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{escape(', '.join(names))}</h1>\n"
        f'<p class="lead">Multi-Head Latent Attention, measured beside its teacher <b>{escape(report.teacher)}</b> '
        f"on the same clips, noise and noise levels.</p>\n"
        + "\n".join(section for section in sections if section)
        + f"\n</main>\n<footer>Written by mlaconvert {escape(report.versions['mlaconvert'])}.</footer>\n"
        "</body>\n</html>\n"
    )


# --- sections ----------------------------------------------------------------------------------------------------


def _section(title: str, *parts: str) -> str:
    anchor = re.sub(r"\W+", "-", title.lower())
    return (
        f'<section aria-labelledby="{anchor}">\n<h2 id="{anchor}">{escape(title)}</h2>\n'
        + "\n".join(parts)
        + "\n</section>"
    )


def _summary(report: Report) -> str:
    """Tiles with the first model's figures, and a table with all."""
    first = report.models[0]
    tiles = [
        ("cache", f"−{100 * first.cache_reduction:.1f}%", _change_of_bytes(first)),
        ("validation loss", signed_percent(first.fidelity.excess), "above the teacher’s"),
        ("velocity error", percent(first.fidelity.velocity_error), "relative to the teacher’s"),
    ]
    if first.speed is not None:
        tiles.append(("speed", f"{first.speed.ratio:.2f}×", "the teacher’s, in the same run"))
    shown = "".join(
        f'<div class="tile"><dt>{escape(name)}</dt><dd><b>{escape(value)}</b> <span>{escape(note)}</span></dd></div>'
        for name, value, note in tiles
    )
    heads = ("", "teacher", *(model.path for model in report.models))
    of = f"<p>{escape(first.path)} in short:</p>" if len(report.models) > 1 else ""
    notes = f"<p>{escape(' '.join(summary_notes(report)))}</p>"
    return _section(
        "Summary", of, f'<dl class="tiles">{shown}</dl>', _table("Every figure", heads, summary_rows(report)), notes
    )


def _strips(report: Report) -> str:
    teacher = report.models[0].teacher_video
    if teacher is None:
        return ""
    shown = torch.linspace(0, teacher.shape[2] - 1, _STRIP).round().long()
    rows = [("teacher", teacher), *((model.path, model.video) for model in report.models if model.video is not None)]
    pictures = previews([video[:, :, shown] for _, video in rows], pixels=report.pixels)
    plan = report.conditions["rollout"]
    at = ", ".join(str(i) for i in shown.tolist())
    figures = []
    for video in range(teacher.shape[0]):
        images = "".join(
            f'<div class="strip"><span>{escape(name)}</span><img alt="Frames of video {video + 1}: {escape(name)}" '
            f'src="{_data_uri(picture[video])}"></div>'
            for (name, _), picture in zip(rows, pictures, strict=True)
        )
        figures.append(
            f'<figure class="scroll" tabindex="0" role="group" aria-label="Video {video + 1}">{images}</figure>'
        )
    what = (
        "RGB frames."
        if report.pixels
        else "A linear preview, not decoded video: the teacher’s first three principal components of the latent "
        "channels as red, green and blue, the same for all models."
    )
    given = f" The first {plan['given_frames']} frames are given." if plan["given_frames"] else ""
    return _section(
        "Frames",
        f"<p>Rollouts from the same noise, latent frames {at}.{given} {what} Videos from one noise part over time "
        "without being worse; look for blur, loss of motion and colour that runs away.</p>",
        *figures,
    )


def _layers(report: Report) -> str:
    models = report.models
    count = len(models[0].fidelity.attention_errors)
    series = [
        Series(m.path, [(i, e) for i, e in enumerate(m.fidelity.attention_errors)], i, marker=True)
        for i, m in enumerate(models)
    ]
    rows = [(str(i), *(percent(m.fidelity.attention_errors[i]) for m in models)) for i in range(count)]
    return _section(
        "Errors by layer",
        "<p>Self-attention’s output in each layer when it reads what the teacher’s layer reads: error relative to the "
        "teacher’s output.</p>",
        '<div class="charts">' + chart("Error of the attention output", "layer", series, _percent_tick) + "</div>",
        _details("Errors by layer", ("layer", *(m.path for m in models)), rows),
    )


def _timesteps(report: Report) -> str:
    models = report.models
    errors = [
        Series(m.path, [(s.timestep, s.velocity_error) for s in m.timesteps], i, marker=True)
        for i, m in enumerate(models)
    ]
    losses = [
        Series("teacher", [(s.timestep, s.teacher_loss) for s in models[0].timesteps], None, marker=True),
        *(
            Series(m.path, [(s.timestep, s.student_loss) for s in m.timesteps], i, marker=True)
            for i, m in enumerate(models)
        ),
    ]
    rows = [
        (
            f"{step.timestep:.1f}",
            f"{step.teacher_loss:.4f}",
            *(f"{m.timesteps[i].student_loss:.4f}" for m in models),
            *(percent(m.timesteps[i].velocity_error) for m in models),
        )
        for i, step in enumerate(models[0].timesteps)
    ]
    heads = ("timestep", "loss, teacher", *(f"loss, {m.path}" for m in models), *(f"error, {m.path}" for m in models))
    streaming = report.conditions["streaming"] is not None
    seen = "The newest chunk is at the timestep, the chunks before it are clean." if streaming else ""
    return _section(
        "Velocity by timestep",
        f"<p>1000 is pure noise. {seen}</p>",
        '<div class="charts">'
        + chart("Velocity, relative to the teacher’s", "timestep", errors, _percent_tick)
        + chart("Velocity loss", "timestep", losses, _number_tick)
        + "</div>",
        _details("Velocity by timestep", heads, rows),
    )


def _drift(report: Report) -> str:
    drifts = [(i, model.path, model.drift) for i, model in enumerate(report.models) if model.drift is not None]
    if not drifts:
        return ""
    first, other = drifts[0][2], "teacher, another seed"
    frames = len(first.difference["student"])
    parts = [
        ("Difference from the teacher’s frame", None, [drift.difference for _, _, drift in drifts], _percent_tick),
        *(
            (words[0].upper() + words[1:], name, [drift.statistics[name] for _, _, drift in drifts], _number_tick)
            for name, words in STATISTICS.items()
        ),
    ]
    charts, tables = [], []
    for title, name, curves, tick in parts:
        begin = frames - len(curves[0]["student"])
        lines = [
            *([Series("teacher", list(enumerate(curves[0]["teacher"], begin)), None)] if name else []),
            *(
                Series(path, list(enumerate(curve["student"], begin)), i)
                for (i, path, _), curve in zip(drifts, curves, strict=True)
            ),
            Series(other, list(enumerate(curves[0]["other_seed"], begin)), None, thin=True),
        ]
        charts.append(chart(title, "latent frame", lines, tick, zero=name != "mean"))
        write = "{:.4g}".format if name else percent
        rows = [
            (str(f), *(write(y) for y in values))
            for f, values in enumerate(zip(*([y for _, y in line.points] for line in lines), strict=True), begin)
        ]
        tables.append(_details(title, ("latent frame", *(line.name for line in lines)), rows))
    plan = report.conditions["rollout"]
    return _section(
        "Drift",
        f"<p>{plan['videos']} rollouts of {frames} latent frames from the teacher’s own noise. Chaos alone carries two "
        "rollouts apart, as the teacher’s with another seed shows; a model that loses quality leaves the teacher’s "
        "statistics as well.</p>",
        '<div class="charts">' + "".join(charts) + "</div>",
        *tables,
    )


def _vbench(report: Report) -> str:
    scored = [(m.path, m.vbench) for m in report.models if m.vbench is not None]
    if report.teacher_vbench is not None:
        scored.insert(0, (f"{report.teacher} (teacher)", report.teacher_vbench))
    if not scored:
        return ""
    names = list(dict.fromkeys(name for _, found in scored for name in found.scores))
    rows = [
        (
            name.replace("_", " "),
            *(f"{100 * f.scores[name]:.2f}" if name in f.scores else "" for _, f in scored),
        )
        for name in names
    ]
    means = [found.mean_of_six for _, found in scored]
    if any(mean is not None for mean in means):
        rows.append((f"mean of {len(SIX)}", *(f"{100 * mean:.2f}" if mean is not None else "" for mean in means)))
    return _section(
        "VBench",
        "<p>In percent, more is better. The mean is the plain one of the dimensions that VBench takes one’s own "
        "prompts for.</p>",
        _table("VBench scores", ("dimension", *(path for path, _ in scored)), rows),
    )


def _spectra(report: Report) -> str:
    source = next((m.conversion for m in report.models if m.conversion and m.conversion.get("layers")), None)
    if source is None:
        return ""
    layers = [layer for layer in source["layers"] if layer.get("singular_values")]
    curves = []
    for layer in layers:
        energy = cumulative_energy(torch.tensor(layer["singular_values"], dtype=torch.float64)).tolist()
        step = max(1, len(energy) // 64)
        picked = [0, *range(step, len(energy), step), len(energy)]
        curves.append(Series(f"layer {layer['layer']}", [(r, [0.0, *energy][r]) for r in dict.fromkeys(picked)], None))
    ranks = [Series("r_0.99", [(layer["layer"], layer["effective_rank"]) for layer in layers], 0, marker=True)]
    scalars = {
        m.path: {layer["layer"]: _cached(m, layer["layer"]) for layer in m.conversion["layers"]}
        for m in report.models
        if m.conversion and m.conversion.get("layers")
    }
    heads = ("layer", "r_0.99 of [W_K; W_V]", *(f"energy at the latent’s rank, {name}" for name in scalars))
    rows = [
        (str(layer["layer"]), str(layer["effective_rank"]), *(by.get(layer["layer"], "") for by in scalars.values()))
        for layer in layers
    ]
    return _section(
        "Spectra of the teacher’s weights",
        "<p>[W_K; W_V] of each converted layer: the share of its energy (squared singular values) that the leading "
        "directions hold, and the smallest rank that holds 99%. It does not predict quality after training.</p>",
        '<div class="charts">'
        + chart("Energy held by the leading directions", "rank", curves, _percent_tick, bundle=True)
        + chart("Rank that holds 99% of the energy", "layer", ranks, _number_tick, legend=False)
        + "</div>",
        _details("Spectra", heads, rows),
    )


def _cached(model: ModelEvaluation, layer: int) -> str:
    found = next(e for e in (model.conversion or {})["layers"] if e["layer"] == layer)
    return percent(found["energy_at_kv_rank"])


def _making(report: Report) -> str:
    parts = []
    for model in report.models:
        if model.conversion is None:
            continue
        source = model.conversion.get("source") or {}
        facts = {"source": source.get("name"), "source SHA-256": source.get("sha256")}
        parts.append(_settings(f"Recipe of {model.path}", facts | (model.conversion.get("recipe") or {})))
        if model.healing is not None:
            written = {f"written {name}": value for name, value in (model.healing.get("written") or {}).items()}
            parts.append(_settings(f"Healing of {model.path}", written | (model.healing.get("recipe") or {})))
    conditions = {name: value for name, value in report.conditions.items() if name != "notes"}
    parts += [
        _settings("Data", report.data),
        _settings("Conditions", conditions),
        _settings("Versions", report.versions),
    ]
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.conditions["notes"])
    return _section("How it was made and measured", f"<ul>{notes}</ul>" if notes else "", *parts)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {_plain(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_plain(item) for item in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


# --- tables ------------------------------------------------------------------------------------------------------


def _table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "figures") -> str:
    top = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table class="{kind}">'
        f"<caption>{escape(caption)}</caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _details(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table that is folded away."""
    return f"<details><summary>{escape(title)}, as a table</summary>{_table(title, heads, rows)}</details>"


def _settings(title: str, facts: Mapping[str, Any]) -> str:
    """An open table of names and values; what is not set is left out."""
    rows = [(name.replace("_", " "), _plain(value)) for name, value in facts.items() if value not in (None, "")]
    table = _table(title, ("setting", "value"), rows, "settings")
    return f"<details open><summary>{escape(title)}</summary>{table}</details>"


# --- charts ------------------------------------------------------------------------------------------------------


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


def _number_tick(value: float) -> str:
    return f"{value:.6g}"


def _percent_tick(value: float) -> str:
    return f"{100 * value:.6g}%"


def _change_of_bytes(model: ModelEvaluation) -> str:
    return f"{format_bytes(model.cache_bytes['teacher'])} to {format_bytes(model.cache_bytes['student'])}"


# --- frames ------------------------------------------------------------------------------------------------------


def previews(strips: Sequence[Tensor], *, pixels: bool) -> list[Tensor]:
    """Strips [B, C, F, H, W] as RGB, uint8 [B, H, F * W, 3] each. The first one, the teacher's, sets the colours.

    Latents that are `pixels` are RGB in [-1, 1]. Others are projected on the first three principal components of the
    teacher's channels; their 1st to 99th percentile spans black to full colour.
    """
    if pixels:
        return [_tile((strip.clamp(-1, 1) + 1) / 2) for strip in strips]
    channels = strips[0].float().movedim(1, 0).flatten(1)  # [C, values]
    mean = channels.mean(1)
    _, vectors = torch.linalg.eigh(torch.cov(channels).reshape(len(mean), len(mean)))
    basis = vectors[:, -3:].flip(1)  # [C, up to 3]
    basis = basis * basis.sum(0).sign().where(basis.sum(0) != 0, 1)
    colors = basis.mT @ (channels - mean[:, None])
    sampled = colors[:, :: max(1, colors.shape[1] // 100_000)]
    low, high = (sampled.quantile(q, dim=1)[None, :, None, None, None] for q in (0.01, 0.99))
    found = []
    for strip in strips:
        projected = torch.einsum("bcfhw,ck->bkfhw", strip.float() - mean[None, :, None, None, None], basis)
        rgb = ((projected - low) / (high - low).clamp_min(1e-6)).clamp(0, 1)
        found.append(_tile(rgb.repeat(1, 3, 1, 1, 1)[:, :3]))  # one channel alone becomes grey
    return found


def _tile(rgb: Tensor) -> Tensor:
    """[B, 3, F, H, W] in [0, 1] -> uint8 [B, H, F * W, 3]."""
    return (255 * rgb).round().byte().permute(0, 3, 2, 4, 1).flatten(2, 3)


def _data_uri(picture: Tensor) -> str:
    """uint8 [H, W, 3] as an inline PNG, small ones enlarged without smoothing."""
    image = Image.fromarray(picture.contiguous().numpy())
    scale = -(-_PIXELS // image.width)
    if scale > 1:
        image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, format="png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


# Colours are Okabe and Ito's, which colour-blind readers tell apart, darker on white and lighter on black.
_STYLE = """
:root { color-scheme: light dark; --bg: #fff; --panel: #f5f6f8; --ink: #1b1f24; --dim: #57606a; --rule: #d5dae0;
  --m0: #0067a5; --m1: #c04a00; --m2: #007a5a; --m3: #9c3f86; --m4: #7a5c00; --bundle: #0067a5; }
@media (prefers-color-scheme: dark) { :root { --bg: #14171b; --panel: #1e2329; --ink: #e8ebee; --dim: #a3adb8;
  --rule: #38414b; --m0: #62b8f0; --m1: #f79552; --m2: #35c79b; --m3: #e191cb; --m4: #e3c04a; --bundle: #62b8f0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main, footer { max-width: 1320px; margin: 0 auto; padding: 0 clamp(14px, 3vw, 40px); }
footer { color: var(--dim); padding-block: 24px 40px; font-size: 14px; }
h1 { font-size: clamp(22px, 4vw, 32px); line-height: 1.2; margin: 32px 0 8px; overflow-wrap: anywhere; }
h2 { font-size: 21px; margin: 44px 0 8px; padding-top: 14px; border-top: 1px solid var(--rule); }
p { max-width: 75ch; margin: 8px 0 14px; }
.lead { color: var(--dim); overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 16px 0; }
.tile { background: var(--panel); border-radius: 8px; padding: 12px 14px; }
.tile dt { color: var(--dim); font-size: 14px; }
.tile dd { margin: 0; }
.tile b { display: block; font-size: 26px; line-height: 1.25; }
.tile span { color: var(--dim); font-size: 14px; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr)); gap: 24px 28px; }
figure { margin: 0 0 8px; min-width: 0; }
.charts figure { max-width: 480px; display: flex; flex-direction: column; }
.charts svg { margin-top: auto; }
figcaption { font-weight: 600; font-size: 15px; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--dim); font: 13px system-ui, sans-serif; }
.grid { stroke: var(--rule); stroke-width: 1; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.thin { stroke-width: 1.5; }
.bundle { stroke: var(--bundle); stroke-width: 1.2; opacity: 0.7; }
.line.teacher { stroke: var(--ink); } .line.m0 { stroke: var(--m0); } .line.m1 { stroke: var(--m1); }
.line.m2 { stroke: var(--m2); } .line.m3 { stroke: var(--m3); } .line.m4 { stroke: var(--m4); }
.dot.teacher { fill: var(--ink); } .dot.m0 { fill: var(--m0); } .dot.m1 { fill: var(--m1); }
.dot.m2 { fill: var(--m2); } .dot.m3 { fill: var(--m3); } .dot.m4 { fill: var(--m4); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 4px 0; padding: 0; font-size: 14px; }
.legend li { display: flex; align-items: center; gap: 6px; overflow-wrap: anywhere; }
.legend svg { width: 30px; flex: none; margin: 0; }
.scroll { overflow-x: auto; }
.scroll:focus-visible { outline: 2px solid var(--m0); }
.strip { min-width: 640px; margin-bottom: 6px; }
.strip span { display: block; font-size: 14px; color: var(--dim); position: sticky; left: 0; width: fit-content; }
.strip img { display: block; width: 100%; height: auto; border-radius: 3px; }
figure.scroll { margin-bottom: 22px; }
table { border-collapse: collapse; font-size: 15px; font-variant-numeric: tabular-nums; }
caption { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
th, td { text-align: left; padding: 5px 18px 5px 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
thead th { color: var(--dim); font-weight: 600; }
tbody th { font-weight: 400; }
td, thead th { white-space: nowrap; }
.settings td { white-space: normal; overflow-wrap: anywhere; }
details { margin: 10px 0; }
summary { cursor: pointer; color: var(--dim); }
"""
