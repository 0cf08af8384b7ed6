"""The smallest and the emptiest that a user may give, through the commands: each works, or is refused in one line."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import invoke
from hostile import Shelf, Spoil, arguments, change_state, make_shelf, refused, special
from safetensors.torch import load_file, save_file

from mlaconvert.conversion.calibration import run
from mlaconvert.conversion.from_clips import kept_splits
from mlaconvert.files.names import CONFIG_NAME, WEIGHTS_NAME

pytestmark = pytest.mark.timeout(60)

State = dict[str, torch.Tensor]


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return make_shelf(tmp_path_factory.mktemp("shelf"))


def some_clips(folder: Path, shelf: Shelf, count: int) -> Path:
    """The first clips of the shelf, in a folder of their own."""
    folder.mkdir()
    tensors = load_file(shelf.clips / "a.safetensors")
    save_file({name: tensor[:count].clone() for name, tensor in tensors.items()}, folder / "a.safetensors")
    shutil.copy(shelf.clips / "null_context.safetensors", folder)
    return folder


def heal(shelf: Shelf, output: Path, clips: Path, *options: str, stage: str = "teacher-forcing") -> list[str]:
    found = arguments("heal", shelf.converted, shelf, output)
    found = [str(clips) if part == str(shelf.clips) else stage if part == "teacher-forcing" else part for part in found]
    return [*found, *options]


# --- few clips -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("--dry-run",), ("--bad-shards", "skip")], ids=["run", "dry run", "skip"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_healing_on_few_clips(tmp_path: Path, shelf: Shelf, count: int, options: tuple[str, ...]) -> None:
    clips = some_clips(tmp_path / "clips", shelf, count)
    says = f"of its {count} clips, {count} can be trained on and 0 can be validated on .*give more clips, at least 4"
    refused(tmp_path, *heal(shelf, tmp_path / "out", clips, *options), says=says)


def test_four_clips_are_enough(tmp_path: Path, shelf: Shelf) -> None:
    code, _, stderr = invoke(*heal(shelf, tmp_path / "out", some_clips(tmp_path / "clips", shelf, 4)))
    assert code == 0, stderr


def test_a_clip_that_is_left_out_is_named_and_counted(tmp_path: Path, shelf: Shelf) -> None:
    """Five clips, the last of them for validation: without the second, three are trained on; without the last, none
    is left to validate on."""
    tensors = load_file(shelf.clips / "a.safetensors")
    for bad in (1, 4):
        clips = tmp_path / f"clips {bad}"
        clips.mkdir()
        latents = tensors["latents"].clone()
        latents[bad, 2, 1, 3, 0] = torch.inf
        save_file({"latents": latents, "context": tensors["context"]}, clips / "a.safetensors")
        if bad == 4:
            says = "of its 5 clips, 4 can be trained on and 0 can be validated on"
            refused(tmp_path, *heal(shelf, tmp_path / "out", clips, "--bad-shards", "skip"), says=says)
            continue
        code, _, stderr = invoke(*heal(shelf, tmp_path / "out", clips, "--bad-shards", "skip"))
        assert code == 0, stderr
        assert "a.safetensors: has values that are not finite" in stderr
        assert "(1 of its 5 clips: 1, counted from 0)" in stderr
        assert "1 of 5 clips and 0 whole shards are left out; 3 clips are trained on, 1 validated on" in stderr
        shutil.rmtree(tmp_path / "out")
        shutil.rmtree(tmp_path / "out.state")


@pytest.mark.parametrize("stage", ["teacher-forcing", "dmd"])
def test_an_empty_prompt_of_another_length(tmp_path: Path, shelf: Shelf, stage: str) -> None:
    """The shelf's is two tokens long, its clips' texts have three."""
    code, _, stderr = invoke(*heal(shelf, tmp_path / "out", shelf.clips, "--guidance", "3", stage=stage))
    assert code == 0, stderr


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("stage", ["distill", "teacher-forcing", "dmd"])
def test_frames_of_one_token(tmp_path: Path, shelf: Shelf, stage: str, frames: int) -> None:
    """The shelf's latent is 5 channels wide, so a rotary key that is alone begins at an odd place in memory."""
    clips = tmp_path / "clips"
    clips.mkdir()
    tensors = load_file(shelf.clips / "a.safetensors")
    latents = tensors["latents"][:, :, :frames, :2, :2].clone()
    save_file({"latents": latents, "context": tensors["context"]}, clips / "a.safetensors")
    shutil.copy(shelf.clips / "null_context.safetensors", clips)
    code, _, stderr = invoke(*heal(shelf, tmp_path / "out", clips, stage=stage))
    assert code == 0, stderr


# --- narrow latents --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rope", ["head", "latent", "cached"])
@pytest.mark.parametrize("rank", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_the_narrowest_latents(tmp_path: Path, shelf: Shelf, rank: int, rope: str) -> None:
    """As many scalars in all as were asked for, the rotary key's two with those of rope cached."""
    command = ["convert", shelf.dense, "-o", tmp_path / "out", "--data", shelf.clips, "--clips", "3"]
    code, _, stderr = invoke(*command, "--kv-rank", str(rank), "--rope", rope, "--json")
    assert code == 0, stderr
    layers = json.loads((tmp_path / "out" / CONFIG_NAME).read_text())["mla"]["layers"]
    scalars = [layer["kv_lora_rank"] for layer in layers]
    if rope == "cached":
        scalars = [n + 2 * sum(c for _, c in x["rope_components"]) for n, x in zip(scalars, layers, strict=True)]
    assert sum(scalars) == 2 * (rank + 2 * (rope == "cached"))
    assert min(layer["kv_lora_rank"] for layer in layers) >= 1
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "out" / WEIGHTS_NAME).values())


# --- degenerate models -----------------------------------------------------------------------------------------------


def scaled(part: str, factor: float) -> Spoil:
    def change(state: State) -> None:
        for name in state:
            if part in name:
                state[name] = factor * state[name]

    return change_state(change)


DEGENERATE: dict[str, Spoil] = {
    "no output of a layer": scaled("blocks.1.self_attn.o.", 0),
    "no queries": scaled("self_attn.q.", 0),
    "no keys": scaled("self_attn.k.", 0),
    "no gain of keys": scaled("norm_k", 0),
    "no velocity": scaled("head.head.", 0),
    "overflow in a layer": scaled("blocks.0.ffn.", 1e38),
    "overflow in attention": scaled("self_attn.", 1e30),
}


@pytest.mark.parametrize("allocation", ["adaptive", "fixed"])
@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_models_cannot_be_calibrated(tmp_path: Path, shelf: Shelf, case: str, allocation: str) -> None:
    """Neither in the first sweep, which measures, nor in the second."""
    model = tmp_path / "model"
    shutil.copytree(shelf.dense, model)
    DEGENERATE[case](model)
    command = ["convert", model, "-o", tmp_path / "out", "--data", shelf.clips, "--clips", "5"]
    code, _, stderr = invoke(*command, "--allocation", allocation)
    assert code == 2, stderr
    assert "is degenerate on these clips" in stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()
    assert invoke(*command, "--allocation", allocation)[2].splitlines()[-1] == stderr.splitlines()[-1]  # and again


def test_linear_algebra_that_fails_in_the_second_sweep(
    tmp_path: Path, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise torch.linalg.LinAlgError("singular")  # type: ignore[attr-defined]

    monkeypatch.setattr(run, "refit_query", fail)
    command = ["convert", shelf.dense, "-o", tmp_path / "out", "--data", shelf.clips, "--clips", "5"]
    code, _, stderr = invoke(*command)
    assert code == 2, stderr
    assert "is degenerate on these clips" in stderr.splitlines()[-1]


def test_healing_that_overflows_before_any_step(tmp_path: Path, shelf: Shelf) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(shelf.dense, teacher)
    DEGENERATE["overflow in attention"](teacher)
    command = heal(shelf, tmp_path / "out", shelf.clips, "--teacher", str(teacher), stage="distill")
    refused(tmp_path, *command, says="before any step the validation is nan: student or teacher overflows")


# --- what a calibration kept -----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def generated(tmp_path_factory: pytest.TempPathFactory, shelf: Shelf) -> Path:
    """A folder with a recipe and the moments of a conversion to clips that the teacher generated."""
    folder = tmp_path_factory.mktemp("generated")
    (folder / "recipe.yaml").write_text("kv_rank: 5\nheight: 32\nwidth: 48\nclips: 2\nallocation: uniform\n")
    code, _, stderr = invoke(*from_own_clips(shelf, folder, folder / "out"))
    assert code == 0, stderr
    shutil.rmtree(folder / "out")
    return folder


def from_own_clips(shelf: Shelf, folder: Path, output: Path) -> list[str]:
    recipe, moments = folder / "recipe.yaml", folder / "moments"
    command = ("convert", shelf.dense, "-o", output, "--recipe", recipe, "--moments", moments)
    return [str(part) for part in command]


def changed(change: Callable[[State], Any]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        tensors = dict(load_file(path))
        change(tensors)
        save_file(tensors, path)

    return spoil


CLIPS: dict[str, Callable[[Path], Any]] = {
    "cut": lambda p: os.truncate(p, p.stat().st_size - 1),
    "empty": lambda p: p.write_bytes(b""),
    "text": lambda p: p.write_text("clips"),
    "a pipe": lambda p: special(p, "pipe"),
    "a folder": lambda p: special(p, "folder"),
    "no text": changed(lambda t: t.pop("context")),
    "other names": changed(lambda t: t.update(more=t.pop("context"))),
    "other channels": changed(lambda t: t.update(latents=t["latents"][:, :3].clone())),
    "fewer": changed(lambda t: t.update({name: x[:1].clone() for name, x in t.items()})),
    "more": changed(lambda t: t.update({name: torch.cat((x, x)) for name, x in t.items()})),
    "infinite": changed(lambda t: t["latents"][0, 1, 2, 3, 1].fill_(torch.inf)),
    "whole numbers": changed(lambda t: t.update(latents=t["latents"].int())),
}


@pytest.mark.parametrize("case", CLIPS)
def test_generated_clips_that_are_damaged(tmp_path: Path, shelf: Shelf, generated: Path, case: str) -> None:
    """The message is kept to: without the file, the same command works."""
    shutil.copytree(generated, tmp_path / "kept")
    kept = tmp_path / "kept" / "moments" / "clips.safetensors"
    CLIPS[case](kept)
    command = from_own_clips(shelf, tmp_path / "kept", tmp_path / "out")
    refused(tmp_path, *command, says=r"clips\.safetensors: .*delete the file and run the command again")
    if case == "cut":
        kept.unlink()
        assert invoke(*command)[0] == 0


def test_files_that_are_not_ours_among_the_moments(tmp_path: Path, shelf: Shelf, generated: Path) -> None:
    shutil.copytree(generated, tmp_path / "kept")
    moments = tmp_path / "kept" / "moments"
    shutil.copy(moments / "layer-001.safetensors", moments / "layer-001 (copy).safetensors")
    code, _, stderr = invoke(*from_own_clips(shelf, tmp_path / "kept", tmp_path / "out"))
    assert code == 0, stderr


@pytest.mark.parametrize("note", [[1], {"x": {}}, {"0": 7}, {"0": {"kv_lora_rank": 3}}, "text"])
def test_notes_of_splits_that_are_none(tmp_path: Path, note: Any) -> None:
    assert kept_splits(note, tmp_path) is None


def test_a_log_of_healing_that_cannot_be_written(tmp_path: Path, shelf: Shelf) -> None:
    (tmp_path / "out.state" / "log.jsonl").mkdir(parents=True)
    says = "out.state: writing failed .*what was saved last is kept"
    refused(tmp_path, *heal(shelf, tmp_path / "out", shelf.clips), says=says)


def test_sweeps_on_no_clips(tmp_path: Path, shelf: Shelf) -> None:
    command = ["sweep", shelf.dense, "-o", tmp_path / "out", "--data", shelf.clips, "--kv-ranks", "4", "--init", "svd"]
    refused(tmp_path, *command, "--validation-clips", "0", says="validation_clips is 0: give 1 or more")


# --- tables ----------------------------------------------------------------------------------------------------------


TABLES = {
    "a long field too many": "file,caption\na.mp4,x," + csv.field_size_limit() * "x" + "x\n",
    "a header that is too long": "file,caption," + csv.field_size_limit() * "x" + "x\n",
    "a quotation mark that is never closed": 'file,caption\na.mp4,"' + 20_000 * "one line of many\n",
    "a line break that is none": "file,caption\na.mp4,one\rtwo\rthree\n",
}


@pytest.mark.parametrize("case", TABLES)
def test_tables_of_captions(tmp_path: Path, case: str) -> None:
    (tmp_path / "a.mp4").touch()
    (tmp_path / "captions.csv").write_text(TABLES[case], newline="")
    command = ["encode", tmp_path, "-o", tmp_path / "out", "--captions", tmp_path / "captions.csv", "--base", tmp_path]
    refused(tmp_path, *command, says="captions.csv")
