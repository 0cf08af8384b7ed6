"""What a swap refuses, what it looks through, and that one that fails leaves everything as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from streaming_codebases import (
    BlendingAttention,
    CausVidAttention,
    InfinityAttention,
    LongLiveAttention,
    TheirAttention,
)
from streaming_swap_cases import attentions, unchanged
from support import relative
from torch import Tensor, nn

from mlaconvert.errors import ConfigError, InputError, UnsupportedModelError
from mlaconvert.integrations.streaming import swap_attention


@pytest.mark.parametrize(
    ("kind", "folder", "theirs"),
    [(TheirAttention, "lossless", "absolute"), (LongLiveAttention, "lossless", "absolute"),
     (InfinityAttention, "absolute", "window")],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*was converted for a window")  # windows of many sizes, one folder
def test_other_positions_are_refused_unless_they_are_asked_for(
    make: Any, folders: dict[str, Path], kind: Any, folder: str, theirs: str
) -> None:
    """With a sink the two ways to count differ; without one they are the same."""
    pipe = make(kind=kind)
    own = "window" if theirs == "absolute" else "absolute"
    with (
        unchanged(pipe),
        pytest.raises(
            InputError, match=f"positions '{theirs}', the converted folder says '{own}'.*positions='{theirs}'"
        ),
    ):
        swap_attention(pipe, folders[folder])
    for positions in (theirs, own):
        swap_attention(pipe, folders[folder], positions=positions)
        assert all(attention.turns.positions == positions for attention in attentions(pipe))
    with pytest.raises(InputError, match=f"positions='{theirs}'"):  # a second swap knows what the first one saw
        swap_attention(pipe, folders[folder])
    if kind is not InfinityAttention:
        swap_attention(make(kind=kind, sink=0), folders[folder])


@pytest.mark.parametrize(("window", "sink"), [(9, 1), (6, 2)])
def test_another_window_than_the_folders_is_said(make: Any, folders: dict[str, Path], window: int, sink: int) -> None:
    """The model's own runs, as it would without a swap; the folder was converted for six frames and a sink of one."""
    said = rf"window of 6 latent frames with a sink of 1; the model's own, {window} and {sink},"
    with pytest.warns(UserWarning, match=said):
        swap_attention(make(window=window, sink=sink), folders["absolute"])
    swap_attention(make(window=6, sink=1), folders["absolute"])
    swap_attention(make(window=-1, sink=0), folders["absolute"])


class Reward(TheirAttention):
    compression_alpha = 0.999

    def incremental_update(self) -> None:
        raise NotImplementedError


class Rolling(TheirAttention):
    def forward(self, x: Any, seq_lens: Any, grid_sizes: Any, freqs: Any, block_mask: Any, kv_cache: Any = None,
                current_start: int = 0, cache_start: Any = None, updating_cache: bool = False) -> Any:  # fmt: skip
        raise NotImplementedError


class MemFlow(TheirAttention):
    def forward(self, x: Any, seq_lens: Any, grid_sizes: Any, freqs: Any, block_mask: Any, kv_cache: Any = None,
                current_start: int = 0, cache_start: Any = None, kv_bank: Any = None, update_bank: Any = None,
                is_recache: Any = None) -> Any:  # fmt: skip
        raise NotImplementedError


class LongLive2(TheirAttention):
    def forward(self, x: Any, seq_lens: Any, grid_sizes: Any, freqs: Any, block_mask: Any, kv_cache: Any = None,
                current_start: int = 0, cache_start: Any = None, t_scale: float = 1.0) -> Any:  # fmt: skip
        raise NotImplementedError


class SkyReels(TheirAttention):
    def forward(self, x: Any, grid_sizes: Any, freqs: Any, block_mask: Any) -> Any:  # type: ignore[override]
        raise NotImplementedError


class Sliding(TheirAttention):
    """Its sink is seen for as long as it is among the last tokens, then evicted with the others."""

    def evict(self, kv_cache: Any, over: int, kept: int, sink: int) -> None:
        super().evict(kv_cache, over, kept, 0)


class Nearest(TheirAttention):
    """One frame fewer than the window holds."""

    def seen(self, q: Tensor, turn: Any, kv_cache: Any, end: int, grid: Any, sink: int) -> tuple[Tensor, ...]:
        first = max(0, end - self.max_attention_size + grid[1] * grid[2])
        q, keys, values = super().seen(q, turn, kv_cache, end, grid, sink)
        return q, keys[:, first:], values[:, first:]


class Unrotated(TheirAttention):
    """Height and width in each other's place."""

    def turn(self, frames: Tensor, grid: Any) -> Any:
        turns = super().turn(frames, (grid[0], grid[2], grid[1]))
        return turns._replace(cos=turns.cos.roll(1, 1))


class Sinkless(InfinityAttention):
    """Infinity-RoPE as it is without a sink: what then comes first keeps the turn of frame 0, which it never had."""

    def seen(self, q: Tensor, turn: Any, kv_cache: Any, end: int, grid: Any, sink: int) -> tuple[Tensor, ...]:
        q, keys, values = super().seen(q, turn, kv_cache, end, grid, sink)
        tokens = grid[1] * grid[2]
        if self.frame * tokens < self.max_attention_size:
            return q, keys, values
        return q, torch.cat((kv_cache["k"][:, :tokens], keys[:, tokens:]), 1), values


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        (Reward, "Reward is Reward-Forcing's .*incremental_update.*keep its dense attention"),
        (Rolling, "Rolling Forcing's .*updating_cache.*mlaconvert generate"),
        (MemFlow, "MemFlow's .*kv_bank.*second cache"),
        (LongLive2, "LongLive 2's .*t_scale"),
        (SkyReels, "takes nothing after block_mask.*mlaconvert generate"),
        (BlendingAttention, "other values than were written"),
        pytest.param(
            Sliding, "on a chunk once the window is full .*, sink 1.*keep its dense attention", marks=pytest.mark.slow
        ),
        (Nearest, "on a chunk (run again )?(once|before) the window is full"),
        (Unrotated, "on the first chunk, the two differ"),
        (Sinkless, "once the window is full.*needs sink_size 1"),
    ],
)
def test_another_meaning_is_refused_by_name(make: Any, folders: dict[str, Path], kind: Any, match: str) -> None:
    """A blended sink too, whatever it is called and however little is mixed in."""
    pipe = make(kind=kind, sink=0 if kind is Sinkless else 1)
    for positions in (None, "absolute", "window"):
        with unchanged(pipe), pytest.raises(UnsupportedModelError, match=match):
            swap_attention(pipe, folders["absolute"], positions=positions)


def test_other_models_are_refused(make: Any, folders: dict[str, Path], golden: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="0 models"):
        swap_attention(nn.Linear(2, 2), folders["paper"])
    with pytest.raises(UnsupportedModelError, match="2 models"):
        swap_attention(nn.ModuleList((make(), make())), folders["paper"])
    with pytest.raises(ConfigError, match="not converted"):
        swap_attention(make(), golden)
    mixed = make(kind=LongLiveAttention)
    mixed.generator.model.blocks[1].self_attn = attentions(make(kind=CausVidAttention))[1]
    with pytest.raises(UnsupportedModelError, match="two codebases"):
        swap_attention(mixed, folders["absolute"])


def test_windows_that_are_none(make: Any, folders: dict[str, Path]) -> None:
    pipe = make(window=3)
    with unchanged(pipe), pytest.raises(InputError, match=r"local_attn_size 3.*at least 4"):
        swap_attention(pipe, folders["absolute"])
    attentions(pipe)[2].local_attn_size = [12, 9]  # type: ignore[assignment]
    with pytest.raises(InputError, match="at least 4"):
        swap_attention(pipe, folders["absolute"])
    for attention in attentions(pipe):
        attention.local_attn_size = [12, 9]  # type: ignore[assignment]
    with pytest.raises(UnsupportedModelError, match=r"\[12, 9\].*one number"):
        swap_attention(pipe, folders["absolute"])


def test_weights_that_ours_would_leave_out(make: Any, folders: dict[str, Path]) -> None:
    pipe = make()
    attentions(pipe)[1].gate = nn.Linear(96, 4)
    with unchanged(pipe), pytest.raises(UnsupportedModelError, match=r"has blocks\.1\.self_attn\.gate\.weight beside"):
        swap_attention(pipe, folders["absolute"])


class OnlyThere(TheirAttention):
    """A kernel that runs on the device alone that the model is not on yet."""

    ready = False

    def forward(self, *arguments: Any, **options: Any) -> Any:
        if not OnlyThere.ready:
            raise RuntimeError("flash attention needs a GPU")
        return super().forward(*arguments, **options)

    forward.__signature__ = __import__("inspect").signature(TheirAttention.forward)  # type: ignore[attr-defined]


def test_what_cannot_run_yet_is_compared_on_the_first_chunk(
    make: Any, folders: dict[str, Path], vectors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = make(kind=OnlyThere)
    swap_attention(pipe, folders["absolute"])
    with pytest.raises(UnsupportedModelError, match=r"could not be run.*flash attention needs a GPU"):
        pipe.twice(vectors["x_long"], vectors)
    monkeypatch.setattr(OnlyThere, "ready", True)
    assert relative(pipe.twice(vectors["x_long"], vectors), vectors["sf.window6_sink1.out"]) < 1e-4
    monkeypatch.setattr(OnlyThere, "ready", False)
    pipe = make(kind=OnlyThere)
    swap_attention(pipe, folders["lossless"])
    asked = make(kind=OnlyThere)
    swap_attention(asked, folders["lossless"], positions="absolute")
    monkeypatch.setattr(OnlyThere, "ready", True)
    with pytest.raises(InputError, match="positions='absolute'"):
        pipe.twice(vectors["x_long"], vectors)
    assert relative(asked.twice(vectors["x_long"], vectors), vectors["sf.window6_sink1.out"]) < 1e-4
    swap_attention(pipe, folders["lossless"], positions="absolute")  # a second swap before the first chunk asks anew
    assert relative(pipe.twice(vectors["x_long"], vectors), vectors["sf.window6_sink1.out"]) < 1e-4
