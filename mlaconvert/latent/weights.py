"""The weights of one dense self-attention layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_ROWS = 1024  # rows of a weight that are in float64 at once: 42 MB at width 5120


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

    def double(self) -> AttentionWeights:
        """The same in float64 on the CPU."""
        return AttentionWeights(**{k: v.detach().to("cpu", torch.float64) for k, v in vars(self).items()})


def float64_rows(weight: Tensor, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    """A matrix in float64, some rows at a time: at width 5120 all of it would take 210 MB."""
    for start in range(0, len(weight), _ROWS):
        rows = slice(start, start + _ROWS)
        yield rows, weight[rows].detach().to(device, torch.float64)
