"""The sliding-window cache of a causal model: latents for MLA layers, keys and values for dense ones.

A new chunk takes the slots of the frames that it pushes out (`window.slot`), so nothing is ever moved. Attention does
not care for the order of its keys; each slot only has to know which frame it holds, because keys are cached unrotated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.packing import run_bytes
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.errors import InputError
from mlaconvert.model.group_quantizer import GroupQuantizer
from mlaconvert.model.window import check_chunk, frame_positions, seen_frames, slot


def write_slots(buffer: Tensor, slots: Tensor, value: Tensor) -> None:
    """Write `value` [B, n, ...] to the token slots [n] of a buffer [B, capacity, ...], in place."""
    buffer.index_copy_(1, slots, value.detach().to(buffer.dtype))


Write = Callable[[Tensor, Tensor, Tensor], None]


@dataclass(frozen=True)
class WindowView:
    """Where a chunk is written, and what it sees.

    `write` [n * tokens] are the token slots of the chunk; the first `length` token slots hold the whole window, and
    those of them in `past` the frames before the chunk.
    `key_frames` [window] and `query_frames` [n] are positions in time, in slot order and in chunk order.
    """

    write: Tensor
    length: int
    key_frames: Tensor
    query_frames: Tensor
    past: slice | Tensor


class Entry(NamedTuple):
    """What one buffer holds for a token."""

    width: tuple[int, ...]  # trailing shape
    dtype: torch.dtype


class LayerCache:
    """One layer's buffers, each [B, capacity, ...]; allocated once.

    `text` holds the keys and values of the prompt that cross-attention reads, [B, T, H, D] each; the model fills it
    when the prompt changes. `write` puts values into a buffer; a compiled model brings its own.
    """

    write: Write = staticmethod(write_slots)

    def __init__(
        self,
        batch: int,
        capacity: int,
        entries: Sequence[Entry],
        device: torch.device | str,
    ) -> None:
        self.buffers = tuple(
            torch.zeros(batch, capacity, *width, dtype=dtype, device=device) for width, dtype in entries
        )
        self.text: tuple[Tensor, ...] = ()

    def update(self, view: WindowView, *new: Tensor) -> tuple[Tensor, ...]:
        """Write the chunk's tensors [B, n * tokens, ...] and return the window's [B, length, ...]."""
        for buffer, value in zip(self.buffers, new, strict=True):
            self.write(buffer, view.write, value)
        return self.held(view)

    def held(self, view: WindowView) -> tuple[Tensor, ...]:
        """What the cache holds of the window, [B, length, ...] each."""
        return tuple(buffer[:, : view.length] for buffer in self.buffers)


class NarrowLayerCache(LayerCache):
    """One layer's buffers, narrowed by a `GroupQuantizer`: each [B, frames, ...], with a row for a frame.

    Only the past is read from them: `update` returns the chunk's own tensors as they are. `dtype` is the cache's, as
    which it is read.
    """

    def __init__(
        self,
        batch: int,
        frames: int,
        tokens: int,
        quantizer: GroupQuantizer,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__(batch, frames, [Entry(*row) for row in quantizer.rows(tokens, dtype)], device)
        self.tokens, self.quantizer, self.dtype = tokens, quantizer, dtype

    def update(self, view: WindowView, *new: Tensor) -> tuple[Tensor, ...]:
        """Write the chunk's tensors [B, n * tokens, ...]; the window's [B, length, ...], with these in their slots."""
        frames = view.write[:: self.tokens] // self.tokens
        for buffer, rows in zip(self.buffers, self.quantizer.pack(self.tokens, new), strict=True):
            self.write(buffer, frames, rows)
        return tuple(
            held.to(own.dtype).index_copy_(1, view.write, own) for held, own in zip(self.held(view), new, strict=True)
        )

    def held(self, view: WindowView) -> tuple[Tensor, ...]:
        """What the cache gives back of the window, [B, length, ...] each, in its dtype."""
        rows = [buffer[:, : view.length // self.tokens] for buffer in self.buffers]
        return tuple(self.quantizer.unpack(self.tokens, rows, self.dtype))


class LatentCache:
    """Cache of all layers of a causal model for one window of video.

    cache = LatentCache(model.config, batch=1, height=60, width=104, dtype=model.dtype, device="cuda")
    model(chunk, timesteps, context, cache=cache, start_frame=0)  # writes the chunk's keys and values

    An MLA layer holds the latent, the rotary key and, with the token key norm, that norm; a dense layer holds
    per-head keys (unrotated) and values. With the config's `cache_dtype` they are narrowed to that. `height` and
    `width` are in latent pixels. With `keeps_text`, each layer also holds the keys and values of the prompt for as
    long as it is the same.
    """

    def __init__(
        self,
        config: WanConfig,
        *,
        batch: int,
        height: int,
        width: int,
        streaming: StreamingConfig | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        keeps_text: bool = True,
    ) -> None:
        self.keeps_text = keeps_text
        self.streaming = streaming or config.streaming or StreamingConfig()
        self.tokens_per_frame = config.tokens_per_frame(height, width)
        self.device = torch.device(device)
        frames, tokens = self.streaming.window_frames, self.tokens_per_frame
        self.layers: list[LayerCache] = []
        for i in range(config.num_layers):
            quantizer = GroupQuantizer.of(config, i)
            self.layers.append(
                LayerCache(batch, frames * tokens, layer_entries(config, i, dtype), device)
                if quantizer is None
                else NarrowLayerCache(batch, frames, tokens, quantizer, dtype=dtype, device=device)
            )
        self.reset()

    def reset(self) -> None:
        """Forget everything; the buffers stay allocated."""
        self.start = 0  # first frame of the newest chunk
        self.end = 0  # one past its last frame
        self.view: WindowView | None = None  # the newest chunk's
        self.plan: Any = None  # what the model derived from it; every step of a chunk shares it
        self.prompt: tuple[Any, ...] = ()  # what the layers' text was made of
        for layer in self.layers:
            layer.text = ()

    @property
    def nbytes(self) -> int:
        """Measured bytes of all buffers; the prompt's keys and values are counted by `text_nbytes`."""
        return sum(b.nbytes for layer in self.layers for b in layer.buffers)

    @property
    def text_nbytes(self) -> int:
        """Measured bytes of the prompt's keys and values, which do not depend on the window."""
        return sum(t.nbytes for layer in self.layers for t in layer.text)

    def seek(self, frame: int) -> None:
        """Count on from `frame` as if all before it had been written; the buffers stay as they are."""
        self.start = self.end = frame
        self.view = self.plan = None

    def begin(self, start: int, frames: int) -> WindowView:
        """Open the chunk of `frames` frames at frame `start`: the next one, or the newest once more.

        The view of a chunk that is opened again is the same object. Raises InputError when the chunk is neither or
        does not fit into the window.
        """
        again = start == self.start and start + frames == self.end
        if again and self.view is not None:
            return self.view
        if start != self.end and not again:
            raise InputError(
                f"chunk at frame {start} with {frames} frames: the cache expects the next one at frame {self.end}, "
                f"or the newest once more ({self.start} to {self.end - 1})"
            )
        check_chunk(start, frames, self.streaming)
        self.start, self.end = start, start + frames
        seen = seen_frames(self.end, self.streaming)
        position = dict(zip(seen, frame_positions(seen, self.end, self.streaming), strict=True))
        slots = {frame: slot(frame, self.streaming) for frame in seen}
        tokens = torch.arange(self.tokens_per_frame)

        def token_slots(frames: list[int]) -> Tensor:
            return (torch.tensor(frames, dtype=torch.long)[:, None] * self.tokens_per_frame + tokens).flatten()

        write = token_slots([slots[f] for f in range(start, self.end)])
        past = token_slots(sorted(slots[f] for f in seen if f < start))
        self.view = WindowView(
            write=write.to(self.device),
            length=len(seen) * self.tokens_per_frame,
            key_frames=torch.tensor([position[f] for f in sorted(seen, key=slots.__getitem__)], device=self.device),
            query_frames=torch.tensor([position[f] for f in range(start, self.end)], device=self.device),
            past=past.to(self.device),
        )
        return self.view


def layer_entries(config: WanConfig, layer: int, dtype: torch.dtype) -> tuple[Entry, ...]:
    """What `layer` caches for a token: numbers of `dtype`, or the bytes of its quantiser; without a `cache_dtype`."""
    mla = config.mla.layers[layer] if config.mla else None
    if mla is not None and mla.cache_bits:
        return (Entry((run_bytes(mla.cache_bits),), torch.uint8),)
    return tuple(Entry(part.width, dtype) for part in config.cached_parts(layer))
