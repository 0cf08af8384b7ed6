"""Statistics of what self-attention really reads, and closed-form refits on it: no training, no gradients.

A `Sweep` carries clips through the teacher one layer at a time, so it holds one layer's weights plus the activations.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mlaconvert.attention import AttentionPlan, DenseAttention, LatentAttention, attend, inverse_rms
from mlaconvert.config import KeyNorm, MLAConfig, MLALayer, Part, RopeMode, StreamingConfig, WanConfig
from mlaconvert.data import Clips
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
from mlaconvert.model import Block, Prepared, WanModel, default_chunks
from mlaconvert.rollout import Sampler, add_noise, warp
from mlaconvert.rope import Rotary, rotate

BATCH, BATCH_TOKENS = 8, 2**14  # clips that go through the model at once, and their tokens, but for long clips
BUDGETS = (0.4, 0.55, 0.75, 1.0, 1.35, 1.8, 2.4)  # of the average, measured in every layer
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


@dataclass(kw_only=True)
class Layer:
    """One layer of a sweep: its pretrained attention and its inputs."""

    index: int
    weights: AttentionWeights
    attention: DenseAttention
    inputs: list[Inputs]
    followers: dict[int | str, LatentAttention] = field(default_factory=dict)

    @cached_property
    def expected(self) -> list[Tensor]:
        """The teacher's attention output of each batch's counted queries [B, n, D]; every candidate is held to it."""
        with torch.no_grad():
            return [self.attention(batch.x, batch.plan)[:, batch.first_query :] for batch in self.inputs]

    def follow(self, name: int | str, attention: LatentAttention) -> None:
        """Put `attention` in this layer's place in the converted model of that name, which the sweep carries along."""
        self.followers[name] = attention


class Sweep:
    """Clips going through a dense checkpoint layer by layer. Iterate once; then read what became of the followers.

    A converted model that a layer asks to `follow` sees the windows of `validation` clips, which no layer's inputs
    have, or without them `probes` batches of the others. `velocity_errors` are squared, relative to the teacher's
    velocity; `losses` mean squared errors of the velocity, the teacher's under "dense". Raises what `Checkpoint.read`
    raises.
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
    ) -> None:
        self.checkpoint, self.device, self.dtype = checkpoint, torch.device(device), dtype
        config = dataclasses.replace(checkpoint.config, streaming=regime.streaming)
        with torch.device("meta"):
            self.model = WanModel(config).eval().requires_grad_(False)
        outside = {name: self._read(name) for name in checkpoint.names if not name.startswith("blocks.")}
        self.model.load_state_dict(outside, strict=False, assign=True)
        self.prepared: list[Prepared] = []
        self.queries: list[int] = []
        self.targets: list[Tensor] = []
        self.denoised: list[Tensor] = []  # [B] each: a clean pass writes the cache, its velocity is not used
        self.fitted = self._prepare(clips, regime)  # so many batches are inputs of the layers
        total = self.fitted if validation is None else self._prepare(validation, regime)
        self.hidden = [p.x for p in self.prepared]
        self.followed = _some(total, probes) if validation is None else list(range(self.fitted, total))
        self.streams: dict[int | str, list[Tensor]] = {}
        self.velocity_errors: dict[int | str, float] = {}
        self.losses: dict[int | str, float] = {}

    def _prepare(self, clips: Clips, regime: Regime) -> int:
        """Take up the windows of `clips`; the number of batches that are there by then."""
        tokens = clips.latents.shape[2] * self.model.config.tokens_per_frame(*clips.latents.shape[3:])
        for window in windows(clips, regime, max(1, min(BATCH, BATCH_TOKENS // tokens))):
            moved = [t.to(self.device) for t in (window.latents, window.timestep, window.context)]
            self.prepared.append(self.model.prepare(*moved, chunks=window.chunks))
            self.queries.append(window.queries)
            self.targets.append(window.target)
            self.denoised.append(window.timestep[:, -1] > 0)
        return len(self.prepared)

    def _read(self, name: str) -> Tensor:
        return self.checkpoint.read(name).to(self.device, self.dtype)

    @torch.no_grad()
    def __iter__(self) -> Iterator[Layer]:
        for index in range(self.model.config.num_layers):
            block = self._load(index)
            inputs = [
                Inputs(
                    x=block.attention_input(x, p.modulation),
                    plan=p.plan,
                    first_query=x.shape[1] - queries * p.grid[1] * p.grid[2],
                )
                for x, p, queries in zip(self.hidden[: self.fitted], self.prepared, self.queries, strict=False)
            ]
            layer = Layer(
                index=index,
                weights=self.checkpoint.attention(index),
                attention=cast(DenseAttention, block.self_attn),
                inputs=inputs,
            )
            yield layer
            self._carry(block, layer.followers)
            self.hidden = [self._run(block, x, p) for x, p in zip(self.hidden, self.prepared, strict=True)]
            block.to("meta")
        if self.followed:
            self.losses["dense"] = self._judge([self.hidden[i] for i in self.followed])[1]
        for name, stream in self.streams.items():
            self.velocity_errors[name], self.losses[name] = self._judge(stream)

    def _carry(self, block: Block, followers: dict[int | str, LatentAttention]) -> None:
        """Take every followed model through this block, with its own attention where it has one."""
        dense = block.self_attn
        for name in {**self.streams, **followers}:
            stream = self.streams.get(name) or [self.hidden[i] for i in self.followed]
            block.self_attn = followers[name].to(self.device, self.dtype) if name in followers else dense
            self.streams[name] = [
                self._run(block, x, self.prepared[i]) for x, i in zip(stream, self.followed, strict=True)
            ]
        block.self_attn = dense

    def _load(self, index: int) -> Block:
        prefix = f"blocks.{index}."
        block = cast(Block, self.model.blocks[index])
        names = [name for name in self.checkpoint.names if name.startswith(prefix)]
        block.load_state_dict({n.removeprefix(prefix): self._read(n) for n in names}, strict=True, assign=True)
        return block

    def _run(self, block: Block, x: Tensor, p: Prepared) -> Tensor:
        return block(x, p.modulation, p.text, p.image, p.plan, None)

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


@torch.no_grad()
def layer_moments(layer: Layer) -> LayerMoments:
    """Moments of a layer's inputs over all counted (query, key) pairs, accumulated in float64.

    A key counts once for every query that sees it; the mean rotation weighs a pair by |q|^2 |k|^2.
    """
    attention = layer.attention
    heads = attention.num_heads
    dim = layer.inputs[0].x.shape[2]
    total = torch.zeros(dim, dtype=torch.float64, device=layer.inputs[0].x.device)
    second = torch.outer(total, total)
    norm = pairs = queries = 0.0
    query: Tensor | float = 0.0
    turned: Tensor | float = 0.0
    power: Tensor | float = 0.0
    for batch in layer.inputs:
        x, first = batch.x, batch.first_query
        rows = x.shape[1] - first
        q = attention.norm_q(attention.q(x[:, first:])).unflatten(-1, (heads, -1)).double()
        projected = attention.k(x)
        k = attention.norm_k(projected).unflatten(-1, (heads, -1)).double()
        wide = x.flatten(0, 1).double()
        total += rows * wide.sum(0)
        second += rows * (wide.mT @ wide)
        norm += rows * float(inverse_rms(projected, attention.norm_k.eps).double().sum())
        pairs += rows * len(wide)
        query = query + torch.einsum("bnhd,bnhe->hde", q, q)
        queries += rows * len(x)
        # Over all (i, j) of a window, E[|q|^2 |k|^2 e^{i theta (m - n)}] is a product of two sums.
        spin_q = _spin(q, Rotary(batch.plan.query_rotary.cos[first:], batch.plan.query_rotary.sin[first:]))
        spin_k = _spin(k, batch.plan.key_rotary)
        turned = turned + (spin_q[0] * spin_k[0].conj()).sum((0, 1))
        power = power + (spin_q[1] * spin_k[1]).sum((0, 1))
    mean = total / pairs
    sensitivity, output_power = _sensitivity(layer)
    return LayerMoments(
        mean=mean,
        covariance=second / pairs - torch.outer(mean, mean),
        inverse_norm=norm / pairs,
        query=cast(Tensor, query) / queries,
        rho=cast(Tensor, turned) / cast(Tensor, power),
        sensitivity=sensitivity,
        output_power=output_power,
    )


def _sensitivity(layer: Layer, samples: int = 512) -> tuple[Tensor, float]:
    """E[g g^T] of `LayerMoments` and its output power.

    From one random direction of the output for each of up to `samples` queries a window.
    With noise of unit variance, the gradients' second moment is sum_i J_ij^T J_ij, the Gauss-Newton metric of the
    attention output with respect to x_j.
    """
    attention = layer.attention
    heads, dim = attention.num_heads, attention.o.weight.shape[0]
    total, count = torch.zeros(dim, dim, dtype=torch.float64, device=layer.inputs[0].x.device), 0
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
        with torch.enable_grad():
            read = x.detach().requires_grad_(True)
            k = rotate((attention.k(read) * norm * attention.norm_k.weight).unflatten(-1, (heads, -1)), plan.key_rotary)
            out = attention.o(attend(q, k, attention.v(read).unflatten(-1, (heads, -1)), mask).flatten(-2))
            noise = torch.randn(out.shape, generator=generator).to(out)
            (gradient,) = torch.autograd.grad((out * noise).sum(), read)
        power += float(out.detach().double().square().sum())
        wide = gradient.flatten(0, 1).double()
        total += wide.mT @ wide
        count += len(wide)
    return total / count, power / count


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


def _spin(x: Tensor, turn: Rotary) -> tuple[Tensor, Tensor]:
    """Sums over tokens of |x_f|^2 e^{i theta position} and of |x_f|^2, [B, H, pairs] each, of heads [B, N, H, d]."""
    energy = x.unflatten(-1, (-1, 2)).square().sum(-1)
    phase = torch.complex(turn.cos.double(), turn.sin.double())[:, None]
    return (energy * phase).sum(1), energy.sum(1)


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
        factors = factorize_layer(
            layer.weights,
            shape,
            without(moments, self.without),
            num_heads=self.config.num_heads,
            key_norm=self.key_norm,
            q_lora_rank=self.q_lora_rank,
            rope=self.rope,
            weighted="weights" not in self.without,
        )
        return self.module(layer, shape, factors.tensors)

    def components(
        self, weights: AttentionWeights, moments: LayerMoments, counts: Sequence[int]
    ) -> list[tuple[tuple[int, int], ...]]:
        """The rotary components to keep, for each number of them: the highest pairs, or by what losing them costs."""
        if self.rope_selection == "highest":
            return [highest_pairs(self.config.rope_split, count) for count in counts]
        moments, several = without(moments, self.without), "components" not in self.without
        return choose_components(weights, moments, num_heads=self.config.num_heads, counts=counts, several=several)

    def fit_output(self, layer: Layer, student: LatentAttention) -> None:
        """`refit_output`, unless refits are switched off."""
        if "refit" not in self.without:
            refit_output(layer, student)

    def module(self, layer: Layer, shape: MLALayer, tensors: Mapping[str, Tensor]) -> LatentAttention:
        """A converted layer of these tensors, in the dtype and on the device of its inputs."""
        with torch.device("meta"):
            module = LatentAttention(self.config, self.mla([shape]), shape)
        like = layer.inputs[0].x
        state = {name: tensor.to(like.device, like.dtype, copy=True) for name, tensor in tensors.items()}
        module.load_state_dict(state, strict=True, assign=True)
        return module.requires_grad_(False)

    def measure(
        self, layer: Layer, moments: LayerMoments, *, counts: Sequence[int], budgets: Sequence[int], inputs: int = 6
    ) -> ErrorTable:
        """The layer converted with each number of rotary components at each budget, W_O refitted, on some inputs."""
        components = self.components(layer.weights, moments, counts)
        some = dataclasses.replace(layer, inputs=[layer.inputs[i] for i in _some(len(layer.inputs), inputs)])
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
    eye = torch.eye(width, dtype=torch.float64, device=student.o.weight.device)
    gram, cross = eye.new_zeros(width + 1, width + 1), eye.new_zeros(width + 1, dim)
    for batch, teacher in zip(layer.inputs, layer.expected, strict=True):
        expected = teacher.flatten(0, 1).double()
        heads = student.heads(batch.x, batch.plan)[:, batch.first_query :].flatten(0, 1).double()
        features = torch.cat((heads, torch.ones_like(heads[:, :1])), 1)
        gram += features.mT @ features
        cross += features.mT @ expected
    count = gram[-1, -1]
    mean, mean_out = gram[-1, :-1] / count, cross[-1] / count
    centred = gram[:-1, :-1] / count - torch.outer(mean, mean)
    target = cross[:-1] / count - torch.outer(mean, mean_out)
    old = student.o.weight.double()
    hold = ridge * centred.diagonal().mean()
    new = torch.linalg.solve(centred + hold * eye, target + hold * old.mT).mT
    student.o.weight.copy_(new)
    student.o.bias.copy_(mean_out - new @ mean)


@torch.no_grad()
def refit_query(
    layer: Layer, student: LatentAttention, *, samples: int = 1024, ridge: float = RIDGE, iterations: int = 40
) -> None:
    """Least squares of the query up-projection, in place: from the student's scores to the teacher's.

    Queries are not cached, so they may make up for what the student's keys miss. Minimises E_i sum_j p_ij (e_ij -
    sum_k p_ik e_ik)^2 over `samples` counted queries i, where e = student - teacher scores and p are the teacher's
    probabilities: to second order the divergence of the two softmaxes. Solved by conjugate gradients from where the
    projection stands, with a ridge that holds on to it.
    """
    sampled = [_sample_scores(layer, student, batch, samples, i) for i, batch in enumerate(layer.inputs)]
    curvature, gradient, features, cos, sin = (torch.cat(parts) for parts in zip(*sampled, strict=True))
    turn = Rotary(cos, sin)
    weight = cast(Tensor, student.q_b_proj.weight)
    start = weight.unflatten(0, (student.num_heads, -1)).clone() if weight.ndim == 2 else weight.clone()
    nope = start.shape[1] - 2 * len(student.turned_pairs)
    back = Rotary(turn.cos, -turn.sin)

    def turned(x: Tensor, by: Rotary) -> Tensor:  # [n, H, width], the rotary part rotated
        return torch.cat((x[..., :nope], rotate(x[None, ..., nope:], by)[0]), -1)

    def apply(matrix: Tensor) -> Tensor:  # [H, width, f] -> the same, the normal operator
        scores = turned(torch.einsum("hwf,nhf->nhw", matrix, features), turn)
        pulled = turned(torch.einsum("nhvw,nhw->nhv", curvature, scores), back)
        return torch.einsum("nhw,nhf->hwf", pulled, features)

    diagonal = torch.einsum("nhww,nhf->h", curvature, features.square()) / (start.shape[1] * start.shape[2])
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
    layer: Layer, student: LatentAttention, batch: Inputs, samples: int, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of some of a batch's queries: curvature [n, H, w, w], gradient [n, H, w], features [n, H, f], cos and sin [n, P].

    Curvature and gradient are those of the weighted squared score error with respect to the rotated query; features
    are what the query up-projection reads.
    """
    teacher, plan, x = layer.attention, batch.plan, batch.x
    heads, scale = teacher.num_heads, student.scale
    count = max(1, samples // (len(layer.inputs) * len(x)))
    chosen, turn = batch.draw_queries(count, torch.Generator().manual_seed(seed))
    q = rotate(teacher.norm_q(teacher.q(x[:, chosen])).unflatten(-1, (heads, -1)), turn)
    k = rotate(teacher.norm_k(teacher.k(x)).unflatten(-1, (heads, -1)), plan.key_rotary)
    scores = torch.einsum("bnhd,bmhd->bnhm", q, k) * scale
    if plan.mask is not None:
        scores = scores.masked_fill(~plan.mask[chosen][:, None], float("-inf"))
    p = scores.softmax(-1)
    scores = scores.masked_fill(p == 0, 0.0)
    keys = student.keys(x, plan) * scale
    mean_key = torch.einsum("bnhm,bmhw->bnhw", p, keys)
    centred = scores - (p * scores).sum(-1, keepdim=True)
    curvature = _weighted_gram(p, keys) - mean_key[..., None] * mean_key[..., None, :]
    gradient = torch.einsum("bnhm,bmhw->bnhw", p * centred, keys)
    features = student.q_a_layernorm(student.q_a_proj(x[:, chosen]))
    exact = cast(Tensor, student.q_b_proj.weight).ndim == 3
    features = features.unflatten(-1, (heads, -1)) if exact else features.unsqueeze(2).expand(-1, -1, heads, -1)
    rows, spun = len(x), turn.select(student.turned_pairs)
    return (
        curvature.flatten(0, 1),
        gradient.flatten(0, 1),
        features.flatten(0, 1),
        spun.cos.repeat(rows, 1).to(x.dtype),
        spun.sin.repeat(rows, 1).to(x.dtype),
    )


def _weighted_gram(p: Tensor, keys: Tensor) -> Tensor:
    """sum_m p_nm k_m k_m^T of probabilities [B, n, H, M] and keys [B, M, H, w], part by part: [B, n, H, w, w]."""
    batch, count, heads, _ = p.shape
    found = keys.new_empty(batch, count, heads, keys.shape[-1], keys.shape[-1])
    for b in range(batch):
        for h in range(heads):
            k = keys[b, :, h]
            step = max(1, 2**24 // k.numel())
            for i in range(0, count, step):
                found[b, i : i + step, h] = (p[b, i : i + step, h].unsqueeze(-1) * k).mT @ k
    return found


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
    budgets = sorted({max(3, round(budget * share)) for share in BUDGETS}) if adaptive else [budget]
    largest = max(budget, checkpoint.config.dim)  # no latent is wider than the model
    budgets = [b for b in budgets if b <= largest]
    tables: dict[int, ErrorTable] = {}
    sweep = Sweep(checkpoint, clips, regime, device=device, probes=8 if adaptive else 0)
    for layer in sweep:
        if layer.index in layers:
            if not _moments_file(folder, layer.index).exists():
                save_moments(folder, layer.index, layer_moments(layer))
            moments = load_moments(folder, layer.index, device)
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
) -> Iterator[tuple[int, dict[str, Tensor], dict[str, float]]]:
    """Second sweep: each layer's tensors, its queries and output refitted, with its attention error by stage.

    With `validation` clips, `losses` has the model's loss on them at the end, with all layers at each stage.
    """
    sweep = Sweep(checkpoint, clips, regime, device=device, validation=validation)
    for layer in sweep:
        if layer.index not in calibration.layers:
            continue
        moments = load_moments(calibration.folder, layer.index, device)
        errors: dict[str, float] = {}
        for name, student in _stages(target, layer, calibration.layers[layer.index], moments):
            errors[name] = attention_error(layer, student)
            if validation is not None:
                layer.follow(name, copy.deepcopy(student))
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
    yield "low rank", dataclasses.replace(exact, v_dim=shape.v_head_dim).convert(layer, shape, moments)
    if target.key_norm == "latent" or target.q_lora_rank is not None:
        yield "norms and queries", target.convert(layer, shape, moments)
    student = target.convert(layer, shape, moments)
    if "refit" not in target.without:
        refit_output(layer, student)
        yield "output refitted", student
        refit_query(layer, student)
        refit_output(layer, student)
        yield "queries refitted", student


def save_moments(folder: Path, index: int, moments: LayerMoments) -> None:
    """Write one layer's moments, float64, as `layer-NNN.safetensors`: whole or not at all."""
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
    path = _moments_file(folder, index)
    partial = path.with_suffix(".partial")
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, partial)
    partial.replace(path)


def load_moments(folder: Path, index: int, device: torch.device | str = "cpu") -> LayerMoments:
    """Read what `save_moments` wrote."""
    tensors = load_file(_moments_file(folder, index), device=str(device))
    return LayerMoments(
        mean=tensors["mean"],
        covariance=tensors["covariance"],
        inverse_norm=float(tensors["inverse_norm"]),
        query=tensors["query"],
        rho=torch.complex(*tensors["rho"].unbind(-1)),  # a complex view of a file need not be aligned, and may crash
        sensitivity=tensors.get("sensitivity"),
        output_power=float(tensors["output_power"]) if "output_power" in tensors else None,
    )


def _moments_file(folder: Path, index: int) -> Path:
    return folder / f"layer-{index:03d}.safetensors"
