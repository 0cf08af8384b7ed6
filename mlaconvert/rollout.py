"""Flow-matching schedules, and video generated chunk by chunk through the cache.

The flow is x_t = (1 - sigma) * data + sigma * noise with timestep = 1000 * sigma; the model predicts noise - data
(Lipman et al., arXiv 2210.02747). Schedules are warped by shift * s / (1 + (shift - 1) * s) (Esser et al., 2403.03206).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from mlaconvert.cache import LatentCache
from mlaconvert.config import StreamingConfig
from mlaconvert.errors import ConfigError, InputError
from mlaconvert.model import WanModel, default_chunks

SHIFT = 5.0
FEW_STEPS = (1000.0, 750.0, 500.0, 250.0)


def warp(sigma: Tensor, shift: float = SHIFT) -> Tensor:
    """Shift noise levels in [0, 1] towards noise."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def add_noise(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x_t of [B, C, F, H, W] data and noise at per-frame noise levels `sigma` [B, F]."""
    level = sigma[:, None, :, None, None].to(clean.dtype)
    return torch.lerp(clean, noise, level)


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Noise levels of one chunk, from noise to data.

    `timesteps` descend within (0, 1000]. With `renoise`, each step predicts the clean chunk and adds fresh noise
    (few-step students, as in Self-Forcing); otherwise steps integrate the flow by Euler's rule. `guidance` above 1
    mixes in an unconditional prediction (classifier-free guidance).
    """

    timesteps: tuple[float, ...]
    renoise: bool
    guidance: float = 1.0

    def __post_init__(self) -> None:
        steps = self.timesteps
        if not steps or any(a <= b for a, b in pairwise(steps)) or steps[0] > 1000 or steps[-1] <= 0:
            raise ConfigError(f"timesteps {list(steps)} must descend within (0, 1000]")
        if self.guidance < 0:
            raise ConfigError(f"guidance is {self.guidance}: give 0 or more (1 switches it off)")

    @classmethod
    def few_step(
        cls, timesteps: Sequence[float] = FEW_STEPS, *, shift: float = SHIFT, guidance: float = 1.0
    ) -> Sampler:
        """The distilled students' schedule; `timesteps` are given before the warp."""
        warped = 1000 * warp(torch.tensor(timesteps, dtype=torch.float64) / 1000, shift)
        return cls(timesteps=tuple(warped.tolist()), renoise=True, guidance=guidance)

    @classmethod
    def many_step(cls, steps: int, *, shift: float = SHIFT, guidance: float = 1.0) -> Sampler:
        """`steps` Euler steps from pure noise."""
        if steps < 1:
            raise ConfigError(f"steps is {steps}: give 1 or more")
        grid = warp(torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1], shift)
        return cls(timesteps=tuple((1000 * grid).tolist()), renoise=False, guidance=guidance)


@torch.no_grad()
def rollout(
    model: WanModel,
    context: Tensor,
    *,
    frames: int,
    height: int,
    width: int,
    sampler: Sampler,
    seed: int = 0,
    null_context: Tensor | None = None,
    prefix: Tensor | None = None,
    streaming: StreamingConfig | None = None,
    cache_dtype: torch.dtype | None = None,
    on_step: Callable[[], None] | None = None,
) -> Iterator[Tensor]:
    """Yield video latents chunk by chunk, [B, out_dim, f, height, width] each, through one cache.

    `context` [B, T, text_dim]; `null_context` likewise for guidance other than 1. The noise depends on `seed` alone,
    so that two models can be compared from the same noise. Every chunk is denoised, then run once at timestep 0 to
    write its clean keys and values. A `prefix` [B, out_dim, F, height, width] of whole chunks is taken as given and
    continued; `frames` counts it. Raises InputError when guidance has no null context, or for a prefix that is not
    whole chunks of this size.
    """
    streaming = streaming or model.config.streaming or StreamingConfig()
    guided = sampler.guidance != 1
    if guided and null_context is None:
        raise InputError(f"guidance {sampler.guidance} needs the embedding of an empty prompt; give one, or guidance 1")
    device, dtype = model.patch_embedding.weight.device, model.dtype
    text = torch.cat((context, null_context.expand_as(context))) if guided and null_context is not None else context
    text = text.to(device, dtype)
    batch = context.shape[0]
    cache = LatentCache(
        model.config,
        batch=text.shape[0],
        height=height,
        width=width,
        streaming=streaming,
        dtype=cache_dtype or dtype,
        device=device,
    )
    generator = torch.Generator().manual_seed(seed)

    def noise(count: int) -> Tensor:
        shape = (batch, model.config.out_dim, count, height, width)
        return torch.randn(shape, generator=generator).to(device)

    def velocity(x: Tensor, timestep: float, start: int) -> Tensor:
        rows = torch.full((text.shape[0],), timestep, device=device)
        out = model(x.repeat(2, 1, 1, 1, 1) if guided else x, rows, text, cache=cache, start_frame=start).float()
        if on_step is not None:
            on_step()
        if not guided:
            return out
        conditional, unconditional = out.chunk(2)
        return torch.lerp(unconditional, conditional, sampler.guidance)

    given = 0 if prefix is None else prefix.shape[2]
    if prefix is not None and (prefix.shape != (batch, model.config.out_dim, given, height, width) or given > frames):
        raise InputError(
            f"the prefix is {list(prefix.shape)}; expected {[batch, model.config.out_dim]} x frames x size"
        )
    if given % streaming.chunk_frames:
        raise InputError(f"the prefix has {given} frames; give whole chunks of {streaming.chunk_frames}")
    start = 0
    for count in default_chunks(frames, streaming):
        x = noise(count)
        if prefix is not None and start < given:
            x = prefix[:, :, start : start + count].to(x)
            velocity(x, 0.0, start)
            yield x
            start += count
            continue
        levels = [*(t / 1000 for t in sampler.timesteps), 0.0]
        for now, after in pairwise(levels):
            flow = velocity(x, 1000 * now, start)
            if sampler.renoise:
                clean = x - now * flow
                x = torch.lerp(clean, noise(count), after) if after else clean
            else:
                x = x + (after - now) * flow
        velocity(x, 0.0, start)
        yield x
        start += count
