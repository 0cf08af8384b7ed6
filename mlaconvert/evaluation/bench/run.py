"""Dense and latent attention of one geometry, measured in turn in one run: speed, latency, memory, and where time goes.

Weights are random: neither time nor memory depends on them. Ratios are what such a run can claim; absolute times belong
to the device that the report names.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from mlaconvert.config.geometry import WanConfig, default_video
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.errors import ConfigError
from mlaconvert.evaluation.bench.flops import forward_flops, seconds_by_part
from mlaconvert.evaluation.bench.memory import cache_bytes, largest_batches, peak_bytes
from mlaconvert.evaluation.bench.runner import ResolvedSetting, Runner, device_name
from mlaconvert.evaluation.bench.setting import BenchReport, BenchSetting, Side, side_configs
from mlaconvert.model.attention.cost import cheaper_mode, flops_per_byte
from mlaconvert.model.device import resolve_device
from mlaconvert.model.memory import MemoryPlan, StreamedVideo, plan_memory
from mlaconvert.model.rates import attention_rate, matmul_rate
from mlaconvert.progress import Counter, Progress, silent


def bench(setting: BenchSetting, progress: Progress = silent) -> BenchReport:
    """Measure every side of `setting`; notes of `progress` say what is being measured.

    Raises ConfigError for a setting that is impossible.
    """
    device = resolve_device(setting.device, setting.dtype or torch.float32)
    dtype = setting.dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    configs = side_configs(setting)
    dense = configs["dense"]
    if dense.fixed_settings:
        raise ConfigError(
            f"{setting.geometry}: a geometry with cameras is not measured; take one of its size by name, such as 1.3b"
        )
    if dense.in_dim != dense.out_dim:
        raise ConfigError(
            f"{setting.geometry}: an image-to-video geometry is not measured; take the text-to-video one of its size"
        )
    video = default_video(dense)
    pixels = (setting.height or video.height, setting.width or video.width)
    streaming = dense.streaming or StreamingConfig()
    # Says what is wrong with a size before anything runs.
    plans = {name: _plan(config, setting, pixels, streaming, dtype) for name, config in configs.items()}
    height, width = (size // video.vae_stride for size in pixels)
    resolved = ResolvedSetting(
        setting=setting,
        device=device,
        dtype=dtype,
        streaming=streaming,
        height=height,
        width=width,
        frame_tokens=dense.tokens_per_frame(height, width),
        context=torch.zeros(setting.batch, dense.text_len, dense.text_dim, device=device, dtype=dtype),
    )
    count = Counter(progress, "bench", len(configs) * (2 * resolved.filling + setting.rounds + 1) + 1)
    count.show()

    def step(note: str) -> None:
        count.step(note=note)

    ceilings = [_ceilings(resolved, dense)]
    step("ceilings")
    measured = _measure(resolved, configs, step)
    # Once more: on a machine with other work, a ceiling is the better of two.
    ceilings.append(_ceilings(resolved, dense))
    matmul, attention = map(max, zip(*ceilings, strict=True))
    sides = []
    for name, config in configs.items():
        batches = largest_batches(resolved, config)
        step(f"{name}: {'batches not searched' if batches[0] is None else 'largest batch'}")
        sides.append(_side(resolved, name, config, plans[name], measured[name], measured["dense"].times, batches))
    return BenchReport(
        device=device_name(device),
        dtype=str(dtype).removeprefix("torch."),
        torch_version=torch.__version__,
        setting={
            "geometry": setting.geometry,
            "pixels": list(pixels),
            "tokens_per_frame": resolved.frame_tokens,
            "batch": setting.batch,
            "slice_size": setting.slice_size,
            "steps": setting.steps,
            "rounds": setting.rounds,
            "compile": setting.compile,
            "attention": setting.attention,
            "keeps_text": setting.keeps_text,
            "threads": torch.get_num_threads(),
            **dataclasses.asdict(streaming),
        },
        matmul_rate=matmul,
        attention_rate=attention,
        sides=tuple(sides),
    )


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """What is left of a runner: seconds of the first and of the timed chunks, bytes, seconds of a chunk by part."""

    first: float
    times: Sequence[float]
    weight_bytes: int
    peak_bytes: int
    profile: Mapping[str, float]


def _measure(
    resolved: ResolvedSetting, configs: Mapping[str, WanConfig], step: Callable[[str], None]
) -> dict[str, _Measured]:
    """Every side in turn. All models are in memory at once, and none any longer when this returns."""
    setting = resolved.setting
    runners = [Runner(name, config, resolved, compiled=setting.compile) for name, config in configs.items()]
    for runner in runners:
        runner.begin()
        for _ in range(resolved.filling):  # also compiles every shape
            runner.chunk()
            step(f"{runner.name}: warming up")
    for runner in runners:
        runner.begin()
        runner.first = runner.chunk()
        for _ in range(resolved.filling - 1):
            runner.chunk()
            step(f"{runner.name}: filling the window")
    for turn in range(setting.rounds):
        for runner in runners if turn % 2 == 0 else reversed(runners):
            runner.times.append(runner.chunk())
            step(f"round {turn + 1} of {setting.rounds}: {runner.name}")
    peaks = [peak_bytes(runner) for runner in runners]
    measured = {}
    for runner, peak in zip(runners, peaks, strict=True):
        measured[runner.name] = _Measured(
            first=runner.first,
            times=runner.times,
            weight_bytes=runner.weight_bytes,
            peak_bytes=peak,
            profile=seconds_by_part(runner.model, runner.chunk, resolved.device, compiled=setting.compile),
        )
        step(f"{runner.name}: profile")
    return measured


def _plan(
    config: WanConfig, setting: BenchSetting, pixels: tuple[int, int], streaming: StreamingConfig, dtype: torch.dtype
) -> MemoryPlan:
    """What `analyze` would say of a side."""
    video = default_video(config)
    return plan_memory(
        dataclasses.replace(config, mla=None),
        config.mla,
        video=StreamedVideo(
            height=pixels[0],
            width=pixels[1],
            window_frames=streaming.window_frames,
            batch=setting.batch,
            vae_stride=(video.frame_stride, video.vae_stride, video.vae_stride),
        ),
        cache_itemsize=dtype.itemsize,
        weight_itemsize=dtype.itemsize,
    )


def _ceilings(resolved: ResolvedSetting, dense: WanConfig) -> tuple[float, float]:
    """Rates of matrix products and of attention."""
    rate = attention_rate(dense, resolved.chunk_tokens, resolved.window_tokens, resolved.device, resolved.dtype)
    return matmul_rate(resolved.device, resolved.dtype), rate


def _side(
    resolved: ResolvedSetting,
    name: str,
    config: WanConfig,
    plan: MemoryPlan,
    measured: _Measured,
    dense_times: Sequence[float],
    batches: tuple[int | None, int | None],
) -> Side:
    setting, times = resolved.setting, measured.times
    seconds = statistics.median(times)
    frames = setting.batch * resolved.streaming.chunk_frames * default_video(config).frame_stride
    planned = plan.dense if config.mla is None else plan.mla
    cache, text = cache_bytes(resolved, config)
    passes = (setting.steps + 1) * setting.batch
    flops = forward_flops(
        config,
        queries=resolved.chunk_tokens,
        keys=resolved.window_tokens,
        mode=setting.attention,
        itemsize=resolved.dtype.itemsize,
        flops_per_byte=flops_per_byte(resolved.device),
    )
    return Side(
        name=name,
        mode="dense" if config.mla is None else full_window_mode(resolved, config),
        frames_per_second=frames / seconds,
        first_chunk=measured.first,
        next_chunk=seconds,
        next_chunk_spread=(min(times), max(times)),
        speedup=statistics.median(a / b for a, b in zip(dense_times, times, strict=True)),
        cache_bytes=cache,
        text_bytes=text,
        weight_bytes=measured.weight_bytes,
        plan_cache_bytes=planned.bytes_per_window,
        plan_weight_bytes=planned.weight_bytes,
        peak_bytes=measured.peak_bytes,
        largest_batch=batches[0],
        largest_batch_sliced=batches[1],
        flops={part: passes * count for part, count in flops.items()},
        profile=dict(measured.profile),
    )


def full_window_mode(resolved: ResolvedSetting, config: WanConfig) -> str:
    """The mode that latent layers choose with a full window; both names where they differ."""
    if config.mla is None or resolved.setting.attention != "auto":
        return resolved.setting.attention
    if config.mla.rope == "head":
        return "expanded"
    past = resolved.window_tokens - resolved.chunk_tokens  # all that latents are read for beside an exact present
    chosen = {
        cheaper_mode(
            layer,
            num_heads=config.num_heads,
            content=layer.kv_lora_rank,
            queries=resolved.chunk_tokens,
            keys=past if config.mla.present == "exact" else resolved.window_tokens,
            itemsize=resolved.dtype.itemsize,
            flops_per_byte=flops_per_byte(resolved.device),
        )
        for layer in config.mla.layers
        if layer is not None
    }
    return " and ".join(sorted(chosen))
