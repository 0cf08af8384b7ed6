"""Clips for calibrating, healing and evaluating: one layout for all.

A folder of safetensors shards, each with `latents` [N, C, F, H, W] and `context` [N, T, text_dim] (text embeddings);
every shard of a folder has the same shapes but for N.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mlaconvert.config import WanConfig
from mlaconvert.errors import InputError


class Clips(NamedTuple):
    """Video latents [N, C, F, H, W] and their text embeddings [N, T, text_dim]."""

    latents: Tensor
    context: Tensor

    def batches(self, size: int) -> Iterator[Clips]:
        """In order, `size` clips at a time."""
        for latents, context in zip(self.latents.split(size), self.context.split(size), strict=True):
            yield Clips(latents, context)


def load_clips(folder: Path, config: WanConfig, limit: int) -> Clips:
    """The first `limit` clips of a folder, in the order of its file names.

    Raises InputError when there are none, or naming the shard that cannot be read or does not fit the model.
    """
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise InputError(f"{folder} has no *.safetensors shards; expected latents [N, C, F, H, W] and context in each")
    parts: list[Clips] = []
    for shard in shards:
        wanted = limit - sum(len(part.latents) for part in parts)
        if wanted <= 0:
            break
        parts.append(_read_shard(shard, config, wanted))
        if parts[-1].latents.shape[1:] != parts[0].latents.shape[1:]:
            raise InputError(
                f"{shard}: latents are {list(parts[-1].latents.shape[1:])} a clip, "
                f"{list(parts[0].latents.shape[1:])} in {shards[0].name}; give clips of one shape"
            )
    return Clips(torch.cat([p.latents for p in parts]), torch.cat([p.context for p in parts]))


def _read_shard(shard: Path, config: WanConfig, limit: int) -> Clips:
    try:
        with safe_open(shard, framework="pt") as file:
            missing = {"latents", "context"} - set(file.keys())
            if missing:
                raise InputError(f"{shard}: no tensor {min(missing)!r}; expected latents and context")
            latents, context = (file.get_slice(name)[:limit].float() for name in ("latents", "context"))
    except (OSError, SafetensorError) as error:
        raise InputError(f"{shard}: not a readable safetensors file ({error})") from None
    if latents.ndim != 5 or latents.shape[1] != config.out_dim:
        raise InputError(f"{shard}: latents are {list(latents.shape)}; expected [N, {config.out_dim}, F, H, W]")
    if context.ndim != 3 or len(context) != len(latents) or context.shape[2] != config.text_dim:
        raise InputError(f"{shard}: context is {list(context.shape)}; expected [{len(latents)}, T, {config.text_dim}]")
    if not (latents.isfinite().all() and context.isfinite().all()):
        raise InputError(f"{shard}: has values that are not finite; mend or remove this shard")
    return Clips(latents, context)
