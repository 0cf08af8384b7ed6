"""Dense and latent attention of one geometry, measured in turn in one run: speed, latency, memory, and where time goes.

Weights are random: neither time nor memory depends on them. Ratios are what such a run can claim; absolute times belong
to the device that the report names.
"""

from __future__ import annotations

import dataclasses
import gc
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler import profile

from mlaconvert.config.geometry import WanConfig, default_video
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.errors import ConfigError
from mlaconvert.evaluation.bench.flops import SCOPE, forward_flops, part_of_model, scopes
from mlaconvert.evaluation.bench.rates import attention_rate, matmul_rate, synchronize
from mlaconvert.evaluation.bench.setting import BenchReport, BenchSetting, Side, random_model, side_configs
from mlaconvert.model.attention.cost import cheaper_mode, flops_per_byte
from mlaconvert.model.cache import LatentCache
from mlaconvert.model.memory import plan_memory
from mlaconvert.model.rollout import rollout
from mlaconvert.model.schedule import Sampler

# progress(done, total, what is being measured)
Progress = Callable[[int, int, str], None]


def bench(setting: BenchSetting, progress: Progress | None = None) -> BenchReport:
    """Measure every side of `setting`. Raises ConfigError for a setting that is impossible."""
    return _Bench(setting, progress or _silent).run()


class _Runner:
    """A model and its rollout, one chunk at a time."""

    def __init__(self, name: str, config: WanConfig, bench: _Bench, *, compiled: bool) -> None:
        self.name, self.config, self.bench = name, config, bench
        before = _allocated(bench.device)
        self.model = random_model(config, bench.device, bench.dtype)
        parameters = sum(p.nbytes for p in self.model.parameters())
        self.weight_bytes = _allocated(bench.device) - before if bench.device.type == "cuda" else parameters
        self.model.attention_mode = bench.setting.attention
        if compiled:
            self.model.compile_blocks()
        self.video: Iterator[Tensor] = iter(())
        self.times: list[float] = []
        self.first = 0.0

    def begin(self) -> None:
        """A new video."""
        bench, setting = self.bench, self.bench.setting
        self.video = rollout(
            self.model,
            bench.context,
            frames=bench.streaming.chunk_frames * 10**6,
            height=bench.size[0],
            width=bench.size[1],
            sampler=Sampler.few_step(tuple(1000 * (1 - i / setting.steps) for i in range(setting.steps))),
            streaming=bench.streaming,
            slice_size=setting.slice_size,
            keeps_text=setting.keeps_text,
        )

    def chunk(self) -> float:
        """Seconds of the next chunk."""
        synchronize(self.bench.device)
        start = time.perf_counter()
        next(self.video)
        synchronize(self.bench.device)
        return time.perf_counter() - start


class _Bench:
    def __init__(self, setting: BenchSetting, progress: Progress) -> None:
        self.setting, self.progress = setting, progress
        try:
            self.device = torch.device(setting.device)
            torch.zeros(1, device=self.device).item()
        except Exception as error:  # torch raises whatever its backends raise
            reason = (str(error).strip().splitlines() or [""])[0]
            raise ConfigError(f"device {setting.device!r} cannot be used ({reason[:200]}); use cpu or cuda") from None
        self.dtype = setting.dtype or (torch.float32 if self.device.type == "cpu" else torch.bfloat16)
        self.configs = side_configs(setting)
        dense = self.configs["dense"]
        if dense.in_dim != dense.out_dim:
            raise ConfigError("an image-to-video geometry is not measured; take the text-to-video one of its size")
        video = default_video(dense)
        self.stride, self.vae = video.frame_stride, video.vae_stride
        self.pixels = (setting.height or video.height, setting.width or video.width)
        self.streaming = dense.streaming or StreamingConfig()
        # Says what is wrong with a size before anything runs.
        self.plans = {name: self._plan(config) for name, config in self.configs.items()}
        self.size = (self.pixels[0] // self.vae, self.pixels[1] // self.vae)
        self.tokens = dense.tokens_per_frame(*self.size)
        self.context = torch.zeros(setting.batch, dense.text_len, dense.text_dim, device=self.device, dtype=self.dtype)
        self.filling = -(-self.streaming.window_frames // self.streaming.chunk_frames) + 1
        self.done, self.total = 0, len(self.configs) * (2 * self.filling + setting.rounds + 1) + 1

    def _plan(self, config: WanConfig) -> Any:
        return plan_memory(
            dataclasses.replace(config, mla=None),
            config.mla,
            height=self.pixels[0],
            width=self.pixels[1],
            window_frames=self.streaming.window_frames,
            batch=self.setting.batch,
            cache_itemsize=self.dtype.itemsize,
            weight_itemsize=self.dtype.itemsize,
            vae_stride=(self.stride, self.vae, self.vae),
        )

    def step(self, note: str) -> None:
        self.done += 1
        self.progress(self.done, self.total, note)

    def run(self) -> BenchReport:
        queries = self.streaming.chunk_frames * self.tokens
        keys = self.streaming.window_frames * self.tokens
        ceilings = [self._ceilings(queries, keys)]
        self.step("ceilings")
        runners = [_Runner(name, config, self, compiled=self.setting.compile) for name, config in self.configs.items()]
        for runner in runners:
            runner.begin()
            for _ in range(self.filling):  # also compiles every shape
                runner.chunk()
                self.step(f"{runner.name}: warming up")
        for runner in runners:
            runner.begin()
            runner.first = runner.chunk()
            for _ in range(self.filling - 1):
                runner.chunk()
                self.step(f"{runner.name}: filling the window")
        for turn in range(self.setting.rounds):
            for runner in runners if turn % 2 == 0 else reversed(runners):
                runner.times.append(runner.chunk())
                self.step(f"round {turn + 1} of {self.setting.rounds}: {runner.name}")
        peaks = [self._peak(runner) for runner in runners]
        profiles = []
        for runner in runners:
            profiles.append(self._profile(runner))
            self.step(f"{runner.name}: profile")
        weights = {runner.name: runner.weight_bytes for runner in runners}
        times = {runner.name: (runner.first, runner.times) for runner in runners}
        del runners, runner
        # Once more: on a machine with other work, a ceiling is the better of two.
        ceilings.append(self._ceilings(queries, keys))
        matmul, attention = map(max, zip(*ceilings, strict=True))
        batches = [self._largest_batches(name, config) for name, config in self.configs.items()]
        sides = tuple(
            self._side(name, times, weights[name], peak, profile, batch)
            for name, peak, profile, batch in zip(self.configs, peaks, profiles, batches, strict=True)
        )
        return BenchReport(
            device=_device_name(self.device),
            dtype=str(self.dtype).removeprefix("torch."),
            torch_version=torch.__version__,
            setting={
                "geometry": self.setting.geometry,
                "pixels": list(self.pixels),
                "tokens_per_frame": self.tokens,
                "batch": self.setting.batch,
                "slice_size": self.setting.slice_size,
                "steps": self.setting.steps,
                "rounds": self.setting.rounds,
                "compile": self.setting.compile,
                "attention": self.setting.attention,
                "keeps_text": self.setting.keeps_text,
                "threads": torch.get_num_threads(),
                **dataclasses.asdict(self.streaming),
            },
            matmul_rate=matmul,
            attention_rate=attention,
            sides=sides,
        )

    def _ceilings(self, queries: int, keys: int) -> tuple[float, float]:
        """Rates of matrix products and of attention."""
        rate = attention_rate(self.configs["dense"], queries, keys, self.device, self.dtype)
        return matmul_rate(self.device, self.dtype), rate

    def _side(
        self,
        name: str,
        times: dict[str, tuple[float, list[float]]],
        weight_bytes: int,
        peak: int | None,
        parts: dict[str, float],
        batches: tuple[int | None, int | None],
    ) -> Side:
        config, (first, own) = self.configs[name], times[name]
        plan, seconds = self.plans[name], statistics.median(own)
        planned = plan.dense if config.mla is None else plan.mla
        cache_bytes, text_bytes = self._cache_bytes(config)
        passes = (self.setting.steps + 1) * self.setting.batch
        flops = forward_flops(
            config,
            queries=self.streaming.chunk_frames * self.tokens,
            keys=self.streaming.window_frames * self.tokens,
            mode=self.setting.attention,
            itemsize=self.dtype.itemsize,
            flops_per_byte=flops_per_byte(self.device),
        )
        return Side(
            name=name,
            mode="dense" if config.mla is None else self._mode(config),
            frames_per_second=self.setting.batch * self.streaming.chunk_frames * self.stride / seconds,
            first_chunk=first,
            next_chunk=seconds,
            next_chunk_spread=(min(own), max(own)),
            speedup=statistics.median(a / b for a, b in zip(times["dense"][1], own, strict=True)),
            cache_bytes=cache_bytes,
            text_bytes=text_bytes,
            weight_bytes=weight_bytes,
            plan_cache_bytes=planned.bytes_per_window,
            plan_weight_bytes=planned.weight_bytes,
            peak_bytes=peak,
            largest_batch=batches[0],
            largest_batch_sliced=batches[1],
            flops={part: passes * count for part, count in flops.items()},
            profile=parts,
        )

    def _mode(self, config: WanConfig) -> str:
        """The mode that latent layers choose with a full window; both names where they differ."""
        if config.mla is None or self.setting.attention != "auto":
            return self.setting.attention
        if config.mla.rope == "head":
            return "expanded"
        chosen = {
            cheaper_mode(
                layer,
                num_heads=config.num_heads,
                content=layer.kv_lora_rank,
                queries=self.streaming.chunk_frames * self.tokens,
                keys=self.streaming.window_frames * self.tokens,
                itemsize=self.dtype.itemsize,
                flops_per_byte=flops_per_byte(self.device),
            )
            for layer in config.mla.layers
            if layer is not None
        }
        return " and ".join(sorted(chosen))

    def _cache(self, config: WanConfig, batch: int) -> LatentCache:
        return LatentCache(
            config,
            batch=batch,
            height=self.size[0],
            width=self.size[1],
            streaming=self.streaming,
            dtype=self.dtype,
            device=self.device,
            keeps_text=self.setting.keeps_text,
        )

    def _cache_bytes(self, config: WanConfig) -> tuple[int, int]:
        """Bytes of the cache, as the device's allocator counts them, and of the prompt's keys and values."""
        before = _allocated(self.device)
        cache = self._cache(config, self.setting.batch)
        found = _allocated(self.device) - before if self.device.type == "cuda" else cache.nbytes
        text = 2 * config.num_layers * self.setting.batch * config.text_len * config.dim * self.dtype.itemsize
        return found, text if self.setting.keeps_text else 0

    def _peak(self, runner: _Runner) -> int | None:
        """Peak memory of a chunk, without what the other sides hold."""
        if self.device.type != "cuda":
            return None
        runner.begin()
        before = _allocated(self.device) - runner.weight_bytes
        torch.cuda.reset_peak_memory_stats(self.device)
        runner.chunk()
        peak = torch.cuda.max_memory_allocated(self.device) - before
        for _ in range(self.filling):
            runner.chunk()
        return peak

    def _profile(self, runner: _Runner) -> dict[str, float]:
        """Seconds of a chunk by part. A compiled model's norms and RoPE are fused into the rest."""
        cuda = self.device.type == "cuda"
        with (
            scopes(runner.model, not self.setting.compile),
            profile(use_device="cuda" if cuda else None, use_kineto=cuda) as profiler,
        ):
            runner.chunk()
        parts = dict.fromkeys(("attention", "projections", SCOPE, "the rest"), 0.0)
        for event in profiler.function_events or []:
            if event.device_type.name != "CPU":  # a kernel, whose time its operation has already
                continue
            spent = event.self_device_time_total if cuda else event.self_cpu_time_total
            parts[part_of_model(event)] += spent / 1e6
        return parts

    def _largest_batches(self, name: str, config: WanConfig) -> tuple[int | None, int | None]:
        """The largest batches that fit in one pass and one video at a time; a CPU is not filled up to find out."""
        if self.device.type != "cuda" or not self.setting.search_batch:
            self.step(f"{name}: batches not searched")
            return None, None
        _release()
        runner = _Runner(name, config, self, compiled=False)  # every batch size would compile anew
        found = [_largest(partial(self._fits, runner, sliced)) for sliced in (False, True)]
        self.step(f"{name}: largest batch")
        return found[0], found[1]

    def _fits(self, runner: _Runner, sliced: bool, batch: int) -> bool:
        """Whether caches for `batch` videos and a pass with a full window fit."""
        caches = []
        size = 1 if sliced else batch
        config = runner.config
        try:
            caches = [self._cache(config, size) for _ in range(batch // size)]
            caches[0].seek(self.streaming.window_frames)
            shape = (size, config.out_dim, self.streaming.chunk_frames, *self.size)
            context = self.context[:1].expand(size, -1, -1)
            with torch.no_grad():
                if self.setting.keeps_text and sliced:  # every video's prompt, not only the first's
                    texts = [self._text(config) for _ in caches[1:]]
                runner.model(
                    torch.zeros(shape, device=self.device),
                    torch.zeros(size, device=self.device),
                    context,
                    cache=caches[0],
                    start_frame=self.streaming.window_frames,
                )
            synchronize(self.device)
        except torch.cuda.OutOfMemoryError:
            return False
        else:
            return True
        finally:
            texts = []
            caches.clear()
            del texts
            _release()

    def _text(self, config: WanConfig) -> Tensor:
        """As much memory as one prompt's keys and values take."""
        return torch.empty(2, config.num_layers, config.text_len, config.dim, device=self.device, dtype=self.dtype)


def _largest(fits: Callable[[int], bool]) -> int:
    """The largest number that fits, by doubling and halving; 0 when none does."""
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    return f"CPU {name}"


def _silent(done: int, total: int, note: str) -> None:
    pass
