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

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from scipy.linalg import eigh
from torch import Tensor

from mlaconvert.config import KeyNorm, MLALayer, RopeMode, StreamingConfig
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
    # [D, D], E[g g^T] of g = d(noise . output) / dx_j through keys and values, their norm s held: what an error of x_j
    # that only its key and value see does to the attention output. None where only weights are known.
    sensitivity: Tensor | None = None
    # E|output|^2 in its units: tr(sensitivity E) / output_power is the squared relative output error of inputs that are
    # off by a second moment E [D, D], each on its own.
    output_power: float | None = None


@dataclass(frozen=True, kw_only=True)
class Factors:
    """A converted layer: tensors by their name below `self_attn.`, and relative errors by stage.

    `rope`: what the shared rotary keys miss of the kept pairs; `unrotated`: the energy whose rotation is lost, as a
    share of all keys' energy; `latent`: what the latent misses of all that it holds; `query`: what a
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


@dataclass(frozen=True, kw_only=True)
class _Dense:
    """A dense layer in the metric of its moments, float64."""

    weights: AttentionWeights
    moments: LayerMoments
    key: Tensor  # [H, d, D + 1], affine keys before their norm s
    value: Tensor  # [H, d, D]
    out: Tensor  # [H, D, d]
    root: Tensor  # [D, D], covariance = root root^T
    affine_root: Tensor  # [D + 1, D + 1], the same of [x; 1]
    value_covariance: Tensor  # [H, d, d]
    output_spread: Tensor  # [H], E|W_O,h (v_h - E v_h)|^2: how far a head's output moves with its scores
    weighted: bool

    @classmethod
    def of(cls, weights: AttentionWeights, moments: LayerMoments, num_heads: int, *, weighted: bool = True) -> _Dense:
        w = weights.double(moments.mean.device)
        root = cholesky(moments.covariance)
        value = w.v_weight.unflatten(0, (num_heads, -1))
        out = w.o_weight.unflatten(1, (num_heads, -1)).transpose(0, 1)
        covariance = _gram(value @ root)
        return cls(
            weights=w,
            moments=moments,
            key=affine(w.norm_k[:, None] * w.k_weight, w.norm_k * w.k_bias).unflatten(0, (num_heads, -1)),
            value=value,
            out=out,
            root=root,
            affine_root=affine_root(root, moments.mean),
            value_covariance=covariance,
            output_spread=((out @ covariance) * out).sum((1, 2)),
            weighted=weighted,
        )

    @property
    def head_dim(self) -> int:
        return self.key.shape[1]

    @property
    def score_weight(self) -> Tensor:
        """[H]: squared output error of a unit squared score error."""
        return self.output_spread * self.moments.inverse_norm**2 / self.head_dim

    def importance(self) -> Tensor:
        """[H, pairs]: squared output error of a unit error of a complex key; half, for a score is a real part."""
        power = self.moments.query.diagonal(dim1=1, dim2=2).unflatten(1, (-1, 2)).sum(-1)
        if not self.weighted:
            return torch.ones_like(power)
        power = power * self.score_weight[:, None] / 2
        return power.clamp_min(1e-12 * float(power.max()) or 1e-300)

    def pairs(self) -> Tensor:
        """Keys as complex pairs [H, pairs, D + 1]."""
        return torch.complex(self.key[:, 0::2], self.key[:, 1::2])

    def key_weight(self, query_map: Tensor) -> Tensor:
        """Root [H, n, n] of the output error of content keys that meet queries mapped by `query_map` [H, n, d]."""
        if not self.weighted:
            return torch.diag_embed(torch.ones_like(query_map[..., 0]))
        second = query_map @ self.moments.query @ query_map.mT
        return symmetric_root(second * self.score_weight[:, None, None])


@dataclass(frozen=True, kw_only=True)
class _Keys:
    """Keys that a latent has to hold, and the queries that meet them."""

    rows: Tensor  # [.., D + 1], affine in x; [H, nope, D + 1] of content keys, [rope, D + 1] of shared ones
    weight: Tensor  # root of the squared output error of their errors: [H, nope, nope], or [rope]
    queries: Tensor  # [H, nope or rope, d], maps of each head's query


def factorize_layer(
    weights: AttentionWeights,
    layer: MLALayer,
    moments: LayerMoments,
    *,
    num_heads: int,
    key_norm: KeyNorm,
    q_lora_rank: int | None,
    rope: RopeMode = "cached",
    weighted: bool = True,
) -> Factors:
    """The best latent factors of a layer in the metric of `moments`.

    Not `weighted`, all heads and channels count alike. With `rope` "latent" the latent holds shared rotary keys
    beside content keys and values; with "head" content keys are whole heads that keep their rotation. With every pair
    kept in H components and a latent as wide as the model, the result is the teacher itself up to rounding (token key
    norm, exact queries). Latent channels are in descending order of what they hold: `narrower` cuts the last ones
    off.
    """
    dense = _Dense.of(weights, moments, num_heads, weighted=weighted)
    w, mean, root, dim = dense.weights, moments.mean, dense.root, len(moments.mean)
    content, shared, errors = _content_and_shared(dense, layer, rope)
    out_map, value_map = _narrow(dense.out.mT @ dense.out, dense.value_covariance, layer.v_head_dim)
    value = value_map @ dense.value  # [H, v, D]
    out = dense.out @ out_map.mT  # [H, D, v]

    if moments.sensitivity is not None and rope != "cached":
        metric = moments.sensitivity
    else:
        value_weight = symmetric_root(out.mT @ out) @ value if weighted else value
        joint = torch.cat((content.weight @ content.rows[..., :dim], value_weight), 1)
        joint = joint.flatten(0, 1)
        if rope == "latent":
            joint = torch.cat((joint, shared.weight[:, None] * shared.rows[:, :dim]))
        metric = joint.mT @ joint
    basis, kept = leading_directions(root.mT @ metric @ root, layer.kv_lora_rank)  # [D, rank]
    errors["latent"] = max(0.0, 1 - kept) ** 0.5

    def read(rows: Tensor) -> tuple[Tensor, Tensor]:
        """Affine rows [.., D + 1] of x, as [.., rank] and a bias [..] of the latent, of mean zero."""
        return rows[..., :dim] @ root @ basis, rows[..., dim] + rows[..., :dim] @ mean

    down = torch.linalg.solve_triangular(root, basis.mT, upper=False, left=False)  # basis^T root^-1
    down = affine(down, -down @ mean)  # [rank, D + 1]: the latent has mean zero and identity covariance
    # No token's own norm: fold the mean one. The latent has identity covariance, so its RMSNorm needs no gain.
    s = moments.inverse_norm if key_norm == "latent" else 1.0
    up_key, key_bias = read(s * content.rows)
    up_value, value_bias = read(affine(value, (value_map @ w.v_bias.unflatten(0, (num_heads, -1, 1))).squeeze(-1)))
    tensors = _query_path(dense, torch.cat((content.queries, shared.queries), 1), q_lora_rank, errors)
    if rope == "cached":
        down = torch.cat((down, s * shared.rows))
    elif len(shared.rows):
        tensors["k_rope_proj.weight"], tensors["k_rope_proj.bias"] = read(s * shared.rows)
    tensors |= {
        "kv_a_proj_with_mqa.weight": down[:, :dim],
        "kv_a_proj_with_mqa.bias": down[:, dim],
        "kv_b_proj.weight": torch.cat((up_key, up_value), 1).flatten(0, 1),
        "kv_b_proj.bias": key_bias.flatten(),
        "o.weight": out.transpose(0, 1).flatten(1),
        "o.bias": w.o_bias + torch.einsum("hdv,hv->d", out, value_bias),
    }
    return Factors(tensors=tensors | _norms(w, key_norm, layer.kv_lora_rank), errors=errors)


def narrower(tensors: Mapping[str, Tensor], rank: int, width: int) -> dict[str, Tensor]:
    """The tensors of `factorize_layer` with the first `width` of `rank` latent channels."""
    cut = dict(tensors)
    for name in ("kv_a_proj_with_mqa.weight", "kv_a_proj_with_mqa.bias"):
        cut[name] = torch.cat((tensors[name][:width], tensors[name][rank:]))
    for name in ("kv_b_proj.weight", "k_rope_proj.weight", "kv_a_layernorm.weight"):
        if name in tensors:
            cut[name] = tensors[name][..., :width]
    return cut


def choose_components(
    weights: AttentionWeights, moments: LayerMoments, *, num_heads: int, counts: Sequence[int], several: bool = True
) -> list[tuple[tuple[int, int], ...]]:
    """The best rotary components, for each number of them in `counts`: (pair, count) in ascending pair order.

    Without `several`, no pair gets more than one.

    A component (pair f, its r-th singular triple) buys sigma_r^2 (1 - |rho_f|^2): the energy whose rotation is lost
    without it, less what a constant mean rotation keeps.
    """
    dense = _Dense.of(weights, moments, num_heads)
    importance, turned = dense.importance(), 1 - moments.rho.abs().square()
    gains = []
    for pair in range(importance.shape[1]):
        _, _, sigma = _components(dense, importance, pair)
        gains += [(float(value.square() * turned[pair]), pair) for value in (sigma if several else sigma[:1])]
    gains.sort(reverse=True)
    return [tuple(sorted(Counter(pair for _, pair in gains[:count]).items())) for count in counts]


def allocate(curves: Sequence[Callable[[int], float]], total: int, *, bounds: tuple[int, int]) -> list[int]:
    """Scalars of each layer, `total` in all and within `bounds` each, that minimise the sum of errors.

    `curves` give each layer's error at a budget. Greedy: the next scalars go where they buy most (errors fall ever
    more slowly with the budget, and looking ahead by a whole rotary component steps over the kinks). Raises ValueError
    when `total` does not fit the bounds.
    """
    low, high = bounds
    if not low * len(curves) <= total <= high * len(curves):
        raise ValueError(f"{total} scalars do not fit {len(curves)} layers of {low} to {high}")
    errors = [[curve(budget) for budget in range(low, high + 1)] for curve in curves]
    chosen = [low] * len(curves)
    left = total - sum(chosen)
    while left:
        gains = []
        for layer, curve in enumerate(errors):
            at = chosen[layer] - low
            for step in range(1, min(3, left, len(curve) - 1 - at) + 1):
                gains.append(((curve[at] - curve[at + step]) / step, step, layer))
        _, step, layer = max(gains)
        chosen[layer] += step
        left -= step
    return chosen


def random_layer(
    weights: AttentionWeights,
    layer: MLALayer,
    *,
    num_heads: int,
    key_norm: KeyNorm,
    q_lora_rank: int | None,
    generator: torch.Generator,
    rope: RopeMode = "cached",
) -> Factors:
    """Every new projection drawn from N(0, 1 / fan_in), biases zero; what the teacher shares stays the teacher's.

    Those are W_O where values stay as wide as the head, the query projection of the exact path, and the key norm.
    """
    w = weights.double()
    dim, rank, rotary = w.q_weight.shape[0], layer.kv_lora_rank, layer.qk_rope_head_dim
    width, head_dim = layer.qk_nope_head_dim + rotary, dim // num_heads

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
    same_width, cached = layer.v_head_dim == head_dim, rank + (rotary if rope == "cached" else 0)
    tensors = query | {
        "kv_a_proj_with_mqa.weight": draw(cached, dim),
        "kv_a_proj_with_mqa.bias": zeros(cached),
        "kv_b_proj.weight": draw(num_heads * (layer.qk_nope_head_dim + layer.v_head_dim), rank),
        "kv_b_proj.bias": zeros(num_heads * layer.qk_nope_head_dim),
        "o.weight": w.o_weight if same_width else draw(dim, num_heads * layer.v_head_dim),
        "o.bias": w.o_bias,
    }
    if rope == "latent" and rotary:
        tensors |= {"k_rope_proj.weight": draw(rotary, rank), "k_rope_proj.bias": zeros(rotary)}
    return Factors(tensors=tensors | _norms(w, key_norm, rank), errors={})


def _norms(w: AttentionWeights, key_norm: KeyNorm, rank: int) -> dict[str, Tensor]:
    if key_norm == "latent":
        return {"kv_a_layernorm.weight": torch.ones(rank, dtype=torch.float64)}
    return {"k_norm_proj.weight": w.k_weight, "k_norm_proj.bias": w.k_bias}


def _components(dense: _Dense, importance: Tensor, pair: int) -> tuple[Tensor, Tensor, Tensor]:
    """Singular triples of a pair's keys in all heads: a [H, H], u [H, D + 1] (rows) and sigma [H].

    Rotation commutes with complex factors, so the keys Z [H, D + 1] of a pair may become a u: one shared key u [x; 1]
    and a factor conj(a_h) in head h's query. The best a u in the metric Q^1/2 Z M^1/2 (Q = diag E|q_h|^2, M the second
    moment of [x; 1]) are its leading singular triples, mapped back.
    """
    keys = torch.complex(dense.key[:, 2 * pair], dense.key[:, 2 * pair + 1])
    root, scale = dense.affine_root.to(keys.dtype), importance[:, pair].sqrt()[:, None]
    left, sigma, right = torch.linalg.svd((scale * keys) @ root, full_matrices=False)
    return left * sigma / scale, torch.linalg.solve_triangular(root, right, upper=False, left=False), sigma


def _content_and_shared(dense: _Dense, layer: MLALayer, rope: RopeMode) -> tuple[_Keys, _Keys, dict[str, float]]:
    """Each head's own keys, the rotary keys that all share, and relative errors of both.

    What loses its rotation, and what the shared keys miss, goes into content keys that turn by their mean instead:
    Re(q conj(k) rho).
    """
    heads, width, columns = dense.key.shape
    pairs, importance, rho = dense.pairs(), dense.importance(), dense.moments.rho
    if rope == "head":
        # Turned by position, the pairs of a query are as good as uncorrelated: each counts with its power alone.
        weight = torch.diag_embed(importance.sqrt().repeat_interleave(2, 1))
        eye = torch.eye(width, dtype=weight.dtype, device=weight.device).expand(heads, -1, -1)
        none = _Keys(rows=weight.new_zeros(0, columns), weight=weight.new_zeros(0), queries=eye[:, :0])
        return _Keys(rows=dense.key, weight=weight, queries=eye), none, {}
    rest, missed, kept_energy = pairs.clone(), 0.0, 0.0
    rows, weights = [dense.key.new_zeros(0, columns)], [dense.key.new_zeros(0)]
    queries = [dense.key.new_zeros(heads, 0, width)]
    for pair, count in layer.rope_components:
        factors, shared, sigma = _components(dense, importance, pair)
        factor, row = factors[:, :count], shared[:count]
        rest[:, pair] -= factor @ row
        missed += float(sigma[count:].square().sum())
        kept_energy += float(sigma.square().sum())
        rows.append(torch.view_as_real(row).transpose(1, 2).flatten(0, 1))
        weights.append(sigma[:count].repeat_interleave(2))
        turn = dense.key.new_zeros(heads, count, 2, width)
        turn[:, :, 0, 2 * pair], turn[:, :, 0, 2 * pair + 1] = factor.real, factor.imag
        turn[:, :, 1, 2 * pair], turn[:, :, 1, 2 * pair + 1] = -factor.imag, factor.real
        queries.append(turn.flatten(1, 2))
    root, power = dense.affine_root.to(pairs.dtype), importance.sqrt()[..., None]
    lost = (power * (rest @ root)).abs().square().sum((0, 2))  # [pairs]
    total = (power * (pairs @ root)).abs().square().sum()
    errors = {
        "rope": (missed / kept_energy) ** 0.5 if kept_energy else 0.0,
        "unrotated": float((lost * (1 - rho.abs().square())).sum() / total) ** 0.5,
    }
    content = torch.view_as_real(rest * rho.conj()[:, None]).transpose(2, 3).flatten(1, 2)  # [H, d, D + 1]
    spread = _gram(content[..., :-1] @ dense.root)
    query_map, key_map = _narrow(dense.moments.query, spread, layer.qk_nope_head_dim)
    return (
        _Keys(rows=key_map @ content, weight=dense.key_weight(query_map), queries=query_map),
        _Keys(rows=torch.cat(rows), weight=torch.cat(weights), queries=torch.cat(queries, 1)),
        errors,
    )


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


def _query_path(dense: _Dense, query_map: Tensor, rank: int | None, errors: dict[str, float]) -> dict[str, Tensor]:
    """The teacher's own query projection and norm, or its best `rank` directions.

    `query_map` [H, nope + rope, d] acts on normed queries. A latent of orthonormal directions of W_Q x + b_q has, but
    for the energy cut off, the same length, hence the same norm: its RMSNorm only needs the gain sqrt(D kept / rank).
    """
    w = dense.weights
    if rank is None:
        return {
            "q_a_proj.weight": w.q_weight,
            "q_a_proj.bias": w.q_bias,
            "q_a_layernorm.weight": w.norm_q,
            "q_b_proj.weight": query_map,
        }
    dim, heads = w.q_weight.shape[0], query_map.shape[0]
    metric = affine(w.q_weight, w.q_bias) @ dense.affine_root
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
