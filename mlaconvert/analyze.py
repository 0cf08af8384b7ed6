"""How compressible the attention weights of a checkpoint are, layer by layer.

A dense layer is judged on W_K, W_V and [W_K; W_V]; an MLA layer on M = [W_UK diag(g) W_DKV; W_UV diag(g)
W_DKV], with g the gain of the latent's norm (VideoMLA, arXiv 2605.30351). r_0.99 of the weights does not
predict the quality after healing.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlaconvert.checkpoint import check_finite
from mlaconvert.config import MLALayer, WanConfig, default_budget
from mlaconvert.errors import ConfigError
from mlaconvert.families import Checkpoint
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
class DenseSpectra:
    """A dense layer: W_K, W_V and both on top of each other, each with D singular values."""

    layer: int
    key: Spectrum
    value: Spectrum
    joint: Spectrum

    def to_json(self, singular_values: bool) -> dict[str, Any]:
        """Plain data."""
        spectra = {"key": self.key, "value": self.value, "joint": self.joint}
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


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """The spectra of a checkpoint's layers, in ascending layer order.

    `kv_rank` is the latent rank at which dense layers are judged, `threshold` the share of energy of the
    effective ranks, `dim` the model's width D and `num_layers` all its layers, analysed or not.
    """

    source: str
    description: str
    dim: int
    num_layers: int
    kv_rank: int
    threshold: float
    layers: tuple[DenseSpectra | LatentSpectrum, ...]

    @property
    def dense(self) -> tuple[DenseSpectra, ...]:
        """The dense layers."""
        return tuple(layer for layer in self.layers if isinstance(layer, DenseSpectra))

    @property
    def latent(self) -> tuple[LatentSpectrum, ...]:
        """The MLA layers."""
        return tuple(layer for layer in self.layers if isinstance(layer, LatentSpectrum))

    def summary(self) -> dict[str, Summary]:
        """Min, median and max over the layers of every figure that at least one layer has."""
        dense, latent = self.dense, self.latent
        figures: dict[str, Iterable[float]] = {
            "key_rank": (layer.key.effective_rank for layer in dense),
            "value_rank": (layer.value.effective_rank for layer in dense),
            "joint_rank": (layer.joint.effective_rank for layer in dense),
            "energy_at_budget": (layer.joint.energy for layer in dense),
            "relative_error": (layer.joint.error for layer in dense),
            "kv_lora_rank": (layer.kv_lora_rank for layer in latent),
            "effective_rank": (layer.effective_rank for layer in latent),
            "occupancy": (layer.occupancy for layer in latent),
            "baseline_rank": (layer.baseline_rank for layer in latent),
            "baseline_occupancy": (layer.baseline_occupancy for layer in latent),
        }
        values = {name: list(figure) for name, figure in figures.items()}
        return {
            name: Summary(min=min(found), median=statistics.median(found), max=max(found))
            for name, found in values.items()
            if found
        }

    def to_json(self, *, singular_values: bool = False) -> dict[str, Any]:
        """Plain data with every figure; the singular values only on request."""
        return {
            "source": self.source,
            "description": self.description,
            "dim": self.dim,
            "num_layers": self.num_layers,
            "kv_rank": self.kv_rank,
            "threshold": self.threshold,
            "summary": {name: vars(figure) for name, figure in self.summary().items()},
            "layers": [layer.to_json(singular_values) for layer in self.layers],
        }


def analyze(
    checkpoint: Checkpoint,
    *,
    kv_rank: int | None = None,
    threshold: float = 0.99,
    layers: Sequence[int] | None = None,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Analysis:
    """Spectra of the self-attention weights of `layers` (all by default), one layer in memory at a time.

    `kv_rank` is the latent rank at which dense layers are judged, by default that of `config.default_budget`.
    The float64 maths runs on `device`. `progress(done, total)` is called after each layer.

    Raises ConfigError for a rank, threshold or layer that the model cannot have, or a device without float64;
    CheckpointError for a weight that is missing or not finite.
    """
    config = checkpoint.config
    check_threshold(threshold)
    if kv_rank is None:
        kv_rank = default_budget(config).kv_lora_rank
    if not 1 <= kv_rank <= config.dim:
        raise ConfigError(f"kv_rank is {kv_rank}, but layers are {config.dim} wide: give 1 to {config.dim}")
    chosen = _chosen_layers(config, layers)
    device = torch.device(device)
    if device.type == "mps":
        raise ConfigError("device mps has no float64, which spectra need: use cpu or cuda")

    found: list[DenseSpectra | LatentSpectrum] = []
    for done, index in enumerate(chosen, start=1):
        mla = config.mla.layers[index] if config.mla is not None else None
        if mla is None:
            found.append(_dense_spectra(checkpoint, index, kv_rank, threshold, device))
        else:
            found.append(_latent_spectrum(checkpoint, index, mla, threshold, device))
        if progress is not None:
            progress(done, len(chosen))
    return Analysis(
        source=checkpoint.store.source,
        description=checkpoint.describe(),
        dim=config.dim,
        num_layers=config.num_layers,
        kv_rank=kv_rank,
        threshold=threshold,
        layers=tuple(found),
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


def _dense_spectra(
    checkpoint: Checkpoint, index: int, kv_rank: int, threshold: float, device: torch.device
) -> DenseSpectra:
    def spectrum(gram_matrix: Tensor) -> Spectrum:
        values = singular_values_from_gram(gram_matrix).cpu()
        return Spectrum(
            singular_values=values,
            effective_rank=effective_rank(values, threshold),
            energy=energy_at(values, kv_rank),
            error=relative_error(values, kv_rank),
        )

    key_gram = gram(_finite(checkpoint, f"blocks.{index}.self_attn.k.weight", device))
    value_gram = gram(_finite(checkpoint, f"blocks.{index}.self_attn.v.weight", device))
    key, value = spectrum(key_gram), spectrum(value_gram)
    # In place: at width 5120 each Gram matrix takes 210 MB.
    joint = spectrum(key_gram.add_(value_gram))
    return DenseSpectra(layer=index, key=key, value=value, joint=joint)


def _latent_spectrum(
    checkpoint: Checkpoint, index: int, mla: MLALayer, threshold: float, device: torch.device
) -> LatentSpectrum:
    prefix = f"blocks.{index}.self_attn"
    # The order of W_UK's and W_UV's rows does not matter to singular values, so they stay mixed by head. Columns are
    # the latent's channels and, where these serve content too, the shared rotary keys'.
    up = _finite(checkpoint, f"{prefix}.kv_b_proj.weight", device).to(torch.float64)
    rank = up.shape[1]
    down = _finite(checkpoint, f"{prefix}.kv_a_proj_with_mqa.weight", device)[:rank]
    if checkpoint.config.mla is not None and checkpoint.config.mla.key_norm == "latent":
        up[:, : mla.kv_lora_rank] *= _finite(checkpoint, f"{prefix}.kv_a_layernorm.weight", device)
    values = product_singular_values(up, down).cpu()
    return LatentSpectrum(
        layer=index,
        kv_lora_rank=rank,
        singular_values=values,
        effective_rank=effective_rank(values, threshold),
        baseline_rank=random_rank_baseline(up.shape[0], rank, checkpoint.config.dim, threshold),
    )


def _finite(checkpoint: Checkpoint, name: str, device: torch.device) -> Tensor:
    tensor: Tensor = checkpoint.read(name)
    check_finite(tensor, checkpoint.info(name).name, checkpoint.store.path)
    return tensor.to(device)
