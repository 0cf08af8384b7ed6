"""The weights of one dense self-attention layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_ROWS = 1024  # rows of a weight that are in float64 at once: 42 MB at width 5120


@dataclass(frozen=True, kw_only=True)
class AttentionWeights:
    """One dense layer's self-attention: y = W x + b; queries and keys are RMS-normed over the width D, or a head's d.

    `camera_o` is the weight of a second output that reads the same queries, keys and values, turned in another way.
    """

    q_weight: Tensor  # [D, D]
    q_bias: Tensor  # [D]
    k_weight: Tensor  # [D, D]
    k_bias: Tensor  # [D]
    v_weight: Tensor  # [D, D]
    v_bias: Tensor  # [D]
    o_weight: Tensor  # [D, D]
    o_bias: Tensor  # [D]
    norm_q: Tensor  # [D], or [d]
    norm_k: Tensor  # [D], or [d]
    camera_o: Tensor | None = None  # [D, D]

    def tensors(self) -> dict[str, Tensor]:
        """Those that there are, by their name here."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    @property
    def norms(self) -> int:
        """How many norms a token's keys have: one, or one a head."""
        return len(self.k_bias) // len(self.norm_k)

    @property
    def gains(self) -> tuple[Tensor, Tensor]:
        """Weights [D] of the norms of queries and of keys, over all heads."""
        return self.norm_q.repeat(self.norms), self.norm_k.repeat(self.norms)

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        """The output projections, [D, D] each."""
        return (self.o_weight,) if self.camera_o is None else (self.o_weight, self.camera_o)

    def double(self) -> AttentionWeights:
        """The same in float64 on the CPU."""
        return AttentionWeights(**{k: v.detach().to("cpu", torch.float64) for k, v in self.tensors().items()})


def float64_rows(weight: Tensor, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    """A matrix in float64, some rows at a time: at width 5120 all of it would take 210 MB."""
    for start in range(0, len(weight), _ROWS):
        rows = slice(start, start + _ROWS)
        yield rows, weight[rows].detach().to(device, torch.float64)
