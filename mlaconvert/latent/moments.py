"""Statistics of a layer's inputs, and a guess of them from the weights alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mlaconvert.latent.matrices import row_gram
from mlaconvert.latent.roots import DiagonalRoot, Root
from mlaconvert.latent.weights import AttentionWeights, float64_rows


@dataclass(frozen=True, kw_only=True)
class LayerMoments:
    """What a conversion has to know of a layer's inputs, float64."""

    mean: Tensor  # [D] of x
    covariance: Tensor  # [D, D] of x
    inverse_norm: float  # E[s]
    query: Tensor  # [H, d, d], E[q q^T] of each head's normed, unrotated query
    rho: Tensor  # [pairs] complex, mean rotation e^{i theta (query position - key position)}
    # [D, D], E[g g^T] of g = d(noise . output) / dx_j through keys and values, their norm s held: what an error of x_j
    # that only its key and value see does to the attention output. None where only weights are known.
    sensitivity: Tensor | None = None
    # E|output|^2 in its units: tr(sensitivity E) / output_power is the squared relative output error of inputs that are
    # off by a second moment E [D, D], each on its own.
    output_power: float | None = None
    root: Root | None = None  # of the covariance, where a cheaper one than Cholesky's is known
    head_inverse_norms: Tensor | None = None  # [H], E[s] of each head's own norm; None of one norm for all


def modulation_moments(
    weights: AttentionWeights, modulation: Tensor, *, num_heads: int, eps: float, rho: Tensor
) -> LayerMoments:
    """Moments guessed from weights alone: a proxy, no data is seen.

    The LayerNorm before self-attention gives unit variance, so inputs are 1 + scale times white noise, plus shift.
    `modulation` [T, 2, D] holds (shift, scale) at T timesteps of the sampler.
    """
    shift, scale = modulation.double().unbind(1)
    mean, diagonal = shift.mean(0), (1 + scale).square().mean(0)
    centred = (shift - mean) / len(shift) ** 0.5
    root = DiagonalRoot.of(diagonal, centred)
    norm = weights.gains[0].to(mean).unflatten(0, (num_heads, -1, 1))
    q = whitened(weights.q_weight, weights.q_bias, mean, root)
    query = (
        norm * row_gram(q.unflatten(0, (num_heads, -1))) * norm.mT / (_powers(q, weights.norms) + eps)[:, None, None]
    )
    del q
    k_power = mean.new_zeros(())
    for rows, block in float64_rows(weights.k_weight, mean.device):
        k_power += root.apply(block).square().sum() + (block @ mean + weights.k_bias[rows].to(mean)).square().sum()
    return LayerMoments(
        mean=mean,
        covariance=torch.diag(diagonal).addmm_(centred.mT, centred),
        inverse_norm=float((k_power / len(weights.k_bias) + eps).rsqrt()),
        query=query,
        rho=rho.to(modulation.device),
        root=root,
        head_inverse_norms=(
            None
            if weights.norms == 1
            else (_powers(whitened(weights.k_weight, weights.k_bias, mean, root), weights.norms) + eps).rsqrt()
        ),
    )


def _powers(rows: Tensor, norms: int) -> Tensor:
    """[norms]: mean square of so many equal parts of `rows` [D, D + 1] on [z; 1]."""
    return torch.stack([part.norm().square() / len(part) for part in rows.chunk(norms)])


def whitened(weight: Tensor, bias: Tensor, mean: Tensor, root: Root) -> Tensor:
    """W x + b as a function of [z; 1], [rows, D + 1] float64: x = root z + mean, and z is white."""
    found = mean.new_empty(len(weight), len(mean) + 1)
    for rows, block in float64_rows(weight, mean.device):
        found[rows, :-1] = root.apply(block)
        found[rows, -1] = block @ mean + bias[rows].to(mean)
    return found
