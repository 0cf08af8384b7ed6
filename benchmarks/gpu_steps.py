"""What `gpu.py` measures: a step in a process of its own, which hands out results, a line of JSON each, as they come.

    python benchmarks/gpu_steps.py chunks-7 [--small]       # what gpu.py starts; results on stdout, the rest on stderr

Weights are random: neither time nor memory depends on them. Latent sides are what conversions of the geometry make:
with an exact present (whole heads, or a past that is read with narrower ones) and with the paper's latent present.
Each is timed against the dense model in back-to-back chunks, dense first in every other pair; a ratio is the median of
dense time / own over the pairs. Windows are full. Peaks of memory are those of one model, its cache and a chunk.
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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import self_forcing
import torch
from healing import real_step
from safetensors.torch import save_file
from scale import write_model

from mlaconvert.config.geometry import WanConfig, default_video
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.recipes import CALIBRATION_FRAMES, mla_config, resolve_recipe
from mlaconvert.conversion.run import convert
from mlaconvert.evaluation.bench.flops import forward_flops, seconds_by_part
from mlaconvert.evaluation.bench.memory import batch_fits, cache_bytes, largest
from mlaconvert.evaluation.bench.rates import attention_rate, matmul_rate
from mlaconvert.evaluation.bench.run import full_window_mode
from mlaconvert.evaluation.bench.runner import ResolvedSetting, Runner, allocated, device_name, release
from mlaconvert.evaluation.bench.setting import GEOMETRIES, BenchSetting, random_model
from mlaconvert.healing.stages import STAGES
from mlaconvert.listener import Listener
from mlaconvert.model.attention.cost import flops_per_byte
from mlaconvert.model.attention.kernel import AttentionMode

ROOT = Path(__file__).parents[1]
WINDOWS = (7, 21)
LARGE = ((60, 104), 4, 5)  # latent pixels, passes before the clean one, pairs of chunks
SMALL = ((8, 12), 1, 2)
SMALL_CONFIG = dataclasses.replace(GEOMETRIES["1.3b"], dim=96, num_heads=2, num_layers=2, ffn_dim=128)
SMALL_BATCH = 3  # where a search for the largest batch ends on a CPU
WHOLE, PAPER = "exact present, whole heads", "latent present"
CLIPS, REFIT_STEPS = 5, 5  # of the conversion: the fewest clips, and so many steps that the rest can be counted
Emit = Callable[[str, Mapping[str, Any]], None]  # is given each result with its name; one of the same name replaces it


@dataclass(frozen=True, kw_only=True)
class Case:
    """What all steps run on, and with; `size` is in latent pixels, `checkout` a clone of the published code."""

    small: bool
    config: WanConfig
    size: tuple[int, int]
    steps: int
    rounds: int
    device: torch.device
    dtype: torch.dtype
    checkout: Path | None = None

    @classmethod
    def of(cls, *, small: bool, checkout: Path | None = None) -> Case:
        """On the GPU that is there; a CPU runs the small case only."""
        cuda = torch.cuda.is_available()
        if not cuda and not small:
            sys.exit("no CUDA device here; --small runs the same code on a CPU")
        size, steps, rounds = SMALL if small else LARGE
        return cls(
            small=small,
            config=SMALL_CONFIG if small else GEOMETRIES["1.3b"],
            size=size,
            steps=steps,
            rounds=rounds,
            device=torch.device("cuda" if cuda else "cpu"),
            dtype=torch.bfloat16 if cuda else torch.float32,
            checkout=checkout,
        )

    def resolved(self, window: int) -> ResolvedSetting:
        """The setting of a window of so many latent frames."""
        config = self.config
        streaming = StreamingConfig(window_frames=window)
        setting = BenchSetting(streaming=streaming, steps=self.steps, rounds=self.rounds, device=str(self.device))
        return ResolvedSetting(
            setting=setting,
            device=self.device,
            dtype=self.dtype,
            streaming=streaming,
            height=self.size[0],
            width=self.size[1],
            frame_tokens=config.tokens_per_frame(*self.size),
            context=torch.zeros(1, config.text_len, config.text_dim, device=self.device, dtype=self.dtype),
        )

    def narrow(self, eighths: int) -> str:
        """The name of the side whose past is read with so much of each head."""
        head = self.config.head_dim
        return f"exact present, past's heads {eighths * head // 8} of {head}"

    def sides(self, window: int) -> dict[str, WanConfig]:
        """The dense geometry and the latent ones: 96, 80 and 64 of heads of 128, a quarter head rotated."""
        dense = dataclasses.replace(self.config, streaming=StreamingConfig(window_frames=window))
        unit = dense.head_dim // 8
        recipes = {WHOLE: ConvertRecipe()}
        for eighths in (6, 5, 4):
            recipes[self.narrow(eighths)] = ConvertRecipe(
                nope_dim=(eighths - 2) * unit, rope_dim=2 * unit, v_dim=eighths * unit
            )
        recipes[PAPER] = ConvertRecipe(init="svd")
        sides = {"dense": dense}
        for name, recipe in recipes.items():
            resolved = resolve_recipe(dataclasses.replace(recipe, **self.pixels), dense)
            sides[name] = dataclasses.replace(dense, mla=mla_config(resolved, dense))
        return sides

    @property
    def pixels(self) -> dict[str, Any]:
        """Height and width of the video, as recipes have them."""
        stride = default_video(self.config).vae_stride
        return {"height": self.size[0] * stride, "width": self.size[1] * stride}


def environment(case: Case, commit: str | None) -> dict[str, Any]:
    """What every result is of. Without a given `commit`, git is asked; "+" stands for changes that are in none."""
    found = commit or self_forcing.commit(ROOT)
    if found is not None and commit is None:
        status = ["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"]
        found += "+" if subprocess.run(status, capture_output=True, check=False).stdout.strip() else ""
    return {
        "device": device_name(case.device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "dtype": str(case.dtype).removeprefix("torch."),
        "commit": found,
        "small": case.small,
    }


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


def chunks(case: Case, emit: Emit, *, window: int, compiled: bool = False) -> None:
    """Every latent side against dense, and the modes of attention of those that have several."""
    resolved, configs = case.resolved(window), case.sides(window)
    sides = [WHOLE, case.narrow(5), PAPER]
    modes = sides[1:]
    if compiled and case.small:  # compiling takes a CPU as long as it does for any size
        sides = sides[:1]
    elif not compiled:
        sides = [WHOLE, case.narrow(5), case.narrow(6), case.narrow(4), PAPER]
        modes = sides[1:] if window == WINDOWS[0] else modes
    dense = _Timed("dense", configs["dense"], resolved, compiled=compiled)
    alone = [dense.runner.chunk() for _ in range(case.rounds)]
    profiled = window == WINDOWS[0] and not compiled
    _emit(emit, "dense, dense", dense.figures(alone), dense if profiled else None)
    for name in sides:
        side = _Timed(name, configs[name], resolved, compiled=compiled)
        _emit(emit, f"{name}, auto", _paired(dense, side, case.rounds), side if profiled else None)
        for mode in ("expanded", "absorbed") if name in modes and not compiled else ():
            side.set_mode(mode)
            emit(f"{name}, {mode}", _paired(dense, side, case.rounds))
        del side
        release()


class _Timed:
    """A runner whose window is full, and what was measured on the way there."""

    def __init__(self, name: str, config: WanConfig, resolved: ResolvedSetting, *, compiled: bool) -> None:
        self.held = allocated(resolved.device)  # by others
        self.config, self.resolved = config, resolved
        # Every length of the window would be compiled, too, so that happens when it is full.
        self.runner = Runner(name, config, resolved, compiled=False)
        self.first: float | None = None
        self.compile_seconds: float | None = None
        self.runner.begin()
        self.runner.chunk()  # to warm up
        if not compiled:
            self.runner.begin()
            self.first = self.runner.chunk()
        for _ in range(resolved.filling - 1):
            self.runner.chunk()
        if compiled:
            self.runner.model.compile_blocks()
            self.compile_seconds = self.runner.chunk() + self.runner.chunk()
        self.peak_bytes = self._peak()

    def set_mode(self, mode: AttentionMode) -> None:
        """Have latent attention compute in another way from the next chunk on."""
        self.resolved = dataclasses.replace(
            self.resolved, setting=dataclasses.replace(self.resolved.setting, attention=mode)
        )
        self.runner.model.attention_mode = mode
        self.peak_bytes = self._peak()

    def _peak(self) -> int | None:
        """Of a chunk, which also warms up."""
        if self.resolved.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.resolved.device)
        self.runner.chunk()
        if self.resolved.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.resolved.device) - self.held
        return None

    def figures(self, times: list[float]) -> dict[str, Any]:
        """Times in seconds, memory in bytes, FLOPs of a chunk (two a multiplication and addition)."""
        config, resolved = self.config, self.resolved
        flops = forward_flops(
            config,
            queries=resolved.chunk_tokens,
            keys=resolved.window_tokens,
            mode=resolved.setting.attention,
            itemsize=resolved.dtype.itemsize,
            flops_per_byte=flops_per_byte(resolved.device),
        )
        cache, text = cache_bytes(resolved, config)
        seconds = statistics.median(times)
        return {
            "mode": "dense" if config.mla is None else full_window_mode(resolved, config),
            "chunk": seconds,
            "chunk_spread": [min(times), max(times)],
            "frames_per_second": resolved.streaming.chunk_frames * default_video(config).frame_stride / seconds,
            "first_chunk": self.first,
            "compile_seconds": self.compile_seconds,
            "flops": (resolved.setting.steps + 1) * sum(flops.values()),
            "cache_bytes": cache,
            "text_bytes": text,
            "weight_bytes": self.runner.weight_bytes,
            "peak_bytes": self.peak_bytes,
        }


def _paired(dense: _Timed, side: _Timed, rounds: int) -> dict[str, Any]:
    """The side's figures from chunks back to back with dense ones."""
    times: dict[_Timed, list[float]] = {dense: [], side: []}
    for turn in range(rounds):
        for timed in (dense, side) if turn % 2 == 0 else (side, dense):
            times[timed].append(timed.runner.chunk())
    ratios = [theirs / own for theirs, own in zip(times[dense], times[side], strict=True)]
    found = {"speedup": statistics.median(ratios), "speedup_spread": [min(ratios), max(ratios)]}
    return side.figures(times[side]) | found | {"dense_chunk": statistics.median(times[dense])}


def _emit(emit: Emit, name: str, found: dict[str, Any], profiled: _Timed | None) -> None:
    """A side's figures, and once more with seconds of a chunk by part."""
    emit(name, found)
    if profiled is not None:
        runner = profiled.runner
        parts = seconds_by_part(runner.model, runner.chunk, profiled.resolved.device, compiled=False)
        emit(name, found | {"profile": parts})


def batches(case: Case, emit: Emit) -> None:
    """The largest batches that fit: video by video, where the cache sets the limit, then in one pass."""
    for sliced in (True, False):
        for window in WINDOWS:
            configs = case.sides(window)
            for name in ("dense", WHOLE, case.narrow(5), PAPER):
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
        clips.mkdir()
        shape = (CLIPS, case.config.out_dim, CALIBRATION_FRAMES, *case.size)
        draw = torch.Generator().manual_seed(0)
        latents, context = (
            torch.randn(shape, generator=draw),
            torch.randn(CLIPS, 8, case.config.text_dim, generator=draw),
        )
        save_file({"latents": latents, "context": context}, clips / "clips.safetensors")
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
    on = environment(case, arguments.commit)

    def emit(name: str, result: Mapping[str, Any]) -> None:
        print(json.dumps({"name": name, "result": dict(result) | {"on": on}}), file=results, flush=True)

    STEPS[arguments.step](case, emit)


if __name__ == "__main__":
    main()
