"""Closed-form refits of a converted layer's output and query projections: no training step."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from mlaconvert.conversion.calibration.layer import Inputs, Layer
from mlaconvert.conversion.calibration.pieces import token_slices
from mlaconvert.latent.lapack import solve_positive
from mlaconvert.model.attention.latent import LatentAttention
from mlaconvert.model.rope import Rotary, rotate

QUERIES = 1024  # on which a refit of queries is made
RIDGE = 1e-3  # of the mean squared feature: how strongly a refit holds on to what it starts from


@torch.no_grad()
def refit_output(layer: Layer, student: LatentAttention, *, ridge: float = RIDGE) -> None:
    """Ridge regression of W_O and its bias, in place: from the student's heads to the teacher's attention output."""
    dim, width = student.o.weight.shape
    gram = torch.zeros(width, width, dtype=torch.float64, device=student.o.weight.device)
    cross, count = gram.new_zeros(dim, width), 0
    mean, mean_out = gram.new_zeros(width), gram.new_zeros(dim)
    for batch, teacher in zip(layer.inputs, layer.expected, strict=True):
        features = student.heads(batch.x, batch.plan)[:, batch.first_query :]
        for part in token_slices(0, features.shape[1], len(features) * max(width, dim)):
            heads, expected = (t[:, part].flatten(0, 1).double() for t in (features, teacher))
            gram.addmm_(heads.mT, heads)
            cross.addmm_(expected.mT, heads)
            mean += heads.sum(0)
            mean_out += expected.sum(0)
            count += len(heads)
    mean, mean_out = mean / count, mean_out / count
    gram.div_(count).addr_(mean, mean, alpha=-1)
    cross.div_(count).addr_(mean_out, mean, alpha=-1)
    hold = ridge * float(gram.diagonal().mean())
    gram.diagonal().add_(hold)
    new = solve_positive(gram, cross.add_(student.o.weight, alpha=hold))
    student.o.weight.copy_(new)
    student.o.bias.copy_(mean_out - new @ mean)


@torch.no_grad()
def refit_query(
    layer: Layer, student: LatentAttention, *, samples: int = QUERIES, ridge: float = RIDGE, iterations: int = 40
) -> None:
    """Least squares of the query up-projection, in place: from the student's scores to the teacher's.

    Queries are not cached, so they may make up for what the student's keys miss. Minimises E_i sum_j p_ij (e_ij -
    sum_k p_ik e_ik)^2 over `samples` counted queries i, where e = student - teacher scores and p are the teacher's
    probabilities: to second order the divergence of the two softmaxes. Solved by conjugate gradients from where the
    projection stands, with a ridge that holds on to it.
    """
    share, curvatures, rest = samples // len(layer.inputs), [], []
    for i, batch in enumerate(layer.inputs):
        curvature, *others = _sample_scores(layer, student, batch, max(1, share // len(batch.x)), i)
        curvatures.append(curvature)
        rest.append(others)
    gradient, features, cos, sin = (torch.cat(parts) for parts in zip(*rest, strict=True))
    sizes = [len(curvature) for curvature in curvatures]
    turn = Rotary(cos, sin)
    weight = _query_weight(student)
    start = weight.unflatten(0, (student.num_heads, -1)).clone() if weight.ndim == 2 else weight.clone()
    nope = start.shape[1] - 2 * len(student.turned_pairs)
    back = Rotary(turn.cos, -turn.sin)

    def turned(x: Tensor, by: Rotary) -> Tensor:  # [n, H, width], the rotary part rotated
        return torch.cat((x[..., :nope], rotate(x[None, ..., nope:], by)[0]), -1)

    def apply(matrix: Tensor) -> Tensor:  # [H, width, f] -> the same, the normal operator
        scores = turned(torch.einsum("hwf,nhf->nhw", matrix, features), turn)
        pulled = [c @ s.unsqueeze(-1) for c, s in zip(curvatures, scores.split(sizes), strict=True)]
        return torch.einsum("nhw,nhf->hwf", turned(torch.cat(pulled).squeeze(-1), back), features)

    traces = torch.cat([c.diagonal(dim1=2, dim2=3).sum(-1) for c in curvatures])  # [n, H]
    diagonal = (traces * features.square().sum(-1)).sum(0) / (start.shape[1] * start.shape[2])
    hold = ridge * diagonal[:, None, None]
    residual = torch.einsum("nhw,nhf->hwf", turned(gradient, back), features) - apply(start)
    step, change = residual.clone(), torch.zeros_like(start)
    power, least = residual.square().sum((1, 2), keepdim=True), torch.finfo(start.dtype).tiny
    for _ in range(iterations):
        image = apply(step) + hold * step
        length = power / (step * image).sum((1, 2), keepdim=True).clamp_min(least)
        change += length * step
        residual -= length * image
        power, before = residual.square().sum((1, 2), keepdim=True), power
        step = residual + power / before.clamp_min(least) * step
    weight.copy_((start + change).reshape(weight.shape))


def _sample_scores(
    layer: Layer, student: LatentAttention, batch: Inputs, count: int, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of `count` queries: curvature [n, H, w, w], gradient [n, H, w], features [n, H, f], cos and sin [n, P].

    Curvature and gradient are those of the weighted squared score error with respect to the rotated query; features
    are what the query up-projection reads. All sampled queries' curvatures together may be larger than memory.
    """
    teacher, plan, x = layer.attention, batch.plan, batch.x
    heads, scale = teacher.num_heads, student.scale
    chosen, turn = batch.draw_queries(count, torch.Generator().manual_seed(seed))
    q = rotate(teacher.norm_q(teacher.q(x[:, chosen])).unflatten(-1, (heads, -1)), turn)
    k = rotate(teacher.norm_k(teacher.k(x)).unflatten(-1, (heads, -1)), plan.key_rotary)
    keys, gradient = student.keys(x, plan), []
    mask = None if plan.mask is None else ~plan.mask[chosen]
    curvature = layer.space((len(x), len(chosen), heads, keys.shape[-1], keys.shape[-1]), x)
    for head in range(heads):
        scores = torch.einsum("bnd,bmd->bnm", q[:, :, head], k[:, :, head]) * scale
        if mask is not None:
            scores = scores.masked_fill(mask, float("-inf"))
        p = scores.softmax(-1)
        scores = scores.masked_fill(p == 0, 0.0)
        key = keys[:, :, head] * scale
        mean_key = p @ key
        centred = scores - (p * scores).sum(-1, keepdim=True)
        gradient.append((p * centred) @ key)
        for b in range(len(x)):
            for part in token_slices(0, p.shape[1], key[b].numel()):
                made = (p[b, part].unsqueeze(-1) * key[b]).mT @ key[b]
                curvature[b, part, head] = made.baddbmm_(mean_key[b, part, :, None], mean_key[b, part, None], alpha=-1)
    features = student.q_a_layernorm(student.q_a_proj(x[:, chosen]))
    exact = _query_weight(student).ndim == 3
    features = features.unflatten(-1, (heads, -1)) if exact else features.unsqueeze(2).expand(-1, -1, heads, -1)
    spun = turn.select(student.turned_pairs)
    return (
        curvature.flatten(0, 1),
        torch.stack(gradient, 2).flatten(0, 1),
        features.flatten(0, 1),
        spun.cos.repeat(len(x), 1).to(x.dtype),
        spun.sin.repeat(len(x), 1).to(x.dtype),
    )


def _query_weight(student: LatentAttention) -> Tensor:
    assert student.q_b_proj is not None
    return cast(Tensor, student.q_b_proj.weight)
