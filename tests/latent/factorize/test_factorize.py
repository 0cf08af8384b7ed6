"""The identities of a conversion, in float64, against attention written out longhand."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import numpy as np
import pytest
import torch
from factorize_cases import (
    DIM,
    EPS,
    EXACT,
    GRID,
    HEADS,
    SPLIT,
    WIDTH,
    convert,
    lossy,
    make_inputs,
    make_weights,
    moments,
    run,
)
from support import relative
from torch import Tensor

from mlaconvert.config.mla import KeyNorm, MLALayer, RopeMode
from mlaconvert.errors import InputError
from mlaconvert.latent.components import choose_components
from mlaconvert.latent.factorize import narrower
from mlaconvert.latent.matrices import add_gram, leading_directions, mirror
from mlaconvert.latent.weights import AttentionWeights
from mlaconvert.model.rope import angles


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


def lossless(**change: Any) -> MLALayer:
    every = tuple((pair, HEADS) for pair in range(WIDTH // 2))
    layer = MLALayer(kv_lora_rank=DIM, qk_nope_head_dim=0, v_head_dim=WIDTH, rope_components=every)
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
    assert convert(weights, layer, rope=rope).errors.get("rope", 0.0) == 0.0
    expected = float((sigma[layer.kv_lora_rank :].square().sum() / sigma.square().sum()).sqrt())
    assert convert(weights, layer, rope=rope).errors["latent"] == pytest.approx(expected, rel=1e-5)


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
    basis, _, kept = leading_directions(rows.T @ rows, rank)
    _, sigma, vh = torch.linalg.svd(rows)
    assert relative((basis * sigma[:rank].square()) @ basis.T, (vh[:rank].T * sigma[:rank].square()) @ vh[:rank]) < 1e-9
    assert kept == pytest.approx(float(sigma[:rank].square().sum() / sigma.square().sum()))


def test_directions_of_a_degenerate_matrix() -> None:
    """Most eigenvalues zero and the others equal: still orthonormal, and what is kept is all."""
    basis, _, kept = leading_directions(torch.diag((torch.arange(40) < 5).double()), 9)
    assert relative(basis.T @ basis, torch.eye(9, dtype=torch.float64)) < EXACT
    assert kept == 1.0
    basis, _, kept = leading_directions(torch.zeros(5, 5, dtype=torch.float64), 2)
    assert relative(basis.T @ basis, torch.eye(2, dtype=torch.float64)) < EXACT
    assert kept == 1.0  # there is nothing to lose
    with pytest.raises(np.linalg.LinAlgError):
        leading_directions(torch.full((5, 5), torch.nan, dtype=torch.float64), 2)
