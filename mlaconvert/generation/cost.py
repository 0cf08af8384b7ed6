"""What a generation will take, told before it begins: seconds at the device's rates, and a GPU's memory."""

from __future__ import annotations

import torch

from mlaconvert.config.geometry import WanConfig
from mlaconvert.generation.plan import GenerationPlan
from mlaconvert.generation.request import Runtime
from mlaconvert.model.cache import LatentCache
from mlaconvert.model.device import resolve_device
from mlaconvert.model.flops import Work, block_scalars, rollout_work
from mlaconvert.model.memory import parameter_count
from mlaconvert.model.rates import SHORT, Rates, does_not_fit, probe, slow_here
from mlaconvert.units import format_bytes, format_seconds

ADVICE = "take --slice 1, a smaller --window-frames or fewer --samples"


def generation_work(config: WanConfig, plan: GenerationPlan, *, itemsize: int) -> Work:
    """All samples of a plan, from the start; `itemsize` is that of a scalar in the passes."""
    given = 0 if plan.prefix is None else plan.prefix.shape[2]
    tokens = config.tokens_per_frame(*plan.size)
    return len(plan.seeds) * rollout_work(
        config,
        plan.streaming,
        plan.sampler,
        frames=plan.frames,
        frame_tokens=tokens,
        given=given,
        itemsize=itemsize,
    )


def generation_bytes(config: WanConfig, plan: GenerationPlan, runtime: Runtime, dtype: torch.dtype) -> int:
    """Weights, the caches of all samples with their prompts, and about what a pass makes of some of them at once.

    A pass holds one block's activations and the window's keys and values of one layer.
    """
    samples, copies = len(plan.seeds), _copies(plan)
    at_once = min(runtime.slice_size or samples, samples) * copies
    cache = cache_bytes(config, plan, dtype)
    text = 2 * config.num_layers * samples * copies * config.text_len * config.dim * dtype.itemsize
    tokens = config.tokens_per_frame(*plan.size)
    queries, keys = plan.streaming.chunk_frames * tokens, plan.streaming.window_frames * tokens
    block = queries * block_scalars(config) + keys * 2 * config.dim
    return parameter_count(config) * dtype.itemsize + cache + text + at_once * block * dtype.itemsize


def cache_bytes(config: WanConfig, plan: GenerationPlan, dtype: torch.dtype) -> int:
    """Bytes of the cache of all samples, and with guidance of both halves."""
    return LatentCache(
        config,
        batch=_copies(plan) * len(plan.seeds),
        height=plan.size[0],
        width=plan.size[1],
        streaming=plan.streaming,
        dtype=dtype,
        device="meta",
    ).nbytes


def _copies(plan: GenerationPlan) -> int:
    """How often each video is in the cache: with guidance, also without its prompt."""
    return 1 if plan.sampler.guidance == 1 else 2


def cost_lines(
    config: WanConfig,
    plan: GenerationPlan,
    runtime: Runtime,
    dtype: torch.dtype,
    *,
    prompts: int = 1,
    rates: Rates | None = None,
) -> list[str]:
    """What is said before a generation that is not short: its time, a GPU's memory, and whether that is there.

    Of so many `prompts`, each with a plan like this. The device is probed for a few seconds, unless its `rates` are
    given.
    """
    work = prompts * generation_work(config, plan, itemsize=dtype.itemsize)
    device = resolve_device(runtime.device, dtype)
    if work.flops < SHORT:
        return []
    tokens = config.tokens_per_frame(*plan.size)
    if rates is None:
        queries, keys = plan.streaming.chunk_frames * tokens, plan.streaming.window_frames * tokens
        rates = probe(config, device, dtype, queries=queries, keys=keys)
    seconds = rates.seconds(work)
    needed = generation_bytes(config, plan, runtime, dtype)
    line = f"this will take about {format_seconds(seconds)} on {device} ({work.flops:.2g} FLOPs)"
    line += f" and {format_bytes(needed)} of its memory" if device.type != "cpu" else slow_here(device, seconds)
    trouble = does_not_fit(needed, device, ADVICE)
    return [line, *([] if trouble is None else [trouble])]
