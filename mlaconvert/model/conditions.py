"""What a model is given besides noise: timesteps, a frame rate, images.

Shapes: B batch, C channels, F latent frames, H and W latent pixels, N tokens, D model width.
"""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor, nn

from mlaconvert.config.geometry import WanConfig
from mlaconvert.errors import InputError

Grid = tuple[int, int, int]  # F x H x W tokens


class Conditions(TypedDict, total=False):
    """What a model may be given besides noise, time and text."""

    image_latents: Tensor | None
    """[B, in_dim - C, F, H, W], concatenated to the latents: of an image, a masked video, or a control video."""
    image_features: Tensor | None
    """[B, I, image_dim], from CLIP."""
    reference: Tensor | None
    """[B, reference_dim, H, W], latents of an image that is read as a frame before the video's (Wan Fun)."""


def check_conditions(given: Conditions) -> None:
    """Raise TypeError for a name that is no condition, as for any argument that a function does not have."""
    unknown = given.keys() - Conditions.__annotations__.keys()
    if unknown:
        raise TypeError(f"{min(unknown)!r} is no argument of the model")


def timestep_embedding(timestep: Tensor, dim: int) -> Tensor:
    """Sinusoids [..., dim] of a timestep [...], cosines first, computed in float64."""
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float64, device=timestep.device) / half
    angle = timestep.double().unsqueeze(-1) * 10000.0**-exponent
    return torch.cat((angle.cos(), angle.sin()), -1)


def check_timestep(timestep: Tensor, batch: int, *counts: int) -> Tensor:
    """Timesteps [B, 1] of [B], or as they are where they are [B, n] for one of `counts`. Raises InputError."""
    t = timestep[:, None] if timestep.ndim == 1 else timestep
    if t.shape not in [(batch, count) for count in (1, *counts)]:
        expected = " or ".join([f"[{batch}]", *(f"[{batch}, {count}]" for count in counts)])
        raise InputError(f"timestep must be {expected}, not {list(timestep.shape)}")
    return t


def reference_tokens(
    config: WanConfig, ref_conv: nn.Conv2d | None, reference: Tensor, batch: int, grid: Grid
) -> Tensor:
    """Tokens [B, H * W, D] of a `reference` [B, C, H, W] that belongs to a video of `grid` tokens.

    Raises InputError for another shape, and by a model that reads none.
    """
    expected = [batch, config.reference_dim, grid[1] * config.patch_size[1], grid[2] * config.patch_size[2]]
    if ref_conv is None or list(reference.shape) != expected:
        asked = "this model reads none" if ref_conv is None else f"expected {expected}"
        raise InputError(f"the reference is {list(reference.shape)}; {asked}")
    return ref_conv(reference.to(ref_conv.weight.dtype)).flatten(2).mT


def reference_times(times: Tensor, grid: Grid) -> Tensor:
    """Timesteps of a video's frames or tokens, with those of a reference before them: the last one's, as Wan Fun's."""
    if times.shape[1] == 1:
        return times
    count = 1 if times.shape[1] == grid[0] else grid[1] * grid[2]
    return torch.cat((times[:, -1:].expand(-1, count), times), 1)
