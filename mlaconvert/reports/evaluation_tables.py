"""Tables of evaluations and sweeps: models beside their teacher."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from mlaconvert.evaluation import figures
from mlaconvert.evaluation.cells import SweepReport
from mlaconvert.evaluation.report import EvaluationReport
from mlaconvert.units import percent, signed_percent

PASTS = (
    "Noisy pasts: every chunk has a noise level of its own, so the chunks that it sees are noisy too, as in diffusion "
    "forcing. Attention errors are measured with these.",
    "Clean pasts: only the newest chunk is noisy, at each timestep of the sampler in turn, as when video is "
    "generated; loss and velocity error are means over the timesteps.",
    "These are other inputs, so neither is a part of the other. Clean pasts leave the teacher little loss: a small "
    "velocity error can be a large share of it.",
)
"""What the two kinds of losses are, for those who read figures of both."""


def summary_notes(report: EvaluationReport) -> list[str]:
    """What the figures of the summary were measured on."""
    data, plan = report.data, report.conditions["rollout"]
    notes = [f"Losses and errors: {data['clips']} clips of {data['latent_frames']} latent frames ({data['from']})."]
    if any(model.clean_past is not None for model in report.models):
        notes += PASTS
    if plan is not None:
        notes.append(
            f"Rollouts: {plan['videos']} of {plan['latent_frames']} latent frames; their last third against the "
            "teacher's from the same noise (* the teacher's own from another noise); statistics as a change."
        )
    return notes


def verdict_lines(report: EvaluationReport) -> list[str]:
    """What the figures of each model come to, and what to do next."""
    return [f"{model.path}: {found.text}" for model, found in zip(report.models, report.verdicts(), strict=True)]


def evaluation_table(report: EvaluationReport) -> Table:
    """Every figure of an evaluation, the teacher and the models side by side."""
    table = Table(title=f"Beside {escape(report.teacher)}", caption_justify="left")
    for i, name in enumerate(("", "teacher", *(model.path for model in report.models))):
        table.add_column(escape(name), justify="right" if i else "left")
    for row in figures.rows(figures.entries(report.to_json()), "summary"):
        table.add_row(*map(escape, row.cells))
    table.caption = escape("\n".join((*summary_notes(report), *report.conditions["notes"])))
    return table


def error_table(report: EvaluationReport) -> Table:
    """Errors by timestep and by layer, a column a model."""
    table = Table(title="Errors relative to the teacher", caption_justify="left")
    for i, name in enumerate(("", *(model.path for model in report.models))):
        table.add_column(escape(name), justify="right" if i else "left")
    for rows in figures.sections(figures.entries(report.to_json()), "errors"):
        for row in rows:
            table.add_row(escape(row.name), *row.models)
        table.add_section()
    return table


def sweep_table(report: SweepReport) -> Table:
    """What each cell caches and what that costs; where clips have pasts, a second row is behind clean ones."""
    first = report.results[0]
    clean = next((result.clean_past for result in report.results if result.clean_past is not None), None)
    table = Table(title=f"Budgets of {escape(report.source)}", caption_justify="left", collapse_padding=True)
    titles = ["init", "latent", "nope/\nrope", "cached\nscalars", "less\ncache"]
    titles += [*(["pasts"] if clean is not None else []), "excess\nloss", "velocity\nerror", "layers'\nerror"]
    for i, name in enumerate(titles):
        table.add_column(name, justify="right" if i else "left", no_wrap=i == 0, overflow="fold")
    for result in report.results:
        cell = (
            result.init,
            str(result.kv_rank),
            "-" if result.rope_dim is None else f"{result.nope_dim}/{result.rope_dim}",
            f"{result.scalars:,}",
            percent(result.cache_reduction),
        )
        noisy = (signed_percent(result.excess), percent(result.velocity_error), percent(result.attention_error_median))
        if clean is None:
            table.add_row(*cell, *noisy)
            continue
        found = result.clean_past
        behind = (signed_percent(found.excess), percent(found.velocity_error)) if found is not None else ("-", "-")
        table.add_row(*cell, "noisy", *noisy)
        table.add_row(*[""] * len(cell), "clean", *behind, "")
    losses = f"loss {first.teacher_loss:.4f}"
    if clean is not None:
        losses += f" with noisy pasts, {clean.teacher_loss:.3g} behind clean ones"
    notes = (
        f"Dense: {first.dense_scalars:,} scalars a token in all layers, {losses}.",
        f"On {report.clips} clips: {report.clips_from}.",
        "Before any training; one seed. Excess: above the dense loss. Layers' error: of attention outputs, the median "
        "layer. nope/rope: channels of a head.",
        *(PASTS if clean is not None else ()),
    )
    table.caption = escape("\n".join(notes))
    return table
