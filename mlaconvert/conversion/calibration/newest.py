"""The pass of a window's newest chunk, whose queries are those that count."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mlaconvert.conversion.calibration.layer import Inputs, Layer
from mlaconvert.model.attention.kernel import AttentionPlan, Segment
from mlaconvert.model.attention.latent import LatentAttention, OwnChunk
from mlaconvert.model.rope import Rotary


class NewestPass(NamedTuple):
    """What attention of the newest chunk needs beside an exact present; all but the reading of latents is done."""

    own: OwnChunk
    cached: tuple[Tensor, ...]  # [B, P, ...] each, of the past
    plan: AttentionPlan

    def output(self, student: LatentAttention) -> Tensor:
        """The student's attention output [B, n, D]."""
        return student.o(student.beside_past(self.own, self.cached, self.plan))


def newest_pass(batch: Inputs, student: LatentAttention) -> NewestPass:
    """The pass of a batch's newest chunk."""
    first, turn = batch.first_query, batch.plan.key_rotary
    plan = AttentionPlan(
        query_rotary=Rotary(turn.cos[first:], turn.sin[first:]),
        key_rotary=Rotary(turn.cos[:first], turn.sin[:first]),
        mode="expanded",
        segments=(Segment(),),
    )
    return NewestPass(student.own_chunk(batch.x[:, first:], plan), student.remembered(batch.x[:, :first], plan), plan)


@torch.no_grad()
def attention_error(layer: Layer, student: LatentAttention) -> float:
    """Frobenius error of the counted queries' attention output, relative to the teacher's."""
    error = power = 0.0
    for batch, teacher in zip(layer.inputs, layer.expected, strict=True):
        expected = teacher.double()
        if batch.past_only:
            found = newest_pass(batch, student).output(student)
        else:
            found = student(batch.x, batch.plan)[:, batch.first_query :]
        error += float((found.double() - expected).square().sum())
        power += float(expected.square().sum())
    return (error / power) ** 0.5
