"""A layer's conversion from its weights, or at random: tensors and what they lose.

Only the matrices of one layer, or of a few narrow ones, are ever in memory in float64.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mlaconvert.conversion.plan import ConversionPlan, mla_of
from mlaconvert.conversion.recipes import timesteps_of, token_grid
from mlaconvert.errors import CheckpointError
from mlaconvert.families.checkpoint import Checkpoint
from mlaconvert.files.scratch import return_memory
from mlaconvert.files.store import check_finite
from mlaconvert.latent.factorize import Factors, factorize_layer
from mlaconvert.latent.lapack import LINALG_ERRORS
from mlaconvert.latent.moments import modulation_moments
from mlaconvert.latent.pairs import mean_rotation
from mlaconvert.latent.random_start import random_layer
from mlaconvert.latent.spectrum import effective_rank, energy_at, gram, singular_values_from_gram
from mlaconvert.latent.threads import SideBySide
from mlaconvert.latent.weights import AttentionWeights
from mlaconvert.model.conditions import timestep_embedding
from mlaconvert.model.window import full_window

THRESHOLD = 0.99  # share of the energy that the reported effective rank holds
# Layers are converted side by side in so many bytes; each takes about so many float64 matrices of its width squared.
_ROOM, _MATRICES = 400_000_000, 10


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """What the conversion of one layer found and lost.

    `singular_values` are those of the pretrained [W_K; W_V], [D] float64 descending; `errors` are
    `factorize.Factors.errors`, in the metric of guessed inputs; of a calibrated layer, the attention output's on the
    calibration inputs after each step.
    """

    layer: int
    kv_lora_rank: int
    singular_values: Tensor
    errors: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """Plain data, to six significant digits."""
        return {
            "layer": self.layer,
            "effective_rank": effective_rank(self.singular_values, THRESHOLD),
            "energy_at_kv_rank": digits(energy_at(self.singular_values, self.kv_lora_rank)),
            "errors": {name: digits(value) for name, value in self.errors.items()},
            "singular_values": [digits(value) for value in self.singular_values.tolist()],
        }


def digits(value: float) -> float:
    """`value` to six significant digits, as it is written to JSON."""
    return float(f"{value:.6g}")


def read_finite(checkpoint: Checkpoint, canonical: str) -> Tensor:
    """One tensor in the file's dtype. Raises CheckpointError naming it when it holds a NaN or an infinity."""
    tensor = checkpoint.read(canonical)
    check_finite(tensor, checkpoint.names[canonical], checkpoint.store.path)
    return tensor


def time_modulation(checkpoint: Checkpoint, timesteps: Sequence[float]) -> Tensor:
    """What the time embedding gives to every block's self-attention: (shift, scale), float64 [T, 2, D].

    Zeros for a model whose time is not embedded as Wan's. Where each block has a projection of its own, it is what that
    reads, [T, D]; of a model with actions while nothing is done.
    """
    dim = checkpoint.config.dim
    if checkpoint.passengers.times_itself:
        return torch.zeros(len(timesteps), 2, dim, dtype=torch.float64)

    def linear(name: str, x: Tensor, rows: int) -> Tensor:
        weight, bias = (read_finite(checkpoint, f"{name}.{leaf}")[:rows].double() for leaf in ("weight", "bias"))
        return F.linear(x, weight, bias)

    wave = timestep_embedding(torch.tensor(timesteps, dtype=torch.float64), checkpoint.config.freq_dim)
    embedding = linear("time_embedding.2", F.silu(linear("time_embedding.0", wave, dim)), dim)
    if "action_embedding.0.weight" in checkpoint.names:
        still = timestep_embedding(torch.zeros(1, dtype=torch.float64), checkpoint.config.freq_dim)
        hidden = F.silu(linear("action_embedding.0", still, dim))
        return F.silu(embedding + linear("action_embedding.2", hidden, dim))
    time = linear("time_projection.1", F.silu(embedding), 2 * dim)
    if checkpoint.config.fps is not None:
        rate = read_finite(checkpoint, "fps_embedding.weight")[checkpoint.config.fps_row].double()
        time = time + linear("fps_projection.2", F.silu(linear("fps_projection.0", rate, dim)), 2 * dim)
    return time.unflatten(-1, (2, dim))


def layer_modulation(checkpoint: Checkpoint, layer: int, time: Tensor) -> Tensor:
    """(shift, scale) of one block's self-attention, float64 [T, 2, D]."""
    if checkpoint.passengers.times_itself:
        return time
    if time.ndim == 2:
        weight, bias = (read_finite(checkpoint, f"blocks.{layer}.modulation.{leaf}") for leaf in ("weight", "bias"))
        rows = 2 * checkpoint.config.dim
        return F.linear(time, weight[:rows].double(), bias[:rows].double()).unflatten(-1, (2, -1))
    return time + read_finite(checkpoint, f"blocks.{layer}.modulation")[0, :2].double()


def convert_layer(
    checkpoint: Checkpoint, plan: ConversionPlan, layer: int, time: Tensor | None, device: torch.device
) -> tuple[Factors, LayerReport]:
    """Factors of one layer, made as `plan.recipe.init` says; `time` is what `time_modulation` gives."""
    weights = checkpoint.attention(layer)
    factors = STARTS[plan.recipe.init](checkpoint, plan, weights, layer, time, device)
    return factors, layer_report(weights, plan, layer, factors.errors, device)


def layer_report(
    weights: AttentionWeights, plan: ConversionPlan, layer: int, errors: Mapping[str, float], device: torch.device
) -> LayerReport:
    """What is told of one layer: the spectrum of the pretrained [W_K; W_V], and the `errors` of its conversion."""
    joint = gram(weights.k_weight.to(device), weights.v_weight.to(device))
    return LayerReport(
        layer=layer,
        kv_lora_rank=plan.layers[layer].kv_lora_rank,
        singular_values=singular_values_from_gram(joint).cpu(),
        errors=errors,
    )


def _draw(
    _checkpoint: Checkpoint,
    plan: ConversionPlan,
    weights: AttentionWeights,
    layer: int,
    _time: Tensor | None,
    _device: torch.device,
) -> Factors:
    mla = mla_of(plan.config)
    return random_layer(
        weights,
        plan.layers[layer],
        num_heads=plan.source_config.num_heads,
        mla=mla,
        # A generator a layer: a layer comes out the same whichever others are converted.
        generator=torch.Generator().manual_seed((plan.recipe.seed << 16) + layer),
    )


def _factorize(
    checkpoint: Checkpoint,
    plan: ConversionPlan,
    weights: AttentionWeights,
    layer: int,
    time: Tensor | None,
    device: torch.device,
) -> Factors:
    assert time is not None
    config, mla, target = plan.source_config, mla_of(plan.config), plan.layers[layer]
    if mla.rope == "head":  # nothing loses its rotation
        rho = torch.ones(config.head_dim // 2, dtype=torch.complex128)
    else:
        height, width = token_grid(plan.recipe, config)
        queries, keys = full_window(plan.recipe.streaming, plan.recipe.frames)
        rho = mean_rotation(config.rope_split, queries=queries, keys=keys, height=height, width=width)
    modulation = layer_modulation(checkpoint, layer, time).to(device)
    try:
        moments = modulation_moments(weights, modulation, num_heads=config.num_heads, eps=config.eps, rho=rho)
        factors = factorize_layer(
            weights,
            target,
            moments,
            num_heads=config.num_heads,
            mla=mla,
        )
    except LINALG_ERRORS:
        factors = None
    if factors is None or not all(math.isfinite(error) for error in factors.errors.values()):
        raise CheckpointError(
            f"{checkpoint.store.path}: the self-attention weights of layer {layer} are degenerate (zero or far out of "
            "range) and cannot be factorised; leave the layer dense with --layers"
        )
    return factors


# How each `init` that needs no clips makes a layer, of a checkpoint and plan, from its attention weights; a tensor is
# what `time_modulation` gives.
_Start = Callable[[Checkpoint, ConversionPlan, AttentionWeights, int, Tensor | None, torch.device], Factors]
STARTS: dict[str, _Start] = {"svd": _factorize, "lossless": _factorize, "random": _draw}


def from_weights(
    checkpoint: Checkpoint, plan: ConversionPlan, layers: Sequence[int], device: torch.device
) -> Generator[tuple[int, Factors, LayerReport], None, None]:
    """Those `layers` converted from their weights alone, or drawn at random; each comes out the same on its own.

    Eigenproblems hardly use several threads, layers side by side do: on a CPU as many as there are threads, as far as
    their matrices fit in a bounded room. Such a layer has one thread in any case: its bits do not depend on the others.
    """
    drawn = STARTS[plan.recipe.init] is _draw
    time = None if drawn else time_modulation(checkpoint, timesteps_of(plan.recipe, plan.source_config))
    room = _ROOM // (_MATRICES * 8 * plan.config.dim**2)
    if device.type != "cpu" or room < 2:
        for layer in layers:
            yield layer, *convert_layer(checkpoint, plan, layer, time, device)
            return_memory()  # side by side, threads would wait for each other at this
        return
    together = max(1, min(torch.get_num_threads(), room, len(layers)))
    running: deque[tuple[int, Future[tuple[Factors, LayerReport]]]] = deque()
    pool = SideBySide(together)
    try:
        for layer in layers:
            running.append((layer, pool.submit(convert_layer, checkpoint, plan, layer, time, device)))
            if len(running) == together:
                done, made = running.popleft()
                yield done, *made.result()
        for done, made in running:
            yield done, *made.result()
    finally:
        pool.shutdown(cancel_futures=True)
