"""The identities of a conversion, in float64, against attention written out longhand."""

from __future__ import annotations

from functools import partial
from itertools import combinations, combinations_with_replacement, product

import pytest
import torch
from factorize_cases import (
    DIM,
    EXACT,
    HEADS,
    SPLIT,
    WIDTH,
    convert,
    lossy,
    make_inputs,
    make_modulation,
    make_weights,
    moments,
    run,
)
from support import relative

from mlaconvert.config.mla import MLAConfig
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.latent.allocate import allocate
from mlaconvert.latent.components import choose_components
from mlaconvert.latent.factorize import Factors
from mlaconvert.latent.matrices import affine, leading_directions
from mlaconvert.latent.moments import modulation_moments
from mlaconvert.latent.pairs import highest_pairs, mean_rotation
from mlaconvert.latent.random_start import random_layer
from mlaconvert.latent.roots import DiagonalRoot, Root, TriangularRoot, cholesky
from mlaconvert.model.rope import angles
from mlaconvert.model.window import full_window


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


@pytest.mark.slow
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
    eps, share = 0.2, 1 / len(modulation)  # large enough to see
    rho = torch.zeros(WIDTH // 2, dtype=torch.complex128)
    m = modulation_moments(weights, modulation, num_heads=HEADS, eps=eps, rho=rho)
    assert relative(m.mean, torch.stack([shift for shift, _ in modulation]).mean(0)) < EXACT
    second = torch.zeros(3, DIM, DIM, dtype=torch.float64)  # of x, q and k, before their norms
    for shift, scale in modulation:
        noise = torch.diag((1 + scale) ** 2)
        maps = ((torch.eye(DIM), 0), (weights.q_weight, weights.q_bias), (weights.k_weight, weights.k_bias))
        for i, (matrix, bias) in enumerate(maps):
            mean = matrix.double() @ shift + bias
            second[i] += share * (matrix.double() @ noise @ matrix.double().T + torch.outer(mean, mean))
    assert relative(m.covariance, second[0] - torch.outer(m.mean, m.mean)) < EXACT
    assert m.inverse_norm == pytest.approx(float(second[2].trace() / DIM + eps) ** -0.5, rel=1e-5)
    normed = torch.diag(weights.norm_q) @ second[1] @ torch.diag(weights.norm_q) / (second[1].trace() / DIM + eps)
    heads = torch.stack([normed[h * WIDTH : (h + 1) * WIDTH, h * WIDTH : (h + 1) * WIDTH] for h in range(HEADS)])
    assert relative(m.query, heads) < 1e-5  # its root is damped


def test_roots_and_directions() -> None:
    g = torch.Generator().manual_seed(3)
    a = torch.randn(9, 7, generator=g, dtype=torch.float64)
    root = cholesky(a.T @ a)
    assert relative(root @ root.T, a.T @ a) < 1e-5
    basis, _, kept = leading_directions(a.T @ a, 3)
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


def test_random_layer_is_seeded_and_keeps_what_is_shared() -> None:
    weights = make_weights()

    def draw(seed: int, q_rank: int | None, v: int) -> Factors:
        generator = torch.Generator().manual_seed(seed)
        layer = lossy(v_head_dim=v)
        mla = MLAConfig(key_norm="token", q_lora_rank=q_rank, softmax_scale=1.0, layers=())
        return random_layer(weights, layer, num_heads=HEADS, mla=mla, generator=generator)

    one, same, other = draw(1, 13, WIDTH), draw(1, 13, WIDTH), draw(2, 13, WIDTH)
    assert all(torch.equal(one.tensors[k], same.tensors[k]) for k in one.tensors)
    assert not torch.equal(one.tensors["kv_b_proj.weight"], other.tensors["kv_b_proj.weight"])
    assert torch.equal(one.tensors["o.weight"], weights.o_weight)
    assert torch.equal(draw(1, None, 7).tensors["q_a_proj.weight"], weights.q_weight)
    out = run(one, lossy(), "token", 13, make_inputs(), "expanded")
    assert out.isfinite().all()
    assert float(one.tensors["kv_a_proj_with_mqa.weight"].std()) == pytest.approx(DIM**-0.5, rel=0.05)
