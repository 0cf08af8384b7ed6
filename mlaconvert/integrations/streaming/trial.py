"""A trial of their self-attention: the window, sink, eviction and positions of its cache, held against ours.

An attention of their class with one narrow head and drawn weights runs a few chunks through a small cache, each twice,
until frames have left the window. Ours runs the same chunks, dense, with the slots and positions of its latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mlaconvert.config.geometry import WanConfig
from mlaconvert.errors import InputError, UnsupportedModelError
from mlaconvert.integrations.contract import Contract
from mlaconvert.integrations.streaming.attention import Grid, Streaming, Turns
from mlaconvert.integrations.streaming.codebase import DENSE, Codebase, Positions
from mlaconvert.model.attention.dense import DenseAttention
from mlaconvert.model.attention.kernel import AttentionPlan
from mlaconvert.model.cache import LayerCache

_SPREAD = 1.8  # of queries and keys: scores that pick out a few keys, so that a wrong one shows
_TOLERANCE = {torch.float32: 1e-3}  # relative
_NARROW_TOLERANCE = 0.05  # bfloat16 kernels differ by 0.005, another position of the sink by 0.3
_POSITIONS: tuple[Positions, ...] = ("window", "absolute")
_HOOKED = ("forward", "_old_forward", "_hf_hook", "_compiled_call_impl")  # what others put on one attention
_FRAMES = ((2, 3), (30, 52))  # height and width in tokens; krea counts every frame as that of 480 x 832 pixels


class _Dense(Streaming, DenseAttention):  # type: ignore[misc]
    """Wan's attention with our slots and positions."""

    def attended(self, x: Tensor, plan: AttentionPlan, cache: LayerCache | None = None) -> Tensor:
        return DenseAttention.forward(self, x, plan, cache)


@dataclass(frozen=True)
class _Window:
    """What the trial runs with, in latent frames; `local` as in their code, -1 for a cache that never evicts."""

    chunk: int
    sink: int
    local: int
    size: int
    seen: int

    @classmethod
    def like(cls, attention: nn.Module, chunk: int) -> _Window:
        """A short one of the same kind: as far off a whole number of chunks, with as much of a sink."""
        local, sink = getattr(attention, "local_attn_size", -1), getattr(attention, "sink_size", 0)
        if not isinstance(local, int) or not isinstance(sink, int):
            raise UnsupportedModelError(
                f"{type(attention).__name__} has local_attn_size {local} and sink_size {sink}; give one number each"
            )
        if local == -1:
            size = sink + 5 * chunk
            return cls(chunk, sink, -1, size, sink + 2 * chunk if hasattr(attention, "max_attention_size") else size)
        if local < sink + chunk:
            raise InputError(
                f"{type(attention).__name__} has local_attn_size {local}, which holds no {chunk} frames behind a sink "
                f"of {sink}; give at least {sink + chunk}"
            )
        short = sink + chunk + (local - sink) % chunk
        while short < sink + 2 * chunk and short + chunk <= local:
            short += chunk
        return cls(chunk, sink, short, short, short)

    def starts(self) -> Iterator[int]:
        """First frames of chunks: as many as fill the cache, and two that push others out of it."""
        more = 0 if self.local == -1 else 2 * self.chunk
        return iter(range(0, self.size - self.chunk + 1 + more, self.chunk))


class _Difference(NamedTuple):
    """The first pass in which theirs and ours are not the same; the greater, the closer they came."""

    number: int
    closeness: float
    what: str


class CannotRunError(Exception):
    """Their attention raised an error before anything could be compared."""


class Trial:
    """One attention of theirs, `attention` of a block of `causal`, to be compared with ours.

    `codebase` is what its call says; a trial changes nothing in it. Raises InputError for a window that holds no
    chunk, UnsupportedModelError for one that is not a number.
    """

    def __init__(self, codebase: Codebase, attention: nn.Module, causal: nn.Module, config: WanConfig) -> None:
        self.codebase = codebase
        self.config = replace(config, dim=config.head_dim, num_heads=1, num_layers=1, mla=None)
        self.contract = Contract.of(self.config)
        chunk = getattr(causal, "num_frame_per_block", 1)
        if not isinstance(chunk, int) or chunk < 2:
            chunk = self.contract.window.chunk_frames
        self.windows = [_Window.like(attention, frames) for frames in (chunk, 1)]  # one frame of 1,560 tokens is enough
        self.dense = _drawn(self.config)
        self.theirs = _with_one_head(attention, self.dense)
        self.one_grid = False  # for all videos of a batch, as Matrix-Game 2 has it
        self.apply: Callable[..., None] | None = getattr(causal, "_apply_cache_updates", None)

    @torch.no_grad()
    def run(
        self, freqs: Tensor | None, device: torch.device, dtype: torch.dtype
    ) -> tuple[frozenset[Positions], int | None]:
        """With which positions both are the same, and the tokens of a frame if they are for one number alone.

        `freqs` are theirs, for their rotations. Raises UnsupportedModelError when they are with none,
        CannotRunError when theirs raises an error at once.
        """
        self.dense.to(device, dtype)
        freqs = freqs if freqs is None else freqs.to(device)
        closest = _Difference(-1, 0.0, "")
        for (height, width), window in zip(_FRAMES, self.windows, strict=True):
            found = {}
            for positions in _POSITIONS:
                inputs = _inputs(window, height * width, self.config.dim, device, dtype)
                found[positions] = self._differs(window, (window.chunk, height, width), positions, inputs, freqs)
            same = frozenset(positions for positions in _POSITIONS if found[positions] is None)
            if same:
                return same, height * width if (height, width) != _FRAMES[0] else None
            if (height, width) == _FRAMES[0]:
                closest = max(difference for difference in found.values() if difference is not None)
        raise UnsupportedModelError(
            f"{self.codebase.name} computes something else than latent attention would in its place: {closest.what}; "
            f"{self._advice()}keep its dense attention, or run the converted model with mlaconvert "
            "generate, whose sink and window are plain"
        )

    def _advice(self) -> str:
        if self.codebase.counts_to_window:
            return "Infinity-RoPE needs sink_size 1 and a local_attn_size of whole chunks; or "
        return ""

    def _differs(
        self, window: _Window, grid: Grid, positions: Positions, inputs: list[tuple[int, Tensor]], freqs: Tensor | None
    ) -> _Difference | None:
        """The first pass in which both differ, and what it is; None where they are the same."""
        tokens = grid[1] * grid[2]
        limits = {"local_attn_size": window.local, "sink_size": window.sink}
        limits["max_attention_size"] = window.seen * tokens
        self.dense.join(0, Turns(self.contract, positions, self.codebase))
        for name, limit in limits.items():
            setattr(self.dense, name, limit)
            if hasattr(self.theirs, name):
                setattr(self.theirs, name, limit)
        caches = [_cache(window, tokens, self.config.dim, self.codebase, inputs[0][1]) for _ in range(2)]
        for number, (start, x) in enumerate(inputs):
            call: dict[str, Any] = {"kv_cache": caches[0], "current_start": start * tokens}
            given = (torch.tensor([x.shape[1]]), torch.tensor(grid if self.one_grid else [grid]), freqs, None)
            when = _when(window, number, start)
            try:
                expected = self._their_pass(x, given, call)
            except Exception as error:  # kernels raise whatever they like
                reason = f"{type(error).__name__}: {error}"
                if number == 0 and not self.one_grid:
                    self.one_grid = True
                    try:
                        return self._differs(window, grid, positions, inputs, freqs)
                    except CannotRunError:
                        self.one_grid = False
                if number == 0:
                    raise CannotRunError(reason) from None
                return _Difference(number, -inf, f"it raises {reason} {when}")
            if not expected.isfinite().all():
                return _Difference(number, -inf, f"{when}, its own output is not finite")
            try:
                out = self.dense(x, *given, kv_cache=caches[1], current_start=start * tokens)
            except InputError as error:
                return _Difference(number, -inf, f"{when}, {error}")
            if isinstance(out, tuple):
                out, (seen, end, change) = out
                if not change["is_recompute"]:
                    caches[1]["global_end_index"].fill_(seen)
                    caches[1]["local_end_index"].fill_(end)
            difference = ((out.float() - expected.float()).norm() / expected.float().norm()).item()
            if not difference < _TOLERANCE.get(x.dtype, _NARROW_TOLERANCE):
                return _Difference(number, -difference, f"{when}, the two differ by {difference:.2g}")
        return self._cache_differs(caches[0], caches[1], len(inputs))

    def _cache_differs(self, theirs: dict[str, Any], ours: dict[str, Any], number: int) -> _Difference | None:
        """Values lie unrotated in both, so theirs are ours to the last bit, unless frames are mixed or chosen."""
        values = ours["k"][..., self.config.dim :]
        if theirs["v"].shape[:2] != values.shape[:2] or not torch.equal(theirs["v"].flatten(2), values):
            what = "its cache holds other values than were written, or elsewhere, as when frames are blended"
            return _Difference(number, 0.0, what)
        for name in theirs.keys() - {"k", "v"}:
            if int(theirs[name]) != int(ours[name]):
                what = f"its cache ends with {name} {int(theirs[name])}, ours with {int(ours[name])}"
                return _Difference(number, 0.0, what)
        return None

    def _their_pass(self, x: Tensor, given: tuple[Any, ...], call: dict[str, Any]) -> Tensor:
        end = call["current_start"] + x.shape[1]
        out = self.theirs.forward(x, *given, **call, **({} if self.codebase.has_indices else {"current_end": end}))
        if isinstance(out, tuple):
            if self.apply is None:
                raise NotImplementedError("the model has no _apply_cache_updates")
            out, change = out
            self.apply([call["kv_cache"]], [(0, change)])
        return out


def watch(causal: nn.Module, attentions: list[nn.Module], config: WanConfig) -> Codebase:
    """Whose code the dense `attentions` of `causal` are, as far as they can run: a kernel may want a GPU first.

    Raises UnsupportedModelError for what ours does not compute, InputError for a window that holds no chunk.
    """
    codebase = Codebase.of(attentions[0])
    kinds: dict[Any, nn.Module] = {}
    for attention in attentions:
        limits = (getattr(attention, name, None) for name in ("local_attn_size", "sink_size"))
        kinds.setdefault((type(attention), *map(str, limits)), attention)
    for attention in kinds.values():
        own = Codebase.of(attention)
        if own.arguments != codebase.arguments:
            raise UnsupportedModelError(f"{type(causal).__name__} has blocks of two codebases; give it those of one")
        trial = Trial(own, attention, causal, config)
        like = next(attention.parameters())
        wide = like.is_floating_point() and like.dtype.itemsize > 1
        try:
            codebase.note(
                *trial.run(getattr(causal, "freqs", None), like.device, like.dtype if wide else torch.bfloat16)
            )
        except CannotRunError:
            codebase.waiting += (trial.run,)
    return codebase


def on_first_chunk(
    codebase: Codebase, wanted: Positions | None, folder: Positions
) -> Callable[[Tensor | None, Tensor], None]:
    """What the first chunk runs before it: the trials that could not run at the swap, and what follows from them."""

    def compare(freqs: Tensor | None, x: Tensor) -> None:
        for run in codebase.waiting:
            try:
                codebase.note(*run(freqs, x.device, x.dtype))
            except CannotRunError as error:
                raise UnsupportedModelError(
                    f"{codebase.name} could not be run to compare it with latent attention ({error}); put the model on "
                    "the device and in the dtype of its kernels before the first chunk"
                ) from None
        codebase.admit(wanted, folder)
        codebase.compare, codebase.waiting = None, ()

    return torch.compiler.disable(compare)


def _drawn(config: WanConfig) -> _Dense:
    """Attention with weights that make scores of a few units."""
    dense, generator = _Dense(config), torch.Generator().manual_seed(0)
    for name, weight in dense.named_parameters():
        if name.startswith("norm"):
            weight.data.fill_(_SPREAD)
        else:
            weight.data.normal_(0, config.dim**-0.5, generator=generator)
    return dense.requires_grad_(False)


def _with_one_head(attention: nn.Module, dense: DenseAttention) -> nn.Module:
    """An attention of their class and settings, with the weights of `dense`."""
    made = type(attention).__new__(type(attention))
    nn.Module.__init__(made)
    own = {name: value for name, value in vars(attention).items() if name not in vars(made)}
    made.__dict__.update({name: value for name, value in own.items() if name not in _HOOKED})
    for name, part in attention.named_children():
        if name not in DENSE:
            made.add_module(name, part)
    for name in DENSE:
        made.add_module(name, dense.get_submodule(name))
    width = dense.q.out_features
    settings = {"dim": width, "num_heads": 1, "head_dim": width, "fused_projections": False}
    made.__dict__.update({name: value for name, value in settings.items() if name in own})
    return made


def _inputs(
    window: _Window, tokens: int, dim: int, device: torch.device, dtype: torch.dtype
) -> list[tuple[int, Tensor]]:
    """First frame and input of each pass: every chunk twice, as when it is denoised and then cached clean."""
    generator = torch.Generator().manual_seed(1)
    return [
        (start, torch.randn(1, window.chunk * tokens, dim, generator=generator).to(device, dtype))
        for start in window.starts()
        for _ in range(2)
    ]


def _cache(window: _Window, tokens: int, dim: int, codebase: Codebase, like: Tensor) -> dict[str, Any]:
    cache: dict[str, Any] = {name: like.new_zeros(1, window.size * tokens, 1, dim) for name in ("k", "v")}
    if codebase.has_indices:
        cache |= {f"{name}_end_index": torch.tensor([0], device=like.device) for name in ("global", "local")}
    return cache


def _when(window: _Window, number: int, start: int) -> str:
    if start == 0:
        return "on the first chunk"
    again = " run again" if number % 2 else ""
    where = "before the window is full" if start + window.chunk <= window.seen else "once the window is full"
    return f"on a chunk{again} {where} ({window.seen} frames, sink {window.sink})"
