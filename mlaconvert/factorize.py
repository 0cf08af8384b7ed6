"""From per-head keys and values to a shared latent and a shared rotary key: the maths of a conversion.

Tensors in, factors out, in float64; this file knows no names of checkpoints and no files. Notation: x [D] is an
input of self-attention, H heads are d wide, s(x) = 1 / rms(W_K x + b_k) is the key norm, one scalar a token. A head's
channels (2f, 2f + 1) are read as one complex number, rotary pair f. "Affine" matrices [.., D + 1] act on [x; 1].

A layer's key is s * gamma_k (W_K x + b_k), turned by its position. The conversion keeps the rotation of some pairs
through keys that all heads share, puts everything else into an unrotated content key, and factorises content keys and
values together through one latent. What counts as an error is decided by `LayerMoments`: statistics of the inputs,
measured or guessed from the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.linalg import eigh
from torch import Tensor

from mlaconvert.config import KeyNorm, MLALayer, StreamingConfig
from mlaconvert.rope import frequencies

DAMPING = 1e-6  # of the mean eigenvalue, added before a covariance is inverted


@dataclass(frozen=True, kw_only=True)
class AttentionWeights:
    """One dense layer's self-attention: y = W x + b; queries and keys are RMS-normed over the whole width D."""

    q_weight: Tensor  # [D, D]
    q_bias: Tensor  # [D]
    k_weight: Tensor  # [D, D]
    k_bias: Tensor  # [D]
    v_weight: Tensor  # [D, D]
    v_bias: Tensor  # [D]
    o_weight: Tensor  # [D, D]
    o_bias: Tensor  # [D]
    norm_q: Tensor  # [D]
    norm_k: Tensor  # [D]

    def double(self, device: torch.device | str = "cpu") -> AttentionWeights:
        """The same in float64 on `device`."""
        return AttentionWeights(**{k: v.detach().to(device, torch.float64) for k, v in vars(self).items()})


@dataclass(frozen=True, kw_only=True)
class LayerMoments:
    """What a conversion has to know of a layer's inputs, float64."""

    mean: Tensor  # [D] of x
    covariance: Tensor  # [D, D] of x
    inverse_norm: float  # E[s]
    query: Tensor  # [H, d, d], E[q q^T] of each head's normed, unrotated query
    rho: Tensor  # [pairs] complex, mean rotation e^{i theta (query position - key position)}


@dataclass(frozen=True, kw_only=True)
class Factors:
    """A converted layer: tensors by their name below `self_attn.`, and relative errors by stage.

    `rope`: what the shared rotary keys miss of the kept pairs; `unrotated`: the energy whose rotation is lost, as a
    share of all keys' energy; `content`: what the latent misses of content keys and values; `query`: what a
    compressed query misses. All are Frobenius norms in the metric of the moments, relative to the thing approximated.
    """

    tensors: dict[str, Tensor]
    errors: dict[str, float]


def highest_pairs(split: tuple[int, int, int], count: int) -> tuple[tuple[int, int], ...]:
    """The `count` highest-frequency pairs, shared over the axes as Wan shares a head: VideoMLA's (6, 5, 5) of 16."""
    share = (count - 2 * (count // 3), count // 3, count // 3)
    offsets = (0, split[0], split[0] + split[1])
    return tuple((offset + j, 1) for offset, n in zip(offsets, share, strict=True) for j in range(n))


def mean_rotation(
    split: tuple[int, int, int], *, streaming: StreamingConfig | None, frames: int, height: int, width: int
) -> Tensor:
    """E[e^{i theta (m - n)}] of every pair, complex128 [pairs], over query positions m and key positions n.

    Streaming: queries of the newest chunk against a full window; otherwise `frames` latent frames see each other.
    `height` and `width` are in tokens; all (query, key) pairs count alike.
    """
    keys = torch.arange(streaming.window_frames if streaming else frames)
    queries = keys[-streaming.chunk_frames :] if streaming else keys
    rows, columns = torch.arange(height), torch.arange(width)
    means = []
    for freq, q, k in zip(
        frequencies(split).split(split), (queries, rows, columns), (keys, rows, columns), strict=True
    ):
        means.append(_phase(freq, q).mean(0) * _phase(freq, k).mean(0).conj())
    return torch.cat(means)


def _phase(freq: Tensor, positions: Tensor) -> Tensor:
    angle = positions.double()[:, None] * freq
    return torch.polar(torch.ones_like(angle), angle)


def modulation_moments(
    weights: AttentionWeights, modulation: Tensor, *, num_heads: int, eps: float, rho: Tensor
) -> LayerMoments:
    """Moments guessed from weights alone: a proxy, no data is seen.

    The LayerNorm before self-attention gives unit variance, so inputs are 1 + scale times white noise, plus shift.
    `modulation` [T, 2, D] holds (shift, scale) at T timesteps of the sampler.
    """
    w = weights.double(modulation.device)
    shift, scale = modulation.double().unbind(1)
    mean = shift.mean(0)
    centred = shift - mean
    covariance = torch.diag((1 + scale).square().mean(0)) + centred.mT @ centred / len(shift)
    root = affine_root(cholesky(covariance), mean)
    q = affine(w.q_weight, w.q_bias) @ root
    k = affine(w.k_weight, w.k_bias) @ root
    q_power, k_power = q.square().sum() / len(q), k.square().sum() / len(k)
    q = (w.norm_q[:, None] * q).unflatten(0, (num_heads, -1))
    return LayerMoments(
        mean=mean,
        covariance=covariance,
        inverse_norm=float((k_power + eps).rsqrt()),
        query=q @ q.mT / (q_power + eps),
        rho=rho.to(modulation.device),
    )


def factorize_layer(
    weights: AttentionWeights,
    layer: MLALayer,
    moments: LayerMoments,
    *,
    num_heads: int,
    key_norm: KeyNorm,
    q_lora_rank: int | None,
    eps: float,
) -> Factors:
    """The best latent factors of a layer in the metric of `moments`.

    With every pair kept in H components and a latent as wide as the model, the result is the teacher itself up to
    rounding (token key norm, exact queries). `eps` is that of the teacher's norms.
    """
    w = weights.double(moments.mean.device)
    nope, rank, dim = layer.qk_nope_head_dim, layer.kv_lora_rank, w.q_weight.shape[0]
    root = cholesky(moments.covariance)  # covariance = root root^T
    key = affine(w.norm_k[:, None] * w.k_weight, w.norm_k * w.k_bias).unflatten(0, (num_heads, -1))  # [H, d, D + 1]

    shared, query_rope, content, errors = _shared_rotary_keys(key, layer, moments, affine_root(root, moments.mean))
    query_map, key_map = _narrow(moments.query, _gram(content[..., :dim] @ root), nope)
    content = key_map @ content  # [H, nope, D + 1]

    value = w.v_weight.unflatten(0, (num_heads, -1))  # [H, d, D]
    out = w.o_weight.unflatten(1, (num_heads, -1)).transpose(0, 1)  # [H, D, d]
    spread = _gram(value @ root)  # [H, d, d], covariance of values
    out_map, value_map = _narrow(out.mT @ out, spread, layer.v_head_dim)
    value_bias = value_map @ (value @ moments.mean + w.v_bias.unflatten(0, (num_heads, -1))).unsqueeze(-1)
    value = value_map @ value  # [H, v, D]
    narrow_out = out @ out_map.mT  # [H, D, v]

    # A score error moves the output by about the spread of the head's output, a value error by W_O itself.
    query_second = query_map @ moments.query @ query_map.mT / key.shape[1]
    output_spread = (out @ spread @ out.mT).diagonal(dim1=1, dim2=2).sum(-1)
    weight_key = symmetric_root(query_second) * (output_spread.sqrt() * moments.inverse_norm)[:, None, None]
    weight_value = symmetric_root(narrow_out.mT @ narrow_out)
    joint = torch.cat((content[..., :dim], value), 1)  # [H, nope + v, D]
    weighted = torch.cat((weight_key @ content[..., :dim], weight_value @ value), 1).flatten(0, 1) @ root
    basis, kept = leading_directions(weighted.mT @ weighted, rank)
    down = torch.linalg.solve_triangular(root, basis.mT, upper=False, left=False)  # basis^T root^-1
    up = (joint @ root) @ basis  # [H, nope + v, rank]
    errors["content"] = max(0.0, 1 - kept) ** 0.5

    key_bias = content[..., dim] + content[..., :dim] @ moments.mean  # [H, nope]
    if key_norm == "latent":
        # No token's own norm: fold the mean one. The latent has identity covariance, so its RMSNorm needs no gain.
        shared, key_bias = shared * moments.inverse_norm, key_bias * moments.inverse_norm
        up = torch.cat((up[:, :nope] * moments.inverse_norm, up[:, nope:]), 1)
    tensors = _query_path(w, torch.cat((query_map, query_rope), 1), moments, root, q_lora_rank, errors)
    tensors |= {
        "kv_a_proj_with_mqa.weight": torch.cat((down, shared[:, :dim])),
        "kv_a_proj_with_mqa.bias": torch.cat((-down @ moments.mean, shared[:, dim])),
        "kv_b_proj.weight": up.flatten(0, 1),
        "kv_b_proj.bias": key_bias.flatten(),
        "o.weight": narrow_out.transpose(0, 1).flatten(1),
        "o.bias": w.o_bias + (narrow_out @ value_bias).sum(0).squeeze(-1),
    }
    return Factors(tensors=tensors | _norms(w, key_norm, rank), errors=errors)


def random_layer(
    weights: AttentionWeights,
    layer: MLALayer,
    *,
    num_heads: int,
    key_norm: KeyNorm,
    q_lora_rank: int | None,
    generator: torch.Generator,
) -> Factors:
    """Every new projection drawn from N(0, 1 / fan_in), biases zero; what the teacher shares stays the teacher's.

    Those are W_O where values stay as wide as the head, the query projection of the exact path, and the key norm.
    """
    w = weights.double()
    dim, rank, rope = w.q_weight.shape[0], layer.kv_lora_rank, layer.qk_rope_head_dim
    width, head_dim = layer.qk_nope_head_dim + rope, dim // num_heads

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * shape[-1] ** -0.5

    def zeros(size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.float64)

    if q_lora_rank is None:
        query = {
            "q_a_proj.weight": w.q_weight,
            "q_a_proj.bias": w.q_bias,
            "q_a_layernorm.weight": w.norm_q,
            "q_b_proj.weight": draw(num_heads, width, head_dim),
        }
    else:
        query = {
            "q_a_proj.weight": draw(q_lora_rank, dim),
            "q_a_proj.bias": zeros(q_lora_rank),
            "q_a_layernorm.weight": zeros(q_lora_rank) + 1,
            "q_b_proj.weight": draw(num_heads * width, q_lora_rank),
        }
    same_width = layer.v_head_dim == head_dim
    tensors = query | {
        "kv_a_proj_with_mqa.weight": draw(rank + rope, dim),
        "kv_a_proj_with_mqa.bias": zeros(rank + rope),
        "kv_b_proj.weight": draw(num_heads * (layer.qk_nope_head_dim + layer.v_head_dim), rank),
        "kv_b_proj.bias": zeros(num_heads * layer.qk_nope_head_dim),
        "o.weight": w.o_weight if same_width else draw(dim, num_heads * layer.v_head_dim),
        "o.bias": w.o_bias,
    }
    return Factors(tensors=tensors | _norms(w, key_norm, rank), errors={})


def _norms(w: AttentionWeights, key_norm: KeyNorm, rank: int) -> dict[str, Tensor]:
    if key_norm == "latent":
        return {"kv_a_layernorm.weight": torch.ones(rank, dtype=torch.float64)}
    return {"k_norm_proj.weight": w.k_weight, "k_norm_proj.bias": w.k_bias}


def _shared_rotary_keys(
    key: Tensor, layer: MLALayer, moments: LayerMoments, root: Tensor
) -> tuple[Tensor, Tensor, Tensor, dict[str, float]]:
    """Keys of the kept pairs that all heads share, and the content keys that carry the rest.

    Rotation commutes with complex factors, so the keys Z [H, D + 1] of a pair in all heads may become a u: one shared
    key u [x; 1] and a factor conj(a_h) in head h's query. The best are the leading singular triples of
    Q^1/2 Z root, Q = diag E|q_h|^2. What loses its rotation turns by its mean instead: Re(q conj(k) rho).

    Takes affine keys [H, d, D + 1] and a root of E[[x; 1] [x; 1]^T]; returns shared keys [rope, D + 1], query maps
    [H, rope, d], content keys [H, d, D + 1] and errors.
    """
    heads, width, _ = key.shape
    pairs = torch.complex(key[:, 0::2], key[:, 1::2])  # [H, pairs, D + 1]
    importance = moments.query.diagonal(dim1=1, dim2=2).unflatten(1, (-1, 2)).sum(-1).clamp_min(1e-12)  # [H, pairs]
    shared, query, missed, kept_energy = [], [], 0.0, 0.0
    rest = pairs.clone()
    for pair, count in layer.rope_components:
        scale = importance[:, pair].sqrt()[:, None]
        left, sigma, right = torch.linalg.svd((scale * pairs[:, pair]) @ root.to(pairs.dtype), full_matrices=False)
        factor = left[:, :count] * sigma[:count] / scale  # a, [H, count]
        row = torch.linalg.solve_triangular(root.to(pairs.dtype), right[:count], upper=False, left=False)  # u
        rest[:, pair] = pairs[:, pair] - factor @ row
        missed += float(sigma[count:].square().sum())
        kept_energy += float(sigma.square().sum())
        shared.append(torch.view_as_real(row).transpose(1, 2).flatten(0, 1))
        turn = torch.zeros(heads, count, 2, width, dtype=key.dtype, device=key.device)
        turn[:, :, 0, 2 * pair], turn[:, :, 0, 2 * pair + 1] = factor.real, factor.imag
        turn[:, :, 1, 2 * pair], turn[:, :, 1, 2 * pair + 1] = -factor.imag, factor.real
        query.append(turn.flatten(1, 2))
    lost = (importance.sqrt()[..., None] * (rest @ root.to(pairs.dtype))).abs().square().sum((0, 2))  # [pairs]
    total = (importance.sqrt()[..., None] * (pairs @ root.to(pairs.dtype))).abs().square().sum()
    errors = {
        "rope": (missed / kept_energy) ** 0.5 if kept_energy else 0.0,
        "unrotated": float((lost * (1 - moments.rho.abs().square())).sum() / total) ** 0.5,
    }
    rest = rest * moments.rho.conj()[:, None]
    content = torch.view_as_real(rest).transpose(2, 3).flatten(1, 2)  # [H, d, D + 1]
    empty = key.new_zeros(0, key.shape[-1])
    return torch.cat([empty, *shared]), torch.cat([key.new_zeros(heads, 0, width), *query], 1), content, errors


def _narrow(left: Tensor, right: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Maps [H, width, d] for which (left_map a)^T (right_map b) is the best narrow a^T b.

    `left` and `right` [H, d, d] are the second moments of a and b; the error is the mean square over independent a
    and b. The identity where `width` is the full d.
    """
    heads, full, _ = left.shape
    if width == full:
        eye = torch.eye(full, dtype=left.dtype, device=left.device).expand(heads, -1, -1)
        return eye, eye
    root_left, root_right = symmetric_root(left), symmetric_root(right)
    u, sigma, vh = torch.linalg.svd(root_left @ root_right)
    scale = sigma[:, :width].sqrt().unsqueeze(-1)
    left_map = scale * torch.linalg.solve(root_left, u[:, :, :width]).mT
    right_map = scale * torch.linalg.solve(root_right, vh[:, :width].mT).mT
    return left_map, right_map


def _query_path(
    w: AttentionWeights,
    query_map: Tensor,
    moments: LayerMoments,
    root: Tensor,
    rank: int | None,
    errors: dict[str, float],
) -> dict[str, Tensor]:
    """The teacher's own query projection and norm, or its best `rank` directions.

    `query_map` [H, nope + rope, d] acts on normed queries. A latent of orthonormal directions of W_Q x + b_q has, but
    for the energy cut off, the same length, hence the same norm: its RMSNorm only needs the gain sqrt(D kept / rank).
    """
    if rank is None:
        return {
            "q_a_proj.weight": w.q_weight,
            "q_a_proj.bias": w.q_bias,
            "q_a_layernorm.weight": w.norm_q,
            "q_b_proj.weight": query_map,
        }
    dim, heads = w.q_weight.shape[0], query_map.shape[0]
    metric = affine(w.q_weight, w.q_bias) @ affine_root(root, moments.mean)
    basis, kept = leading_directions(metric @ metric.mT, rank)  # [D, rank]
    errors["query"] = max(0.0, 1 - kept) ** 0.5
    up = (w.norm_q[:, None] * basis).unflatten(0, (heads, -1))  # [H, d, rank]
    gain = (dim * kept / rank) ** 0.5
    return {
        "q_a_proj.weight": basis.mT @ w.q_weight,
        "q_a_proj.bias": basis.mT @ w.q_bias,
        "q_a_layernorm.weight": torch.full((rank,), gain, dtype=basis.dtype, device=basis.device),
        "q_b_proj.weight": (query_map @ up).flatten(0, 1),
    }


def affine(weight: Tensor, bias: Tensor) -> Tensor:
    """[.., D] and [..] -> [.., D + 1], acting on [x; 1]."""
    return torch.cat((weight, bias.unsqueeze(-1)), -1)


def affine_root(root: Tensor, mean: Tensor) -> Tensor:
    """A lower triangular root [D + 1, D + 1] of E[[x; 1] [x; 1]^T], given a root of the covariance of x."""
    dim = len(mean)
    second = mean.new_zeros(dim + 1, dim + 1)
    second[:dim, :dim] = root @ root.mT + torch.outer(mean, mean)
    second[dim, :dim] = second[:dim, dim] = mean
    second[dim, dim] = 1
    return torch.linalg.cholesky(second)


def cholesky(covariance: Tensor) -> Tensor:
    """Lower triangular root of a covariance, damped so that it can be inverted."""
    damping = DAMPING * covariance.diagonal().mean()
    return torch.linalg.cholesky(
        covariance + damping * torch.eye(len(covariance), dtype=covariance.dtype).to(covariance)
    )


def leading_directions(gram: Tensor, rank: int) -> tuple[Tensor, float]:
    """Orthonormal eigenvectors [D, rank] of the largest eigenvalues of `gram`, and the share of the trace they hold."""
    dim = len(gram)
    if gram.device.type == "cpu" and rank < dim:
        # Only the leading eigenvectors: several times cheaper than all of them.
        values, vectors = eigh(gram.numpy(), subset_by_index=(dim - rank, dim - 1), check_finite=False)
        values, vectors = torch.from_numpy(values), torch.from_numpy(vectors)
    else:
        values, vectors = torch.linalg.eigh(gram)
        values, vectors = values[dim - rank :], vectors[:, dim - rank :]
    trace = gram.trace()
    kept = float(values.clamp_min(0).sum() / trace) if trace > 0 else 1.0
    return vectors.flip(1).contiguous(), min(1.0, kept)


def symmetric_root(matrix: Tensor) -> Tensor:
    """The symmetric root of positive semidefinite matrices [.., n, n], damped to stay invertible."""
    values, vectors = torch.linalg.eigh(matrix)
    floor = values[..., -1:].clamp_min(1e-30) * 1e-12
    return (vectors * values.clamp_min(0).add(floor).sqrt().unsqueeze(-2)) @ vectors.mT


def _gram(rows: Tensor) -> Tensor:
    return rows @ rows.mT
