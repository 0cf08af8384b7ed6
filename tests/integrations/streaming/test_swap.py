"""Latent attention inside streaming codebases, held against the recorded outputs of Self-Forcing and our rollout.

The stand-ins for the codebases are in `streaming_codebases`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import streaming_fixtures
import torch
from documents import blocks
from streaming_codebases import (
    TOKENS,
    CausVidAttention,
    InfinityAttention,
    KreaAttention,
    LongLiveAttention,
    TheirPipeline,
)
from support import randomize, relative
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask

from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.errors import InputError
from mlaconvert.integrations.streaming import StreamingLatentAttention, swap_attention
from mlaconvert.model.attention.kernel import AttentionPlan, Segment
from mlaconvert.model.load import load_model
from mlaconvert.model.rollout import LatentSize, rollout
from mlaconvert.model.rope import rotary
from mlaconvert.model.schedule import Sampler

GOLDEN_TOLERANCE = 1e-4
IN_BITS = streaming_fixtures.IN_BITS
vectors, folders, make = (getattr(streaming_fixtures, name) for name in ("vectors", "folders", "make"))


def attentions(pipe: TheirPipeline) -> list[nn.Module]:
    return [block.self_attn for block in pipe.generator.model.blocks]  # type: ignore


RECORDED = [("x", "sf.chunks3.out"), ("x_long", "sf.window6_sink1.out")]


@pytest.mark.parametrize(("latents", "expected"), RECORDED)
def test_the_stand_in_is_self_forcing(make: Any, vectors: dict[str, Tensor], latents: str, expected: str) -> None:
    assert relative(make().twice(vectors[latents], vectors), vectors[expected]) < 1e-5


@pytest.mark.parametrize(
    ("folder", "positions", "latents", "expected"),
    [
        *(("lossless", "absolute", *case) for case in RECORDED),
        ("absolute", None, *RECORDED[1]),
        ("lossless", "window", "x", "infrope.chunks3.out"),
        ("absolute", "window", "x_long", "infrope.window6_sink1.out"),
        ("lossless, exact present", "absolute", *RECORDED[1]),
        ("absolute, exact present", "window", "x_long", "infrope.window6_sink1.out"),
    ],
)
@pytest.mark.parametrize("whole_pipeline", [True, False])
def test_a_lossless_swap_gives_the_recorded_outputs(
    make: Any, folders: dict[str, Path], vectors: dict[str, Tensor], folder: str, positions: Any, latents: str,
    expected: str, whole_pipeline: bool,
) -> None:  # fmt: skip
    pipe = make()
    swap_attention(pipe if whole_pipeline else pipe.generator.model, folders[folder], positions=positions)
    for _ in range(2):  # the second video begins in the first one's dictionaries
        assert relative(pipe.twice(vectors[latents], vectors), vectors[expected]) < GOLDEN_TOLERANCE
    assert pipe.devices == ["meta" if whole_pipeline else "cpu"]


BESIDE_PRESENT = ["heads beside an exact present", "shared key beside an exact present"]


@pytest.mark.parametrize("name", ["paper", "token", "head", *BESIDE_PRESENT, *IN_BITS])
def test_a_rollout_equals_ours(make: Any, folders: dict[str, Path], vectors: dict[str, Tensor], name: str) -> None:
    """Two videos, beyond the window, in two steps a chunk. Layers that stay dense count absolute frames."""
    sampler = Sampler.few_step((1000, 500))
    context = torch.cat((vectors["context"], vectors["context"].flip(1)))
    pipe = make()
    dense = pipe.rollout(context, 12, sampler)
    pipe = make()
    positions: Any = "absolute" if name.partition(",")[0] == "head" else "window"
    swap_attention(pipe, folders[name], positions=positions)
    found = pipe.rollout(context, 12, sampler)
    model = load_model(folders[name], streaming=StreamingConfig(window_frames=6, positions=positions))
    ours = rollout(model, context, size=LatentSize(frames=12, height=6, width=10), sampler=sampler)
    assert relative(found, torch.cat(list(ours), 2)) < 1e-5
    assert relative(found, dense) > 1e-2


def test_the_dictionaries_hold_latents(make: Any, folders: dict[str, Path], vectors: dict[str, Tensor]) -> None:
    """92.7% less than the dense ones; layers that stay dense keep theirs."""
    dense = 2 * 6 * TOKENS * 96 * 4
    for name, converted in (("paper", (0, 1, 2)), ("head", (0, 2)), ("head, in bits", (0, 2))):
        pipe, config = make(), load_model(folders[name]).config
        swap_attention(pipe, folders[name], positions="window")
        for begun in (pipe.begin, lambda pipe=pipe: pipe.twice(vectors["x"], vectors)):
            begun()
            sizes = [cache["k"].nbytes + cache["v"].nbytes for cache in pipe.kv_cache1]
            assert sizes == [6 * TOKENS * size for size in config.cached_bytes(4)]
            assert not any(value.is_meta for cache in pipe.kv_cache1 for value in cache.values())
            assert all(set(cache) == {"k", "v", "global_end_index", "local_end_index"} for cache in pipe.kv_cache1)
        for i, attention in enumerate(attentions(pipe)):
            assert isinstance(attention, StreamingLatentAttention) == (i in converted)
            assert (sizes[i] <= 0.079 * dense) == (i in converted)
        ends = [(int(cache["global_end_index"]), int(cache["local_end_index"])) for cache in pipe.kv_cache1]
        assert ends == [(6 * TOKENS, 6 * TOKENS)] * 3
        again = folders["lossless"] if name == "paper" else folders[name]  # dictionaries in use serve on
        swap_attention(pipe, again, positions="window")
        expected = vectors["infrope.chunks3.out"] if name == "paper" else pipe.twice(vectors["x"], vectors)
        assert relative(pipe.twice(vectors["x"], vectors), expected) < GOLDEN_TOLERANCE


@pytest.mark.filterwarnings("ignore:.*was converted for a window")  # windows of many sizes, one folder
def test_limits_dtype_and_weights_outside_attention(
    make: Any, folders: dict[str, Path], vectors: dict[str, Tensor]
) -> None:
    """A model with other weights becomes the converted one, in its own dtype and with its own limits."""
    pipe = make(window=7, sink=2)
    randomize(pipe)
    pipe.to(torch.bfloat16)
    swap_attention(pipe, folders["lossless"], positions="window")
    expected = load_model(folders["lossless"]).bfloat16().state_dict()
    found = pipe.generator.model.state_dict()
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert [(a.local_attn_size, a.sink_size, a.max_attention_size) for a in attentions(pipe)] == [(7, 2, 1500)] * 3
    swap_attention(pipe, folders["paper"], positions="window")  # a second swap is as good as the first
    found = pipe.generator.model.state_dict()
    assert set(found) == set(load_model(folders["paper"]).state_dict())


def test_tokens_before_the_last_ones_are_not_attended_to(
    make: Any, folders: dict[str, Path], vectors: dict[str, Tensor]
) -> None:
    """`max_attention_size` shortens the window without shortening the cache: three frames see only themselves."""
    pipe = make()
    swap_attention(pipe, folders["lossless"], positions="window")
    for attention in attentions(pipe):
        attention.max_attention_size = 3 * TOKENS
    found = pipe.twice(vectors["x"], vectors)
    alone = load_model(folders["lossless"], streaming=StreamingConfig(window_frames=3, sink_frames=0))
    with torch.no_grad():
        expected = alone(vectors["x"], vectors["t"], vectors["context"])
    assert relative(found, expected) < GOLDEN_TOLERANCE
    assert relative(found, vectors["infrope.chunks3.out"]) > 1e-2


def cache_of(frames: int, **more: Any) -> list[dict[str, Any]]:
    """Dense dictionaries of the golden model's three layers."""
    return [{name: torch.zeros(1, frames * TOKENS, 4, 24) for name in ("k", "v")} | more for _ in range(3)]


def long(pipe: TheirPipeline, vectors: dict[str, Tensor], chunks: int = 5) -> Tensor:
    """Chunks of three frames, each in two passes, from drawn latents."""
    draw = torch.Generator().manual_seed(3)
    out = []
    with torch.no_grad():
        for start in range(0, 3 * chunks, 3):
            for _ in range(2):
                x = torch.randn(1, 16, 3, 6, 10, generator=draw)
                out.append(pipe.chunk(x, vectors["t"].expand(1, 3), vectors["context"], start))
    return torch.cat(out, 2)


@pytest.mark.parametrize("sink", [0, 2])
@pytest.mark.parametrize("most", [5, 7, 100])
def test_longlive_always_sees_its_sink(
    make: Any, folders: dict[str, Path], vectors: dict[str, Tensor], sink: int, most: int
) -> None:
    """Where nothing is evicted, attention sees the sink and the last of `max_attention_size`, not only the last."""
    found = []
    for swapped in (False, True):
        pipe = make(window=-1, sink=sink, kind=LongLiveAttention)
        if swapped:
            swap_attention(pipe, folders["absolute"])
        for attention in attentions(pipe):
            attention.max_attention_size = most * TOKENS
        pipe.kv_cache1 = cache_of(15)
        for cache in pipe.kv_cache1:
            cache |= {f"{name}_end_index": torch.tensor([0]) for name in ("global", "local")}
        found.append(long(pipe, vectors))
    assert relative(found[1], found[0]) < GOLDEN_TOLERANCE


def test_infinity_rope_counts_from_the_sink(make: Any, folders: dict[str, Path], vectors: dict[str, Tensor]) -> None:
    """Its positions are those of "window", in its own dictionaries with a mark for scene cuts."""
    found = []
    for swapped in (False, True):
        pipe = make(kind=InfinityAttention)
        for attention in attentions(pipe):
            attention.max_attention_size = 6 * TOKENS
        if swapped:
            swap_attention(pipe, folders["lossless"])
        pipe.begin()
        for cache in pipe.kv_cache1:
            cache["scene_cut"] = False
        found.append(long(pipe, vectors))
    assert relative(found[1], found[0]) < GOLDEN_TOLERANCE
    pipe.begin()
    pipe.kv_cache1[1]["scene_cut"] = True
    with pytest.raises(InputError, match=r"'scene_cut'.*no scene cuts"):
        long(pipe, vectors)


@pytest.mark.filterwarnings("ignore:.*was converted for a window")  # windows of many sizes, one folder
def test_infinity_ropes_new_prompt(make: Any, folders: dict[str, Path], vectors: dict[str, Tensor]) -> None:
    """Behind a shortened cache its queries stand elsewhere than their keys, unless the window is of two chunks."""
    pipe = make(window=9, kind=InfinityAttention)
    for attention in attentions(pipe):
        attention.max_attention_size = 9 * TOKENS
    swap_attention(pipe, folders["lossless"])
    pipe.begin()
    long(pipe, vectors)
    for cache in pipe.kv_cache1:
        cache["local_end_index"] = torch.tensor([3 * TOKENS])
    with pytest.raises(InputError, match=r"from frame 6 and its keys from 3.*local_attn_size 6"):
        pipe.chunk(vectors["x"][:, :, :3], vectors["t"].expand(1, 3), vectors["context"], 15)


@pytest.mark.parametrize("folder", ["lossless", "lossless, exact present"])
def test_krea_writes_a_clip_under_a_mask(
    make: Any, folders: dict[str, Path], vectors: dict[str, Tensor], folder: str
) -> None:
    """Before each chunk its server runs the last frames again as one clip; indices are plain numbers."""
    chunk = torch.arange(6 * TOKENS) // (3 * TOKENS)
    mask = create_block_mask(
        lambda b, h, q, k: chunk[k] <= chunk[q], None, None, 6 * TOKENS, 6 * TOKENS, device="cpu", BLOCK_SIZE=15
    )
    found = []
    for swapped in (False, True):
        pipe = make(window=-1, sink=0, kind=KreaAttention)
        if swapped:
            swap_attention(pipe, folders[folder])
            for attention in attentions(pipe):
                attention.fuse_projections()  # type: ignore[operator]
        pipe.kv_cache1 = cache_of(12, global_end_index=0, local_end_index=0)
        out = []
        with torch.no_grad():
            for begun in (vectors["x"], vectors["x"] + 0.3):
                pipe.generator.model.block_mask = mask
                out.append(pipe.chunk(begun, vectors["t"].expand(1, 6), vectors["context"], 0))
                pipe.generator.model.block_mask = None
                for part in (vectors["x_long"][:, :, :3], vectors["x_long"][:, :, 3:6]):
                    out.append(pipe.chunk(part, vectors["t"].expand(1, 3), vectors["context"], 6))
        found.append(torch.cat(out, 2))
        assert pipe.kv_cache1[2]["local_end_index"] == pipe.kv_cache1[2]["global_end_index"] == 9 * TOKENS
    assert relative(found[1], found[0]) < GOLDEN_TOLERANCE
    pipe.generator.model.block_mask = mask
    pipe.kv_cache1 = cache_of(5, global_end_index=0, local_end_index=0)
    with pytest.raises(InputError, match="90 tokens does not fit a cache of 75"):
        pipe.chunk(vectors["x"], vectors["t"].expand(1, 6), vectors["context"], 0)


@pytest.mark.filterwarnings("ignore:.*was converted for a window")  # windows of many sizes, one folder
def test_krea_counts_frames_of_one_size(make: Any, folders: dict[str, Path], vectors: dict[str, Tensor]) -> None:
    """With a number of tokens written into its code, it is right for that size of video alone, and so are we."""

    class At480(KreaAttention):
        frame_tokens = 1560

    pipe = make(window=4, sink=1, kind=At480)
    swap_attention(pipe, folders["absolute"])
    pipe.begin()
    with pytest.raises(InputError, match="for 1560 tokens, and one of this video has 15"):
        pipe.chunk(vectors["x"][:, :, :3], vectors["t"].expand(1, 3), vectors["context"], 0)


def test_a_cache_without_indices_is_causvids(make: Any, folders: dict[str, Path], vectors: dict[str, Tensor]) -> None:
    """Its slots count from the start of the video, and nothing is evicted."""
    found = []
    for swapped in (False, True):
        pipe = make(window=-1, sink=0, kind=CausVidAttention)
        if swapped:
            swap_attention(pipe.generator.model, folders["lossless"])
        pipe.kv_cache1 = cache_of(15)
        found.append(long(pipe, vectors))
    assert relative(found[1], found[0]) < GOLDEN_TOLERANCE
    with pytest.raises(InputError, match="holds 225"):
        pipe.chunk(vectors["x"][:, :, :3], vectors["t"].expand(1, 3), vectors["context"], 15)


@pytest.mark.filterwarnings("ignore:.*was converted for a window")  # windows of many sizes, one folder
@pytest.mark.parametrize("sink", [0, 1, 3])
@pytest.mark.parametrize("folder", ["lossless", "lossless, exact present"])
def test_longlives_prompt_switch(
    make: Any, folders: dict[str, Path], vectors: dict[str, Tensor], sink: int, folder: str
) -> None:
    """Behind the window, twice: past chunks with the sink kept, then with another sink, then new chunks.

    What is kept of a chunk is the old prompt's, so it is no part of an exact present.
    """
    found = []
    for swapped in (False, True):
        pipe = make(sink=sink, kind=LongLiveAttention)
        if swapped:
            swap_attention(pipe, folders[folder], positions="absolute")
        x, context, out = vectors["x_long"], vectors["context"], []
        with torch.no_grad():
            for video in range(2):
                pipe.begin()
                for start, frames, anew in (
                    (0, 3, False), (3, 3, False), (6, 3, False), (6, 3, False),
                    (3, 3, False), (3, 6, False), (9, 3, False), (6, 6, True), (9, 3, False),
                ):  # fmt: skip
                    part = x[:, :, start : start + frames] + 0.1 * video
                    out.append(pipe.chunk(part, vectors["t"].expand(1, frames), context + 0.2 * anew, start, anew))
        found.append(torch.cat(out, 2))
    assert relative(found[1], found[0]) < GOLDEN_TOLERANCE


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("name", ["token", *BESIDE_PRESENT])
def test_without_a_cache_the_mask_is_theirs(make: Any, folders: dict[str, Path], name: str, copies: int) -> None:
    """A whole clip, and in teacher forcing the clean clip and behind it the noisy one, at the same positions."""
    pipe = make()
    swap_attention(pipe, folders[name], positions="window")
    attention = attentions(pipe)[1]
    reference = load_model(folders[name]).blocks[1].self_attn
    count = 6 * TOKENS
    chunk = torch.arange(2 * count) % count // (3 * TOKENS)

    def seen(b: Any, h: Any, q: Tensor, k: Tensor) -> Tensor:
        past = chunk[k] < chunk[q]
        return torch.where(q < count, (k < count) & (chunk[k] <= chunk[q]), (past & (k < count)) | (
            (k >= count) & (chunk[k] == chunk[q])
        ))  # fmt: skip

    x = torch.randn(2, copies * count, 96, generator=torch.Generator().manual_seed(4))
    mask = create_block_mask(seen, None, None, copies * count, copies * count, device="cpu", BLOCK_SIZE=15)
    lengths, grid = torch.tensor([count, count]), torch.tensor([[6, 3, 5]] * 2)
    found = attention(x, lengths, grid, None, mask)
    dense = torch.tensor([[bool(seen(0, 0, torch.tensor(q), torch.tensor(k))) for k in range(0, copies * count, 15)]
                          for q in range(0, copies * count, 15)])  # fmt: skip
    turn = rotary(torch.arange(6).repeat(copies), 3, 5, (4, 4, 4))
    visible = dense.repeat_interleave(15, 0).repeat_interleave(15, 1)
    # By hand: of six frames in chunks of three, and behind them any noisy copies, which see the clean frames before.
    chunks = [(slice(0, 45), slice(0, 45), slice(0, 0)), (slice(45, 90), slice(45, 90), slice(0, 45))]
    if copies == 2:
        chunks += [(slice(90, 135), slice(90, 135), slice(0, 0)), (slice(135, 180), slice(135, 180), slice(0, 45))]
    segments = tuple(Segment(*chunk) for chunk in chunks)
    plan = AttentionPlan(query_rotary=turn, key_rotary=turn, mask=visible, segments=segments)
    assert relative(found, reference(x, plan)) < 1e-5
    assert relative(attention(x, lengths, grid, None, None), found) > 1e-3
    with pytest.raises(InputError, match="not one or two clips"):
        attention(x[:, 1:], lengths, grid, None, None)


def test_chunks_that_do_not_fit(make: Any, folders: dict[str, Path], vectors: dict[str, Tensor]) -> None:
    pipe = make()
    swap_attention(pipe, folders["paper"], positions="window")
    pipe.begin()
    t, context = vectors["t"], vectors["context"]
    with torch.no_grad():
        pipe.chunk(vectors["x"], t.expand(1, 6), context, 0)
        with pytest.raises(InputError, match="local_attn_size of at least 7"):
            pipe.chunk(vectors["x"], t.expand(1, 6), context, 6)
        with pytest.raises(InputError, match="for 1 videos"):
            pipe.chunk(vectors["x"].repeat(2, 1, 1, 1, 1), t.expand(2, 6), context.repeat(2, 1, 1), 0)
        attention = attentions(pipe)[0]
        with pytest.raises(InputError, match="6 x 3 x 5"):
            attention(torch.zeros(1, 7, 96), None, torch.tensor([[6, 3, 5]]), None, None, pipe.kv_cache1[0])


def test_the_walkthroughs_snippets_run(
    make: Any, folders: dict[str, Path], vectors: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[3] / "docs" / "integrations" / "streaming.md").read_text()
    (tmp_path / "sf-mla").symlink_to(folders["absolute"])
    monkeypatch.chdir(tmp_path)
    scope = {"pipeline": make()}
    for snippet in blocks(page, "python"):
        exec(compile(snippet, "streaming.md", "exec"), scope)
    found = scope["pipeline"].twice(vectors["x_long"], vectors)
    assert relative(found, vectors["infrope.window6_sink1.out"]) < GOLDEN_TOLERANCE
