"""A refit of all layers at once, by what they do to the model's velocity behind clean pasts.

A layer's own error is a poor judge: errors of layers add up, or make up for each other. Only what the past uses is
changed, as in `refit_past`, and nothing that decides what is cached.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from itertools import count, islice
from typing import Any, cast

import torch
from torch import Tensor

from mlaconvert.clips.folder import Clips
from mlaconvert.config.geometry import WanConfig
from mlaconvert.conversion.calibration.target import PAST_ONLY
from mlaconvert.conversion.calibration.windows import Losses, Regime, Window, batch_size, windows
from mlaconvert.model.attention.latent import LatentAttention
from mlaconvert.model.blocks import Block
from mlaconvert.model.wan import WanModel, run_blocks
from mlaconvert.progress import Counter, Progress, silent

BATCH = 4  # clips a step, fewer of long ones
# Adam's rates, tried in turn, relative to a module's weights, which read whitened latents; each falls along a cosine.
# And how many times the steps: small ones take longer.
TRIES = ((0.018, 1), (0.0016, 2))
DRAWS = 4  # of noise and timesteps, in which clips are judged by that were held back
KEPT_SCALARS = 2**26  # of the blocks' outputs, up to which activations are kept for the way back
STAGE = "model refitted"


def with_attention(teacher: WanModel, config: WanConfig, layers: Mapping[int, LatentAttention]) -> WanModel:
    """The teacher with converted self-attention in some layers and the converted `config`; all else is shared."""
    student = copy.deepcopy(teacher, {id(p): p for p in teacher.parameters()})
    student.config = dataclasses.replace(config, streaming=teacher.config.streaming)
    for index, attention in layers.items():
        cast(Block, student.blocks[index]).self_attn = attention
    return student


def refit_model(
    models: tuple[WanModel, WanModel],
    clips: tuple[Clips, Clips | None],
    regime: Regime,
    *,
    steps: int,
    losses: Losses | None = None,
    progress: Progress = silent,
) -> dict[int, dict[str, Tensor]]:
    """What only the past uses in the converted layers, by layer and name below `self_attn.`, after `steps` of Adam.

    `models` are the teacher and the student, streaming as the regime says. Each step takes some clips' windows of the
    regime and lowers the squared difference of the newest chunk's velocities. Where that difference does not fall on
    the second part of the clips, which nothing is fitted to, smaller steps are tried from the start, and more of them:
    a model that is nearly its teacher needs that. The result is {} where none help, or there are no such clips;
    `losses` gets both losses of what is kept.
    """
    student, (fitted, held_back) = models[1], clips
    if held_back is None:
        return {}
    layers = {i: b.self_attn for i, b in enumerate(student.blocks) if isinstance(b.self_attn, LatentAttention)}
    parameters = {
        i: {name: p for name, p in layer.named_parameters() if name in PAST_ONLY} for i, layer in layers.items()
    }
    trained = [p for named in parameters.values() for p in named.values()]
    sizes = [
        _size(layers[i].get_parameter(name.rpartition(".")[0] + ".weight"))
        for i, named in parameters.items()
        for name in named
    ]
    judges = _judges(models[0], held_back, regime)
    start, before = [p.detach().clone() for p in trained], _distance(student, judges)
    better = False
    for rate, times in TRIES:
        groups = [{"params": [p], "lr": rate * size} for p, size in zip(trained, sizes, strict=True)]
        _train(models, groups, fitted, regime, times * steps, progress)
        better = _distance(student, judges) < before
        if better:
            break
        with torch.no_grad():
            for parameter, old in zip(trained, start, strict=True):
                parameter.copy_(old)
    if losses is not None:
        losses.clean_past[STAGE] = _loss(student, held_back, dataclasses.replace(regime, noisy_past=0.0))
        losses.noisy_past[STAGE] = _loss(student, held_back, dataclasses.replace(regime, noisy_past=1.0))
    if not better:
        return {}
    return {i: {name: p.detach() for name, p in named.items()} for i, named in parameters.items()}


def _train(
    models: tuple[WanModel, WanModel],
    groups: list[dict[str, Any]],
    clips: Clips,
    regime: Regime,
    steps: int,
    progress: Progress,
) -> None:
    """Steps of Adam on the parameters of `groups`, each of which has its rate to begin with."""
    teacher, student = models
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    trained, counted = [p for group in groups for p in group["params"]], Counter(progress, "refit the model", steps)
    counted.show()
    for parameter in trained:
        parameter.requires_grad_(True)
    for window in islice(_endless(clips, regime, min(BATCH, batch_size(clips, student.config))), steps):
        with torch.no_grad():
            expected = _velocity(teacher, window)
        with torch.enable_grad():
            error = (_velocity(student, window) - expected).square().mean()
            optimizer.zero_grad()
            error.backward()
        optimizer.step()
        schedule.step()
        counted.step()
    for parameter in trained:
        parameter.requires_grad_(False)
        parameter.grad = None


def _size(weight: Tensor) -> float:
    """The root mean square of a weight."""
    return float(weight.detach().square().mean().sqrt())


def _endless(clips: Clips, regime: Regime, batch: int) -> Iterator[Window]:
    """The windows of the clips, shuffled, again and again with other noise and timesteps."""
    for epoch in count():
        drawn = dataclasses.replace(regime, seed=regime.seed + epoch)
        parts = list(windows(clips, drawn, batch))
        for i in torch.randperm(len(parts), generator=torch.Generator().manual_seed(drawn.seed)).tolist():
            yield parts[i]


@torch.no_grad()
def _judges(teacher: WanModel, clips: Clips, regime: Regime) -> list[tuple[Window, Tensor]]:
    """The windows of `DRAWS` draws, and the teacher's velocities there."""
    drawn = (dataclasses.replace(regime, seed=regime.seed + draw) for draw in range(DRAWS))
    size = batch_size(clips, teacher.config)
    return [(window, _velocity(teacher, window)) for one in drawn for window in windows(clips, one, size)]


@torch.no_grad()
def _distance(student: WanModel, judges: list[tuple[Window, Tensor]]) -> float:
    """Summed squared difference of the newest chunk's velocities from the teacher's."""
    return sum(float((_velocity(student, window) - teacher).double().square().sum()) for window, teacher in judges)


@torch.no_grad()
def _loss(model: WanModel, clips: Clips, regime: Regime) -> float:
    """Mean squared error of the newest chunk's velocity, as `LayerWalk` has it."""
    total = values = 0.0
    for window in windows(clips, regime, batch_size(clips, model.config)):
        velocity = _velocity(model, window)
        error = velocity - window.target[window.denoised].to(velocity)
        total, values = total + float(error.double().square().sum()), values + error.numel()
    return total / values


def _velocity(model: WanModel, window: Window) -> Tensor:
    """Of the newest chunk, of the rows that are denoised: [b, C, queries, H, W].

    Large activations are computed again on the way back.
    """
    device = model.patch_embedding.weight.device
    latents, timestep, context = (t.to(device) for t in (window.latents, window.timestep, window.context))
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        prepared = model.prepare(latents, timestep, context, chunks=window.chunks)
        large = prepared.x.numel() * len(model.blocks) > KEPT_SCALARS
        return run_blocks(model, prepared, checkpointing=large)[window.denoised][:, :, -window.queries :]
