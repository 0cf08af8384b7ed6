"""Our Wan model against the reference implementations' outputs and against diffusers."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from support import randomize, relative
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.mla import MLAConfig, MLALayer
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.errors import ConfigError, InputError
from mlaconvert.evaluation.bench.flops import forward_flops
from mlaconvert.model.attention.cost import cheaper_mode, latent_cost
from mlaconvert.model.cache import LatentCache
from mlaconvert.model.wan import WanModel

WIDE = MLALayer(kv_lora_rank=21, qk_nope_head_dim=20, v_head_dim=24, rope_components=((0, 1), (5, 1)))
NARROW = MLALayer(kv_lora_rank=45, qk_nope_head_dim=3, v_head_dim=6, rope_components=((1, 2),))
ROTARY_ONLY = MLALayer(kv_lora_rank=5, qk_nope_head_dim=0, v_head_dim=30, rope_components=((1, 2), (2, 3)))


def latent_model(layer: MLALayer, **changes: Any) -> WanModel:
    options: dict[str, Any] = {"q_lora_rank": 24, "key_norm": "latent", "softmax_scale": 0.2, "layers": (layer,)}
    mla = MLAConfig(**(options | changes))
    config = WanConfig(
        dim=96, num_heads=4, num_layers=1, ffn_dim=56, freq_dim=8, text_dim=9, text_len=8, in_dim=3, out_dim=3, mla=mla
    )
    model = WanModel(config).requires_grad_(False)
    randomize(model)
    return model


def turn_pairs(x: Tensor, pairs: Sequence[int], position: tuple[int, int, int], split: tuple[int, ...]) -> Tensor:
    """One token's [2 * pairs] scalars, turned pair by pair."""
    out = x.clone()
    for place, pair in enumerate(pairs):
        axis = 0 if pair < split[0] else 1 if pair < split[0] + split[1] else 2
        first = (0, split[0], split[0] + split[1])[axis]
        angle = position[axis] * 10000 ** -((pair - first) / split[axis])
        real, imag = x[2 * place], x[2 * place + 1]
        out[2 * place] = real * math.cos(angle) - imag * math.sin(angle)
        out[2 * place + 1] = real * math.sin(angle) + imag * math.cos(angle)
    return out


def attention_longhand(model: WanModel, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Latent attention before its output projection, token by token and head by head, from the named tensors."""
    config, mla = model.config, model.config.mla
    assert mla is not None
    layer = mla.layers[0]
    assert layer is not None
    w = dict(model.blocks[0].self_attn.named_parameters())
    heads, nope, rope, rank = config.num_heads, layer.qk_nope_head_dim, layer.qk_rope_head_dim, layer.kv_lora_rank
    places = [(f, r, c) for f in range(grid[0]) for r in range(grid[1]) for c in range(grid[2])]
    head = mla.rope == "head"
    pairs = range(config.head_dim // 2) if head else layer.component_pairs

    def rms(v: Tensor) -> Tensor:
        return 1 / (v.square().mean() + config.eps).sqrt()

    queries, keys, values = [], [], []
    for token, place in zip(x, places, strict=True):
        q = w["q_a_proj.weight"] @ token + w["q_a_proj.bias"]
        q = (w["q_b_proj.weight"] @ (q * rms(q) * w["q_a_layernorm.weight"])).view(heads, nope + rope)
        made = w["kv_a_proj_with_mqa.weight"] @ token + w["kv_a_proj_with_mqa.bias"]
        latent, shared, s = made[:rank], made[rank:], torch.tensor(1.0, dtype=x.dtype)
        if mla.key_norm == "latent":
            latent = latent * rms(latent) * w["kv_a_layernorm.weight"]
        else:
            s = rms(w["k_norm_proj.weight"] @ token + w["k_norm_proj.bias"])
        if mla.rope == "latent":
            shared = w["k_rope_proj.weight"] @ latent + w["k_rope_proj.bias"]
        up = (w["kv_b_proj.weight"] @ latent).view(heads, nope + layer.v_head_dim)
        content = up[:, :nope] + w["kv_b_proj.bias"].view(heads, nope)
        split = config.rope_split
        if head:
            queries.append(torch.stack([turn_pairs(v, pairs, place, split) for v in q]))
            keys.append(torch.stack([turn_pairs(v * s, pairs, place, split) for v in content]))
        else:
            turned = turn_pairs(shared * s, pairs, place, split).expand(heads, -1)
            queries.append(torch.stack([torch.cat((v[:nope], turn_pairs(v[nope:], pairs, place, split))) for v in q]))
            keys.append(torch.cat((content * s, turned), 1))
        values.append(up[:, nope:])
    q, k, v = (torch.stack(parts, 1) for parts in (queries, keys, values))  # [H, N, .]
    return ((q @ k.mT * mla.softmax_scale).softmax(-1) @ v).transpose(0, 1).flatten(1)


@pytest.mark.parametrize("rope", ["cached", "latent", "head"])
@pytest.mark.parametrize("key_norm", ["latent", "token"])
@pytest.mark.parametrize("mode", ["expanded", "absorbed"])
@torch.no_grad()
def test_latent_attention_longhand(rope: str, key_norm: str, mode: Any) -> None:
    """Widths that are no multiples of 8, so that all padding is at work; with and without a cache."""
    layer = WIDE if rope != "head" else dataclasses.replace(WIDE, qk_nope_head_dim=24, rope_components=())
    model = latent_model(layer, rope=rope, key_norm=key_norm).double()
    model.attention_mode = mode
    cache = LatentCache(model.config, batch=1, height=4, width=6, dtype=torch.float64)
    latents = torch.randn(1, 3, 2, 4, 6, generator=torch.Generator().manual_seed(1)).double()
    for given in (None, cache):
        p = model.prepare(latents, torch.full((1,), 300.0), torch.ones(1, 2, 9).double(), cache=given)
        x = 3 * p.x
        expected = attention_longhand(model, x[0], p.grid)
        attention = model.blocks[0].self_attn
        if rope == "head" and mode == "absorbed":  # heads that turn on their own share no key
            with pytest.raises(InputError, match="absorbed"):
                attention.heads(x, p.plan, given and given.layers[0])  # type: ignore[operator, union-attr]
            continue
        found = attention.heads(x, p.plan, given and given.layers[0])  # type: ignore[operator, union-attr]
        assert relative(found[0], expected) < 1e-10


def counted(work: Callable[[], object]) -> int:
    """FLOPs by torch's own counter; attention as plain products, because it does not know the CPU's fused kernel."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize("layer", [WIDE, NARROW, ROTARY_ONLY])
@pytest.mark.parametrize("rope", ["cached", "latent"])
@pytest.mark.parametrize("mode", ["expanded", "absorbed"])
@torch.no_grad()
def test_the_cost_rule_counts_what_torch_counts(layer: MLALayer, rope: str, mode: Any) -> None:
    """A chunk of 12 tokens in a window of 36: all products of latent attention but its projections, and the block's."""
    model = latent_model(layer, rope=rope)
    model.attention_mode = mode
    streaming = StreamingConfig(chunk_frames=2, window_frames=6)
    cache = LatentCache(model.config, batch=1, height=4, width=6, streaming=streaming)
    cache.seek(6)
    p = model.prepare(torch.zeros(1, 3, 2, 4, 6), torch.zeros(1), torch.zeros(1, 2, 9), cache=cache, start_frame=6)
    attention = model.blocks[0].self_attn
    whole = counted(lambda: attention.heads(p.x, p.plan, cache.layers[0]))  # type: ignore[operator]
    queries = counted(lambda: attention.q_b_proj(attention.q_a_proj(p.x)))  # type: ignore[operator]
    down = counted(lambda: attention.kv_a_proj_with_mqa(p.x))  # type: ignore[operator]
    turned = 2 * 36 * layer.kv_lora_rank * layer.qk_rope_head_dim if rope == "latent" else 0  # a projection as well
    sizes = {"num_heads": 4, "content": layer.kv_lora_rank, "queries": 12, "keys": 36}
    assert latent_cost(mode, layer, **sizes).flops == whole - queries - down - turned
    block = counted(lambda: model.blocks[0](p.x, p.modulation, p.text, None, p.plan, cache.layers[0]))
    assert sum(forward_flops(model.config, queries=12, keys=36, mode=mode).values()) == block


@pytest.mark.parametrize("mla", [False, True])
@pytest.mark.parametrize("key_norm", ["latent", "token"])
@torch.no_grad()
def test_a_whole_pass_is_counted(mla: bool, key_norm: str) -> None:
    model = latent_model(WIDE, q_lora_rank=None, key_norm=key_norm)
    model.attention_mode = "expanded"
    if not mla:
        model = WanModel(dataclasses.replace(model.config, mla=None)).requires_grad_(False)
    streaming = StreamingConfig(chunk_frames=2, window_frames=6)
    cache = LatentCache(model.config, batch=1, height=4, width=6, streaming=streaming)
    cache.seek(6)
    p = model.prepare(torch.zeros(1, 3, 2, 4, 6), torch.zeros(1), torch.zeros(1, 2, 9), cache=cache, start_frame=6)
    block = counted(lambda: model.blocks[0](p.x, p.modulation, p.text, None, p.plan, cache.layers[0]))
    assert sum(forward_flops(model.config, queries=12, keys=36, mode="expanded").values()) == block


def test_bytes_and_choice_by_hand() -> None:
    """Wan2.1 1.3B in the paper's widths: heads of 128, 232 channels (192 + 1 + 32, rounded up)."""
    layer = MLALayer(
        kv_lora_rank=192,
        qk_nope_head_dim=96,
        v_head_dim=128,
        rope_components=tuple((pair, 1) for pair in range(16)),
    )
    sizes = {"num_heads": 12, "content": 192}
    expanded = latent_cost("expanded", layer, **sizes, queries=4680, keys=10920)
    absorbed = latent_cost("absorbed", layer, **sizes, queries=4680, keys=10920)
    assert expanded.flops == 2 * 10920 * 232 * 12 * 256 + 4 * 4680 * 10920 * 12 * 128
    assert expanded.bytes == 2 * (2 * 10920 * 12 * 128) * 2
    assert absorbed.flops == 4 * 4680 * 10920 * 12 * 232 + 2 * 4680 * 232 * 12 * (128 + 128)
    assert absorbed.bytes == 2 * (2 * 4680 * 12 * 232) * 2
    balance = {"itemsize": 2, "flops_per_byte": 200.0}
    assert cheaper_mode(layer, **sizes, queries=4680, keys=10920, **balance) == "expanded"
    assert cheaper_mode(layer, **sizes, queries=8, keys=10920, **balance) == "absorbed"
    # Bytes rule where nothing is computed: half as many queries as keys read fewer absorbed.
    assert cheaper_mode(layer, **sizes, queries=4680, keys=10920, itemsize=2, flops_per_byte=1e6) == "absorbed"


def test_auto_takes_the_cheaper_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    model = latent_model(WIDE)
    x, t, context = torch.ones(1, 3, 2, 4, 6), torch.full((1,), 300.0), torch.ones(1, 2, 9)
    assert model.attention_mode == "auto"
    outputs, asked = {}, []
    for chosen in ("expanded", "absorbed"):

        def cheaper(*_: Any, chosen: str = chosen, **sizes: Any) -> str:
            asked.append(sizes)
            return chosen

        monkeypatch.setattr("mlaconvert.model.attention.latent.cheaper_mode", cheaper)
        automatic = model(x, t, context)
        model.attention_mode = chosen  # type: ignore[assignment]
        assert torch.equal(model(x, t, context), automatic)
        outputs[chosen], model.attention_mode = automatic, "auto"
    assert not torch.equal(outputs["expanded"], outputs["absorbed"])  # they differ by rounding
    sizes = {"num_heads": 4, "content": WIDE.kv_lora_rank, "queries": 12, "keys": 12, "itemsize": 4}  # 2 * 2 * 3 tokens
    assert all(sizes.items() <= given.items() for given in asked)
    assert relative(outputs["expanded"], outputs["absorbed"]) < 1e-5


@torch.no_grad()
def test_new_weights_are_noticed_by_a_cache_in_use() -> None:
    """What a layer derives from its weights is made again when they change, in place or replaced."""
    model = latent_model(WIDE)
    x, t, context = torch.ones(1, 3, 2, 4, 6), torch.full((1,), 300.0), torch.ones(1, 2, 9)
    up = model.blocks[0].self_attn.kv_b_proj  # type: ignore[union-attr]
    for change in (None, "weight", "bias", "data"):
        if change == "weight":
            up.weight.mul_(2)  # type: ignore[union-attr, operator]
        elif change == "bias":
            up.bias.add_(1)  # type: ignore[union-attr, operator]
        elif change == "data":
            up.weight.data = up.weight.data * 3  # type: ignore[union-attr, operator]
        cache = LatentCache(model.config, batch=1, height=4, width=6)
        assert relative(model(x, t, context, cache=cache), model(x, t, context)) < 1e-5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler")
@torch.no_grad()
def test_compiled_blocks_give_the_same_video() -> None:
    model = latent_model(WIDE)
    x, t, context = torch.ones(1, 3, 2, 4, 6), torch.full((1,), 300.0), torch.ones(1, 2, 9)
    cache = LatentCache(model.config, batch=1, height=4, width=6)
    expected = model(x, t, context, cache=cache)
    model.compile_blocks()
    assert relative(model(x, t, context, cache=cache), expected) < 1e-5


def test_compiling_without_a_compiler_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(ConfigError, match="needs a C\\+\\+ compiler"):
        latent_model(WIDE).compile_blocks()
