"""The figures of an evaluation, each defined once: its source, its name in evaluation.json, how people read it.

evaluation.json, the tables, the page and the model card loop over `FIGURES`: a new figure is measured in `compare.py`,
defined here, and appears in all of them. What people read is printed from the plain data of evaluation.json, so a
saved evaluation reads like a fresh one, and what it lacks, or has in another shape, is left out.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlaconvert.evaluation.lines import (
    BYTES,
    CHANGE,
    LOSS,
    RATE,
    SCORE,
    SHARE,
    SMALL_LOSS,
    Entry,
    Line,
    Reader,
    Row,
    Table,
    Tile,
    Unit,
    by_past,
    cache_change,
    cache_of,
    cache_sizes,
    number,
    numbers,
    ratio,
    relative_change,
    rows_of,
)
from mlaconvert.units import percent, signed_percent

if TYPE_CHECKING:
    from mlaconvert.evaluation.compare import ModelEvaluation


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Something measured of a model beside its teacher, and how it is shown."""

    name: str
    """Its name in evaluation.json."""
    measured: Callable[[ModelEvaluation], Any]
    """Its value there, plain data; None where it was not measured."""
    lines: tuple[Line, ...] = ()
    tiles: tuple[Tile, ...] = ()
    leads: bool = False
    """Tables and tiles begin with it."""
    optional: bool = False
    """Left out of evaluation.json, instead of null, where it was not measured."""


def to_json(model: ModelEvaluation) -> dict[str, Any]:
    """Every figure of a model as evaluation.json holds it."""
    measured = {figure.name: figure.measured(model) for figure in FIGURES}
    left_out = {figure.name for figure in FIGURES if figure.optional and measured[figure.name] is None}
    return {name: value for name, value in measured.items() if name not in left_out}


def entries(evaluation: Mapping[str, Any]) -> list[Entry]:
    """The models of evaluation.json, each with the teacher's VBench scores and the conditions, which all share."""
    models = evaluation.get("models")
    shared = {name: evaluation[name] for name in ("teacher_vbench", "conditions") if name in evaluation}
    return [{**entry, **shared} for entry in (models if isinstance(models, list) else ()) if isinstance(entry, Mapping)]


def sections(models: Sequence[Entry], table: Table) -> list[list[Row]]:
    """The rows of `table` for `models`, side by side, those of one figure together."""
    figures = FIGURES if table == "card" else _leading_first()
    by_figure = ([row for line in figure.lines for row in rows_of(line, models, table)] for figure in figures)
    return [rows for rows in by_figure if rows]


def rows(models: Sequence[Entry], table: Table) -> list[Row]:
    """All rows of `table` for `models`, side by side."""
    return [row for section in sections(models, table) for row in section]


def tiles(entry: Entry) -> Iterator[tuple[str, str, str]]:
    """Title, text and note of every tile that a model has."""
    for figure in _leading_first():
        for tile in figure.tiles:
            if (value := tile.value(entry)) is not None:
                yield tile.title, tile.write(value), tile.note if isinstance(tile.note, str) else tile.note(entry)


def _leading_first() -> list[Figure]:
    return sorted(FIGURES, key=lambda figure: not figure.leads)


def _of_layers(reduce: Callable[[list[float]], float]) -> Reader:
    """One number of all layers' attention errors."""

    def read(entry: Entry) -> float | None:
        errors = numbers("attention_errors")(entry)
        return reduce(list(errors.values())) if errors else None

    return read


def _mean_and_worst(errors: Mapping[int, float]) -> str:
    worst = max(errors, key=lambda layer: errors[layer])
    mean = statistics.fmean(errors.values())
    return f"mean {SHARE.card(mean)}, worst {SHARE.card(errors[worst])} (layer {worst})"


def _errors_by_timestep(entry: Entry) -> dict[float, float] | None:
    steps, errors = entry.get("velocity_by_timestep"), {}
    for step in steps if isinstance(steps, list) else ():
        timestep, error = number("timestep")(step), number("velocity_error")(step)
        if timestep is not None and error is not None:
            errors[timestep] = error
    return errors or None


def _above(*path: str) -> Callable[[Entry], str]:
    """What follows an excess: the teacher's loss, which lies at `path`; the smaller it is, the harsher the excess."""
    loss = number(*path)
    return lambda entry: "above the teacher’s" + (f" {SMALL_LOSS.table(loss(entry))}" if loss(entry) else "")


# In the order of evaluation.json and of the card.
FIGURES: tuple[Figure, ...] = (
    Figure(name="teacher_loss", measured=lambda model: model.fidelity.teacher_loss),
    Figure(
        name="student_loss",
        measured=lambda model: model.fidelity.student_loss,
        lines=by_past(
            Line(
                summary="validation loss",
                card="validation loss",
                value=number("student_loss"),
                teacher=number("teacher_loss"),
                unit=LOSS,
                compared=relative_change,
                better="less",
            ),
            summary="loss with noisy pasts",
            card="loss with noisy pasts",
        ),
    ),
    Figure(
        name="excess",
        measured=lambda model: model.fidelity.excess,
        tiles=by_past(
            Tile(title="validation loss", value=number("excess"), write=signed_percent, note="above the teacher’s"),
            title="loss with noisy pasts",
            note=_above("teacher_loss"),
        ),
    ),
    Figure(
        name="velocity_error",
        measured=lambda model: model.fidelity.velocity_error,
        lines=by_past(
            Line(
                summary="velocity error",
                card="velocity, relative error",
                value=number("velocity_error"),
                unit=SHARE,
                better="less",
            ),
            summary="velocity error with noisy pasts",
            errors="velocity with noisy pasts",
            card="velocity with noisy pasts, relative error",
        ),
        tiles=by_past(
            Tile(
                title="velocity error", value=number("velocity_error"), write=percent, note="relative to the teacher’s"
            ),
            title="velocity error with noisy pasts",
        ),
    ),
    Figure(
        name="clean_past",
        measured=lambda model: None if model.clean_past is None else model.clean_past.to_json(),
        lines=(
            Line(
                summary="loss behind clean pasts",
                card="loss behind clean pasts",
                value=number("clean_past", "student_loss"),
                teacher=number("clean_past", "teacher_loss"),
                unit=SMALL_LOSS,
                compared=relative_change,
                better="less",
            ),
            Line(
                summary="velocity error behind clean pasts",
                card="velocity behind clean pasts, relative error",
                value=number("clean_past", "velocity_error"),
                unit=SHARE,
                better="less",
            ),
        ),
        tiles=(
            Tile(
                title="loss behind clean pasts",
                value=number("clean_past", "excess"),
                write=signed_percent,
                note=_above("clean_past", "teacher_loss"),
            ),
            Tile(
                title="velocity error behind clean pasts",
                value=number("clean_past", "velocity_error"),
                write=percent,
                note="relative to the teacher’s",
            ),
        ),
    ),
    Figure(
        name="velocity_by_timestep",
        measured=lambda model: [dataclasses.asdict(step) for step in model.timesteps],
        lines=(
            *by_past(
                Line(errors="velocity at timestep {name:.0f}", value=_errors_by_timestep, unit=SHARE, better="less"),
                errors="velocity behind clean pasts, timestep {name:.0f}",
            ),
            Line(
                errors="velocity behind clean pasts, mean",
                value=number("clean_past", "velocity_error"),
                unit=SHARE,
                better="less",
            ),
        ),
    ),
    Figure(
        name="attention_errors",
        measured=lambda model: list(model.fidelity.attention_errors),
        lines=(
            Line(
                summary="attention error, median layer", value=_of_layers(statistics.median), unit=SHARE, better="less"
            ),
            Line(summary="attention error, worst layer", value=_of_layers(max), unit=SHARE, better="less"),
            Line(
                card="attention output of a layer, relative error",
                value=numbers("attention_errors"),
                unit=Unit(_mean_and_worst, _mean_and_worst),
                better="less",
            ),
            Line(errors="attention output, layer {name}", value=numbers("attention_errors"), unit=SHARE, better="less"),
        ),
    ),
    Figure(
        name="drift",
        measured=lambda model: None if model.drift is None else model.drift.to_json(),
        lines=(
            Line(
                summary="rollout, difference",
                card="rollouts, last third: difference from the teacher's",
                value=number("drift", "last_third", "difference", "student"),
                teacher=number("drift", "last_third", "difference", "other_seed"),
                unit=SHARE,
                mark=" *",
            ),
            Line(
                summary="rollout, {name}",
                card="rollouts, last third: change of {name}",
                value=numbers("drift", "last_third", "deviation", "student"),
                teacher=numbers("drift", "last_third", "deviation", "other_seed"),
                unit=CHANGE,
                mark=" *",
            ),
        ),
    ),
    Figure(
        name="cache_bytes",
        measured=lambda model: model.cache_bytes,
        lines=(
            Line(
                summary="cache of {name}",
                card="KV cache of {name}, measured",
                value=cache_of("student"),
                teacher=cache_of("teacher"),
                unit=BYTES,
                compared=relative_change,
                better="less",
            ),
        ),
        tiles=(
            Tile(
                title="cache",
                value=cache_change,
                write=lambda change: signed_percent(change).replace("-", "−"),
                note=cache_sizes,
            ),
        ),
        leads=True,
    ),
    Figure(
        name="frames_per_second",
        measured=lambda model: model.frames_per_second,
        lines=(
            Line(
                summary="frames a second",
                value=number("frames_per_second", "student"),
                teacher=number("frames_per_second", "teacher"),
                unit=RATE,
                compared=ratio,
                paired=True,
                better="more",
            ),
            Line(
                card="video frames per second, without the VAE",
                value=number("frames_per_second", "student"),
                teacher=number("frames_per_second", "teacher"),
                unit=RATE,
                better="more",
            ),
        ),
        tiles=(
            Tile(
                title="speed",
                value=number("frames_per_second", "ratio"),
                write="{:.2f}×".format,
                note="the teacher’s, in the same run",
            ),
        ),
    ),
    Figure(
        name="vbench",
        measured=lambda model: None if model.vbench is None else model.vbench.to_json(),
        lines=(
            Line(
                card="VBench {name}",
                value=numbers("vbench", "scores"),
                teacher=numbers("teacher_vbench", "scores"),
                unit=SCORE,
                better="more",
            ),
        ),
        optional=True,
    ),
)
