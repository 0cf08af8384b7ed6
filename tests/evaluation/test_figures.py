"""Figures: defined once, seen in evaluation.json, tables, page and card; read as they were saved."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest
from hub_cases import EVALUATION
from page_cases import Page, model, report
from rich.console import Console
from rich.table import Table

from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.mla import MLAConfig, MLALayer
from mlaconvert.evaluation import figures
from mlaconvert.evaluation.compare import ModelEvaluation
from mlaconvert.evaluation.figures import Figure
from mlaconvert.evaluation.lines import Line, Tile, Unit, number, numbers
from mlaconvert.reports.card import CardFacts, CardModel, write_card
from mlaconvert.reports.evaluation_tables import error_table, evaluation_table
from mlaconvert.reports.page.sections import render

BARE: dict[str, Any] = dict.fromkeys(
    ("drift", "speed", "teacher_video", "video", "conversion", "healing", "vbench"), None
)


def shown(table: Table) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def cells(text: str, name: str) -> list[str]:
    """The row of a printed table that `name` begins."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    (row,) = (row for row in rows if row[0].startswith(name))
    return row


def card_of(evaluation: dict[str, Any]) -> str:
    layer = MLALayer(kv_lora_rank=5, qk_nope_head_dim=12, v_head_dim=16, rope_components=((0, 1),))
    mla = MLAConfig(q_lora_rank=7, key_norm="latent", softmax_scale=0.25, layers=(layer, None))
    config = WanConfig(dim=48, num_heads=3, num_layers=2, ffn_dim=20, mla=mla)
    parts: dict[str, Any] = {"subfolder": "", "config": config, "description": "", "conversion": {}, "healing": {}}
    models = (CardModel(**parts, evaluation=evaluation),)
    return write_card(CardFacts(repo="a/b", models=models, base_model=None, license={}))


def test_a_new_figure_needs_one_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Defined here alone, it is in evaluation.json, on the terminal, on the page and on the card."""
    grain = {"one": {"teacher": 2.0, "student": 3.0}, "two": {"teacher": 2.0, "student": 0.5}}
    millimetres = Unit(lambda value: f"{value:.1f} mm", lambda value: f"{value:.3f} mm")
    line = Line(
        summary="grain",
        card="grain of a frame",
        value=number("grain", "student"),
        teacher=number("grain", "teacher"),
        unit=millimetres,
        compared=lambda student, teacher: f"{student - teacher:+.1f}",
        better="less",
    )
    by_band = Line(errors="grain, band {name}", value=numbers("grain"), unit=millimetres)
    tile = Tile(title="coarseness", value=number("grain", "student"), write="{:.0f} grains".format, note="a frame")
    new = Figure(name="grain", measured=lambda model: grain[model.path], lines=(line, by_band), tiles=(tile,))
    monkeypatch.setattr(figures, "FIGURES", (*figures.FIGURES, new))
    evaluation = report(model("one", 1), model("two", 2))
    assert [entry["grain"] for entry in evaluation.to_json()["models"]] == list(grain.values())
    assert cells(shown(evaluation_table(evaluation)), "grain") == ["grain", "2.0 mm", "3.0 mm (+1.0)", "0.5 mm (-1.5)"]
    assert cells(shown(error_table(evaluation)), "grain, band student") == ["grain, band student", "3.0 mm", "0.5 mm"]
    page = render(evaluation)
    assert "3.0 mm (+1.0)" in page
    assert '<th scope="row" title="less is better">grain</th>' in page
    assert "<dt>coarseness</dt><dd><b>3 grains</b> <span>a frame</span></dd>" in page
    Page(page)
    saved = json.loads(json.dumps(report(model("two", 2)).to_json()))
    assert "| grain of a frame | 2.000 mm | 0.500 mm (-1.5) |" in card_of(saved)


def test_names_and_structure_of_evaluation_json() -> None:
    (entry,) = json.loads(json.dumps(report(model("one", 2)).to_json()))["models"]
    assert list(entry) == [
        "path",
        "teacher_loss",
        "student_loss",
        "excess",
        "velocity_error",
        "clean_past",
        "velocity_by_timestep",
        "attention_errors",
        "drift",
        "cache_bytes",
        "frames_per_second",
        "vbench",
        "verdict",
    ]
    losses = [entry[name] for name in ("teacher_loss", "student_loss", "excess")]
    assert losses == pytest.approx([0.1, 0.12, 0.2])
    assert list(entry["clean_past"]) == ["teacher_loss", "student_loss", "excess", "velocity_error"]
    assert list(entry["clean_past"].values()) == pytest.approx([0.002, 0.004, 1, 0.03])
    assert entry["attention_errors"] == pytest.approx([0.02, 0.04, 0.06, 0.08])
    assert list(entry["velocity_by_timestep"][0]) == ["timestep", "velocity_error", "teacher_loss", "student_loss"]
    assert list(entry["drift"]) == ["given_frames", "difference", "statistics", "last_third"]
    assert entry["cache_bytes"] == {"teacher": 4096, "student": 1024}
    assert entry["frames_per_second"] == {"teacher": 10.0, "student": 12.5, "ratio": 1.25}
    # What was not measured is null, but for VBench, which is not evaluate's own.
    (entry,) = report(dataclasses.replace(model("one", 1), **BARE)).to_json()["models"]
    assert entry["drift"] is entry["frames_per_second"] is None
    assert "vbench" not in entry


def slower(name: str, seed: int) -> ModelEvaluation:
    found = model(name, seed)
    assert found.speed is not None
    return dataclasses.replace(found, speed=dataclasses.replace(found.speed, teacher=4.0, ratio=0.5))


def test_the_summary_of_several_models() -> None:
    """Worked out by hand from `test_page.model`: the cache first, each teacher's speed, the mark where a note is."""
    text = shown(evaluation_table(report(model("one", 1), slower("two", 3))))
    names = [line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│")]
    assert names == [
        "cache of one video",
        "loss with noisy pasts",
        "velocity error with noisy pasts",
        "loss behind clean pasts",
        "velocity error behind clean pasts",
        "attention error, median layer",
        "attention error, worst layer",
        "rollout, difference",
        "rollout, mean",
        "rollout, std",
        "rollout, detail",
        "rollout, motion",
        "frames a second",
    ]
    assert cells(text, "cache")[1:] == ["4 KiB", "1 KiB (-75.0%)", "1 KiB (-75.0%)"]
    assert cells(text, "loss with noisy")[1:] == ["0.1000", "0.1100 (+10.0%)", "0.1300 (+30.0%)"]
    assert cells(text, "velocity error with noisy")[1:] == ["", "2.0%", "6.0%"]
    assert cells(text, "loss behind clean")[1:] == ["0.002", "0.003 (+50.0%)", "0.005 (+150.0%)"]
    assert cells(text, "velocity error behind clean")[1:] == ["", "1.5%", "4.5%"]
    assert cells(text, "attention error, median")[1:] == ["", "2.5%", "7.5%"]
    assert cells(text, "attention error, worst")[1:] == ["", "4.0%", "12.0%"]
    assert cells(text, "frames")[1:] == ["10 / 4", "12.5 (1.25x)", "2 (0.50x)"]
    assert all(cells(text, f"rollout, {name}")[1].endswith("% *") for name in ("difference", "mean", "motion"))


def test_a_model_that_lacks_a_figure_has_an_empty_cell() -> None:
    bare = dataclasses.replace(model("one", 1), **BARE)
    text = shown(evaluation_table(report(bare, slower("two", 3))))
    assert cells(text, "frames")[1:] == ["4", "", "2 (0.50x)"]
    assert cells(text, "rollout, difference")[2] == ""
    assert "rollout" not in shown(evaluation_table(report(bare, rollout=None)))


def names_of(found: ModelEvaluation) -> set[str]:
    """What tables, tiles and card call the figures of a model."""
    entries = figures.entries(json.loads(json.dumps(report(found).to_json())))
    rows = {row.name for table in ("summary", "errors", "card") for row in figures.rows(entries, table)}
    return rows | {title for title, _, _ in figures.tiles(entries[0])}


def test_every_loss_and_velocity_error_says_which_past_it_is_with() -> None:
    """In each table, in the tiles and on the card; both are there."""
    measured = {name for name in names_of(model("one", 1)) if re.search("loss|velocity", name)}
    assert len(measured) == 11
    assert {re.search("with noisy pasts|behind clean pasts|$", name)[0] for name in measured} == {
        "with noisy pasts",
        "behind clean pasts",
    }
    text = shown(error_table(report(model("one", 1), slower("two", 3))))
    assert cells(text, "velocity with noisy")[1:] == ["2.0%", "6.0%"]
    assert cells(text, "velocity behind clean pasts, mean")[1:] == ["1.5%", "4.5%"]
    assert cells(text, "velocity behind clean pasts, timestep 417")[1:] == ["10.0%", "30.0%"]
    page = render(report(model("one", 1)))
    for tile in (
        "<dt>loss with noisy pasts</dt><dd><b>+10.0%</b> <span>above the teacher’s 0.1</span></dd>",
        "<dt>velocity error with noisy pasts</dt><dd><b>2.0%</b>",
        "<dt>loss behind clean pasts</dt><dd><b>+50.0%</b> <span>above the teacher’s 0.002</span></dd>",
        "<dt>velocity error behind clean pasts</dt><dd><b>1.5%</b>",
    ):
        assert tile in page
    assert "Clean pasts: only the newest chunk is noisy" in page
    assert "may lie above all of them" in page


def test_a_model_without_a_past_is_not_said_to_have_one() -> None:
    """A bidirectional one: null in evaluation.json, and not a word of pasts in tables, page and card."""
    found = dataclasses.replace(model("one", 1), clean_past=None)
    whole = report(found, streaming=None)
    assert json.loads(json.dumps(whole.to_json()))["models"][0]["clean_past"] is None
    measured = {name for name in names_of(found) if re.search("loss|velocity", name)}
    assert measured == {
        "validation loss",
        "velocity error",
        "velocity, relative error",
        *(f"velocity at timestep {at}" for at in (1000, 750, 417)),
    }
    for text in (shown(evaluation_table(whole)), shown(error_table(whole)), render(whole), card_of(whole.to_json())):
        assert not re.search(r"\bpasts?\b", text)


def test_a_card_shows_both_losses_and_the_drift_and_says_what_they_are() -> None:
    """Each number is the one in evaluation.json."""
    evaluation = json.loads(json.dumps(report(model("one", 2)).to_json()))
    late = evaluation["models"][0]["drift"]["last_third"]
    card = card_of(evaluation)
    for row in (
        "| loss with noisy pasts | 0.1 | 0.12 (+20.0%) |",
        "| velocity with noisy pasts, relative error |  | 4.00% |",
        "| loss behind clean pasts | 0.002 | 0.004 (+100.0%) |",
        "| velocity behind clean pasts, relative error |  | 3.00% |",
        f"| rollouts, last third: difference from the teacher's | {late['difference']['other_seed']:.2%} \\* | "
        f"{late['difference']['student']:.2%} |",
        f"| rollouts, last third: change of motion | {100 * late['deviation']['other_seed']['motion']:+.1f}% \\* | "
        f"{100 * late['deviation']['student']['motion']:+.1f}% |",
        "\\* A rollout of the teacher from another noise",
        "Clean pasts: only the newest chunk is noisy",
    ):
        assert row in card
    bare = card_of(report(dataclasses.replace(model("one", 2), **BARE)).to_json())
    assert "rollout" not in bare.split("## Figures")[1].split("```")[0]


def test_a_larger_cache_is_not_said_to_be_saved() -> None:
    larger = dataclasses.replace(model("one", 1), cache_bytes={"teacher": 1000, "student": 1250})
    assert "<b>+25.0%</b> <span>1000 B to 1.22 KiB</span>" in render(report(larger))
    assert "<b>−75.0%</b> <span>4 KiB to 1 KiB</span>" in render(report(model("one", 1)))


def test_a_cache_says_in_which_dtype_it_was_measured() -> None:
    """Whoever compares two sizes sees what they differ by: in the table, on the page, on the card."""
    evaluation = report(model("one", 1), dtype="float32")
    assert cells(shown(evaluation_table(evaluation)), "cache")[0] == "cache of one video, float32"
    assert "<span>4 KiB to 1 KiB, float32</span>" in render(evaluation)
    assert "| KV cache of one video, float32, measured | 4 KiB | 1 KiB (-75.0%) |" in card_of(evaluation.to_json())


def test_a_saved_evaluation_reads_like_a_fresh_one() -> None:
    """What an earlier version saved, here that of the card's tests: the summary is printed from it as well."""
    entry = figures.entries(EVALUATION)
    rows = {row.name: row.cells[1:] for row in figures.rows(entry, "summary")}
    assert rows["validation loss"] == ("0.2500", "0.2800 (+12.0%)")
    assert rows["velocity error"] == ("", "3.5%")
    assert rows["attention error, worst layer"] == ("", "30.0%")
    assert rows["frames a second"] == ("2", "3.5 (1.75x)")
    card = {row.name: row.cells[1:] for row in figures.rows(entry, "card")}
    assert card["VBench imaging_quality"] == ("0.6400", "0.6100")


@pytest.mark.parametrize("other", [None, 3, "high", True, [], [None], {}, {"student": "1", "teacher": None}, [[0.5]]])
def test_what_has_another_shape_is_left_out(other: Any) -> None:
    """Each figure in turn: nothing breaks, and no row is invented."""
    (before_it,) = figures.entries(EVALUATION)
    (newest,) = figures.entries(json.loads(json.dumps(report(model("one", 1)).to_json())))
    for whole, name in (*((before_it, name) for name in before_it), *((newest, name) for name in newest)):
        entry = {**whole, name: other}
        for table in ("summary", "errors", "card"):
            # What a past changes the names of is called as it was before, without one.
            known = {row.name for one in (whole, {**whole, "clean_past": None}) for row in figures.rows([one], table)}
            assert {row.name for row in figures.rows([entry], table)} <= known
        list(figures.tiles(entry))
    assert figures.entries({"models": other}) == []
    assert number("a", "b")({"a": {"b": True}}) is number("a", "b")({"a": 1.5}) is None
    assert numbers("a")({"a": {"x": 1, "y": "1", "z": False}}) == {"x": 1.0}
