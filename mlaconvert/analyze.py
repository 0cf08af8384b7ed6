"""How compressible the attention weights of a checkpoint are, layer by layer.

A dense layer is judged on W_K, W_V and [W_K; W_V]; an MLA layer on M = [W_UK diag(g) W_DKV; W_UV diag(g)
W_DKV], with g the gain of the latent's norm (VideoMLA, arXiv 2605.30351). r_0.99 of the weights does not
predict the quality after healing.

With clips a dense layer is also judged by the inputs that arrive: its weighted spectrum is that of S^(1/2) C^(1/2),
with C the covariance of the inputs and S how attention's output moves with them (`LayerMoments.sensitivity`). A
calibrated latent of r channels holds its leading r directions. The energy beyond them is the predicted squared error of
the output: to first order in the inputs, each off on its own, before any refit. It compares budgets and layers; it is
no measurement.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from mlaconvert.calibrate import Layer, Regime, Sweep, layer_moments
from mlaconvert.checkpoint import check_finite
from mlaconvert.config import MLALayer, WanConfig, default_budget
from mlaconvert.data import Clips
from mlaconvert.errors import CheckpointError, ConfigError, UnsupportedModelError
from mlaconvert.factorize import cholesky
from mlaconvert.families import Checkpoint
from mlaconvert.lapack import LinAlgError
from mlaconvert.scratch import return_memory
from mlaconvert.spectrum import (
    check_threshold,
    effective_rank,
    energy_at,
    gram,
    product_singular_values,
    random_rank_baseline,
    relative_error,
    singular_values_from_gram,
)

T = TypeVar("T")
BUDGETS = (1, 2, 3, 4, 6, 7, 8, 10, 12)  # latent channels in 48ths of the width; 7 is VideoMLA's cache


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """The singular values of one matrix, [n] float64 descending on the CPU, and what they say.

    `energy` is the share of the energy within the budget's rank, `error` the relative Frobenius error of the
    best approximation of that rank.
    """

    singular_values: Tensor
    effective_rank: int
    energy: float
    error: float

    def to_json(self, singular_values: bool) -> dict[str, Any]:
        """Plain data; the singular values only on request."""
        data: dict[str, Any] = {
            "effective_rank": self.effective_rank,
            "energy_at_budget": self.energy,
            "relative_error": self.error,
        }
        if singular_values:
            data["singular_values"] = self.singular_values.tolist()
        return data


@dataclass(frozen=True, kw_only=True)
class WeightedSpectrum(Spectrum):
    """A spectrum in the metric of real inputs.

    Its squared singular values are squared output errors, in units in which the output's mean square is
    `output_power`; `error` is relative to that output.
    """

    output_power: float

    def predicted_error(self, rank: int) -> float:
        """Relative error of attention's output with a latent of `rank` channels, to first order, before any refit."""
        if not self.output_power:
            return 0.0
        return math.sqrt(float(self.singular_values[rank:].square().sum()) / self.output_power)


@dataclass(frozen=True, kw_only=True)
class DenseSpectra:
    """A dense layer: W_K, W_V and both on top of each other, each with D singular values.

    `weighted`, with clips, is the spectrum in the metric of the inputs; its `error` at a rank is the predicted one.
    """

    layer: int
    key: Spectrum
    value: Spectrum
    joint: Spectrum
    weighted: WeightedSpectrum | None = None

    def to_json(self, singular_values: bool) -> dict[str, Any]:
        """Plain data."""
        spectra: dict[str, Spectrum] = {"key": self.key, "value": self.value, "joint": self.joint}
        if self.weighted is not None:
            spectra["weighted"] = self.weighted
        return {
            "layer": self.layer,
            "kind": "dense",
            **{name: spectrum.to_json(singular_values) for name, spectrum in spectra.items()},
        }


@dataclass(frozen=True, kw_only=True)
class LatentSpectrum:
    """An MLA layer: singular values and effective rank of M, and the rank of random Gaussian factors."""

    layer: int
    kv_lora_rank: int
    singular_values: Tensor
    effective_rank: int
    baseline_rank: int

    @property
    def occupancy(self) -> float:
        """Share of the latent's channels that the effective rank takes."""
        return self.effective_rank / self.kv_lora_rank

    @property
    def baseline_occupancy(self) -> float:
        """The occupancy of random Gaussian factors of the same shapes."""
        return self.baseline_rank / self.kv_lora_rank

    def to_json(self, singular_values: bool) -> dict[str, Any]:
        """Plain data."""
        data: dict[str, Any] = {
            "layer": self.layer,
            "kind": "mla",
            "kv_lora_rank": self.kv_lora_rank,
            "effective_rank": self.effective_rank,
            "occupancy": self.occupancy,
            "baseline_rank": self.baseline_rank,
            "baseline_occupancy": self.baseline_occupancy,
        }
        if singular_values:
            data["singular_values"] = self.singular_values.tolist()
        return data


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Smallest, median and largest of one figure over the layers."""

    min: float
    median: float
    max: float

    @classmethod
    def of(cls, found: Sequence[float]) -> Summary:
        """Of at least one figure."""
        return cls(min=min(found), median=statistics.median(found), max=max(found))


@dataclass(frozen=True, kw_only=True)
class BudgetError:
    """A latent of `kv_rank` channels: relative error of attention's output that each weighted layer predicts for it.

    `cached_scalars`, of a token and layer, are the latent and the key norm; `cache_share` of what dense layers cache.
    """

    kv_rank: int
    cached_scalars: int
    cache_share: float
    errors: tuple[float, ...]

    @property
    def summary(self) -> Summary:
        """Over the layers."""
        return Summary.of(self.errors)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "kv_rank": self.kv_rank,
            "cached_scalars": self.cached_scalars,
            "cache_share": self.cache_share,
            "predicted_error": vars(self.summary),
            "predicted_errors": list(self.errors),
        }


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """The spectra of a checkpoint's layers, in ascending layer order.

    `kv_rank` is the latent rank at which dense layers are judged, `threshold` the share of energy of the
    effective ranks, `dim` the model's width D and `num_layers` all its layers, analysed or not. `calibration` says
    which inputs the weighted spectra saw; None without.
    """

    source: str
    description: str
    dim: int
    num_layers: int
    kv_rank: int
    threshold: float
    layers: tuple[DenseSpectra | LatentSpectrum, ...]
    calibration: dict[str, Any] | None = None

    @property
    def dense(self) -> tuple[DenseSpectra, ...]:
        """The dense layers."""
        return tuple(layer for layer in self.layers if isinstance(layer, DenseSpectra))

    @property
    def latent(self) -> tuple[LatentSpectrum, ...]:
        """The MLA layers."""
        return tuple(layer for layer in self.layers if isinstance(layer, LatentSpectrum))

    @property
    def weighted(self) -> dict[int, WeightedSpectrum]:
        """The weighted spectra by layer; empty without clips."""
        return {layer.layer: layer.weighted for layer in self.dense if layer.weighted is not None}

    def budgets(self) -> tuple[BudgetError, ...]:
        """Predicted errors of latents of D/48 to D/4 channels and of `kv_rank`, ascending; none without clips."""
        ranks = {max(1, self.dim * share // 48) for share in BUDGETS} | {self.kv_rank}
        spectra = list(self.weighted.values())
        return tuple(
            BudgetError(
                kv_rank=rank,
                cached_scalars=rank + 1,
                cache_share=(rank + 1) / (2 * self.dim),
                errors=tuple(spectrum.predicted_error(rank) for spectrum in spectra),
            )
            for rank in sorted(ranks if spectra else ())
        )

    def summary(self) -> dict[str, Summary]:
        """Min, median and max over the layers of every figure that at least one layer has."""
        dense, latent, weighted = self.dense, self.latent, self.weighted.values()
        figures: dict[str, Iterable[float]] = {
            "key_rank": (layer.key.effective_rank for layer in dense),
            "value_rank": (layer.value.effective_rank for layer in dense),
            "joint_rank": (layer.joint.effective_rank for layer in dense),
            "energy_at_budget": (layer.joint.energy for layer in dense),
            "relative_error": (layer.joint.error for layer in dense),
            "weighted_rank": (spectrum.effective_rank for spectrum in weighted),
            "predicted_error": (spectrum.error for spectrum in weighted),
            "kv_lora_rank": (layer.kv_lora_rank for layer in latent),
            "effective_rank": (layer.effective_rank for layer in latent),
            "occupancy": (layer.occupancy for layer in latent),
            "baseline_rank": (layer.baseline_rank for layer in latent),
            "baseline_occupancy": (layer.baseline_occupancy for layer in latent),
        }
        values = {name: list(figure) for name, figure in figures.items()}
        return {name: Summary.of(found) for name, found in values.items() if found}

    def to_json(self, *, singular_values: bool = False) -> dict[str, Any]:
        """Plain data with every figure; the singular values only on request."""
        data: dict[str, Any] = {
            "source": self.source,
            "description": self.description,
            "dim": self.dim,
            "num_layers": self.num_layers,
            "kv_rank": self.kv_rank,
            "threshold": self.threshold,
            "summary": {name: vars(figure) for name, figure in self.summary().items()},
            "layers": [layer.to_json(singular_values) for layer in self.layers],
        }
        if self.calibration is not None:
            data |= {"calibration": self.calibration, "budgets": [budget.to_json() for budget in self.budgets()]}
        return data


def analyze(
    checkpoint: Checkpoint,
    *,
    kv_rank: int | None = None,
    threshold: float = 0.99,
    layers: Sequence[int] | None = None,
    clips: Clips | None = None,
    regime: Regime | None = None,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Analysis:
    """Spectra of the self-attention weights of `layers` (all by default), one layer in memory at a time.

    `kv_rank` is the latent rank at which dense layers are judged, by default that of `config.default_budget`; with
    clips the latent is the whole cache of a token but its key norm, so it takes the rotary key's channels too.
    `clips` go through a dense model layer by layer and add the weighted spectra; `regime` says which queries see
    which keys, by default as the model streams. The float64 maths runs on `device`. `progress(done, total)` is called
    after each layer; with clips, layers that are only passed through count too.

    Raises ConfigError for a rank, threshold or layer that the model cannot have, or a device without float64;
    CheckpointError for a weight that is missing or not finite, or a layer that the clips leave degenerate;
    UnsupportedModelError for clips through a model that is converted already.
    """
    config = checkpoint.config
    check_threshold(threshold)
    if kv_rank is None:
        budget = default_budget(config)
        kv_rank = budget.kv_lora_rank + (0 if clips is None else budget.qk_rope_head_dim)
    if not 1 <= kv_rank <= config.dim:
        raise ConfigError(f"kv_rank is {kv_rank}, but layers are {config.dim} wide: give 1 to {config.dim}")
    chosen = _chosen_layers(config, layers)
    device = torch.device(device)
    if device.type == "mps":
        raise ConfigError("device mps has no float64, which spectra need: use cpu or cuda")

    visits: Iterable[tuple[int, Layer | None]] = ((index, None) for index in chosen)
    total, calibration = len(chosen), None
    if clips is not None:
        if config.mla is not None:
            raise UnsupportedModelError(
                f"{checkpoint.store.path}: it is converted already, and clips weigh a dense model; give the dense model"
            )
        regime = regime or Regime.of(config.streaming)
        calibration = {"clips": len(clips.latents), **regime.to_json()}
        sweep = Sweep(checkpoint, clips, regime, device=device)
        # Layers after the last one that was asked for need not be run.
        visits, total = ((layer.index, layer) for layer in islice(sweep, chosen[-1] + 1)), chosen[-1] + 1

    found: list[DenseSpectra | LatentSpectrum] = []
    with closing(read_ahead(partial(_weights, checkpoint), chosen)) as weights:
        for done, (index, layer) in enumerate(visits, start=1):
            mla = config.mla.layers[index] if config.mla is not None else None
            if index in chosen and mla is None:
                weighted = None if layer is None else _weighted_spectrum(checkpoint, layer, kv_rank, threshold)
                found.append(_dense_spectra(index, next(weights), weighted, kv_rank, threshold, device))
            elif mla is not None:
                found.append(_latent_spectrum(checkpoint, index, next(weights), mla, threshold, device))
            return_memory()
            if progress is not None:
                progress(done, total)
    return Analysis(
        source=checkpoint.store.source,
        description=checkpoint.describe(),
        dim=config.dim,
        num_layers=config.num_layers,
        kv_rank=kv_rank,
        threshold=threshold,
        layers=tuple(found),
        calibration=calibration,
    )


def _chosen_layers(config: WanConfig, layers: Sequence[int] | None) -> list[int]:
    if layers is None:
        return list(range(config.num_layers))
    if not layers:
        raise ConfigError("no layers to analyse: name at least one, or leave layers out to take all")
    for index in layers:
        if not 0 <= index < config.num_layers:
            raise ConfigError(f"layer {index} does not exist: the model has 0 to {config.num_layers - 1}")
    return sorted(set(layers))


def _weights(checkpoint: Checkpoint, index: int) -> dict[str, Tensor]:
    """What the spectra of a layer are made of, checked, by the name below `self_attn.`."""
    prefix = f"blocks.{index}.self_attn."
    mla = checkpoint.config.mla
    names = ["k.weight", "v.weight"]
    if mla is not None and mla.layers[index] is not None:
        names = ["kv_b_proj.weight", "kv_a_proj_with_mqa.weight"]
        names += ["kv_a_layernorm.weight"] if mla.key_norm == "latent" else []
    tensors = {name: checkpoint.read(prefix + name) for name in names}
    for name, tensor in tensors.items():
        check_finite(tensor, checkpoint.info(prefix + name).name, checkpoint.store.path)
    return tensors


def _dense_spectra(
    index: int,
    weights: dict[str, Tensor],
    weighted: WeightedSpectrum | None,
    kv_rank: int,
    threshold: float,
    device: torch.device,
) -> DenseSpectra:
    def spectrum(values: Tensor) -> Spectrum:
        return Spectrum(
            singular_values=values,
            effective_rank=effective_rank(values, threshold),
            energy=energy_at(values, kv_rank),
            error=relative_error(values, kv_rank),
        )

    key_gram, value_gram = (gram(weights[name].to(device)) for name in ("k.weight", "v.weight"))
    # LAPACK runs in one thread, so the three stand side by side.
    with ThreadPoolExecutor(min(3, torch.get_num_threads())) as pool:
        grams = (key_gram, value_gram, key_gram + value_gram)
        key, value, joint = (values.cpu() for values in pool.map(singular_values_from_gram, grams))
    return DenseSpectra(
        layer=index,
        key=spectrum(key),
        value=spectrum(value),
        joint=spectrum(joint),
        weighted=weighted,
    )


def _weighted_spectrum(checkpoint: Checkpoint, layer: Layer, kv_rank: int, threshold: float) -> WeightedSpectrum:
    """That of S^(1/2) R, for a covariance C = R R^T of the inputs."""
    moments = layer_moments(layer)
    assert moments.sensitivity is not None
    assert moments.output_power is not None
    try:
        root = cholesky(moments.covariance)
        values = singular_values_from_gram(root.mT @ moments.sensitivity @ root).cpu()
    except (torch.linalg.LinAlgError, LinAlgError):  # type: ignore[attr-defined]
        values = torch.full((1,), torch.nan)
    if not bool(torch.isfinite(values).all()):
        raise CheckpointError(
            f"{checkpoint.store.path}: layer {layer.index} reads inputs on these clips that do not vary or are not "
            "finite; give other clips, or look for NaN in the weights"
        )
    spectrum = WeightedSpectrum(
        singular_values=values,
        effective_rank=effective_rank(values, threshold),
        energy=energy_at(values, kv_rank),
        error=0.0,
        output_power=moments.output_power,
    )
    return dataclasses.replace(spectrum, error=spectrum.predicted_error(kv_rank))


def _latent_spectrum(
    checkpoint: Checkpoint,
    index: int,
    weights: dict[str, Tensor],
    mla: MLALayer,
    threshold: float,
    device: torch.device,
) -> LatentSpectrum:
    # The order of W_UK's and W_UV's rows does not matter to singular values, so they stay mixed by head. Columns are
    # the latent's channels and, where these serve content too, the shared rotary keys'.
    up = weights["kv_b_proj.weight"].to(device, torch.float64, copy=True)
    rank = up.shape[1]
    down = weights["kv_a_proj_with_mqa.weight"][:rank].to(device)
    if "kv_a_layernorm.weight" in weights:
        up[:, : mla.kv_lora_rank] *= weights["kv_a_layernorm.weight"].to(device)
    values = product_singular_values(up, down).cpu()
    return LatentSpectrum(
        layer=index,
        kv_lora_rank=rank,
        singular_values=values,
        effective_rank=effective_rank(values, threshold),
        baseline_rank=random_rank_baseline(up.shape[0], rank, checkpoint.config.dim, threshold),
    )


def read_ahead(read: Callable[[int], T], indices: Sequence[int]) -> Generator[T, None, None]:
    """`read` of each index in turn, the next one in a thread while the caller works on the last."""
    with ThreadPoolExecutor(1) as pool:
        ahead: Future[T] | None = None
        for index in indices:
            following = pool.submit(read, index)
            if ahead is not None:
                yield ahead.result()
            ahead = following
        if ahead is not None:
            yield ahead.result()
