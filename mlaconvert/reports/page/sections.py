"""An evaluation as one HTML page that needs nothing else: no script, no request, light and dark, narrow and wide.

Charts are inline SVG, frames inline PNG. Every chart has its numbers in a table below it.
"""

from __future__ import annotations

import json
from html import escape
from pathlib import Path

import torch

from mlaconvert.evaluation import figures
from mlaconvert.evaluation.compare import ModelEvaluation
from mlaconvert.evaluation.drift import STATISTICS
from mlaconvert.evaluation.report import EvaluationReport
from mlaconvert.evaluation.vbench import SIX
from mlaconvert.files.names import EVALUATION_NAME, REPORT_NAME
from mlaconvert.files.origin import origin_of
from mlaconvert.latent.spectrum import cumulative_energy
from mlaconvert.reports.evaluation_tables import summary_notes, verdict_lines
from mlaconvert.reports.page.html import details, document, section, settings, table
from mlaconvert.reports.page.pictures import STRIP, data_uri, previews
from mlaconvert.reports.page.svg import Series, chart, number_tick, percent_tick
from mlaconvert.reports.save import save_report
from mlaconvert.units import percent


def save(report: EvaluationReport, folder: Path) -> Path:
    """Put evaluation.json and the page into a model's folder; the page's path. Raises OutputError."""
    text = json.dumps(report.to_json(), indent=2) + "\n"
    save_report(folder / EVALUATION_NAME, text.encode(), "the results")
    write_page(report, folder / REPORT_NAME)
    return folder / REPORT_NAME


def write_page(report: EvaluationReport, path: Path) -> None:
    """Write the page of `report` to `path`, whole or not at all. Raises OutputError when it cannot be written."""
    save_report(path, render(report).encode(), "the page")


def render(report: EvaluationReport) -> str:
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
    return document(
        title,
        f"<main>\n<h1>{escape(', '.join(names))}</h1>\n"
        f'<p class="lead">Multi-Head Latent Attention, measured beside its teacher <b>{escape(report.teacher)}</b> '
        f"on the same clips, noise and noise levels.</p>\n",
        "\n".join(section for section in sections if section),
        f"\n</main>\n<footer>Written by mlaconvert {escape(report.versions['mlaconvert'])}.</footer>\n",
    )


def _summary(report: EvaluationReport) -> str:
    """Tiles with the first model's figures, and a table with all."""
    first = report.models[0]
    models = figures.entries(report.to_json())
    tiles = "".join(
        f'<div class="tile"><dt>{escape(title)}</dt><dd><b>{escape(text)}</b> <span>{escape(note)}</span></dd></div>'
        for title, text, note in figures.tiles(models[0])
    )
    rows = figures.rows(models, "summary")
    heads = ("", "teacher", *(model.path for model in report.models))
    hints = {row.name: f"{row.better} is better" for row in rows if row.better is not None}
    of = f"<p>{escape(first.path)} in short:</p>" if len(report.models) > 1 else ""
    return section(
        "Summary",
        of,
        f'<dl class="tiles">{tiles}</dl>',
        *(f'<p class="verdict">{escape(line)}</p>' for line in verdict_lines(report)),
        table("Every figure", heads, [row.cells for row in rows], hints=hints),
        f"<p>{escape(' '.join(summary_notes(report)))}</p>",
    )


def _strips(report: EvaluationReport) -> str:
    teacher = report.models[0].teacher_video
    if teacher is None:
        return ""
    shown = torch.linspace(0, teacher.shape[2] - 1, STRIP).round().long()
    rows = [("teacher", teacher), *((model.path, model.video) for model in report.models if model.video is not None)]
    pictures = previews([video[:, :, shown] for _, video in rows], pixels=report.pixels)
    plan = report.conditions["rollout"]
    given = plan["given_frames"]
    numbers = "".join(f"<span>{i}{' (given)' if i < given else ''}</span>" for i in shown.tolist())
    figures = []
    for video in range(teacher.shape[0]):
        images = "".join(
            f'<div class="strip"><span>{escape(name)}</span><img alt="Frames of video {video + 1}: {escape(name)}" '
            f'src="{data_uri(picture[video])}"></div>'
            for (name, _), picture in zip(rows, pictures, strict=True)
        )
        figures.append(
            f'<figure class="scroll" tabindex="0" role="group" aria-label="Video {video + 1}">'
            f'<div class="strip numbers">{numbers}</div>{images}</figure>'
        )
    what = (
        "RGB frames."
        if report.pixels
        else "A linear preview, not decoded video: the teacher’s first three principal components of the latent "
        "channels as red, green and blue, the same for all models."
    )
    return section(
        "Frames",
        f"<p>Rollouts from the same noise; latent frames are numbered. {what} Videos from one noise part over time "
        "without being worse; look for blur, loss of motion and colour that runs away.</p>",
        *figures,
    )


def _layers(report: EvaluationReport) -> str:
    models = report.models
    count = len(models[0].fidelity.attention_errors)
    series = [
        Series(m.path, [(i, e) for i, e in enumerate(m.fidelity.attention_errors)], i, marker=True)
        for i, m in enumerate(models)
    ]
    rows = [(str(i), *(percent(m.fidelity.attention_errors[i]) for m in models)) for i in range(count)]
    pasts = ", with noisy pasts" if models[0].clean_past is not None else ""
    return section(
        "Errors by layer",
        f"<p>Self-attention’s output in each layer when it reads what the teacher’s layer reads{pasts}: error relative "
        "to the teacher’s output.</p>",
        '<div class="charts">' + chart("Error of the attention output", "layer", series, percent_tick) + "</div>",
        details("Errors by layer", ("layer", *(m.path for m in models)), rows),
    )


def _timesteps(report: EvaluationReport) -> str:
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
    seen = (
        "Behind clean pasts, as in every rollout: the newest chunk is at the timestep, the chunks before it are clean. "
        "The summary’s figures behind clean pasts are means over these timesteps; its figures with noisy pasts are of "
        "other inputs and may lie above all of them."
        if models[0].clean_past is not None
        else ""
    )
    return section(
        "Velocity by timestep",
        f"<p>1000 is pure noise. {seen}</p>",
        '<div class="charts">'
        + chart("Velocity, relative to the teacher’s", "timestep", errors, percent_tick)
        + chart("Velocity loss", "timestep", losses, number_tick)
        + "</div>",
        details("Velocity by timestep", heads, rows),
    )


def _drift(report: EvaluationReport) -> str:
    drifts = [(i, model.path, model.drift) for i, model in enumerate(report.models) if model.drift is not None]
    if not drifts:
        return ""
    first, other = drifts[0][2], "teacher, another seed"
    frames = len(first.difference["student"])
    parts = [
        ("Difference from the teacher’s frame", None, [drift.difference for _, _, drift in drifts], percent_tick),
        *(
            (words[0].upper() + words[1:], name, [drift.statistics[name] for _, _, drift in drifts], number_tick)
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
        tables.append(details(title, ("latent frame", *(line.name for line in lines)), rows))
    plan = report.conditions["rollout"]
    return section(
        "Drift",
        f"<p>{plan['videos']} rollouts of {frames} latent frames from the teacher’s own noise. Chaos alone carries two "
        "rollouts apart, as the teacher’s with another seed shows; a model that loses quality leaves the teacher’s "
        "statistics as well.</p>",
        '<div class="charts">' + "".join(charts) + "</div>",
        *tables,
    )


def _vbench(report: EvaluationReport) -> str:
    scored = [(m.path, m.vbench) for m in report.models if m.vbench is not None]
    if report.teacher_vbench is not None:
        scored.insert(0, (f"{report.teacher} (teacher)", report.teacher_vbench))
    if not scored:
        return ""
    names = list(dict.fromkeys(name for _, vbench in scored for name in vbench.scores))
    rows = [
        (
            name.replace("_", " "),
            *(f"{100 * vbench.scores[name]:.2f}" if name in vbench.scores else "" for _, vbench in scored),
        )
        for name in names
    ]
    means = [vbench.mean_of_six for _, vbench in scored]
    if any(mean is not None for mean in means):
        rows.append((f"mean of {len(SIX)}", *(f"{100 * mean:.2f}" if mean is not None else "" for mean in means)))
    return section(
        "VBench",
        "<p>In percent, more is better. The mean is the plain one of the dimensions that VBench takes one’s own "
        "prompts for.</p>",
        table("VBench scores", ("dimension", *(path for path, _ in scored)), rows),
    )


def _spectra(report: EvaluationReport) -> str:
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
    energies = {
        m.path: {layer["layer"]: _energy(m, layer["layer"]) for layer in m.conversion["layers"]}
        for m in report.models
        if m.conversion and m.conversion.get("layers")
    }
    heads = ("layer", "r_0.99 of [W_K; W_V]", *(f"energy at the latent’s rank, {name}" for name in energies))
    rows = [
        (str(layer["layer"]), str(layer["effective_rank"]), *(by.get(layer["layer"], "") for by in energies.values()))
        for layer in layers
    ]
    return section(
        "Spectra of the teacher’s weights",
        "<p>[W_K; W_V] of each converted layer: the share of its energy (squared singular values) that the leading "
        "directions hold, and the smallest rank that holds 99%. It does not predict quality after training.</p>",
        '<div class="charts">'
        + chart("Energy held by the leading directions", "rank", curves, percent_tick, bundle=True)
        + chart("Rank that holds 99% of the energy", "layer", ranks, number_tick, legend=False)
        + "</div>",
        details("Spectra", heads, rows),
    )


def _energy(model: ModelEvaluation, layer: int) -> str:
    spectrum = next(e for e in (model.conversion or {})["layers"] if e["layer"] == layer)
    return percent(spectrum["energy_at_kv_rank"])


def _making(report: EvaluationReport) -> str:
    parts = []
    for model in report.models:
        if model.conversion is None:
            continue
        origin = origin_of(model.conversion)
        facts = {"source": origin.name, "source SHA-256": origin.sha256}
        parts.append(settings(f"Recipe of {model.path}", facts | (model.conversion.get("recipe") or {})))
        if model.healing is not None:
            written = {f"written {name}": value for name, value in (model.healing.get("written") or {}).items()}
            parts.append(settings(f"Healing of {model.path}", written | (model.healing.get("recipe") or {})))
    conditions = {name: value for name, value in report.conditions.items() if name != "notes"}
    parts += [
        settings("Data", report.data),
        settings("Conditions", conditions),
        settings("Versions", report.versions),
    ]
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.conditions["notes"])
    return section("How it was made and measured", f"<ul>{notes}</ul>" if notes else "", *parts)
