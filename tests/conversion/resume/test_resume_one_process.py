"""Conversions that are interrupted, killed or shared between processes end with the bytes of one that ran alone."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from resume_cases import ENVIRONMENT, SVD, interrupted, kill
from safetensors.torch import load_file, save_file

from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.conversion import from_clips as calibrated
from mlaconvert.conversion import from_weights, job
from mlaconvert.conversion import from_weights as layers
from mlaconvert.conversion.calibration.method import CalibrationSetup, Method
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.run import convert
from mlaconvert.errors import CheckpointError, ConfigError, OutputError
from mlaconvert.files.names import WEIGHTS_NAME
from mlaconvert.files.output import Output
from mlaconvert.listener import Listener

# A child that takes its time for each layer, and says when it begins one.
SLOW = """
import sys, time, signal
import mlaconvert.conversion.from_weights as layers, mlaconvert.cli as cli
signal.signal(signal.SIGINT, signal.default_int_handler)
plain = layers.convert_layer
def convert_layer(*arguments):
    print("layer", flush=True)
    time.sleep(0.05)
    return plain(*arguments)
layers.convert_layer = convert_layer
cli.main()
"""


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The layers that were factorised, in order: one after the other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found: list[int] = []
    plain = layers.convert_layer

    def convert_layer(checkpoint: Any, plan: Any, layer: int, *rest: Any) -> Any:
        found.append(layer)
        return plain(checkpoint, plan, layer, *rest)

    monkeypatch.setattr(layers, "convert_layer", convert_layer)
    yield found
    torch.set_num_threads(threads)


def test_goes_on_after_the_last_finished_layer(
    source: Path, expected: dict[str, bytes], tmp_path: Path, made: list[int]
) -> None:
    said: list[str] = []
    text = interrupted(source, tmp_path / "out", 3)
    assert re.fullmatch(r"finished layers \([23]\) are kept: the same command goes on from them", text)
    kept = int(re.findall(r"\d", text)[0])  # the last one may have been stopped before it was written
    assert made == [0, 1, 2]
    convert(source, tmp_path / "out", SVD, listener=Listener(say=said.append))
    assert made == [0, 1, 2, *range(kept, 4)]
    assert said == [f"going on after {kept} finished layers, kept in {tmp_path / '.out.partial'}"]
    assert kill.snapshot(tmp_path) == {f"out/{name}": data for name, data in expected.items()}


def test_nothing_finished_leaves_nothing(source: Path, tmp_path: Path) -> None:
    assert interrupted(source, tmp_path / "out", 0) == ""
    assert list(tmp_path.iterdir()) == []


def test_half_done_work_of_earlier_versions_is_gone_on_from(source: Path, tmp_path: Path) -> None:
    """Their recipes had a list of parts that are switched off, which is noted as it was."""
    interrupted(source, tmp_path / "out", 3)
    begun = json.loads((tmp_path / ".out.partial" / "run.json").read_text())
    names = list(begun)
    assert (names[names.index("allocation") + 1], begun["without"]) == ("without", [])
    method = CalibrationSetup(method=Method(rho=False, refit=False))
    calibrated = ConvertRecipe(clips=2, height=32, width=64)
    interrupted(source, tmp_path / "other", 3, calibrated, data=method)
    assert json.loads((tmp_path / ".other.partial" / "run.json").read_text())["without"] == ["rho", "refit"]
    with pytest.raises(ConfigError, match=r"holds a conversion with another without"):
        convert(source, tmp_path / "other", calibrated)


def test_work_from_before_more_clips_were_refitted_on_is_gone_on_from(
    source: Path, tmp_path: Path, made: list[int]
) -> None:
    window = StreamingConfig(chunk_frames=3, window_frames=7)
    calibrated = ConvertRecipe(clips=2, height=32, width=64, streaming=window, refit_steps=1)
    interrupted(source, tmp_path / "out", 3, calibrated)
    record = tmp_path / ".out.partial" / "run.json"
    begun = json.loads(record.read_text())
    assert begun.pop("refit_clips") == 8
    record.write_text(json.dumps(begun))
    made.clear()
    convert(source, tmp_path / "out", calibrated)
    assert 0 not in made


def test_work_from_before_an_exact_present_is_gone_on_from_unless_calibrated(
    source: Path, expected: dict[str, bytes], tmp_path: Path, made: list[int]
) -> None:
    def forget_pasts(name: str) -> None:
        record = tmp_path / f".{name}.partial" / "run.json"
        begun = json.loads(record.read_text())
        for field in ("bytes_per_token", "present", "noisy_past", "refit_steps"):
            del begun[field]
        record.write_text(json.dumps(begun))

    kept = int(re.findall(r"\d", interrupted(source, tmp_path / "out", 3))[0])
    forget_pasts("out")
    with pytest.raises(ConfigError, match="holds a conversion with another"):
        convert(source, tmp_path / "out", dataclasses.replace(SVD, q_rank="none", streaming=StreamingConfig(),
                                                              present="exact"))  # fmt: skip
    made.clear()
    convert(source, tmp_path / "out", SVD)
    assert made == list(range(kept, 4))
    assert kill.snapshot(tmp_path / "out") == expected
    calibrated = ConvertRecipe(clips=2, height=32, width=64)
    interrupted(source, tmp_path / "other", 3, calibrated)
    forget_pasts("other")
    with pytest.raises(ConfigError, match="holds a conversion with another"):
        convert(source, tmp_path / "other", calibrated)


def test_another_recipe_is_noticed(source: Path, tmp_path: Path, made: list[int]) -> None:
    interrupted(source, tmp_path / "out", 3)
    other = ConvertRecipe(init="svd", kv_rank=2)
    with pytest.raises(ConfigError, match=r"\.out\.partial holds a conversion with another kv_rank; .* --restart"):
        convert(source, tmp_path / "out", other)
    made.clear()
    convert(source, Output(tmp_path / "out", restart=True), other)
    assert made == [0, 1, 2, 3]
    convert(source, tmp_path / "fresh", other)
    assert kill.snapshot(tmp_path / "out") == kill.snapshot(tmp_path / "fresh")


def test_a_source_that_changed_in_between_is_noticed(own_source: Path, tmp_path: Path) -> None:
    interrupted(own_source, tmp_path / "out", 3)
    os.utime(own_source / WEIGHTS_NAME, (1, 1))
    with pytest.raises(ConfigError, match="another source, or one that was changed since"):
        convert(own_source, tmp_path / "out", SVD)
    assert (tmp_path / ".out.partial").exists()
    convert(own_source, Output(tmp_path / "out", restart=True), SVD)


def test_a_source_that_hides_its_change_is_noticed(own_source: Path, tmp_path: Path) -> None:
    """Same size, same time, other contents: its hash is another."""
    weights = own_source / WEIGHTS_NAME
    state = weights.stat()

    def stop(stage: str, done: int, total: int, _note: str = "") -> None:
        if stage == "convert" and done == 4:
            deadline = time.monotonic() + 30
            while not hashed and time.monotonic() < deadline:
                time.sleep(0.01)
        hashed.extend([1] if stage == "hash" and done == total else [])

    hashed: list[int] = []
    # The disk fails at the very end, after the hash was noted.
    with (
        kill.watched(kill.Disk(broken=("rename", "model", 0))),
        pytest.raises(OutputError, match=r"writing failed .*; finished layers \(4\) are kept"),
    ):
        convert(own_source, tmp_path / "out", SVD, listener=Listener(progress=stop))
    with weights.open("r+b") as stream:
        stream.seek(-4, os.SEEK_END)
        stream.write(b"\0\0\0\0")
    os.utime(weights, ns=(state.st_atime_ns, state.st_mtime_ns))
    with pytest.raises(CheckpointError, match="has other contents than when the conversion began"):
        convert(own_source, tmp_path / "out", SVD)
    assert not (tmp_path / ".out.partial").exists()


def test_a_source_that_changes_during_the_run_is_noticed(own_source: Path, tmp_path: Path) -> None:
    def change(stage: str, done: int, total: int, _note: str = "") -> None:
        if stage == "convert" and done == 2:
            os.utime(own_source / WEIGHTS_NAME, (1, 1))

    with pytest.raises(CheckpointError, match="was changed while it was converted"):
        convert(own_source, tmp_path / "out", SVD, listener=Listener(progress=change))
    assert not (tmp_path / "out").exists()


def test_bad_input_leaves_nothing(source: Path, tmp_path: Path) -> None:
    """The last layer's weights are not finite; the ones before it are finished by then."""
    bad = Path(shutil.copytree(source, tmp_path / "bad"))
    weights = {name: tensor.clone() for name, tensor in load_file(bad / WEIGHTS_NAME).items()}
    weights["blocks.3.self_attn.k.weight"][1, 2] = float("nan")
    save_file(weights, bad / WEIGHTS_NAME)
    with pytest.raises(CheckpointError, match=r"blocks\.3\.self_attn\.k\.weight"):
        convert(bad, tmp_path / "out", SVD)
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_weights_that_went_missing_are_made_again(
    source: Path, expected: dict[str, bytes], tmp_path: Path, made: list[int]
) -> None:
    interrupted(source, tmp_path / "out", 3)
    (tmp_path / ".out.partial" / "model" / WEIGHTS_NAME).unlink()
    made.clear()
    convert(source, tmp_path / "out", SVD)
    assert made == [0, 1, 2, 3]
    assert kill.snapshot(tmp_path / "out") == expected


def test_two_runs_do_not_meet(source: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    messages: list[str] = []

    def again(stage: str, done: int, total: int, _note: str = "") -> None:
        if stage == "convert" and done == 2:
            with pytest.raises(OutputError, match=r"another run is writing .*out; wait for it") as caught:
                convert(source, tmp_path / "out", SVD)
            messages.append(str(caught.value))

    convert(source, tmp_path / "out", SVD, listener=Listener(progress=again))
    assert len(messages) == 1
    assert kill.snapshot(tmp_path / "out") == expected


def test_the_second_expert_goes_on_alone(source: Path, tmp_path: Path, made: list[int]) -> None:
    for name in ("high_noise_model", "low_noise_model"):
        shutil.copytree(source, tmp_path / "pair" / name)
    convert(tmp_path / "pair", tmp_path / "whole", SVD)
    counted = 0

    def stop(stage: str, done: int, total: int, _note: str = "") -> None:
        nonlocal counted
        counted += stage == "convert" and done == 2
        if counted == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"layers \([56]\) are kept"):
        convert(tmp_path / "pair", tmp_path / "out", SVD, listener=Listener(progress=stop))
    made.clear()
    convert(tmp_path / "pair", tmp_path / "out", SVD)
    assert made in ([1, 2, 3], [2, 3])
    assert kill.snapshot(tmp_path / "out") == kill.snapshot(tmp_path / "whole")


def test_a_calibration_from_before_bits_goes_on_with_losses_in_the_order_of_the_work(
    source: Path, tmp_path: Path
) -> None:
    recipe = ConvertRecipe(kv_rank=7, clips=5, nope_dim=2, streaming=StreamingConfig(), height=32, width=64)
    convert(source, tmp_path / "whole", recipe)
    interrupted(source, tmp_path / "out", 3, recipe)
    record = tmp_path / ".out.partial" / "run.json"
    begun = json.loads(record.read_text())
    del begun["bytes_per_token"]
    record.write_text(json.dumps(begun))
    convert(source, tmp_path / "out", recipe)
    assert kill.snapshot(tmp_path / "out") == kill.snapshot(tmp_path / "whole")
    losses = json.loads((tmp_path / "out" / "conversion.json").read_text())["losses"]
    assert list(losses)[:4] == ["dense", "rotations dropped", "rotary key shared", "low rank"]


def test_a_calibration_is_not_repeated(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = ConvertRecipe(init="calibrated", kv_rank=7, clips=2, allocation="uniform")
    (tmp_path / "clips").mkdir()
    generator = torch.Generator().manual_seed(0)
    clips = {"latents": torch.randn(2, 2, 3, 4, 6, generator=generator), "context": torch.ones(2, 3, 8)}
    save_file(clips, tmp_path / "clips" / "clips.safetensors")
    options = {"data": tmp_path / "clips"}
    convert(source, tmp_path / "whole", recipe, **options)  # type: ignore[arg-type]
    moments = tmp_path / "out.moments"
    kept = f"what was measured so far is kept in {moments}: the same command goes on from there"
    assert interrupted(source, tmp_path / "out", 2, recipe, stage="calibrate", **options) == kept
    assert sorted(path.name for path in moments.glob("layer-*")) == ["layer-000.safetensors", "layer-001.safetensors"]
    said: list[str] = []
    kept = "what was measured of the clips is kept: the same command goes on from there"
    assert interrupted(source, tmp_path / "out", 0, recipe, say=said.append, **options) == kept
    assert said == [f"what was measured of 2 layers is taken from {moments}"]
    monkeypatch.setattr(job, "choose_splits", None)
    interrupted(source, tmp_path / "out", 3, recipe, say=said.append, **options)
    assert said[-1] == f"going on from what was measured of the clips, kept in {tmp_path / '.out.partial'}"
    refitted, plain = [], from_weights.layer_report
    monkeypatch.setattr(calibrated, "layer_report", lambda *given: refitted.append(given[2]) or plain(*given))
    convert(source, tmp_path / "out", recipe, **options)  # type: ignore[arg-type]
    assert refitted in ([1, 2, 3], [2, 3])  # what was finished, and the state behind it, may be a layer apart
    assert kill.snapshot(tmp_path / "out") == kill.snapshot(tmp_path / "whole")


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("overwrite", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_disk_that_fails_anywhere_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    """Every seventh operation on the disk fails in a run of its own; the benchmark takes all."""
    kill.write_model(tmp_path / "small", kill.SMALL)
    convert(tmp_path / "small", tmp_path / "reference", SVD)
    operations = kill.Disk.operations
    taken = lambda disk: operations(disk)[overwrite::7]  # noqa: E731
    monkeypatch.setattr(kill.Disk, "operations", taken)
    reference = kill.snapshot(tmp_path / "reference")
    found = kill.break_everything(tmp_path / "small", tmp_path, reference, overwrite=overwrite)
    assert found["tried"] > 10
    assert found.get("lost", 0) == 0
    assert found.get("ended well", 0) < found["tried"] / 4


def slow_run(source: Path, output: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SLOW, "convert", str(source), "-o", str(output), "--init", "svd"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.slow
def test_killed_again_and_again(source: Path, expected: dict[str, bytes], tmp_path: Path, made: list[int]) -> None:
    """SIGKILL in the second layer, Ctrl-C in the second of what is left, and then to the end."""
    for way in (signal.SIGKILL, signal.SIGINT):
        process = slow_run(source, tmp_path / "out")
        assert process.stdout is not None
        for _ in range(2):
            assert process.stdout.readline() == "layer\n"
        time.sleep(0.03)
        process.send_signal(way)
        _, said = process.communicate(timeout=60)
        assert not (tmp_path / "out").exists()
        assert (tmp_path / ".out.partial").is_dir()
    assert process.returncode == 130
    assert re.search(r"^interrupted: finished layers \(\d\) are kept: the same command goes on", said, re.MULTILINE)
    convert(source, tmp_path / "out", SVD)
    assert len(made) < 4
    assert kill.snapshot(tmp_path) == {f"out/{name}": data for name, data in expected.items()}
