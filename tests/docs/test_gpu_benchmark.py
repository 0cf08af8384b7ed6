"""The program that measures on a GPU: what a run keeps when steps hang, fail or are cut short, and its tables."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu  # noqa: E402
from gpu_case import LARGE, PAPER, WHOLE, Case  # noqa: E402
from tables import MISSING, gpu_tables  # noqa: E402

from mlaconvert.evaluation.bench.flops import forward_flops  # noqa: E402
from mlaconvert.evaluation.bench.setting import GEOMETRIES  # noqa: E402

ON = {"device": "card", "torch": "2", "cuda": "12", "dtype": "bfloat16", "commit": "0123456789abcdef+", "small": False}
SAY = f"""
import json, sys, time
def say(name, value, on={{}}):
    print(json.dumps({{"name": name, "result": {{"value": value, "on": {ON} | on}}}}), flush=True)
"""


def command(code: str) -> list[str]:
    """A step that does this; `say(name, value)` hands out a result."""
    return [sys.executable, "-c", SAY + code]


def run(path: Path, steps: dict[str, str], again: tuple[str, ...] = (), whole: float = 600, each: float = 300) -> int:
    record = gpu.Record(path)
    commands = {step: command(code) for step, code in steps.items()}
    limits = dict.fromkeys(steps, each) | {"hangs": 8.0}
    return gpu.run(commands, limits, record, whole=whole, again=set(again))


def kept(path: Path) -> dict[str, Any]:
    """Each step's status, and its results by name."""
    steps = json.loads(path.read_text())["steps"]
    values = {step: {name: each["value"] for name, each in found["results"].items()} for step, found in steps.items()}
    return {step: (found["status"], values[step]) for step, found in steps.items()}


@pytest.mark.slow
def test_a_step_that_hangs_or_dies_ends_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, pid = tmp_path / "new" / "gpu.json", tmp_path / "pid"
    hangs = f"""
import subprocess
say("before", 1)
open({str(pid)!r}, "w").write(str(subprocess.Popen(["sleep", "900"]).pid))
time.sleep(900)
"""
    steps = {
        "hangs": hangs,
        "killed": "import os; say('one', 2); os.kill(os.getpid(), 9)",
        "fails": "say('one', 3); sys.exit('RuntimeError: out of memory')",
        "good": "print('a library says hello', flush=True); say('one', 4); say('two', 5)",
    }
    assert run(path, steps) == 1
    assert kept(path) == {
        "hangs": ("cut short", {"before": 1}),
        "killed": ("failed", {"one": 2}),
        "fails": ("failed", {"one": 3}),
        "good": ("done", {"one": 4, "two": 5}),
    }
    found = json.loads(path.read_text())["steps"]
    assert found["killed"]["message"] == "killed by signal 9"
    assert found["fails"]["message"] == "RuntimeError: out of memory"
    assert found["hangs"]["message"] == "not finished within 8 s"
    assert found["good"]["results"]["two"]["on"] == ON
    assert [each.name for each in path.parent.iterdir()] == ["gpu.json"]
    assert "good: two" in capsys.readouterr().err
    while runs(int(pid.read_text())):  # what a step had started ends with it
        time.sleep(0.05)


def runs(pid: int) -> bool:
    """Whether a process is there and does not only wait to be asked how it ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_result_is_in_the_file_while_its_step_still_works(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    waits = f"""
from pathlib import Path
say("first", 1)
path = Path({str(path)!r})
while not path.exists() or "first" not in json.loads(path.read_text())["steps"]["waits"]["results"]:
    time.sleep(0.05)
say("second", 2)
"""
    assert run(path, {"waits": waits}) == 0
    assert kept(path) == {"waits": ("done", {"first": 1, "second": 2})}


def test_what_is_done_is_not_run_again_unless_asked(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    assert run(path, {"a": "say('x', 1); say('y', 2)", "b": "say('x', 3); say('old', 4); sys.exit(1)"}) == 1
    assert run(path, {"a": "say('x', 10)", "b": "say('x', 30); sys.exit(1)"}) == 1
    assert kept(path) == {"a": ("done", {"x": 1, "y": 2}), "b": ("failed", {"x": 30, "old": 4})}
    assert run(path, {"a": "say('x', 10)", "b": "say('x', 31)"}, again=("a",)) == 0
    assert kept(path) == {"a": ("done", {"x": 10}), "b": ("done", {"x": 31})}  # of one try, when that was whole


def test_a_run_without_time_begins_no_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "gpu.json", {"a": "say('x', 1)"}, whole=gpu.LEAST - 1) == 1
    assert not (tmp_path / "gpu.json").exists()
    assert "a: no time left" in capsys.readouterr().err


def test_a_file_holds_one_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gpu.json"
    assert run(path, {"device": "say('x', 1)"}) == 0
    before = path.read_bytes()
    for change in ({"device": "other card"}, {"small": True}):
        with pytest.raises(SystemExit) as ended:
            run(path, {"device": f"say('x', 2, {change})"}, again=("device",))
        assert ended.value.code == 2
        assert "name another --output" in capsys.readouterr().err
        assert path.read_bytes() == before
    assert run(tmp_path / "none.json", {"device": "sys.exit('no CUDA device')", "a": "say('x', 1)"}) == 1
    assert not (tmp_path / "none.json").exists()


@pytest.mark.parametrize("text", ["", "[]", '{"steps": 3}', '{"steps": {"device": {}}}', "\x00"])
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    found = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "gpu.py", "--small", "--output", path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 2
    assert "name another --output" in found.stderr
    assert "Traceback" not in found.stderr
    assert path.read_text() == text


def test_a_run_that_is_ended_ends_its_step(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    code = f"""
import sys; sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import gpu, signal
signal.signal(signal.SIGTERM, gpu.stop)
code = {SAY + "import os; say('pid', os.getpid()); time.sleep(900)"!r}
record = gpu.Record(gpu.Path({str(path)!r}))
gpu.run({{"a": [sys.executable, "-c", code]}}, {{"a": 300}}, record, whole=300, again=set())
"""
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL) as process:
        while not path.exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
    assert process.returncode == 143
    assert not runs(kept(path)["a"][1]["pid"])


def test_the_sides_are_those_whose_work_is_counted() -> None:
    """One pass, relative to dense: BENCHMARKS.md's table of widths beside an exact present."""
    size, steps, rounds = LARGE
    case = Case(
        small=False,
        config=GEOMETRIES["1.3b"],
        size=size,
        steps=steps,
        rounds=rounds,
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
    )
    page = (ROOT / "BENCHMARKS.md").read_text()
    for window, column in ((7, 2), (21, 4)):
        resolved, sides = case.resolved(window), case.sides(window)
        queries, keys = resolved.chunk_tokens, resolved.window_tokens
        assert (queries, keys) == (4680, 1560 * window)
        flops = {name: sum(forward_flops(each, queries=queries, keys=keys).values()) for name, each in sides.items()}
        for name, row in ((WHOLE, "128 "), (case.narrow(6), "96 "), (case.narrow(5), "80 "), (case.narrow(4), "64 ")):
            cells = re.search(rf"^\| {row}\([^|]*\|(.*)\|$", page, re.MULTILINE)
            assert cells is not None
            assert f"{flops[name] / flops['dense']:.2f}" == cells[1].split("|")[column - 1].strip()
        paper = sides[PAPER].mla
        assert paper is not None
        assert (paper.present, paper.rope, paper.q_lora_rank) == ("latent", "cached", 768)


# --- tables ----------------------------------------------------------------------------------------------------------


def timed(chunk: float, **more: Any) -> dict[str, Any]:
    figures = {"mode": "expanded", "chunk": chunk, "first_chunk": 0.5, "flops": 200, "cache_bytes": 3 << 30}
    return figures | {"peak_bytes": None, "on": ON} | more


def test_tables_of_what_was_found() -> None:
    ratios = {"speedup": 1.25, "speedup_spread": [1.2, 1.31]}
    data = {
        "steps": {
            "chunks-21": {
                "status": "cut short",
                "message": "not finished within 110 s",
                "results": {"dense, dense": timed(0.5), "narrow, auto": timed(0.4, flops=150, **ratios)},
            },
            "compiled-21": {"status": "done", "results": {"narrow, auto": timed(0.31, **(ratios | {"speedup": 1.5}))}},
            "batches": {
                "status": "done",
                "results": {
                    "a": {"window": 7, "side": "dense", "way": "video by video", "batch": 31, "on": ON},
                    "b": {"window": 7, "side": "dense", "way": "one pass", "batch": 17, "on": ON},
                },
            },
        }
    }
    found = gpu_tables(data)
    assert found["gpu: chunks"].splitlines()[:2] == [
        "card, torch 2, CUDA 12, bfloat16, commit 0123456789+.",
        "`chunks-21` did not come to its end: not finished within 110 s.",
    ]
    row = "| 21 | narrow | auto: expanded | 400 ms | 500 ms | 1.25 | 1.20 to 1.31 | 310 ms | 1.50 | 0.75 | 3 GiB | - |"
    assert row in found["gpu: chunks"].splitlines()
    assert "| 7 | dense | 31 | 17 |" in found["gpu: batches"].splitlines()
    assert found["gpu: healing"] == MISSING


def test_the_page_has_what_is_kept() -> None:
    kept_results = ROOT / "benchmarks" / "results" / "gpu.json"
    data = json.loads(kept_results.read_text()) if kept_results.is_file() else {}
    page = (ROOT / "BENCHMARKS.md").read_text()
    for name, text in gpu_tables(data).items():
        assert f"<!-- {name} -->\n{text}\n<!-- end of {name} -->\n" in page, "run benchmarks/tables.py --write"


# --- the steps -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_small_run_measures_what_the_large_one_does(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    steps = ["chunks-7", "healing", "batches", "conversion"]  # compiling takes a CPU minutes
    flags = ["--small", "--only", ",".join(steps), "--output", path, "--commit", "abc"]
    found = subprocess.run([sys.executable, ROOT / "benchmarks" / "gpu.py", *flags], capture_output=True, check=False)
    assert found.returncode == 0, found.stderr.decode()
    data = json.loads(path.read_text())
    assert list(data["steps"]) == ["device", *steps]
    assert {each["status"] for each in data["steps"].values()} == {"done"}
    results = {step: each["results"] for step, each in data["steps"].items()}
    for each in results.values():
        for result in each.values():
            assert result["on"]["commit"] == "abc"
            assert result["on"]["torch"] == torch.__version__
    assert len(results["chunks-7"]) == 4 + 4 * 3  # dense, narrowed, whole heads, in bits; the others in each mode
    modes = ("auto", "expanded", "absorbed")
    auto, expanded, absorbed = (results["chunks-7"][f"latent present, {mode}"] for mode in modes)
    assert auto["flops"] in (expanded["flops"], absorbed["flops"])
    assert expanded["flops"] != absorbed["flops"]
    assert list(results["healing"]) == ["distill", "teacher-forcing", "consistency", "dmd"]
    assert len(results["batches"]) == 2 * 6 * 2
    assert results["conversion"]["conversion"]["layers"] == 2
    assert results["conversion"]["so far"]["stages"]["calibrate"]["done"] == 2
    tables = gpu_tables(data)
    missing = {name for name, text in tables.items() if text == MISSING}
    assert missing == {"gpu: tests", "gpu: published"}
