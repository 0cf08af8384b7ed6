"""A present of the teacher's own keys and values beside a past that is read from latents."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support import randomize
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.mla import MLAConfig, MLALayer
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.errors import ConfigError
from mlaconvert.evaluation.bench.flops import forward_flops
from mlaconvert.healing.frames import forcing_layout, views
from mlaconvert.model.attention import kernel
from mlaconvert.model.attention.kernel import AttentionPlan, Segment, attend_both, kernel_width, segments_of
from mlaconvert.model.attention.latent import LatentAttention
from mlaconvert.model.cache import LatentCache
from mlaconvert.model.rope import rotary
from mlaconvert.model.wan import WanModel
from mlaconvert.model.window import chunk_mask

STREAMING = StreamingConfig(chunk_frames=2, window_frames=5, sink_frames=1)
DENSE = WanConfig(
    dim=42, num_heads=3, num_layers=2, ffn_dim=20, freq_dim=8, text_dim=9, text_len=6, in_dim=4, out_dim=4,
    streaming=STREAMING,
)  # fmt: skip
HEIGHT, WIDTH, TOKENS = 4, 6, 6
WHOLE = MLALayer(kv_lora_rank=11, qk_nope_head_dim=14, v_head_dim=14, rope_components=())
NARROW_VALUES = dataclasses.replace(WHOLE, v_head_dim=9)
SHARED = MLALayer(kv_lora_rank=11, qk_nope_head_dim=5, v_head_dim=14, rope_components=((0, 2), (4, 1)))
NARROW = dataclasses.replace(SHARED, qk_nope_head_dim=3, v_head_dim=10)
KINDS = [("head", WHOLE), ("head", NARROW_VALUES), ("latent", SHARED), ("latent", NARROW), ("cached", NARROW)]
NAMES = ["whole heads", "whole heads, narrow values", "shared key", "narrow heads", "cached key, narrow heads"]


def exact_config(rope: str, layer: MLALayer, key_norm: str = "token") -> WanConfig:
    mla: dict[str, Any] = {"rope": rope, "key_norm": key_norm, "present": "exact"}
    return dataclasses.replace(
        DENSE, mla=MLAConfig(q_lora_rank=None, softmax_scale=14**-0.5, layers=(layer, layer), **mla)
    )


def exact_model(rope: str, layer: MLALayer, key_norm: str = "token", dtype: torch.dtype = torch.float32) -> WanModel:
    model = WanModel(exact_config(rope, layer, key_norm)).requires_grad_(False)
    randomize(model)
    return model.to(dtype).eval()


def inputs(frames: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(7)
    levels = (1000 * torch.rand(2, 4, generator=g)).repeat_interleave(2, 1)[:, :frames]
    latents = torch.randn(2, 4, frames, HEIGHT, WIDTH, generator=g)
    return latents.to(dtype), levels.to(dtype), torch.randn(2, 5, 9, generator=g).to(dtype)


def turned(x: Tensor, pairs: Sequence[int], place: tuple[int, int, int]) -> Tensor:
    """One head's channels of one token, turned pair by pair."""
    split, out = DENSE.rope_split, x.clone()
    for at, pair in enumerate(pairs):
        axis = 0 if pair < split[0] else 1 if pair < split[0] + split[1] else 2
        angle = place[axis] * 10000 ** -((pair - (0, split[0], split[0] + split[1])[axis]) / split[axis])
        real, imag = x[2 * at], x[2 * at + 1]
        out[2 * at] = real * math.cos(angle) - imag * math.sin(angle)
        out[2 * at + 1] = real * math.sin(angle) + imag * math.cos(angle)
    return out


def longhand(layer: LatentAttention, config: WanConfig, x: Tensor, frames: int, visible: Tensor) -> Tensor:
    """The attention output [N, D] of one video, token by token and head by head, from the named tensors."""
    mla, w = config.mla, dict(layer.named_parameters())
    assert mla is not None
    shape = mla.layers[0]
    assert shape is not None
    heads, width, rank = config.num_heads, config.head_dim, shape.kv_lora_rank
    nope, value, every = shape.qk_nope_head_dim, shape.v_head_dim, range(config.head_dim // 2)
    places = [(f, r, c) for f in range(frames) for r in range(2) for c in range(3)]

    def linear(name: str, v: Tensor) -> Tensor:
        return w[f"{name}.weight"] @ v + w[f"{name}.bias"]

    def rms(v: Tensor) -> Tensor:
        return 1 / (v.square().mean() + config.eps).sqrt()

    own, past = [], []
    for token, place in zip(x, places, strict=True):
        q, k = linear("q_a_proj", token), linear("k_norm_proj", token)
        q, s = (q * rms(q) * w["q_a_layernorm.weight"]).view(heads, width), rms(k)
        k, v = (k * s * w["k_norm.weight"]).view(heads, width), linear("v_proj", token).view(heads, width)
        own.append([(turned(q[h], every, place), turned(k[h], every, place), v[h]) for h in range(heads)])
        made = linear("kv_a_proj_with_mqa", token)
        latent, scale = made[:rank], s
        if mla.key_norm == "latent":
            latent, scale = latent * rms(latent) * w["kv_a_layernorm.weight"], torch.ones_like(s)
        up = w["kv_b_proj.weight"].view(heads, nope + value, rank) @ latent + w["kv_b_proj.bias"].view(heads, -1)
        shared = latent[:0]
        if mla.rope != "head":
            shared = (made[rank:] if mla.rope == "cached" else linear("k_rope_proj", latent)) * scale
            shared = turned(shared, shape.component_pairs, place)
        rows = []
        for h in range(heads):
            key, query = up[h, :nope] * scale, q[h]
            if mla.rope == "head":
                key, query = turned(key, every, place), turned(query, every, place)
            else:
                query = w["q_b_proj.weight"][h] @ query
                query = torch.cat((query[:nope], turned(query[nope:], shape.component_pairs, place)))
            out = up[h, nope:]
            rows.append((query, torch.cat((key, shared)), w["past_out_proj.weight"][h] @ out if value < width else out))
        past.append(rows)
    outputs = []
    for i in range(len(x)):
        row = []
        for h in range(heads):
            scores, values = [], []
            for j in range(len(x)):
                if not visible[i // TOKENS, j // TOKENS]:
                    continue
                present = bool(visible[j // TOKENS, i // TOKENS])
                mine, theirs = (own[i][h], own[j][h]) if present else (past[i][h], past[j][h])
                scores.append(mine[0] @ theirs[1] * mla.softmax_scale)
                values.append(theirs[2])
            row.append(torch.stack(scores).softmax(0) @ torch.stack(values))
        outputs.append(linear("o", torch.cat(row)))
    return torch.stack(outputs)


@pytest.mark.parametrize(("rope", "layer"), KINDS, ids=NAMES)
@pytest.mark.parametrize("key_norm", ["token", "latent"])
def test_one_softmax_over_present_and_past_is_the_longhand_one(rope: str, layer: MLALayer, key_norm: str) -> None:
    model = exact_model(rope, layer, key_norm, torch.float64)
    attention = model.blocks[0].self_attn
    assert isinstance(attention, LatentAttention)
    visible = chunk_mask((2, 2, 1), STREAMING)
    plan = model.attention_plan((5, 2, 3), torch.device("cpu"), chunks=(2, 2, 1))
    x = torch.randn(1, 5 * TOKENS, 42, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = attention(x, plan)[0]
    torch.testing.assert_close(found, longhand(attention, model.config, x[0], 5, visible), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", ["expanded", "absorbed"])
@pytest.mark.parametrize(("rope", "layer"), KINDS, ids=NAMES)
def test_streaming_equals_one_masked_pass(rope: str, layer: MLALayer, mode: Any) -> None:
    if mode == "absorbed" and rope == "head":
        pytest.skip("heads that turn their own keys have no absorbed form")
    model = exact_model(rope, layer)
    model.attention_mode = mode
    latents, timestep, context = inputs(5)
    whole = model(latents, timestep, context, chunks=(2, 2, 1))
    cache = LatentCache(model.config, batch=2, height=HEIGHT, width=WIDTH)
    parts, start = [], 0
    for count in (2, 2, 1):
        at = slice(start, start + count)
        for x in (torch.randn(2, 4, count, HEIGHT, WIDTH), latents[:, :, at]):  # an earlier step leaves its entries
            out = model(x, timestep[:, at], context, cache=cache, start_frame=start)
        parts.append(out)
        start += count
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-5, atol=1e-5)


def test_a_ring_that_is_full_is_read_without_the_chunks_own_slots() -> None:
    model = exact_model("latent", NARROW, dtype=torch.float64)
    attention = model.blocks[0].self_attn
    assert isinstance(attention, LatentAttention)
    x = torch.randn(1, 8 * TOKENS, 42, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    cache = LatentCache(model.config, batch=1, height=HEIGHT, width=WIDTH, dtype=torch.float64)
    for start in range(0, 8, 2):
        plan = model.attention_plan((2, 2, 3), torch.device("cpu"), cache=cache, start_frame=start)
        out = attention(x[:, start * TOKENS : (start + 2) * TOKENS], plan, cache.layers[0])
    # The last chunk sees frame 0, frames 4 and 5, and itself, at positions 0, 1, 2 and 3, 4.
    seen = torch.cat([x[0, f * TOKENS : (f + 1) * TOKENS] for f in (0, 4, 5, 6, 7)])
    visible = torch.tensor([[True] * f + [False] * (5 - f) for f in (1, 3, 3, 5, 5)])
    expected = longhand(attention, model.config, seen, 5, visible)[3 * TOKENS :]
    torch.testing.assert_close(out[0], expected, rtol=1e-9, atol=1e-9)


def test_teacher_forcing_keeps_each_halfs_own_chunk_exact() -> None:
    model = exact_model("head", WHOLE, dtype=torch.float64)
    attention = model.blocks[0].self_attn
    assert isinstance(attention, LatentAttention)
    (view,) = views(4, dataclasses.replace(STREAMING, window_frames=6))
    layout = forcing_layout(view, dataclasses.replace(STREAMING, window_frames=6))
    plan = layout.plan(model, 2, 3, torch.device("cpu"))
    x = torch.randn(1, 6 * TOKENS, 42, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    found = attention(x, plan)[0]
    # [clean 0, 1; noisy 0, 1, 2, 3]: the noisy second chunk reads the clean first one from latents.
    order = [0, 1, 4, 5]
    visible = torch.tensor([[True, True, False, False]] * 2 + [[True] * 4] * 2)
    picked = torch.cat([x[0, f * TOKENS : (f + 1) * TOKENS] for f in order])
    expected = longhand(attention, model.config, picked, 4, visible)
    torch.testing.assert_close(found[4 * TOKENS :], expected[2 * TOKENS :], rtol=1e-9, atol=1e-9)
    assert [s.past for s in plan.segments] == [slice(0, 0), slice(0, 0), slice(0, 2 * TOKENS)]


def test_segments_with_gaps_are_indices() -> None:
    visible = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 1, 1, 1], [1, 0, 1, 1, 1]]).bool()
    segments = segments_of(visible, 2)
    assert segments[:2] == (
        Segment(slice(0, 4), slice(0, 4), slice(0, 0)),
        Segment(slice(4, 6), slice(4, 6), slice(0, 4)),
    )
    assert segments[2].queries == segments[2].own == slice(6, 10)
    assert isinstance(segments[2].past, Tensor)
    assert segments[2].past.tolist() == [0, 1, 4, 5]


def test_gradients_through_both_sets_are_those_of_one_softmax() -> None:
    g = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_(True)

    present, past = (
        (draw(2, 5, 3, 8), draw(2, 4, 3, 8), draw(2, 4, 3, 7)),
        (draw(2, 5, 3, 6), draw(2, 9, 3, 6), draw(2, 9, 3, 11)),
    )
    scores = torch.cat([torch.einsum("bnhd,bmhd->bhnm", q, k) for q, k, _ in (present, past)], -1) * 0.4
    p = scores.softmax(-1)
    expected = (
        torch.einsum("bhnm,bmhd->bnhd", p[..., :4], present[2]),
        torch.einsum("bhnm,bmhd->bnhd", p[..., 4:], past[2]),
        p[..., 4:].sum(-1).transpose(1, 2).unsqueeze(-1),
    )
    weights = [draw(*part.shape).detach() for part in expected]
    leaves = [*present, *past]

    def pulled(parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(sum((part * w).sum() for part, w in zip(parts, weights, strict=True)), leaves)  # type: ignore[arg-type]

    found = attend_both(present, past, 0.4)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(pulled(found), pulled(expected), rtol=1e-8, atol=1e-8)
    with torch.no_grad():  # merged by their log-sum-exp
        torch.testing.assert_close(attend_both(present, past, 0.4), expected, rtol=1e-9, atol=1e-9)


def test_where_nothing_is_present_no_kernel_is_asked_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fused kernels make of no keys at all is not defined; a streaming codebase may keep all of a chunk."""
    g = torch.Generator().manual_seed(1)
    q, past_q = torch.randn(2, 5, 3, 8, generator=g), torch.randn(2, 5, 3, 6, generator=g)
    k, v = torch.randn(2, 9, 3, 6, generator=g), torch.randn(2, 9, 3, 11, generator=g)
    called = kernel._attend_lse

    def spy(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Any:
        assert k.shape[1]
        return called(q, k, v, scale)

    monkeypatch.setattr(kernel, "_attend_lse", spy)
    p = (torch.einsum("bnhd,bmhd->bhnm", past_q, k) * 0.4).softmax(-1)
    out, past_out, share = attend_both((q, q[:, :0], torch.empty(2, 0, 3, 7)), (past_q, k, v), 0.4)
    assert out.shape == (2, 5, 3, 7)
    assert not out.any()
    assert bool((share == 1).all())
    torch.testing.assert_close(past_out, torch.einsum("bhnm,bmhd->bnhd", p, v))


@pytest.mark.parametrize("rope", ["head", "latent"])
def test_config_of_an_exact_present_is_of_format_2_and_reads_back(rope: str) -> None:
    mla = exact_config(rope, WHOLE if rope == "head" else SHARED).mla
    assert mla is not None
    data = mla.to_json()
    assert (data["format_version"], data["present"]) == (2, "exact")
    assert MLAConfig.from_json(data, "here") == mla
    latent = dataclasses.replace(mla, present="latent").to_json()
    assert latent["format_version"] == 1
    assert "present" not in latent


def test_an_exact_present_wants_the_teachers_queries() -> None:
    with pytest.raises(ConfigError, match="q_lora_rank"):
        MLAConfig(q_lora_rank=7, key_norm="token", softmax_scale=0.3, layers=(WHOLE,), rope="head", present="exact")


def test_without_a_mask_everything_is_present() -> None:
    model = exact_model("head", WHOLE, dtype=torch.float64)
    attention = model.blocks[0].self_attn
    assert isinstance(attention, LatentAttention)
    x = torch.randn(1, 3 * TOKENS, 42, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    turn = rotary(torch.arange(3), 2, 3, DENSE.rope_split, torch.float64)
    before = attention(x, AttentionPlan(query_rotary=turn, key_rotary=turn))
    expected = longhand(attention, model.config, x[0], 3, torch.ones(3, 3, dtype=torch.bool))
    torch.testing.assert_close(before[0], expected, rtol=1e-9, atol=1e-9)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """What the fused kernels make of padded heads, in products that torch's counter knows."""
    width, value = kernel_width(q.shape[-1], v.shape[-1]), v.shape[-1]
    q, k, v = (torch.nn.functional.pad(x, (0, width - x.shape[-1])).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT * scale
    return (scores.softmax(-1) @ v)[..., :value].transpose(1, 2), scores.logsumexp(-1).transpose(1, 2)


@pytest.mark.parametrize("mode", ["expanded", "absorbed"])
@pytest.mark.parametrize(("rope", "layer"), KINDS, ids=NAMES)
@torch.no_grad()
def test_flops_are_those_that_torch_counts(
    rope: str, layer: MLALayer, mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk of 12 tokens in a window of 36."""
    if mode == "absorbed" and rope == "head":
        pytest.skip("heads that turn their own keys have no absorbed form")
    monkeypatch.setattr(kernel, "_attend_lse", plain_attention)
    model = exact_model(rope, layer)
    model.attention_mode = mode
    streaming = StreamingConfig(chunk_frames=2, window_frames=6)
    cache = LatentCache(model.config, batch=1, height=HEIGHT, width=WIDTH, streaming=streaming)
    cache.seek(6)
    p = model.prepare(torch.zeros(1, 4, 2, 4, 6), torch.zeros(1), torch.zeros(1, 2, 9), cache=cache, start_frame=6)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.blocks[0](p.x, p.modulation, p.text, None, p.plan, cache.layers[0])
    both_layers = sum(forward_flops(model.config, queries=12, keys=36, mode=mode).values())
    assert both_layers == 2 * counter.get_total_flops()
