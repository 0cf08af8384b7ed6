"""What several of these tests are made of."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from support import randomize
from torch import Tensor

from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.mla import MLAConfig, MLALayer, RopeMode
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.healing.batches import Batch, Rows, mix
from mlaconvert.healing.frames import views
from mlaconvert.healing.recipe import HealRecipe
from mlaconvert.model.cache import LatentCache
from mlaconvert.model.wan import WanModel

STREAMING = StreamingConfig(chunk_frames=2, window_frames=5, sink_frames=1)
TEACHER = WanConfig(
    dim=48,
    num_heads=4,
    num_layers=2,
    ffn_dim=40,
    in_dim=3,
    out_dim=3,
    freq_dim=16,
    text_dim=10,
    text_len=5,
    patch_size=(1, 2, 2),
    streaming=STREAMING,
)
LAYER = MLALayer(kv_lora_rank=7, qk_nope_head_dim=6, v_head_dim=12, rope_components=((0, 1), (3, 2)))
STUDENT = dataclasses.replace(
    TEACHER,
    mla=MLAConfig(q_lora_rank=None, key_norm="token", softmax_scale=12**-0.5, layers=(LAYER, LAYER)),
)
HEIGHT, WIDTH = 4, 6  # latent pixels: 2 x 3 tokens


def beside_present(rope: RopeMode) -> WanConfig:
    """A student whose present is exact, with values narrower than heads."""
    layer = dataclasses.replace(LAYER, v_head_dim=9)
    if rope == "head":
        layer = dataclasses.replace(layer, qk_nope_head_dim=12, rope_components=())
    assert STUDENT.mla is not None
    mla = dataclasses.replace(STUDENT.mla, rope=rope, present="exact", layers=(layer, layer))
    return dataclasses.replace(STUDENT, mla=mla)


def model(config: WanConfig, seed: int) -> WanModel:
    made = WanModel(config).double()
    randomize(made, seed)
    return made.requires_grad_(False).eval()


def make_batch(frames: int = 4, count: int = 3, *, view: int = 0, shared: float = 0.6) -> Batch:
    rows = Rows([mix("test", i) for i in range(count)])
    seen = views(frames, STREAMING)[view]
    clips = torch.randn(count, 3, len(seen.frames), HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1)).double()
    text = torch.randn(count + 1, 4, TEACHER.text_dim, generator=torch.Generator().manual_seed(2)).double()
    return Batch(latents=clips, context=text[:count], null=text[count:], view=seen, rows=rows, shared=shared)


def recipe(stage: str = "distill", **options: Any) -> HealRecipe:
    return HealRecipe(stage=stage, **options).resolved()  # type: ignore[arg-type]


def streamed(net: WanModel, past: list[Tensor], chunk: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
    """Velocity of a chunk behind clean ones that were written to the model's own cache; one timestep a row."""
    cache = LatentCache(net.config, batch=len(chunk), height=HEIGHT, width=WIDTH, dtype=torch.float64)
    start = 0
    for clean in past:
        net(clean, torch.zeros(len(chunk)).double(), context, cache=cache, start_frame=start)
        start += clean.shape[2]
    return net(chunk, timestep, context, cache=cache, start_frame=start)
