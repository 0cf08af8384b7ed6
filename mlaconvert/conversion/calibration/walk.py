"""Clips going through a dense checkpoint one layer at a time.

Activations lie in a file (`Scratch`), so memory holds one layer's matrices and the activations of one batch of windows,
however many layers and clips there are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from mlaconvert.clips.folder import Clips
from mlaconvert.conversion.calibration.kept import read_exactly, write_tensors
from mlaconvert.conversion.calibration.layer import ChosenInputs, Inputs, Layer, batches_enough, draw_some
from mlaconvert.conversion.calibration.pieces import PIECE_SCALARS
from mlaconvert.conversion.calibration.windows import PROBE_SCALARS, Losses, Regime, batch_size, windows
from mlaconvert.errors import CheckpointError
from mlaconvert.families.checkpoint import Checkpoint
from mlaconvert.files.scratch import Scratch, return_memory
from mlaconvert.files.whole import remove_partial
from mlaconvert.model.attention.dense import DenseAttention
from mlaconvert.model.attention.kernel import AttentionPlan
from mlaconvert.model.attention.latent import LatentAttention
from mlaconvert.model.blocks import Block
from mlaconvert.model.load import load_tensors
from mlaconvert.model.wan import Prepared, WanModel


class LayerWalk:
    """Clips going through a dense checkpoint layer by layer. Iterate once; then read what became of the followers.

    A converted model that a layer asks to `follow` sees the windows of `validation` clips, which no layer's inputs
    have, or without them up to `probes` batches of the others. `velocity_errors` are squared, relative to the teacher's
    velocity, behind clean pasts; so are `losses`, beside those with noisy ones. On a CPU, activations lie in an
    unnamed file in the folder `scratch` (default: the temporary folder). Raises what `Checkpoint.read` raises, and
    OutputError when there is no room for the file.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        clips: Clips,
        regime: Regime,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        probes: int = 0,
        validation: Clips | None = None,
        scratch: Path | None = None,
    ) -> None:
        checkpoint.check_runs()
        self.checkpoint, self.device, self.dtype = checkpoint, torch.device(device), dtype
        self.regime = regime
        self.scratch = Scratch(scratch)
        self.start = 0
        self.state: Path | None = None
        config = dataclasses.replace(checkpoint.config, streaming=regime.streaming)
        with torch.device("meta"):
            self.model = WanModel(config).eval().requires_grad_(False)
        outside = {name: name for name in checkpoint.names if not name.startswith("blocks.")}
        load_tensors(self.model, checkpoint, outside, self.device, self.dtype)
        regime.check_frames(clips.latents.shape[2])
        self.prepared: list[Prepared] = []
        self.queries: list[int] = []
        self.targets: list[Tensor] = []
        self.denoised: list[Tensor] = []  # [B] each
        self._plans: dict[tuple[Any, ...], AttentionPlan] = {}
        self.fitted = self._prepare(clips, regime)  # so many batches are inputs of the layers
        self.clean = self.fitted  # the batches behind them are of the same clips, but with noisy pasts
        if validation is not None:
            self.clean = self._prepare(validation, dataclasses.replace(regime, noisy_past=0.0))
            if regime.streaming is not None:
                self._prepare(validation, dataclasses.replace(regime, noisy_past=1.0))
        total = len(self.prepared)
        self.hidden = [p.x for p in self.prepared]
        self.batch_tokens = max(x.shape[:2].numel() for x in self.hidden)
        scalars = self.batch_tokens * self.model.config.dim
        probes = min(batches_enough(self.batch_tokens, probes), max(1, PROBE_SCALARS // scalars))
        # A clean pass has no velocity to judge by.
        judged = [i for i, rows in enumerate(self.denoised) if rows.any()] or list(range(total))
        chosen = [judged[i] for i in draw_some(len(judged), probes)]
        self.followed = chosen if validation is None else list(range(self.fitted, total))
        self.streams: dict[int | str, list[Tensor]] = {}
        self.velocity_errors: dict[int | str, float] = {}
        self.losses = Losses()

    @torch.no_grad()
    def _prepare(self, clips: Clips, regime: Regime) -> int:
        """Take up the windows of `clips`; the number of batches that are there by then."""
        known, text = None, torch.empty(0)
        for window in windows(clips, regime, batch_size(clips, self.model.config)):
            if window.context is not known:  # all windows of some clips share their text
                known, text = window.context, self._keep(self.model.embed_text(window.context.to(self.device)))
            x, grid = self.model.embed_patches(window.latents.to(self.device), None)
            embedding, modulation = self.model.embed_time(window.timestep.to(self.device), len(x), grid[0])
            key = (grid, window.chunks)
            if key not in self._plans:
                self._plans[key] = self.model.attention_plan(grid, self.device, chunks=window.chunks)
            self.prepared.append(
                Prepared(
                    x=self._keep(x),
                    grid=grid,
                    embedding=self._keep(embedding),
                    modulation=self._keep(modulation),
                    text=text,
                    image=None,
                    plan=self._plans[key],
                )
            )
            self.queries.append(window.queries)
            self.targets.append(self._keep(window.target))
            self.denoised.append(window.denoised)
        return len(self.prepared)

    def _keep(self, tensor: Tensor) -> Tensor:
        """Put a tensor into the file, unless it is on a GPU."""
        return self.scratch.keep(tensor) if tensor.device.type == "cpu" else tensor

    @torch.no_grad()
    def __iter__(self) -> Iterator[Layer]:
        past_only = self.regime.present == "exact"
        for index in range(self.start, self.model.config.num_layers):
            block = self._load(index)

            def inputs(i: int, block: Block = block) -> Inputs:
                p, queries = self.prepared[i], self.queries[i]
                with torch.no_grad():
                    x = block.attention_input(self.hidden[i], p.modulation)
                first = x.shape[1] - queries * p.grid[1] * p.grid[2]
                return Inputs(x=x, plan=p.plan, first_query=first, past_only=past_only)

            layer = Layer(
                index=index,
                weights=self.checkpoint.attention(index),
                attention=cast(DenseAttention, block.self_attn),
                inputs=ChosenInputs(inputs, range(self.fitted)),
                batch_tokens=self.batch_tokens,
                scratch=self.scratch,
            )
            held_back = range(self.fitted, len(self.prepared) if self.regime.noisy_past else self.clean)
            if held_back:
                layer.held_back = dataclasses.replace(layer, inputs=ChosenInputs(inputs, held_back))
            yield layer
            self._carry(block, layer.followers)
            for x, p in zip(self.hidden, self.prepared, strict=True):
                self._run(block, x, p, x)
            block.to("meta")
            return_memory()
            if self.state is not None:
                self._save(self.state, index + 1)
        noisy = [i >= self.clean for i in self.followed]
        dense: dict[int | str, list[Tensor]] = {"dense": [self.hidden[i] for i in self.followed]}
        for name, stream in (dense | self.streams).items():
            for is_noisy, losses in ((False, self.losses.clean_past), (True, self.losses.noisy_past)):
                part = [(x, i) for x, i, n in zip(stream, self.followed, noisy, strict=True) if n == is_noisy]
                if part:
                    error, losses[str(name)] = self._judge(part)
                    if not is_noisy:
                        self.velocity_errors[name] = error

    def resume(self, state: Path, finished: Callable[[int], bool], say: Callable[[str], None] | None = None) -> None:
        """Keep in the folder `state` how far the walk is after each layer, and go on from what is kept there.

        Never beyond a layer that is not `finished`. Two states are kept: when a walk goes on to the next layer, what
        was made of the last one may not have reached the disk. Nothing of a damaged state is taken over: `say` is told,
        and the walk goes on from the state before it, or begins again.
        """
        self.state = state
        with suppress(OSError):  # they only take room
            remove_partial(state)
        for file in sorted(state.glob("sweep-*.safetensors"), reverse=True):
            number = file.stem.removeprefix("sweep-")
            start = int(number) if number.isdecimal() else self.model.config.num_layers + 1
            if start > self.model.config.num_layers or not all(finished(index) for index in range(start)):
                continue
            try:
                kept = read_exactly(file, self._kept_shapes, self.dtype)
            except CheckpointError as error:
                if say is not None:
                    say(f"how far the calibration was cannot be taken from {file.name} ({error}); it is passed again")
                continue
            for name in sorted(_streams(kept)):
                self.streams[name] = [
                    self._keep(kept[f"stream {name} {i}"].to(self.device)) for i in range(len(self.followed))
                ]
            for i, x in enumerate(self.hidden):
                x.copy_(kept[f"hidden {i}"])
            self.start = start
            return

    def _kept_shapes(self, names: Collection[str]) -> dict[str, tuple[int, ...]]:
        """What a state that has tensors of these `names` has to hold."""
        shapes = {f"hidden {i}": tuple(x.shape) for i, x in enumerate(self.hidden)}
        for name in _streams(names):
            shapes |= {f"stream {name} {n}": tuple(self.hidden[i].shape) for n, i in enumerate(self.followed)}
        return shapes

    def _save(self, state: Path, start: int) -> None:
        """Keep what the layers from `start` on need, whole or not at all."""
        tensors = {f"hidden {i}": x for i, x in enumerate(self.hidden)}
        for name, stream in self.streams.items():
            tensors |= {f"stream {name} {i}": x for i, x in enumerate(stream)}
        write_tensors(state / f"sweep-{start:03d}.safetensors", tensors, "how far the calibration is")
        with suppress(OSError):  # it only takes room
            for old in sorted(state.glob("sweep-*.safetensors"))[:-2]:
                old.unlink()

    def _carry(self, block: Block, followers: dict[int | str, LatentAttention]) -> None:
        """Take every followed model through this block, with its own attention where it has one."""
        dense = block.self_attn
        for name in {**self.streams, **followers}:
            if name not in self.streams:
                self.streams[name] = [self._keep(self.hidden[i].clone()) for i in self.followed]
            block.self_attn = followers[name].to(self.device, self.dtype) if name in followers else dense
            for x, i in zip(self.streams[name], self.followed, strict=True):
                self._run(block, x, self.prepared[i], x)
        block.self_attn = dense

    def _load(self, index: int) -> Block:
        prefix, block = f"blocks.{index}.", cast(Block, self.model.blocks[index])
        names = {n.removeprefix(prefix): n for n in self.checkpoint.names if n.startswith(prefix)}
        load_tensors(block, self.checkpoint, names, self.device, self.dtype)
        return block

    def _run(self, block: Block, x: Tensor, p: Prepared, out: Tensor) -> None:
        """Take x [B, N, D] through a block into `out`, which may be `x`; all but its self-attention part by part."""
        attended = block.self_attn(block.attention_input(x, p.modulation), p.plan)
        memory = block.cross_attn.project(p.text, p.image)
        tokens = p.grid[1] * p.grid[2]
        step = max(1, PIECE_SCALARS // (len(x) * tokens * self.model.config.ffn_dim))  # frames
        for start in range(0, p.grid[0], step):
            part = slice(start * tokens, (start + step) * tokens)
            modulation = p.modulation if p.modulation.shape[1] == 1 else p.modulation[:, start : start + step]
            out[:, part] = block.complete(x[:, part], attended[:, part], modulation, memory)

    def _judge(self, stream: Sequence[tuple[Tensor, int]]) -> tuple[float, float]:
        """Squared velocity error relative to the teacher's velocity, and the loss, of the counted frames in use.

        `stream` has the last block's output of some batches, and their numbers.
        """
        error = power = loss = values = 0.0
        for x, i in stream:
            rows, frames = self.denoised[i], slice(-self.queries[i], None)
            teacher, found = (
                self.model.finish(hidden, self.prepared[i])[rows][:, :, frames].double().cpu()
                for hidden in (self.hidden[i], x)
            )
            error += float((found - teacher).square().sum())
            power += float(teacher.square().sum())
            loss += float((found - self.targets[i][rows]).square().sum())
            values += found.numel()
        return error / power, loss / values


def _streams(names: Collection[str]) -> set[str]:
    """The followed models whose activations a state holds as "stream NAME NUMBER"."""
    return {name.partition(" ")[2].rpartition(" ")[0] for name in names} - {""}
