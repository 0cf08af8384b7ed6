"""The identities of a conversion, in float64, against attention written out longhand."""

from __future__ import annotations

import dataclasses
import threading
from functools import partial
from itertools import combinations, combinations_with_replacement, product
from typing import Any

import numpy as np
import pytest
import torch
from conftest import relative
from torch import Tensor

from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.mla import KeyNorm, MLAConfig, MLALayer, RopeMode
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.errors import InputError
from mlaconvert.latent.allocate import allocate
from mlaconvert.latent.components import choose_components
from mlaconvert.latent.factorize import Factors, factorize_layer, narrower
from mlaconvert.latent.matrices import add_gram, affine, leading_directions, mirror
from mlaconvert.latent.moments import LayerMoments, modulation_moments
from mlaconvert.latent.pairs import highest_pairs, mean_rotation
from mlaconvert.latent.random_start import random_layer
from mlaconvert.latent.roots import DiagonalRoot, Root, TriangularRoot, cholesky
from mlaconvert.latent.weights import AttentionWeights
from mlaconvert.model.attention.kernel import AttentionPlan
from mlaconvert.model.attention.latent import LatentAttention
from mlaconvert.model.rope import angles, rotary
from mlaconvert.model.window import full_window

HEADS, WIDTH, EPS = 5, 12, 1e-6
DIM = HEADS * WIDTH
CONFIG = WanConfig(dim=DIM, num_heads=HEADS, num_layers=1, ffn_dim=8)
SPLIT = CONFIG.rope_split
GRID = (4, 2, 3)  # frames, height, width in tokens
EXACT = 1e-12


def make_weights(seed: int = 0) -> AttentionWeights:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64) * 0.3

    square = {f"{name}_weight": draw(DIM, DIM) for name in "qkvo"}
    bias = {f"{name}_bias": draw(DIM) for name in "qkvo"}
    return AttentionWeights(**square, **bias, norm_q=1 + draw(DIM), norm_k=1 + draw(DIM))


def make_modulation() -> Tensor:
    return torch.randn(3, 2, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.4


def make_inputs(batch: int = 2) -> Tensor:
    g = torch.Generator().manual_seed(2)
    x = torch.randn(batch, GRID[0] * GRID[1] * GRID[2], DIM, generator=g, dtype=torch.float64)
    x = torch.nn.functional.layer_norm(x, (DIM,))
    shift, scale = make_modulation()[0]
    return x * (1 + scale) + shift


def moments(weights: AttentionWeights) -> LayerMoments:
    queries, keys = full_window(StreamingConfig(), GRID[0])
    rho = mean_rotation(SPLIT, queries=queries, keys=keys, height=GRID[1], width=GRID[2])
    return modulation_moments(weights, make_modulation(), num_heads=HEADS, eps=EPS, rho=rho)


def longhand(w: AttentionWeights, x: Tensor) -> Tensor:
    """Wan's self-attention with complex numbers and no library attention, [B, N, D] float64."""
    turn = torch.exp(1j * angles(torch.arange(GRID[0]), GRID[1], GRID[2], SPLIT))  # [N, pairs]

    def heads(y: Tensor) -> Tensor:
        return y.reshape(*y.shape[:-1], HEADS, WIDTH)

    def norm(y: Tensor, gain: Tensor) -> Tensor:
        return y / (y.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * gain

    q = heads(norm(x @ w.q_weight.T + w.q_bias, w.norm_q))
    k = heads(norm(x @ w.k_weight.T + w.k_bias, w.norm_k))
    v = heads(x @ w.v_weight.T + w.v_bias)
    q_turned = torch.complex(q[..., 0::2], q[..., 1::2]) * turn[:, None]
    k_turned = torch.complex(k[..., 0::2], k[..., 1::2]) * turn[:, None]
    scores = torch.einsum("bnhp,bmhp->bhnm", q_turned, k_turned.conj()).real / WIDTH**0.5
    out = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v).flatten(-2)
    return out @ w.o_weight.T + w.o_bias


def run(
    factors: Factors,
    layer: MLALayer,
    key_norm: KeyNorm,
    q_rank: int | None,
    x: Tensor,
    mode: Any,
    rope: RopeMode = "cached",
) -> Tensor:
    mla = MLAConfig(
        q_lora_rank=q_rank,
        key_norm=key_norm,
        softmax_scale=WIDTH**-0.5,
        layers=(layer,),
        rope=rope,
    )
    with torch.device("meta"):
        module = LatentAttention(dataclasses.replace(CONFIG, mla=mla), mla, layer)
    module.load_state_dict(factors.tensors, strict=True, assign=True)
    turn = rotary(torch.arange(GRID[0]), GRID[1], GRID[2], SPLIT, torch.float64)
    with torch.no_grad():
        return module(x, AttentionPlan(query_rotary=turn, key_rotary=turn, mode=mode))


def convert(
    weights: AttentionWeights,
    layer: MLALayer,
    key_norm: KeyNorm = "token",
    q_rank: int | None = None,
    rope: RopeMode = "cached",
) -> Factors:
    return factorize_layer(
        weights,
        layer,
        moments(weights),
        num_heads=HEADS,
        key_norm=key_norm,
        q_lora_rank=q_rank,
        rope=rope,
    )


def lossless(**change: Any) -> MLALayer:
    every = tuple((pair, HEADS) for pair in range(WIDTH // 2))
    layer = MLALayer(kv_lora_rank=DIM, qk_nope_head_dim=0, v_head_dim=WIDTH, rope_components=every)
    return dataclasses.replace(layer, **change)


def lossy(**change: Any) -> MLALayer:
    layer = MLALayer(kv_lora_rank=17, qk_nope_head_dim=8, v_head_dim=WIDTH, rope_components=((0, 2), (3, 1)))
    return dataclasses.replace(layer, **change)


@pytest.mark.parametrize("mode", ["expanded", "absorbed"])
@pytest.mark.parametrize("q_rank", [None, DIM])
@pytest.mark.parametrize("nope", [0, WIDTH])
@pytest.mark.parametrize("rope", ["cached", "latent"])
def test_everything_kept_is_the_teacher(mode: str, q_rank: int | None, nope: int, rope: RopeMode) -> None:
    """Identity 5, and with it the value bias (1), key norm (2), query path (3) and complex heads (4)."""
    weights, x, layer = make_weights(), make_inputs(), lossless(qk_nope_head_dim=nope)
    found = run(convert(weights, layer, q_rank=q_rank, rope=rope), layer, "token", q_rank, x, mode, rope)
    assert relative(found, longhand(weights, x)) < (EXACT if rope == "cached" else 1e-7)  # C^1/2 and back


def test_heads_that_turn_their_own_keys_keep_everything() -> None:
    weights, x = make_weights(), make_inputs()
    layer = lossless(qk_nope_head_dim=WIDTH, rope_components=())
    found = run(convert(weights, layer, rope="head"), layer, "token", None, x, "auto", "head")
    assert relative(found, longhand(weights, x)) < 1e-7
    with pytest.raises(InputError, match="absorbed attention shares keys"):
        run(convert(weights, layer, rope="head"), layer, "token", None, x, "absorbed", "head")


def test_latent_key_norm_is_not_exact() -> None:
    weights, x, layer = make_weights(), make_inputs(), lossless()
    found = run(convert(weights, layer, "latent"), layer, "latent", None, x, "expanded")
    assert 1e-3 < relative(found, longhand(weights, x)) < 0.5


@pytest.mark.parametrize("key_norm", ["token", "latent"])
@pytest.mark.parametrize("rope", ["cached", "latent"])
@pytest.mark.parametrize("widths", [(8, WIDTH), (3, WIDTH), (5, 7), (0, 9)])
def test_absorbed_equals_expanded(key_norm: KeyNorm, rope: RopeMode, widths: tuple[int, int]) -> None:
    layer = lossy(qk_nope_head_dim=widths[0], v_head_dim=widths[1])
    factors, x = convert(make_weights(), layer, key_norm, 31, rope), make_inputs()
    assert float(factors.tensors["kv_b_proj.bias"].abs().sum()) > 0 or widths[0] == 0
    expanded, absorbed = (run(factors, layer, key_norm, 31, x, mode, rope) for mode in ("expanded", "absorbed"))
    assert relative(absorbed, expanded) < EXACT


def test_a_layers_bits_do_not_depend_on_what_other_threads_set() -> None:
    """torch takes the number of threads that anybody set last for the threads to come."""
    before, weights = torch.get_num_threads(), make_weights()
    try:
        torch.set_num_threads(2)
        expected = convert(weights, lossy(), q_rank=13).tensors
        other = threading.Thread(target=torch.set_num_threads, args=(1,))
        other.start()
        other.join()
        found = convert(weights, lossy(), q_rank=13).tensors
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_latent_that_serves_rotary_keys_too_loses_less() -> None:
    """The same cache of 18 scalars: rotary keys beside the latent, or read from it."""
    weights, x = make_weights(), make_inputs()
    expected = longhand(weights, x)
    layers: dict[RopeMode, MLALayer] = {"cached": lossy(kv_lora_rank=12), "latent": lossy(kv_lora_rank=18)}
    cached, latent = (
        relative(run(convert(weights, layer, rope=rope), layer, "token", None, x, "expanded", rope), expected)
        for rope, layer in layers.items()
    )
    assert latent < 0.97 * cached


@pytest.mark.parametrize("rope", ["cached", "latent", "head"])
@pytest.mark.parametrize("key_norm", ["token", "latent"])
def test_a_narrower_latent_is_a_part_of_a_wider_one(rope: RopeMode, key_norm: KeyNorm) -> None:
    weights, change = make_weights(), {"rope_components": (), "qk_nope_head_dim": WIDTH} if rope == "head" else {}
    wide, narrow = lossy(kv_lora_rank=29, **change), lossy(kv_lora_rank=13, **change)
    found = run(
        dataclasses.replace(
            convert(weights, wide, key_norm, rope=rope),
            tensors=narrower(convert(weights, wide, key_norm, rope=rope).tensors, 29, 13),
        ),
        narrow,
        key_norm,
        None,
        make_inputs(),
        "expanded",
        rope,
    )
    expected = run(
        convert(weights, narrow, key_norm, rope=rope), narrow, key_norm, None, make_inputs(), "expanded", rope
    )
    assert relative(found, expected) < 1e-9


def test_components_are_chosen_by_what_losing_their_rotation_costs() -> None:
    """Against every set of three components: the chosen one leaves the least energy without its rotation."""
    weights = make_weights()
    m = moments(weights)
    (chosen,) = choose_components(weights, m, num_heads=HEADS, counts=[3])

    def lost(pairs: tuple[int, ...]) -> float:
        kept = tuple(sorted((pair, pairs.count(pair)) for pair in set(pairs)))
        return convert(weights, lossy(rope_components=kept)).errors["unrotated"]

    every = combinations_with_replacement(range(WIDTH // 2), 3)
    best = min(every, key=lost)
    assert chosen == tuple(sorted((pair, best.count(pair)) for pair in set(best)))
    (apart,) = choose_components(weights, m, num_heads=HEADS, counts=[3], several=False)
    assert apart == tuple((pair, 1) for pair in min(combinations(range(WIDTH // 2), 3), key=lost))
    whole = choose_components(weights, m, num_heads=HEADS, counts=[WIDTH // 2 * HEADS])
    assert whole == [tuple((pair, HEADS) for pair in range(WIDTH // 2))]


def test_unweighted_components_are_those_of_the_keys_alone() -> None:
    """Against float64 singular values of each pair's complex keys, longhand; queries and outputs do not count."""
    weights = make_weights()
    m = moments(weights)
    uneven = torch.logspace(-3, 3, HEADS, dtype=torch.float64)  # heads' queries, which weights would follow
    m = dataclasses.replace(m, query=m.query * uneven[:, None, None])
    root = torch.linalg.cholesky(m.covariance)
    w, b = weights.norm_k.double()[:, None] * weights.k_weight.double(), (weights.norm_k * weights.k_bias).double()
    white = torch.cat((w @ root, (w @ m.mean + b)[:, None]), 1).unflatten(0, (HEADS, WIDTH))
    gains = []
    for pair in range(WIDTH // 2):
        sigma = torch.linalg.svdvals(torch.complex(white[:, 2 * pair], white[:, 2 * pair + 1]))
        gains += [(float(s**2 * (1 - m.rho[pair].abs() ** 2)), pair) for s in sigma]
    best = [pair for _, pair in sorted(gains, reverse=True)]
    for count in range(1, len(best)):
        expected = tuple(sorted((pair, best[:count].count(pair)) for pair in set(best[:count])))
        (chosen,) = choose_components(weights, m, num_heads=HEADS, counts=[count], weighted=False)
        assert chosen == expected
    assert choose_components(weights, m, num_heads=HEADS, counts=[10]) != [
        tuple(sorted((pair, best[:10].count(pair)) for pair in set(best[:10])))
    ]


def test_allocation_against_every_possibility() -> None:
    """Greedy against brute force on convex curves, and the total is met exactly."""
    g = torch.Generator().manual_seed(4)
    energies = torch.rand(3, 20, generator=g, dtype=torch.float64).sort(1, descending=True).values
    weights, bounds = (1.0, 5.0, 0.2), (2, 11)

    def error(layer: int, budget: int) -> float:
        return weights[layer] * float(energies[layer, budget:].sum())

    curves = [partial(error, i) for i in range(3)]
    found = allocate(curves, 18, bounds=bounds)

    def cost(budgets: tuple[int, ...]) -> float:
        return sum(error(i, b) for i, b in enumerate(budgets))

    every = [b for b in product(range(2, 12), repeat=3) if sum(b) == 18]
    assert sum(found) == 18
    assert cost(tuple(found)) == pytest.approx(min(map(cost, every)))
    with pytest.raises(ValueError, match="do not fit"):
        allocate(curves, 40, bounds=bounds)


def test_value_bias_folds_exactly() -> None:
    """Softmax weights sum to one, so b_v only adds W_O b_v to the output, whatever the budget."""
    weights = make_weights()
    without = dataclasses.replace(weights, v_bias=torch.zeros(DIM, dtype=torch.float64))
    outputs = [run(convert(w, lossy()), lossy(), "token", None, make_inputs(), "expanded") for w in (weights, without)]
    shift = weights.o_weight @ weights.v_bias
    assert relative(outputs[0], outputs[1] + shift) < EXACT


@pytest.mark.parametrize("scale", [0.1, 10.0])
def test_key_scale_does_not_matter(scale: float) -> None:
    """The teacher does not change when (W_K, b_k) are multiplied by a constant (up to its eps): nor may we."""
    weights = make_weights()
    scaled = dataclasses.replace(weights, k_weight=scale * weights.k_weight, k_bias=scale * weights.k_bias)
    for key_norm in ("token", "latent"):
        outputs = [
            run(convert(w, lossy(), key_norm), lossy(), key_norm, None, make_inputs(), "expanded")
            for w in (weights, scaled)
        ]
        assert relative(outputs[1], outputs[0]) < 1e-4


def test_more_budget_loses_less() -> None:
    weights, x = make_weights(), make_inputs()
    expected = longhand(weights, x)
    ranks = [relative(run(convert(weights, lossy(kv_lora_rank=r)), lossy(kv_lora_rank=r), "token", None, x, "expanded"),
                      expected) for r in (6, 20, 50)]  # fmt: skip
    assert ranks[0] > 1.2 * ranks[1] > 1.44 * ranks[2]
    narrow, full = (
        relative(run(convert(weights, layer), layer, "token", None, x, "expanded"), expected)
        for layer in (lossless(v_head_dim=5), lossless(v_head_dim=11))
    )
    assert narrow > 2 * full > 1e-3


def test_latent_is_the_best_subspace() -> None:
    """The joint error that is reported equals the tail of a float64 SVD of the weighted, whitened weights."""
    weights, layer = make_weights(), lossy(qk_nope_head_dim=0, rope_components=())
    m = moments(weights)
    root = torch.linalg.cholesky(m.covariance)
    out = weights.o_weight.reshape(DIM, HEADS, WIDTH).transpose(0, 1)
    values = weights.v_weight.reshape(HEADS, WIDTH, DIM)
    # |W_O,h dv| is what counts, so the weighted matrix may as well be W_O,h W_V,h itself, stacked over heads.
    sigma = torch.linalg.svdvals(torch.cat([o @ v for o, v in zip(out, values, strict=True)]) @ root)
    expected = float((sigma[layer.kv_lora_rank :].square().sum() / sigma.square().sum()).sqrt())
    assert convert(weights, layer).errors["latent"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("rope", ["latent", "head"])
def test_a_latent_weighs_keys_by_what_their_scores_do_to_the_output(rope: RopeMode) -> None:
    """The error that is reported against the tail of a float64 SVD of keys and values, each weighed longhand.

    A head's output moves with its scores as far as its values spread, |W_O,h (v_h - E v_h)|. Keys that do not turn meet
    queries with all their correlations. Keys that turn meet each pair's power alone, half of it in either channel.
    """
    weights = make_weights()
    m = moments(weights)
    root = torch.linalg.cholesky(m.covariance)
    keys = ((weights.norm_k[:, None] * weights.k_weight) @ root).reshape(HEADS, WIDTH, DIM)
    out = weights.o_weight.reshape(DIM, HEADS, WIDTH).transpose(0, 1)
    values = out @ (weights.v_weight @ root).reshape(HEADS, WIDTH, DIM)
    spread = values.square().sum((1, 2)) * m.inverse_norm**2 / WIDTH
    if rope == "latent":  # they turn by their mean rotation, conjugated
        pairs = torch.complex(keys[:, 0::2], keys[:, 1::2]) * m.rho.conj()[:, None]
        keys = torch.stack((pairs.real, pairs.imag), 2).flatten(1, 2)
        grams = m.query
    else:
        grams = torch.zeros_like(m.query)
        for channel in range(WIDTH):
            pair = [channel // 2 * 2, channel // 2 * 2 + 1]
            grams[:, channel, channel] = m.query[:, pair, pair].sum(1) / 2
    weighted = torch.cat([(spread[h] ** 0.5) * torch.linalg.cholesky(grams[h]).T @ keys[h] for h in range(HEADS)])
    sigma = torch.linalg.svdvals(torch.cat((weighted, values.flatten(0, 1))))
    layer = lossy(qk_nope_head_dim=WIDTH, rope_components=())
    expected = float((sigma[layer.kv_lora_rank :].square().sum() / sigma.square().sum()).sqrt())
    assert convert(weights, layer, rope=rope).errors["latent"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("rank", [3, 13, 47])
def test_a_compressed_query_keeps_the_length_that_its_directions_hold(rank: int) -> None:
    """A normed query has the length sqrt(D), so its normed latent must have sqrt(D * the share of energy it holds)."""
    weights = make_weights()
    m = moments(weights)
    root = torch.linalg.cholesky(m.covariance)
    # Root mean squares over the inputs: what varies, and what their mean gives.
    rows = torch.cat((weights.q_weight @ root, (weights.q_weight @ m.mean + weights.q_bias)[:, None]), 1)
    energy = torch.linalg.svdvals(rows).square()
    kept = float(energy[:rank].sum() / energy.sum())
    factors = convert(weights, lossy(), q_rank=rank)
    gain = factors.tensors["q_a_layernorm.weight"]
    assert gain.shape == (rank,)
    assert gain.unique().numel() == 1
    assert float(gain.square().sum()) == pytest.approx(DIM * kept, rel=1e-5)
    assert factors.errors["query"] == pytest.approx((1 - kept) ** 0.5, rel=1e-4)


def test_shared_rotary_key_is_the_best_rank_one() -> None:
    """Against a float64 SVD of the importance-weighted complex keys of the kept pairs; a head mean does worse."""
    weights, pair = make_weights(), 4
    m = moments(weights)
    second = torch.zeros(DIM + 1, DIM + 1, dtype=torch.float64)
    second[:DIM, :DIM] = m.covariance + torch.outer(m.mean, m.mean)
    second[DIM, :DIM] = second[:DIM, DIM] = m.mean
    second[DIM, DIM] = 1
    root = torch.linalg.cholesky(second)
    keys = affine(weights.norm_k[:, None] * weights.k_weight, weights.norm_k * weights.k_bias)
    keys = keys.reshape(HEADS, WIDTH, DIM + 1)
    z = torch.complex(keys[:, 2 * pair], keys[:, 2 * pair + 1])
    power = m.query.diagonal(dim1=1, dim2=2)[:, [2 * pair, 2 * pair + 1]].sum(1)
    values = weights.v_weight.reshape(HEADS, WIDTH, DIM) @ torch.linalg.cholesky(m.covariance)
    outputs = weights.o_weight.reshape(DIM, HEADS, WIDTH).transpose(0, 1) @ values
    power = (power * outputs.square().sum((1, 2))).sqrt()[:, None]  # how far a head's scores move the output
    weighted = (power * z) @ root.to(z.dtype)
    sigma = torch.linalg.svdvals(weighted)
    factors = convert(weights, lossy(rope_components=((pair, 1),)))
    assert factors.errors["rope"] == pytest.approx(
        float((sigma[1:].square().sum() / sigma.square().sum()).sqrt()), rel=1e-4
    )
    mean = (power * (z - z.mean(0)) @ root.to(z.dtype)).abs().square().sum().sqrt() / sigma.norm()
    assert factors.errors["rope"] < 0.98 * float(mean)
    # The shared key and the heads' factors that are written reproduce that approximation.
    row = torch.cat(
        (factors.tensors["kv_a_proj_with_mqa.weight"][-2:], factors.tensors["kv_a_proj_with_mqa.bias"][-2:, None]), 1
    )
    turn = factors.tensors["q_b_proj.weight"][:, -2:, 2 * pair : 2 * pair + 2]
    a = torch.complex(turn[:, 0, 0], turn[:, 0, 1])
    missed = weighted - power * torch.outer(a, torch.complex(row[0], row[1])) @ root.to(z.dtype)
    assert float(missed.abs().square().sum().sqrt() / sigma.norm()) == pytest.approx(factors.errors["rope"], rel=1e-4)


def test_rotation_frequencies_are_never_regenerated() -> None:
    """A lone kept pair of the width axis still turns by Wan's own frequency."""
    pair = SPLIT[0] + SPLIT[1] + 1
    layer = lossless(kv_lora_rank=DIM, qk_nope_head_dim=WIDTH, rope_components=((pair, HEADS),))
    weights, x = make_weights(), make_inputs()
    only = torch.zeros(WIDTH // 2, dtype=torch.bool)
    only[pair] = True
    silent = only.repeat_interleave(2).logical_not().repeat(HEADS)
    weights = dataclasses.replace(weights, norm_k=weights.norm_k.masked_fill(silent, 0.0))
    assert relative(run(convert(weights, layer), layer, "token", None, x, "expanded"), longhand(weights, x)) < EXACT


def test_highest_pairs_are_the_papers() -> None:
    assert highest_pairs((22, 21, 21), 16) == tuple((p, 1) for p in [*range(6), *range(22, 27), *range(43, 48)])
    assert highest_pairs((6, 5, 5), 4) == ((0, 1), (1, 1), (6, 1), (11, 1))


@pytest.mark.parametrize("streaming", [None, StreamingConfig(chunk_frames=2, window_frames=5, sink_frames=1)])
def test_mean_rotation_counts_every_pair(streaming: StreamingConfig | None) -> None:
    queries, keys = full_window(streaming, 4)
    rho = mean_rotation(SPLIT, queries=queries, keys=keys, height=2, width=3)
    frames = 5 if streaming else 4
    turn = torch.exp(1j * angles(torch.arange(frames), 2, 3, SPLIT))
    queries = turn[-2 * 6 :] if streaming else turn
    expected = torch.stack([q * k.conj() for q in queries for k in turn]).mean(0)
    assert relative(torch.view_as_real(rho), torch.view_as_real(expected)) < EXACT


def test_modulation_moments_are_those_of_sampled_inputs() -> None:
    """A million draws of white noise through the modulation, at equally likely timesteps."""
    weights, modulation = make_weights(), make_modulation()
    m, count, g = moments(weights), 100_000, torch.Generator().manual_seed(5)
    white = torch.randn(3, count, DIM, generator=g, dtype=torch.float64)
    x = (white * (1 + modulation[:, 1:]) + modulation[:, :1]).flatten(0, 1)
    assert relative(m.mean, x.mean(0)) < 0.02
    assert relative(m.covariance, torch.cov(x.T)) < 0.05
    q = x @ weights.q_weight.T + weights.q_bias
    q = q / q.square().mean(1, keepdim=True).sqrt() * weights.norm_q
    second = torch.einsum("nhd,nhe->hde", *(2 * [q.unflatten(1, (HEADS, WIDTH))])) / len(x)
    assert relative(m.query, second) < 0.05
    k = x @ weights.k_weight.T + weights.k_bias
    assert m.inverse_norm == pytest.approx(float(k.square().mean(1).rsqrt().mean()), rel=0.05)


def test_modulation_moments_in_closed_form() -> None:
    """Timestep by timestep: an input is white noise times 1 + scale, plus shift, and all that is linear follows."""
    weights, modulation = make_weights(), make_modulation()
    m, share = moments(weights), 1 / len(modulation)
    assert relative(m.mean, torch.stack([shift for shift, _ in modulation]).mean(0)) < EXACT
    second = torch.zeros(3, DIM, DIM, dtype=torch.float64)  # of x, q and k, before their norms
    for shift, scale in modulation:
        noise = torch.diag((1 + scale) ** 2)
        maps = ((torch.eye(DIM), 0), (weights.q_weight, weights.q_bias), (weights.k_weight, weights.k_bias))
        for i, (matrix, bias) in enumerate(maps):
            mean = matrix.double() @ shift + bias
            second[i] += share * (matrix.double() @ noise @ matrix.double().T + torch.outer(mean, mean))
    assert relative(m.covariance, second[0] - torch.outer(m.mean, m.mean)) < EXACT
    assert m.inverse_norm == pytest.approx(float(second[2].trace() / DIM + EPS) ** -0.5, rel=1e-5)
    normed = torch.diag(weights.norm_q) @ second[1] @ torch.diag(weights.norm_q) / (second[1].trace() / DIM + EPS)
    heads = torch.stack([normed[h * WIDTH : (h + 1) * WIDTH, h * WIDTH : (h + 1) * WIDTH] for h in range(HEADS)])
    assert relative(m.query, heads) < 1e-5  # its root is damped


def test_roots_and_directions() -> None:
    g = torch.Generator().manual_seed(3)
    a = torch.randn(9, 7, generator=g, dtype=torch.float64)
    root = cholesky(a.T @ a)
    assert relative(root @ root.T, a.T @ a) < 1e-5
    basis, kept = leading_directions(a.T @ a, 3)
    _, sigma, vh = torch.linalg.svd(a)
    assert relative(basis @ basis.T, vh[:3].T @ vh[:3]) < 1e-9
    assert kept == pytest.approx(float(sigma[:3].square().sum() / sigma.square().sum()))


@pytest.mark.parametrize("kind", ["triangular", "diagonal"])
def test_roots_multiply_and_divide(kind: str) -> None:
    g = torch.Generator().manual_seed(4)
    diagonal, rows = torch.rand(7, generator=g).double() + 0.1, torch.randn(3, 7, generator=g, dtype=torch.float64)
    covariance = torch.diag(diagonal) + rows.T @ rows
    damped = covariance + 1e-6 * covariance.trace() / 7 * torch.eye(7)
    made: Root = DiagonalRoot.of(diagonal, rows) if kind == "diagonal" else TriangularRoot(cholesky(covariance))
    root = made.apply(torch.eye(7, dtype=torch.float64))
    assert relative(root @ root.T, damped) < EXACT
    x = torch.randn(2, 5, 7, generator=g, dtype=torch.float64)
    assert relative(made.apply(x), x @ root) < EXACT
    assert relative(made.solve(x), x @ torch.linalg.inv(root)) < 1e-10
    assert relative(made.left(x[0].T), root @ x[0].T) < EXACT


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("layout", ["rows", "part of wider rows", "columns"])
def test_gram_matrices_add_up(threads: int, layout: str) -> None:
    rows = torch.randn(9, 601, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    given = {
        "rows": rows,
        "part of wider rows": torch.cat((rows, rows[:, :2]), 1)[:, :601],
        "columns": rows.T.contiguous().T,
    }[layout]
    before = torch.get_num_threads()
    total = torch.zeros(601, 601, dtype=torch.float64)
    try:
        torch.set_num_threads(threads)
        add_gram(total, given[:4])
        add_gram(total, given[4:])
    finally:
        torch.set_num_threads(before)
    assert relative(mirror(total), rows.T @ rows) < EXACT


@pytest.mark.parametrize(("dim", "rank"), [(1, 1), (2, 1), (3, 3), (23, 1), (23, 22), (23, 23)])
def test_leading_directions_of_any_size(dim: int, rank: int) -> None:
    rows = torch.randn(2 * dim, dim, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    basis, kept = leading_directions(rows.T @ rows, rank)
    _, sigma, vh = torch.linalg.svd(rows)
    assert relative((basis * sigma[:rank].square()) @ basis.T, (vh[:rank].T * sigma[:rank].square()) @ vh[:rank]) < 1e-9
    assert kept == pytest.approx(float(sigma[:rank].square().sum() / sigma.square().sum()))


def test_directions_of_a_degenerate_matrix() -> None:
    """Most eigenvalues zero and the others equal: still orthonormal, and what is kept is all."""
    basis, kept = leading_directions(torch.diag((torch.arange(40) < 5).double()), 9)
    assert relative(basis.T @ basis, torch.eye(9, dtype=torch.float64)) < EXACT
    assert kept == 1.0
    with pytest.raises(np.linalg.LinAlgError):
        leading_directions(torch.full((5, 5), torch.nan, dtype=torch.float64), 2)


def test_random_layer_is_seeded_and_keeps_what_is_shared() -> None:
    weights = make_weights()

    def draw(seed: int, q_rank: int | None, v: int) -> Factors:
        generator = torch.Generator().manual_seed(seed)
        layer = lossy(v_head_dim=v)
        return random_layer(weights, layer, num_heads=HEADS, key_norm="token", q_lora_rank=q_rank, generator=generator)

    one, same, other = draw(1, 13, WIDTH), draw(1, 13, WIDTH), draw(2, 13, WIDTH)
    assert all(torch.equal(one.tensors[k], same.tensors[k]) for k in one.tensors)
    assert not torch.equal(one.tensors["kv_b_proj.weight"], other.tensors["kv_b_proj.weight"])
    assert torch.equal(one.tensors["o.weight"], weights.o_weight)
    assert torch.equal(draw(1, None, 7).tensors["q_a_proj.weight"], weights.q_weight)
    out = run(one, lossy(), "token", 13, make_inputs(), "expanded")
    assert out.isfinite().all()
    assert float(one.tensors["kv_a_proj_with_mqa.weight"].std()) == pytest.approx(DIM**-0.5, rel=0.05)
