"""Norms of each head, and keys and values that turn by cameras too, in float64, against attention written longhand."""

from __future__ import annotations

import pytest
import torch
from support import relative
from torch import Tensor

from mlaconvert.config.camera import CameraConfig
from mlaconvert.config.mla import MLAConfig, MLALayer
from mlaconvert.latent.factorize import Factors, factorize_layer
from mlaconvert.latent.metric import DenseLayer
from mlaconvert.latent.moments import LayerMoments, modulation_moments
from mlaconvert.latent.random_start import random_layer
from mlaconvert.latent.weights import AttentionWeights
from mlaconvert.model.camera.attention import LatentCameraAttention
from mlaconvert.model.camera.turns import Cameras, Turns
from mlaconvert.model.rope import rotary

DIM, HEADS, WIDTH, SPLIT, EPS = 36, 3, 12, (1, 3, 2), 1e-6
GRID, PAST = (2, 3), 3  # tokens of a frame, frames of the past
CONFIG = CameraConfig(
    dim=DIM, num_heads=HEADS, num_layers=1, ffn_dim=8, rope_dims=(2, 6, 4), refiner_dim=8, in_dim=3, out_dim=2
)


@pytest.fixture
def weights() -> AttentionWeights:
    g = torch.Generator().manual_seed(1)
    square = {f"{p}_weight": torch.randn(DIM, DIM, generator=g).double() for p in "qkvo"}
    biases = {f"{p}_bias": torch.randn(DIM, generator=g).double() for p in "qkvo"}
    square["k_weight"][:WIDTH] *= 5  # a head whose keys are long, and one whose are short
    square["k_weight"][2 * WIDTH :] /= 4
    gains = {name: 1 + 0.3 * torch.randn(WIDTH, generator=g).double() for name in ("norm_q", "norm_k")}
    return AttentionWeights(**square, **biases, **gains, camera_o=torch.randn(DIM, DIM, generator=g).double())


@pytest.fixture
def moments(weights: AttentionWeights) -> LayerMoments:
    modulation = 0.3 * torch.randn(4, 2, DIM, generator=torch.Generator().manual_seed(2)).double()
    return modulation_moments(
        weights, modulation, num_heads=HEADS, eps=EPS, rho=torch.ones(WIDTH // 2, dtype=torch.complex128)
    )


def mla(rank: int) -> tuple[MLAConfig, MLALayer]:
    layer = MLALayer(kv_lora_rank=rank, qk_nope_head_dim=WIDTH, v_head_dim=WIDTH, rope_components=())
    section = MLAConfig(
        q_lora_rank=None, key_norm="token", softmax_scale=WIDTH**-0.5, layers=(layer,), rope="head", present="exact"
    )
    return section, layer


def factorize(weights: AttentionWeights, moments: LayerMoments, rank: int) -> Factors:
    section, layer = mla(rank)
    return factorize_layer(weights, layer, moments, num_heads=HEADS, mla=section)


def attention(factors: Factors, rank: int) -> LatentCameraAttention:
    section, layer = mla(rank)
    module = LatentCameraAttention(CONFIG, section, layer).double().requires_grad_(False)
    module.load_state_dict(factors.tensors)
    return module


def cameras(frames: int) -> Cameras:
    g = torch.Generator().manual_seed(frames)
    view = torch.eye(4, dtype=torch.float64).repeat(frames, 1, 1)
    view[:, :3, :3] = torch.linalg.qr(torch.randn(frames, 3, 3, generator=g).double()).Q
    view[:, :3, 3] = torch.randn(frames, 3, generator=g).double()
    lens = torch.zeros(frames, 3, 3, dtype=torch.float64)
    lens[:, 0, 0], lens[:, 1, 1], lens[:, 2, 2] = 1.2, 0.7, 1
    return Cameras(view, lens)


def longhand(w: AttentionWeights, x: Tensor, seen: Cameras, text: tuple[Tensor, Tensor], queries: int) -> Tensor:
    """Both outputs of the last `queries` tokens of x [N, D], one token pair after another, [queries, D] each."""
    frame = GRID[0] * GRID[1]

    def heads(y: Tensor) -> Tensor:
        return y.reshape(len(y), HEADS, WIDTH)

    def norm(y: Tensor, gain: Tensor) -> Tensor:
        return y / (y.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * gain

    q = norm(heads(x @ w.q_weight.T + w.q_bias), w.norm_q)
    k = norm(heads(x @ w.k_weight.T + w.k_bias), w.norm_k)
    v = heads(x @ w.v_weight.T + w.v_bias)
    turns, images = [], []
    for token in range(len(x)):
        time, row, column = token // frame, token % frame // GRID[1], token % GRID[1]
        angles = [at * 256.0 ** (-i / n) for at, n in zip((time, row, column), SPLIT, strict=True) for i in range(n)]
        parts = [
            torch.tensor([[a.cos(), -a.sin()], [a.sin(), a.cos()]]) for a in torch.tensor(angles, dtype=torch.float64)
        ]
        turns.append(torch.block_diag(*parts))
        view, lens = seen.viewmats[time], seen.intrinsics[time]
        focal = torch.diag(torch.stack((lens[0, 0], lens[1, 1], torch.ones(()).double(), torch.ones(()).double())))
        images.append(torch.kron(torch.eye(WIDTH // 4).double(), focal @ view))
    out = torch.zeros(2, queries, HEADS, WIDTH, dtype=torch.float64)
    for head in range(HEADS):
        for place in range(queries):
            i = len(x) - queries + place
            for kind, query in enumerate((turns[i] @ q[i, head], images[i].T @ q[i, head])):
                scores, values = [query @ key for key in text[0][:, head]], list(text[1][:, head])  # are not turned
                for j in range(len(x)):
                    turn = turns[j] if kind == 0 else torch.linalg.inv(images[j])
                    scores.append(query @ (turn @ k[j, head]))
                    values.append(v[j, head] if kind == 0 else turn @ v[j, head])
                share = (torch.stack(scores) / WIDTH**0.5).softmax(0)
                made = share @ torch.stack(values)
                out[kind, place, head] = made if kind == 0 else images[i] @ made
    return out.flatten(-2)


def test_a_latent_as_wide_as_the_model_is_the_teacher(weights: AttentionWeights, moments: LayerMoments) -> None:
    """Both turned copies of the past's keys and values are made of one latent and a norm of each head."""
    module = attention(factorize(weights, moments, DIM), DIM)
    size, g = GRID[0] * GRID[1], torch.Generator().manual_seed(3)
    x, text = torch.randn((PAST + 1) * size, DIM, generator=g).double(), torch.randn(2, 5, HEADS, WIDTH, generator=g)
    before, newest = (
        Turns.of(
            rotary(torch.arange(PAST + 1)[some], *GRID, CONFIG.rope_split, dtype=torch.float64, theta=256.0),
            Cameras(*(part[some] for part in cameras(PAST + 1))),
        )
        for some in (slice(PAST), slice(PAST, None))
    )
    *_, cached = module(x[None, : PAST * size], before, keep=True)
    assert [part.shape for part in cached] == [(1, PAST * size, DIM), (1, PAST * size, HEADS)]
    keys, values = text.double()
    out, by_camera, _ = module(x[None, PAST * size :], newest, (keys[None], values[None]), (cached, before))
    expected = longhand(weights, x, cameras(PAST + 1), (keys, values), size)
    assert relative(out[0], expected[0] @ weights.o_weight.T + weights.o_bias) < 1e-12
    assert relative(by_camera[0], expected[1]) < 1e-12


def test_moments_have_a_norm_of_each_head(weights: AttentionWeights, moments: LayerMoments) -> None:
    """1 / sqrt(E|W x + b|^2) of a head's rows, and queries whose mean square is their gain's."""
    rows = torch.cat((weights.k_weight, weights.k_bias[:, None]), 1)
    second = torch.eye(DIM + 1, dtype=torch.float64)
    second[:DIM, :DIM] = moments.covariance + moments.mean.outer(moments.mean)
    second[:DIM, DIM] = second[DIM, :DIM] = moments.mean
    power = torch.einsum("rc,cd,rd->r", rows, second, rows).unflatten(0, (HEADS, WIDTH)).mean(1)
    assert moments.head_inverse_norms is not None
    assert relative(moments.head_inverse_norms, power.rsqrt()) < 1e-5  # but for the damping of the covariance
    assert float(power.max() / power.min()) > 100
    for head in range(HEADS):
        ungained = moments.query[head].diagonal() / weights.norm_q.square()
        assert float(ungained.mean()) == pytest.approx(1, abs=1e-5)


def test_an_error_counts_by_both_outputs_and_its_heads_norm(weights: AttentionWeights, moments: LayerMoments) -> None:
    dense = DenseLayer.of(weights, moments, HEADS)
    assert weights.camera_o is not None
    for head in range(HEADS):
        rows = slice(head * WIDTH, (head + 1) * WIDTH)
        outputs = sum(o[:, rows].T @ o[:, rows] for o in (weights.o_weight, weights.camera_o))
        assert relative(dense.out_gram[head], outputs) < 1e-12
        value = weights.v_weight[rows] @ moments.covariance @ weights.v_weight[rows].T
        assert moments.head_inverse_norms is not None
        expected = (outputs * value).sum() * moments.head_inverse_norms[head] ** 2 / WIDTH
        assert relative(dense.score_weight[head], expected) < 1e-5


@pytest.mark.parametrize("rank", [7, 20])
def test_the_factors_are_the_best_of_their_rank(weights: AttentionWeights, moments: LayerMoments, rank: int) -> None:
    """In the metric of both outputs a latent beats one that forgets cameras, and one that norms all heads alike."""
    plain = AttentionWeights(**{name: value for name, value in vars(weights).items() if name != "camera_o"})
    dense = DenseLayer.of(weights, moments, HEADS)

    def lost(factors: Factors) -> float:
        """The output error of what the latent keeps of keys and values, to first order, for x = R z + mean."""
        t, root = factors.tensors, torch.linalg.cholesky(moments.covariance)
        through = t["kv_b_proj.weight"] @ t["kv_a_proj_with_mqa.weight"] @ root
        kept = through.unflatten(0, (HEADS, 2, WIDTH))
        total = 0.0
        for head in range(HEADS):
            rows = slice(head * WIDTH, (head + 1) * WIDTH)
            key = kept[head, 0] - weights.norm_k[:, None] * weights.k_weight[rows] @ root
            value = kept[head, 1] - weights.v_weight[rows] @ root
            pairs = dense.importance[head].repeat_interleave(2)
            total += float((pairs[:, None] * key.square()).sum() + (value * (dense.out_gram[head] @ value)).sum())
        return total

    best = lost(factorize(weights, moments, rank))
    alike = LayerMoments(**{**vars(moments), "head_inverse_norms": None})
    assert best < 0.99 * lost(factorize(plain, moments, rank))
    assert best < 0.99 * lost(factorize(weights, alike, rank))


def test_a_random_layer_keeps_what_is_the_teachers(weights: AttentionWeights) -> None:
    section, layer = mla(5)
    made = random_layer(
        weights, layer, num_heads=HEADS, mla=section, generator=torch.Generator().manual_seed(1)
    ).tensors
    attention(Factors(tensors=made, errors={}), 5)  # takes all of them, of these shapes
    assert made["k_norm.weight"] is weights.norm_k
    assert made["q_a_layernorm.weight"] is weights.norm_q
