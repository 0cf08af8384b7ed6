"""Self-attention that is called, caches and evicts as that of the published streaming codebases.

`Streaming` has the calls, the cache's slots and the positions; what a token caches is its subclasses'.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_mask

from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.mla import MLAConfig, MLALayer
from mlaconvert.errors import InputError
from mlaconvert.integrations.contract import CachedLayer, Contract
from mlaconvert.integrations.streaming.codebase import Codebase, Positions
from mlaconvert.model.attention.kernel import AttentionPlan, Segment, segments_of
from mlaconvert.model.attention.latent import LatentAttention
from mlaconvert.model.cache import LayerCache, WindowView
from mlaconvert.model.rope import Rotary, rotary

KvCache = MutableMapping[str, Any]
Grid = tuple[int, int, int]
_INDICES = ("global_end_index", "local_end_index")
_SINK = "sink_frame"  # beside their own keys, and only where LongLive has written another sink


@dataclass(frozen=True)
class _Place:
    """Slots of a chunk in a layer's cache, in tokens: it sees those before `head` and from `first` to `end`.

    Those before `kept` are not written again. `sink_frame` is where the sink begins in the video: not 0 once LongLive
    has written another one.
    """

    head: int
    first: int
    kept: int
    start: int
    end: int
    current_start: int  # of the chunk, from the start of the video
    sink: int
    sink_frame: int
    grid: Grid

    def frames(self, positions: Positions) -> tuple[Tensor, Tensor]:
        """Positions in time of the frames in the slots before `end`, and of the chunk's own."""
        tokens = self.grid[1] * self.grid[2]
        slots, start = torch.arange(self.end // tokens), self.start // tokens
        own = torch.arange(start, start + self.grid[0])
        if positions == "window":
            return slots, own
        evicted = self.current_start // tokens - start
        return slots + torch.where(slots < self.sink // tokens, self.sink_frame, evicted), own + evicted

    def seen(self, slots: Tensor, dim: int) -> Tensor:
        """What the chunk sees of one value a slot."""
        recent = slots.narrow(dim, self.first, self.end - self.first)
        return torch.cat((slots.narrow(dim, 0, self.head), recent), dim) if self.head else recent


class Turns:
    """What one pass of all layers shares: rotations and masks, made for the first layer."""

    def __init__(self, contract: Contract, positions: Positions, codebase: Codebase) -> None:
        self.contract, self.positions, self.codebase = contract, positions, codebase
        self._chunk: tuple[Any, AttentionPlan] | None = None
        self._clip: tuple[Any, AttentionPlan] | None = None

    def chunk(self, place: _Place, device: torch.device) -> AttentionPlan:
        """Of a chunk and what it sees of the cache."""
        key = (place, device)
        if self._chunk is None or self._chunk[0] != key:
            keys, queries = (
                rotary(frames.to(device), *place.grid[1:], self.contract.rope_split)
                for frames in place.frames(self.positions)
            )
            keys = Rotary(*(place.seen(turns, 0) for turns in keys))
            # What is kept of an earlier run is read from its latents, although it is of these frames.
            new = max(0, place.end - max(place.start, place.kept))
            own, past = slice(len(queries.cos) - new, None), slice(0, max(0, len(keys.cos) - new))
            plan = AttentionPlan(
                queries,
                keys,
                window=_written(place.start, place.end, device),
                mode="auto",
                segments=(Segment(own=own, past=past),),
            )
            self._chunk = (key, plan)
        return self._chunk[1]

    def clip(self, tokens: int, grid: Grid, block_mask: Any, device: torch.device) -> AttentionPlan:
        """Of a whole clip, or in teacher forcing of two side by side. Raises InputError for another size."""
        key = (tokens, grid, device)
        if self._clip is None or self._clip[0][0] is not block_mask or self._clip[0][1] != key:
            copies, rest = divmod(tokens, prod(grid))
            if rest or copies not in (1, 2):
                raise InputError(f"{tokens} tokens are not one or two clips of {' x '.join(map(str, grid))}")
            frames = torch.arange(grid[0], device=device).repeat(copies)
            turn = rotary(frames, *grid[1:], self.contract.rope_split)
            mask = None
            segments: tuple[Segment, ...] = ()
            if block_mask is not None:
                mask = create_mask(block_mask.mask_mod, None, None, tokens, tokens, device=str(device))[0, 0]
                segments = segments_of(mask)
            self._clip = ((block_mask, key), AttentionPlan(turn, turn, mask=mask, mode="auto", segments=segments))
        return self._clip[1]


class _Packed(LayerCache):
    """A layer's window in one buffer [B, tokens, channels]."""

    def __init__(self, buffer: Tensor, cached: CachedLayer, place: _Place) -> None:
        self.buffers, self.text = (buffer,), ()
        self.cached, self.place = cached, place

    def update(self, view: WindowView, *new: Tensor) -> tuple[Tensor, ...]:
        packed, place = self.cached.join(new), self.place
        if place.start < place.kept:
            (buffer,) = self.buffers
            packed = torch.cat((buffer[:, place.start : place.kept], packed[:, place.kept - place.start :]), 1)
        (window,) = super().update(view, packed)
        return self.cached.split(place.seen(window, 1))


class Streaming(nn.Module):
    """Attention called as Self-Forcing calls its `CausalWanSelfAttention`, or as one of its kin does.

    `local_attn_size` and `sink_size` are in latent frames, `max_attention_size` in tokens, as in their code.
    """

    local_attn_size: int
    sink_size: int
    max_attention_size: int

    cached: CachedLayer

    def join(self, index: int, turns: Turns) -> None:
        """Take part in the passes of `turns` as layer `index`, without a window as yet."""
        self.cached, self.turns = turns.contract.layers[index], turns
        self.local_attn_size, self.sink_size, self.max_attention_size = -1, 0, 2**62

    def attended(self, x: Tensor, plan: AttentionPlan, cache: LayerCache | None = None) -> Tensor:
        """As `CachedAttention` has it."""
        raise NotImplementedError

    def empty_buffer(self, dense: Tensor, device: torch.device | str) -> Tensor:
        """An empty buffer of what is cached, for as many videos and tokens as a dense one [B, tokens, ...] has."""
        return self.cached.buffer(dense.shape[0], dense.shape[1], dense.dtype, device)

    def forward(
        self,
        x: Tensor,
        seq_lens: Tensor,
        grid_sizes: Tensor,
        freqs: Tensor,
        block_mask: Any,
        kv_cache: KvCache | None = None,
        current_start: int = 0,
        cache_start: int | None = None,
        sink_recache_after_switch: bool = False,
        timestep: Tensor | None = None,
    ) -> Any:
        """[B, N, D] -> [B, N, D] of one chunk that begins at token `current_start`; without a cache, of a whole clip.

        `grid_sizes` [B, 3] or [3] has frames, height and width in tokens. `seq_lens`, `timestep` and `cache_start` (or
        CausVid's `current_end` in its place) are not needed. Without a cache, a `block_mask` becomes a plain mask of
        N * N bytes; N may be twice the clip, clean and noisy, as in teacher forcing. When the prompt changes, LongLive
        writes past chunks again, the sink only if `sink_recache_after_switch`; krea writes a clip under its mask.

        Raises InputError when the chunk does not fit the cache, or the cache is used in a way that latents cannot be.
        """
        frames, height, width = (int(size) for size in grid_sizes.reshape(-1, 3)[0].tolist())
        grid, codebase = (frames, height, width), self.turns.codebase
        if kv_cache is None:
            return self.attended(x, self.turns.clip(x.shape[1], grid, block_mask, x.device))
        if x.shape[1] != prod(grid):
            raise InputError(f"a chunk has {x.shape[1]} tokens, its grid_sizes say {frames} x {height} x {width}")
        if codebase.compare is not None:
            codebase.compare(freqs, x)
        self._check(kv_cache, current_start, height * width)
        buffer = self._buffer(kv_cache, x)
        if block_mask is not None and codebase.masks_beside_cache:
            return self._write_clip(x, kv_cache, buffer, self.turns.clip(x.shape[1], grid, block_mask, x.device), grid)
        place, ends, again = self._make_room(kv_cache, buffer, current_start, grid)
        if again and not sink_recache_after_switch:
            place = replace(place, kept=min(place.sink, place.end))
        elif again:
            kv_cache[_SINK] = (current_start - place.start) // (height * width)
        elif current_start == 0:
            kv_cache.pop(_SINK, None)
        place = replace(place, sink_frame=kv_cache.get(_SINK, 0))
        out = self.attended(x, self.turns.chunk(place, x.device), _Packed(buffer, self.cached, place))
        return (out, (*ends, {"action": "written", "is_recompute": again})) if codebase.hands_back else out

    def fuse_projections(self) -> None:
        """krea's code fuses each layer's q, k and v; ours has none."""

    def _write_clip(self, x: Tensor, kv_cache: KvCache, buffer: Tensor, plan: AttentionPlan, grid: Grid) -> Tensor:
        """Attention of a whole clip, which is then all that the cache holds."""
        tokens = x.shape[1]
        if tokens > buffer.shape[1]:
            raise InputError(f"a clip of {tokens} tokens does not fit a cache of {buffer.shape[1]}; make it longer")
        plan = replace(plan, window=_written(0, tokens, x.device))
        _set_indices(kv_cache, tokens, tokens)
        place = _Place(0, 0, 0, 0, tokens, 0, 0, 0, grid)
        return self.attended(x, plan, _Packed(buffer, self.cached, place))

    def _check(self, kv_cache: KvCache, current_start: int, tokens: int) -> None:
        """Raise InputError for what their cache shows and latent attention does not do."""
        codebase = self.turns.codebase
        for name in kv_cache.keys() - {"k", "v", *_INDICES, _SINK}:
            if kv_cache[name] is not None and kv_cache[name] is not False:
                raise InputError(
                    f"the cache has {name!r} set, which {codebase.name} reads and latent attention does not; leave it "
                    "out (in Infinity-RoPE: no scene cuts, '#'), or keep the dense attention"
                )
        if codebase.has_indices and any(name not in kv_cache for name in _INDICES):
            raise InputError(f"the cache of {codebase.name} lacks {_INDICES[0]} or {_INDICES[1]}")
        if codebase.frame_tokens not in (None, tokens):
            raise InputError(
                f"{codebase.name} takes every frame for {codebase.frame_tokens} tokens, and one of this video has "
                f"{tokens}, so that its positions would be wrong; generate {codebase.frame_tokens} tokens a frame"
            )
        if current_start == 0 and any(hasattr(part, "get_base_layer") for part in self.modules()):
            raise InputError(
                "a LoRA was put on the model after swap_attention, so parts of it count twice: give it to mlaconvert "
                "convert --lora, and leave its part of the inference script out"
            )

    def _buffer(self, kv_cache: KvCache, x: Tensor) -> Tensor:
        """The dictionary's buffer of latents, in place of the dense one that their code made, or of other latents."""
        made: Tensor = kv_cache["k"]
        if made.shape[2:] != (self.cached.channels,):
            made = self.empty_buffer(made, made.device)
            kv_cache["k"], kv_cache["v"] = made, made[..., :0]
        if made.shape[0] != x.shape[0]:
            raise InputError(f"the cache is for {made.shape[0]} videos, the chunk has {x.shape[0]}; make another cache")
        return made

    def _make_room(
        self, kv_cache: KvCache, buffer: Tensor, current_start: int, grid: Grid
    ) -> tuple[_Place, tuple[int, int], bool]:
        """Where the chunk goes, by Self-Forcing's rule: what overflows is pushed out behind the sink.

        With it, the new indices, and whether this is LongLive's second run of past chunks, which leaves them alone.
        """
        tokens, new, size = grid[1] * grid[2], prod(grid), buffer.shape[1]
        current_end, sink = current_start + new, self.sink_size * tokens
        end, again, codebase = current_end, False, self.turns.codebase
        if codebase.has_indices:
            seen, local = (int(kv_cache[name]) for name in _INDICES)
            end = local + current_end - seen
            again = codebase.hands_back and current_start > 0 and current_end <= seen
            if self.local_attn_size != -1 and current_end > seen and local + new > size:
                evicted = local + new - size
                kept = buffer[:, sink + evicted : local]
                if sink + new > size or evicted % tokens:
                    raise InputError(
                        f"a chunk of {grid[0]} frames does not fit a cache of {size} tokens, {tokens} a frame, with a "
                        f"sink of {self.sink_size} frames; give local_attn_size of at least {self.sink_size + grid[0]}"
                    )
                buffer[:, sink : sink + kept.shape[1]] = kept.clone()
                end -= evicted
        if end > size:
            raise InputError(
                f"the chunk ends at token {end}, the cache holds {size}; make it longer, or set local_attn_size"
            )
        if codebase.counts_to_window:
            self._check_queries(current_start // tokens, (end - new) // tokens, grid[0], tokens)
        if not again:
            _set_indices(kv_cache, current_end, end)
        # LongLive sees its sink always, Self-Forcing only while it is among the last tokens.
        head = min(sink, end) if codebase.hands_back else 0
        first = max(head, end - max(self.max_attention_size - head, 0))
        if first == head:
            head = first = 0
        place = _Place(head, first, 0, end - new, end, current_start, sink, 0, grid)
        return place, (current_end, end), again

    def _check_queries(self, frame: int, slot: int, frames: int, tokens: int) -> None:
        """Raise InputError where Infinity-RoPE turns a chunk's queries and keys as if at different times."""
        window = self.max_attention_size // tokens
        expected = frame if frame < window else window - frames
        if expected != slot:
            raise InputError(
                f"Infinity-RoPE counts this chunk's queries from frame {expected} and its keys from {slot} of the "
                f"window, as after a new prompt; with local_attn_size {2 * frames} both are one"
            )


class StreamingLatentAttention(Streaming, LatentAttention):  # type: ignore[misc]
    """`LatentAttention` called as Self-Forcing calls its `CausalWanSelfAttention`."""

    def __init__(self, config: WanConfig, mla: MLAConfig, layer: MLALayer, index: int, turns: Turns) -> None:
        super().__init__(config, mla, layer)
        self.join(index, turns)

    def attended(self, x: Tensor, plan: AttentionPlan, cache: LayerCache | None = None) -> Tensor:
        if cache is not None and not torch.is_grad_enabled():
            self.refresh()
        return self.o(self.heads(x, plan, cache))


def _written(start: int, end: int, device: torch.device) -> WindowView:
    """A view for a cache whose keys know their turns from elsewhere."""
    return WindowView(torch.arange(start, end, device=device), end, torch.empty(0), torch.empty(0), slice(0, 0))


def _set_indices(kv_cache: KvCache, *values: int) -> None:
    for name, value in zip(_INDICES, values, strict=True):
        known = kv_cache.get(name)
        if isinstance(known, Tensor):
            known.fill_(value)
        elif known is not None:  # krea's are plain numbers
            kv_cache[name] = value
