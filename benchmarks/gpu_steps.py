"""What `gpu.py` measures: a step in a process of its own, which hands out results, a line of JSON each, as they come.

    python benchmarks/gpu_steps.py chunks-7 [--small]       # what gpu.py starts; results on stdout, the rest on stderr

Weights are random: neither time nor memory depends on them. Latent sides are what conversions of the geometry make:
with an exact present (whole heads, or a past that is read with narrower ones) and with the paper's latent present.
"""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import self_forcing
import torch
from gpu_case import IN_BITS, PAPER, QUANTISED, ROOT, WHOLE, WINDOWS, Case, Emit, environment
from gpu_chunks import chunks
from healing import real_step
from scale import write_clips, write_model

from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.recipes import CALIBRATION_FRAMES
from mlaconvert.conversion.run import convert
from mlaconvert.evaluation.bench.memory import batch_fits, largest
from mlaconvert.evaluation.bench.runner import Runner, release
from mlaconvert.evaluation.bench.setting import random_model
from mlaconvert.healing.stages import STAGES
from mlaconvert.listener import Listener
from mlaconvert.model.rates import attention_rate, matmul_rate

SMALL_BATCH = 3  # where a search for the largest batch ends on a CPU
CLIPS, REFIT_STEPS = 5, 5  # of the conversion: the fewest clips, and so many steps that the rest can be counted
DTYPES = {"healing": torch.bfloat16, "conversion": torch.float32}  # of steps that choose their own


def device(case: Case, emit: Emit) -> None:
    """How fast the device itself is: FLOPs a second of matrix products, and of attention at the dense side's shape."""
    cuda = case.device.type == "cuda"
    memory = torch.cuda.get_device_properties(case.device).total_memory if cuda else None
    found: dict[str, Any] = {"memory_bytes": memory}
    emit("device", found)
    found["matmul_rate"] = matmul_rate(case.device, case.dtype)
    emit("device", found)
    resolved = case.resolved(WINDOWS[0])
    keys = resolved.window_tokens
    found["attention_rate"] = attention_rate(case.config, resolved.chunk_tokens, keys, case.device, case.dtype)
    emit("device", found)


def tests(case: Case, emit: Emit) -> None:
    """How the tests that need a GPU come out. Without a GPU they are skipped, and counted as that."""
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-n", "0", "-p", "no:cacheprovider"]
        code = subprocess.run([*command, f"--junitxml={report}", *map(str, files)], cwd=ROOT, check=False).returncode
        if not report.is_file():
            raise RuntimeError(f"pytest ended with exit code {code} and no report")
        suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    counts = {
        name: sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "failures", "errors", "skipped")
    }
    bad = [
        f"{test.get('classname')}.{test.get('name')}: {(found.get('message') or '').splitlines()[:1]}"
        for suite in suites
        for test in suite.iter("testcase")
        for found in (*test.findall("failure"), *test.findall("error"))
    ]
    emit("tests", counts | {"failed": bad})
    if bad:
        raise RuntimeError(f"{len(bad)} of {counts['tests']} tests failed, the first: {bad[0]}")


def batches(case: Case, emit: Emit) -> None:
    """The largest batches that fit: video by video, where the cache sets the limit, then in one pass."""
    for sliced in (True, False):
        for window in WINDOWS:
            configs = case.sides(window)
            for name in ("dense", QUANTISED, WHOLE, IN_BITS, case.narrow(5), PAPER):
                runner = Runner(name, configs[name], case.resolved(window), compiled=False)
                found = _largest(runner, sliced)
                way = "video by video" if sliced else "one pass"
                emit(f"window {window}, {name}, {way}", {"window": window, "side": name, "way": way, "batch": found})
                del runner
                release()


def _largest(runner: Runner, sliced: bool) -> int:
    cuda = runner.resolved.device.type == "cuda"  # a CPU is not filled up to find out
    return largest(lambda batch: (cuda or batch <= SMALL_BATCH) and batch_fits(runner, sliced, batch))


def healing(case: Case, emit: Emit) -> None:
    """One step of each stage; one that does not fit leaves the others be."""
    failed = []
    for stage in STAGES:
        try:
            emit(stage, dataclasses.asdict(real_step(stage, case.small)))
        except torch.cuda.OutOfMemoryError as error:
            failed.append(f"{stage}: {str(error).splitlines()[0]}")
        release()
    if failed:
        raise RuntimeError("; ".join(failed))


def conversion(case: Case, emit: Emit) -> None:
    """A calibrated conversion of a file in the published layout, with random weights and clips of the usual size."""
    streaming = StreamingConfig()
    with tempfile.TemporaryDirectory() as name:
        source, clips = Path(name) / "source", Path(name) / "clips"
        began = time.perf_counter()
        write_model(source, case.config, torch.float32)
        shape = (CLIPS, case.config.out_dim, CALIBRATION_FRAMES, *case.size)
        write_clips(clips, shape, case.config.text_dim)
        emit("source and clips", {"seconds": time.perf_counter() - began, "clips": list(shape)})
        parts = _Parts(case.device, emit)
        recipe = ConvertRecipe(streaming=streaming, clips=CLIPS, refit_steps=REFIT_STEPS, **case.pixels)
        began = time.perf_counter()
        report = convert(
            source,
            Path(name) / "output",
            recipe,
            data=clips,
            device=case.device,
            listener=Listener(progress=parts, say=lambda line: print(line, file=sys.stderr)),
        )
        seconds = time.perf_counter() - began
        emit("so far", parts.report())
        made = report.models[0]
        emit(
            "conversion",
            {
                "seconds": seconds,
                "parts": dict(made.seconds),
                "peak_bytes": parts.peak_bytes(),
                "refit_steps": REFIT_STEPS,
                "layers": len(made.layers),
            },
        )


class _Parts:
    """Listens to a conversion: how far each stage is, seconds since it began, and the peak of memory up to there."""

    def __init__(self, device: torch.device, emit: Emit, every: float = 2.0) -> None:
        self.device, self.emit, self.every = device, emit, every
        self.stages: dict[str, dict[str, Any]] = {}
        self.said = 0.0
        self.began: dict[str, float] = {}
        self.lock = threading.Lock()

    def __call__(self, stage: str, done: int, total: int, _note: str = "", /) -> None:
        with self.lock:
            now = time.perf_counter()
            found = self.stages.setdefault(stage, {"done": 0, "total": 0, "seconds": 0.0, "peak_bytes": None})
            began = self.began.setdefault(stage, now)
            found |= {"done": done, "total": total, "seconds": now - began}
            if self.device.type == "cuda" and threading.current_thread() is threading.main_thread():
                found["peak_bytes"] = max(found["peak_bytes"] or 0, torch.cuda.max_memory_allocated(self.device))
                torch.cuda.reset_peak_memory_stats(self.device)  # so that the next stage has its own
            if now - self.said > self.every:
                self.said = now
                self.emit("so far", self.report())

    def peak_bytes(self) -> int | None:
        """Of all stages and of what came after the last report."""
        if self.device.type != "cuda":
            return None
        stages = (found["peak_bytes"] or 0 for found in self.stages.values())
        return max(torch.cuda.max_memory_allocated(self.device), *stages)

    def report(self) -> dict[str, Any]:
        """A copy of what is known."""
        return {"stages": {name: dict(found) for name, found in self.stages.items()}}


def published(case: Case, emit: Emit) -> None:
    """Our sides beside the published Self-Forcing code, in turn in one run, once both are seen to compute the same."""
    if case.checkout is None:
        raise RuntimeError("no checkout of the published code was given")
    code = self_forcing.published_code(case.checkout)
    checked = self_forcing.check(code, case.device)
    emit("check", dataclasses.asdict(checked) | {"published_commit": self_forcing.commit(case.checkout)})
    if not checked.passed:
        raise RuntimeError("the two sides do not compute the same, so no ratio is fair")
    for window in WINDOWS:
        resolved, configs = case.resolved(window), case.sides(window)
        shared = self_forcing.Case(
            config=configs["dense"],
            streaming=resolved.streaming,
            size=case.size,
            batch=1,
            timesteps=tuple(round(1000 * (1 - i / case.steps)) for i in range(case.steps)),
            device=case.device,
            dtype=case.dtype,
        )
        names = ("dense", WHOLE, case.narrow(5), PAPER)
        models = {name: random_model(configs[name], case.device, case.dtype) for name in names}
        theirs = self_forcing.Published(code, models["dense"], shared)
        times = self_forcing.take_turns(shared, models, theirs, case.rounds)
        for name, own in times.items():
            ratios = [a / b for a, b in zip(times[self_forcing.THEIRS], own, strict=True)]
            emit(
                f"window {window}, {name}",
                {
                    "window": window,
                    "side": name,
                    "chunk": statistics.median(own),
                    "speedup": statistics.median(ratios),
                    "speedup_spread": [min(ratios), max(ratios)],
                },
            )
        del models, theirs
        release()


STEPS: dict[str, Callable[[Case, Emit], None]] = {
    "device": device,
    "tests": tests,
    "chunks-7": partial(chunks, window=7),
    "chunks-21": partial(chunks, window=21),
    "compiled-7": partial(chunks, window=7, compiled=True),
    "healing": healing,
    "batches": batches,
    "conversion": conversion,
    "compiled-21": partial(chunks, window=21, compiled=True),
    "published": published,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--small", action="store_true", help="the same code at a size for a CPU")
    parser.add_argument("--self-forcing", type=Path, help="a clone of the published code, for the step `published`")
    parser.add_argument("--commit", help="what to note as the commit (default: git's)")
    parser.add_argument("--seconds", type=float, help="after which every thread's stack is shown, where it hangs")
    arguments = parser.parse_args()
    if arguments.seconds is not None:
        faulthandler.dump_traceback_later(arguments.seconds)
    # Whatever else is printed is no result.
    results = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    case = Case.of(small=arguments.small, checkout=arguments.self_forcing)
    on = environment(dataclasses.replace(case, dtype=DTYPES.get(arguments.step, case.dtype)), arguments.commit)

    def emit(name: str, result: Mapping[str, Any]) -> None:
        print(json.dumps({"name": name, "result": dict(result) | {"on": on}}), file=results, flush=True)

    STEPS[arguments.step](case, emit)


if __name__ == "__main__":
    main()
