"""Statistics of what self-attention really reads, and closed-form refits on it: no training, no gradients.

A `Sweep` carries clips through the teacher one layer at a time, and activations lie in a file (`Scratch`), so it holds
one layer's matrices and the activations of one batch of windows, however many layers and clips there are.
Its windows hold the (query, key) pairs that attention forms. Streaming: for every chunk of a clip, the chunk at one of
the sampler's timesteps attends to itself and to the clean frames of its window, and the clean pass (timestep 0) to
clean ones; with `noisy_context` a second window has an independent noise level per chunk, as in training and in the
validation loss. Only the newest chunk's queries count. Bidirectional: all frames at one noise level.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from bisect import bisect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast, overload

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from mlaconvert.attention import AttentionPlan, DenseAttention, LatentAttention, attend, inverse_rms
from mlaconvert.checkpoint import TensorStore, check_finite
from mlaconvert.config import KeyNorm, MLAConfig, MLALayer, Part, RopeMode, StreamingConfig, WanConfig
from mlaconvert.data import Clips
from mlaconvert.errors import CheckpointError, OutputError
from mlaconvert.factorize import (
    AttentionWeights,
    LayerMoments,
    allocate,
    choose_components,
    factorize_layer,
    highest_pairs,
    narrower,
)
from mlaconvert.families import Checkpoint
from mlaconvert.inputs import reason_of
from mlaconvert.lapack import solve_positive
from mlaconvert.model import Block, Prepared, WanModel, default_chunks
from mlaconvert.rollout import Sampler, add_noise, warp
from mlaconvert.rope import Rotary, rotate
from mlaconvert.scratch import Scratch, return_memory

BATCH, BATCH_TOKENS = 8, 2**14  # clips that go through the model at once, and their tokens, but for long clips
BATCH_SCALARS = 2**22  # of one activation of a batch
PROBE_SCALARS = 2**27  # of the probes' activations of one followed model
PIECE_SCALARS = 2**21  # of one matrix of a part of the work
BUDGETS = (0.4, 0.55, 0.75, 1.0, 1.35, 1.8, 2.4)  # of the average, measured in every layer
REFITTED = ("o.weight", "o.bias", "q_b_proj.weight")
QUERIES = 1024  # on which a refit of queries is made
# What moments on the disk were made by. Raise it with any change after which the same checkpoint and clips give other
# moments or other generated clips: of `windows`, `Sweep`, `layer_moments`, or what `save_moments` writes.
MOMENTS_VERSION = 1
RIDGE = 1e-3  # of the mean squared feature: how strongly a refit holds on to what it starts from


@dataclass(frozen=True, kw_only=True)
class Regime:
    """Which (query, key) pairs attention forms: the window, or None for a bidirectional model, and timesteps."""

    streaming: StreamingConfig | None
    timesteps: tuple[float, ...]
    noisy_context: bool = True
    seed: int = 0

    @classmethod
    def of(cls, streaming: StreamingConfig | None, seed: int = 0) -> Regime:
        """The sampler's timesteps: four and the clean pass when streaming, else the shift-5 grid of eight levels."""
        steps = (*Sampler.few_step().timesteps, 0.0) if streaming else Sampler.many_step(8).timesteps
        return cls(streaming=streaming, timesteps=steps, seed=seed)

    def to_json(self) -> dict[str, Any]:
        """Plain data, for config.json."""
        return {
            "streaming": dataclasses.asdict(self.streaming) if self.streaming else None,
            "timesteps": [round(t, 4) for t in self.timesteps],
            "noisy_context": self.noisy_context,
            "seed": self.seed,
        }


@dataclass(frozen=True, kw_only=True)
class Window:
    """A batch of windows as the model sees them; the queries of the last `queries` frames count."""

    latents: Tensor  # [B, C, F, H, W], noisy
    target: Tensor  # [B, C, queries, H, W], noise - data of the last frames
    timestep: Tensor  # [B, F]
    context: Tensor  # [B, T, text_dim]
    chunks: tuple[int, ...] | None
    queries: int


def windows(clips: Clips, regime: Regime, batch: int = BATCH) -> Iterator[Window]:
    """Every window of every clip, `batch` clips at a time; the rows of a batch take the timesteps in turn."""
    generator = torch.Generator().manual_seed(regime.seed)
    timesteps = torch.tensor(regime.timesteps)
    turn = 0
    for part in clips.batches(batch):
        for frames, chunks in window_views(part.latents.shape[2], regime.streaming):
            latents, sizes = part.latents[:, :, frames], chunks or (len(frames),)
            rows = torch.arange(turn, turn + len(latents))
            turn += len(latents)
            sampled = torch.zeros(len(latents), len(sizes))
            sampled[:, -1] = timesteps[rows % len(timesteps)] / 1000
            levels = [sampled]
            if regime.noisy_context:
                levels.append(warp(torch.rand(sampled.shape, generator=generator)))
            for level in levels:
                sigma = level.repeat_interleave(torch.tensor(sizes), 1)
                noise = torch.randn(latents.shape, generator=generator)
                yield Window(
                    latents=add_noise(latents, noise, sigma),
                    target=(noise - latents)[:, :, -sizes[-1] :],
                    timestep=1000 * sigma,
                    context=part.context,
                    chunks=chunks,
                    queries=sizes[-1],
                )


def batch_size(clips: Clips, config: WanConfig) -> int:
    """How many clips go through a model at once."""
    tokens = clips.latents.shape[2] * config.tokens_per_frame(*clips.latents.shape[3:])
    return max(1, min(BATCH, BATCH_TOKENS // tokens, BATCH_SCALARS // (tokens * config.dim)))


def scratch_bytes(config: WanConfig, shape: Sequence[int], regime: Regime, *, followed: int) -> int:
    """About how many bytes of the disk a calibration on a CPU takes for the activations of clips [N, C, F, H, W].

    `followed` is the number of layers between which scalars are shared by what they do to the velocity.
    """
    count, channels, length, height, width = shape
    views = list(window_views(length, regime.streaming))
    times = count * (2 if regime.noisy_context else 1)
    frames = times * sum(len(seen) for seen, _ in views)
    counted = times * sum(chunks[-1] if chunks else len(seen) for seen, chunks in views)
    tokens = config.tokens_per_frame(height, width)
    hidden = config.dim * tokens * frames
    held = hidden + config.dim * (tokens * counted + 7 * frames + count * config.text_len)
    held += channels * height * width * counted
    # The first sweep follows models; the second keeps two states of its own, and the curvatures of its queries.
    first = followed * min(PROBE_SCALARS, hidden)
    return 4 * (held + max(first, 2 * hidden + QUERIES * config.dim * config.head_dim))


def window_views(frames: int, streaming: StreamingConfig | None) -> Iterator[tuple[list[int], tuple[int, ...] | None]]:
    """Frames and chunks of each window: what the newest chunk sees as a clip goes by."""
    if streaming is None:
        yield list(range(frames)), None
        return
    sink, window = streaming.sink_frames, streaming.window_frames
    end = 0
    for size in default_chunks(frames, streaming):
        end += size
        if end <= window:
            yield list(range(end)), tuple(default_chunks(end, streaming))
            continue
        recent = window - sink - size
        seen = [*range(sink), *range(end - size - recent, end)]
        older = default_chunks(recent, streaming)[::-1]
        yield seen, (*((sink,) if sink else ()), *older, size)


def _some(total: int, wanted: int) -> list[int]:
    """`wanted` of `total` windows, drawn: a stride would keep step with their order, and see only one kind of them."""
    return sorted(torch.randperm(total, generator=torch.Generator().manual_seed(0))[:wanted].tolist())


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What one layer's self-attention reads in one batch of windows."""

    x: Tensor  # [B, N, D]
    plan: AttentionPlan
    first_query: int  # queries before this token do not count

    def draw_queries(self, count: int, generator: torch.Generator) -> tuple[Tensor, Rotary]:
        """Up to `count` of the queries that count, drawn: their tokens [n] and their rotations."""
        tokens = torch.randperm(self.x.shape[1] - self.first_query, generator=generator)[:count]
        chosen = (self.first_query + tokens).to(self.x.device)
        return chosen, Rotary(self.plan.query_rotary.cos[chosen], self.plan.query_rotary.sin[chosen])


class _Chosen(Sequence[Inputs]):
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
            return _Chosen(self._make, self._numbers[index])
        return self._make(self._numbers[index])


@dataclass(kw_only=True)
class Layer:
    """One layer of a sweep: its pretrained attention and its inputs, which change when the sweep goes on."""

    index: int
    weights: AttentionWeights
    attention: DenseAttention
    inputs: Sequence[Inputs]
    followers: dict[int | str, LatentAttention] = field(default_factory=dict)
    scratch: Scratch | None = None  # where large tensors lie, if not in memory

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
        """Put `attention` in this layer's place in the converted model of that name, which the sweep carries along."""
        self.followers[name] = attention

    def some(self, count: int) -> Layer:
        """The same layer with `count` of its inputs, drawn."""
        chosen = _some(len(self.inputs), count)
        return dataclasses.replace(self, inputs=_Chosen(self.inputs.__getitem__, chosen))

    def space(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """A new large tensor, of the dtype and on the device of `like`."""
        if self.scratch is None or like.device.type != "cpu":
            return like.new_empty(shape)
        return self.scratch.empty(shape, like.dtype)


class _Widened(nn.Linear):
    """A linear layer that keeps its weights in the file's dtype, mapped, and widens them while it runs."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype), self.bias.to(input.dtype))


def _fill(
    module: nn.Module, checkpoint: Checkpoint, names: Mapping[str, str], device: torch.device, dtype: torch.dtype
) -> None:
    """Give a module its tensors, by the names that they have in it. Linear layers keep the file's dtype.

    Raises CheckpointError for a NaN.
    """
    state = {}
    for inside, name in names.items():
        tensor, owner = checkpoint.read(name), module.get_submodule(inside.rpartition(".")[0])
        check_finite(tensor, checkpoint.info(name).name, checkpoint.store.path)
        if isinstance(owner, nn.Linear) and tensor.dtype != dtype:
            owner.__class__ = _Widened
            state[inside] = tensor.to(device)
        else:
            state[inside] = tensor.to(device, dtype)
    module.load_state_dict(state, strict=False, assign=True)


def load_widened(
    checkpoint: Checkpoint, streaming: StreamingConfig | None, device: torch.device | str = "cpu"
) -> WanModel:
    """A dense model that computes in float32 while its linear layers keep the file's dtype, on a CPU mapped from it."""
    with torch.device("meta"):
        model = WanModel(dataclasses.replace(checkpoint.config, streaming=streaming))
    _fill(model, checkpoint, {name: name for name in checkpoint.names}, torch.device(device), torch.float32)
    return model.requires_grad_(False).eval()


class Sweep:
    """Clips going through a dense checkpoint layer by layer. Iterate once; then read what became of the followers.

    A converted model that a layer asks to `follow` sees the windows of `validation` clips, which no layer's inputs
    have, or without them `probes` batches of the others. `velocity_errors` are squared, relative to the teacher's
    velocity; `losses` mean squared errors of the velocity, the teacher's under "dense". On a CPU, activations lie in an
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
        self.checkpoint, self.device, self.dtype = checkpoint, torch.device(device), dtype
        self.scratch = Scratch(scratch)
        self.start = 0
        self.state: Path | None = None
        config = dataclasses.replace(checkpoint.config, streaming=regime.streaming)
        with torch.device("meta"):
            self.model = WanModel(config).eval().requires_grad_(False)
        outside = {name: name for name in checkpoint.names if not name.startswith("blocks.")}
        _fill(self.model, checkpoint, outside, self.device, self.dtype)
        self.prepared: list[Prepared] = []
        self.queries: list[int] = []
        self.targets: list[Tensor] = []
        self.denoised: list[Tensor] = []  # [B] each: a clean pass writes the cache, its velocity is not used
        self._plans: dict[tuple[Any, ...], AttentionPlan] = {}
        self.fitted = self._prepare(clips, regime)  # so many batches are inputs of the layers
        total = self.fitted if validation is None else self._prepare(validation, regime)
        self.hidden = [p.x for p in self.prepared]
        largest = max(x.numel() for x in self.hidden)
        probes = min(probes, max(1, PROBE_SCALARS // largest))
        self.followed = _some(total, probes) if validation is None else list(range(self.fitted, total))
        self.streams: dict[int | str, list[Tensor]] = {}
        self.velocity_errors: dict[int | str, float] = {}
        self.losses: dict[int | str, float] = {}

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
            self.denoised.append(window.timestep[:, -1] > 0)
        return len(self.prepared)

    def _keep(self, tensor: Tensor) -> Tensor:
        """Put a tensor into the file, unless it is on a GPU."""
        return self.scratch.keep(tensor) if tensor.device.type == "cpu" else tensor

    @torch.no_grad()
    def __iter__(self) -> Iterator[Layer]:
        for index in range(self.start, self.model.config.num_layers):
            block = self._load(index)

            def inputs(i: int, block: Block = block) -> Inputs:
                p, queries = self.prepared[i], self.queries[i]
                with torch.no_grad():
                    x = block.attention_input(self.hidden[i], p.modulation)
                return Inputs(x=x, plan=p.plan, first_query=x.shape[1] - queries * p.grid[1] * p.grid[2])

            layer = Layer(
                index=index,
                weights=self.checkpoint.attention(index),
                attention=cast(DenseAttention, block.self_attn),
                inputs=_Chosen(inputs, range(self.fitted)),
                scratch=self.scratch,
            )
            yield layer
            self._carry(block, layer.followers)
            for x, p in zip(self.hidden, self.prepared, strict=True):
                self._run(block, x, p, x)
            block.to("meta")
            return_memory()
            if self.state is not None:
                self._save(self.state, index + 1)
        if self.followed:
            self.losses["dense"] = self._judge([self.hidden[i] for i in self.followed])[1]
        for name, stream in self.streams.items():
            self.velocity_errors[name], self.losses[name] = self._judge(stream)

    def resume(self, state: Path, finished: Callable[[int], bool], say: Callable[[str], None] | None = None) -> None:
        """Keep in the folder `state` how far the sweep is after each layer, and go on from what is kept there.

        Never beyond a layer that is not `finished`. Two states are kept: when a sweep goes on to the next layer, what
        was made of the last one may not have reached the disk. Nothing of a damaged state is taken over: `say` is told,
        and the sweep goes on from the state before it, or begins again.
        """
        self.state = state
        for file in sorted(state.glob("sweep-*.safetensors"), reverse=True):
            number = file.stem.removeprefix("sweep-")
            start = int(number) if number.isdecimal() else self.model.config.num_layers + 1
            if start > self.model.config.num_layers or not all(finished(index) for index in range(start)):
                continue
            try:
                kept = _read_exactly(file, self._kept_shapes, self.dtype)
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
        _write_whole(state / f"sweep-{start:03d}.safetensors", tensors, "how far the calibration is")
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
        _fill(block, self.checkpoint, names, self.device, self.dtype)
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

    def _judge(self, stream: Sequence[Tensor]) -> tuple[float, float]:
        """Squared velocity error relative to the teacher's velocity, and the loss, of the counted frames in use."""
        error = power = loss = values = 0.0
        for x, i in zip(stream, self.followed, strict=True):
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


@torch.no_grad()
def layer_moments(layer: Layer) -> LayerMoments:
    """Moments of a layer's inputs over all counted (query, key) pairs, accumulated in float64.

    A key counts once for every query that sees it; the mean rotation weighs a pair by |q|^2 |k|^2.
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
        x, start = batch.x, batch.first_query
        rows = x.shape[1] - start
        # Over all (i, j) of a window, E[|q|^2 |k|^2 e^{i theta (m - n)}] is a product of two sums.
        spins, energies = (t.new_zeros(2, len(x), heads, len(t)) for t in (turned, power))
        for part in _parts(0, x.shape[1], len(x) * dim):
            wide = x[:, part].flatten(0, 1).double()
            total += rows * wide.sum(0)
            second.addmm_(wide.mT, wide, alpha=rows)
            projected = attention.k(x[:, part])
            norm += rows * float(inverse_rms(projected, attention.norm_k.eps).double().sum())
            _add_spin(attention.norm_k(projected), batch.plan.key_rotary, part, spins[1], energies[1])
        pairs += rows * x.shape[0] * x.shape[1]
        for part in _parts(start, x.shape[1], len(x) * dim):
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


def _parts(start: int, end: int, width: int) -> Iterator[slice]:
    """Slices of tokens `start` to `end` whose matrices of `width` scalars a token stay small."""
    step = max(1, PIECE_SCALARS // width)
    for first in range(start, end, step):
        yield slice(first, min(end, first + step))


def _add_spin(x: Tensor, turn: Rotary, part: slice, spin: Tensor, energy: Tensor) -> None:
    """Add the sums over tokens of |x_f|^2 e^{i theta position} and of |x_f|^2, [B, H, pairs] each, of [B, n, D]."""
    found = x.double().unflatten(-1, (*energy.shape[1:], 2)).square().sum(-1)  # [B, n, H, pairs]
    spin += torch.einsum("bnhp,np->bhp", found, turn.cos[part].double())
    spin += 1j * torch.einsum("bnhp,np->bhp", found, turn.sin[part].double())
    energy += found.sum(1)


def _sensitivity(layer: Layer, samples: int = 512) -> tuple[Tensor, float]:
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
        most = max(16, min(samples, 2**25 // (heads * x.shape[0] * x.shape[1])))  # whose scores fit into memory
        chosen, turn = batch.draw_queries(most, generator)
        mask = None if plan.mask is None else plan.mask[chosen]
        with torch.no_grad():
            q = rotate(attention.norm_q(attention.q(x[:, chosen])).unflatten(-1, (heads, -1)), turn)
            norm = inverse_rms(attention.k(x), attention.norm_k.eps).to(x.dtype)
        noise = torch.randn(len(x), len(chosen), dim, generator=generator).to(q)
        gradient, out = torch.zeros_like(x), attention.o.bias.to(x.dtype).expand(noise.shape)
        step = max(1, PIECE_SCALARS // (max(x.shape[0] * x.shape[1], dim) * width))
        for head in range(0, heads, step):
            rows = slice(head * width, (head + step) * width)
            w_key, w_value = attention.k.weight[rows].to(x.dtype), attention.v.weight[rows].to(x.dtype)
            w_out = attention.o.weight[:, rows].to(x.dtype)
            gain = norm * attention.norm_k.weight[rows]
            keys = F.linear(x, w_key, attention.k.bias[rows].to(x.dtype)) * gain
            values = F.linear(x, w_value, attention.v.bias[rows].to(x.dtype))
            with torch.enable_grad():
                leaves = keys.detach().requires_grad_(True), values.detach().requires_grad_(True)
                k, v = (leaf.unflatten(-1, (-1, width)) for leaf in leaves)
                made = attend(q[:, :, head : head + step], rotate(k, plan.key_rotary), v, mask).flatten(-2)
                by_key, by_value = torch.autograd.grad((made * (noise @ w_out)).sum(), leaves)
            with torch.no_grad():
                gradient += (by_key * gain) @ w_key + by_value @ w_value
                out = out + made @ w_out.mT
        power += float(out.double().square().sum())
        for part in _parts(0, x.shape[1], len(x) * dim):
            wide = gradient[:, part].flatten(0, 1).double()
            total.addmm_(wide.mT, wide)
        count += x.shape[0] * x.shape[1]
    return total.div_(count), power / count


def without(moments: LayerMoments, parts: Sequence[Part]) -> LayerMoments:
    """The moments with parts of the method switched off, to see what each is worth."""
    if "centring" in parts:
        second = moments.covariance + torch.outer(moments.mean, moments.mean)
        moments = dataclasses.replace(moments, mean=torch.zeros_like(moments.mean), covariance=second)
    if "rho" in parts:
        moments = dataclasses.replace(moments, rho=torch.ones_like(moments.rho))
    if "sensitivity" in parts or "weights" in parts:
        moments = dataclasses.replace(moments, sensitivity=None)
    return moments


@dataclass(frozen=True, kw_only=True)
class Target:
    """What the layers of a dense model with geometry `config` become, but for how each divides its scalars.

    `nope_dim` is the most unrotated channels of a head; None fills it up to the teacher's width.
    """

    config: WanConfig
    key_norm: KeyNorm
    q_lora_rank: int | None
    rope: RopeMode
    v_dim: int
    nope_dim: int | None = None
    rope_dim: int | None = None
    rope_selection: str = "energy"
    without: tuple[Part, ...] = ()

    @property
    def weighted(self) -> bool:
        """Whether heads and channels count with what the output makes of their errors."""
        return "weights" not in self.without

    def layer(self, budget: int, components: tuple[tuple[int, int], ...]) -> MLALayer:
        """`budget` cached scalars (the key norm aside): rotary keys where they are cached, the rest latent channels."""
        rope = 2 * sum(count for _, count in components)
        room = max(0, self.config.head_dim - rope)
        nope = room if self.nope_dim is None else min(room, self.nope_dim)
        latent = budget - rope if self.rope == "cached" else budget
        return MLALayer(
            kv_lora_rank=min(latent, self.config.dim),  # wider than the model, a latent holds nothing more
            qk_nope_head_dim=nope,
            v_head_dim=self.v_dim,
            rope_components=components,
        )

    def counts(self, budget: int) -> list[int]:
        """The numbers of rotary components that are worth trying at `budget` scalars."""
        if self.rope == "head":
            return [0]
        if self.rope_dim is not None:
            return [self.rope_dim // 2]
        most = (budget - 1 if self.rope == "cached" else self.config.head_dim) // 2
        shares = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75) if self.rope == "cached" else (0.2, 0.35, 0.5, 0.65, 0.8, 1.0)
        return sorted({max(1, round(most * share)) for share in shares})

    def mla(self, layers: Sequence[MLALayer | None], calibration: dict[str, Any] | None = None) -> MLAConfig:
        """The model's `mla` section."""
        return MLAConfig(
            q_lora_rank=self.q_lora_rank,
            key_norm=self.key_norm,
            softmax_scale=self.config.head_dim**-0.5,
            layers=tuple(layers),
            rope=self.rope,
            calibration=calibration,
        )

    def convert(self, layer: Layer, shape: MLALayer, moments: LayerMoments) -> LatentAttention:
        """`layer` converted in the metric of `moments`, as a module that runs beside its teacher."""
        tensors = factorize_layer(
            layer.weights,
            shape,
            without(moments, self.without),
            num_heads=self.config.num_heads,
            key_norm=self.key_norm,
            q_lora_rank=self.q_lora_rank,
            rope=self.rope,
            weighted=self.weighted,
        ).tensors
        module = self.module(layer, shape, tensors)
        del tensors
        return_memory()
        return module

    def components(
        self, weights: AttentionWeights, moments: LayerMoments, counts: Sequence[int]
    ) -> list[tuple[tuple[int, int], ...]]:
        """The rotary components to keep, for each number of them: the highest pairs, or by what losing them costs."""
        if self.rope_selection == "highest":
            return [highest_pairs(self.config.rope_split, count) for count in counts]
        return choose_components(
            weights,
            without(moments, self.without),
            num_heads=self.config.num_heads,
            counts=counts,
            several="components" not in self.without,
            weighted=self.weighted,
        )

    def fit_output(self, layer: Layer, student: LatentAttention) -> None:
        """`refit_output`, unless refits are switched off."""
        if "refit" not in self.without:
            refit_output(layer, student)

    def module(self, layer: Layer, shape: MLALayer, tensors: Mapping[str, Tensor]) -> LatentAttention:
        """A converted layer of these tensors, in the dtype and on the device of its inputs.

        Only what refits change is copied.
        """
        with torch.device("meta"):
            module = LatentAttention(self.config, self.mla([shape]), shape)
        like = layer.inputs[0].x
        state = {name: t.to(like.device, like.dtype, copy=name in REFITTED) for name, t in tensors.items()}
        module.load_state_dict(state, strict=True, assign=True)
        return module.requires_grad_(False)

    def measure(
        self, layer: Layer, moments: LayerMoments, *, counts: Sequence[int], budgets: Sequence[int], inputs: int = 6
    ) -> ErrorTable:
        """The layer converted with each number of rotary components at each budget, W_O refitted, on some inputs."""
        components = self.components(layer.weights, moments, counts)
        some = layer.some(inputs)
        errors: dict[int, dict[int, float]] = {count: {} for count in counts}
        for count, kept in zip(counts, components, strict=True):
            possible = [budget for budget in budgets if self.rope != "cached" or budget > 2 * count]
            if not possible:
                continue
            widest = self.layer(max(possible), kept)
            made = self.convert(some, widest, moments).state_dict()
            for budget in possible:
                # The latent's channels are in order of what they hold: fewer are a part of more.
                shape = self.layer(budget, kept)
                student = self.module(some, shape, narrower(made, widest.kv_lora_rank, shape.kv_lora_rank))
                self.fit_output(some, student)
                errors[count][budget] = attention_error(some, student)
                return_memory()
        return ErrorTable(components=dict(zip(counts, components, strict=True)), errors=errors)


@dataclass(frozen=True, kw_only=True)
class ErrorTable:
    """Measured attention errors of one layer, relative Frobenius, by rotary components kept and by budget."""

    components: dict[int, tuple[tuple[int, int], ...]]  # number of components -> (pair, count), ...
    errors: dict[int, dict[int, float]]  # number of components -> budget in scalars -> error

    def best(self, budget: int) -> tuple[float, tuple[tuple[int, int], ...]]:
        """The least error at `budget` scalars, log-linear between measured budgets, and the components that give it."""
        # Below its smallest measured budget a candidate has too little latent left to guess from.
        found = [
            (_interpolate(curve, budget), count)
            for count, curve in self.errors.items()
            if curve and min(curve) <= budget
        ]
        error, count = min(found)
        return error, self.components[count]


def _interpolate(curve: dict[int, float], budget: int) -> float:
    known = sorted(curve)
    if len(known) == 1:
        return curve[known[0]]
    right = min(max(bisect(known, budget), 1), len(known) - 1)
    share = (budget - known[right - 1]) / (known[right] - known[right - 1])
    low, high = (math.log(max(curve[known[i]], 1e-12)) for i in (right - 1, right))
    return math.exp(low + share * (high - low))


def share_budget(
    tables: Sequence[ErrorTable],
    velocity_errors: Sequence[float],
    budget: int,
    *,
    largest: int,
    spread: float = 2.4,
) -> list[int]:
    """Scalars of each layer, `budget` on average, from measured errors.

    A layer's squared attention error counts by what it did to the model's velocity when that layer alone was converted
    at `budget` scalars (`Sweep.velocity_errors`). No layer gets less than 1/spread or more than `spread` times the
    average, and none more than `largest`.
    """

    def curve(index: int) -> Callable[[int], float]:
        table = tables[index]
        unit = velocity_errors[index] / table.best(budget)[0] ** 2
        return lambda scalars: unit * table.best(scalars)[0] ** 2

    smallest = max(min(min(curve) for curve in table.errors.values() if curve) for table in tables)
    bounds = (max(smallest, round(budget / spread)), min(largest, max(budget, round(budget * spread))))
    return allocate([curve(i) for i in range(len(tables))], budget * len(tables), bounds=bounds)


@torch.no_grad()
def attention_error(layer: Layer, student: LatentAttention) -> float:
    """Frobenius error of the counted queries' attention output, relative to the teacher's."""
    error = power = 0.0
    for batch, teacher in zip(layer.inputs, layer.expected, strict=True):
        expected = teacher.double()
        found = student(batch.x, batch.plan)[:, batch.first_query :].double()
        error += float((found - expected).square().sum())
        power += float(expected.square().sum())
    return (error / power) ** 0.5


@torch.no_grad()
def refit_output(layer: Layer, student: LatentAttention, *, ridge: float = RIDGE) -> None:
    """Ridge regression of W_O and its bias, in place: from the student's heads to the teacher's attention output."""
    dim, width = student.o.weight.shape
    gram = torch.zeros(width, width, dtype=torch.float64, device=student.o.weight.device)
    cross, count = gram.new_zeros(dim, width), 0
    mean, mean_out = gram.new_zeros(width), gram.new_zeros(dim)
    for batch, teacher in zip(layer.inputs, layer.expected, strict=True):
        features = student.heads(batch.x, batch.plan)[:, batch.first_query :]
        for part in _parts(0, features.shape[1], len(features) * max(width, dim)):
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
    weight = cast(Tensor, student.q_b_proj.weight)
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
            for part in _parts(0, p.shape[1], key[b].numel()):
                made = (p[b, part].unsqueeze(-1) * key[b]).mT @ key[b]
                curvature[b, part, head] = made.baddbmm_(mean_key[b, part, :, None], mean_key[b, part, None], alpha=-1)
    features = student.q_a_layernorm(student.q_a_proj(x[:, chosen]))
    exact = cast(Tensor, student.q_b_proj.weight).ndim == 3
    features = features.unflatten(-1, (heads, -1)) if exact else features.unsqueeze(2).expand(-1, -1, heads, -1)
    spun = turn.select(student.turned_pairs)
    return (
        curvature.flatten(0, 1),
        torch.stack(gradient, 2).flatten(0, 1),
        features.flatten(0, 1),
        spun.cos.repeat(len(x), 1).to(x.dtype),
        spun.sin.repeat(len(x), 1).to(x.dtype),
    )


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How each converted layer divides its scalars; its moments lie in `folder`."""

    folder: Path
    layers: dict[int, MLALayer]


def calibrate(
    checkpoint: Checkpoint,
    clips: Clips,
    regime: Regime,
    target: Target,
    *,
    layers: Sequence[int],
    budget: int,
    adaptive: bool,
    folder: Path,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """First sweep: moments of `layers`, kept in `folder`, and the split of `budget` scalars that measures best.

    Moments that are in `folder` already are taken from there. With `adaptive`, layers share the total by what a scalar
    buys the model's velocity.
    """
    counts = target.counts(budget)
    least = min(3, budget)  # a cached rotary pair and one latent channel; fewer only where fewer are asked for
    budgets = sorted({max(least, round(budget * share)) for share in BUDGETS}) if adaptive else [budget]
    largest = max(budget, checkpoint.config.dim)  # no latent is wider than the model
    budgets = [b for b in budgets if b <= largest]
    tables: dict[int, ErrorTable] = {}
    sweep = Sweep(checkpoint, clips, regime, device=device, probes=8 if adaptive else 0, scratch=folder)
    for layer in sweep:
        if layer.index in layers:
            if not moments_file(folder, layer.index).exists():
                save_moments(folder, layer.index, layer_moments(layer))
                return_memory()
            moments = load_moments(folder, layer.index, checkpoint.config, device)
            table = target.measure(layer, moments, counts=counts, budgets=budgets)
            tables[layer.index] = table
            if adaptive:
                student = target.convert(layer, target.layer(budget, table.best(budget)[1]), moments)
                target.fit_output(layer, student)
                layer.follow(layer.index, student)
        if progress is not None:
            progress(layer.index + 1, checkpoint.config.num_layers)
    ordered = [tables[i] for i in sorted(tables)]
    shares = [budget] * len(ordered)
    if adaptive:
        shares = share_budget(ordered, [sweep.velocity_errors[i] for i in sorted(tables)], budget, largest=largest)
    chosen = {
        index: target.layer(share, table.best(share)[1])
        for index, table, share in zip(sorted(tables), ordered, shares, strict=True)
    }
    return Calibration(folder=folder, layers=chosen)


def refit_layers(
    checkpoint: Checkpoint,
    clips: Clips,
    regime: Regime,
    target: Target,
    calibration: Calibration,
    *,
    validation: Clips | None = None,
    losses: dict[str, float] | None = None,
    device: torch.device | str = "cpu",
    state: Path | None = None,
    finished: Collection[int] = (),
    say: Callable[[str], None] | None = None,
) -> Iterator[tuple[int, dict[str, Tensor], dict[str, float]]]:
    """Second sweep: each layer's tensors, its queries and output refitted, with its attention error by stage.

    With `validation` clips, `losses` has the model's loss on them at the end, with all layers at each stage. In the
    folder `state`, the sweep keeps how far it is; called again, it goes on behind the `finished` layers, and whatever
    it has to pass again comes out the same. `say` is told of a state that is damaged and left alone.
    """
    sweep = Sweep(checkpoint, clips, regime, device=device, validation=validation, scratch=calibration.folder)
    if state is not None:
        sweep.resume(state, lambda index: index in finished or index not in calibration.layers, say)
    for layer in sweep:
        if layer.index not in calibration.layers:
            continue
        moments = load_moments(calibration.folder, layer.index, checkpoint.config, device)
        errors: dict[str, float] = {}
        for name, student in _stages(target, layer, calibration.layers[layer.index], moments):
            errors[name] = attention_error(layer, student)
            if validation is not None:
                layer.follow(name, _branch(student))
            return_memory()
        yield layer.index, dict(student.state_dict()), errors
    if losses is not None:
        losses |= {str(name): loss for name, loss in sweep.losses.items()}


def _stages(
    target: Target, layer: Layer, shape: MLALayer, moments: LayerMoments
) -> Iterator[tuple[str, LatentAttention]]:
    """A layer's conversion step by step, each with all that the steps before it lose; the last is what is written."""
    dim, head_dim, heads = target.config.dim, target.config.head_dim, target.config.num_heads
    exact = dataclasses.replace(target, key_norm="token", q_lora_rank=None, v_dim=head_dim)
    wide = dataclasses.replace(shape, kv_lora_rank=dim, qk_nope_head_dim=head_dim, v_head_dim=head_dim)
    if target.rope != "head":
        apart = dataclasses.replace(exact, rope="cached")
        every = tuple((pair, heads) for pair, _ in shape.rope_components)
        yield "rotations dropped", apart.convert(layer, dataclasses.replace(wide, rope_components=every), moments)
        yield "rotary key shared", apart.convert(layer, wide, moments)
    heads_fit = head_dim if target.rope == "head" else head_dim - shape.qk_rope_head_dim
    if shape.qk_nope_head_dim < heads_fit or shape.v_head_dim < head_dim:
        yield "heads narrowed", exact.convert(layer, dataclasses.replace(shape, kv_lora_rank=dim), moments)
    student = dataclasses.replace(exact, v_dim=shape.v_head_dim).convert(layer, shape, moments)
    yield "low rank", student
    if target.key_norm == "latent" or target.q_lora_rank is not None:
        student = target.convert(layer, shape, moments)
        yield "norms and queries", student
    if "refit" not in target.without:
        refit_output(layer, student)
        yield "output refitted", student
        refit_query(layer, student)
        refit_output(layer, student)
        yield "queries refitted", student


def _branch(student: LatentAttention) -> LatentAttention:
    """A copy that refits of the other do not change; all else is shared."""
    shared = {id(tensor): tensor for name, tensor in student.named_parameters() if name not in REFITTED}
    return copy.deepcopy(student, cast(dict[int, Any], shared))


def save_moments(folder: Path, index: int, moments: LayerMoments) -> None:
    """Write one layer's moments, float64, as `layer-NNN.safetensors`: whole or not at all.

    Raises OutputError, and LinAlgError for moments that are not finite.
    """
    tensors = {
        "mean": moments.mean,
        "covariance": moments.covariance,
        "inverse_norm": torch.tensor(moments.inverse_norm, dtype=torch.float64),
        "query": moments.query,
        "rho": torch.view_as_real(moments.rho),
    }
    if moments.sensitivity is not None:
        tensors["sensitivity"] = moments.sensitivity
        tensors["output_power"] = torch.tensor(moments.output_power, dtype=torch.float64)
    path = moments_file(folder, index)
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise torch.linalg.LinAlgError(f"the moments of layer {index} are not finite")  # type: ignore[attr-defined]
    _write_whole(path, tensors, "the moments")


def _write_whole(path: Path, tensors: Mapping[str, Tensor], what: str) -> None:
    """Write a safetensors file by way of one beside it. Raises OutputError, which calls its contents `what`."""
    partial = path.with_suffix(".partial")
    try:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, partial)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{path}: {what} cannot be kept ({reason_of(error)}); make room there") from None


def load_moments(folder: Path, index: int, config: WanConfig, device: torch.device | str = "cpu") -> LayerMoments:
    """Read what `save_moments` wrote for a model of geometry `config`. Raises CheckpointError for anything else."""
    path = moments_file(folder, index)
    dim, head = config.dim, config.head_dim

    def shapes(names: Collection[str]) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {"mean": (dim,), "covariance": (dim, dim), "inverse_norm": ()}
        found |= {"rho": (head // 2, 2), "query": (config.num_heads, head, head)}
        return found | ({"sensitivity": (dim, dim), "output_power": ()} if "sensitivity" in names else {})

    try:
        read = _read_exactly(path, shapes, torch.float64)
        tensors = {name: tensor.to(device) for name, tensor in read.items()}
    except CheckpointError:
        raise CheckpointError(
            f"{path}: no moments of this model, or damaged; delete the file and run the command again"
        ) from None
    return LayerMoments(
        mean=tensors["mean"],
        covariance=tensors["covariance"],
        inverse_norm=float(tensors["inverse_norm"]),
        query=tensors["query"],
        rho=torch.complex(*tensors["rho"].unbind(-1)),  # a complex view of a file need not be aligned, and may crash
        sensitivity=tensors.get("sensitivity"),
        output_power=float(tensors["output_power"]) if "output_power" in tensors else None,
    )


def _read_exactly(
    path: Path, shapes_of: Callable[[Collection[str]], Mapping[str, tuple[int, ...]]], dtype: torch.dtype
) -> dict[str, Tensor]:
    """All tensors of a file of ours: finite, of that dtype, and just those that its names call for (`shapes_of`).

    Raises CheckpointError for any other file.
    """
    with TensorStore(str(path), path, [path], None) as store:
        shapes = shapes_of(store.tensors)
        if {name: info.shape for name, info in store.tensors.items()} != shapes:
            raise CheckpointError(f"{path}: it has other tensors than were kept")
        tensors = {name: store.read(name) for name in shapes}
    for name, tensor in tensors.items():
        check_finite(tensor, name, path)
        if tensor.dtype != dtype:
            raise CheckpointError(f"{path}: {name} is {tensor.dtype}, not {dtype}")
    return tensors


def moments_file(folder: Path, index: int) -> Path:
    """Where a layer's moments lie in their folder."""
    return folder / f"layer-{index:03d}.safetensors"
