"""What `analyze` reports: spectra of weights and inputs, and what a budget keeps of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

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
