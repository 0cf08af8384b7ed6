"""The latent cache as SGLang's causal stages hold one: an object a layer, for self-attention and for the prompt."""

from __future__ import annotations

import torch

from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.errors import UnsupportedModelError
from mlaconvert.model.cache import LatentCache, LayerCache


class LayerKVCache:
    """One layer's part of a `LatentCache`, with what SGLang's stages ask of a causal KV cache.

    `cache` is that of all layers, `layer` the part. Sizes are in tokens.
    """

    num_cache_heads = 1
    """One latent serves all heads."""
    global_sink_tokens = 0
    """A second sink, which latents do not have."""

    def __init__(self, cache: LatentCache, layer: LayerCache, sink_tokens: int) -> None:
        self.cache, self.layer, self.sink_tokens = cache, layer, sink_tokens
        self.cache_size = self.attention_window_size = cache.streaming.window_frames * cache.tokens_per_frame

    @property
    def nbytes(self) -> int:
        """Bytes of the layer's buffers."""
        return sum(buffer.nbytes for buffer in self.layer.buffers)

    def reset_indices(self) -> None:
        """Begin another video in the same memory."""
        self.cache.reset()

    def pin_current_chunk(self, current_num_tokens: int) -> None:
        """Not offered: raises UnsupportedModelError, since the sink is the video's first frames."""
        raise UnsupportedModelError("the sink of a latent cache cannot be moved to a later chunk; leave scene cuts out")


class TextKVCache:
    """One layer's keys and values of the prompt, which the model keeps in the same `LatentCache`."""

    def __init__(self, cache: LatentCache) -> None:
        self.cache = cache

    @property
    def is_init(self) -> bool:
        """Whether a prompt has been read."""
        return bool(self.cache.prompt)

    def reset(self) -> None:
        """Read the prompt anew in the next pass."""
        self.cache.prompt = ()


def allocate(
    config: WanConfig,
    streaming: StreamingConfig,
    size: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device | str,
) -> list[LayerKVCache]:
    """A cache of all layers for `size`: videos, and height and width in latent pixels."""
    batch, height, width = size
    cache = LatentCache(
        config, batch=batch, height=height, width=width, streaming=streaming, dtype=dtype, device=device
    )
    sink = streaming.sink_frames * cache.tokens_per_frame
    return [LayerKVCache(cache, layer, sink) for layer in cache.layers]
