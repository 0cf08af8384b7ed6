"""A sweep's table and plot: losses and velocity errors with noisy pasts and behind clean ones, each under its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from PIL import Image

from mlaconvert.evaluation.cells import CellResult, SweepReport
from mlaconvert.evaluation.timesteps import CleanPast
from mlaconvert.reports.evaluation_tables import sweep_table
from mlaconvert.reports.plots import plot_sweep


def report(*pasts: CleanPast | None) -> SweepReport:
    """Cells of 10, 20, ... scalars: excess 20%, 40%, ..., velocity errors 0.1, 0.05, ... with noisy pasts."""
    fields: dict[str, Any] = {"init": "svd", "rope_dim": None, "nope_dim": None, "dense_scalars": 100, "seconds": 1.0}
    fields |= {"teacher_loss": 0.5, "attention_error_median": 0.1, "attention_error_worst": 0.1}
    results = tuple(
        CellResult(
            name=str(i),
            kv_rank=i,
            scalars=10 * i,
            loss=0.5 + 0.1 * i,
            velocity_error=0.1 / i,
            clean_past=past,
            **fields,
        )
        for i, past in enumerate(pasts, 1)
    )
    return SweepReport(source="tiny", clips_from="somewhere", clips=2, results=results, output=Path())


MIXED = (
    None,  # of an earlier version
    CleanPast(teacher_loss=0.01, student_loss=0.015, velocity_error=0.03),
    CleanPast(teacher_loss=0.01, student_loss=0.0125, velocity_error=0.02),
)


def test_the_plot_has_panels_for_both_pasts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    save = Figure.savefig

    def spy(figure: Figure, *arguments: Any, **options: Any) -> None:
        drawn.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", spy)
    for name, cells in {"both": MIXED, "none": (None, None)}.items():
        plot_sweep(report(*cells), tmp_path / f"{name}.png")
    panels = [
        {axes.get_title(): list(map(tuple, axes.lines[0].get_xydata())) for axes in figure.axes if axes.lines}
        for figure in drawn
    ]
    expected = {
        "loss above the dense model's with noisy pasts": [(10, 0.2), (20, 0.4), (30, 0.6)],
        "relative error of the velocity with noisy pasts": [(10, 0.1), (20, 0.05), (30, 0.1 / 3)],
        "loss above the dense model's behind clean pasts": [(20, 0.5), (30, 0.25)],
        "relative error of the velocity behind clean pasts": [(20, 0.03), (30, 0.02)],
    }
    assert list(panels[0]) == list(expected)
    for title, points in expected.items():
        for point, found in zip(points, panels[0][title], strict=True):
            assert found == pytest.approx(point)
    assert list(panels[1]) == ["loss above the dense model's", "relative error of the velocity"]
    sizes = []
    for name in ("both", "none"):
        with Image.open(tmp_path / f"{name}.png") as image:
            sizes.append(image.size)
    assert sizes == [(1600, 1400), (1600, 750)]


def test_the_table_has_a_row_for_both_pasts() -> None:
    columns = {
        str(column.header).replace("\n", " "): list(column.cells) for column in sweep_table(report(*MIXED)).columns
    }
    assert columns["pasts"] == ["noisy", "clean"] * 3
    assert columns["latent"] == ["1", "", "2", "", "3", ""]
    assert columns["excess loss"] == ["+20.0%", "-", "+40.0%", "+50.0%", "+60.0%", "+25.0%"]
    assert columns["velocity error"] == ["10.0%", "-", "5.0%", "3.0%", "3.3%", "2.0%"]
    table = sweep_table(report(None, None))
    assert "past" not in f"{table.caption}{[column.header for column in table.columns]}"
    assert [list(column.cells) for column in table.columns if column.header == "excess\nloss"] == [["+20.0%", "+40.0%"]]
    assert "loss 0.5000 with noisy pasts, 0.01 behind clean ones" in str(sweep_table(report(*MIXED)).caption)
