"""What a layer becomes, and the measured error of each way to divide its scalars."""

from __future__ import annotations

import copy
import math
from bisect import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.mla import KeyNorm, MLAConfig, MLALayer, Present, RopeMode
from mlaconvert.conversion.calibration.layer import Layer
from mlaconvert.conversion.calibration.measure import without
from mlaconvert.conversion.calibration.method import Method
from mlaconvert.conversion.calibration.newest import attention_error
from mlaconvert.conversion.calibration.refit import refit_output
from mlaconvert.files.scratch import return_memory
from mlaconvert.latent.allocate import allocate
from mlaconvert.latent.components import choose_components
from mlaconvert.latent.factorize import Factors, factorize_layer, narrower
from mlaconvert.latent.moments import LayerMoments
from mlaconvert.latent.pairs import highest_pairs
from mlaconvert.latent.weights import AttentionWeights
from mlaconvert.model.attention.latent import LatentAttention

PAST_ONLY = (
    *("kv_b_proj.weight", "kv_b_proj.bias", "q_b_proj.weight"),
    *("past_out_proj.weight", "k_rope_proj.weight", "k_rope_proj.bias"),
)
"""What beside an exact present only meets the past, and decides nothing of what is cached."""
REFITTED = ("o.weight", "o.bias", *PAST_ONLY)
"""What refits may change."""
MEASURED = 6  # batches of windows that ways to divide a layer are measured on, at most


def branch(student: LatentAttention) -> LatentAttention:
    """A copy that refits of the other do not change; all else is shared."""
    shared = {id(tensor): tensor for name, tensor in student.named_parameters() if name not in REFITTED}
    return copy.deepcopy(student, cast(dict[int, Any], shared))


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
    present: Present = "latent"
    nope_dim: int | None = None
    rope_dim: int | None = None
    rope_selection: str = "energy"
    method: Method = field(default_factory=Method)

    @property
    def weighted(self) -> bool:
        """Whether heads and channels count with what the output makes of their errors."""
        return self.method.weights

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
            present=self.present,
            calibration=calibration,
        )

    def factors(self, layer: Layer, shape: MLALayer, moments: LayerMoments) -> Factors:
        """The factors of `layer` in the metric of `moments`."""
        return factorize_layer(
            layer.weights,
            shape,
            without(moments, self.method),
            num_heads=self.config.num_heads,
            mla=self.mla([shape]),
            weighted=self.weighted,
        )

    def convert(self, layer: Layer, shape: MLALayer, moments: LayerMoments) -> LatentAttention:
        """`layer` converted in the metric of `moments`, as a module that runs beside its teacher."""
        tensors = self.factors(layer, shape, moments).tensors
        module = self.module(layer, shape, tensors)
        del tensors
        return_memory()
        return module

    def convert_with_energies(
        self, layer: Layer, shape: MLALayer, moments: LayerMoments, *, rank: int
    ) -> tuple[LatentAttention, Tensor]:
        """`convert`, and the output's squared error without each channel of a latent as wide as `rank`, on the CPU.

        They are in descending order; `rank` is no less than the shape's own.
        """
        made = self.factors(layer, replace(shape, kv_lora_rank=rank), moments)
        assert made.energies is not None
        student = self.module(layer, shape, narrower(made.tensors, rank, shape.kv_lora_rank))
        return student, made.energies.cpu()

    def components(
        self, weights: AttentionWeights, moments: LayerMoments, counts: Sequence[int]
    ) -> list[tuple[tuple[int, int], ...]]:
        """The rotary components to keep, for each number of them: the highest pairs, or by what losing them costs."""
        if self.rope_selection == "highest":
            return [highest_pairs(self.config.rope_split, count) for count in counts]
        return choose_components(
            weights,
            without(moments, self.method),
            num_heads=self.config.num_heads,
            counts=counts,
            several=self.method.components,
            weighted=self.weighted,
        )

    def fit_output(self, layer: Layer, student: LatentAttention) -> None:
        """`refit_output`, unless refits are switched off or the output serves an exact present."""
        if self.method.refit and self.present == "latent":
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
        self,
        layer: Layer,
        moments: LayerMoments,
        *,
        counts: Sequence[int],
        budgets: Sequence[int],
        inputs: int = MEASURED,
    ) -> ErrorTable:
        """The layer converted with each number of rotary components at each budget, W_O refitted, on some inputs."""
        components = self.components(layer.weights, moments, counts)
        some = layer.sample(inputs)
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
    at `budget` scalars (`LayerWalk.velocity_errors`). No layer gets less than 1/spread or more than `spread` times the
    average, and none more than `largest`.
    """

    def curve(index: int) -> Callable[[int], float]:
        table = tables[index]
        unit = velocity_errors[index] / table.best(budget)[0] ** 2
        return lambda scalars: unit * table.best(scalars)[0] ** 2

    smallest = max(min(min(curve) for curve in table.errors.values() if curve) for table in tables)
    bounds = (max(smallest, round(budget / spread)), min(largest, max(budget, round(budget * spread))))
    return allocate([curve(i) for i in range(len(tables))], budget * len(tables), bounds=bounds)
