"""Calibration on a small checkpoint of odd sizes, against loops and least squares written out longhand in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from calibrate_cases import CONFIG, DIM, EVERY, EXACT, HEADS, SMALL, SPLIT, TOKENS, WIDTH, make_layer, target
from support import relative
from torch import Tensor

from mlaconvert.config.mla import KeyNorm, RopeMode
from mlaconvert.conversion.calibration.layer import Layer
from mlaconvert.conversion.calibration.measure import layer_moments
from mlaconvert.conversion.calibration.newest import attention_error
from mlaconvert.conversion.calibration.refit import refit_output, refit_query
from mlaconvert.model.attention.latent import LatentAttention
from mlaconvert.model.rope import angles


def query_weight(student: LatentAttention) -> Tensor:
    """q_b_proj's weight by head, [H, nope + rope, f]."""
    weight: Tensor = student.q_b_proj.weight  # type: ignore[assignment]
    return weight if weight.ndim == 3 else weight.unflatten(0, (HEADS, -1))


def lossy(layer: Layer, budget: int = 13, *, q_rank: int | None = None, rope: RopeMode = "cached",
          key_norm: KeyNorm = "token") -> LatentAttention:  # fmt: skip
    made = target(key_norm, q_rank=q_rank, rope=rope)
    return made.convert(layer, made.layer(budget, () if rope == "head" else SMALL), layer_moments(layer))


def test_attention_error_is_of_counted_queries() -> None:
    """Relative Frobenius over all windows at once: what earlier queries get does not matter."""
    layer = make_layer(6)
    student = lossy(layer)
    missed, whole = [], []
    for batch in layer.inputs:
        teacher, found = layer.attention(batch.x, batch.plan), student(batch.x, batch.plan)
        missed.append((found - teacher)[:, batch.first_query :].flatten())
        whole.append(teacher[:, batch.first_query :].flatten())
    expected = float(torch.cat(missed).norm() / torch.cat(whole).norm())
    assert attention_error(layer, student) == pytest.approx(expected, rel=1e-9)
    assert 0.05 < expected < 0.9


@pytest.mark.parametrize("ridge", [1e-5, 1e-3, 0.3])
def test_refit_output_is_ridge_regression(ridge: float) -> None:
    """Stacked rows and lstsq: tokens, and rows that hold each weight where it was; the bias is free."""
    layer = make_layer(0, batch=3)
    student = lossy(layer)
    before, old = attention_error(layer, student), student.o.weight.clone()
    caught: list[Tensor] = []
    hook = student.o.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    expected = []
    for batch in layer.inputs:
        student(batch.x, batch.plan)
        caught[-1] = caught[-1][:, batch.first_query :].flatten(0, 1)
        expected.append(layer.attention(batch.x, batch.plan)[:, batch.first_query :].flatten(0, 1))
    hook.remove()
    heads, teacher = torch.cat(caught), torch.cat(expected)
    hold = (len(heads) * ridge * heads.var(0, correction=0).mean()).sqrt()
    stay = torch.cat((hold * torch.eye(DIM).double(), torch.zeros(DIM, 1).double()), 1)
    rows = torch.cat((torch.cat((heads, torch.ones(len(heads), 1).double()), 1), stay))
    solution = torch.linalg.lstsq(rows, torch.cat((teacher, hold * old.T)), driver="gelsd").solution
    refit_output(layer, student, ridge=ridge)
    assert relative(student.o.weight, solution[:-1].T) < 1e-7
    assert relative(student.o.bias, solution[-1]) < 1e-7
    assert attention_error(layer, student) < 0.97 * before


@pytest.mark.parametrize("seed", range(4))
def test_refit_output_never_loses_on_what_it_saw(seed: int) -> None:
    layer = make_layer(seed)
    errors = []
    for ridge in (1e-9, 1e-3, 1e-1, 1e3):
        student = lossy(layer, key_norm="latent")
        before = attention_error(layer, student)
        refit_output(layer, student, ridge=ridge)
        errors.append(attention_error(layer, student))
        assert errors[-1] <= before * (1 + EXACT)
    assert errors == sorted(errors)
    assert errors[0] < 0.9 * errors[-1]


def score_problem(layer: Layer, student: LatentAttention, head: int) -> tuple[Tensor, Tensor]:
    """Rows [pairs, width * f] and targets [pairs] of the weighted score error of one head, query by query.

    A student's score is linear in the query up-projection: scale * (W features) . key, its rotary part turned by the
    distance from query to key, as complex numbers.
    """
    a, shape = layer.attention, student.layer
    scale, own = WIDTH**-0.5, slice(head * WIDTH, head * WIDTH + WIDTH)
    up, _, bias, _ = (part[head] for part in student.kv_b_proj())
    rows, targets = [], []

    def normed(x: Tensor, gain: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + CONFIG.eps).sqrt() * gain

    for batch in layer.inputs:
        turn = torch.exp(1j * angles(torch.arange(batch.x.shape[1] // TOKENS), 2, 3, SPLIT))
        for x in batch.x:
            q = normed(a.q(x), a.norm_q.weight)[:, own]
            k = normed(a.k(x), a.norm_k.weight)[:, own]
            q, k = (torch.complex(y[:, 0::2], y[:, 1::2]) * turn for y in (q, k))
            cached = student.kv_a_proj_with_mqa(x)
            latent, rope = cached[:, : shape.kv_lora_rank], cached[:, shape.kv_lora_rank :]
            if student.k_norm_proj is not None:
                s = 1 / (a.k(x).square().mean(-1, keepdim=True) + CONFIG.eps).sqrt()
            else:
                s, latent = torch.ones(len(x), 1).double(), normed(latent, student.kv_a_layernorm.weight)  # type: ignore[union-attr]
            if student.k_rope_proj is not None:
                rope = latent @ student.k_rope_proj.weight.T + student.k_rope_proj.bias
            keys, pairs = s * (latent @ up.T + bias), list(shape.component_pairs)
            if student.turns_heads:
                rope, keys, s = keys, keys[:, :0], torch.ones(len(x), 1).double()
                pairs = list(range(WIDTH // 2))
            shared = s * torch.complex(rope[:, 0::2], rope[:, 1::2]) * turn[:, pairs]
            features = normed(student.q_a_proj(x), student.q_a_layernorm.weight)
            features = features[:, own] if query_weight(student).shape[2] == WIDTH else features
            for i in range(batch.first_query, len(x)):
                scores = (q[i] * k.conj()).real.sum(1) * scale
                p = (scores - scores.max()).exp()
                p = p / p.sum()
                back = torch.view_as_real(shared * turn[i, pairs].conj()).flatten(1)
                key = torch.cat((keys, back), 1) * scale
                key, scores = key - p @ key, scores - p @ scores
                rows.append(p.sqrt()[:, None] * (key[:, :, None] * features[i]).flatten(1))
                targets.append(p.sqrt() * scores)
    return torch.cat(rows), torch.cat(targets)


def score_error(layer: Layer, student: LatentAttention) -> float:
    total = 0.0
    for head in range(HEADS):
        rows, targets = score_problem(layer, student, head)
        total += float((rows @ query_weight(student)[head].flatten() - targets).square().sum())
    return total


@pytest.mark.parametrize(
    ("q_rank", "rope", "key_norm"),
    [
        (None, "cached", "token"),
        pytest.param(None, "latent", "latent", marks=pytest.mark.slow),
        (9, "latent", "token"),
        pytest.param(None, "head", "token", marks=pytest.mark.slow),
    ],
)
def test_refit_query_solves_the_normal_equations(q_rank: int | None, rope: RopeMode, key_norm: KeyNorm) -> None:
    layer = make_layer(1)
    student = lossy(layer, q_rank=q_rank, rope=rope, key_norm=key_norm)
    problems = [score_problem(layer, student, head) for head in range(HEADS)]
    old = query_weight(student).clone()
    refit_query(layer, student, samples=10**6, ridge=1e-2, iterations=500)
    for head, (rows, targets) in enumerate(problems):
        width = rows.shape[1]
        hold = 1e-2 * rows.square().sum() / width * torch.eye(width, dtype=torch.float64)
        solution = torch.linalg.solve(rows.T @ rows + hold, rows.T @ targets + hold @ old[head].flatten())
        assert relative(query_weight(student)[head].flatten(), solution) < 1e-8
    # And without a ridge, the least error that any up-projection has.
    refit_query(layer, student, samples=10**6, ridge=1e-12, iterations=3000)
    for head, (rows, targets) in enumerate(problems):
        best = torch.linalg.lstsq(rows, targets, driver="gelsd").solution
        least = float((rows @ best - targets).square().sum())
        found = float((rows @ query_weight(student)[head].flatten() - targets).square().sum())
        assert least < 0.97 * float((rows @ old[head].flatten() - targets).square().sum())
        assert found == pytest.approx(least, rel=1e-4)


@pytest.mark.parametrize("q_rank", [None, 30])
def test_refit_query_mends_a_perturbed_query(q_rank: int | None) -> None:
    """Judged on inputs that it did not see."""
    layer = make_layer(2, batch=20)
    seen = dataclasses.replace(layer, inputs=[dataclasses.replace(i, x=i.x[:16]) for i in layer.inputs])
    unseen = dataclasses.replace(layer, inputs=[dataclasses.replace(i, x=i.x[16:]) for i in layer.inputs])
    student = lossy(seen, 24, q_rank=q_rank)
    right = attention_error(unseen, student)
    noise = torch.randn(query_weight(student).shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    query_weight(student).add_(0.3 * noise)
    perturbed, before = attention_error(unseen, student), score_error(unseen, student)
    assert perturbed > 1.2 * right
    refit_query(seen, student)
    assert score_error(unseen, student) < 0.5 * before
    assert attention_error(unseen, student) < right + 0.3 * (perturbed - right)


@pytest.mark.parametrize("q_rank", [None, DIM])
def test_refits_leave_a_lossless_student_alone(q_rank: int | None) -> None:
    layer, made = make_layer(3), target(q_rank=q_rank)
    student = made.convert(layer, made.layer(84, EVERY), layer_moments(layer))
    query, output = query_weight(student).clone(), student.o.weight.clone()
    assert attention_error(layer, student) < 1e-9
    refit_query(layer, student)
    refit_output(layer, student)
    assert relative(query_weight(student), query) < 1e-7
    assert relative(student.o.weight, output) < 1e-7
    assert attention_error(layer, student) < 1e-7


def test_refit_query_holds_on_with_a_strong_ridge() -> None:
    layer = make_layer(4)
    moved = []
    for ridge in (1e-4, 1e-1, 1e6):
        student = lossy(layer)
        old = query_weight(student).clone()
        refit_query(layer, student, ridge=ridge)
        moved.append(relative(query_weight(student), old))
    assert moved[0] > 2 * moved[1] > 1e-3
    assert moved[2] < 1e-4


def test_refit_query_lowers_the_attention_error() -> None:
    """The score error is a proxy: on most layers, what it was fitted to gets better, with or without a fit of W_O."""
    alone = together = 0
    for seed in range(6):
        layer = make_layer(seed, batch=4)
        student = lossy(layer, 16)
        before = attention_error(layer, student)
        refit_query(layer, student, samples=10**6)
        alone += attention_error(layer, student) < 0.99 * before
        other = lossy(layer, 16)
        refit_output(layer, other)
        refit_output(layer, student)
        together += attention_error(layer, student) < attention_error(layer, other)
    assert min(alone, together) >= 5
