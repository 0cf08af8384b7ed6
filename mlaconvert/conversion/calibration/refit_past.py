"""A refit of what only the past uses, beside an exact present: all that a chunk sees of itself stays the teacher's."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from mlaconvert.conversion.calibration.layer import Layer
from mlaconvert.conversion.calibration.newest import NewestPass, attention_error, newest_pass
from mlaconvert.conversion.calibration.target import PAST_ONLY, branch
from mlaconvert.model.attention.latent import LatentAttention, OwnChunk
from mlaconvert.model.rope import Rotary

ITERATIONS = 12
BATCHES = 16  # of windows, whose newest chunks are all held at once
SCORES = 2**25  # of all heads, whose gradients fit into memory


def refit_past(layer: Layer, student: LatentAttention, *, iterations: int = ITERATIONS) -> LatentAttention:
    """A copy of `student` with what only the past uses refitted; `student` itself where that does not help.

    What counts is the error of the attention output on held-back clips, where the layer has some.
    """
    refitted, judge = branch(student), layer.held_back or layer
    _fit(layer.some(BATCHES), refitted, iterations)
    return refitted if attention_error(judge, refitted) < attention_error(judge, student) else student


def _fit(layer: Layer, student: LatentAttention, iterations: int) -> None:
    """Least squares of the attention output, in place, by L-BFGS from where the factorisation stands.

    Latents are whitened, which makes the problem well conditioned; few iterations hold on to its start.
    """
    passes = _passes(layer, student)
    power = sum(float(expected.square().sum()) for _, expected in passes)
    parameters = [parameter for name, parameter in student.named_parameters() if name in PAST_ONLY]
    for parameter in parameters:
        parameter.requires_grad_(True)
    search = torch.optim.LBFGS(
        parameters, max_iter=iterations, history_size=iterations, line_search_fn="strong_wolfe", tolerance_change=0
    )

    def error() -> Tensor:
        search.zero_grad()
        total = torch.zeros(())
        for one, expected in passes:
            with torch.enable_grad():
                part = (one.output(student) - expected).square().sum() / power
            part.backward()
            total += part.detach().cpu()
        return total

    search.step(error)
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None


@torch.no_grad()
def _passes(layer: Layer, student: LatentAttention) -> list[tuple[NewestPass, Tensor]]:
    """Passes of some queries of every batch, and the teacher's output for them [B, n, D].

    Keys and values of whole chunks, which are many, lie where the layer keeps its large tensors.
    """
    found = []
    for i, (batch, expected) in enumerate(zip(layer.inputs, layer.expected, strict=True)):
        most = max(16, SCORES // (student.num_heads * len(batch.x) * batch.x.shape[1]))
        order = torch.randperm(expected.shape[1], generator=torch.Generator().manual_seed(i))
        chosen = order[:most].sort().values.to(expected.device)
        one = newest_pass(batch, student)
        k, v = (layer.space(large.shape, large).copy_(large) for large in (one.own.k, one.own.v))
        own = OwnChunk(one.own.normed[:, chosen], one.own.unnormed[:, :0], one.own.q[:, chosen], k, v)
        query_turn = Rotary(*(part[chosen] for part in one.plan.query_rotary))
        plan = dataclasses.replace(one.plan, query_rotary=query_turn)
        found.append((NewestPass(own, one.cached, plan), expected[:, chosen]))
    return found
