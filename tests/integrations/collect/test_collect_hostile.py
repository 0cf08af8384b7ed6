"""Folders of moments that are damaged, foreign or of another model: one line, exit code 2, and nothing written."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from collect_cases import collect_windows, make_clip, make_model
from command_line import Result, invoke
from safetensors.torch import load_file, save_file
from support import SaveFolder

from mlaconvert.files.names import WEIGHTS_NAME
from mlaconvert.files.writer import is_model

RECORD = "collected.json"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and what was collected of it."""
    root = tmp_path_factory.mktemp("collected")

    def save(state: Any, config: Any) -> Path:
        (root / "model").mkdir()
        save_file(dict(state), root / "model" / WEIGHTS_NAME)
        (root / "model" / "config.json").write_text(json.dumps(config))
        return root / "model"

    collect_windows(make_model(save), root / "moments", make_clip())
    return root


def spoil(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        record = json.loads((folder / RECORD).read_text())
        change(record)
        (folder / RECORD).write_text(json.dumps(record))

    return apply


def first(folder: Path) -> Path:
    return min((folder / "windows").iterdir())


def cut(folder: Path) -> None:
    path = first(folder)
    path.write_bytes(path.read_bytes()[:-50])


def not_finite(folder: Path) -> None:
    tensors = load_file(first(folder))
    tensors["x"][0, 3, 4] = float("nan")
    save_file(tensors, first(folder))


def pipe(folder: Path) -> None:
    path = first(folder)
    path.unlink()
    os.mkfifo(path)


def deeper(record: dict[str, Any]) -> None:
    record["windows"] = record["windows"] * 40_000


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "an empty record": (lambda f: (f / RECORD).write_text(""), "collected.json"),
    "no JSON": (lambda f: (f / RECORD).write_text("{"), "collected.json"),
    "a list": (lambda f: (f / RECORD).write_text("[]"), "collected.json"),
    "a later version": (spoil(lambda r: r.update(version=2)), "this mlaconvert reads 1"),
    "an unknown field": (spoil(lambda r: r.update(more=1)), "unknown field 'more'"),
    "no windows": (spoil(lambda r: r.update(windows=[])), "windows has 0 entries"),
    "a window twice": (spoil(lambda r: r["windows"].append(r["windows"][0])), "each another"),
    "countless windows": (spoil(deeper), "collected.json"),
    "a path for a number": (spoil(lambda r: r["windows"][0].update(number="../../x")), "windows.0.number"),
    "a huge number": (spoil(lambda r: r["windows"][0].update(number=10**30)), "number"),
    "a huge grid": (spoil(lambda r: r["windows"][0].update(grid=[4, 2**31 - 1, 2**31 - 1])), "get an intact copy"),
    "positions of other frames": (spoil(lambda r: r["windows"][0]["positions"].pop()), "give a position for each"),
    "more queries than frames": (spoil(lambda r: r["windows"][0].update(queries=9)), "give a position for each"),
    "a chunk wider than its window": (spoil(lambda r: r["streaming"].update(chunk_frames=9)), "window_frames"),
    "no digests": (spoil(lambda r: r.update(weights=[])), "weights has 0 digests for 3 layers"),
    "a dtype that is none": (spoil(lambda r: r.update(dtype="int8")), "dtype"),
    "another dtype": (spoil(lambda r: r.update(dtype="bfloat16")), "not the inputs that collected.json tells of"),
    "a missing file": (lambda f: first(f).unlink(), "000001-000.safetensors"),
    "a file cut short": (cut, "000001-000.safetensors"),
    "another shape": (lambda f: save_file({"x": torch.zeros(1, 7, 42)}, first(f)), "not the inputs"),
    "another tensor": (lambda f: save_file({"y": torch.zeros(1, 24, 42)}, first(f)), "not the inputs"),
    "a pipe": (pipe, "000001-000.safetensors"),
    "inputs that are not finite": (not_finite, "NaN or infinite"),
    "another model's size": (spoil(lambda r: r.update(num_heads=6)), "3 layers x 42 wide x 6 heads"),
    "another model's weights": (
        spoil(lambda r: r["weights"].__setitem__(1, "0" * 64)), "collected with other weights than .* \\(layer 1\\)"
    ),
}  # fmt: skip


def convert(model: Path, output: Path, moments: Path, *options: object) -> Result:
    sizes = ("--kv-rank", 9, "--device", "cpu")
    return invoke("convert", model, "-o", output, "--moments", moments, *sizes, *options)


@pytest.mark.parametrize("case", BAD)
def test_bad_folders_are_refused(case: str, shelf: Path, tmp_path: Path) -> None:
    change, says = BAD[case]
    shutil.copytree(shelf / "moments", tmp_path / "moments")
    change(tmp_path / "moments")
    result = convert(shelf / "model", tmp_path / "out", tmp_path / "moments")
    assert result.exit_code == 2, result.stderr
    assert "Traceback" not in result.stderr
    error = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(error) == 1, result.stderr
    assert re.search(says, error[0]), error[0]
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.partial").exists()


OPTIONS: dict[str, tuple[tuple[object, ...], str]] = {
    "clips": (("--clips", 3), "clips 3 needs the model itself"),
    "allocation": (("--allocation", "adaptive"), "allocation adaptive needs the model itself"),
    "refits": (("--refit-steps", 3), "refit_steps 3 needs the model itself"),
    "noise": (("--noisy-past", 0.5), "noisy_past 0.5 needs the model itself"),
    "window": (("--window-frames", 7), "was collected with chunks of 2, a window of 5"),
    "time": (("--bidirectional",), "was collected with chunks of 2, a window of 5"),
    "data": (("--data", "."), "leave --data out"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_settings_that_recorded_windows_cannot_follow(case: str, shelf: Path, tmp_path: Path) -> None:
    options, says = OPTIONS[case]
    result = convert(shelf / "model", tmp_path / "out", shelf / "moments", *options)
    assert (result.exit_code, says in result.stderr) == (2, True), result.stderr
    assert not (tmp_path / "out").exists()


def test_a_good_folder_is_taken_and_left_as_it_is(shelf: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in (shelf / "moments").rglob("*") if path.is_file()}
    dry = convert(shelf / "model", tmp_path / "out", shelf / "moments", "--dry-run")
    assert dry.exit_code == 0, dry.stderr
    assert "4 windows of 1 videos, drawn from 4 passes" in dry.stderr
    result = convert(shelf / "model", tmp_path / "out", shelf / "moments", "--window-frames", 5, "--verify")
    assert result.exit_code == 0, result.stderr
    assert is_model(tmp_path / "out", pair=False)
    assert {path: path.read_bytes() for path in (shelf / "moments").rglob("*") if path.is_file()} == before


def test_a_fine_tuned_model_is_another(shelf: Path, save_folder: SaveFolder, tmp_path: Path) -> None:
    state = load_file(shelf / "model" / WEIGHTS_NAME)
    state["blocks.2.self_attn.v.weight"] = state["blocks.2.self_attn.v.weight"] * 1.01
    other = save_folder(state, json.loads((shelf / "model" / "config.json").read_text()), "tuned")
    result = convert(other, tmp_path / "out", shelf / "moments")
    assert result.exit_code == 2
    assert "collected with other weights" in result.stderr
    left = convert(other, tmp_path / "out", shelf / "moments", "--layers", "0-1")  # which are the same
    assert left.exit_code == 0, left.stderr
