"""Caches that are narrowed while a model runs: codes by hand, and models whose past is read from them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from narrow_by_hand import narrow_by_hand
from support import randomize, relative, stream
from torch import Tensor

from mlaconvert.config.cache_dtype import CACHE_DTYPES, CachedPart, CacheDtype, centroids, groups
from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.mla import MLAConfig, MLALayer
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.errors import ConfigError
from mlaconvert.healing.frames import chunk_velocity, noisy_layout, velocity, views
from mlaconvert.model.cache import LatentCache, NarrowLayerCache
from mlaconvert.model.group_quantizer import GroupQuantizer
from mlaconvert.model.load import load_model
from mlaconvert.model.memory import StreamedVideo, plan_memory
from mlaconvert.model.wan import WanModel

STREAMING = StreamingConfig(chunk_frames=2, window_frames=5, sink_frames=1)
# 35 tokens a frame fall into groups of 18 and 17, and 42 channels into two of 21.
HEIGHT, WIDTH, TOKENS = 10, 14, 35
DENSE = WanConfig(
    dim=42, num_heads=3, num_layers=3, ffn_dim=20, freq_dim=8, text_dim=9, text_len=6, in_dim=4, out_dim=4,
    streaming=STREAMING,
)  # fmt: skip
LAYER = MLALayer(kv_lora_rank=37, qk_nope_head_dim=14, v_head_dim=9, rope_components=())
SHARED = dataclasses.replace(LAYER, qk_nope_head_dim=5, rope_components=((0, 2), (4, 1)))


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Channels of unequal size and mean, with some that are beyond 448."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=g, dtype=torch.float64)
    return x * torch.logspace(-2, 2.5, shape[-1], dtype=torch.float64) + torch.linspace(-1, 3, shape[-1])


def test_groups_are_even_and_none_has_more_than_32() -> None:
    assert [groups(n) for n in (1, 32, 33, 48, 97, 1560)] == [(1, 1), (1, 32), (2, 17), (2, 24), (4, 25), (49, 32)]
    assert [groups(n, most=64) for n in (14, 64, 70, 128)] == [(1, 14), (1, 64), (2, 35), (2, 64)]


def test_a_centroid_is_for_twelve_tokens_and_a_byte_names_it() -> None:
    assert [centroids(n) for n in (1, 12, 13, 35, 48, 1560, 3600)] == [
        *((1, 1), (1, 1), (2, 1), (3, 2), (4, 2), (130, 8), (256, 8))
    ]


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
def test_keys_are_coded_along_tokens_and_values_along_channels(dtype: CacheDtype) -> None:
    made = GroupQuantizer(
        dtype, [CachedPart((3, 14), "tokens"), CachedPart((3, 14), "channels"), CachedPart((1,), None)]
    )
    cached = [numbers(2, 3 * TOKENS, 3, 14, seed=i) for i in (1, 2)] + [numbers(2, 3 * TOKENS, 1, seed=3)]
    rows = made.pack(TOKENS, cached)
    for row, (shape, of) in zip(rows, made.rows(TOKENS, torch.float64), strict=True):
        assert (tuple(row.shape), row.dtype) == ((2, 3, *shape), of)
    back = made.unpack(TOKENS, rows, torch.float64)
    for found, x, along in zip(back, cached, ("tokens", "channels", None), strict=True):
        assert relative(found, narrow_by_hand(x, dtype, along, TOKENS)) < 1e-12
    assert all(map(torch.equal, made.round_trip(TOKENS, cached), back))


@pytest.mark.parametrize("dtype", ["qvg4", "qvg3", "qvg2", "qvg2-2stages"])
def test_a_wide_head_has_two_groups_and_clusters_of_its_own(dtype: CacheDtype) -> None:
    """Forty tokens of two heads of 70, in four places that each head tells apart in its own way, once far out."""
    g = torch.Generator().manual_seed(3)
    places = 3 * torch.randn(2, 4, 70, generator=g)
    drawn = torch.randint(4, (2, 40), generator=g)
    x = torch.stack([place[some] for place, some in zip(places, drawn, strict=True)], 1).double()
    x = (x + 0.2 * torch.randn(x.shape, generator=g) + torch.tensor([[0.0], [60.0]])).unsqueeze(0)
    made = GroupQuantizer(dtype, [CachedPart((2, 70), "tokens")])
    (found,) = made.unpack(40, made.pack(40, [x]), torch.float64)
    assert relative(found, narrow_by_hand(x, dtype, "tokens", 40)) < 1e-12


def test_a_cluster_by_hand() -> None:
    """Thirteen tokens of two channels in two places: centroids (2, 8) and (-4, 1), then codes of what is left."""
    made = GroupQuantizer("qvg2", [CachedPart((2,), "channels")])
    here, there = [[2.5, 7.5], [1.5, 8.5]], [[-4.0, 1.0], [-2.5, 1.0], [-5.5, 1.0]]
    x = torch.tensor([here * 2 + there * 2 + here + [there[0]]])
    codes, bounds, centres, names = made.pack(13, [x])
    assert centres.view(torch.float8_e4m3fn).float()[0, 0, 0, 0].tolist() == [[2.0, 8.0], [-4.0, 1.0]]
    # The names 0000 1111 1100 1, a bit each from the lowest on.
    assert names.flatten().tolist() == [0b11110000, 0b10011]
    # What is left of the first token is 0.5 and -0.5: from -0.5 on in steps of a third, in FP8 0.34375.
    assert bounds.view(torch.float8_e4m3fn).float()[0, 0, 0].flatten().tolist() == [-0.5, 0.34375]
    assert codes[0, 0, 0].tolist() == [3 + 0 * 4]
    (back,) = made.unpack(13, [codes, bounds, centres, names], torch.float32)
    assert back[0, 0].tolist() == [2 - 0.5 + 3 * 0.34375, 8 - 0.5]
    assert back[0, 4].tolist() == [-4.0, 1.0]


def test_a_centroid_that_no_token_is_nearest_to_stays_where_it_was() -> None:
    made = GroupQuantizer("qvg2", [CachedPart((2,), "channels")])
    x = torch.tensor([3.0, -1.0]).expand(1, 24, 2)
    rows = made.pack(24, [x])
    assert rows[2].view(torch.float8_e4m3fn).float().flatten(0, 3).tolist() == [[[3.0, -1.0]] * 2]
    assert torch.equal(made.unpack(24, rows, torch.float32)[0], x)


def test_two_bits_of_a_frame_by_hand() -> None:
    """Four tokens of two channels: the first channel's codes 0, 1, 3, 2 lie in one byte, from its lowest bits on."""
    made = GroupQuantizer("int2", [CachedPart((2,), "tokens")])
    x = torch.tensor([[[1.0, 8.0], [1.5, 8.0], [2.5, 8.0], [2.1, 8.0]]])
    codes, bounds = made.pack(4, [x])
    assert codes.flatten().tolist() == [0 + 1 * 4 + 3 * 16 + 2 * 64, 0]
    assert bounds.flatten(1).tolist() == [[1.0, 0.5, 8.0, 0.0]]
    (back,) = made.unpack(4, [codes, bounds], torch.float32)
    assert back.tolist() == [[[1.0, 8.0], [1.5, 8.0], [2.5, 8.0], [2.0, 8.0]]]


def test_three_bits_of_a_frame_by_hand() -> None:
    """Five tokens of a channel, codes 0, 1, 5, 7, 2: two bytes of their two lowest bits, then one of the third."""
    made = GroupQuantizer("int3", [CachedPart((1,), "tokens")])
    x = torch.tensor([[[2.0], [2.5], [4.5], [5.5], [3.1]]])
    codes, bounds = made.pack(5, [x])
    assert codes.flatten().tolist() == [0 + 1 * 4 + 1 * 16 + 3 * 64, 2, 0 + 0 + 4 + 8 + 0]
    assert bounds.flatten().tolist() == [2.0, 0.5]
    (back,) = made.unpack(5, [codes, bounds], torch.float32)
    assert back.flatten().tolist() == [2.0, 2.5, 4.5, 5.5, 3.0]
    assert made.parts[0].frame_bytes("int3", 5, itemsize=2) == 3 + 4


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
def test_what_no_half_holds_is_held_to_the_largest(dtype: CacheDtype) -> None:
    made = GroupQuantizer(dtype, [CachedPart((5,), "channels")])
    (back,) = made.round_trip(1, [torch.tensor([[[-1e9, 0.0, 3.0, 1e-9, 1e9]]])])
    assert back.isfinite().all()
    (flat,) = made.round_trip(1, [torch.full((1, 1, 5), 1e-7)])
    assert (flat - 1e-7).abs().max() < 2e-7


def test_gradients_pass_straight_through() -> None:
    x = numbers(1, TOKENS, 3, 14).requires_grad_()
    (out,) = GroupQuantizer("int4", [CachedPart((3, 14), "tokens")]).round_trip(TOKENS, [x])
    (3 * out).sum().backward()
    assert x.grad is not None
    assert (x.grad == 3).all()
    assert not torch.equal(out, x)


def make(
    cache_dtype: CacheDtype | None, kind: str, *, streaming: StreamingConfig | None = STREAMING, double: bool = True
) -> WanModel:
    """A dense model, or two latent layers around a dense one; in float64, a rounding never decides a code."""
    mla = None
    if kind != "dense":
        rope, norm, present = kind.split()
        layer = LAYER if rope == "head" else SHARED
        named: dict[str, Any] = {"rope": rope, "key_norm": norm, "present": present}
        mla = MLAConfig(q_lora_rank=None, softmax_scale=14**-0.5, layers=(layer, None, layer), **named)
    model = WanModel(dataclasses.replace(DENSE, mla=mla, cache_dtype=cache_dtype, streaming=streaming))
    model = model.double() if double else model
    randomize(model)
    return model.requires_grad_(False).eval()


KINDS = ["dense", "head token exact", "cached latent exact", "latent token exact", "cached token latent"]


def inputs(frames: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(7)
    levels = (1000 * torch.rand(2, 8, generator=g)).repeat_interleave(2, 1)[:, :frames]
    latents = torch.randn(2, 4, frames, HEIGHT, WIDTH, generator=g)
    return latents.double(), levels.double(), torch.randn(2, 5, 9, generator=g).double()


def cache_of(model: WanModel, batch: int = 2) -> LatentCache:
    return LatentCache(model.config, batch=batch, height=HEIGHT, width=WIDTH, dtype=model.dtype)


def streamed(model: WanModel, cache: LatentCache, sizes: list[int]) -> Tensor:
    return stream(model, cache, *inputs(sum(sizes)), sizes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", CACHE_DTYPES)
@torch.no_grad()
def test_streaming_equals_one_masked_pass(dtype: CacheDtype, kind: str) -> None:
    model, plain = make(dtype, kind), make(None, kind)
    cache = cache_of(model)
    found = streamed(model, cache, [2, 2, 1])
    x, t, context = inputs(5)
    assert relative(found, model(x, t, context)) < 1e-9
    (view,) = views(5, STREAMING)
    assert relative(found, velocity(model, x, t, context, noisy_layout(view, STREAMING)).double()) < 1e-6
    # Not by having been left alone: the past is coarse, and the first chunk, which has none, is not.
    exact = plain(x, t, context)
    assert relative(found[:, :, 2:], exact[:, :, 2:]) > {"int8": 1e-5}.get(dtype, 1e-4)
    assert relative(found[:, :, :2], exact[:, :, :2]) < 1e-9
    cache.reset()
    assert torch.equal(streamed(model, cache, [2, 2, 1]), found)


@torch.no_grad()
def test_streaming_equals_one_masked_pass_in_float32() -> None:
    model = make("int8", "dense", double=False)
    x, t, context = (part.float() for part in inputs(5))
    cache, out = cache_of(model), []
    for start, size in ((0, 2), (2, 2), (4, 1)):
        some = slice(start, start + size)
        out.append(model(x[:, :, some], t[:, some], context, cache=cache, start_frame=start))
    assert relative(torch.cat(out, 2), model(x, t, context)) < 1e-5


@pytest.mark.parametrize("mode", ["absorbed", "expanded"])
@torch.no_grad()
def test_a_present_that_is_read_from_latents_sees_its_own_as_they_are(mode: str) -> None:
    model = make("int4", "cached token latent")
    model.attention_mode = mode  # type: ignore[assignment]
    assert relative(streamed(model, cache_of(model), [2, 2, 1]), model(*inputs(5))) < 1e-9


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
@torch.no_grad()
def test_a_ring_gives_what_a_plain_cache_gives_whose_past_is_coarsened_by_hand(dtype: CacheDtype) -> None:
    """Past the window, with a sink: behind every chunk, what it left in a plain cache is rounded there."""
    model, plain = make(dtype, "dense"), make(None, "dense")
    x, t, context = inputs(13)
    cache, oracle = cache_of(model), cache_of(plain)
    for start in range(0, 12, 2):
        newest = (x[:, :, start : start + 2], t[:, start : start + 2], context)
        found = model(*newest, cache=cache, start_frame=start)
        assert relative(found, plain(*newest, cache=oracle, start_frame=start)) < 1e-9
        assert oracle.view is not None
        for layer in oracle.layers:
            for buffer, along in zip(layer.buffers, ("tokens", "channels"), strict=True):
                buffer[:, oracle.view.write] = narrow_by_hand(buffer[:, oracle.view.write], dtype, along, TOKENS)


@torch.no_grad()
def test_a_cache_that_was_sought_goes_on_as_one_that_was_filled() -> None:
    model = make("int4", "dense")
    x, t, context = inputs(8)
    filled, sought = cache_of(model), cache_of(model)
    for start in range(0, 6, 2):
        model(x[:, :, start : start + 2], t[:, start : start + 2], context, cache=filled, start_frame=start)
    for layer, other in zip(filled.layers, sought.layers, strict=True):
        for mine, theirs in zip(layer.buffers, other.buffers, strict=True):
            theirs.copy_(mine)
    sought.seek(6)
    newest = (x[:, :, 6:], t[:, 6:], context)
    assert torch.equal(*(model(*newest, cache=cache, start_frame=6) for cache in (filled, sought)))


@pytest.mark.parametrize("kind", ["dense", "head token exact"])
@torch.no_grad()
def test_passes_of_training_see_the_same_cache(kind: str) -> None:
    model = make("int4", kind)
    x, _, context = inputs(4)
    cache, other = cache_of(model), cache_of(model)
    chunk_velocity(model, x[:, :, :2], 0.0, context, cache, 0)
    kept = [buffer.clone() for layer in cache.layers for buffer in layer.buffers]
    live = chunk_velocity(model, x[:, :, 2:], 500.0, context, cache, 2, live=True)
    assert all(map(torch.equal, kept, (buffer for layer in cache.layers for buffer in layer.buffers)))
    written = chunk_velocity(model, x[:, :, 2:], 500.0, context, cache, 2)
    model(x[:, :, :2], torch.zeros(2), context, cache=other, start_frame=0)
    run = model(x[:, :, 2:], torch.full((2,), 500.0), context, cache=other, start_frame=2)
    assert relative(live, written) < 1e-9
    assert relative(written, run.float()) < 1e-6
    with torch.enable_grad():
        model.requires_grad_(True)
        assert chunk_velocity(model, x[:, :, 2:], 500.0, context, cache, 2).requires_grad
    assert not any(buffer.requires_grad for layer in cache.layers for buffer in layer.buffers)


@torch.no_grad()
def test_without_a_past_nothing_is_narrowed() -> None:
    x, t, context = inputs(3)
    models = [make(dtype, "dense", streaming=None) for dtype in (None, "int2")]  # type: ignore[arg-type]
    assert torch.equal(*(model(x, t[:, 0], context) for model in models))


# A token of a dense layer: 42 keys and 42 values. Keys have 2 groups along the 35 tokens of a frame for each channel,
# values 2 along the channels for each token, with 4 bytes a group. Latents: 37 in 2 groups, 6 rotary in one, one norm.
# Behind k-means, a head of 14, 37 or 6 is a group of 2 bytes, with 3 centroids in FP8 and 2 bits of a name for a token.
BYTES = {
    "fp8": (2 * 42 * 35, (37 + 6 + 4) * 35),
    "int8": (42 * (35 + 8) + 35 * (42 + 8), 35 * (37 + 8 + 6 + 4 + 4)),
    "int4": (42 * (18 + 8) + 35 * (21 + 8), 35 * (19 + 8 + 3 + 4 + 4)),
    "int3": (42 * (14 + 8) + 35 * (17 + 8), 35 * (15 + 8 + 3 + 4 + 4)),
    "int2": (42 * (9 + 8) + 35 * (11 + 8), 35 * (10 + 8 + 2 + 4 + 4)),
    "qvg4": (6 * (35 * (7 + 2) + 3 * 14 + 9), 35 * (19 + 2 + 3 + 2 + 4) + 3 * (37 + 6) + 2 * 9),
    "qvg3": (6 * (35 * (6 + 2) + 3 * 14 + 9), 35 * (15 + 2 + 3 + 2 + 4) + 3 * (37 + 6) + 2 * 9),
    "qvg2": (6 * (35 * (4 + 2) + 3 * 14 + 9), 35 * (10 + 2 + 2 + 2 + 4) + 3 * (37 + 6) + 2 * 9),
    "qvg2-2stages": (6 * (35 * (4 + 2) + 6 * 14 + 18), 35 * (10 + 2 + 2 + 2 + 4) + 6 * (37 + 6) + 4 * 9),
}


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
def test_bytes_are_counted_alike_by_hand_by_the_cache_and_by_the_plan(dtype: CacheDtype) -> None:
    dense, latent = BYTES[dtype]
    model = make(dtype, "cached token exact", double=False)
    assert model.config.frame_bytes(4, TOKENS) == (latent, dense, latent)
    cache = cache_of(model)
    assert cache.nbytes == 2 * 5 * (2 * latent + dense)
    assert all(isinstance(layer, NarrowLayerCache) for layer in cache.layers)
    video = StreamedVideo(height=8 * HEIGHT, width=8 * WIDTH, window_frames=5, batch=2)
    plan = plan_memory(model.config, video=video, cache_itemsize=4)
    assert plan.mla.bytes_per_window == cache.nbytes
    assert plan.mla.bytes_per_token == -(-(2 * latent + dense) // TOKENS)
    assert plan.dense.bytes_per_window == cache_of(make(dtype, "dense", double=False)).nbytes
    assert plan.dense.bytes_per_window == 2 * 5 * 3 * dense


def test_bytes_at_the_size_of_wan() -> None:
    """A frame of 1,560 tokens is 49 groups of a channel; in whole groups a number takes 4 + 32 / 32 bits."""
    wan = WanConfig(dim=1536, num_heads=12, num_layers=30, ffn_dim=8960, cache_dtype="int4")
    assert wan.cached_bytes(2) == ((1536 * 4 // 8 + 1536 * 4 // 32) * 2,) * 30
    assert wan.frame_bytes(2, 1560) == (1536 * (1560 // 2 + 4 * 49) + 1560 * (1536 // 2 + 4 * 48),) * 30
    assert wan.cache_words == ("57,600 bytes", "184,320 in bfloat16")
    assert wan.cache_share == 1920 / 6144
    # Two bits, two groups of 2 bytes in a head of 128; behind them 130 centroids a frame, and a byte for each token.
    clustered = dataclasses.replace(wan, cache_dtype="qvg2")
    assert clustered.frame_bytes(2, 1560) == (2 * 12 * (1560 * (32 + 4 + 1) + 130 * 128),) * 30
    # Of a frame of 1,536: 128 centroids, and 7 bits for each token.
    assert clustered.cached_bytes(2) == (-(-2 * 12 * (1536 * (36 + 7 / 8) + 128 * 128) // 1536),) * 30


def test_a_setting_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="cache_dtype"):
        dataclasses.replace(DENSE, cache_dtype="int5")
    bits = dataclasses.replace(LAYER, cache_bits=((4, 38),))
    mla = MLAConfig(q_lora_rank=None, key_norm="token", softmax_scale=0.3, layers=(bits, None, None), rope="head")
    with pytest.raises(ConfigError, match="cache_dtype is int4, but this model's cache has bits of its own"):
        dataclasses.replace(DENSE, mla=mla, cache_dtype="int4")


def test_a_model_is_loaded_with_it_and_no_file_holds_it() -> None:
    model = load_model("tiny", cache_dtype="int4")
    assert model.config.cache_dtype == "int4"
    assert load_model("tiny").config == dataclasses.replace(model.config, cache_dtype=None)
    # Groups of 24 of 48 tokens: 96 + 96 bytes of codes, 4 / 24 a key and 4 / 32 a value.
    assert model.config.frame_bytes(4, 48) == ((192 + 32 + 24) * 48,) * 6
