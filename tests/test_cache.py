"""The latent cache: its bytes, its window and its equality with full passes."""

from __future__ import annotations

import dataclasses
from itertools import product

import pytest
import torch
from conftest import randomize, relative
from torch import Tensor

from mlaconvert.cache import LatentCache
from mlaconvert.config import KeyNorm, MLAConfig, MLALayer, StreamingConfig, WanConfig
from mlaconvert.errors import ConfigError, InputError
from mlaconvert.model import WanModel
from mlaconvert.rollout import Sampler, rollout
from mlaconvert.rope import Rotary, angles

H, W = 4, 6  # latent pixels, 6 tokens a frame
BASE = WanConfig(dim=60, num_heads=5, num_layers=3, ffn_dim=20, freq_dim=8, text_dim=9, text_len=4, in_dim=3, out_dim=3)


def make_config(key_norm: KeyNorm, streaming: StreamingConfig, *, mixed: bool = True, shared: bool = True) -> WanConfig:
    layers = (
        MLALayer(kv_lora_rank=7, qk_nope_head_dim=8, v_head_dim=11, rope_components=((0, 1), (2, 2))),
        None if mixed else MLALayer(kv_lora_rank=5, qk_nope_head_dim=0, v_head_dim=4, rope_components=((1, 3),)),
        MLALayer(kv_lora_rank=13, qk_nope_head_dim=3, v_head_dim=12, rope_components=((5, 1),)),
    )
    mla = MLAConfig(q_lora_rank=17, key_norm=key_norm, softmax_scale=0.3, layers=layers, rotary_in_content=shared)
    return dataclasses.replace(BASE, streaming=streaming, mla=mla)


def make_model(config: WanConfig) -> WanModel:
    model = WanModel(config).requires_grad_(False)
    randomize(model)
    return model


def inputs(frames: int, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    x = torch.randn(batch, 3, frames, H, W, generator=g)
    return x, 1000 * torch.rand(batch, frames, generator=g), torch.randn(batch, 2, 9, generator=g)


def stream(model: WanModel, cache: LatentCache, x: Tensor, t: Tensor, context: Tensor, sizes: list[int]) -> Tensor:
    out, start = [], 0
    for size in sizes:
        chunk, times = x[:, :, start : start + size], t[:, start : start + size]
        model(chunk.flip(0), times, context, cache=cache, start_frame=start)  # overwritten by the next line
        out.append(model(chunk, times, context, cache=cache, start_frame=start))
        start += size
    return torch.cat(out, 2)


@pytest.mark.parametrize("key_norm", ["latent", "token"])
@pytest.mark.parametrize("mode", ["expanded", "absorbed"])
def test_streaming_equals_one_masked_pass(key_norm: KeyNorm, mode: str) -> None:
    model = make_model(make_config(key_norm, StreamingConfig(chunk_frames=3, window_frames=8)))
    model.attention_mode = mode  # type: ignore[assignment]
    x, t, context = inputs(8)
    cache = LatentCache(model.config, batch=2, height=H, width=W)
    streamed = stream(model, cache, x, t, context, [3, 3, 2])
    masked = model(x, t, context)
    assert relative(streamed, masked) < 1e-5
    cache.reset()
    assert torch.equal(stream(model, cache, x, t, context, [3, 3, 2]), streamed)


@pytest.mark.parametrize("key_norm", ["latent", "token"])
@pytest.mark.parametrize("positions", ["window", "absolute"])
@pytest.mark.parametrize(("chunk", "window", "sink"), [(3, 7, 1), (2, 7, 2), (1, 4, 0), (2, 5, 1)])
def test_eviction_equals_recomputed_windows(
    key_norm: KeyNorm, positions: str, chunk: int, window: int, sink: int
) -> None:
    """Every chunk against a pass, layer by layer, over exactly the frames that it may see, in plain frame order."""
    streaming = StreamingConfig(
        chunk_frames=chunk,
        window_frames=window,
        sink_frames=sink,
        positions=positions,  # type: ignore[arg-type]
    )
    model = make_model(make_config(key_norm, streaming, mixed=False)).double()
    frames = 6 * chunk + 2
    sizes = [chunk] * 6 + ([2] if chunk > 1 else [1, 1])
    x, t, context = (v.double() for v in inputs(frames))
    cache = LatentCache(model.config, batch=2, height=H, width=W, dtype=torch.float64)
    streamed = stream(model, cache, x, t, context, sizes)

    stored: list[list[list[Tensor]]] = [[] for _ in model.blocks]  # layer, frame, compressed tensors
    start = 0
    for size in sizes:
        end = start + size
        seen = [f for f in range(end) if f < sink or f >= end - (window - sink)]
        if positions == "absolute" or end <= window:
            place = dict(zip(seen, seen, strict=True))
        else:
            place = dict(zip(seen, range(len(seen)), strict=True))
        p = model.prepare(x[:, :, start:end], t[:, start:end], context)
        turn = angles(torch.tensor([place[f] for f in seen]), H // 2, W // 2, model.config.rope_split)
        keys = Rotary(turn.cos(), turn.sin())
        queries = Rotary(keys.cos[-size * 6 :], keys.sin[-size * 6 :])
        plan = dataclasses.replace(p.plan, query_rotary=queries, key_rotary=keys, mask=None)
        hidden = p.x
        for block, memory in zip(model.blocks, stored, strict=True):
            attention = block.self_attn
            own = attention.compress(block.attention_input(hidden, p.modulation))  # type: ignore[operator]
            for i in range(size):
                memory.append([v[:, 6 * i : 6 * i + 6] for v in own])
            whole = tuple(torch.cat([memory[f][j] for f in seen], 1) for j in range(len(own)))
            attention.compress = lambda _, whole=whole: whole  # type: ignore[assignment]
            hidden = block(hidden, p.modulation, p.text, p.image, plan, None)
            del attention.compress
        assert relative(streamed[:, :, start:end], model.finish(hidden, p)) < 1e-10, f"chunk at {start}"
        start = end


@pytest.mark.parametrize("key_norm", ["latent", "token"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measured_bytes_are_exact(key_norm: KeyNorm, dtype: torch.dtype) -> None:
    config = make_config(key_norm, StreamingConfig(chunk_frames=3, window_frames=8))
    cache = LatentCache(config, batch=4, height=H, width=W, dtype=dtype)
    norm = key_norm == "token"
    scalars = (7 + 6 + norm) + 2 * 60 + (13 + 2 + norm)
    assert cache.nbytes == scalars * (8 * 6) * 4 * dtype.itemsize
    assert sum(config.cached_scalars()) == scalars


def test_nothing_grows() -> None:
    """The buffers of a long rollout are those of a short one, in place."""
    model = make_model(make_config("token", StreamingConfig(chunk_frames=2, window_frames=5)))
    cache = LatentCache(model.config, batch=1, height=H, width=W)
    before = [b.data_ptr() for layer in cache.layers for b in layer.buffers]
    size = cache.nbytes
    x, t, context = inputs(2, 1)
    for start in range(0, 40, 2):
        model(x, t, context, cache=cache, start_frame=start)
        view = cache.begin(start, 2)
        assert view.length <= 5 * 6
        assert int(view.key_frames.max()) < 5
    assert [b.data_ptr() for layer in cache.layers for b in layer.buffers] == before
    assert cache.nbytes == size


def test_batch_rows_do_not_mix() -> None:
    model = make_model(make_config("latent", StreamingConfig(chunk_frames=2, window_frames=5)))
    x, t, context = inputs(6, 3)

    def run(rows: slice, batch: int) -> Tensor:
        cache = LatentCache(model.config, batch=batch, height=H, width=W)
        return torch.cat(
            [
                model(x[rows, :, s : s + 2], t[rows, s : s + 2], context[rows], cache=cache, start_frame=s)
                for s in (0, 2, 4)
            ],
            2,
        )

    assert relative(run(slice(1, 2), 1), run(slice(0, 3), 3)[1:2]) < 1e-5


@pytest.mark.parametrize("key_norm", ["latent", "token"])
def test_absorbed_equals_expanded_through_the_cache(key_norm: KeyNorm) -> None:
    model = make_model(make_config(key_norm, StreamingConfig(chunk_frames=2, window_frames=5)))
    outputs = []
    for mode in ("expanded", "absorbed"):
        model.attention_mode = mode  # type: ignore[assignment]
        cache = LatentCache(model.config, batch=2, height=H, width=W)
        outputs.append(stream(model, cache, *inputs(8), [2, 2, 2, 2]))
    assert relative(outputs[1], outputs[0]) < 1e-5


def test_chunks_out_of_order_are_refused() -> None:
    cache = LatentCache(
        make_config("token", StreamingConfig(chunk_frames=2, window_frames=5)), batch=1, height=H, width=W
    )
    cache.begin(0, 2)
    cache.begin(0, 2)
    cache.begin(2, 2)
    for start, frames in ((0, 2), (3, 2), (2, 1), (4, 5)):
        with pytest.raises(InputError):
            cache.begin(start, frames)
    with pytest.raises(InputError, match="at least 9"):
        LatentCache(BASE, batch=1, height=H, width=W, streaming=StreamingConfig()).begin(0, 8)


def test_impossible_windows_are_refused() -> None:
    for chunk, window, sink in product((0, 3), (3, 4), (-1, 1, 2)):
        if chunk == 3 and window == 4 and sink == 1:
            continue
        with pytest.raises(ConfigError):
            StreamingConfig(chunk_frames=chunk, window_frames=window, sink_frames=sink)


def test_frames_of_another_size_are_refused() -> None:
    model = make_model(make_config("token", StreamingConfig()))
    cache = LatentCache(model.config, batch=1, height=H, width=W)
    with pytest.raises(InputError, match="tokens"):
        model(torch.zeros(1, 3, 3, H, W + 2), torch.zeros(1), torch.zeros(1, 2, 9), cache=cache)


def test_a_rollout_continues_what_it_is_given() -> None:
    """The given chunk comes back as it was, and what follows depends on it."""
    model = make_model(make_config("token", StreamingConfig(chunk_frames=2, window_frames=5)))
    prefix, _, context = inputs(2)

    def run(given: Tensor | None) -> Tensor:
        chunks = rollout(
            model, context, frames=6, height=H, width=W, sampler=Sampler.few_step((1000, 400)), prefix=given
        )
        return torch.cat(list(chunks), 2)

    found = run(prefix)
    assert torch.equal(found[:, :, :2], prefix)
    assert found.shape[2] == 6
    assert relative(run(prefix.flip(0))[:, :, 2:], found[:, :, 2:]) > 1e-3
    # By hand: the clean pass of the prefix, then the second chunk's two steps from the noise of its place.
    noise = torch.Generator().manual_seed(0)
    torch.randn(prefix.shape, generator=noise)
    x, cache = torch.randn(prefix.shape, generator=noise), LatentCache(model.config, batch=2, height=H, width=W)
    model(prefix, torch.zeros(2), context, cache=cache)
    levels = [t / 1000 for t in Sampler.few_step((1000, 400)).timesteps]
    clean = x - levels[0] * model(x, torch.full((2,), 1000 * levels[0]), context, cache=cache, start_frame=2)
    x = (1 - levels[1]) * clean + levels[1] * torch.randn(prefix.shape, generator=noise)
    x = x - levels[1] * model(x, torch.full((2,), 1000 * levels[1]), context, cache=cache, start_frame=2)
    assert relative(found[:, :, 2:4], x) < 1e-5
    with pytest.raises(InputError, match="whole chunks"):
        run(prefix[:, :, :1])
    with pytest.raises(InputError, match="prefix is"):
        run(prefix[:1])
