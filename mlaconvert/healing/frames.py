"""How a clip's frames meet in attention during training, and a forward pass for any such layout.

A streaming model sees a clip through its window. `views` are what the newest chunk sees as a clip goes by; in training
each of their frames sees what it would see in a rollout. All layouts are at the level of latent frames.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.model.attention.kernel import AttentionPlan, Segment, by_token
from mlaconvert.model.cache import LatentCache, LayerCache
from mlaconvert.model.quantizer import CacheQuantizer
from mlaconvert.model.rollout import same_length
from mlaconvert.model.rope import rotary
from mlaconvert.model.wan import Prepared, WanModel, run_blocks
from mlaconvert.model.window import chunk_mask, frame_positions, window_views


class View(NamedTuple):
    """`frames` of a clip in chunks of `chunks` frames, at `positions` in time."""

    frames: tuple[int, ...]
    chunks: tuple[int, ...]
    positions: tuple[int, ...]


def views(frames: int, streaming: StreamingConfig | None) -> list[View]:
    """The views of a clip of `frames` frames that no longer view begins with."""
    found = [(tuple(seen), chunks or (len(seen),)) for seen, chunks in window_views(frames, streaming)]
    whole = [
        (seen, chunks)
        for seen, chunks in found
        if not any(other[: len(seen)] == seen and len(other) > len(seen) for other, _ in found)
    ]
    return [
        View(seen, chunks, tuple(frame_positions(seen, seen[-1] + 1, streaming)) if streaming else seen)
        for seen, chunks in whole
    ]


@dataclass(frozen=True)
class FrameLayout:
    """Frames of one pass: their positions in time, and bool [F, F], True where a frame sees another."""

    positions: tuple[int, ...]
    visible: Tensor

    def plan(self, model: WanModel, height: int, width: int, device: torch.device) -> AttentionPlan:
        """For frames of `height` x `width` tokens."""
        dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
        at = torch.tensor(self.positions, device=device)
        turn = rotary(at, height, width, model.config.rope_split, dtype)
        mask: Tensor | None = None
        segments: tuple[Segment, ...] = ()
        if not self.visible.all():
            mask, segments = by_token(self.visible.to(device), height * width)
        return AttentionPlan(
            query_rotary=turn,
            key_rotary=turn,
            mask=mask,
            mode="expanded",
            segments=segments,
            frame_tokens=height * width,
        )


def noisy_layout(view: View, streaming: StreamingConfig | None) -> FrameLayout:
    """Every frame once, each seeing its chunk and the window before it: the pass that a validation loss makes."""
    count = len(view.frames)
    visible = torch.ones(count, count, dtype=torch.bool) if streaming is None else chunk_mask(view.chunks, streaming)
    return FrameLayout(view.positions, visible)


def clean_frames(view: View) -> int:
    """How many frames of a view are somebody's past: all but the last chunk's."""
    return len(view.frames) - view.chunks[-1]


def forcing_layout(view: View, streaming: StreamingConfig | None) -> FrameLayout:
    """Teacher forcing in one pass: [clean past, all frames noisy].

    A clean frame sees what it sees in a rollout's clean pass; a noisy one its own noisy chunk and the clean frames of
    its window, never another noisy chunk. Frames of both halves stand at their own positions in time.
    """
    past = clean_frames(view)
    window = noisy_layout(view, streaming).visible
    chunk = torch.arange(len(view.chunks)).repeat_interleave(torch.tensor(view.chunks))
    same = chunk[:, None] == chunk
    visible = torch.zeros(past + len(chunk), past + len(chunk), dtype=torch.bool)
    visible[:past, :past] = window[:past, :past]
    visible[past:, :past] = (window & ~same)[:, :past]
    visible[past:, past:] = same
    return FrameLayout((*view.positions[:past], *view.positions), visible)


def prepare(model: WanModel, latents: Tensor, timestep: Tensor, context: Tensor, plan: AttentionPlan) -> Prepared:
    """`WanModel.prepare` for a plan of one's own, without the one that it would make."""
    x, grid = model.embed_patches(latents, None)
    embedding, modulation = model.embed_time(timestep, x.shape[0], grid[0])
    text = model.embed_text(context)
    return Prepared(x=x, grid=grid, embedding=embedding, modulation=modulation, text=text, image=None, plan=plan)


def velocity(
    model: WanModel,
    latents: Tensor,
    timestep: Tensor,
    context: Tensor,
    layout: FrameLayout,
    *,
    checkpointing: bool = False,
) -> Tensor:
    """Velocity, float32 [B, out_dim, F, H, W], of frames that meet as `layout` says. `timestep` [B, F]."""
    _, _, _, height, width = latents.shape
    patch = model.config.patch_size
    plan = layout.plan(model, height // patch[1], width // patch[2], latents.device)
    return run_blocks(model, prepare(model, latents, timestep, context, plan), checkpointing=checkpointing)


def guided(predict: Callable[[Tensor], Tensor], context: Tensor, null: Tensor | None, guidance: float) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598): unconditional + guidance * (conditional - unconditional)."""
    if guidance == 1 or null is None:
        return predict(context)
    context, empty = same_length(context, null.to(context))
    return torch.lerp(predict(empty.expand_as(context)), predict(context), guidance)


@dataclass(frozen=True)
class CachePlan(AttentionPlan):
    """A plan that carries its layer's cache.

    Blocks are given no cache, so that nothing that a model keeps between passes (absorbed products, the prompt's keys)
    stands between a loss and the weights. With `live`, the past is a constant, the chunk's own entries carry gradients,
    and the cache is left as it is, so the same call again gives the same result, as checkpointing needs.
    """

    layer: LayerCache | None = None
    live: bool = False

    def remember(
        self, cache: LayerCache | None, *new: Tensor, quantizer: CacheQuantizer | None = None
    ) -> tuple[Tensor, ...]:
        """The window [B, length, ...] with the chunk's tensors in their slots."""
        assert self.layer is not None
        assert self.window is not None
        if not self.live:
            return super().remember(self.layer, *new, quantizer=quantizer)
        view = self.window
        held = self.layer.held(view)
        if quantizer is not None:
            held, new = quantizer.unpack(held[0], new), quantizer(*new)
        return tuple(
            past.to(value.dtype).index_copy(1, view.write, value) for past, value in zip(held, new, strict=True)
        )


def chunk_velocity(
    model: WanModel,
    chunk: Tensor,
    timestep: float,
    context: Tensor,
    cache: LatentCache,
    start: int,
    *,
    live: bool = False,
    checkpointing: bool = False,
) -> Tensor:
    """Velocity, float32, of the chunk [B, C, f, H, W] that begins at frame `start`, through the latent cache.

    Writes the chunk's entries, or with `live` leaves the cache alone and lets gradients into them (`CachePlan`). A live
    pass keeps a copy of the window as it is now.
    """
    patch, split = model.config.patch_size, model.config.rope_split
    height, width = chunk.shape[3] // patch[1], chunk.shape[4] // patch[2]
    view = cache.begin(start, chunk.shape[2])
    dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
    plan = CachePlan(
        query_rotary=rotary(view.query_frames, height, width, split, dtype),
        key_rotary=rotary(view.key_frames, height, width, split, dtype),
        window=view,
        mode="expanded",
        segments=(Segment(past=view.past),),
        frame_tokens=height * width,
        live=live,
    )
    rows = torch.full((len(chunk),), timestep, device=chunk.device)
    plans = [dataclasses.replace(plan, layer=_copy(layer) if live else layer) for layer in cache.layers]
    return run_blocks(model, prepare(model, chunk, rows, context, plan), plans, checkpointing=checkpointing)


def _copy(layer: LayerCache) -> LayerCache:
    copied = copy(layer)
    copied.buffers = tuple(buffer.clone() for buffer in layer.buffers)
    return copied
