"""Moments of a layer's inputs over all (query, key) pairs that attention forms."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from mlaconvert.conversion.calibration.layer import Layer
from mlaconvert.conversion.calibration.method import Method
from mlaconvert.conversion.calibration.pieces import PIECE_SCALARS, token_slices
from mlaconvert.latent.moments import LayerMoments
from mlaconvert.model.attention.kernel import attend, inverse_rms
from mlaconvert.model.rope import Rotary, rotate

# Queries of a window whose sensitivity is measured, and the scores of all heads that fit into memory.
SAMPLES, PAIRS = 512, 2**25


@torch.no_grad()
def layer_moments(layer: Layer) -> LayerMoments:
    """Moments of a layer's inputs over all counted (query, key) pairs, accumulated in float64.

    Keys are those that are read from latents. One counts once for every query that sees it; the mean rotation weighs a
    pair by |q|^2 |k|^2.
    """
    attention, first = layer.attention, layer.inputs[0].x
    heads, dim, device = attention.num_heads, first.shape[2], first.device
    total = torch.zeros(dim, dtype=torch.float64, device=device)
    second = torch.zeros(dim, dim, dtype=torch.float64, device=device)
    query = torch.zeros(heads, dim // heads, dim // heads, dtype=torch.float64, device=device)
    turned = torch.zeros(dim // heads // 2, dtype=torch.complex128, device=device)
    power = turned.real.clone()
    norm = pairs = queries = 0.0
    for batch in layer.inputs:
        x, start, past = batch.x, batch.first_query, batch.latent_keys
        rows = x.shape[1] - start
        # Over all (i, j) of a window, E[|q|^2 |k|^2 e^{i theta (m - n)}] is a product of two sums.
        spins, energies = (t.new_zeros(2, len(x), heads, len(t)) for t in (turned, power))
        for part in token_slices(0, past, len(x) * dim):
            wide = x[:, part].flatten(0, 1).double()
            total += rows * wide.sum(0)
            second.addmm_(wide.mT, wide, alpha=rows)
            projected = attention.k(x[:, part])
            norm += rows * float(inverse_rms(projected, attention.norm_k.eps).double().sum())
            _add_spin(attention.norm_k(projected), batch.plan.key_rotary, part, spins[1], energies[1])
        pairs += rows * x.shape[0] * past
        for part in token_slices(start, x.shape[1], len(x) * dim):
            q = attention.norm_q(attention.q(x[:, part]))
            _add_spin(q, batch.plan.query_rotary, part, spins[0], energies[0])
            each = q.flatten(0, 1).unflatten(-1, (heads, -1)).transpose(0, 1).double()
            query.baddbmm_(each.mT, each)
        queries += rows * len(x)
        turned += (spins[0] * spins[1].conj()).sum((0, 1))
        power += (energies[0] * energies[1]).sum((0, 1))
    mean = total / pairs
    sensitivity, output_power = _sensitivity(layer)
    return LayerMoments(
        mean=mean,
        covariance=second.div_(pairs).addr_(mean, mean, alpha=-1),
        inverse_norm=norm / pairs,
        query=query.div_(queries),
        rho=turned / power,
        sensitivity=sensitivity,
        output_power=output_power,
    )


def _add_spin(x: Tensor, turn: Rotary, part: slice, spin: Tensor, energy: Tensor) -> None:
    """Add the sums over tokens of |x_f|^2 e^{i theta position} and of |x_f|^2, [B, H, pairs] each, of [B, n, D]."""
    found = x.double().unflatten(-1, (*energy.shape[1:], 2)).square().sum(-1)  # [B, n, H, pairs]
    spin += torch.einsum("bnhp,np->bhp", found, turn.cos[part].double())
    spin += 1j * torch.einsum("bnhp,np->bhp", found, turn.sin[part].double())
    energy += found.sum(1)


def _sensitivity(layer: Layer, samples: int = SAMPLES) -> tuple[Tensor, float]:
    """E[g g^T] of `LayerMoments` and its output power.

    From one random direction of the output for each of up to `samples` queries a window.
    With noise of unit variance, the gradients' second moment is sum_i J_ij^T J_ij, the Gauss-Newton metric of the
    attention output with respect to x_j. Heads are taken some at a time: with the key norm held, each has its own keys.
    """
    attention, first = layer.attention, layer.inputs[0].x
    heads, dim = attention.num_heads, attention.o.weight.shape[0]
    width = dim // heads
    total, count = torch.zeros(dim, dim, dtype=torch.float64, device=first.device), 0
    power = 0.0
    for index, batch in enumerate(layer.inputs):
        x, plan = batch.x, batch.plan
        generator = torch.Generator().manual_seed(index)
        most = max(16, min(samples, PAIRS // (heads * x.shape[0] * x.shape[1])))
        chosen, turn = batch.draw_queries(most, generator)
        mask = None if plan.mask is None else plan.mask[chosen]
        with torch.no_grad():
            q = rotate(attention.norm_q(attention.q(x[:, chosen])).unflatten(-1, (heads, -1)), turn)
            norm = inverse_rms(attention.k(x), attention.norm_k.eps).to(x.dtype)
        noise = torch.randn(len(x), len(chosen), dim, generator=generator).to(q)
        past = batch.latent_keys
        gradient, out = torch.zeros_like(x[:, :past]), attention.o.bias.to(x.dtype).expand(noise.shape)
        step = max(1, PIECE_SCALARS // (max(x.shape[0] * x.shape[1], dim) * width))
        for head in range(0, heads, step):
            rows = slice(head * width, (head + step) * width)
            w_key, w_value = attention.k.weight[rows].to(x.dtype), attention.v.weight[rows].to(x.dtype)
            w_out = attention.o.weight[:, rows].to(x.dtype)
            gain = norm * attention.norm_k.weight[rows]
            keys = F.linear(x, w_key, attention.k.bias[rows].to(x.dtype)) * gain
            values = F.linear(x, w_value, attention.v.bias[rows].to(x.dtype))
            with torch.enable_grad():
                leaves = [t[:, :past].detach().requires_grad_(True) for t in (keys, values)]
                k, v = (
                    torch.cat((leaf, t[:, past:]), 1).unflatten(-1, (-1, width))
                    for leaf, t in zip(leaves, (keys, values), strict=True)
                )
                made = attend(q[:, :, head : head + step], rotate(k, plan.key_rotary), v, mask).flatten(-2)
                by_key, by_value = torch.autograd.grad((made * (noise @ w_out)).sum(), leaves)
            with torch.no_grad():
                gradient += (by_key * gain[:, :past]) @ w_key + by_value @ w_value
                out = out + made @ w_out.mT
        power += float(out.double().square().sum())
        for part in token_slices(0, past, len(x) * dim):
            wide = gradient[:, part].flatten(0, 1).double()
            total.addmm_(wide.mT, wide)
        count += x.shape[0] * past
    return total.div_(count), power / count


def without(moments: LayerMoments, method: Method) -> LayerMoments:
    """The moments as a method with some of its parts switched off takes them."""
    if not method.centring:
        second = moments.covariance + torch.outer(moments.mean, moments.mean)
        moments = dataclasses.replace(moments, mean=torch.zeros_like(moments.mean), covariance=second)
    if not method.rho:
        moments = dataclasses.replace(moments, rho=torch.ones_like(moments.rho))
    if not (method.sensitivity and method.weights):
        moments = dataclasses.replace(moments, sensitivity=None)
    return moments
