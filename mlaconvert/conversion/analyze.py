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
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

from mlaconvert.clips.folder import Clips
from mlaconvert.config.budget import default_budget
from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.mla import MLALayer
from mlaconvert.conversion.calibration.layer import Layer
from mlaconvert.conversion.calibration.measure import layer_moments
from mlaconvert.conversion.calibration.walk import LayerWalk
from mlaconvert.conversion.calibration.windows import Regime
from mlaconvert.conversion.spectra import Analysis, DenseSpectra, LatentSpectrum, Spectrum, WeightedSpectrum
from mlaconvert.errors import CheckpointError, ConfigError, UnsupportedModelError
from mlaconvert.families.checkpoint import Checkpoint
from mlaconvert.families.open import opened
from mlaconvert.families.source import AnySource
from mlaconvert.files.scratch import return_memory
from mlaconvert.files.store import check_finite
from mlaconvert.latent.lapack import LINALG_ERRORS
from mlaconvert.latent.roots import cholesky
from mlaconvert.latent.spectrum import (
    check_threshold,
    effective_rank,
    energy_at,
    gram,
    product_singular_values,
    random_rank_baseline,
    relative_error,
    singular_values_from_gram,
)
from mlaconvert.progress import Counter, Progress, silent

T = TypeVar("T")


def analyze(
    source: AnySource | Checkpoint,
    *,
    kv_rank: int | None = None,
    threshold: float = 0.99,
    layers: Sequence[int] | None = None,
    clips: Clips | None = None,
    regime: Regime | None = None,
    device: str | torch.device = "cpu",
    progress: Progress = silent,
) -> Analysis:
    """Spectra of the self-attention weights of `layers` (all by default), one layer in memory at a time.

    found = analyze("Wan-AI/Wan2.1-T2V-1.3B", kv_rank=224, layers=[0, 7])
    print(found.layers[0], found.to_json())

    `source` is anything that `open_checkpoint` reads, or a checkpoint that is open already. `kv_rank` is the latent
    rank at which dense layers are judged, by default that of `config.default_budget`; with clips the latent is the
    whole cache of a token but its key norm, so it takes the rotary key's channels too. `clips` go through a dense model
    layer by layer and add the weighted spectra; `regime` says which queries see which keys, by default as the model
    streams. The float64 maths runs on `device`. `progress` counts layers; with clips, those that are only passed
    through too.

    Raises ConfigError for a rank, threshold or layer that the model cannot have, or a device without float64;
    CheckpointError for a weight that is missing or not finite, or a layer that the clips leave degenerate;
    UnsupportedModelError for clips through a model that is converted already.
    """
    with opened(source) as checkpoint:
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
                    f"{checkpoint.store.path}: it is converted already, and clips weigh a dense model; "
                    "give the dense model"
                )
            regime = regime or Regime.of(config.streaming)
            calibration = {"clips": len(clips.latents), **regime.to_json()}
            walk = LayerWalk(checkpoint, clips, regime, device=device)
            # Layers after the last one that was asked for need not be run.
            visits, total = ((layer.index, layer) for layer in islice(walk, chosen[-1] + 1)), chosen[-1] + 1

        found: list[DenseSpectra | LatentSpectrum] = []
        count = Counter(progress, "analyze", total)
        count.show()
        with closing(read_ahead(partial(_weights, checkpoint), chosen)) as weights:
            for index, layer in visits:
                mla = config.mla.layers[index] if config.mla is not None else None
                if index in chosen and mla is None:
                    weighted = None if layer is None else _weighted_spectrum(checkpoint, layer, kv_rank, threshold)
                    found.append(_dense_spectra(index, next(weights), weighted, kv_rank, threshold, device))
                elif mla is not None:
                    found.append(_latent_spectrum(checkpoint, index, next(weights), mla, threshold, device))
                return_memory()
                count.step()
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
    except LINALG_ERRORS:
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
