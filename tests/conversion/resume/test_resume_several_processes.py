"""Conversions that are interrupted, killed or shared between processes end with the bytes of one that ran alone."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from resume_cases import ENVIRONMENT, SVD, interrupted, kill

from mlaconvert.conversion import job, ranks
from mlaconvert.conversion import run as module
from mlaconvert.conversion.ranks import RankError, Ranks
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.run import convert
from mlaconvert.errors import CheckpointError, ConfigError, MLAConvertError
from mlaconvert.listener import Listener


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
    convert(source, tmp_path / "out", SVD, listener=Listener(say=said.append))
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
