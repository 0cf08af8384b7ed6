"""The contract with engines, against widths and bytes worked out by hand, the plan of `analyze` and both engines."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from streaming_fixtures import RECIPES, pipeline_of
from torch import Tensor, nn

from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.mla import MLAConfig, MLALayer
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.conversion.run import convert
from mlaconvert.errors import ConfigError
from mlaconvert.integrations.contract import CachedAttention, CachedLayer, Contract
from mlaconvert.integrations.streaming import swap_attention
from mlaconvert.model.cache import LatentCache
from mlaconvert.model.memory import StreamedVideo, plan_memory

STREAMING = StreamingConfig(chunk_frames=2, window_frames=5, sink_frames=1, positions="absolute")


def layer(**changes: Any) -> MLALayer:
    widths: dict[str, Any] = {"kv_lora_rank": 7, "qk_nope_head_dim": 9, "v_head_dim": 11, "rope_components": ((0, 2),)}
    return MLALayer(**(widths | changes))


def config(**changes: Any) -> WanConfig:
    """Three layers, the one in the middle dense; the last counts bits."""
    mla = MLAConfig(
        q_lora_rank=None,
        key_norm="token",
        softmax_scale=0.25,
        # 5 scalars of 3 bits and 13 of 1: parts of 2 bits take 2 bytes, parts of 1 bit 18 / 8 -> 3.
        layers=(layer(), None, layer(kv_lora_rank=13, cache_bits=((3, 5), (1, 13)))),
    )
    sizes: dict[str, Any] = {"dim": 48, "num_heads": 4, "num_layers": 3, "ffn_dim": 52, "mla": mla}
    return WanConfig(**(sizes | {"streaming": STREAMING} | changes))


def test_what_each_layer_caches_by_hand() -> None:
    contract = Contract.of(config())
    latent, dense, packed = contract.layers
    assert latent == CachedLayer(latent=True, widths=((7,), (4,), (1,)))
    assert dense == CachedLayer(latent=False, widths=((4, 12), (4, 12)))
    assert packed == CachedLayer(latent=True, widths=((2 + 3,),), packed=True)
    assert [part.channels for part in contract.layers] == [12, 96, 5]
    assert [part.token_bytes(2) for part in contract.layers] == [24, 192, 5]
    assert contract.latent_layers == (0, 2)
    assert contract.rope_split == (2, 2, 2)
    assert (contract.window, contract.present) == (STREAMING, "latent")
    assert (contract.owner, contract.written) == ("engine", "every pass")


def test_its_bytes_are_those_of_the_plan_and_of_the_cache() -> None:
    """48 x 32 latent pixels are 24 x 16 tokens; a batch of 3 and 5 frames."""
    made = config()
    contract = Contract.of(made)
    by_hand = 3 * 5 * (24 * 16) * (24 + 192 + 5)
    assert contract.cache_bytes(24 * 16, 2, batch=3) == by_hand
    video = StreamedVideo(height=48 * 8, width=32 * 8, window_frames=5, batch=3)
    assert plan_memory(made, video=video).mla.bytes_per_window == by_hand
    assert LatentCache(made, batch=3, height=48, width=32, dtype=torch.bfloat16).nbytes == by_hand
    tokens = contract.window_tokens(24 * 16)
    buffers = [part.buffer(3, tokens, torch.bfloat16, "cpu") for part in contract.layers]
    assert sum(buffer.nbytes for buffer in buffers) == by_hand
    assert [(tuple(b.shape), b.dtype) for b in buffers] == [
        ((3, 1920, 12), torch.bfloat16),
        ((3, 1920, 96), torch.bfloat16),
        ((3, 1920, 5), torch.uint8),
    ]


def test_cached_tensors_lie_side_by_side() -> None:
    keys, values = torch.randn(2, 5, 4, 12), torch.randn(2, 5, 4, 12)
    dense = Contract.of(config()).layers[1]
    rows = dense.join((keys, values))
    assert torch.equal(rows[..., 12 * 3 + 7], keys[..., 3, 7])
    assert torch.equal(rows[..., 48 + 12 * 2 + 1], values[..., 2, 1])
    assert all(torch.equal(a, b) for a, b in zip(dense.split(rows), (keys, values), strict=True))


def test_who_sees_whom_in_one_pass() -> None:
    """Chunks of 2 in a window of 5 with a sink of 1: the last frame sees the sink and the four newest."""
    seen = Contract.of(config()).visible(7)
    assert seen is not None
    assert [row.nonzero().flatten().tolist() for row in seen] == [
        *([0, 1],) * 2, *([0, 1, 2, 3],) * 2, *([0, 2, 3, 4, 5],) * 2, [0, 3, 4, 5, 6],
    ]  # fmt: skip
    bidirectional = Contract.of(config(streaming=None))
    assert bidirectional.visible(7) is None
    assert bidirectional.window == StreamingConfig()


def test_an_exact_present_is_said() -> None:
    mla = dataclasses.replace(config().mla, present="exact")  # type: ignore[type-var]
    assert Contract.of(config(mla=mla)).present == "exact"


SPLIT: dict[str, Any] = {"rope_split": (2, 2, 2)}
DENSE = CachedLayer(latent=False, widths=((4, 12), (4, 12)))
WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "no widths": (lambda: CachedLayer(latent=True, widths=()), "widths is"),
    "an empty shape": (lambda: CachedLayer(latent=True, widths=((7,), ())), "widths is"),
    "a width of nothing": (lambda: CachedLayer(latent=True, widths=((0,),)), "widths.*1 or more"),
    "packed keys and values": (lambda: CachedLayer(latent=False, widths=((5,),), packed=True), "packed bits"),
    "packed in two": (lambda: CachedLayer(latent=True, widths=((5,), (1,)), packed=True), "packed bits"),
    "no layers": (lambda: Contract(layers=(), **SPLIT), "layers must have"),
    "no contract": (lambda: Contract(layers=(7,), **SPLIT), "layers"),  # type: ignore[arg-type]
    "exact without latents": (lambda: Contract(layers=(DENSE,), present="exact", **SPLIT), "needs a latent layer"),
    "another owner": (lambda: Contract(layers=(DENSE,), owner="model", **SPLIT), "owner is 'model': give engine"),  # type: ignore[arg-type]
    "a narrowed cache": (lambda: Contract.of(config(mla=None, cache_dtype="int4")), "cache_dtype is int4"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_contract_holds_itself_to_its_ranges(name: str) -> None:
    make, message = WRONG[name]
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_swapped_attention_and_that_of_diffusers_fulfil_it(golden: Path, tmp_path: Path) -> None:
    convert(golden, tmp_path / "mla", RECIPES["head"])
    pipe = pipeline_of(golden)
    theirs = list(pipe.generator.model.blocks)
    assert not isinstance(theirs[0].self_attn, CachedAttention)
    swap_attention(pipe, tmp_path / "mla", positions="absolute")
    check(theirs[0].self_attn, (0, 2), theirs, "self_attn")

    pytest.importorskip("diffusers")
    from mlaconvert.integrations.diffusers import WanMLATransformer3DModel

    model = WanMLATransformer3DModel.from_pretrained(tmp_path / "mla")
    check(model.blocks[0].attn1, model.contract.latent_layers, model.blocks, "attn1")


def check(first: nn.Module, latent: tuple[int, ...], blocks: Any, name: str) -> None:
    """Converted layers are `CachedAttention` and cache what their module makes; the others are not ours to call."""
    assert [isinstance(getattr(block, name), CachedAttention) for block in blocks] == [i in latent for i in range(3)]
    made: tuple[Tensor, ...] = first.compress(torch.randn(2, 5, 96))  # type: ignore[operator]
    assert tuple(tuple(part.shape[2:]) for part in made) == first.cached.widths
