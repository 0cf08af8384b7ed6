"""The plan of a conversion in lines: what it makes of a model, what it costs, what it leaves to be asked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from mlaconvert.conversion.from_clips import room_needed
from mlaconvert.conversion.plan import ConversionPlan, mla_of
from mlaconvert.conversion.recipes import REFIT_STEPS, refit_flops_of
from mlaconvert.conversion.report import ModelReport
from mlaconvert.model.rates import does_not_fit
from mlaconvert.reports.tables import titled
from mlaconvert.units import format_bytes, format_seconds


def plan_lines(plan: ConversionPlan, data: Path | None) -> Iterator[str]:
    """A line for each side of the plan; `data` is the folder of clips, None where the model makes its own."""
    recipe, mla, (cached, dense) = plan.recipe, mla_of(plan.config), plan.config.cache_words
    layer = next(iter(plan.layers.values()))
    queries = "exact" if recipe.q_rank in (None, "none") else f"rank {recipe.q_rank}"
    yield f"{titled(plan.subfolder)}{plan.source}"
    yield f"  model    {plan.description}"
    yield f"  convert  layers {recipe.layers}, init {recipe.init}, {_time(plan)}"
    yield (
        f"  widths   latent {layer.kv_lora_rank}, rotary {layer.qk_rope_head_dim}, unrotated "
        f"{layer.qk_nope_head_dim}, value {layer.v_head_dim}, queries {queries}, key norm {mla.key_norm}"
    )
    yield from _present(plan)
    change = 100 * (plan.config.cache_share - 1)
    yield f"  cache    {dense} -> {cached} a token ({change:+.1f}%)"
    yield f"  weights  {format_bytes(plan.source_bytes)} -> {format_bytes(plan.output_bytes)}"
    if recipe.init == "calibrated":
        kept, used = (format_bytes(size) for size in room_needed(plan, data))
        yield f"  disk     {kept} of moments, and about {used} of activations until it is done"


def cost_lines(report: ModelReport, device: str) -> Iterator[str]:
    """What a dry run says of the time that a conversion takes, by part, and of a GPU's memory."""
    cost, plan = report.cost, report.plan
    if cost is None:
        return
    yield f"{titled(plan.subfolder)}{plan.source}: what it will take"
    if not cost.seconds:
        yield f"  time     seconds, and the copying of {format_bytes(plan.output_bytes)}"
        return
    parts = sorted(cost.seconds.items(), key=lambda part: -part[1])
    each = ", ".join(f"{name} {format_seconds(seconds)}" for name, seconds in parts if seconds >= 0.5)
    flops = sum(work.flops for work in cost.work.values())
    yield f"  time     about {format_seconds(cost.total)} on {device}, {flops:.2g} FLOPs{f': {each}' if each else ''}"
    if cost.memory is not None:
        yield f"  memory   about {format_bytes(cost.memory)} of {device}"
        line = does_not_fit(cost.memory, torch.device(device), "take fewer --clips, or --device cpu")
        if line is not None:
            yield f"  {line}"


def _time(plan: ConversionPlan) -> str:
    """How the converted model sees time."""
    streaming, steps = plan.config.streaming, ", few steps" if plan.config.few_step else ""
    if streaming is None:
        return f"bidirectional{steps}"
    sink = f"sink of {streaming.sink_frames}" if streaming.sink_frames else "no sink"
    window = f"window of {streaming.window_frames} latent frames, chunks of {streaming.chunk_frames}"
    return f"streaming, {window}, {sink}{steps}"


def _present(plan: ConversionPlan) -> Iterator[str]:
    """What a chunk sees of itself, and how what it sees of the past is refitted."""
    recipe = plan.recipe
    if mla_of(plan.config).present == "exact":
        added = sum(o.spec.nbytes for o in plan.operations if o.layer is not None and ".v_proj." in o.canonical)
        yield f"  present  the teacher's own keys and values: {format_bytes(added)} of weights more, the cache as it is"
        if recipe.refit_steps == 0:
            cost = refit_flops_of(recipe, plan.source_config) / 1e15
            yield f"  refit    layer by layer; --refit-steps {REFIT_STEPS} refits the whole model too, {cost:.2g} PFLOP"
        elif recipe.refit_steps:
            clips = f" on up to {recipe.refit_clips} clips" if recipe.refit_clips else ""
            yield f"  refit    layer by layer, then {recipe.refit_steps} steps of the whole model{clips}"
    elif recipe.init == "calibrated" and plan.config.streaming is None:
        yield (
            "  present  from latents: a bidirectional model has no past; say how it is to stream (--window-frames), "
            "and the present stays exact"
        )
