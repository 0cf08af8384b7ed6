"""Rotary components: which pairs keep their rotation, through keys that heads share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from mlaconvert.config.mla import MLALayer, RopeMode
from mlaconvert.latent.matrices import row_gram
from mlaconvert.latent.metric import ContentKeys, DenseLayer, SharedKeys, identity, narrow
from mlaconvert.latent.moments import LayerMoments
from mlaconvert.latent.weights import AttentionWeights


def choose_components(
    weights: AttentionWeights,
    moments: LayerMoments,
    *,
    num_heads: int,
    counts: Sequence[int],
    several: bool = True,
    weighted: bool = True,
) -> list[tuple[tuple[int, int], ...]]:
    """The best rotary components, for each number of them in `counts`: (pair, count) in ascending pair order.

    Without `several`, no pair gets more than one. Not `weighted`, all heads and pairs count alike.

    A component (pair f, its r-th singular triple) buys sigma_r^2 (1 - |rho_f|^2): the energy whose rotation is lost
    without it, less what a constant mean rotation keeps.
    """
    if not any(counts):
        return [() for _ in counts]
    dense, turned = DenseLayer.of(weights, moments, num_heads, weighted=weighted), 1 - moments.rho.abs().square()
    gains = []
    for pair in range(len(turned)):
        _, _, sigma = _components(dense, pair)
        gains += [(float(value.square() * turned[pair]), pair) for value in (sigma if several else sigma[:1])]
    gains.sort(reverse=True)
    return [tuple(sorted(Counter(pair for _, pair in gains[:count]).items())) for count in counts]


def _components(dense: DenseLayer, pair: int) -> tuple[Tensor, Tensor, Tensor]:
    """Singular triples of a pair's keys in all heads: a [H, H], u [H, D + 1] (rows on [z; 1]) and sigma [H].

    Rotation commutes with complex factors, so the keys Z [H, D + 1] of a pair may become a u: one shared key u [z; 1]
    and a factor conj(a_h) in head h's query. The best a u in the metric Q^1/2 Z (Q = diag E|q_h|^2; [z; 1] is white)
    are its leading singular triples.
    """
    keys = torch.complex(dense.key[:, 2 * pair], dense.key[:, 2 * pair + 1])
    scale = dense.importance[:, pair].sqrt()[:, None]
    left, sigma, right = torch.linalg.svd(scale * keys, full_matrices=False)
    return left * sigma / scale, right, sigma


def content_and_shared(
    dense: DenseLayer, layer: MLALayer, rope: RopeMode
) -> tuple[ContentKeys, SharedKeys, dict[str, float]]:
    """Each head's own keys, the rotary keys that all share, and relative errors of both.

    What loses its rotation, and what the shared keys miss, goes into content keys that turn by their mean instead:
    Re(q conj(k) rho).
    """
    moments = dense.moments
    query, mean, width = moments.query, moments.mean, dense.head_dim
    if rope == "head":
        none = SharedKeys(rows=mean.new_zeros(0, len(mean) + 1), weight=mean.new_zeros(0), queries=query[:, :0])
        return ContentKeys(rows=None, queries=identity(query)), none, {}
    rest, missed, kept_energy = dense.key.clone(), 0.0, 0.0
    rows, weights = [mean.new_zeros(0, len(mean) + 1)], [mean.new_zeros(0)]
    queries = [query[:, :0]]
    for pair, count in layer.rope_components:
        factors, shared, sigma = _components(dense, pair)
        factor, row = factors[:, :count], shared[:count]
        made = factor @ row
        rest[:, 2 * pair] -= made.real
        rest[:, 2 * pair + 1] -= made.imag
        missed += float(sigma[count:].square().sum())
        kept_energy += float(sigma.square().sum())
        rows.append(torch.view_as_real(row).transpose(1, 2).flatten(0, 1))
        weights.append(sigma[:count].repeat_interleave(2))
        turn = query.new_zeros(len(query), count, 2, width)
        turn[:, :, 0, 2 * pair], turn[:, :, 0, 2 * pair + 1] = factor.real, factor.imag
        turn[:, :, 1, 2 * pair], turn[:, :, 1, 2 * pair + 1] = -factor.imag, factor.real
        queries.append(turn.flatten(1, 2))
    unturned = 1 - moments.rho.abs().square()
    errors = {
        "rope": (missed / kept_energy) ** 0.5 if kept_energy else 0.0,
        "unrotated": float((_power(dense, rest) * unturned).sum() / _power(dense, dense.key).sum()) ** 0.5,
    }
    content = _turn(rest, moments.rho.conj())  # [H, d, D + 1]
    spread = row_gram(content[..., :-1])
    query_map, key_map = narrow(query, spread, layer.qk_nope_head_dim)
    return (
        ContentKeys(rows=key_map @ content, queries=query_map),
        SharedKeys(rows=torch.cat(rows), weight=torch.cat(weights), queries=torch.cat(queries, 1)),
        errors,
    )


def _power(dense: DenseLayer, keys: Tensor) -> Tensor:
    """[H, pairs]: mean square of keys [H, d, D + 1], weighed by their importance."""
    lengths = torch.linalg.vector_norm(keys, dim=-1).square()
    return dense.importance * lengths.unflatten(1, (-1, 2)).sum(-1)


def _turn(keys: Tensor, turns: Tensor) -> Tensor:
    """Multiply the complex pairs of keys [H, d, n] by `turns` [pairs], in place."""
    for head in keys:
        real, imag = head[0::2].clone(), head[1::2]
        cos, sin = turns.real[:, None], turns.imag[:, None]
        head[0::2] = real * cos - imag * sin
        head[1::2] = real * sin + imag * cos
    return keys
