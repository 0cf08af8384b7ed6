"""The latent cache: its bytes, its window and its equality with full passes."""

from __future__ import annotations

import dataclasses
import gc
from itertools import product
from typing import Any

import pytest
import torch
from support import randomize, relative, stream
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.mla import KeyNorm, MLAConfig, MLALayer, RopeMode
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.errors import ConfigError, InputError
from mlaconvert.model.attention.kernel import AttentionPlan
from mlaconvert.model.cache import LatentCache, LayerCache
from mlaconvert.model.quantizer import CacheQuantizer
from mlaconvert.model.rollout import LatentSize, rollout
from mlaconvert.model.rope import Rotary, angles
from mlaconvert.model.schedule import Sampler
from mlaconvert.model.wan import WanModel

H, W = 4, 6  # latent pixels, 6 tokens a frame
BASE = WanConfig(dim=60, num_heads=5, num_layers=3, ffn_dim=20, freq_dim=8, text_dim=9, text_len=4, in_dim=3, out_dim=3)


def make_config(
    key_norm: KeyNorm, streaming: StreamingConfig, *, mixed: bool = True, rope: RopeMode = "cached"
) -> WanConfig:
    layers: tuple[MLALayer | None, ...] = (
        MLALayer(kv_lora_rank=7, qk_nope_head_dim=8, v_head_dim=11, rope_components=((0, 1), (2, 2))),
        None if mixed else MLALayer(kv_lora_rank=5, qk_nope_head_dim=0, v_head_dim=4, rope_components=((1, 3),)),
        MLALayer(kv_lora_rank=13, qk_nope_head_dim=3, v_head_dim=12, rope_components=((5, 1),)),
    )
    if rope == "head":  # whole heads turn, and nothing is shared
        layers = tuple(
            layer and dataclasses.replace(layer, qk_nope_head_dim=12, rope_components=()) for layer in layers
        )
    mla = MLAConfig(q_lora_rank=17, key_norm=key_norm, softmax_scale=0.3, layers=layers, rope=rope)
    return dataclasses.replace(BASE, streaming=streaming, mla=mla)


def make_model(config: WanConfig) -> WanModel:
    model = WanModel(config).requires_grad_(False)
    randomize(model)
    return model


def inputs(frames: int, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    x = torch.randn(batch, 3, frames, H, W, generator=g)
    return x, 1000 * torch.rand(batch, frames, generator=g), torch.randn(batch, 2, 9, generator=g)


@pytest.mark.parametrize("key_norm", ["latent", "token"])
@pytest.mark.parametrize("mode", ["expanded", "absorbed"])
@torch.no_grad()
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


@dataclasses.dataclass(frozen=True)
class ListedPlan(AttentionPlan):
    """Remembers every frame in a plain list, and hands out the frames that it is told to."""

    memory: list[list[Tensor]] = dataclasses.field(default_factory=list)
    frames: int = 0
    seen: tuple[int, ...] = ()

    def remember(
        self, cache: LayerCache | None, *new: Tensor, quantizer: CacheQuantizer | None = None
    ) -> tuple[Tensor, ...]:
        tokens = new[0].shape[1] // self.frames
        self.memory.extend([v[:, tokens * i : tokens * (i + 1)] for v in new] for i in range(self.frames))
        return tuple(torch.cat([self.memory[f][j] for f in self.seen], 1) for j in range(len(new)))


@pytest.mark.parametrize("key_norm", ["latent", "token"])
@pytest.mark.parametrize("positions", ["window", "absolute"])
@pytest.mark.parametrize(
    ("chunk", "window", "sink"),
    [
        (3, 7, 1),
        pytest.param(2, 7, 2, marks=pytest.mark.slow),
        (2, 7, 3),
        (1, 4, 0),
        pytest.param(2, 5, 1, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("rope", ["cached", "latent", "head"])
@torch.no_grad()
def test_eviction_equals_recomputed_windows(
    key_norm: KeyNorm, positions: str, chunk: int, window: int, sink: int, rope: RopeMode
) -> None:
    """Every chunk against a pass, layer by layer, over exactly the frames that it may see, in plain frame order.

    Two layers are latent, one is dense.
    """
    streaming = StreamingConfig(
        chunk_frames=chunk,
        window_frames=window,
        sink_frames=sink,
        positions=positions,  # type: ignore[arg-type]
    )
    model = make_model(make_config(key_norm, streaming, rope=rope)).double()
    sizes = [*([chunk] * 4), 2] if chunk > 1 else [1] * 7
    frames = sum(sizes)
    x, t, context = (v.double() for v in inputs(frames))
    cache = LatentCache(model.config, batch=2, height=H, width=W, dtype=torch.float64)
    streamed = stream(model, cache, x, t, context, sizes)

    stored: list[list[list[Tensor]]] = [[] for _ in model.blocks]  # layer, frame, cached tensors
    start = 0
    for size in sizes:
        end = start + size
        seen = tuple(f for f in range(end) if f < sink or f >= end - (window - sink))
        if positions == "absolute" or end <= window:
            place = dict(zip(seen, seen, strict=True))
        else:
            place = dict(zip(seen, range(len(seen)), strict=True))
        p = model.prepare(x[:, :, start:end], t[:, start:end], context)
        turn = angles(torch.tensor([place[f] for f in seen]), H // 2, W // 2, model.config.rope_split)
        keys = Rotary(turn.cos(), turn.sin())
        queries = Rotary(keys.cos[-size * 6 :], keys.sin[-size * 6 :])
        hidden = p.x
        for block, memory in zip(model.blocks, stored, strict=True):
            plan = ListedPlan(query_rotary=queries, key_rotary=keys, memory=memory, frames=size, seen=seen)
            hidden = block(hidden, p.modulation, p.text, p.image, plan, None)
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


def test_the_window_is_a_view_of_the_cache() -> None:
    """Nothing is copied when a chunk is written: what attention gets lies in the buffers themselves."""
    config = make_config("token", StreamingConfig(chunk_frames=2, window_frames=5))
    cache = LatentCache(config, batch=1, height=H, width=W)
    for start in range(0, 12, 2):
        view = cache.begin(start, 2)
        for layer in cache.layers:
            new = tuple(torch.rand(1, 12, *buffer.shape[2:]) for buffer in layer.buffers)
            window = layer.update(view, *new)
            for buffer, seen, own in zip(layer.buffers, window, new, strict=True):
                assert seen.data_ptr() == buffer.data_ptr()
                assert seen.is_contiguous()  # one video, so no kernel has to gather it
                assert torch.equal(seen[:, view.write], own)


def test_steps_of_a_chunk_share_its_bookkeeping() -> None:
    model = make_model(make_config("latent", StreamingConfig(chunk_frames=2, window_frames=5)))
    cache = LatentCache(model.config, batch=2, height=H, width=W)
    x, t, context = inputs(2)
    plans = []
    for start in (0, 0, 2, 2, 2):
        model(x, t, context, cache=cache, start_frame=start)
        plans.append(cache.plan)
    assert plans[0] is plans[1]
    assert plans[1] is not plans[2]
    assert plans[2] is plans[3] is plans[4]
    model.attention_mode = "absorbed"
    model(x, t, context, cache=cache, start_frame=2)
    assert cache.plan.mode == "absorbed"


@pytest.mark.parametrize("keeps_text", [True, False])
@torch.no_grad()
def test_a_prompt_is_projected_once(keeps_text: bool) -> None:
    """And again when it changes, be it another tensor or the same one written to."""
    model = make_model(make_config("latent", StreamingConfig(chunk_frames=2, window_frames=5)))
    calls = []
    for block in model.blocks:
        block.cross_attn.k.register_forward_hook(lambda *_: calls.append(1))
    cache = LatentCache(model.config, batch=2, height=H, width=W, keeps_text=keeps_text)
    x, t, context = inputs(2)
    for change, expected in ((None, 3), (None, 0), ("other", 3), ("written", 3), (None, 0)):
        if change == "other":
            context = context + 1
        elif change == "written":
            context.mul_(2)
        calls.clear()
        found = model(x, t, context, cache=cache, start_frame=0)
        assert len(calls) == (expected if keeps_text else 3)
        assert relative(found, model(x, t, context)) < 1e-5
    assert cache.text_nbytes == (3 * 2 * 2 * 4 * 60 * 4 if keeps_text else 0)


def test_gradients_pass_a_cache_that_remembers() -> None:
    """Of the prompt's projections and the latent's, though a pass without gradients came before."""
    model = make_model(make_config("token", StreamingConfig(chunk_frames=2, window_frames=5))).requires_grad_(True)
    x, t, context = inputs(2)

    def gradients(before: bool) -> list[Tensor]:
        cache = LatentCache(model.config, batch=2, height=H, width=W)
        if before:
            with torch.no_grad():
                model(x, t, context, cache=cache)
        model.zero_grad()
        model(x, t, context, cache=cache).square().sum().backward()
        block = model.blocks[0]
        weights = (block.cross_attn.k.weight, block.self_attn.kv_b_proj.weight, model.text_embedding[0].weight)  # type: ignore[union-attr]
        return [w.grad.clone() for w in weights]  # type: ignore[union-attr, operator]

    for found, expected in zip(gradients(True), gradients(False), strict=True):
        assert float(expected.norm()) > 0
        assert relative(found, expected) < 1e-4


def live_bytes() -> int:
    """Bytes of all tensors that Python can reach, each storage once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) is Tensor and thing.device.type == "cpu":
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


class Largest(TorchDispatchMode):
    """The most bytes that the operations of a stretch make, together."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.bytes += out.nbytes
        return out


@pytest.mark.parametrize("mixed", [True, False])
def test_two_hundred_frames_take_the_memory_of_twenty(mixed: bool) -> None:
    """Live tensors and what a chunk makes on its way are the same after 21 frames and after 200."""
    model = make_model(make_config("token", StreamingConfig(chunk_frames=4, window_frames=9), mixed=mixed))
    context = inputs(1, 1)[2]
    video = rollout(model, context, size=LatentSize(frames=200, height=2, width=2), sampler=Sampler.few_step((1000,)))
    figures = []
    for skipped in (5, 42):  # then follow the chunks at frames 20 and 192
        for _ in range(skipped):
            next(video)
        with Largest() as meter:
            next(video)
        figures.append((meter.bytes, live_bytes()))
    assert figures[0] == figures[1]
    assert figures[0][0] > 0
