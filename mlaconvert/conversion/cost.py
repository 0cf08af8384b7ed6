"""What a conversion will take, counted before it begins: work by part, and seconds at a device's rates.

Counts follow the code part by part: walks of clips through the model, the measuring of each layer's inputs, its
factorisation and refits, and the refit of the whole model. What is small beside them is left out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlaconvert.clips.folder import ClipFolder
from mlaconvert.conversion.calibration.layer import batches_enough
from mlaconvert.conversion.calibration.measure import PAIRS, SAMPLES
from mlaconvert.conversion.calibration.refit import QUERIES
from mlaconvert.conversion.calibration.refit_model import BATCH as REFIT_BATCH
from mlaconvert.conversion.calibration.refit_model import DRAWS, KEPT_SCALARS
from mlaconvert.conversion.calibration.refit_past import BATCHES, ITERATIONS, SCORES
from mlaconvert.conversion.calibration.run import BUDGETS, PROBES
from mlaconvert.conversion.calibration.target import MEASURED
from mlaconvert.conversion.calibration.windows import PROBE_SCALARS, batch_of
from mlaconvert.conversion.from_clips import more_clips, own_clips, room_needed, target_of
from mlaconvert.conversion.plan import ConversionPlan
from mlaconvert.conversion.recipes import regime_of
from mlaconvert.model.flops import NOTHING, Work, block_scalars, forward_work
from mlaconvert.model.memory import parameter_count
from mlaconvert.model.rates import Rates, probe
from mlaconvert.model.window import chunk_mask, window_views

# Half of what leads to eigenvectors are products of a matrix with one vector, which take the time of so many others.
SLOW = 4
EVALUATIONS = ITERATIONS * 5 // 4  # that L-BFGS makes at most
SHORT = 1e11  # float64 FLOPs of a conversion that asks for no clips, up to which it takes seconds anywhere


@dataclass(frozen=True, kw_only=True)
class ConversionCost:
    """Work and, at a device's rates, seconds of a conversion by part. `memory` is in bytes, of a GPU alone."""

    work: dict[str, Work]
    seconds: dict[str, float]
    memory: int | None = None

    @property
    def total(self) -> float:
        """Seconds in all."""
        return sum(self.seconds.values())

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        flops = {part: work.flops for part, work in self.work.items()}
        return {"flops": flops, "seconds": self.seconds, "total_seconds": self.total, "device_memory": self.memory}


def conversion_cost(
    plan: ConversionPlan, data: Path | None, device: torch.device, *, makes_clips: bool
) -> ConversionCost:
    """What `plan` takes on `device`, whose rates are probed for a few seconds, if there is more to do than that.

    `data` is the folder of clips; without one, `makes_clips` says whether the model generates them.
    """
    config, shape = plan.source_config, clip_shape(plan, data)
    parts = conversion_work(plan, shape, makes_clips=makes_clips)
    if plan.recipe.init != "calibrated" and sum(part.flops for part in parts.values()) < SHORT:
        return ConversionCost(work=parts, seconds={})
    tokens = window_tokens(plan, shape)

    def measured(dtype: torch.dtype) -> Rates:
        masked = plan.recipe.streaming is not None
        return probe(config, device, dtype, queries=tokens, keys=tokens, masked=masked)

    rates = measured(torch.float32)
    half = measured(torch.bfloat16) if device.type == "cuda" else rates
    return ConversionCost(
        work=parts,
        seconds=seconds_of(parts, rates, half),
        memory=device_bytes(plan, data, tokens) if device.type != "cpu" else None,
    )


def window_tokens(plan: ConversionPlan, shape: Sequence[int]) -> int:
    """Tokens of the longest window that clips [C, F, H, W] are shown in."""
    longest = max(len(visible) for visible, _ in _views(plan, shape[1]))
    return longest * plan.source_config.tokens_per_frame(*shape[2:])


def seconds_of(parts: dict[str, Work], rates: Rates, half: Rates) -> dict[str, float]:
    """Seconds of each part, at the rates of `half` where a GPU would take bfloat16."""
    return {name: (half if name in ON_GPU_IN_BF16 else rates).seconds(work) for name, work in parts.items()}


def device_bytes(plan: ConversionPlan, data: Path | None, tokens: int) -> int:
    """About how much of a GPU a conversion takes: all clips' activations, or the whole model that is refitted."""
    config = plan.source_config
    layer = 4 * parameter_count(config) // config.num_layers + 20 * 8 * config.dim**2
    if plan.recipe.init != "calibrated":
        return layer
    block = tokens * 4 * block_scalars(config)
    whole = 4 * parameter_count(config) + block + 4 * tokens * config.dim * config.num_layers
    return max(room_needed(plan, data)[1] + layer + block, whole if plan.recipe.refit_steps else 0)


CLIPS, WALKS, INPUTS, FACTORS, LAYERS, MODEL = (
    *("generating clips", "clips through the model", "measuring inputs"),
    *("factorising", "refitting layers", "refitting the model"),
)
ON_GPU_IN_BF16 = (CLIPS, MODEL)


def conversion_work(plan: ConversionPlan, shape: Sequence[int], *, makes_clips: bool) -> dict[str, Work]:
    """The work of a conversion by part, for clips [C, F, H, W]; `makes_clips` says whether the model generates them."""
    if plan.recipe.init == "random":
        return {}
    if plan.recipe.init != "calibrated":
        return {FACTORS: len(plan.layers) * (_factorise_guessed(plan) + _spectrum(plan.source_config.dim))}
    made = {CLIPS: _generate(plan)} if makes_clips else {}
    counts = _Counts(plan, shape)
    made |= {WALKS: counts.walks(), INPUTS: counts.inputs(), FACTORS: counts.factorise(), LAYERS: counts.layers()}
    return made | ({MODEL: counts.model()} if plan.recipe.refit_steps and plan.method.refit else {})


def clip_shape(plan: ConversionPlan, data: Path | None) -> tuple[int, ...]:
    """[C, F, H, W] of the clips of the folder `data`, or of the model's own."""
    if data is None:
        return own_clips(plan).shape(plan.source_config)
    return ClipFolder(data, plan.source_config).clip_shape


def _generate(plan: ConversionPlan) -> Work:
    return own_clips(plan).work(plan.source_config, (plan.recipe.clips or 1) + more_clips(plan.recipe))


def _views(plan: ConversionPlan, frames: int) -> list[tuple[Tensor, int]]:
    """Of a clip's windows, which frame sees which, bool [F, F], and how many frames' queries count."""
    regime, found = regime_of(plan.recipe), []
    for seen, chunks in window_views(frames, regime.streaming):
        if regime.present == "exact" and chunks is not None and len(chunks) == 1:
            continue  # without a past
        visible = torch.ones(len(seen), len(seen), dtype=torch.bool)
        found.append((chunk_mask(chunks, regime.streaming) if chunks else visible, (chunks or (len(seen),))[-1]))
    return found


def _spectrum(dim: int) -> Work:
    """Singular values of [W_K; W_V], for the report of a layer."""
    return Work(double=(2 + 4 / 3 * SLOW) * dim**3)


def _factorise_guessed(plan: ConversionPlan) -> Work:
    """A layer's factors in the metric of guessed inputs, whose root is a diagonal and a few rows."""
    dim, ranks = plan.source_config.dim, (plan.recipe.kv_rank, plan.recipe.q_rank)
    eigenproblems = sum(isinstance(rank, int) for rank in ranks)
    return Work(double=(1 + eigenproblems * (1 + 4 / 3 * SLOW)) * dim**3)


class _Counts:
    """The parts of a calibrated conversion. Work of a window is that of one clip's, added up over its windows."""

    def __init__(self, plan: ConversionPlan, shape: Sequence[int]) -> None:
        self.plan, self.config = plan, plan.source_config
        self.target, self.regime = target_of(plan), regime_of(plan.recipe)
        self.frame = self.config.tokens_per_frame(*shape[2:])
        count = plan.recipe.clips or 1
        self.held = count // 5
        self.fitted = count - self.held
        self.views = _views(plan, shape[1])
        self.draws = 1 if self.regime.streaming else 2  # windows that a clip has of each view
        self.batch = batch_of(shape, self.config)
        self.exact = self.regime.present == "exact"

    def _per_clip(self, work: Callable[[int, int], Work]) -> Work:
        """Of a clip's windows, by the tokens of each and those whose queries count."""
        total = NOTHING
        for visible, counted in self.views:
            total += work(len(visible) * self.frame, counted * self.frame)
        return self.draws * total

    def _pass(self, config: Any) -> Work:
        """A model's passes over a clip's windows."""
        total = NOTHING
        for visible, _ in self.views:
            total += forward_work(config, visible, self.frame)
        return self.draws * total

    @property
    def _largest(self) -> int:
        """Tokens of the largest batch of windows."""
        return self.batch * max(len(visible) for visible, _ in self.views) * self.frame

    def _clips_sampled(self, most: int = sys.maxsize) -> float:
        """How many clips' windows an error is measured on, at most so many batches of them."""
        return self._clips_in(batches_enough(self._largest, most))

    def _clips_in(self, batches: int) -> float:
        """How many clips' windows so many batches are, at most all that are fitted to."""
        return min(self.fitted, batches * self.batch / (len(self.views) * self.draws))

    @property
    def _judged(self) -> int:
        """Held-back clips, once behind clean pasts and once with noisy ones."""
        return self.held * (2 if self.regime.streaming else 1)

    @property
    def _steps(self) -> tuple[int, int]:
        """Of a layer's conversion: how often it is factorised, and its steps with all refits."""
        target, layer = self.target, next(iter(self.plan.layers.values()))
        fits = target.config.head_dim if target.rope == "head" else target.config.head_dim - layer.qk_rope_head_dim
        made = 1 + (2 if target.rope != "head" else 0)
        made += layer.qk_nope_head_dim < fits or layer.v_head_dim < target.config.head_dim
        made += target.key_norm == "latent" or target.q_lora_rank is not None
        return made, made + ((1 if self.exact else 2) if target.method.refit else 0)

    @property
    def _tried(self) -> tuple[int, int]:
        """Numbers of rotary components, and budgets, whose errors are measured in each layer."""
        recipe = self.plan.recipe
        budget = (recipe.kv_rank or 0) + (recipe.rope_dim or 0 if recipe.rope == "cached" else 0)
        return len(self.target.counts(budget)), len(BUDGETS) if recipe.allocation == "adaptive" else 1

    def walks(self) -> Work:
        """Two walks of all clips, and the models that are carried along."""
        dense, layers = self._pass(self.config), self.config.num_layers
        first = float(self.fitted)
        if self.plan.recipe.allocation == "adaptive":
            most = max(1, PROBE_SCALARS // (self._largest * self.config.dim))
            probed = self._clips_sampled(min(PROBES, most))
            first += probed * (layers + 1) / 2  # a layer's own from there to the end
        return (first + self.fitted + (1 + self._steps[1]) * self._judged) * dense

    def inputs(self) -> Work:
        """Moments of every layer's inputs, and what its output makes of their errors."""
        dim, heads, width = self.config.dim, self.config.num_heads, self.config.head_dim

        def window(tokens: int, counted: int) -> Work:
            past = tokens - counted if self.exact else tokens
            some = min(counted, max(16, min(SAMPLES, PAIRS // (heads * self.batch * tokens))))
            return Work(
                products=2 * dim**2 * (past + counted + 3 * tokens + 3 * some + 2 * past),
                attention=14 * some * tokens * dim,  # 4 of them forward
                double=2 * dim**2 * 2 * past + 2 * counted * dim * width,
            )

        return self.fitted * len(self.plan.layers) * self._per_clip(window)

    def factorise(self) -> Work:
        """Every layer in the metric of its inputs, as often as it is converted."""
        dim, layer = self.config.dim, next(iter(self.plan.layers.values()))
        cubes = 1 / 3 + 8 + 4 / 3 * SLOW + (3 + 4 / 3 * SLOW if self.target.q_lora_rank is not None else 0)
        one = Work(double=cubes * dim**3 + 8 * dim**2 * layer.kv_lora_rank)
        times = self._tried[0] + (self.plan.recipe.allocation == "adaptive") + self._steps[0]
        return len(self.plan.layers) * (times * one + _spectrum(dim))

    def layers(self) -> Work:
        """Each layer's error at every step and budget, and its refits."""
        counts, budgets = self._tried
        dense, student = self._per_clip(self._dense), self._per_clip(self._student)
        fit = self._per_clip(self._fit_output) if self.target.method.refit and not self.exact else NOTHING
        some, adaptive = self._clips_sampled(MEASURED), self.plan.recipe.allocation == "adaptive"
        judged = self._clips_sampled()
        total = some * (dense + counts * budgets * (student + fit))
        total += judged * (dense + self._steps[1] * student)
        if self.target.method.refit and self.exact:
            chosen = self._clips_in(BATCHES)
            total += chosen * (dense + student + self._per_clip(self._search))
            total += (self.held or self.fitted) * (dense + 2 * student)
        elif self.target.method.refit:
            seen = (1 if adaptive else 0) + (1 if judged < self.fitted else 0)  # where a judge's outputs do not serve
            total += self.fitted * (((1 if adaptive else 0) + 2) * fit + seen * dense)
            total += Work(products=2 * QUERIES * self._mean_tokens * self.config.dim * (self.config.head_dim + 4))
        return len(self.plan.layers) * total

    @property
    def _mean_tokens(self) -> float:
        return self.frame * sum(len(visible) for visible, _ in self.views) / len(self.views)

    def _dense(self, tokens: int, _counted: int) -> Work:
        """The teacher's self-attention of a window."""
        dim = self.config.dim
        return Work(products=8 * tokens * dim**2, attention=4 * tokens**2 * dim)

    def _student(self, tokens: int, counted: int) -> Work:
        """A converted layer's attention: of the newest chunk beside an exact present, else of all tokens."""
        dim, heads = self.config.dim, self.config.num_heads
        layer = next(iter(self.plan.layers.values()))
        score, value = layer.qk_nope_head_dim + layer.qk_rope_head_dim, layer.v_head_dim
        up = layer.kv_lora_rank * heads * (layer.qk_nope_head_dim + value)
        if self.exact:
            past = tokens - counted
            return Work(
                products=2 * counted * 4 * dim**2 + 2 * past * (dim**2 + dim * layer.kv_lora_rank + up),
                attention=counted * (4 * counted * dim + 2 * past * heads * (score + value)),
            )
        queries = self.target.q_lora_rank or self.config.head_dim * (self.target.rope != "head")
        norm = dim**2 if self.target.key_norm == "token" else 0
        down = dim * (self.target.q_lora_rank or dim) + heads * score * queries
        each = down + norm + dim * layer.kv_lora_rank + up + heads * value * dim
        return Work(products=2 * tokens * each, attention=2 * tokens**2 * heads * (score + value))

    def _fit_output(self, tokens: int, counted: int) -> Work:
        """A regression of the output projection on a window's heads."""
        width = self.config.num_heads * next(iter(self.plan.layers.values())).v_head_dim
        return self._student(tokens, counted) + Work(double=2 * counted * width * (width + self.config.dim))

    def _search(self, tokens: int, counted: int) -> Work:
        """All evaluations of a refit's search, forward and backward, on some queries of a window."""
        dim, heads, past = self.config.dim, self.config.num_heads, tokens - counted
        layer = next(iter(self.plan.layers.values()))
        some = min(counted, max(16, SCORES // (heads * self.batch * tokens)))
        up = layer.kv_lora_rank * heads * (layer.qk_nope_head_dim + layer.v_head_dim)
        return EVALUATIONS * Work(
            products=2 * (2 * past * up + 2 * some * dim**2), attention=3.5 * 4 * some * tokens * dim
        )

    def model(self) -> Work:
        """The steps of the whole model's refit, at the first of its rates, and what they are judged by."""
        dense, student = self._pass(self.config), self._pass(self.plan.config)
        windows = len(self.views) * self.draws
        tokens = max(len(visible) for visible, _ in self.views) * self.frame
        clips = min(REFIT_BATCH, self.batch)
        again = clips * tokens * self.config.dim * self.config.num_layers > KEPT_SCALARS
        # A frozen weight has no gradient of its own: on the way back a product is made once, attention 2.5 times.
        back = Work(products=student.products, attention=2.5 * student.attention, moved=student.moved)
        step = dense + (2 if again else 1) * student + back
        judged = self.held * (DRAWS * (dense + 2 * student) + 2 * student)
        return (self.plan.recipe.refit_steps or 0) * clips / windows * step + judged
