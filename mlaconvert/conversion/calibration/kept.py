"""Tensors that a calibration keeps in files of its own: written whole, and read back without trusting them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mlaconvert.errors import CheckpointError, OutputError
from mlaconvert.files.inputs import reason_of
from mlaconvert.files.store import TensorStore, check_finite
from mlaconvert.files.whole import whole_file


def write_tensors(path: Path, tensors: Mapping[str, Tensor], what: str) -> None:
    """Write a safetensors file, whole or not at all. Raises OutputError, which calls its contents `what`."""
    try:
        with whole_file(path) as partial:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, partial)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{path}: {what} cannot be kept ({reason_of(error)}); make room there") from None


def read_exactly(
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
