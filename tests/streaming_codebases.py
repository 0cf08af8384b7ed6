"""Stand-ins for the published streaming codebases: each is called, caches, evicts and counts frames as one of them.

`TheirAttention` is Self-Forcing's: keys are cached turned by their frame in the video, each layer's dictionary is
[B, tokens, heads, width] with two indices, and what overflows is moved out behind the sink.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from mlaconvert.model.attention.dense import DenseAttention
from mlaconvert.model.attention.kernel import attend
from mlaconvert.model.rollout import chunk_noise
from mlaconvert.model.rope import rotary, rotate
from mlaconvert.model.schedule import Sampler
from mlaconvert.model.wan import WanModel

LATENTS = (6, 10)
TOKENS = 15  # of a latent frame


class TheirAttention(nn.Module):
    """Dense self-attention with Self-Forcing's call and cache."""

    frame_tokens: int | None = None  # a frame's, if its code has a number written into it
    turned = True  # whether keys are cached turned
    one_grid = False  # whether grid_sizes is one for all videos

    def __init__(self, dense: DenseAttention, split: tuple[int, int, int], window: int, sink: int) -> None:
        super().__init__()
        for name in ("q", "k", "v", "o", "norm_q", "norm_k"):
            setattr(self, name, getattr(dense, name))
        self.num_heads, self.split = dense.num_heads, split
        self.local_attn_size, self.sink_size, self.max_attention_size = window, sink, max(window, 100) * TOKENS
        self.kept = 0  # leading slots that are not written

    def forward(
        self, x: Any, seq_lens: Any, grid_sizes: Any, freqs: Any, block_mask: Any, kv_cache: Any = None,
        current_start: int = 0, cache_start: Any = None,
    ) -> Any:  # fmt: skip
        grid, tokens = grid_sizes[0].tolist(), self.frame_tokens or int(grid_sizes[0][1:].prod())
        q, k, v = self.project(x)
        turn = self.turn(torch.arange(grid[0]) + current_start // tokens, grid)
        end = self.write(kv_cache, rotate(k, turn) if self.turned else k, v, current_start, self.sink_size * tokens)
        q, keys, values = self.seen(q, turn, kv_cache, end, grid, self.sink_size * tokens)
        return self.o(attend(q, keys, values, None).flatten(-2))

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        heads = (self.num_heads, -1)
        q, k = (norm(linear(x)) for norm, linear in ((self.norm_q, self.q), (self.norm_k, self.k)))
        return q.unflatten(-1, heads), k.unflatten(-1, heads), self.v(x).unflatten(-1, heads)

    def turn(self, frames: Tensor, grid: Any) -> Any:
        return rotary(frames, grid[1], grid[2], self.split)

    def write(self, kv_cache: Any, k: Tensor, v: Tensor, current_start: int, sink: int) -> int:
        """Into the cache, and where the chunk ends in it."""
        count = k.shape[1]
        end = int(kv_cache["local_end_index"]) + current_start + count - int(kv_cache["global_end_index"])
        over = max(end - kv_cache["k"].shape[1], 0) if self.local_attn_size != -1 else 0
        end -= over
        if over:
            self.evict(kv_cache, over, end - count, sink)
        first = max(end - count, self.kept)
        for name, value in (("k", k), ("v", v)):
            kv_cache[name][:, first:end] = value[:, first - end + count :]
        self.set_indices(kv_cache, current_start + count, end)
        return end

    def evict(self, kv_cache: Any, over: int, kept: int, sink: int) -> None:
        for name in ("k", "v"):
            kv_cache[name][:, sink:kept] = kv_cache[name][:, sink + over : kept + over].clone()

    def set_indices(self, kv_cache: Any, seen: int, end: int) -> None:
        kv_cache["global_end_index"].fill_(seen)
        kv_cache["local_end_index"].fill_(end)

    def seen(self, q: Tensor, turn: Any, kv_cache: Any, end: int, grid: Any, sink: int) -> tuple[Tensor, ...]:
        first = max(0, end - self.max_attention_size)
        return rotate(q, turn), kv_cache["k"][:, first:end], kv_cache["v"][:, first:end]


class InfinityAttention(TheirAttention):
    """Infinity-RoPE's: keys are cached unturned, and turned by their place in the window when they are read."""

    turned = False

    def forward(
        self, x: Any, seq_lens: Any, grid_sizes: Any, freqs: Any, block_mask: Any, kv_cache: Any = None,
        current_start: int = 0, cache_start: Any = None, timestep: Any = None,
    ) -> Any:  # fmt: skip
        self.frame = current_start // int(grid_sizes[0][1:].prod())
        return super().forward(x, seq_lens, grid_sizes, freqs, block_mask, kv_cache, current_start, cache_start)

    def seen(self, q: Tensor, turn: Any, kv_cache: Any, end: int, grid: Any, sink: int) -> tuple[Tensor, ...]:
        tokens = grid[1] * grid[2]
        window = self.max_attention_size // tokens
        start = self.frame if self.frame < window else window - grid[0]
        keys = rotate(kv_cache["k"][:, :end], self.turn(torch.arange(end // tokens), grid))
        return rotate(q, self.turn(torch.arange(grid[0]) + start, grid)), keys, kv_cache["v"][:, :end]


class LongLiveAttention(TheirAttention):
    """LongLive's: the sink is always seen, indices are handed back to the model, and past chunks are written again."""

    def forward(  # type: ignore[override]
        self, x: Any, seq_lens: Any, grid_sizes: Any, freqs: Any, block_mask: Any, kv_cache: Any = None,
        current_start: int = 0, cache_start: Any = None, sink_recache_after_switch: bool = False,
    ) -> Any:  # fmt: skip
        again = current_start > 0 and current_start + x.shape[1] <= int(kv_cache["global_end_index"])
        tokens = int(grid_sizes[0][1:].prod())
        self.kept = self.sink_size * tokens if again and not sink_recache_after_switch else 0
        out = super().forward(x, seq_lens, grid_sizes, freqs, block_mask, kv_cache, current_start, cache_start)
        return out, (*self.ends, {"is_recompute": again})

    def set_indices(self, kv_cache: Any, seen: int, end: int) -> None:
        self.ends = (seen, end)

    def seen(self, q: Tensor, turn: Any, kv_cache: Any, end: int, grid: Any, sink: int) -> tuple[Tensor, ...]:
        first = max(sink, end - (self.max_attention_size - sink))
        parts = (torch.cat((kv_cache[name][:, :sink], kv_cache[name][:, first:end]), 1) for name in ("k", "v"))
        return rotate(q, turn), *parts


class KreaAttention(TheirAttention):
    """krea's: indices are plain numbers, and under a mask a whole clip runs and is what the cache then holds."""

    def fuse_projections(self) -> None:
        raise NotImplementedError

    def forward(
        self, x: Any, seq_lens: Any, grid_sizes: Any, freqs: Any, block_mask: Any, kv_cache: Any = None,
        current_start: int = 0, cache_start: Any = None,
    ) -> Any:  # fmt: skip
        if block_mask is None:
            return super().forward(x, seq_lens, grid_sizes, freqs, None, kv_cache, current_start, cache_start)
        grid, (q, k, v), count = grid_sizes[0].tolist(), self.project(x), x.shape[1]
        turn = self.turn(torch.arange(grid[0]), grid)
        kv_cache["k"][:, :count], kv_cache["v"][:, :count] = rotate(k, turn), v
        self.set_indices(kv_cache, count, count)
        at = torch.arange(count)
        visible = block_mask.mask_mod(0, 0, at[:, None], at)
        return self.o(attend(rotate(q, turn), rotate(k, turn), v, visible).flatten(-2))

    def set_indices(self, kv_cache: Any, seen: int, end: int) -> None:
        kv_cache["global_end_index"], kv_cache["local_end_index"] = seen, end


class CausVidAttention(TheirAttention):
    """CausVid's: no indices, slots are counted from the start of the video, and nothing is evicted."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        del self.local_attn_size, self.sink_size, self.max_attention_size

    def forward(  # type: ignore[override]
        self, x: Any, seq_lens: Any, grid_sizes: Any, freqs: Any, block_mask: Any, kv_cache: Any = None,
        current_start: int = 0, current_end: int = 0,
    ) -> Tensor:  # fmt: skip
        grid, (q, k, v) = grid_sizes[0].tolist(), self.project(x)
        turn = self.turn(torch.arange(grid[0]) + current_start // (grid[1] * grid[2]), grid)
        kv_cache["k"][:, current_start:current_end], kv_cache["v"][:, current_start:current_end] = rotate(k, turn), v
        keys, values = (kv_cache[name][:, :current_end] for name in ("k", "v"))
        return self.o(attend(rotate(q, turn), keys, values, None).flatten(-2))


class WorldAttention(TheirAttention):
    """Matrix-Game 2's: one grid for all videos of a batch."""

    one_grid = True

    def forward(self, x: Any, seq_lens: Any, grid_sizes: Any, *more: Any, **options: Any) -> Any:
        assert grid_sizes.ndim == 1
        return super().forward(x, seq_lens, grid_sizes[None], *more, **options)

    forward.__signature__ = signature(TheirAttention.forward)  # type: ignore[attr-defined]


class BlendingAttention(TheirAttention):
    """Reward-Forcing's sink, under a name that does not tell: a ten thousandth of what is evicted is mixed into it."""

    def evict(self, kv_cache: Any, over: int, kept: int, sink: int) -> None:
        count = min(sink, over)
        for name in ("k", "v"):
            kv_cache[name][:, :count] = torch.lerp(
                kv_cache[name][:, :count], kv_cache[name][:, sink : sink + count], 1e-4
            )
        super().evict(kv_cache, over, kept, sink)


class TheirModel(WanModel):
    """A causal model that hands each layer its dictionary, with native names."""

    def __init__(self, dense: WanModel, window: int, sink: int, kind: type[TheirAttention]) -> None:
        nn.Module.__init__(self)
        self.__dict__.update({k: v for k, v in dense.__dict__.items() if not k.startswith("_")}, _pairs=set())
        for name, part in dense.named_children():
            self.add_module(name, part)
        for block in self.blocks:
            block.self_attn = kind(block.self_attn, dense.config.rope_split, window, sink)  # type: ignore
        self.local_attn_size, self.block_mask, self.one_grid = window, None, kind.one_grid

    def forward(  # type: ignore[override]
        self, x: Tensor, t: Tensor, context: Tensor, kv_cache: Any, current_start: int, *more: Any
    ) -> Tensor:
        p = self.prepare(x, t, context)
        lengths, out = torch.tensor([p.x.shape[1]]), p.x
        grid = torch.tensor(p.grid if self.one_grid else [p.grid])

        def by_frame(tokens: Tensor, scale: Tensor, shift: Any = 0) -> Tensor:
            return (tokens.unflatten(1, (scale.shape[1], -1)) * scale[:, :, None] + shift).flatten(1, 2)

        for block, cache in zip(self.blocks, kv_cache, strict=True):
            e = (p.modulation + block.modulation).unbind(-2)
            last = current_start if "global_end_index" in cache else current_start + p.x.shape[1]
            found = block.self_attn(
                by_frame(block.norm1(out), 1 + e[1], e[0][:, :, None]),
                lengths, grid, None, self.block_mask, cache, current_start, last, *more,
            )  # fmt: skip
            if isinstance(found, tuple):
                found, change = found
                self._apply_cache_updates([cache], [(0, change)])
            out = out + by_frame(found, e[2])
            out = out + block.cross_attn(block.norm3(out), block.cross_attn.project(p.text, None))
            out = out + by_frame(block.ffn(by_frame(block.norm2(out), 1 + e[4], e[3][:, :, None])), e[5])
        return self.finish(out, p)

    def _apply_cache_updates(self, caches: Any, changes: Any) -> None:
        for i, (seen, end, change) in changes:
            if not change["is_recompute"]:
                caches[i]["global_end_index"].fill_(seen)
                caches[i]["local_end_index"].fill_(end)


class TheirPipeline(nn.Module):
    """Allocates the dense dictionaries itself, and begins a new video by putting new indices into them."""

    def __init__(self, model: TheirModel) -> None:
        super().__init__()
        self.generator = nn.Module()
        self.generator.model = model
        self.kv_cache1: Any = None
        self.devices: list[str] = []

    def _initialize_kv_cache(self, batch_size: int, dtype: torch.dtype, device: Any) -> None:
        self.devices.append(str(device))
        config, size = self.generator.model.config, self.generator.model.local_attn_size * TOKENS
        shape = [batch_size, size, config.num_heads, config.head_dim]
        self.kv_cache1 = [
            {
                **{name: torch.zeros(shape, dtype=dtype, device=device) for name in ("k", "v")},
                **{f"{name}_end_index": torch.tensor([0], device=device) for name in ("global", "local")},
            }
            for _ in range(config.num_layers)
        ]

    def begin(self, batch: int = 1) -> None:
        if self.kv_cache1 is None:
            self._initialize_kv_cache(batch_size=batch, dtype=torch.float32, device=torch.device("cpu"))
        for layer in self.kv_cache1:
            for name in ("global_end_index", "local_end_index"):
                layer[name] = torch.tensor([0])

    def chunk(self, x: Tensor, t: Tensor, context: Tensor, start: int, *more: bool) -> Tensor:
        out: Tensor = self.generator.model(x, t, context, self.kv_cache1, start * TOKENS, *more)  # type: ignore
        return out

    @torch.no_grad()
    def twice(self, x: Tensor, v: dict[str, Tensor]) -> Tensor:
        """Chunks of three frames, each run twice, as the recorded outputs were made."""
        self.begin()
        out = []
        for start in range(0, x.shape[2], 3):
            part = x[:, :, start : start + 3]
            self.chunk(part + 1, v["t"].expand(1, 3), v["context"], start)
            out.append(self.chunk(part, v["t"].expand(1, 3), v["context"], start))
        return torch.cat(out, 2)

    @torch.no_grad()
    def rollout(self, context: Tensor, frames: int, sampler: Sampler) -> Tensor:
        """Few-step denoising with a clean pass, by the noise of our rollout."""
        batch = len(context)
        self.begin(batch)
        out = []
        for start in range(0, frames, 3):
            draws = chunk_noise(range(batch), start, (16, 3, *LATENTS), len(sampler.timesteps))
            x, *fresh = draws
            levels = [*(t / 1000 for t in sampler.timesteps), 0.0]
            for i, level in enumerate(levels[:-1]):
                x = x - level * self.chunk(x, torch.full((batch, 3), 1000 * level), context, start)
                x = torch.lerp(x, fresh[i], levels[i + 1]) if levels[i + 1] else x
            self.chunk(x, torch.zeros(batch, 3), context, start)
            out.append(x)
        return torch.cat(out, 2)
