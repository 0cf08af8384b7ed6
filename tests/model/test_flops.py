"""What passes and rollouts compute, counted from shapes, is what torch counts while they run."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from counted_flops import FlopCount
from support import randomize

from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.mla import MLAConfig, MLALayer, Present
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.model.flops import NOTHING, Work, forward_work, rollout_work
from mlaconvert.model.rollout import Given, LatentSize, rollout
from mlaconvert.model.schedule import Sampler
from mlaconvert.model.wan import WanModel
from mlaconvert.model.window import chunk_mask, default_chunks

STREAMING = StreamingConfig(chunk_frames=2, window_frames=5, sink_frames=1)
# Heads of 16 fill up the kernels' widths, which the counts do not pad.
DENSE = WanConfig(
    dim=48,
    num_heads=3,
    num_layers=2,
    ffn_dim=40,
    in_dim=3,
    out_dim=3,
    freq_dim=16,
    text_dim=10,
    text_len=5,
    streaming=STREAMING,
)
TOKENS = 6  # 4 x 6 latent pixels
PADDED = 2 * 3 * (16 + 16)  # FLOPs a token: latent and bias are 8 channels, of which the weights have 7
LAYER = MLALayer(kv_lora_rank=7, qk_nope_head_dim=16, v_head_dim=16, rope_components=())


def latent(present: Present) -> WanConfig:
    mla = MLAConfig(
        q_lora_rank=None,
        key_norm="token",
        softmax_scale=0.25,
        layers=(LAYER, None),
        rope="head",
        present=present,
    )
    return dataclasses.replace(DENSE, mla=mla)


def made(config: WanConfig) -> WanModel:
    model = WanModel(config)
    randomize(model, 1)
    return model.requires_grad_(False).eval()


PARTS = dataclasses.replace(DENSE, fps=16, reference_dim=4)  # a reference is not read by a model that streams


@pytest.mark.parametrize(
    "config", [DENSE, latent("latent"), latent("exact"), PARTS], ids=["dense", "latent", "exact", "parts"]
)
@torch.no_grad()
def test_a_masked_pass_computes_what_is_counted(config: WanConfig) -> None:
    """Where a mask hides pairs they are computed all the same, and of no use."""
    visible = chunk_mask(default_chunks(7, STREAMING), STREAMING)
    with FlopCount() as counter:
        made(config)(torch.randn(1, 3, 7, 4, 6), torch.zeros(1, 7), torch.randn(1, 4, 10))
    found = forward_work(config, visible, TOKENS)
    padding = PADDED * 7 * TOKENS if config.mla else 0
    assert found.products + found.attention + padding == counter.total
    hidden = (49 - int(visible.sum())) * TOKENS**2 * 2 * 3 * 32  # of each layer
    assert found.masked == hidden * (1 if config.mla and config.mla.present == "exact" else 2)
    assert found.flops == found.products + found.attention - found.masked


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("given", [0, 4])
@pytest.mark.parametrize("config", [DENSE, latent("latent"), latent("exact")], ids=["dense", "latent", "exact"])
@torch.no_grad()
def test_a_rollout_computes_what_is_counted(config: WanConfig, given: int, guidance: float) -> None:
    """Nine frames by chunks of two through a window of five: given ones are only read, prompts are read once."""
    sampler = Sampler.many_step(3, guidance=guidance)
    prefix = torch.randn(1, 3, given, 4, 6) if given else None
    with FlopCount() as counter:
        video = rollout(
            made(config),
            torch.randn(1, 4, 10),
            size=LatentSize(frames=9, height=4, width=6),
            sampler=sampler,
            given=Given(null_context=torch.randn(1, 2, 10), prefix=prefix),
        )
        assert sum(chunk.shape[2] for chunk in video) == 9
    found = rollout_work(config, STREAMING, sampler, frames=9, frame_tokens=TOKENS, given=given)
    copies = 1 if guidance == 1 else 2
    text = 2 * 5 * (10 * 48 + 48 * 48 + 2 * 2 * 48 * 48)
    padding = 0
    for size, seen, end in ((2, 2, 2), (2, 4, 4), (2, 5, 6), (2, 5, 8), (1, 5, 9)):
        read = seen - (size if config.mla and config.mla.present == "exact" else 0)
        padding += (1 if end <= given else 4) * PADDED * read * TOKENS if config.mla else 0
    assert counter.total == found.products + found.attention + copies * (text + padding)


def test_work_adds_up() -> None:
    one = Work(products=1, attention=5, masked=2, double=3, moved=7)
    assert (2 * one + one * 0.5).flops == 2.5 * (1 + 5 - 2 + 3)
    assert sum([one, one], NOTHING).moved == 14
