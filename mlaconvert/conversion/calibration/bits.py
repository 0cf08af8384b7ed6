"""A budget of bytes, shared between layers, channels and bits: rank and precision are one decision.

Reverse water-filling (Cover and Thomas, "Elements of Information Theory", 10.3.3): every bit goes where it takes most
of the output's error away. A channel that gets none is not cached.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor

from mlaconvert.config.mla import MOST_BITS, MLALayer
from mlaconvert.config.packing import PART_BITS, packed_length
from mlaconvert.conversion.calibration.layer import Layer
from mlaconvert.conversion.calibration.target import branch
from mlaconvert.model.attention.latent import LatentAttention
from mlaconvert.model.quantizer import CacheQuantizer

NORM_BITS = 8  # of the key norm, which scales all keys of its token
# Bits of an ideal code that the quantiser's first six are worth, of values with tails as long as latents have; of the
# others, each is one more.
_WORTH = (0.0, 0.5, 1.2, 2.1, 3.0, 4.0, 5.0)
_LEFT = [4.0 ** -(_WORTH[bits] if bits < len(_WORTH) else bits - 1) for bits in range(MOST_BITS + 1)]
SAMPLES = 2**13  # tokens that a quantiser is fitted to
# What is tried of each channel: how much its steps widen, and its range in standard deviations.
CURVES = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0)
RANGES = tuple(0.5 * 1.16**i for i in range(26))


def share_bits(energies: Sequence[Sequence[float]], budget: int, *, beside: Sequence[int] = ()) -> list[list[int]]:
    """Bits of every channel of some layers under a `budget` of bytes a token, over all of them.

    `energies` are the squared errors of the output without each channel, in descending order. Each layer caches scalars
    of `beside` bits each as well, and at least one channel.
    """
    bits = [[1, *[0] * (len(channels) - 1)] for channels in energies]
    parts = [Counter(width for b in (*row, *beside) for width in PART_BITS if b & width) for row in bits]
    left = budget - sum(map(_bytes, parts))
    gains = [
        (-energy * (_LEFT[b] - _LEFT[b + 1]), layer, channel)
        for layer, channels in enumerate(energies)
        for channel, (energy, b) in enumerate(zip(channels, bits[layer], strict=True))
    ]
    heapq.heapify(gains)
    while gains:
        _, layer, channel = heapq.heappop(gains)
        before = bits[layer][channel]
        for after in range(before + 1, min(before + 4, MOST_BITS) + 1):
            # Where the next bit does not fit, two may, in a part that takes the place of others.
            changed = parts[layer].copy()
            for width in PART_BITS:
                changed[width] += bool(after & width) - bool(before & width)
            more = _bytes(changed) - _bytes(parts[layer])
            if more <= left:
                left, parts[layer], bits[layer][channel] = left - more, changed, after
                if after < MOST_BITS:
                    gain = energies[layer][channel] * (_LEFT[after] - _LEFT[after + 1])
                    heapq.heappush(gains, (-gain, layer, channel))
                break
    return [[b for b in row if b] for row in bits]


def _bytes(parts: Mapping[int, int]) -> int:
    """`packed_bytes`, of the numbers of parts of each width."""
    return sum(packed_length(count, width) for width, count in parts.items())


def in_runs(bits: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """`MLALayer.cache_bits` of the bits of each scalar."""
    return tuple((value, len(list(run))) for value, run in groupby(bits))


@torch.no_grad()
def quantised(layer: Layer, student: LatentAttention, shape: MLALayer) -> LatentAttention:
    """A copy of `student` that caches in the bits of `shape`, its quantiser fitted to what it caches of its inputs."""
    made, samples = branch(student), []
    each = -(-SAMPLES // len(layer.inputs))
    for i, batch in enumerate(layer.inputs):
        tokens = torch.randperm(batch.latent_keys, generator=torch.Generator().manual_seed(i))
        chosen = tokens[: -(-each // len(batch.x))].to(batch.x.device)
        samples.append(torch.cat(student.compress(batch.x[:, chosen]), -1).flatten(0, 1))
    made.layer, made.kv_quantizer = shape, fit_quantizer(torch.cat(samples), shape.scalar_bits)
    return made


@torch.no_grad()
def fit_quantizer(samples: Tensor, bits: Sequence[int]) -> CacheQuantizer:
    """The quantiser of `bits` with the least squared error of each channel of `samples` [n, c], on their device."""
    best = CacheQuantizer(bits).to(samples.device)
    tried = CacheQuantizer(bits).to(samples.device)
    spread = samples.std(0).clamp_min(1e-6 * samples.abs().amax(0).clamp_min(1e-30))
    least = torch.full_like(spread, torch.inf)
    for quantizer in (best, tried):
        quantizer.center.copy_(samples.mean(0))
    for curve in CURVES:
        slope = torch.tensor(curve).sinh().to(spread) / spread
        tried.gain.copy_(tried.packing.half / curve)
        for reach in RANGES:
            tried.slope.copy_(slope / reach)
            error = (tried(samples)[0] - samples).square().mean(0)
            better = error < least
            least = torch.where(better, error, least)
            for old, new in zip((best.slope, best.gain), (tried.slope, tried.gain), strict=True):
                old.copy_(torch.where(better, new, old))
    return best
