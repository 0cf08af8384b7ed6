"""Recorded windows, layer by layer, in the place of clips that go through a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from mlaconvert.config.mla import Present
from mlaconvert.conversion.calibration.layer import ChosenInputs, Inputs, Layer
from mlaconvert.conversion.calibration.windows import Losses
from mlaconvert.conversion.collected.record import Collected, CollectedWindow
from mlaconvert.families.checkpoint import Checkpoint
from mlaconvert.files.scratch import Scratch, return_memory
from mlaconvert.latent.weights import AttentionWeights
from mlaconvert.model.attention.dense import DenseAttention
from mlaconvert.model.attention.kernel import AttentionPlan
from mlaconvert.model.rope import rotary


class CollectedWalk:
    """The layers of a dense checkpoint, each with its inputs in recorded windows; a `LayerWalk` without a model.

    A layer's held-back inputs are of the last windows. Nothing is carried from layer to layer, so nobody can follow:
    there are no velocity errors and no losses. Raises what `Checkpoint.read` and `Collected.read` raise.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        collected: Collected,
        present: Present,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        scratch: Path | None = None,
    ) -> None:
        self.checkpoint, self.collected, self.past_only = checkpoint, collected, present == "exact"
        self.device, self.dtype, self.scratch = torch.device(device), dtype, Scratch(scratch)
        self.velocity_errors: dict[int | str, float] = {}
        self.losses = Losses()
        self._finished: Callable[[int], bool] = lambda _: False
        self._plans: dict[tuple[object, ...], AttentionPlan] = {}

    def resume(self, state: Path, finished: Callable[[int], bool], say: Callable[[str], None] | None = None) -> None:
        """Leave out the `finished` layers; no layer needs another."""
        del state, say
        self._finished = finished

    def __iter__(self) -> Iterator[Layer]:
        fitted, held_back = self.collected.split()
        for index in range(self.checkpoint.config.num_layers):
            if self._finished(index):
                continue
            weights = self.checkpoint.attention(index)
            layer = Layer(
                index=index,
                weights=weights,
                attention=self._dense(weights),
                inputs=self._inputs(fitted, index),
                batch_tokens=max((window.tokens for window in fitted), default=1),
                scratch=self.scratch,
            )
            if held_back:
                layer.held_back = dataclasses.replace(layer, inputs=self._inputs(held_back, index))
            yield layer
            return_memory()

    def _dense(self, weights: AttentionWeights) -> DenseAttention:
        with torch.device("meta"):
            attention = DenseAttention(self.checkpoint.config)
        state = {
            name: getattr(weights, name.removesuffix(".weight") if name.startswith("norm") else name.replace(".", "_"))
            for name in attention.state_dict()
        }
        attention.load_state_dict({n: t.to(self.device, self.dtype) for n, t in state.items()}, assign=True)
        return attention.requires_grad_(False)

    def _inputs(self, windows: Sequence[CollectedWindow], layer: int) -> ChosenInputs:
        def make(number: int) -> Inputs:
            window = windows[number]
            x = self.collected.read(window, layer).to(self.device, self.dtype)
            first = x.shape[1] - window.queries * window.grid[1] * window.grid[2]
            return Inputs(x=x, plan=self._plan(window), first_query=first, past_only=self.past_only)

        return ChosenInputs(make, range(len(windows)))

    def _plan(self, window: CollectedWindow) -> AttentionPlan:
        """The queries that count see all of their window; the others do not count, so there is no mask."""
        key = (window.grid[1:], window.positions)
        if key not in self._plans:
            frames = torch.tensor(window.positions, device=self.device)
            dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
            turn = rotary(frames, *window.grid[1:], self.checkpoint.config.rope_split, dtype)
            self._plans[key] = AttentionPlan(query_rotary=turn, key_rotary=turn)
        return self._plans[key]
