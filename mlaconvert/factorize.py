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
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Protocol

import torch
from torch import Tensor

from mlaconvert import lapack
from mlaconvert.config import KeyNorm, MLALayer, RopeMode, StreamingConfig
from mlaconvert.rope import frequencies

DAMPING = 1e-6  # of the mean eigenvalue, added before a covariance is inverted
_ROWS = 1024  # rows of a weight that are in float64 at once: 42 MB at width 5120
_GRAM_BLOCK = 384  # columns of a Gram matrix that are made at once


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


class Root(Protocol):
    """A square root R of a covariance C = R R^T."""

    def apply(self, rows: Tensor) -> Tensor:
        """`rows` [.., D] times R."""

    def left(self, columns: Tensor) -> Tensor:
        """R times `columns` [D, n]."""

    def solve(self, rows: Tensor) -> Tensor:
        """`rows` [.., D] times R^-1."""


@dataclass(frozen=True)
class TriangularRoot:
    """Cholesky's root of any covariance."""

    lower: Tensor  # [D, D]

    def apply(self, rows: Tensor) -> Tensor:
        """`rows` [.., D] times the root."""
        return rows @ self.lower

    def left(self, columns: Tensor) -> Tensor:
        """The root times `columns` [D, n]."""
        return self.lower @ columns

    def solve(self, rows: Tensor) -> Tensor:
        """`rows` [.., D] times its inverse."""
        return torch.linalg.solve_triangular(self.lower, rows, upper=False, left=False)


@dataclass(frozen=True)
class DiagonalRoot:
    """A root of diag(scale)^2 + rows^T rows for a few rows: scale times a symmetric matrix that is nearly the identity.

    With rows / scale = U S Q^T, that matrix is I + Q (sqrt(1 + S^2) - 1) Q^T. Products with it cost next to nothing.
    """

    scale: Tensor  # [D]
    directions: Tensor  # [D, T], Q
    stretch: Tensor  # [T], sqrt(1 + S^2)

    @classmethod
    def of(cls, diagonal: Tensor, rows: Tensor) -> DiagonalRoot:
        """The root of diag(`diagonal`) + `rows`^T `rows`, damped as `cholesky` does: [D] and [T, D]."""
        damping = DAMPING * (diagonal.mean() + rows.square().sum() / len(diagonal))
        scale = (diagonal + damping).sqrt()
        _, spread, directions = torch.linalg.svd(rows / scale, full_matrices=False)
        return cls(scale, directions.mT, (1 + spread.square()).sqrt())

    def apply(self, rows: Tensor) -> Tensor:
        """`rows` [.., D] times the root."""
        scaled = rows * self.scale
        return scaled.add_(((scaled @ self.directions) * (self.stretch - 1)) @ self.directions.mT)

    def left(self, columns: Tensor) -> Tensor:
        """The root times `columns` [D, n]."""
        stretched = columns + self.directions @ ((self.stretch - 1)[:, None] * (self.directions.mT @ columns))
        return self.scale[:, None] * stretched

    def solve(self, rows: Tensor) -> Tensor:
        """`rows` [.., D] times its inverse."""
        return (rows + ((rows @ self.directions) * (1 / self.stretch - 1)) @ self.directions.mT) / self.scale


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


@dataclass(frozen=True, kw_only=True)
class Factors:
    """A converted layer: tensors by their name below `self_attn.`, and relative errors by stage.

    What is the teacher's own stays in its dtype, all others are float64.

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
    shift, scale = modulation.double().unbind(1)
    mean, diagonal = shift.mean(0), (1 + scale).square().mean(0)
    centred = (shift - mean) / len(shift) ** 0.5
    root = DiagonalRoot.of(diagonal, centred)
    norm = weights.norm_q.to(mean).unflatten(0, (num_heads, -1, 1))
    q = _white(weights.q_weight, weights.q_bias, mean, root)
    q_power = q.norm().square() / len(q)
    query = norm * _gram(q.unflatten(0, (num_heads, -1))) * norm.mT / (q_power + eps)
    del q
    k_power = mean.new_zeros(())
    for rows, block in _float64(weights.k_weight, mean.device):
        k_power += root.apply(block).square().sum() + (block @ mean + weights.k_bias[rows].to(mean)).square().sum()
    return LayerMoments(
        mean=mean,
        covariance=torch.diag(diagonal).addmm_(centred.mT, centred),
        inverse_norm=float((k_power / len(weights.k_bias) + eps).rsqrt()),
        query=query,
        rho=rho.to(modulation.device),
        root=root,
    )


def _float64(weight: Tensor, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    """A matrix in float64, some rows at a time: at width 5120 all of it would take 210 MB."""
    for start in range(0, len(weight), _ROWS):
        rows = slice(start, start + _ROWS)
        yield rows, weight[rows].detach().to(device, torch.float64)


def _white(weight: Tensor, bias: Tensor, mean: Tensor, root: Root) -> Tensor:
    """W x + b as a function of [z; 1], [rows, D + 1] float64: x = root z + mean, and z is white."""
    found = mean.new_empty(len(weight), len(mean) + 1)
    for rows, block in _float64(weight, mean.device):
        found[rows, :-1] = root.apply(block)
        found[rows, -1] = block @ mean + bias[rows].to(mean)
    return found


@dataclass(frozen=True, kw_only=True)
class _Dense:
    """A dense layer in the metric of its moments, float64; its large matrices are made when they are asked for.

    Inputs are x = root z + mean, with z white. Rows act on z, or on [z; 1], where the last column is what the mean
    gives: in these coordinates, lengths are root mean squares over the inputs.
    """

    weights: AttentionWeights
    moments: LayerMoments
    num_heads: int
    root: Root
    weighted: bool

    @classmethod
    def of(cls, weights: AttentionWeights, moments: LayerMoments, num_heads: int, *, weighted: bool = True) -> _Dense:
        root = moments.root or TriangularRoot(cholesky(moments.covariance))
        return cls(weights=weights, moments=moments, num_heads=num_heads, root=root, weighted=weighted)

    @cached_property
    def key(self) -> Tensor:
        """[H, d, D + 1], keys before their norm s."""
        made = _white(self.weights.k_weight, self.weights.k_bias, self.moments.mean, self.root)
        return made.mul_(self.weights.norm_k.to(made)[:, None]).unflatten(0, (self.num_heads, -1))

    @cached_property
    def value(self) -> Tensor:
        """[H, d, D + 1]."""
        made = _white(self.weights.v_weight, self.weights.v_bias, self.moments.mean, self.root)
        return made.unflatten(0, (self.num_heads, -1))

    @cached_property
    def value_covariance(self) -> Tensor:
        """[H, d, d]."""
        return _gram(self.value[..., :-1])

    @cached_property
    def out_gram(self) -> Tensor:
        """[H, d, d], W_O,h^T W_O,h."""
        total = self.moments.query.new_zeros(self.moments.query.shape)
        for _, block in _float64(self.weights.o_weight, total.device):
            total += _gram(block.unflatten(1, (self.num_heads, -1)).permute(1, 2, 0))
        return total

    @property
    def head_dim(self) -> int:
        return self.moments.query.shape[1]

    @cached_property
    def score_weight(self) -> Tensor:
        """[H]: squared output error of a unit squared score error.

        A head's output moves with its scores as far as its values spread: E|W_O,h (v_h - E v_h)|^2.
        """
        spread = (self.value_covariance * self.out_gram).sum((1, 2))
        return spread * self.moments.inverse_norm**2 / self.head_dim

    @cached_property
    def importance(self) -> Tensor:
        """[H, pairs]: squared output error of a unit error of a complex key; half, for a score is a real part."""
        power = self.moments.query.diagonal(dim1=1, dim2=2).unflatten(1, (-1, 2)).sum(-1)
        if not self.weighted:
            return torch.ones_like(power)
        power = power * self.score_weight[:, None] / 2
        return power.clamp_min(1e-12 * float(power.max()) or 1e-300)

    def key_weight(self, query_map: Tensor) -> Tensor:
        """Root [H, n, n] of the output error of content keys that meet queries mapped by `query_map` [H, n, d]."""
        if not self.weighted:
            return torch.diag_embed(torch.ones_like(query_map[..., 0]))
        second = query_map @ self.moments.query @ query_map.mT
        return symmetric_root(second * self.score_weight[:, None, None])

    def turning_weight(self) -> Tensor:
        """The same [H, d, d] of whole keys that turn: as good as uncorrelated, pairs count with their power alone."""
        return torch.diag_embed(self.importance.sqrt().repeat_interleave(2, 1))

    def narrow_values(self, width: int) -> tuple[Tensor, Tensor]:
        """`_narrow` for the products W_O,h v_h."""
        if width == self.head_dim:
            return _identity(self.out_gram), _identity(self.out_gram)
        return _narrow(self.out_gram, self.value_covariance, width)

    def metric(self, content: _Content, shared: _Shared, out_map: Tensor, value_map: Tensor, rope: RopeMode) -> Tensor:
        """[D, D]: squared output error of errors in z, of all that the latent has to hold."""
        if self.moments.sensitivity is not None and rope != "cached":
            half = self.root.apply(self.moments.sensitivity)
            return self.root.apply(half.mT)
        total = self.moments.query.new_zeros(len(self.moments.mean), len(self.moments.mean))
        weight = self.turning_weight() if rope == "head" else self.key_weight(content.queries)
        rows = self.key if content.rows is None else content.rows
        add_gram(total, _product(weight, rows[..., :-1]).flatten(0, 1))
        heads = symmetric_root(out_map @ self.out_gram @ out_map.mT) @ value_map if self.weighted else value_map
        add_gram(total, _product(heads, self.value[..., :-1]).flatten(0, 1))
        if rope == "latent":
            add_gram(total, shared.weight[:, None] * shared.rows[:, :-1])
        return mirror(total)


@dataclass(frozen=True, kw_only=True)
class _Content:
    """Keys of each head that a latent has to hold, and the maps of the queries that meet them."""

    rows: Tensor | None  # [H, nope, D + 1] on [z; 1]; None: the head's own keys
    queries: Tensor  # [H, nope, d]


@dataclass(frozen=True, kw_only=True)
class _Shared:
    """Rotary keys that all heads share."""

    rows: Tensor  # [rope, D + 1] on [z; 1]
    queries: Tensor  # [H, rope, d]
    weight: Tensor  # [rope], root of the squared output error of their errors


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
    mean, root = moments.mean, dense.root
    content, shared, errors = _content_and_shared(dense, layer, rope)
    out_map, value_map = dense.narrow_values(layer.v_head_dim)
    make_queries = partial(_query_path, dense, torch.cat((content.queries, shared.queries), 1), q_lora_rank, errors)
    threads = torch.get_num_threads()
    # LAPACK runs in one thread: where there are more, two problems side by side. torch would give the new thread the
    # number that any thread set last, and its bits with it.
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        queries = pool.submit(make_queries) if mean.device.type == "cpu" and threads > 1 else None
        metric = dense.metric(content, shared, out_map, value_map, rope)
        basis, kept = leading_directions(metric, layer.kv_lora_rank)
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
        norm = s * weights.norm_k.to(key_bias).unflatten(0, key_bias.shape)
        up_key, key_bias = norm[..., None] * up_key, norm * key_bias
    else:
        up_key, key_bias = s * _product(content.rows[..., :-1], basis), s * content.rows[..., -1]
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
        **_output(weights, out_map, value_bias),
    }
    return Factors(tensors=tensors | _norms(weights, key_norm, layer.kv_lora_rank), errors=errors)


def _read(weight: Tensor, bias: Tensor, basis: Tensor, dense: _Dense) -> tuple[Tensor, Tensor]:
    """Heads of W x + b, from the latent basis^T z: [H, d, rank] and, where it is zero, [H, d]."""
    mean, through = dense.moments.mean, dense.root.left(basis)
    read, rest = mean.new_empty(len(weight), basis.shape[1]), mean.new_empty(len(weight))
    for rows, block in _float64(weight, mean.device):
        read[rows], rest[rows] = _product(block, through), block @ mean + bias[rows].to(mean)
    return read.unflatten(0, (dense.num_heads, -1)), rest.unflatten(0, (dense.num_heads, -1))


def _output(weights: AttentionWeights, out_map: Tensor, value_bias: Tensor) -> dict[str, Tensor]:
    """W_O for values mapped by `out_map` [H, v, d]; its bias takes up what values have where the latent is zero."""
    heads, width, full = out_map.shape
    made = out_map.new_empty(len(weights.o_weight), heads * width) if width < full else None
    bias = weights.o_bias.to(out_map, copy=True)
    for rows, block in _float64(weights.o_weight, out_map.device):
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
    dense, turned = _Dense.of(weights, moments, num_heads, weighted=weighted), 1 - moments.rho.abs().square()
    gains = []
    for pair in range(len(turned)):
        _, _, sigma = _components(dense, pair)
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
    w = weights
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


def _components(dense: _Dense, pair: int) -> tuple[Tensor, Tensor, Tensor]:
    """Singular triples of a pair's keys in all heads: a [H, H], u [H, D + 1] (rows on [z; 1]) and sigma [H].

    Rotation commutes with complex factors, so the keys Z [H, D + 1] of a pair may become a u: one shared key u [z; 1]
    and a factor conj(a_h) in head h's query. The best a u in the metric Q^1/2 Z (Q = diag E|q_h|^2; [z; 1] is white)
    are its leading singular triples.
    """
    keys = torch.complex(dense.key[:, 2 * pair], dense.key[:, 2 * pair + 1])
    scale = dense.importance[:, pair].sqrt()[:, None]
    left, sigma, right = torch.linalg.svd(scale * keys, full_matrices=False)
    return left * sigma / scale, right, sigma


def _content_and_shared(dense: _Dense, layer: MLALayer, rope: RopeMode) -> tuple[_Content, _Shared, dict[str, float]]:
    """Each head's own keys, the rotary keys that all share, and relative errors of both.

    What loses its rotation, and what the shared keys miss, goes into content keys that turn by their mean instead:
    Re(q conj(k) rho).
    """
    moments = dense.moments
    query, mean, width = moments.query, moments.mean, dense.head_dim
    if rope == "head":
        none = _Shared(rows=mean.new_zeros(0, len(mean) + 1), weight=mean.new_zeros(0), queries=query[:, :0])
        return _Content(rows=None, queries=_identity(query)), none, {}
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
    spread = _gram(content[..., :-1])
    query_map, key_map = _narrow(query, spread, layer.qk_nope_head_dim)
    return (
        _Content(rows=key_map @ content, queries=query_map),
        _Shared(rows=torch.cat(rows), weight=torch.cat(weights), queries=torch.cat(queries, 1)),
        errors,
    )


def _power(dense: _Dense, keys: Tensor) -> Tensor:
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


def _identity(like: Tensor) -> Tensor:
    """[H, d, d] ones on the diagonal, for the heads of `like` [H, d, d]."""
    return torch.eye(like.shape[1], dtype=like.dtype, device=like.device).expand(like.shape)


def _narrow(left: Tensor, right: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Maps [H, width, d] for which (left_map a)^T (right_map b) is the best narrow a^T b.

    `left` and `right` [H, d, d] are the second moments of a and b; the error is the mean square over independent a
    and b. The identity where `width` is the full d.
    """
    if width == left.shape[1]:
        return _identity(left), _identity(left)
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
    total = query_map.new_zeros(dim, dim)
    add_gram(total, _white(w.q_weight, w.q_bias, dense.moments.mean, dense.root).mT)
    basis, kept = leading_directions(mirror(total), rank)  # [D, rank]
    errors["query"] = max(0.0, 1 - kept) ** 0.5
    up = (w.norm_q.to(basis)[:, None] * basis).unflatten(0, (heads, -1))  # [H, d, rank]
    gain = (dim * kept / rank) ** 0.5
    down = basis.new_zeros(rank, dim)
    for rows, block in _float64(w.q_weight, basis.device):
        down += _product(basis[rows].mT, block)
    return {
        "q_a_proj.weight": down,
        "q_a_proj.bias": basis.mT @ w.q_bias.to(basis),
        "q_a_layernorm.weight": torch.full((rank,), gain, dtype=basis.dtype, device=basis.device),
        "q_b_proj.weight": (query_map @ up).flatten(0, 1),
    }


def affine(weight: Tensor, bias: Tensor) -> Tensor:
    """[.., D] and [..] -> [.., D + 1], acting on [x; 1]."""
    return torch.cat((weight, bias.unsqueeze(-1)), -1)


def cholesky(covariance: Tensor) -> Tensor:
    """Lower triangular root of a covariance, damped so that it can be inverted."""
    damped = covariance.clone()
    damped.diagonal().add_(DAMPING * covariance.diagonal().mean())
    return torch.linalg.cholesky(damped)


def leading_directions(gram: Tensor, rank: int) -> tuple[Tensor, float]:
    """Orthonormal eigenvectors [D, rank] of the largest eigenvalues of `gram`, and the share of the trace they hold.

    `gram` is overwritten on a CPU. Raises LinAlgError when it is not finite.
    """
    dim, trace = len(gram), float(gram.trace())
    if gram.device.type == "cpu":
        values, vectors = lapack.leading_eigenvectors(gram.contiguous(), rank)
    else:
        values, vectors = torch.linalg.eigh(gram)
        values, vectors = values[dim - rank :], vectors[:, dim - rank :]
    kept = float(values.clamp_min(0).sum()) / trace if trace > 0 else 1.0
    return vectors.flip(1).contiguous(), min(1.0, kept)


def add_gram(total: Tensor, rows: Tensor) -> None:
    """Add `rows`^T `rows` to `total` [D, D], only on and above the diagonal; `mirror` does the rest."""
    if _in_one_thread(total):
        lapack.add_gram(total, rows)
        return
    for start in range(0, len(total), _GRAM_BLOCK):
        total[start : start + _GRAM_BLOCK, start:].addmm_(rows[:, start : start + _GRAM_BLOCK].mT, rows[:, start:])


def mirror(total: Tensor) -> Tensor:
    """Copy what lies above the diagonal of `total` [D, D] below it, in place."""
    for start in range(0, len(total), _GRAM_BLOCK):
        end = start + _GRAM_BLOCK
        block = total[start:end, start:end]
        block.copy_(block.triu() + block.triu(1).mT)
        total[end:, start:end] = total[start:end, end:].mT
    return total


def symmetric_root(matrix: Tensor) -> Tensor:
    """The symmetric root of positive semidefinite matrices [.., n, n], damped to stay invertible."""
    values, vectors = torch.linalg.eigh(matrix)
    floor = values[..., -1:].clamp_min(1e-30) * 1e-12
    return (vectors * values.clamp_min(0).add(floor).sqrt().unsqueeze(-2)) @ vectors.mT


def _gram(heads: Tensor) -> Tensor:
    """Each head's rows times themselves, [H, d, n] -> [H, d, d]."""
    if not _in_one_thread(heads):
        return heads @ heads.mT
    total = heads.new_zeros(*heads.shape[:2], heads.shape[1])
    for made, rows in zip(total, heads, strict=True):
        lapack.add_gram(made, rows.mT)
        mirror(made)
    return total


def _product(left: Tensor, right: Tensor) -> Tensor:
    """`left` @ `right`."""
    return torch.from_numpy(left.numpy() @ right.numpy()) if _in_one_thread(left) else left @ right


def _in_one_thread(tensor: Tensor) -> bool:
    """Whether OpenBLAS, which numpy and SciPy bring, is worth its while.

    Its float64 products are faster than torch's on some processors, and it multiplies a matrix with itself in half
    the time; torch has more threads.
    """
    return tensor.device.type == "cpu" and torch.get_num_threads() == 1
