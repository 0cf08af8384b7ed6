"""What passes of a model compute and move, counted from shapes, before anything runs."""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import prod

import torch
from torch import Tensor

from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.families.known import family_of
from mlaconvert.model.schedule import Sampler
from mlaconvert.model.window import default_chunks, seen_frames

_ONCE_A_TEXT = ("cross_attn.k.", "cross_attn.v.", "text_embedding.")
_ONCE_A_FRAME = ("time_embedding.", "time_projection.")
_ONCE_A_KEY = ("kv_b_proj.", "k_rope_proj.")
_ONCE = ("fps_projection.",)
_NEVER = ("modulation", "fps_embedding.", "ref_conv.")  # no products; a reference is no part of a rollout
# Tensors of the width, and of the feed-forward's, that a block makes of each token.
_TENSORS_OF_WIDTH, _TENSORS_OF_FFN = 16, 2


@dataclass(frozen=True, kw_only=True)
class Work:
    """Floating point operations (a multiplication and an addition are two), and bytes, by what rules their time."""

    products: float = 0.0
    """Of matrix products, in the dtype that a model runs in."""
    attention: float = 0.0
    """Of scores and values, for every pair that is computed."""
    masked: float = 0.0
    """The part of `attention` that a mask hides afterwards."""
    double: float = 0.0
    """Of linear algebra in float64."""
    moved: float = 0.0
    """Bytes that norms, rotations, activations and sums read and write."""

    @property
    def flops(self) -> float:
        """All that has a use: pairs that a mask hides have none."""
        return self.products + self.attention - self.masked + self.double

    def __add__(self, other: Work) -> Work:
        return Work(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def __mul__(self, times: float) -> Work:
        return Work(**{f.name: times * getattr(self, f.name) for f in fields(self)})

    __rmul__ = __mul__


NOTHING = Work()


def forward_work(
    config: WanConfig, visible: Tensor, frame_tokens: int, *, itemsize: int = 4, cached: bool = False
) -> Work:
    """One clip's forward pass of latent frames that see one another as `visible` says, `frame_tokens` tokens each.

    Row f of `visible`, bool [F, M], has what frame f sees of M frames, of which the pass makes the last F: the others
    are cached. A linear layer takes 2 x (its weights) a token, or a key that it makes of a latent; attention 2 x (score
    width + value width) a head and pair of tokens; cross-attention likewise for every token and text token. Beside an
    exact present, frames that see each other take whole heads, and others what is read from latents, expanded.
    Elsewhere a mask is applied to what was computed for all. A pass with a cache (`cached`) finds the prompt's keys and
    values there, and has one timestep instead of each frame's. Scalars take `itemsize` bytes.
    """
    frames, seen = visible.shape
    pairs, tokens, scale = int(visible.sum()), frames * frame_tokens, frame_tokens**2
    own = visible[:, seen - frames :]
    present = int((own & own.mT).sum())
    products = attention = masked = 0.0
    for name, shape in family_of(config).expected_shapes(config).items():
        if len(shape) < 2 or any(part in name for part in _NEVER):
            continue
        count = tokens
        if any(part in name for part in _ONCE_A_TEXT):
            count = 0 if cached else config.text_len
        elif any(part in name for part in _ONCE_A_FRAME):
            count = 1 if cached else frames
        elif name.startswith(_ONCE):
            count = 1
        elif any(part in name for part in _ONCE_A_KEY):
            exact = config.mla is not None and config.mla.present == "exact"
            count = (seen - (frames if exact and cached else 0)) * frame_tokens
        products += 2.0 * prod(shape) * count
    for i in range(config.num_layers):
        layer = config.mla.layers[i] if config.mla else None
        score = config.head_dim if layer is None else layer.qk_nope_head_dim + layer.qk_rope_head_dim
        value = config.head_dim if layer is None else layer.v_head_dim
        if layer is not None and config.mla and config.mla.present == "exact":
            widths = (score + value) * (pairs - present) + 2 * config.head_dim * present
        else:
            widths = (score + value) * frames * seen
            masked += 2.0 * config.num_heads * (score + value) * (frames * seen - pairs) * scale
        attention += 2.0 * config.num_heads * widths * scale
        attention += 2.0 * config.num_heads * 2 * config.head_dim * tokens * config.text_len
    made = tokens * config.num_layers * block_scalars(config)
    return Work(products=products, attention=attention, masked=masked, moved=2.0 * itemsize * made)


def block_scalars(config: WanConfig) -> int:
    """About how many scalars a block makes of each token on its way."""
    return _TENSORS_OF_WIDTH * config.dim + _TENSORS_OF_FFN * config.ffn_dim


def rollout_work(
    config: WanConfig,
    streaming: StreamingConfig,
    sampler: Sampler,
    *,
    frames: int,
    frame_tokens: int,
    given: int = 0,
    itemsize: int = 4,
) -> Work:
    """One video of `frames` latent frames, of which `given` are only read, through the sliding-window cache."""
    passes = len(sampler.timesteps) + 1
    found: dict[tuple[int, int], Work] = {}
    total, end = NOTHING, 0
    for count in default_chunks(frames, streaming):
        end += count
        shape = (count, len(seen_frames(end, streaming)))
        if shape not in found:
            visible = torch.ones(shape, dtype=torch.bool)
            found[shape] = forward_work(config, visible, frame_tokens, itemsize=itemsize, cached=True)
        total += (1 if end <= given else passes) * found[shape]
    return (1 if sampler.guidance == 1 else 2) * total
