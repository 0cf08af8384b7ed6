"""Conversions that are interrupted, killed or shared between processes end with the bytes of one that ran alone."""

from __future__ import annotations

import importlib
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
from safetensors.torch import load_file, save_file

from mlaconvert.config.geometry import WanConfig
from mlaconvert.conversion import from_clips as calibrated
from mlaconvert.conversion import from_weights, job, ranks
from mlaconvert.conversion import from_weights as layers
from mlaconvert.conversion import run as module
from mlaconvert.conversion.ranks import RankError, Ranks
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.run import convert
from mlaconvert.errors import CheckpointError, ConfigError, MLAConvertError, OutputError
from mlaconvert.files.names import WEIGHTS_NAME

ROOT = Path(__file__).parents[1]
SVD = ConvertRecipe(init="svd")
CONFIG = WanConfig(dim=24, num_heads=2, num_layers=4, ffn_dim=16, freq_dim=6, text_dim=8, in_dim=2, out_dim=2)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
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


sys.path.insert(0, str(ROOT / "benchmarks"))
kill = importlib.import_module("kill")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("source") / "model"
    kill.write_model(folder, CONFIG)
    return folder


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an uninterrupted conversion writes."""
    output = tmp_path_factory.mktemp("expected") / "out"
    convert(source, output, SVD)
    found: dict[str, bytes] = kill.snapshot(output)
    assert set(found) == {"config.json", "conversion.json", "README.md", WEIGHTS_NAME}
    return found


@pytest.fixture
def own_source(source: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(source, tmp_path / "model"))


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


def interrupted(source: Path, output: Path, after: int, recipe: ConvertRecipe = SVD, **options: Any) -> str:
    """Interrupt a conversion when `after` layers are handed over; what the interruption says."""

    def stop(stage: str, done: int, total: int, _note: str = "") -> None:
        if stage == "convert" and done == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        convert(source, output, recipe, progress=stop, **options)
    assert not output.exists()
    return str(caught.value)


# --- one process -------------------------------------------------------------------------------------------------


def test_goes_on_after_the_last_finished_layer(
    source: Path, expected: dict[str, bytes], tmp_path: Path, made: list[int]
) -> None:
    said: list[str] = []
    text = interrupted(source, tmp_path / "out", 3)
    assert re.fullmatch(r"finished layers \([23]\) are kept: the same command goes on from them", text)
    kept = int(re.findall(r"\d", text)[0])  # the last one may have been stopped before it was written
    assert made == [0, 1, 2]
    convert(source, tmp_path / "out", SVD, say=said.append)
    assert made == [0, 1, 2, *range(kept, 4)]
    assert said == [f"going on after {kept} finished layers, kept in {tmp_path / '.out.partial'}"]
    assert kill.snapshot(tmp_path) == {f"out/{name}": data for name, data in expected.items()}


def test_nothing_finished_leaves_nothing(source: Path, tmp_path: Path) -> None:
    assert interrupted(source, tmp_path / "out", 0) == ""
    assert list(tmp_path.iterdir()) == []


def test_another_recipe_is_noticed(source: Path, tmp_path: Path, made: list[int]) -> None:
    interrupted(source, tmp_path / "out", 3)
    other = ConvertRecipe(init="svd", kv_rank=2)
    with pytest.raises(ConfigError, match=r"\.out\.partial holds a conversion with another kv_rank; .* --restart"):
        convert(source, tmp_path / "out", other)
    made.clear()
    convert(source, tmp_path / "out", other, restart=True)
    assert made == [0, 1, 2, 3]
    convert(source, tmp_path / "fresh", other)
    assert kill.snapshot(tmp_path / "out") == kill.snapshot(tmp_path / "fresh")


def test_a_source_that_changed_in_between_is_noticed(own_source: Path, tmp_path: Path) -> None:
    interrupted(own_source, tmp_path / "out", 3)
    os.utime(own_source / WEIGHTS_NAME, (1, 1))
    with pytest.raises(ConfigError, match="another source, or one that was changed since"):
        convert(own_source, tmp_path / "out", SVD)
    assert (tmp_path / ".out.partial").exists()
    convert(own_source, tmp_path / "out", SVD, restart=True)


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
        convert(own_source, tmp_path / "out", SVD, progress=stop)
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
        convert(own_source, tmp_path / "out", SVD, progress=change)
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

    convert(source, tmp_path / "out", SVD, progress=again)
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
        convert(tmp_path / "pair", tmp_path / "out", SVD, progress=stop)
    made.clear()
    convert(tmp_path / "pair", tmp_path / "out", SVD)
    assert made in ([1, 2, 3], [2, 3])
    assert kill.snapshot(tmp_path / "out") == kill.snapshot(tmp_path / "whole")


def test_a_calibration_is_not_repeated(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = ConvertRecipe(init="calibrated", kv_rank=7, clips=2, allocation="uniform")
    (tmp_path / "clips").mkdir()
    generator = torch.Generator().manual_seed(0)
    clips = {"latents": torch.randn(2, 2, 3, 4, 6, generator=generator), "context": torch.ones(2, 3, 8)}
    save_file(clips, tmp_path / "clips" / "clips.safetensors")
    options = {"data": tmp_path / "clips"}
    convert(source, tmp_path / "whole", recipe, **options)  # type: ignore[arg-type]
    assert interrupted(source, tmp_path / "out", 0, recipe, **options).startswith("finished layers (0) are kept")
    monkeypatch.setattr(job, "choose_splits", None)
    interrupted(source, tmp_path / "out", 3, recipe, **options)
    refitted, plain = [], from_weights.layer_report
    monkeypatch.setattr(calibrated, "layer_report", lambda *given: refitted.append(given[2]) or plain(*given))
    convert(source, tmp_path / "out", recipe, **options)  # type: ignore[arg-type]
    assert refitted in ([1, 2, 3], [2, 3])  # what was finished, and the state behind it, may be a layer apart
    assert kill.snapshot(tmp_path / "out") == kill.snapshot(tmp_path / "whole")


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("overwrite", [False, True])
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


# --- processes that are killed -----------------------------------------------------------------------------------


def slow_run(source: Path, output: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SLOW, "convert", str(source), "-o", str(output), "--init", "svd"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)


@pytest.mark.skipif(os.name != "posix", reason="signals")
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


# --- several processes -------------------------------------------------------------------------------------------


def launch(source: Path, output: Path, body: str = "", count: int = 2) -> subprocess.CompletedProcess[str]:
    """`count` ranks of torchrun that run `body` before they convert."""
    script = output.with_name("run.py")
    script.write_text(f"import os, sys\n{body}\nfrom mlaconvert.cli import main\nmain()\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command += [str(script), "convert", str(source), "-o", str(output), "--init", "svd", "--verify"]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False, timeout=120)


@pytest.mark.slow
def test_two_ranks_write_what_one_process_writes(source: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    log = tmp_path / "log"
    body = (
        "import mlaconvert.conversion.from_weights as layers\n"
        "plain = layers.convert_layer\n"
        "def convert_layer(checkpoint, plan, layer, *rest):\n"
        f"    open({str(log)!r}, 'a').write(f'{{os.environ[\"RANK\"]}}:{{layer}}\\n')\n"
        "    return plain(checkpoint, plan, layer, *rest)\n"
        "layers.convert_layer = convert_layer"
    )
    done = launch(source, tmp_path / "out", body)
    assert done.returncode == 0, done.stderr
    assert sorted(log.read_text().split()) == ["0:0", "0:2", "1:1", "1:3"]
    assert kill.snapshot(tmp_path / "out") == expected
    assert done.stdout.count("converted layers") == 1
    assert done.stderr.count("written to") == 1


class Store:
    """A launcher's store, as far as ranks ask it for anything."""

    def __init__(self) -> None:
        self.data: dict[str, str] = {}
        self.counts: dict[str, int] = {}

    def set(self, key: str, value: str) -> None:
        self.data[key] = value

    def get(self, key: str) -> str:
        return self.data[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self.data for key in keys)

    def add(self, key: str, amount: int) -> int:
        self.counts[key] = self.counts.get(key, 0) + amount
        return self.counts[key]


def test_ranks_hear_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store()
    first, second = Ranks(0, 2, store), Ranks(1, 2, store)
    assert (first.share(range(5)), second.share(range(5))) == ([0, 2, 4], [1, 3])
    first.tell("task", {"a": 1})
    assert second.hear("task", 0) == {"a": 1}
    monkeypatch.setattr(ranks, "BEAT", 0.005)
    monkeypatch.setattr(ranks, "PATIENCE", 0.2)
    with second.alive():
        time.sleep(0.05)
        first.check(1)
    assert store.counts["alive/1"] > 0
    with pytest.raises(RankError, match=r"rank 1 has given no sign of life for 0\.2 s; run the same command again"):
        first.hear("done", 1)


def test_a_rank_that_dies_ends_the_run(
    source: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is heard of rank 1; what rank 0 has finished is there for the next run."""
    monkeypatch.setattr(module, "meet", lambda: Ranks(0, 2, Store()))
    monkeypatch.setattr(ranks, "PATIENCE", 0.3)
    with pytest.raises(RankError, match="rank 1 has given no sign of life"):
        convert(source, tmp_path / "out", SVD)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    said: list[str] = []
    convert(source, tmp_path / "out", SVD, say=said.append)
    assert said[0].startswith("going on after 2 finished layers")
    assert kill.snapshot(tmp_path / "out") == expected


def test_layers_that_another_rank_wrote_elsewhere_are_missed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store()
    store.set("done/", "[1, 3]")
    monkeypatch.setattr(module, "meet", lambda: Ranks(0, 2, store))
    monkeypatch.setattr(job, "PATIENCE", 0.2)
    with pytest.raises(RankError, match="layer 1, made by another rank, does not appear there"):
        convert(source, tmp_path / "out", SVD)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("error", "kind"), [(CheckpointError("no such file"), MLAConvertError), (OSError("full"), RankError)]
)
def test_a_rank_that_fails_is_reported_once(monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type) -> None:
    store = Store()
    first, second = Ranks(0, 2, store), Ranks(1, 2, store)
    monkeypatch.setattr(ranks, "REPORT", 0.0)

    def fail(rank: Ranks) -> None:
        with rank.alive():
            raise error

    with pytest.raises(type(error)):  # rank 0 has not said anything
        fail(second)
    with pytest.raises(kind, match=f"rank 1: {error}"):
        first.hear("done", 1)
    with pytest.raises(type(error)):
        fail(first)
    with pytest.raises(SystemExit):  # it has now
        fail(second)


def test_ranks_with_other_tasks_are_refused(own_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store()
    monkeypatch.setattr(module, "meet", lambda: Ranks(0, 2, store))
    interrupted(own_source, tmp_path / "out", 2)
    store.data.pop("failed/0")
    monkeypatch.setattr(module, "meet", lambda: Ranks(1, 2, store))
    monkeypatch.setattr(ranks, "REPORT", 0.0)
    with pytest.raises(ConfigError, match="rank 1 has another kv_rank than rank 0"):
        convert(own_source, tmp_path / "out", ConvertRecipe(init="svd", kv_rank=2))
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(ConfigError, match=r"rank 1 does not see .*elsewhere/\.out\.partial"):
        convert(own_source, tmp_path / "elsewhere" / "out", SVD)
