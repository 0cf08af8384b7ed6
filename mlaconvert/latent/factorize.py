"""From per-head keys and values to a shared latent and a shared rotary key: the maths of a conversion.

Tensors in, factors out, in float64; this file knows no names of checkpoints and no files. Notation: x [D] is an
input of self-attention, H heads are d wide, s(x) = 1 / rms(W_K x + b_k) is the key norm, one scalar a token, or one for
each of its heads. A head's channels (2f, 2f + 1) are read as one complex number, rotary pair f. "Affine" matrices
[.., D + 1] act on [x; 1].

A layer's key is s * gamma_k (W_K x + b_k), turned by its position. The conversion keeps the rotation of some pairs
through keys that all heads share, puts everything else into an unrotated content key, and factorises content keys and
values together through one latent. What counts as an error is decided by `LayerMoments`: statistics of the inputs,
measured or guessed from the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mlaconvert.config.mla import KeyNorm, MLAConfig, MLALayer
from mlaconvert.latent.components import content_and_shared
from mlaconvert.latent.matrices import add_gram, leading_directions, mirror, product
from mlaconvert.latent.metric import DenseLayer
from mlaconvert.latent.moments import LayerMoments, whitened
from mlaconvert.latent.weights import AttentionWeights, float64_rows


@dataclass(frozen=True, kw_only=True)
class Factors:
    """A converted layer: tensors by their name below `self_attn.`, and relative errors by stage.

    What is the teacher's own stays in its dtype, all others are float64.

    `rope`: what the shared rotary keys miss of the kept pairs; `unrotated`: the energy whose rotation is lost, as a
    share of all keys' energy; `latent`: what the latent misses of all that it holds; `query`: what a
    compressed query misses. All are Frobenius norms in the metric of the moments, relative to the thing approximated.

    `energies` [rank] are the output's squared error without each latent channel, in that metric; None of weights that
    were drawn.
    """

    tensors: dict[str, Tensor]
    errors: dict[str, float]
    energies: Tensor | None = None


def factorize_layer(
    weights: AttentionWeights,
    layer: MLALayer,
    moments: LayerMoments,
    *,
    num_heads: int,
    mla: MLAConfig,
    weighted: bool = True,
) -> Factors:
    """The best latent factors of a layer in the metric of `moments`; `mla` says of what kind, not which layers.

    Beside an exact present, latents are read for the past alone: the teacher's own projections are kept, and what
    values have where the latent is zero goes into a bias of their own.

    Not `weighted`, all heads and channels count alike. With `mla.rope` "latent" the latent holds shared rotary keys
    beside content keys and values; with "head" content keys are whole heads that keep their rotation. With every pair
    kept in H components and a latent as wide as the model, the result is the teacher itself up to rounding (token key
    norm, exact queries). Latent channels are in descending order of what they hold: `narrower` cuts the last ones
    off.
    """
    dense = DenseLayer.of(weights, moments, num_heads, weighted=weighted)
    key_norm, q_lora_rank, rope = mla.key_norm, mla.q_lora_rank, mla.rope
    mean, root = moments.mean, dense.root
    content, shared, errors = content_and_shared(dense, layer, rope)
    out_map, value_map = dense.narrow_values(layer.v_head_dim)
    query_map = torch.cat((content.queries, shared.queries), 1) if mla.past_queries else None
    make_queries = partial(_query_path, dense, query_map, q_lora_rank, errors)
    threads = torch.get_num_threads()
    # LAPACK runs in one thread: where there are more, two problems side by side. torch would give the new thread the
    # number that any thread set last, and its bits with it.
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        queries = pool.submit(make_queries) if mean.device.type == "cpu" and threads > 1 else None
        metric = dense.metric(content, shared, out_map, value_map, rope)
        basis, energies, kept = leading_directions(metric, layer.kv_lora_rank)
        tensors = make_queries() if queries is None else queries.result()
    errors["latent"] = max(0.0, 1 - kept) ** 0.5

    # No token's own norm: fold the mean one. The latent has identity covariance, so its RMSNorm needs no gain.
    s = moments.inverse_norm if key_norm == "latent" else 1.0
    # What latent channels are of z, and back to x; the latent is basis^T z: its mean is zero, its covariance 1.
    down, shift = basis.mT, basis.new_zeros(basis.shape[1])
    if rope == "cached":
        down, shift = torch.cat((down, s * shared.rows[:, :-1])), torch.cat((shift, s * shared.rows[:, -1]))
    down = root.solve(down)
    if content.rows is None:
        up_key, key_bias = _read(weights.k_weight, weights.k_bias, basis, dense)
        norm = s * weights.gains[1].to(key_bias).unflatten(0, key_bias.shape)
        up_key, key_bias = norm[..., None] * up_key, norm * key_bias
    else:
        up_key, key_bias = s * product(content.rows[..., :-1], basis), s * content.rows[..., -1]
    up_value, value_bias = _read(weights.v_weight, weights.v_bias, basis, dense)
    up_value, value_bias = value_map @ up_value, value_map @ value_bias[..., None]
    if rope != "cached" and len(shared.rows):
        tensors["k_rope_proj.weight"], tensors["k_rope_proj.bias"] = (
            s * shared.rows[:, :-1] @ basis,
            s * shared.rows[:, -1],
        )
    tensors |= {
        "kv_a_proj_with_mqa.weight": down,
        "kv_a_proj_with_mqa.bias": shift - down @ mean,
        "kv_b_proj.weight": torch.cat((up_key, up_value), 1).flatten(0, 1),
        "kv_b_proj.bias": key_bias.flatten(),
    }
    if mla.present == "exact":
        tensors["kv_b_proj.bias"] = torch.cat((key_bias, value_bias.squeeze(-1)), 1).flatten()
        tensors |= exact_present(weights)
        if layer.v_head_dim < dense.head_dim:
            tensors["past_out_proj.weight"] = out_map.mT.contiguous()  # L-BFGS takes no views
    else:
        tensors |= _output(weights, out_map, value_bias)
    made = tensors | norms(weights, key_norm, layer.kv_lora_rank)
    return Factors(tensors=made, errors=errors, energies=energies)


def exact_present(w: AttentionWeights) -> dict[str, Tensor]:
    """What a chunk sees itself through: the teacher's keys, values and output."""
    return {
        "k_norm_proj.weight": w.k_weight,
        "k_norm_proj.bias": w.k_bias,
        "k_norm.weight": w.norm_k,
        "v_proj.weight": w.v_weight,
        "v_proj.bias": w.v_bias,
        "o.weight": w.o_weight,
        "o.bias": w.o_bias,
    }


def _read(weight: Tensor, bias: Tensor, basis: Tensor, dense: DenseLayer) -> tuple[Tensor, Tensor]:
    """Heads of W x + b, from the latent basis^T z: [H, d, rank] and, where it is zero, [H, d]."""
    mean, through = dense.moments.mean, dense.root.left(basis)
    read, rest = mean.new_empty(len(weight), basis.shape[1]), mean.new_empty(len(weight))
    for rows, block in float64_rows(weight, mean.device):
        read[rows], rest[rows] = product(block, through), block @ mean + bias[rows].to(mean)
    return read.unflatten(0, (dense.num_heads, -1)), rest.unflatten(0, (dense.num_heads, -1))


def _output(weights: AttentionWeights, out_map: Tensor, value_bias: Tensor) -> dict[str, Tensor]:
    """W_O for values mapped by `out_map` [H, v, d]; its bias takes up what values have where the latent is zero."""
    heads, width, full = out_map.shape
    made = out_map.new_empty(len(weights.o_weight), heads * width) if width < full else None
    bias = weights.o_bias.to(out_map, copy=True)
    for rows, block in float64_rows(weights.o_weight, out_map.device):
        if made is not None:
            made[rows] = torch.einsum("nhd,hvd->nhv", block.unflatten(1, (heads, full)), out_map).flatten(1)
        bias[rows] += (block if made is None else made[rows]) @ value_bias.flatten()
    return {"o.weight": weights.o_weight if made is None else made, "o.bias": bias}


def narrower(tensors: Mapping[str, Tensor], rank: int, width: int) -> dict[str, Tensor]:
    """The tensors of `factorize_layer` with the first `width` of `rank` latent channels."""
    cut = dict(tensors)
    for name in ("kv_a_proj_with_mqa.weight", "kv_a_proj_with_mqa.bias"):
        cut[name] = torch.cat((tensors[name][:width], tensors[name][rank:]))
    for name in ("kv_b_proj.weight", "k_rope_proj.weight", "kv_a_layernorm.weight"):
        if name in tensors:
            cut[name] = tensors[name][..., :width]
    return cut


def norms(w: AttentionWeights, key_norm: KeyNorm, rank: int) -> dict[str, Tensor]:
    """The tensors of a layer's key norm: weights of ones [rank], or the teacher's key projection."""
    if key_norm == "latent":
        return {"kv_a_layernorm.weight": torch.ones(rank, dtype=torch.float64)}
    return {"k_norm_proj.weight": w.k_weight, "k_norm_proj.bias": w.k_bias}


def _query_path(
    dense: DenseLayer, query_map: Tensor | None, rank: int | None, errors: dict[str, float]
) -> dict[str, Tensor]:
    """The teacher's own query projection and norm, or its best `rank` directions.

    `query_map` [H, nope + rope, d] acts on normed queries; None leaves them as they are. A latent of orthonormal
    directions of W_Q x + b_q has, but for the energy cut off, the same length, hence the same norm: its RMSNorm only
    needs the gain sqrt(D kept / rank).
    """
    w = dense.weights
    if rank is None:
        mapped = {} if query_map is None else {"q_b_proj.weight": query_map}
        return {"q_a_proj.weight": w.q_weight, "q_a_proj.bias": w.q_bias, "q_a_layernorm.weight": w.norm_q, **mapped}
    assert query_map is not None
    dim, heads = w.q_weight.shape[0], query_map.shape[0]
    total = query_map.new_zeros(dim, dim)
    add_gram(total, whitened(w.q_weight, w.q_bias, dense.moments.mean, dense.root).mT)
    basis, _, kept = leading_directions(mirror(total), rank)  # [D, rank]
    errors["query"] = max(0.0, 1 - kept) ** 0.5
    up = (w.gains[0].to(basis)[:, None] * basis).unflatten(0, (heads, -1))  # [H, d, rank]
    gain = (dim * kept / rank) ** 0.5
    down = basis.new_zeros(rank, dim)
    for rows, block in float64_rows(w.q_weight, basis.device):
        down += product(basis[rows].mT, block)
    return {
        "q_a_proj.weight": down,
        "q_a_proj.bias": basis.mT @ w.q_bias.to(basis),
        "q_a_layernorm.weight": torch.full((rank,), gain, dtype=basis.dtype, device=basis.device),
        "q_b_proj.weight": (query_map @ up).flatten(0, 1),
    }
