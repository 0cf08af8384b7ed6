"""Caches in bits: codes in bytes, what a code stands for, and models whose past is read from them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from support import randomize, relative, stream
from torch import Tensor

from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.mla import MLAConfig, MLALayer
from mlaconvert.config.packing import packed_bytes
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.errors import ConfigError
from mlaconvert.families.wan import WanFamily
from mlaconvert.healing.frames import chunk_velocity
from mlaconvert.model.cache import LatentCache
from mlaconvert.model.memory import StreamedVideo, plan_memory
from mlaconvert.model.quantizer import CacheQuantizer, Packing
from mlaconvert.model.wan import WanModel

BITS = (12, 11, 10, 9, 8, 8, 7, 7, 6, 5, 4, 4, 3, 3, 2, 1, 1, 1)
STREAMING = StreamingConfig(chunk_frames=2, window_frames=5, sink_frames=1)
DENSE = WanConfig(
    dim=42, num_heads=3, num_layers=3, ffn_dim=20, freq_dim=8, text_dim=9, text_len=6, in_dim=4, out_dim=4,
    streaming=STREAMING,
)  # fmt: skip
HEIGHT, WIDTH, TOKENS = 4, 6, 6
# 11 channels and the norm: 7 + 6 + 5 * 3 + 4 * 2 + 2 * 2 + 1 + 2 bits, in parts of 4, 2 and 1.
LAYER = MLALayer(
    kv_lora_rank=11,
    qk_nope_head_dim=14,
    v_head_dim=9,
    rope_components=(),
    cache_bits=((7, 1), (6, 1), (5, 3), (4, 2), (2, 2), (1, 2), (2, 1)),
)
SHARED = dataclasses.replace(LAYER, qk_nope_head_dim=5, rope_components=((0, 2), (4, 1)))


def codes_by_hand(packed: np.ndarray, bits: tuple[int, ...]) -> list[int]:
    """Of one token, bit by bit: parts of 8, 4, 2 and 1 bits, each in bytes of their own, the lowest in the widest."""
    stream, codes, done = iter([int(b) for b in packed]), [0] * len(bits), [0] * len(bits)
    for width in (8, 4, 2, 1):
        byte, left = 0, 0
        for i, count in enumerate(bits):
            if not count & width:
                continue
            if not left:
                byte, left = next(stream), 8
            codes[i] += (byte % 2**width) << done[i]
            byte, left, done[i] = byte >> width, left - width, done[i] + width
    assert next(stream, None) is None
    assert tuple(done) == bits
    return codes


def test_codes_lie_in_bytes_part_by_part_and_come_back() -> None:
    g = torch.Generator().manual_seed(0)
    codes = torch.stack([torch.randint(0, 2**b, (5, 3), generator=g) for b in BITS], -1).int()
    packed = Packing(BITS).pack(codes)
    # Six codes have a part of 8, seven one of 4, eight one of 2, ten one of 1.
    assert packed.dtype == torch.uint8
    assert packed.shape == (5, 3, packed_bytes(BITS)) == (5, 3, 6 + 4 + 2 + 2)
    assert codes_by_hand(packed[4, 1].numpy(), BITS) == codes[4, 1].tolist()
    assert torch.equal(Packing(BITS).unpack(packed), codes)


@pytest.mark.parametrize("bits", [(1,), (12,), (8,) * 5, (3,) * 9, (1,) * 17])
def test_extremes_come_back(bits: tuple[int, ...]) -> None:
    for value in (0, 1):
        codes = torch.tensor([[(2**b - 1) * value for b in bits]], dtype=torch.int32)
        assert torch.equal(Packing(bits).unpack(Packing(bits).pack(codes)), codes)


def quantizer(bits: tuple[int, ...]) -> CacheQuantizer:
    made = CacheQuantizer(bits)
    g = torch.Generator().manual_seed(1)
    half = torch.tensor([2.0 ** (b - 1) for b in bits])
    made.center.copy_(torch.randn(len(bits), generator=g))
    made.slope.copy_(0.5 + 2 * torch.rand(len(bits), generator=g))
    made.gain.copy_(half / (0.5 + 2 * torch.rand(len(bits), generator=g)))
    return made


def longhand(x: float, bits: int, center: float, slope: float, gain: float) -> float:
    """The value that a cache gives back of one scalar, in float64."""
    code = math.floor(gain * math.asinh(slope * (x - center)))
    code = max(-(2 ** (bits - 1)), min(2 ** (bits - 1) - 1, code))
    return math.sinh((code + 0.5) / gain) / slope + center


def test_a_code_stands_for_the_middle_of_its_step() -> None:
    made = quantizer(BITS)
    x = 4 * torch.randn(7, 2, len(BITS), dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    parts = x.split([10, 7, 1], -1)
    found = torch.cat(made.unpack(made.pack(*parts), parts), -1)
    tables = [p.tolist() for p in (made.center, made.slope, made.gain)]
    expected = [
        [longhand(value, b, *(t[i] for t in tables)) for i, (value, b) in enumerate(zip(row, BITS, strict=True))]
        for row in x.flatten(0, 1).tolist()
    ]
    torch.testing.assert_close(found.flatten(0, 1), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert torch.equal(torch.cat(made(*parts), -1), found)
    for dtype in (torch.float32, torch.bfloat16):
        low = [part.to(dtype) for part in parts]
        back = made.unpack(made.pack(*low), low)
        assert {part.dtype for part in back} == {dtype}
        assert all(torch.equal(a, b) for a, b in zip(back, made(*low), strict=True))


def test_gradients_pass_straight_through_and_none_reach_the_tables() -> None:
    made = quantizer((3, 2))
    x = torch.tensor([[0.3, -9.0]], requires_grad=True)
    (out,) = made(x)
    out.backward(torch.tensor([[2.0, 5.0]]))
    assert x.grad is not None
    assert x.grad.tolist() == [[2.0, 5.0]]
    assert not torch.equal(out, x)
    assert all(p.grad is None and not p.requires_grad for p in made.parameters())


def in_bits(layer: MLALayer, rope: str = "head", present: str = "exact") -> WanModel:
    """Two layers in bits around a dense one, in float64, where a rounding never decides a code."""
    kind: dict[str, Any] = {"rope": rope, "key_norm": "token", "present": present}
    mla = MLAConfig(q_lora_rank=None, softmax_scale=14**-0.5, layers=(layer, None, layer), **kind)
    model = WanModel(dataclasses.replace(DENSE, mla=mla)).double().requires_grad_(False).eval()
    randomize(model)
    for block in (model.blocks[0], model.blocks[2]):
        tables = quantizer(layer.scalar_bits)
        block.self_attn.kv_quantizer.load_state_dict(tables.state_dict())  # type: ignore[union-attr]
    return model


def inputs(frames: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(7)
    levels = (1000 * torch.rand(2, 4, generator=g)).repeat_interleave(2, 1)[:, :frames]
    latents = torch.randn(2, 4, frames, HEIGHT, WIDTH, generator=g)
    return latents.double(), levels.double(), torch.randn(2, 5, 9, generator=g).double()


def streamed(model: WanModel, cache: LatentCache, sizes: list[int]) -> Tensor:
    return stream(model, cache, *inputs(sum(sizes)), sizes)


KINDS = [("head", LAYER, "exact"), ("latent", SHARED, "exact"), ("head", LAYER, "latent"), ("latent", SHARED, "latent")]


@pytest.mark.parametrize(("rope", "layer", "present"), KINDS)
@torch.no_grad()
def test_streaming_through_bytes_equals_one_masked_pass(rope: str, layer: MLALayer, present: str) -> None:
    model = in_bits(layer, rope, present)
    cache = LatentCache(model.config, batch=2, height=HEIGHT, width=WIDTH, dtype=torch.float64)
    found = streamed(model, cache, [2, 2, 1])
    x, t, context = inputs(5)
    assert relative(found, model(x, t, context)) < 1e-9
    assert {buffer.dtype for i in (0, 2) for buffer in cache.layers[i].buffers} == {torch.uint8}
    # Not by having been left alone: what the past is read from is coarse, and is not what a chunk sees of itself.
    plain = in_bits(layer, rope, present)
    for i in (0, 2):
        plain.blocks[i].self_attn.kv_quantizer = None  # type: ignore[assignment]
    assert relative(found, plain(x, t, context)) > 1e-3
    first = relative(found[:, :, :2], plain(x[:, :, :2], t[:, :2], context))
    assert first < 1e-9 if present == "exact" else first > 1e-3
    cache.reset()
    assert torch.equal(streamed(model, cache, [2, 2, 1]), found)


@torch.no_grad()
def test_a_ring_past_the_window_gives_what_a_window_alone_gives() -> None:
    """A cache that has turned over, and one that saw the window's frames alone, at its positions."""
    model = in_bits(LAYER)
    x, t, context = inputs(8)
    caches = [LatentCache(model.config, batch=2, height=HEIGHT, width=WIDTH, dtype=torch.float64) for _ in range(2)]
    for start in range(0, 6, 2):
        model(x[:, :, start : start + 2], t[:, start : start + 2], context, cache=caches[0], start_frame=start)
    for layer, other in zip(caches[0].layers, caches[1].layers, strict=True):
        for mine, theirs in zip(layer.buffers, other.buffers, strict=True):
            theirs.copy_(mine)
    caches[1].seek(6)
    newest = (x[:, :, 6:], t[:, 6:], context)
    found, sought = (model(*newest, cache=cache, start_frame=6) for cache in caches)
    assert torch.equal(found, sought)
    kept = {bytes(row.numpy().tobytes()) for row in caches[0].layers[0].buffers[0][0]}
    assert len(kept) > 3 * TOKENS


def test_bytes_are_counted_alike_by_the_cache_and_by_the_plan() -> None:
    model = in_bits(LAYER)
    per_layer = 7  # 12 codes: seven have a part of 4, in 4 bytes; five one of 2, in 2; six one of 1, in 1
    assert packed_bytes(LAYER.scalar_bits) == per_layer
    assert model.config.cached_bytes(4) == (per_layer, 2 * 42 * 4, per_layer)
    cache = LatentCache(model.config, batch=2, height=HEIGHT, width=WIDTH)
    assert cache.nbytes == 2 * 5 * TOKENS * (2 * per_layer + 84 * 4)
    video = StreamedVideo(height=32, width=48, window_frames=5, batch=2)
    plan = plan_memory(model.config, video=video, cache_itemsize=4)
    assert plan.mla.bytes_per_window == cache.nbytes
    assert plan.dense.bytes_per_token == 3 * 84 * 4


@torch.no_grad()
def test_a_pass_that_leaves_the_cache_alone_sees_the_same() -> None:
    """Training through a cache: the chunk's own entries are as if they had been written."""
    model = in_bits(LAYER, present="latent")
    x, _, context = inputs(4)
    cache = LatentCache(model.config, batch=2, height=HEIGHT, width=WIDTH, dtype=torch.float64)
    chunk_velocity(model, x[:, :, :2], 0.0, context, cache, 0)
    live = chunk_velocity(model, x[:, :, 2:], 500.0, context, cache, 2, live=True)
    written = chunk_velocity(model, x[:, :, 2:], 500.0, context, cache, 2)
    assert relative(live, written) < 1e-9


def test_a_section_that_does_not_fit_is_refused() -> None:
    mla = MLAConfig(q_lora_rank=None, key_norm="token", softmax_scale=0.3, layers=(LAYER,), rope="head")
    data = mla.to_json()
    assert data["format_version"] == 3
    assert MLAConfig.from_json(data, "config.json") == mla
    for change, message in (
        ({"format_version": 2}, "cache_bits, of format_version 3, and this says 2"),
        ({"layers": [data["layers"][0] | {"cache_bits": [[4, 11]]}]}, "is of 11 scalars, but 12 are cached"),
        ({"layers": [data["layers"][0] | {"cache_bits": [[4, 2**40]]}]}, "but 12 are cached"),
        ({"layers": [data["layers"][0] | {"cache_bits": [[13, 12]]}]}, "cache_bits"),
        ({"layers": [data["layers"][0] | {"cache_bits": [[0, 12]]}]}, "cache_bits"),
    ):
        with pytest.raises(ConfigError, match=message):
            MLAConfig.from_json(data | change, "config.json")


def test_counts_beyond_all_memory_are_only_counted() -> None:
    """A config that promises two thousand million channels ends at the weights' shapes, not in a list of its bits."""
    huge = dataclasses.replace(LAYER, kv_lora_rank=2**31 - 1, cache_bits=((3, 2**31 - 1), (8, 1)))
    mla = MLAConfig(q_lora_rank=None, key_norm="token", softmax_scale=0.3, layers=(huge,), rope="head")
    config = dataclasses.replace(DENSE, num_layers=1, mla=mla)
    # Parts of 2 and of 1, each a bit short of whole bytes, and a norm.
    assert config.cached_bytes(4) == (2**29 + 2**28 + 1,)
    shapes = WanFamily().expected_shapes(config)
    assert shapes["blocks.0.self_attn.kv_quantizer.slope"] == (2**31,)
