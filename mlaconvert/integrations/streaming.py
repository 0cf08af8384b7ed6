"""Latent attention inside the published streaming codebases: Self-Forcing, LongLive, CausVid, and their kin.

    from mlaconvert.integrations.streaming import swap_attention
    swap_attention(pipeline, "self-forcing-mla")

Two lines in an inference script, anywhere between making the pipeline and running it. Their model keeps its blocks,
their pipeline its sampler and its cache dictionaries; only `self_attn` of converted layers is replaced, and every other
weight is read from the converted folder as well, because healing may have changed it.

Their dictionaries then hold under "k" what a layer caches of a token side by side, [B, tokens, latent + rotary + norm],
unrotated, and under "v" nothing; indices, eviction and sink are theirs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_mask

from mlaconvert.attention import AttentionPlan, LatentAttention
from mlaconvert.cache import LayerCache, WindowView, layer_widths
from mlaconvert.config import MLAConfig, MLALayer, StreamingConfig, WanConfig
from mlaconvert.errors import ConfigError, InputError, UnsupportedModelError
from mlaconvert.families import Checkpoint, open_checkpoint
from mlaconvert.rope import rotary

Positions = Literal["window", "absolute"]
KvCache = MutableMapping[str, Any]

# Their self-attention's arguments from kv_cache on: Self-Forcing and most of its descendants; LongLive; CausVid.
_LONGLIVE = ("kv_cache", "current_start", "cache_start", "sink_recache_after_switch")
_SIGNATURES = (_LONGLIVE[:3], _LONGLIVE, ("kv_cache", "current_start", "current_end"))
_INDICES = ("global_end_index", "local_end_index")
_SINK = "sink_frame"  # beside their own keys, and only where LongLive has written another sink


def swap_attention(
    model: nn.Module,
    source: str | Path,
    *,
    positions: Positions | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
) -> None:
    """Put the converted model `source` into their causal `model`, or into the one inside their pipeline.

    `source`, `revision` and `subfolder` are those of `open_checkpoint`. `positions` "window" counts frames from the
    sink, "absolute" from the start of the video as Self-Forcing does; by default it is what `source` was converted for.
    A pipeline's `_initialize_kv_cache` is replaced too, so that the dense cache is never allocated; without it (`model`
    is the bare model) each layer's is freed when it is first used. For inference: cached chunks carry no gradients.

    Raises UnsupportedModelError for a model whose attention is called otherwise, ConfigError for a source that is not
    converted, InputError when the two are not of one geometry; the model is then as it was.
    """
    causal = _causal_model(model)
    with open_checkpoint(source, revision=revision, subfolder=subfolder) as checkpoint:
        config = checkpoint.config
        if config.mla is None:
            raise ConfigError(f"{source} is not converted; run mlaconvert convert {source} -o DIR, and give DIR")
        chosen = positions or (config.streaming or StreamingConfig()).positions
        turns = _Turns(config, chosen)
        swapped = {i: layer for i, layer in enumerate(config.mla.layers) if layer is not None}
        _check(causal, checkpoint, swapped, source)
        for i, layer in swapped.items():
            block = causal.get_submodule(f"blocks.{i}")
            block.self_attn = _made_like(block.get_submodule("self_attn"), checkpoint, i, config.mla, layer, turns)
        state = causal.state_dict()
        with torch.no_grad():
            for name in _outside(checkpoint, swapped):
                state[name].copy_(checkpoint.read(name))
    allocate: Any = getattr(model, "_initialize_kv_cache", None)
    if allocate is not None:
        setattr(model, allocate.__name__, _allocating_latents(model, allocate, causal))


@dataclass(frozen=True)
class _Place:
    """Slots of a chunk in a layer's cache, in tokens: those read begin at `first`, those before `kept` stay."""

    first: int
    kept: int
    start: int
    end: int
    current_start: int  # of the chunk, from the start of the video
    sink: int
    sink_frame: int  # that the sink begins with: not 0 once LongLive has written another one
    grid: tuple[int, int, int]

    def frames(self, positions: Positions) -> tuple[Tensor, Tensor]:
        """Positions in time of the frames in the slots before `end`, and of the chunk's own."""
        tokens = self.grid[1] * self.grid[2]
        slots, start = torch.arange(self.end // tokens), self.start // tokens
        own = torch.arange(start, start + self.grid[0])
        if positions == "window":
            return slots, own
        evicted = self.current_start // tokens - start
        return slots + torch.where(slots < self.sink // tokens, self.sink_frame, evicted), own + evicted


class _Turns:
    """Rotations of one chunk, made for the first layer and shared by the others."""

    def __init__(self, config: WanConfig, positions: Positions) -> None:
        self.config, self.positions = config, positions
        self._known: tuple[Any, AttentionPlan] | None = None

    def plan(self, place: _Place, device: torch.device) -> AttentionPlan:
        key = (place, device)
        if self._known is None or self._known[0] != key:
            keys, queries = (
                rotary(frames.to(device), *place.grid[1:], self.config.rope_split)
                for frames in place.frames(self.positions)
            )
            keys = keys._replace(cos=keys.cos[place.first :], sin=keys.sin[place.first :])
            view = WindowView(
                write=torch.arange(place.start, place.end, device=device),
                length=place.end,
                key_frames=torch.empty(0),
                query_frames=torch.empty(0),
            )
            self._known = (key, AttentionPlan(query_rotary=queries, key_rotary=keys, window=view, mode="auto"))
        return self._known[1]


class _Packed(LayerCache):
    """A layer's window in one buffer [B, tokens, sum of widths]."""

    def __init__(self, buffer: Tensor, widths: tuple[int, ...], place: _Place) -> None:
        self.buffers, self.text = (buffer,), ()
        self.widths, self.place = widths, place

    def update(self, view: WindowView, *new: Tensor) -> tuple[Tensor, ...]:
        packed, place = torch.cat(new, -1), self.place
        if place.start < place.kept:
            (buffer,) = self.buffers
            packed = torch.cat((buffer[:, place.start : place.kept], packed[:, place.kept - place.start :]), 1)
        (window,) = super().update(view, packed)
        return window[:, place.first :].split(self.widths, -1)


class StreamingLatentAttention(LatentAttention):
    """`LatentAttention` called as Self-Forcing calls its `CausalWanSelfAttention`.

    `local_attn_size` and `sink_size` are in latent frames, `max_attention_size` in tokens, as in their code. With
    `hands_back`, the call ends as LongLive's does: with the new indices for the model to set.
    """

    def __init__(self, config: WanConfig, mla: MLAConfig, layer: MLALayer, index: int, turns: _Turns) -> None:
        super().__init__(config, mla, layer)
        self.widths = tuple(prod(width) for width in layer_widths(config, index))
        self.turns, self.hands_back = turns, False
        self.local_attn_size, self.sink_size, self.max_attention_size = -1, 0, 2**62

    def forward(  # type: ignore[override]
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
    ) -> Any:
        """[B, N, D] -> [B, N, D] of one chunk that begins at token `current_start`; without a cache, of a whole clip.

        `grid_sizes` [B, 3] has frames, height and width in tokens. `seq_lens`, `freqs` and `cache_start` (or CausVid's
        `current_end` in its place) are not needed. Without a cache, a `block_mask` becomes a plain mask of N * N bytes;
        N may be twice the clip, clean and noisy, as in teacher forcing. When the prompt changes, LongLive writes past
        chunks again, the sink only if `sink_recache_after_switch`.

        Raises InputError when the chunk does not fit the cache.
        """
        frames, height, width = (int(size) for size in grid_sizes[0].tolist())
        grid = (frames, height, width)
        if kv_cache is None:
            return self.o(self.heads(x, self._whole_clip(x, grid, block_mask)))
        if x.shape[1] != prod(grid):
            raise InputError(f"a chunk has {x.shape[1]} tokens, its grid_sizes say {frames} x {height} x {width}")
        buffer = self._buffer(kv_cache, x)
        place, ends, again = self._make_room(kv_cache, buffer, current_start, grid)
        if again and not sink_recache_after_switch:
            place = replace(place, kept=min(place.sink, place.end))
        elif again:
            kv_cache[_SINK] = (current_start - place.start) // (height * width)
        elif current_start == 0:
            kv_cache.pop(_SINK, None)
        place = replace(place, sink_frame=kv_cache.get(_SINK, 0))
        plan = self.turns.plan(place, x.device)
        if not torch.is_grad_enabled():
            self.refresh()
        out = self.o(self.heads(x, plan, _Packed(buffer, self.widths, place)))
        return (out, (*ends, {"action": "written", "is_recompute": again})) if self.hands_back else out

    def _whole_clip(self, x: Tensor, grid: tuple[int, int, int], block_mask: Any) -> AttentionPlan:
        copies, rest = divmod(x.shape[1], prod(grid))
        if rest or copies not in (1, 2):
            raise InputError(f"{x.shape[1]} tokens are not one or two clips of {' x '.join(map(str, grid))}")
        frames = torch.arange(grid[0], device=x.device).repeat(copies)
        turn = rotary(frames, *grid[1:], self.turns.config.rope_split)
        mask = None
        if block_mask is not None:
            sizes = (None, None, x.shape[1], x.shape[1])
            mask = create_mask(block_mask.mask_mod, *sizes, device=str(x.device))[0, 0]
        return AttentionPlan(query_rotary=turn, key_rotary=turn, mask=mask, mode="auto")

    def _buffer(self, kv_cache: KvCache, x: Tensor) -> Tensor:
        """The dictionary's buffer of latents, in place of the dense one that their code made, or of other latents."""
        made: Tensor = kv_cache["k"]
        if made.shape[2:] != (sum(self.widths),):
            made = _latents(made, self.widths, made.device)
            kv_cache["k"], kv_cache["v"] = made, made[..., :0]
        if made.shape[0] != x.shape[0]:
            raise InputError(f"the cache is for {made.shape[0]} videos, the chunk has {x.shape[0]}; make another cache")
        return made

    def _make_room(
        self, kv_cache: KvCache, buffer: Tensor, current_start: int, grid: tuple[int, int, int]
    ) -> tuple[_Place, tuple[int, int], bool]:
        """Where the chunk goes, by Self-Forcing's rule: what overflows is pushed out behind the sink.

        With it, the new indices, and whether this is LongLive's second run of past chunks, which leaves them alone.
        """
        tokens, new, size = grid[1] * grid[2], prod(grid), buffer.shape[1]
        current_end, sink = current_start + new, self.sink_size * tokens
        end, again = current_end, False
        if _INDICES[0] in kv_cache:  # CausVid has none: its slots are counted from the start of the video
            seen, local = (int(kv_cache[name]) for name in _INDICES)
            end = local + current_end - seen
            again = self.hands_back and current_start > 0 and current_end <= seen
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
        for name, value in zip(_INDICES, (current_end, end), strict=True):
            if name in kv_cache and not again:
                kv_cache[name].fill_(value)
        first = 0 if self.hands_back else max(0, end - self.max_attention_size)
        return _Place(first, 0, end - new, end, current_start, sink, 0, grid), (current_end, end), again


def _causal_model(model: nn.Module) -> nn.Module:
    """The one causal Wan model inside `model`. Raises UnsupportedModelError."""
    found = [part for part in model.modules() if _self_attentions(part)]
    if len(found) != 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} holds {len(found)} models with blocks of self_attn; "
            "give the causal model itself, such as pipeline.generator.model"
        )
    for attention in _self_attentions(found[0]):
        if isinstance(attention, StreamingLatentAttention):
            continue
        names = tuple(inspect.signature(type(attention).forward).parameters)
        if names[6:] not in _SIGNATURES:
            shown = ", ".join(names[6:]) or "nothing"
            raise UnsupportedModelError(
                f"{type(attention).__name__}.forward takes {shown} after block_mask; expected kv_cache, current_start "
                "and cache_start as in Self-Forcing, what LongLive 1 has, or current_end as in CausVid"
            )
    return found[0]


def _self_attentions(model: nn.Module) -> list[nn.Module]:
    """The self-attention of each of a model's own blocks."""
    blocks = getattr(model, "blocks", None)
    found = [getattr(block, "self_attn", None) for block in blocks] if isinstance(blocks, nn.ModuleList) else []
    return [attention for attention in found if isinstance(attention, nn.Module)]


def _outside(checkpoint: Checkpoint, swapped: MutableMapping[int, MLALayer]) -> Iterator[str]:
    """Tensors of the converted model that their model has too."""
    inside = tuple(f"blocks.{i}.self_attn." for i in swapped)
    return (name for name in checkpoint.names if not name.startswith(inside))


def _check(causal: nn.Module, checkpoint: Checkpoint, swapped: MutableMapping[int, MLALayer], source: Any) -> None:
    """Raise InputError unless their model is the converted one's, apart from what is swapped."""
    inside = tuple(f"blocks.{i}.self_attn." for i in swapped)
    theirs = {name: tuple(t.shape) for name, t in causal.state_dict().items() if not name.startswith(inside)}
    ours = {name: checkpoint.info(name).shape for name in _outside(checkpoint, swapped)}
    if theirs != ours:
        name = min(name for name in theirs | ours if theirs.get(name) != ours.get(name))
        sides = [list(side[name]) if name in side else "missing" for side in (theirs, ours)]
        raise InputError(
            f"{source} is not a conversion of this model: {name!r} is {sides[0]} in it and {sides[1]} in the source"
        )


def _made_like(
    theirs: nn.Module, checkpoint: Checkpoint, index: int, mla: MLAConfig, layer: MLALayer, turns: _Turns
) -> StreamingLatentAttention:
    """Our attention of one layer on the device, in the dtype and with the limits of theirs."""
    with torch.device("meta"):
        ours = StreamingLatentAttention(checkpoint.config, mla, layer, index, turns)
    for limit in ("local_attn_size", "sink_size", "max_attention_size"):
        setattr(ours, limit, getattr(theirs, limit, getattr(ours, limit)))
    ours.hands_back = getattr(theirs, "hands_back", _LONGLIVE[-1] in inspect.signature(type(theirs).forward).parameters)
    like = next(theirs.parameters())
    prefix = f"blocks.{index}.self_attn."
    state = {name: checkpoint.read(prefix + name).to(like.device, like.dtype) for name in ours.state_dict()}
    ours.load_state_dict(state, assign=True)
    return ours.requires_grad_(like.requires_grad).train(theirs.training)


def _latents(dense: Tensor, widths: tuple[int, ...], device: torch.device | str) -> Tensor:
    """An empty buffer of latents for as many videos and tokens as a dense one."""
    return torch.zeros(*dense.shape[:2], sum(widths), dtype=dense.dtype, device=device)


def _allocating_latents(pipeline: nn.Module, theirs: Callable[..., None], causal: nn.Module) -> Callable[..., None]:
    """Their allocation without its memory: it runs on the meta device, and real buffers of latents take its place."""

    def initialize(*arguments: Any, **options: Any) -> None:
        bound = inspect.signature(theirs).bind(*arguments, **options)
        device = bound.arguments["device"]
        bound.arguments["device"] = "meta"
        theirs(*bound.args, **bound.kwargs)
        for caches in vars(pipeline).values():
            if isinstance(caches, list) and all(isinstance(c, dict) and "k" in c and c["k"].is_meta for c in caches):
                for attention, cache in zip(_self_attentions(causal), caches, strict=True):
                    _make_real(cache, attention, device)

    return initialize


def _make_real(cache: KvCache, attention: nn.Module, device: torch.device | str) -> None:
    if isinstance(attention, StreamingLatentAttention):
        cache["k"] = _latents(cache["k"], attention.widths, device)
        cache["v"] = cache["k"][..., :0]
    for name, value in cache.items():
        if isinstance(value, Tensor) and value.is_meta:
            cache[name] = torch.zeros_like(value, device=device)
