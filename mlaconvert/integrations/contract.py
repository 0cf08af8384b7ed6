"""What an engine must know of a model to keep its cache and to call its attention, read once from a config.

    contract = Contract.of(checkpoint.config)
    buffers = [layer.buffer(1, contract.window_tokens(1560), torch.bfloat16, "cuda") for layer in contract.layers]

Keys are cached before they turn, so positions are the engine's to choose in every pass. Every integration of this
package is built on it: diffusers' classes, `swap_attention`, and SGLang's pipeline.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.mla import Present
from mlaconvert.config.parsing import STRICT, Count, check_fields
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.errors import ConfigError
from mlaconvert.model.attention.kernel import AttentionPlan
from mlaconvert.model.cache import LayerCache, layer_entries
from mlaconvert.model.window import chunk_mask, default_chunks


@dataclass(frozen=True, kw_only=True)
class CachedLayer:
    """What one layer caches of a token. Raises ConfigError naming the field."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    latent: bool
    """Whether its attention is latent; a dense layer caches keys and values of all heads."""
    widths: tuple[tuple[Count, ...], ...]
    """Trailing shape of each cached tensor, in the order in which attention gives and takes them: latent, rotary key
    and key norm, or keys and values [H, D]; of packed bits their bytes, in one."""
    packed: bool = False
    """Whether it is bytes of the model's own packed bits, whatever the dtype of the cache; else numbers of that."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.widths or not all(self.widths):
            raise ConfigError(f"widths is {self.widths}: give the shape of each cached tensor")
        if self.packed and not (self.latent and len(self.widths) == 1):
            raise ConfigError("packed bits lie in one tensor of a latent layer; give one width, and latent")

    @property
    def channels(self) -> int:
        """Numbers of a token side by side, or bytes where it is packed."""
        return sum(prod(width) for width in self.widths)

    def token_bytes(self, itemsize: int) -> int:
        """Bytes of a token, where a number of the cache's dtype takes `itemsize`."""
        return self.channels * (1 if self.packed else itemsize)

    def buffer(self, batch: int, tokens: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """An empty buffer [batch, tokens, channels] for a cache of `dtype`."""
        return torch.zeros(batch, tokens, self.channels, dtype=torch.uint8 if self.packed else dtype, device=device)

    def join(self, parts: tuple[Tensor, ...]) -> Tensor:
        """The cached tensors [B, N, ...] side by side, [B, N, channels], as `buffer` holds them."""
        return torch.cat([part.flatten(2) for part in parts], -1)

    def split(self, rows: Tensor) -> tuple[Tensor, ...]:
        """What `join` put side by side."""
        parts = rows.split([prod(width) for width in self.widths], -1)
        return tuple(part.unflatten(-1, width) for part, width in zip(parts, self.widths, strict=True))


@dataclass(frozen=True, kw_only=True)
class Contract:
    """What an engine must know of a model. Raises ConfigError naming the field."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    layers: tuple[CachedLayer, ...]
    """Every layer of the model, in order."""
    rope_split: tuple[Count, Count, Count]
    """Complex rotary pairs of a head on the time, height and width axes."""
    streaming: StreamingConfig | None = None
    """Window, sink, chunks and positions that it was made for; None for a bidirectional model, which sees a whole clip
    and has no past to cache."""
    present: Present = "latent"
    """Which keys are exact: with "exact" those of the chunk in work are made anew in every pass, and latents are read
    for the past alone; with "latent" the chunk sees itself through its latents too."""
    owner: Literal["engine"] = "engine"
    """Whose the cache's memory is: attention writes into what it is given, and keeps nothing from pass to pass."""
    written: Literal["every pass"] = "every pass"
    """When the chunk in work is written: by each pass over it, noisy ones too, into the same slots. The last is to be a
    pass over the clean chunk at timestep 0."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.layers or not all(isinstance(layer, CachedLayer) for layer in self.layers):
            raise ConfigError("layers must have a CachedLayer for each layer of the model")
        if self.present == "exact" and not self.latent_layers:
            raise ConfigError("present is exact, which needs a latent layer; give present latent")

    @classmethod
    def of(cls, config: WanConfig) -> Contract:
        """That of a model, dense or converted.

        Raises ConfigError for one whose cache is narrowed while it runs: tokens then share groups.
        """
        if config.cache_dtype is not None:
            raise ConfigError(
                f"cache_dtype is {config.cache_dtype}, a setting of mlaconvert's own runs; for an engine leave it out, "
                "or convert with --bytes-per-token"
            )
        entries = [layer_entries(config, i, torch.float32) for i in range(config.num_layers)]
        return cls(
            layers=tuple(
                CachedLayer(
                    latent=config.mla is not None and config.mla.layers[i] is not None,
                    widths=tuple(entry.width for entry in layer),
                    packed=layer[0].dtype == torch.uint8,
                )
                for i, layer in enumerate(entries)
            ),
            rope_split=config.rope_split,
            streaming=config.streaming,
            present="latent" if config.mla is None else config.mla.present,
        )

    @property
    def latent_layers(self) -> tuple[int, ...]:
        """The indices of converted layers."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.latent)

    @property
    def window(self) -> StreamingConfig:
        """What a cache is made for: the model's own, or the defaults where it says nothing."""
        return self.streaming or StreamingConfig()

    def window_tokens(self, frame_tokens: int) -> int:
        """Tokens of a full window of frames of `frame_tokens` tokens."""
        return self.window.window_frames * frame_tokens

    def cache_bytes(self, frame_tokens: int, itemsize: int, batch: int = 1) -> int:
        """Bytes of all layers' buffers for a full window, as `analyze` plans them."""
        tokens = batch * self.window_tokens(frame_tokens)
        return tokens * sum(layer.token_bytes(itemsize) for layer in self.layers)

    def visible(self, frames: int) -> Tensor | None:
        """Which frame sees which, bool [F, F], of a clip in one pass; None where every frame sees every other."""
        if self.streaming is None:
            return None
        return chunk_mask(default_chunks(frames, self.streaming), self.streaming)


@runtime_checkable
class CachedAttention(Protocol):
    """Self-attention of one layer as engines call it, dense or latent, whatever their own call looks like."""

    cached: CachedLayer
    """What it caches of a token."""

    def attended(self, x: Tensor, plan: AttentionPlan, cache: LayerCache | None = None) -> Tensor:
        """[B, N, D] -> [B, N, D], output projection included.

        With a `cache` it writes the chunk's `cached` tensors where `plan.window` says and sees the window; without one,
        the queries see what `plan.mask` lets them. `plan` has the rotations of queries and keys.
        """
        ...
