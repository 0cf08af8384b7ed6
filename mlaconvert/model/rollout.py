"""Flow-matching schedules, and video generated chunk by chunk through the cache.

The flow is x_t = (1 - sigma) * data + sigma * noise with timestep = 1000 * sigma; the model predicts noise - data
(Lipman et al., arXiv 2210.02747). Schedules are warped by shift * s / (1 + (shift - 1) * s) (Esser et al., 2403.03206).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.errors import InputError
from mlaconvert.model.cache import LatentCache
from mlaconvert.model.schedule import Sampler, check_schedule
from mlaconvert.model.wan import WanModel
from mlaconvert.model.window import default_chunks


def same_length(*texts: Tensor) -> list[Tensor]:
    """Text embeddings [B, T, text_dim], each of its own T, with zeros up to the longest T, as a model pads them."""
    longest = max(text.shape[1] for text in texts)
    return [F.pad(text, (0, 0, 0, longest - text.shape[1])) for text in texts]


@dataclass(frozen=True, kw_only=True)
class Images:
    """What an image-to-video model is given besides noise and text.

    `latents` [B, in_dim - out_dim, F, H, W] of all frames are concatenated to the video's, `features`
    [B, I, image_dim] come from CLIP.
    """

    latents: Tensor | None = None
    features: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Given:
    """What is given of a video besides its prompt."""

    null_context: Tensor | None = None
    """The empty prompt's embedding [B or 1, T, text_dim], which guidance other than 1 needs."""

    prefix: Tensor | None = None
    """First frames [B, out_dim, F, height, width], whole chunks, which are taken as they are and continued."""

    images: Images = field(default_factory=Images)
    """What an image-to-video model is given."""


class LatentSize(NamedTuple):
    """The size of a video in latent frames and latent pixels: `LatentSize(frames=21, height=60, width=104)`."""

    frames: int
    height: int
    width: int


@dataclass(frozen=True, kw_only=True)
class CacheUse:
    """How a rollout uses its cache. But for `streaming`, and for a narrower `dtype`, nothing here changes the video."""

    streaming: StreamingConfig | None = None
    """Window, chunks and sink; None is the model's own setting."""

    dtype: torch.dtype | None = None
    """Dtype of the cached scalars; None is the model's."""

    keeps_text: bool = True
    """Keep the prompt's keys and values too, instead of computing them in every pass."""

    slice_size: int | None = None
    """Videos of a batch that go through the model at a time, so that activations do not grow with it; None is all."""


Context = Tensor | Sequence[tuple[int, Tensor]]


def chunk_noise(seeds: Sequence[int], start: int, shape: Sequence[int], draws: int) -> list[Tensor]:
    """`draws` noises [len(seeds), *shape] of the chunk that begins at frame `start`, one video for each seed.

    They depend on nothing else: a video is the same alone, in a batch, and continued from its own first frames.
    """
    rows = []
    for seed in seeds:
        # torch's CPU generator takes 32 bits of a seed, so seed and place are hashed into them.
        mixed = hashlib.sha256(f"{seed} {start}".encode()).digest()[:4]
        generator = torch.Generator().manual_seed(int.from_bytes(mixed, "big"))
        rows.append(torch.randn((draws, *shape), generator=generator))
    return list(torch.stack(rows, 1).unbind(0))


@torch.no_grad()
def rollout(
    model: WanModel,
    context: Context,
    *,
    size: LatentSize,
    sampler: Sampler,
    seed: int | Sequence[int] = 0,
    given: Given | None = None,
    cache: CacheUse | None = None,
    on_step: Callable[[], None] | None = None,
) -> Iterator[Tensor]:
    """Yield video latents chunk by chunk, [B, out_dim, f, height, width] each, through one cache.

    size = LatentSize(frames=21, height=60, width=104)
    for chunk in rollout(model, context, size=size, sampler=Sampler.few_step()):
        print(chunk.shape)

    `context` [B, T, text_dim] is the prompt; a sequence of (first frame, context) changes it in time, at the first
    chunk that begins there or later. The noise depends on the seeds alone, so that two models can be compared from the
    same noise: `seed` of the first video, counting up, or one for each. Every chunk is denoised, then run once at
    timestep 0 to write its clean keys and values. The frames of `size` count those of a given prefix. The cache is
    allocated once. `on_step` is called after every pass (`passes`).

    Raises InputError when guidance has no null context, or for a context, a prefix or images that do not fit.
    """
    given, cache = given or Given(), cache or CacheUse()
    frames, height, width = size
    null_context, prefix = given.null_context, given.prefix
    streaming = cache.streaming or model.config.streaming or StreamingConfig()
    device, dtype = model.patch_embedding.weight.device, model.dtype
    schedule = [(0, context)] if isinstance(context, Tensor) else list(context)
    batch = check_schedule(schedule)
    seeds = range(seed, seed + batch) if isinstance(seed, int) else tuple(seed)
    if len(seeds) != batch:
        raise InputError(f"{len(seeds)} seeds for {batch} videos; give one each, or one to count from")
    guided = sampler.guidance != 1
    if guided and null_context is None:
        raise InputError(f"guidance {sampler.guidance} needs the embedding of an empty prompt; give one, or guidance 1")
    one_frame = (model.config.out_dim, height, width)
    read = _check_prefix(prefix, batch, frames, one_frame, streaming)
    streams = [
        _Stream(
            model,
            LatentCache(
                model.config,
                batch=(2 if guided else 1) * len(rows),
                height=height,
                width=width,
                streaming=streaming,
                dtype=cache.dtype or dtype,
                device=device,
                keeps_text=cache.keeps_text,
            ),
            rows,
            sampler.guidance,
            given.images,
        )
        for rows in _slices(batch, cache.slice_size)
    ]
    draws = len(sampler.timesteps) if sampler.renoise else 1
    chunks = default_chunks(frames, streaming)

    def draw(start: int, count: int) -> list[list[Tensor]]:
        """The noises of every stream; none for given frames."""
        if start < read:
            return []
        shape = (one_frame[0], count, *one_frame[1:])
        found = [chunk_noise([seeds[i] for i in stream.rows], start, shape, draws) for stream in streams]
        return [[noise.pin_memory() for noise in row] for row in found] if device.type == "cuda" else found

    start, noises = 0, draw(0, chunks[0])
    for count, following in zip(chunks, [*chunks[1:], 0], strict=True):
        if schedule and schedule[0][0] <= start:
            while len(schedule) > 1 and schedule[1][0] <= start:
                schedule.pop(0)
            _, text = schedule.pop(0)
            for stream in streams:
                stream.read(text, null_context)
        if prefix is not None and start < read:
            parts = [prefix[list(s.rows), :, start : start + count].to(device, torch.float32) for s in streams]
        else:
            parts = [
                _denoise(sampler, stream, [n.to(device, non_blocking=True) for n in row], start, on_step)
                for stream, row in zip(streams, noises, strict=True)
            ]
        for stream, x in zip(streams, parts, strict=True):
            stream.velocity(x, 0.0, start)
            if on_step is not None:
                on_step()
        if following:  # drawn while a GPU is still at work
            noises = draw(start + count, following)
        yield parts[0] if len(parts) == 1 else torch.cat(parts)
        start += count


def passes(frames: int, sampler: Sampler, streaming: StreamingConfig | None, *, given: int = 0, slices: int = 1) -> int:
    """How often `rollout` calls `on_step`: `given` frames of a prefix are only read."""
    chunks, read = len(default_chunks(frames, streaming)), len(default_chunks(given, streaming))
    return slices * (read + (chunks - read) * (len(sampler.timesteps) + 1))


class _Stream:
    """Some videos of a batch, with a cache of their own."""

    def __init__(self, model: WanModel, cache: LatentCache, rows: range, guidance: float, images: Images) -> None:
        self.model, self.cache, self.rows, self.guidance = model, cache, rows, guidance
        self.copies = 1 if guidance == 1 else 2
        self.image_latents, self.features = (
            None if part is None else self._spread(part.to(cache.device)) for part in (images.latents, images.features)
        )

    def _spread(self, batch: Tensor) -> Tensor:
        """The rows of this stream, once more for the unconditional half."""
        return batch.expand(max(len(batch), self.rows.stop), *batch.shape[1:])[list(self.rows)].repeat(
            self.copies, *(1,) * (batch.ndim - 1)
        )

    def read(self, context: Tensor, null_context: Tensor | None) -> None:
        """Take up a prompt."""
        text = context[list(self.rows)]
        if self.copies == 2 and null_context is not None:
            empty = null_context.expand(max(len(null_context), self.rows.stop), -1, -1)[list(self.rows)]
            text = torch.cat(same_length(text, empty.to(text)))
        self.text = text.to(self.cache.device, self.model.dtype)

    def velocity(self, x: Tensor, timestep: float, start: int) -> Tensor:
        """Velocity of x [B, C, f, H, W], in float32; writes the chunk's keys and values."""
        rows = torch.full((len(self.text),), timestep, device=x.device)
        images = None if self.image_latents is None else self.image_latents[:, :, start : start + x.shape[2]]
        out = self.model(
            x if self.copies == 1 else x.repeat(2, 1, 1, 1, 1),
            rows,
            self.text,
            image_latents=images,
            image_features=self.features,
            cache=self.cache,
            start_frame=start,
        ).float()
        if self.copies == 1:
            return out
        conditional, unconditional = out.chunk(2)
        return torch.lerp(unconditional, conditional, self.guidance)


def _denoise(
    sampler: Sampler, stream: _Stream, noises: list[Tensor], start: int, on_step: Callable[[], None] | None
) -> Tensor:
    """From the first noise to a clean chunk [B, C, f, H, W]; the others are for noising again."""
    x, *fresh = noises
    levels = [*(t / 1000 for t in sampler.timesteps), 0.0]
    for i, (now, after) in enumerate(pairwise(levels)):
        flow = stream.velocity(x, 1000 * now, start)
        if on_step is not None:
            on_step()
        if sampler.renoise:
            clean = x - now * flow
            x = torch.lerp(clean, fresh[i], after) if after else clean
        else:
            x = x + (after - now) * flow
    return x


def _slices(batch: int, size: int | None) -> list[range]:
    if size is not None and size < 1:
        raise InputError(f"slice_size is {size}: give 1 or more videos at a time")
    return [range(i, min(i + (size or batch), batch)) for i in range(0, batch, size or batch)]


def _check_prefix(
    prefix: Tensor | None, batch: int, frames: int, size: tuple[int, int, int], streaming: StreamingConfig
) -> int:
    """The frames of a prefix."""
    if prefix is None:
        return 0
    given = prefix.shape[2] if prefix.ndim == 5 else 0
    if prefix.shape != (batch, size[0], given, *size[1:]) or given > frames:
        expected = f"[{batch}, {size[0]}, up to {frames}, {size[1]}, {size[2]}]"
        raise InputError(f"the prefix is {list(prefix.shape)}; expected {expected}")
    if given % streaming.chunk_frames:
        raise InputError(f"the prefix has {given} frames; give whole chunks of {streaming.chunk_frames}")
    return given
