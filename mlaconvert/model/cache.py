"""The sliding-window cache of a causal model: latents for MLA layers, keys and values for dense ones.

The window is `sink_frames` slots that are written once, then a ring of the most recent frames. A new chunk takes the
slots of the frames that it pushes out, so nothing is ever moved. Attention does not care for the order of its keys;
each slot only has to know which frame it holds, because keys are cached unrotated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.errors import InputError


@dataclass(frozen=True)
class WindowView:
    """Where a chunk is written, and what it sees.

    `write` [n * tokens] are the token slots of the chunk; the first `length` token slots hold the whole window.
    `key_frames` [window] and `query_frames` [n] are positions in time, in slot order and in chunk order.
    """

    write: Tensor
    length: int
    key_frames: Tensor
    query_frames: Tensor


class LayerCache:
    """One layer's buffers, each [B, capacity, ...]; allocated once.

    `text` holds the keys and values of the prompt that cross-attention reads, [B, T, H, D] each; the model fills it
    when the prompt changes.
    """

    def __init__(
        self,
        batch: int,
        capacity: int,
        widths: tuple[tuple[int, ...], ...],
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.buffers = tuple(torch.zeros(batch, capacity, *width, dtype=dtype, device=device) for width in widths)
        self.text: tuple[Tensor, ...] = ()

    def update(self, view: WindowView, *new: Tensor) -> tuple[Tensor, ...]:
        """Write the chunk's tensors [B, n * tokens, ...] and return the window's [B, length, ...]."""
        for buffer, value in zip(self.buffers, new, strict=True):
            buffer.index_copy_(1, view.write, value.detach().to(buffer.dtype))
        return tuple(buffer[:, : view.length] for buffer in self.buffers)

    @classmethod
    def stay_uncompiled(cls) -> None:
        """Keep compilers out of `update`: they may turn writing in place into a copy of the whole buffer.

        Not a decorator, because that imports torch's compiler, which takes as long as all else together.
        """
        if not hasattr(cls.update, "_torchdynamo_disable"):
            cls.update = torch.compiler.disable(cls.update)  # type: ignore[method-assign]


class LatentCache:
    """Cache of all layers of a causal model for one window of video.

    An MLA layer holds the latent, the rotary key and, with the token key norm, that norm; a dense layer holds
    per-head keys (unrotated) and values. `height` and `width` are in latent pixels. With `keeps_text`, each layer
    also holds the keys and values of the prompt for as long as it is the same.
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
        capacity = self.streaming.window_frames * self.tokens_per_frame
        self.layers = [
            LayerCache(batch, capacity, layer_widths(config, i), dtype, device) for i in range(config.num_layers)
        ]
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
        sink, window = self.streaming.sink_frames, self.streaming.window_frames
        if (start > 0 and frames > window - sink) or frames > window:
            raise InputError(
                f"a chunk of {frames} frames does not fit a window of {window} with a sink of {sink}; "
                f"give window_frames of at least {sink + frames}"
            )
        self.start, self.end = start, start + frames
        ring = window - sink

        def slot(frame: int) -> int:
            return frame if frame < sink else sink + (frame - sink) % ring

        recent = max(self.end - ring, sink)  # oldest frame outside the sink that is still held
        held = [*range(min(sink, self.end)), *range(recent, self.end)]
        frame_of = sorted((slot(frame), frame) for frame in held)
        shift = 0 if self.streaming.positions == "absolute" else max(self.end - window, 0)
        position = {frame: frame if frame < sink else frame - shift for frame in held}
        tokens = torch.arange(self.tokens_per_frame)
        write = torch.tensor([slot(f) for f in range(start, self.end)])[:, None] * self.tokens_per_frame + tokens
        self.view = WindowView(
            write=write.flatten().to(self.device),
            length=len(held) * self.tokens_per_frame,
            key_frames=torch.tensor([position[frame] for _, frame in frame_of], device=self.device),
            query_frames=torch.tensor([position[f] for f in range(start, self.end)], device=self.device),
        )
        return self.view


def layer_widths(config: WanConfig, layer: int) -> tuple[tuple[int, ...], ...]:
    """Trailing shapes of what `layer` caches for a token."""
    mla = config.mla.layers[layer] if config.mla else None
    if mla is None or config.mla is None:
        return ((config.num_heads, config.head_dim),) * 2
    norm = ((1,),) if config.mla.key_norm == "token" else ()
    rope = config.mla.cached_rope(mla)
    return ((mla.kv_lora_rank,), *(((rope,),) if rope else ()), *norm)
