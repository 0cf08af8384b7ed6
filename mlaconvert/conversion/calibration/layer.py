"""One layer of a calibration: its pretrained attention and its inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import overload

import torch
from torch import Tensor

from mlaconvert.files.scratch import Scratch
from mlaconvert.latent.weights import AttentionWeights
from mlaconvert.model.attention.dense import DenseAttention
from mlaconvert.model.attention.kernel import AttentionPlan
from mlaconvert.model.attention.latent import LatentAttention
from mlaconvert.model.rope import Rotary

# Tokens that a mean error is taken over: all of the built-in model's, two windows of 480 x 832.
ENOUGH = 3 * 2**13


def batches_enough(tokens: int, most: int) -> int:
    """How many batches of so many tokens hold `ENOUGH`; two at least, and never more than `most`."""
    return min(most, max(2, -(-ENOUGH // tokens)))


def draw_some(total: int, wanted: int) -> list[int]:
    """`wanted` of `total` windows, drawn: a stride would keep step with their order, and see only one kind of them."""
    return sorted(torch.randperm(total, generator=torch.Generator().manual_seed(0))[:wanted].tolist())


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What one layer's self-attention reads in one batch of windows."""

    x: Tensor  # [B, N, D]
    plan: AttentionPlan
    first_query: int  # queries before this token do not count
    past_only: bool = False  # whether latents are read for the tokens before that alone, beside an exact present

    @property
    def latent_keys(self) -> int:
        """How many tokens, from the first on, are read from latents."""
        return self.first_query if self.past_only else self.x.shape[1]

    def draw_queries(self, count: int, generator: torch.Generator) -> tuple[Tensor, Rotary]:
        """Up to `count` of the queries that count, drawn: their tokens [n] and their rotations."""
        tokens = torch.randperm(self.x.shape[1] - self.first_query, generator=generator)[:count]
        chosen = (self.first_query + tokens).to(self.x.device)
        return chosen, Rotary(self.plan.query_rotary.cos[chosen], self.plan.query_rotary.sin[chosen])


class ChosenInputs(Sequence[Inputs]):
    """Some of the inputs of a layer, made when they are asked for."""

    def __init__(self, make: Callable[[int], Inputs], numbers: Sequence[int]) -> None:
        self._make, self._numbers = make, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Inputs: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Inputs]: ...

    def __getitem__(self, index: int | slice) -> Inputs | Sequence[Inputs]:
        if isinstance(index, slice):
            return ChosenInputs(self._make, self._numbers[index])
        return self._make(self._numbers[index])


@dataclass(kw_only=True)
class Layer:
    """One layer of a walk: its pretrained attention and its inputs, which change when the walk goes on."""

    index: int
    weights: AttentionWeights
    attention: DenseAttention
    inputs: Sequence[Inputs]
    followers: dict[int | str, LatentAttention] = field(default_factory=dict)
    scratch: Scratch | None = None  # where large tensors lie, if not in memory
    held_back: Layer | None = None  # the same layer with inputs from clips that nothing is fitted to
    batch_tokens: int = 1  # of its largest batch of windows

    @cached_property
    def expected(self) -> list[Tensor]:
        """The teacher's attention output of each batch's counted queries [B, n, D]; every candidate is held to it."""
        found = []
        with torch.no_grad():
            for batch in self.inputs:
                made = self.attention(batch.x, batch.plan)[:, batch.first_query :]
                found.append(self.space(made.shape, made).copy_(made))
        return found

    def follow(self, name: int | str, attention: LatentAttention) -> None:
        """Put `attention` in this layer's place in the converted model of that name, which the walk carries along."""
        self.followers[name] = attention

    def some(self, count: int) -> Layer:
        """The same layer with `count` of its inputs, drawn; itself where it has no more."""
        if count >= len(self.inputs):
            return self
        chosen = draw_some(len(self.inputs), count)
        return dataclasses.replace(self, inputs=ChosenInputs(self.inputs.__getitem__, chosen))

    def sample(self, most: int | None = None) -> Layer:
        """The same layer with as many of its inputs as an error is measured on, at most so many."""
        return self.some(batches_enough(self.batch_tokens, len(self.inputs) if most is None else most))

    def space(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """A new large tensor, of the dtype and on the device of `like`."""
        if self.scratch is None or like.device.type != "cpu":
            return like.new_empty(shape)
        return self.scratch.empty(shape, like.dtype)
