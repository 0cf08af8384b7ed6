"""Frames of rollouts as inline pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from mlaconvert.generation.sheets import film_strip

STRIP = 8  # frames of each video that the page shows
_PIXELS = 960  # least width of a strip, so that small frames are enlarged without smoothing


def previews(strips: Sequence[Tensor], *, pixels: bool) -> list[Tensor]:
    """Strips [B, C, F, H, W] as RGB, uint8 [B, F, H, W, 3] each. The first one, the teacher's, sets the colours.

    Latents that are `pixels` are RGB in [-1, 1]. Others are projected on the first three principal components of the
    teacher's channels; their 1st to 99th percentile spans black to full colour.
    """
    if pixels:
        return [_bytes((strip.clamp(-1, 1) + 1) / 2) for strip in strips]
    channels = strips[0].float().movedim(1, 0).flatten(1)  # [C, values]
    mean = channels.mean(1)
    _, vectors = torch.linalg.eigh(torch.cov(channels).reshape(len(mean), len(mean)))
    basis = vectors[:, -3:].flip(1)  # [C, up to 3]
    basis = basis * basis.sum(0).sign().where(basis.sum(0) != 0, 1)
    colors = basis.mT @ (channels - mean[:, None])
    sampled = colors[:, :: max(1, colors.shape[1] // 100_000)]
    low, high = (sampled.quantile(q, dim=1)[None, :, None, None, None] for q in (0.01, 0.99))
    pictures = []
    for strip in strips:
        projected = torch.einsum("bcfhw,ck->bkfhw", strip.float() - mean[None, :, None, None, None], basis)
        rgb = ((projected - low) / (high - low).clamp_min(1e-6)).clamp(0, 1)
        pictures.append(_bytes(rgb.repeat(1, 3, 1, 1, 1)[:, :3]))  # one channel alone becomes grey
    return pictures


def _bytes(rgb: Tensor) -> Tensor:
    """[B, 3, F, H, W] in [0, 1] -> uint8 [B, F, H, W, 3]."""
    return (255 * rgb).round().byte().permute(0, 2, 3, 4, 1).contiguous()


def data_uri(frames: Tensor) -> str:
    """Frames, uint8 [F, H, W, 3], beside each other as an inline PNG, small ones enlarged without smoothing."""
    images = [Image.fromarray(frame.numpy()) for frame in frames]
    scale = -(-_PIXELS // (len(images) * images[0].width))
    if scale > 1:
        size = images[0].width * scale, images[0].height * scale
        images = [image.resize(size, Image.Resampling.NEAREST) for image in images]
    buffer = io.BytesIO()
    film_strip(images).save(buffer, format="png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
