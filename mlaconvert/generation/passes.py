"""The passes of a generation, one chunk after the other."""

from __future__ import annotations

import time
from collections.abc import Iterator

from torch import Tensor

from mlaconvert.generation.chunks import ChunkFile
from mlaconvert.generation.cost import cache_bytes
from mlaconvert.generation.plan import GenerationPlan
from mlaconvert.generation.request import Runtime
from mlaconvert.model.rollout import CacheUse, Given, LatentSize, passes, rollout
from mlaconvert.model.wan import WanModel
from mlaconvert.progress import Counter, Progress


class PassCounter(Counter):
    """Counts passes through the model, and notes how fast video frames come out of them."""

    def __init__(self, progress: Progress, total: int) -> None:
        super().__init__(progress, "generate", total)
        self.frames, self.started = 0, time.monotonic()

    def show(self, note: str = "") -> None:
        rate = self.frames / (time.monotonic() - self.started)
        super().show(note or (f"{rate:.3g} frames/s" if self.frames else ""))


def count_passes(plan: GenerationPlan, runtime: Runtime, given: int | None = None) -> int:
    """How often the model runs for a plan of which `given` frames are only read."""
    if given is None:
        given = 0 if plan.prefix is None else plan.prefix.shape[2]
    slices = -(-len(plan.seeds) // (runtime.slice_size or len(plan.seeds)))
    return passes(plan.frames, plan.sampler, plan.streaming, given=given, slices=slices)


def chunk_passes(
    model: WanModel, plan: GenerationPlan, runtime: Runtime, prefix: Tensor | None, count: PassCounter
) -> Iterator[Tensor]:
    """Run the model over a plan behind `prefix`; yields chunks [samples, C, f, H, W]."""
    given, start = 0 if prefix is None else prefix.shape[2], 0
    for chunk in rollout(
        model,
        plan.schedule,
        size=LatentSize(frames=plan.frames, height=plan.size[0], width=plan.size[1]),
        given=Given(null_context=plan.null_context, prefix=prefix, images=plan.images),
        cache=CacheUse(streaming=plan.streaming, slice_size=runtime.slice_size),
        sampler=plan.sampler,
        seed=plan.seeds,
        on_step=count.step,
    ):
        start += chunk.shape[2]
        if start > given:
            count.frames += len(chunk) * chunk.shape[2] * plan.stride
            count.show()
        yield chunk


def run_passes(model: WanModel, plan: GenerationPlan, runtime: Runtime, store: ChunkFile, progress: Progress) -> int:
    """Generate what the file lacks; the bytes of the cache that it takes."""
    if store.done < plan.frames:
        prefix = store.latents[:, :, : store.done] if store.done else plan.prefix
        count = PassCounter(progress, count_passes(plan, runtime, 0 if prefix is None else prefix.shape[2]))
        count.show()
        start = 0
        for chunk in chunk_passes(model, plan, runtime, prefix, count):
            if start >= store.done:
                store.write(start, chunk)
            start += chunk.shape[2]
    return cache_bytes(model.config, plan, model.dtype)
