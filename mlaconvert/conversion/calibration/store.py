"""Moments of layers, kept in files."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch

from mlaconvert.config.geometry import WanConfig
from mlaconvert.conversion.calibration.kept import read_exactly, write_tensors
from mlaconvert.errors import CheckpointError
from mlaconvert.latent.moments import LayerMoments

# What moments on the disk were made by. Raise it with any change after which the same checkpoint and clips give other
# moments or other generated clips: of `windows`, `LayerWalk`, `layer_moments`, or what `save_moments` writes.
MOMENTS_VERSION = 2


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
    write_tensors(path, tensors, "the moments")


def load_moments(folder: Path, index: int, config: WanConfig, device: torch.device | str = "cpu") -> LayerMoments:
    """Read what `save_moments` wrote for a model of geometry `config`. Raises CheckpointError for anything else."""
    path = moments_file(folder, index)
    dim, head = config.dim, config.head_dim

    def shapes(names: Collection[str]) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {"mean": (dim,), "covariance": (dim, dim), "inverse_norm": ()}
        found |= {"rho": (head // 2, 2), "query": (config.num_heads, head, head)}
        return found | ({"sensitivity": (dim, dim), "output_power": ()} if "sensitivity" in names else {})

    try:
        read = read_exactly(path, shapes, torch.float64)
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


def moments_file(folder: Path, index: int) -> Path:
    """Where a layer's moments lie in their folder."""
    return folder / f"layer-{index:03d}.safetensors"
