"""Broken and hostile recipes, clips, embeddings, prompts, scores and records: refused like broken model files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import invoke
from hostile import Shelf, arguments, change_json, check_refusal, refused, setting, special, tree
from hostile_inputs_cases import HUGE, STATES, Tensors, spoil_values
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="session")
def left(tmp_path_factory: pytest.TempPathFactory, shelf: Shelf) -> Path:
    """Moments, a healing run's state and an unfinished video, as good runs leave them."""
    folder = tmp_path_factory.mktemp("left")
    code, _, stderr = invoke(*calibrated(shelf, folder / "out", folder / "moments"))
    assert code == 0, stderr
    code, _, stderr = invoke(*arguments("heal", shelf.converted, shelf, folder / "healed"))
    assert code == 0, stderr
    code, _, stderr = invoke(*arguments("generate", shelf.converted, shelf, folder / "video"))
    assert code == 0, stderr
    settings = json.loads((folder / "video" / "generation.json").read_text())["settings"]
    (folder / "video" / "progress.json").write_text(json.dumps({"frames": 0, "settings": settings}))
    return folder


def calibrated(shelf: Shelf, output: Path, moments: Path) -> list[str]:
    found = ["convert", shelf.dense, "-o", output, "--data", shelf.clips, "--clips", "2", "--moments", moments]
    return [str(part) for part in found]


def with_tensors(change: Callable[[Tensors], Any]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        tensors = dict(load_file(path))
        change(tensors)
        save_file(tensors, path)

    return spoil


MOMENTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut": (lambda p: os.truncate(p, p.stat().st_size - 1), "no moments of this model"),
    "empty": (lambda p: p.write_bytes(b""), "no moments of this model"),
    "text": (lambda p: p.write_text("moments of a layer"), "no moments of this model"),
    "a folder": (lambda p: special(p, "folder"), "no moments of this model"),
    "a pipe": (lambda p: special(p, "pipe"), "no moments of this model"),
    "NaN": (with_tensors(spoil_values("covariance", float("nan"))), "no moments of this model"),
    "no mean": (with_tensors(lambda t: t.pop("mean")), "no moments of this model"),
    "another width": (
        with_tensors(lambda t: t.update(mean=torch.zeros(25, dtype=torch.float64))),
        "no moments of this model",
    ),
    "single precision": (with_tensors(lambda t: t.update(mean=t["mean"].float())), "no moments of this model"),
    "more": (with_tensors(lambda t: t.update(more=torch.zeros(1))), "no moments of this model"),
    "flat": (with_tensors(lambda t: t.update(covariance=t["covariance"].flatten())), "no moments of this model"),
    "sensitivity alone": (with_tensors(lambda t: t.pop("output_power")), "no moments of this model"),
    "a link": (lambda p: p.rename(p.with_suffix(".other")) and p.symlink_to(p.with_suffix(".other")), "is a link"),
}


@pytest.mark.parametrize("case", MOMENTS)
def test_moments(tmp_path: Path, shelf: Shelf, left: Path, case: str) -> None:
    spoil, says = MOMENTS[case]
    shutil.copytree(left / "moments", tmp_path / "moments")
    spoil(tmp_path / "moments" / "layer-001.safetensors")
    message = refused(tmp_path, *calibrated(shelf, tmp_path / "out", tmp_path / "moments"), says=says)
    assert "layer-001" in message


RECORD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut": (lambda p: p.write_text("{"), "calibration.json"),
    "a list": (lambda p: p.write_text("[]"), "calibration.json"),
    "deep": (lambda p: p.write_text('{"a": ' + "[" * 9999 + "]" * 9999 + "}"), "calibration.json"),
    "not UTF-8": (lambda p: p.write_bytes(b"\xff"), "calibration.json"),
    "a pipe": (lambda p: special(p, "pipe"), "calibration.json"),
    "a folder": (lambda p: special(p, "folder"), "calibration.json"),
    "gone": (lambda p: p.unlink(), "not a folder of moments"),
    "a link": (lambda p: p.rename(p.with_name("other.json")) and p.symlink_to("other.json"), "is a link"),
    "a link outside": (
        lambda p: p.rename(p.parent.parent / "other.json") and p.symlink_to("../other.json"),
        "is a link",
    ),
}


@pytest.mark.parametrize("case", RECORD)
def test_the_record_of_moments(tmp_path: Path, shelf: Shelf, left: Path, case: str) -> None:
    spoil, says = RECORD[case]
    shutil.copytree(left / "moments", tmp_path / "moments")
    spoil(tmp_path / "moments" / "calibration.json")
    refused(tmp_path, *calibrated(shelf, tmp_path / "out", tmp_path / "moments"), says=says)


@pytest.mark.parametrize("case", STATES)
def test_states_of_healing(tmp_path: Path, shelf: Shelf, left: Path, case: str) -> None:
    spoil, says = STATES[case]
    shutil.copytree(left / "healed.state", tmp_path / "out.state")
    spoil(tmp_path / "out.state" / "last.pt")
    refused(tmp_path, *arguments("heal", shelf.converted, shelf, tmp_path / "out"), says=says)


def note(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return change_json("progress.json", change)


VIDEOS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no notes": (
        lambda f: [(f / name).unlink() for name in ("progress.json", "generation.json")],
        "an unfinished video with other settings",
    ),
    "a note cut": (lambda f: (f / "progress.json").write_text("{"), "an unfinished video with other settings"),
    "a note that is a list": (lambda f: (f / "progress.json").write_text("[]"), "with other settings"),
    "a note that is a pipe": (lambda f: special(f / "progress.json", "pipe"), "with other settings"),
    "other settings": (note(setting("settings", {})), "with other settings"),
    **{
        f"frames {value}": (note(setting("frames", value)), "damaged unfinished video")
        for value in (-1, 4, HUGE, 1.5, True, None, "1", [])
    },
    "no latents": (lambda f: (f / "latents.safetensors").unlink(), "damaged unfinished video"),
    "latents cut": (lambda f: os.truncate(f / "latents.safetensors", 200), "damaged unfinished video"),
    "latents of text": (lambda f: (f / "latents.safetensors").write_bytes(b"x" * 9999), "damaged unfinished video"),
    "a link": (
        lambda f: (f / "latents.safetensors").rename(f / "x") and (f / "latents.safetensors").symlink_to("x"),
        "is a link",
    ),
}


@pytest.mark.parametrize("case", VIDEOS)
def test_unfinished_videos(tmp_path: Path, shelf: Shelf, left: Path, case: str) -> None:
    spoil, says = VIDEOS[case]
    shutil.copytree(left / "video", tmp_path / ".out.partial")
    spoil(tmp_path / ".out.partial")
    refused(tmp_path, *arguments("generate", shelf.converted, shelf, tmp_path / "out"), says=says)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    text=st.text("abis: {}[]&*!|>-'\"#,?%@\n\t0.~", max_size=40),
    known=st.sampled_from(("", "init: ", "kv_rank: ", "layers: ")),
)
def test_any_yaml(tmp_path_factory: pytest.TempPathFactory, shelf: Shelf, text: str, known: str) -> None:
    folder = tmp_path_factory.getbasetemp() / "yaml"
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(known + text)
    command = ("convert", shelf.dense, "--recipe", folder / "recipe.yaml", "--dry-run")
    before = tree(folder)
    code, _, stderr = invoke(*command)
    if code != 0:
        check_refusal(code, stderr)
    assert tree(folder) == before
