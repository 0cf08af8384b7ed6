"""What several of these tests are made of."""

from __future__ import annotations

import dataclasses

import torch
from support import randomize

from mlaconvert.clips.folder import Clips
from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.mla import KeyNorm, Present, RopeMode
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.conversion.calibration.layer import Inputs, Layer
from mlaconvert.conversion.calibration.target import ErrorTable, Target
from mlaconvert.conversion.calibration.walk import LayerWalk
from mlaconvert.conversion.calibration.windows import Regime
from mlaconvert.families.checkpoint import Checkpoint
from mlaconvert.latent.weights import AttentionWeights
from mlaconvert.model.attention.dense import DenseAttention
from mlaconvert.model.attention.kernel import AttentionPlan, segments_of
from mlaconvert.model.rope import rotary

# Heads of 14 are 7 rotary pairs, split (3, 2, 2). Clips of 4 x 6 latent pixels have 2 x 3 tokens a frame.
STREAMING = StreamingConfig(chunk_frames=2, window_frames=5, sink_frames=1)
CONFIG = WanConfig(
    dim=42, num_heads=3, num_layers=3, ffn_dim=20, freq_dim=8, text_dim=9, text_len=6, in_dim=4, out_dim=4
)
HEADS, WIDTH, DIM, SPLIT = CONFIG.num_heads, CONFIG.head_dim, CONFIG.dim, CONFIG.rope_split
TOKENS = 6
SMALL = ((0, 2), (3, 1))  # rotary components
EVERY = tuple((pair, HEADS) for pair in range(WIDTH // 2))
EXACT = 1e-11
FEW = Regime(streaming=STREAMING, timesteps=(900.0, 400.0))


def native(config: WanConfig) -> dict[str, object]:
    """config.json of a native Wan checkpoint, with our streaming section."""
    fields = ("dim", "num_heads", "num_layers", "ffn_dim", "freq_dim", "text_dim", "text_len", "in_dim", "out_dim")
    data = {"_class_name": "WanModel", "model_type": "t2v", **{name: getattr(config, name) for name in fields}}
    return data | ({"streaming": dataclasses.asdict(config.streaming)} if config.streaming else {})


def make_clips(count: int, frames: int = 7, seed: int = 0) -> Clips:
    g = torch.Generator().manual_seed(seed)
    return Clips(torch.randn(count, 4, frames, 4, 6, generator=g), torch.randn(count, 5, 9, generator=g))


def make_sweep(checkpoint: Checkpoint, clips: Clips, regime: Regime = FEW, probes: int = 0) -> LayerWalk:
    return LayerWalk(checkpoint, clips, regime, dtype=torch.float64, probes=probes)


def nth(sweep: LayerWalk, index: int) -> Layer:
    """One layer of a sweep, which stops there and keeps the layer's weights."""
    return next(layer for layer in sweep if layer.index == index)


def make_layer(seed: int, *, batch: int = 2) -> Layer:
    """A layer of random weights beside its inputs: a full window of five frames, and one of three."""
    attention = DenseAttention(CONFIG).double().requires_grad_(False)
    randomize(attention, seed)
    state = {name.replace(".weight", "") if "norm" in name else name.replace(".", "_"): p
             for name, p in attention.named_parameters()}  # fmt: skip
    g = torch.Generator().manual_seed(100 + seed)
    mixing = torch.randn(DIM, DIM, generator=g, dtype=torch.float64)
    inputs = []
    for frames, queries in ((5, 2), (3, 1)):
        x = torch.randn(batch, frames * TOKENS, DIM, generator=g, dtype=torch.float64) @ mixing
        x = torch.nn.functional.layer_norm(x, (DIM,)) + 0.3 * mixing[0]
        turn = rotary(torch.arange(frames), 2, 3, SPLIT, torch.float64)
        plan = AttentionPlan(query_rotary=turn, key_rotary=turn)
        inputs.append(Inputs(x=x, plan=plan, first_query=(frames - queries) * TOKENS))
    return Layer(index=0, weights=AttentionWeights(**state), attention=attention, inputs=inputs)


def beside_present(layer: Layer) -> Layer:
    """The layer of `make_layer` for an exact present: each window is a past and its newest chunk."""
    inputs = []
    for batch in layer.inputs:
        tokens = torch.arange(batch.x.shape[1])
        newest = tokens >= batch.first_query
        mask = newest[:, None] | ~newest
        plan = dataclasses.replace(batch.plan, mask=mask, segments=segments_of(mask))
        inputs.append(dataclasses.replace(batch, plan=plan, past_only=True))
    return dataclasses.replace(layer, inputs=inputs)


def target(
    key_norm: KeyNorm = "token",
    *,
    q_rank: int | None = None,
    rope: RopeMode = "cached",
    v_dim: int = WIDTH,
    present: Present = "latent",
) -> Target:
    return Target(config=CONFIG, key_norm=key_norm, q_lora_rank=q_rank, rope=rope, v_dim=v_dim, present=present)


def falling(start: float, smallest: int = 4, halving: float = 5.0) -> ErrorTable:
    """Errors that halve every `halving` scalars, so squared ones fall by 2^(-2 / halving) a scalar."""
    return ErrorTable(
        components={1: ((0, 1),)}, errors={1: {b: start * 0.5 ** (b / halving) for b in (smallest, 30, 60)}}
    )
