"""Sweeps: the paper's cells, figures equal to a conversion by hand, finished cells kept, the rest refused by name."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import invoke
from recipes_cases import TINY, WAN_1B, shapes_only
from safetensors.torch import save_file

from mlaconvert.clips import folder as folder_module
from mlaconvert.clips.folder import ClipFolder
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.run import convert
from mlaconvert.errors import ConfigError, InputError, OutputError
from mlaconvert.evaluation import sweep as sweeps
from mlaconvert.evaluation.cells import (
    CellResult,
    SweepRecipe,
    cells,
    load_sweep_recipe,
    sweep_recipe_names,
)
from mlaconvert.evaluation.losses import measure_fidelity
from mlaconvert.evaluation.sweep import RECORD_NAME, SweepClips, SweepListener, sweep
from mlaconvert.evaluation.timesteps import CleanPast, velocity_by_timestep
from mlaconvert.families.lora import LoraFile
from mlaconvert.families.source import Source
from mlaconvert.model.load import load_model


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Ten clips [16, 3, 4, 6] for the golden model."""
    folder, generator = tmp_path / "clips", torch.Generator().manual_seed(3)
    folder.mkdir()
    latents, context = torch.randn(10, 16, 3, 4, 6, generator=generator), torch.randn(10, 5, 40, generator=generator)
    save_file({"latents": latents, "context": context}, folder / "shard.safetensors")
    return folder


def splits(name: str) -> set[tuple[int, int | None, int | None]]:
    found = cells(load_sweep_recipe(name, {}), shapes_only(WAN_1B))
    layers = [next(iter(plan.layers.values())) for _, plan in found]
    assert {plan.config.mla.rope for _, plan in found if plan.config.mla} == {"cached"}
    return {(layer.kv_lora_rank, layer.qk_nope_head_dim, layer.qk_rope_head_dim) for layer in layers}


def test_the_shipped_recipes_are_the_papers_tables() -> None:
    """Tables 5a and 5b of VideoMLA, and the same proportions for the built-in model."""
    assert splits("videomla-budgets") == {(rank, 96, 32) for rank in (64, 128, 256, 512)}
    assert splits("videomla-splits") == {(192, 112, 16), (192, 96, 32), (192, 64, 64), (192, 32, 96)}
    names = {"tiny-budgets", "tiny-splits", "videomla-budgets", "videomla-splits"}
    assert set(sweep_recipe_names()) == names
    for name in ("tiny-budgets", "tiny-splits"):
        found = cells(load_sweep_recipe(name, {}), shapes_only(TINY))
        assert len(found) == {"tiny-budgets": 10, "tiny-splits": 4}[name]
        assert len({cell.name for cell, _ in found}) == len(found)
    assert {plan.recipe.allocation for _, plan in found} == {"fixed"}
    # An option's splits replace the recipe's whole pairs.
    mine = load_sweep_recipe("videomla-splits", {"rope_dims": [8]})
    assert (mine.rope_dims, mine.nope_dims, mine.kv_ranks) == ((8,), (), (192,))


def test_a_cell_is_the_conversion_and_the_evaluation_by_hand(
    golden_state: dict[str, torch.Tensor], golden_config: dict[str, Any], save_folder: Any, data: Path, tmp_path: Path
) -> None:
    streaming = {"chunk_frames": 1, "window_frames": 2, "sink_frames": 0}
    model = save_folder(golden_state, golden_config | {"streaming": streaming})
    recipe = SweepRecipe(inits=("svd",), kv_ranks=(7,), rope_dims=(6, 10), nope_dims=(5, 14))
    seen: list[tuple[str, int, int]] = []
    report = sweep(
        model,
        tmp_path / "out",
        recipe,
        clips=SweepClips(data=data, seed=4),
        listener=SweepListener(on_cell=lambda r, d, t: seen.append((r.name, d, t))),
    )
    assert seen == [("svd-kv7-rope6-nope5", 1, 2), ("svd-kv7-rope10-nope14", 2, 2)]
    cell = report.results[1]
    convert(model, tmp_path / "hand", ConvertRecipe(init="svd", kv_rank=7, rope_dim=10, nope_dim=14, rope="cached"))
    student, teacher = load_model(tmp_path / "hand"), load_model(model)
    last = ClipFolder(data, teacher.config).some([8, 9])  # a quarter of ten
    expected = measure_fidelity(teacher, student, last, seed=4)
    assert (cell.loss, cell.teacher_loss) == (expected.student_loss, expected.teacher_loss)
    assert (cell.excess, cell.velocity_error) == (expected.excess, expected.velocity_error)
    assert cell.clean_past == CleanPast.of(velocity_by_timestep(teacher, student, last, seed=4))
    assert cell.clean_past.velocity_error > 0.01
    names = ("cells/svd-kv7-rope10-nope14.json", "results.json")
    kept, written = (json.loads((tmp_path / "out" / name).read_text()) for name in names)
    assert kept["clean_past"] == dataclasses.asdict(cell.clean_past)
    assert written["cells"][1]["clean_past"] == cell.clean_past.to_json()
    assert cell.attention_error_worst == max(expected.attention_errors)
    assert cell.attention_error_median == pytest.approx(torch.tensor(expected.attention_errors).quantile(0.5).item())
    assert (cell.scalars, cell.dense_scalars) == (3 * 17, 3 * 192)
    assert (cell.kv_rank, cell.nope_dim, cell.rope_dim, cell.series) == (7, 14, 10, "svd, 14/10")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["cells", "results.json", "sweep.json"]


@pytest.mark.slow
def test_moments_are_measured_once_and_validation_clips_stay_unseen(
    golden: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def spy(*arguments: Any, **options: Any) -> Any:
        calls.append(options)
        return convert(*arguments, **options)

    monkeypatch.setattr(sweeps, "convert", spy)
    recipe = SweepRecipe(inits=("calibrated", "svd"), kv_ranks=(9, 14))
    report = sweep(
        golden, tmp_path / "out", recipe, clips=SweepClips(data=data, calibration=4, validation=2), keep=True
    )
    assert [cell.init for cell in report.results] == ["calibrated", "calibrated", "svd", "svd"]
    assert [call["data"].data for call in calls] == [data, data, None, None]
    assert {str(call["data"].moments) for call in calls[:2]} == {str(tmp_path / "out" / "moments")}
    moments = sorted((tmp_path / "out" / "moments").glob("layer-*"))
    assert len(moments) == 3
    assert report.results[1].loss < report.results[3].loss  # the same latent, calibrated
    assert sorted(path.name for path in (tmp_path / "out" / "models").iterdir()) == [
        "calibrated-kv14", "calibrated-kv9", "svd-kv14", "svd-kv9"
    ]  # fmt: skip
    # The comparison is on the last two clips.
    student = load_model(tmp_path / "out" / "models" / "svd-kv9")
    last = ClipFolder(data, student.config).some([8, 9])
    assert report.results[2].loss == measure_fidelity(load_model(golden), student, last).student_loss
    # Another budget starts from what was measured: no moments are written anew.
    states = [path.stat().st_mtime_ns for path in moments]
    more = SweepRecipe(inits=("calibrated",), kv_ranks=(5,))
    sweep(golden, tmp_path / "out", more, clips=SweepClips(data=data, calibration=4, validation=2))
    assert [path.stat().st_mtime_ns for path in moments] == states
    with pytest.raises(ConfigError, match="clips has 10 clips, too few for 9 to calibrate on and 2 to compare on"):
        sweep(golden, tmp_path / "other", more, clips=SweepClips(data=data, calibration=9, validation=2))


@pytest.mark.slow
@pytest.mark.parametrize("given", [True, False])
def test_no_refit_sees_what_is_compared_on(
    golden: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: bool
) -> None:
    """A refit of the whole model takes four times the clips that are measured, here 16, where there are as many."""
    streams = json.loads((golden / "config.json").read_text()) | {"streaming": {"chunk_frames": 1, "window_frames": 3}}
    shutil.copytree(golden, tmp_path / "streams")
    (tmp_path / "streams" / "config.json").write_text(json.dumps(streams))
    recipes: list[ConvertRecipe] = []

    def spy(source: Any, output: Any, recipe: ConvertRecipe, **options: Any) -> Any:
        recipes.append(recipe)
        return convert(source, output, recipe, **options)

    monkeypatch.setattr(sweeps, "convert", spy)
    clips = SweepClips(data=data if given else None, calibration=4, validation=2)
    (tmp_path / "base.yaml").write_text("init: calibrated\nheight: 32\nwidth: 48\nrefit_steps: 1\n")
    recipe = SweepRecipe(convert=str(tmp_path / "base.yaml"), kv_ranks=(9,))
    sweep(tmp_path / "streams", tmp_path / "out", recipe, clips=clips)
    assert recipes[0].refit_clips == (8 if given else None)  # two of ten are compared on
    if not given:
        made = ClipFolder(tmp_path / "out" / "clips", load_model(golden).config)
        assert len(made) == 16


def test_without_data_clips_are_generated_once(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def clips(count: int, name: str) -> Any:
        made.append(name)
        generator = torch.Generator().manual_seed(len(made))
        latents = torch.randn(count, 16, 3, 4, 6, generator=generator)
        return folder_module.Clips(latents, torch.randn(count, 5, 40, generator=generator))

    monkeypatch.setattr(sweeps, "calibration_clips", lambda *a, **k: clips(6, "calibration"))
    monkeypatch.setattr(sweeps, "generated_clips", lambda *a, **k: clips(2, "validation"))
    recipe = SweepRecipe(inits=("calibrated",), kv_ranks=(9,))
    counts = SweepClips(calibration=6, validation=2)
    first = sweep(golden, tmp_path / "out", recipe, clips=counts)
    both = sweep(golden, tmp_path / "out", SweepRecipe(inits=("calibrated",), kv_ranks=(9, 11)), clips=counts)
    assert made == ["calibration", "validation"]
    assert both.results[0] == first.results[0]
    assert "no calibration sees" in first.clips_from


@pytest.mark.slow
def test_a_killed_sweep_goes_on(golden: Path, data: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of the second cell; the first is not made again, and all figures are those of one run."""
    code = (
        "import os, signal, sys, mlaconvert.evaluation.sweep as s, mlaconvert.cli as cli\n"
        "measure, cells = s._measure, []\n"
        "def stop(*a):\n"
        "    cells.append(a)\n"
        "    return measure(*a) if len(cells) < 2 else os.kill(os.getpid(), signal.SIGKILL)\n"
        "s._measure = stop\n"
        "sys.argv = ['mlaconvert', *sys.argv[1:]]\n"
        "cli.main()\n"
    )
    arguments = ["sweep", str(golden), "--init", "svd", "--kv-ranks", "9,4", "--data", str(data), "--json"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, "-o", str(tmp_path / "out")], timeout=120, check=False
    )
    assert done.returncode == -9
    assert [path.name for path in (tmp_path / "out" / "cells").iterdir()] == ["svd-kv9.json"]
    assert (tmp_path / "out" / "models" / "svd-kv4").is_dir()
    before = (tmp_path / "out" / "cells" / "svd-kv9.json").stat().st_mtime_ns
    found = invoke(*arguments, "-o", tmp_path / "out")
    assert found.exit_code == 0, found.stderr
    assert (tmp_path / "out" / "cells" / "svd-kv9.json").stat().st_mtime_ns == before
    assert "2 of 2  svd-kv4: cache " in found.stderr
    assert f"going on after 1 of 2 conversions, kept in {tmp_path / 'out'}\n" in found.stderr
    assert not (tmp_path / "out" / "models").exists()
    whole = json.loads(invoke(*arguments, "-o", tmp_path / "whole").stdout)
    assert [without_time(cell) for cell in json.loads(found.stdout)["cells"]] == [
        without_time(cell) for cell in whole["cells"]
    ]


@pytest.mark.slow
def test_cells_of_before_clean_pasts_were_measured_are_kept_as_they_are(
    golden_state: dict[str, torch.Tensor], golden_config: dict[str, Any], save_folder: Any, data: Path, tmp_path: Path
) -> None:
    """Nothing is converted again; a line says which cells lack what the new ones have, and all are shown."""
    streaming = {"chunk_frames": 2, "window_frames": 3, "sink_frames": 0}
    model = save_folder(golden_state, golden_config | {"streaming": streaming})
    arguments = ("sweep", model, "-o", tmp_path / "out", "--init", "svd", "--data", data)
    first = invoke(*arguments, "--kv-ranks", "9")
    assert first.exit_code == 0, first.stderr
    assert re.search(r"loss \S+% above the dense model's with noisy pasts, \S+% behind clean ones", first.stderr)
    record = tmp_path / "out" / "cells" / "svd-kv9.json"
    old = json.loads(record.read_text())
    whole = old.pop("clean_past")
    record.write_text(json.dumps(old))
    again = invoke(*arguments, "--kv-ranks", "9,4")
    assert again.exit_code == 0, again.stderr
    said = "kept from an earlier version, which measured no loss behind clean pasts: svd-kv9; --restart"
    assert said in again.stderr
    assert json.loads(record.read_text()) == old
    cells = json.loads((tmp_path / "out" / "results.json").read_text())["cells"]
    assert cells[0]["clean_past"] is None
    assert cells[1]["clean_past"]["teacher_loss"] == pytest.approx(whole["teacher_loss"])
    rows = [[cell.strip() for cell in line.split("│")[6:9]] for line in again.stdout.splitlines() if "│" in line]
    shown = [[f"{100 * cell['excess']:+.1f}%", f"{100 * cell['velocity_error']:.1f}%"] for cell in cells]
    clean = cells[1]["clean_past"]
    behind = [f"{100 * clean['excess']:+.1f}%", f"{100 * clean['velocity_error']:.1f}%"]
    assert rows == [["noisy", *shown[0]], ["clean", "-", "-"], ["noisy", *shown[1]], ["clean", *behind]]
    assert said not in invoke(*arguments, "--kv-ranks", "4").stderr


def without_time(cell: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in cell.items() if name != "seconds"}


def test_cells_of_another_version_of_the_method_are_not_mixed(
    golden: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record that does not say is of the first version."""
    monkeypatch.setattr(sweeps, "MOMENTS_VERSION", 1)
    recipe = SweepRecipe(inits=("svd",), kv_ranks=(9,))
    clips = SweepClips(data=data, validation=2)
    sweep(golden, tmp_path / "out", recipe, clips=clips)
    record = tmp_path / "out" / "sweep.json"
    noted = json.loads(record.read_text())
    del noted["method"]
    record.write_text(json.dumps(noted))
    sweep(golden, tmp_path / "out", recipe, clips=clips)
    monkeypatch.setattr(sweeps, "MOMENTS_VERSION", 2)
    with pytest.raises(OutputError, match=r"a sweep with another method; .*--restart"):
        sweep(golden, tmp_path / "out", recipe, clips=clips)


@pytest.mark.slow
def test_the_command_draws_and_tables(golden: Path, data: Path, tmp_path: Path) -> None:
    arguments = (
        "sweep",
        golden,
        "-o",
        tmp_path / "out",
        "--init",
        "svd,random",
        "--kv-ranks",
        "4,9,18",
        "--data",
        data,
    )
    result = invoke(*arguments)
    assert result.exit_code == 0, result.stderr
    assert "Budgets of wan_tiny" in result.stdout
    assert "past" not in result.stdout + result.stderr  # a bidirectional model has none
    assert "the last clips of the folder clips" in " ".join(result.stdout.split())
    assert (tmp_path / "out" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [cell["kv_rank"] for cell in report["cells"]] == [4, 9, 18, 4, 9, 18]
    assert report["cells"][0]["cache_reduction"] == pytest.approx(1 - (4 + 6) / 192)
    record = tmp_path / "out" / RECORD_NAME  # as a version that counted no bits left it
    begun = json.loads(record.read_text())
    del begun["recipe"]["bytes_per_token"]
    record.write_text(json.dumps(begun))
    assert json.loads(invoke(*arguments, "--json").stdout) == report


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kv-ranks", "4,x"], "--kv-ranks is '4,x': give whole numbers separated by commas"),
        (["--kv-ranks", "0"], "options: kv_ranks.0 is 0: give 1 or more"),
        (["--kv-ranks", "4", "--init", "magic"], "inits.0 is 'magic': give svd, "),
        ([], "nothing to sweep"),
        (["--rope-dims", "4,8", "--nope-dims", "3"], "nope_dims has 1 values for 2 rope_dims"),
        (["--kv-ranks", "4,97", "--init", "svd"], "cell svd-kv97: kv_rank is 97, larger than the layer"),
        (["--rope-dims", "6,7", "--init", "svd"], "rope_dim is 7: give a multiple of 2"),
        (["--recipe", "none"], "none: no such recipe file; shipped sweep recipes: tiny-budgets"),
        (["--kv-ranks", "4", "--convert", "none"], "none: no such recipe file"),
    ],
)
def test_wrong_usage_is_refused_before_any_work(golden: Path, tmp_path: Path, options: list[str], message: str) -> None:
    result = invoke("sweep", golden, "-o", tmp_path / "out", *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_cells_from_python_are_checked_too() -> None:
    with pytest.raises(ConfigError, match=r"^kv_ranks\.1 is 0: give 1 or more$"):
        SweepRecipe(kv_ranks=(8, 0))
    with pytest.raises(ConfigError, match=r"^nope_dims\.0 is -1: give 0 or more$"):
        SweepRecipe(rope_dims=(4,), nope_dims=(-1,))
    assert SweepRecipe(rope_dims=(4,), nope_dims=(0,)).nope_dims == (0,)


def test_a_folder_of_something_else_is_left_alone(golden: Path, data: Path, tmp_path: Path) -> None:
    recipe, out = SweepRecipe(inits=("svd",), kv_ranks=(4,)), tmp_path / "out"
    with pytest.raises(OutputError, match="is not a folder of a sweep"):
        sweep(golden, data, recipe, clips=SweepClips(data=data))
    with pytest.raises(OutputError, match="does not exist; create it first"):
        sweep(golden, tmp_path / "a" / "b", recipe, clips=SweepClips(data=data))
    (first,) = sweep(golden, out, recipe, clips=SweepClips(data=data, validation=2)).results
    with pytest.raises(OutputError, match=r"holds a sweep with another validation_clips and seed; .*--restart"):
        sweep(golden, out, recipe, clips=SweepClips(data=data, validation=3, seed=1))
    (again,) = sweep(golden, out, recipe, clips=SweepClips(data=data, validation=3), restart=True).results
    assert again.loss != first.loss
    (out / "cells" / "svd-kv4.json").write_text('{"name": 3}')
    with pytest.raises(InputError, match=r"svd-kv4\.json"):
        sweep(golden, out, recipe, clips=SweepClips(data=data, validation=3))


def test_a_lora_is_in_both_the_dense_model_and_the_converted(golden: Path, data: Path, tmp_path: Path) -> None:
    generator, query = torch.Generator().manual_seed(2), "blocks.1.self_attn.q"
    state = {f"{query}.lora_A.weight": torch.randn(2, 96, generator=generator)}
    state |= {f"{query}.lora_B.weight": torch.randn(96, 2, generator=generator)}
    save_file(state, tmp_path / "lora.safetensors")
    recipe = SweepRecipe(inits=("lossless",), kv_ranks=())
    losses = []
    for name, loras in (("plain", ()), ("merged", (LoraFile(path=tmp_path / "lora.safetensors"),))):
        (cell,) = sweep(Source(golden, loras=loras), tmp_path / name, recipe, clips=SweepClips(data=data)).results
        assert cell.velocity_error < 1e-5
        losses.append(cell.teacher_loss)
    assert abs(losses[0] - losses[1]) > 1e-4
    with pytest.raises(OutputError, match="another loras"):
        sweep(golden, tmp_path / "merged", recipe, clips=SweepClips(data=data))


def test_experts_are_swept_one_by_one(
    golden_state: dict[str, torch.Tensor], golden_config: dict[str, Any], save_folder: Any, data: Path, tmp_path: Path
) -> None:
    for name in ("transformer", "transformer_2"):
        pair = save_folder(golden_state, golden_config, f"pair/{name}").parent
    recipe = SweepRecipe(inits=("svd",), kv_ranks=(4,))
    with pytest.raises(ConfigError, match="sweep one with --subfolder transformer or --subfolder transformer_2"):
        sweep(pair, tmp_path / "out", recipe, clips=SweepClips(data=data))
    report = sweep(Source(pair, subfolder="transformer_2"), tmp_path / "out", recipe, clips=SweepClips(data=data))
    assert [isinstance(result, CellResult) for result in report.results] == [True]


def test_a_recipe_that_counts_bytes_is_no_base_of_budgets_in_scalars(golden: Path, tmp_path: Path) -> None:
    (tmp_path / "bytes.yaml").write_text("bytes_per_token: 9\n")
    result = invoke("sweep", golden, "-o", tmp_path / "out", "--kv-ranks", "4", "--convert", tmp_path / "bytes.yaml")
    assert result.exit_code == 2
    assert "bytes.yaml: a sweep compares numbers of scalars" in result.stderr
    assert not (tmp_path / "out").exists()
